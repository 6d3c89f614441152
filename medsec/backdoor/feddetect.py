"""FedDetect (Jin & Li 2023), as released, as described and hardened, and the clipping that it is compared with.

FedDetect looks for malicious clients of a federated GAN in the losses that they report, and takes away their weight.
Every defence here is a rule with a memory: ``defence(updates, round) -> (state, diagnostics)``, one object a run, rounds
counted from 0. ``diagnostics["weights"]`` gives every client's share of the average; where the defence looks for
attackers, ``flagged`` says whom it suspects in this round.

All of them treat odd input alike. Fewer than three updates are not compared; what a defence remembers still counts. A
finite loss is taken as at most ±`LARGEST_LOSS`; each class says what becomes of one that is missing, NaN or infinite. A
client that is away keeps its count or evidence: absence proves no innocence. If nobody is left, the state stays.
"""

import dataclasses
import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special
from torch import Tensor

from medsec.core.errors import InputError
from medsec.federated.aggregators import fedavg, uniform_mean
from medsec.federated.rounds import State, Update, scale_update

__all__ = ["Described", "Hardened", "NormClip", "Released"]
__all__ += ["flag_threshold", "isolation_flags", "loss_evidence", "map_evidence", "peculiarity"]

LEAST_CLIENTS = 3
LARGEST_LOSS = 1e6  # beyond float32 the isolation forest would flag the wrong ones, and a median would overflow
# 1.4826 MAD estimates the standard deviation of normal data.
MAD_TO_SD = 1.4826


def isolation_flags(losses: Sequence[float]) -> np.ndarray:
    """Which losses the released detector isolates: an isolation forest on the points (0, |loss|).

    ``IsolationForest(max_samples=m, contamination="auto", random_state=999)`` as in the released code; it is two-sided,
    a low loss is flagged as well. Its threshold compares sums that are equal up to rounding where all losses are equal:
    it then flags everybody (m = 4 and 7) or nobody (3, 5, 6, 8, 9).

    Args:
        losses: (m,) finite numbers, at most `LARGEST_LOSS` in size.

    Returns:
        (m,) bool; nobody is flagged among fewer than three.
    """
    from sklearn.ensemble import IsolationForest  # slow to import

    losses = np.abs(np.asarray(losses, dtype=np.float64))
    if len(losses) < LEAST_CLIENTS:
        return np.zeros(len(losses), dtype=bool)
    points = np.stack([np.zeros_like(losses), losses], axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal points make it warn of its own averages
        forest = IsolationForest(max_samples=len(losses), contamination="auto", random_state=999)
        return forest.fit_predict(points) == -1


def null_rates(m: int, rounds: int, seed: int) -> dict[str, float]:
    """What the released rule does to ``m`` honest clients whose losses are independent and identically distributed.

    Returns:
        ``fpr``: share of client-rounds flagged; ``any_flag``: share of rounds in which somebody is flagged;
        ``acts``: share of rounds in which the rule takes weight away (somebody, but fewer than m // 2, flagged).
    """
    rng = np.random.default_rng(seed)
    flagged = np.stack([isolation_flags(rng.normal(1.0, 0.1, m)) for _ in range(rounds)])
    some = flagged.sum(1)
    return {
        "fpr": float(flagged.mean()),
        "any_flag": float((some > 0).mean()),
        "acts": float(((some > 0) & (some < m // 2)).mean()),
    }


def reported(updates: Sequence[Update], name: str) -> np.ndarray:
    """(n,) the losses of that name; NaN where a client reports none that is finite."""
    values = np.array([u.metrics.get(name, math.nan) for u in updates], dtype=np.float64)
    return np.where(np.isfinite(values), values.clip(-LARGEST_LOSS, LARGEST_LOSS), math.nan)


def _forest(updates: Sequence[Update], name: str) -> np.ndarray:
    """`isolation_flags` of those who report that loss; the others are flagged (our choice: the released code crashes)."""
    losses = reported(updates, name)
    known = np.isfinite(losses)
    flags = ~known
    flags[known] = isolation_flags(losses[known])
    return flags


def _need(updates: Sequence[Update]) -> None:
    if not updates:
        raise InputError("no usable update in this round; check what the clients send")


def _average(updates: Sequence[Update], weights: Mapping[int, float]) -> tuple[State, dict[int, float]]:
    """The weighted mean and the shares; the plain mean if the weights of those present sum to zero."""
    raw = np.array([weights[u.client] for u in updates])
    if not raw.sum() > 0:
        raw = np.ones(len(updates))
    state, diagnostics = fedavg(updates, weights=raw.tolist())
    return state, diagnostics["weights"]


class Released:
    """FedDetect as in the authors' released code.

    Every client has a weight, at first 1/m, and a count. After the warm-up, if somebody but fewer than m // 2 clients
    are flagged by `isolation_flags` on the loss of their *last* batch, each flagged one's count c rises by one, its
    weight is multiplied by decay^c, and the weights are normalised. Counts never fall: nobody is forgiven.

    With two clients m // 2 is 1 and the rule never acts. Without a finite loss a client is flagged. If all weights of
    those present have sunk to zero (after about 120 flags), they count equally.

    Args:
        warm_up: rounds without action (released: 11, since its option of 10 is compared with ``epoch > 10``).
        decay: released: 0.9.
    """

    def __init__(self, warm_up: int, decay: float = 0.9):
        self.warm_up, self.decay = warm_up, decay
        self.weights: dict[int, float] = {}
        self.counts: dict[int, int] = {}

    def __call__(self, updates: Sequence[Update], round: int) -> tuple[State, dict]:
        _need(updates)
        flags = _forest(updates, "last_loss_g")
        for u in updates:  # a client that joins later starts with the mean weight of the others
            self.weights.setdefault(u.client, float(np.mean([*self.weights.values()] or [1.0])))
            self.counts.setdefault(u.client, 0)
        acts = round >= self.warm_up and 0 < flags.sum() < len(updates) // 2
        if acts:
            for u, flagged in zip(updates, flags, strict=True):
                if flagged:
                    self.counts[u.client] += 1
                    self.weights[u.client] *= self.decay ** self.counts[u.client]
            total = sum(self.weights.values())
            self.weights = {client: w / total for client, w in self.weights.items()}
        state, shares = _average(updates, self.weights)
        return state, {"weights": shares, "flagged": _by_client(updates, flags), "acted": bool(acts)}


class Described:
    """FedDetect as the abstract says: the server detects malicious clients from their losses and blocks them.

    The text says no more; ours are: the same isolation forest, on the mean loss of the epoch; as in the released code a
    round with m // 2 or more flags does not count; who is flagged in ``patience`` rounds running is blocked for good.
    Without a finite loss a client is flagged. If all who are present are blocked, the plain mean of them is taken.

    Args:
        warm_up: rounds without action.
        patience: flags in a row that block.
    """

    def __init__(self, warm_up: int, patience: int):
        self.warm_up, self.patience = warm_up, patience
        self.row: dict[int, int] = {}
        self.blocked: set[int] = set()

    def __call__(self, updates: Sequence[Update], round: int) -> tuple[State, dict]:
        _need(updates)
        flags = _forest(updates, "loss_g")
        if round >= self.warm_up and flags.sum() < len(updates) // 2:
            for u, flagged in zip(updates, flags, strict=True):
                self.row[u.client] = self.row.get(u.client, 0) + 1 if flagged else 0
                if self.row[u.client] >= self.patience:
                    self.blocked.add(u.client)
        state, shares = _average(updates, {u.client: float(u.client not in self.blocked) for u in updates})
        return state, {"weights": shares, "flagged": _by_client(updates, flags)}


def clipped_mean(updates: Sequence[Update], received: State) -> tuple[State, dict]:
    """Mean of the updates, each shortened to the median length of the round (Sun et al. 2019, arXiv:1911.07963).

    An update is what a client sends minus what it ``received``, over all floating-point entries.
    """
    _need(updates)
    lengths = np.array([update_length(u.state, received) for u in updates])
    limit = float(np.median(lengths))
    clipped = []
    for u, length in zip(updates, lengths, strict=True):
        factor = min(1.0, limit / length) if length > 0 else 1.0
        clipped.append(dataclasses.replace(u, state=scale_update(u.state, received, factor)))
    return uniform_mean(clipped)


class NormClip:
    """`clipped_mean` of every round.

    Args:
        state: what the server holds before the first round.
    """

    def __init__(self, state: State):
        self.state = state

    def __call__(self, updates: Sequence[Update], round: int) -> tuple[State, dict]:
        self.state, diagnostics = clipped_mean(updates, self.state)
        return self.state, diagnostics


class ClipThenTrain:
    """`clipped_mean`, after which the server has the last word: it trains the average on images of its own (ours).

    Nobody is judged, so nobody can be excluded wrongly. What a client plants has to survive a round of training against a
    discriminator that has never seen a real image with a trigger; and clipping bounds how deep it can be planted.

    Args:
        state: what the server holds before the first round.
        train: ``train(state, round) -> state``, the server's own local training on clean images.
    """

    def __init__(self, state: State, train: Callable[[State, int], State]):
        self.state, self.train = state, train

    def __call__(self, updates: Sequence[Update], round: int) -> tuple[State, dict]:
        clipped, diagnostics = clipped_mean(updates, self.state)
        self.state = self.train(clipped, round)
        return self.state, diagnostics


def update_length(sent: State, received: State) -> float:
    """Euclidean length of an update over all floating-point entries."""
    squares = [(v.double() - received[k].double()).square().sum() for k, v in sent.items() if v.is_floating_point()]
    return float(torch.stack(squares).sum().sqrt())


# The hardened defence ------------------------------------------------------------------------------------------------

WINDOWS = (3, 7)  # pixels a side of the neighbourhoods that are searched, besides the whole image


def peculiarity(images: Tensor) -> Tensor:
    """How far what each client's generator draws lies from what the others' draw, for the same latents and labels.

    Of every client's images the mean and the standard deviation over the latents are taken, pixel by pixel: two maps.
    From each map the median of the *other* clients' maps is subtracted. The root mean square of the difference is taken
    over all `WINDOWS`, of which the largest counts, and over the whole image. A second time the difference is divided
    by what is usual around the pixel (the lower median over the clients of its size, averaged over 5 × 5 pixels, plus a
    tenth of the image's mean), so that a faint pattern in a quiet corner counts too.

    Args:
        images: (m, n, C, S, S), image k of every client from the same latent vector and label; m ≥ 3.

    Returns:
        (m, 12) positive numbers: 2 maps × {as it is, divided} × (2 windows and the whole image).
    """
    if images.ndim != 5 or len(images) < LEAST_CLIENTS:
        raise InputError(f"images of shape {tuple(images.shape)}: need (m, n, C, S, S) with m >= {LEAST_CLIENTS}")
    columns = []
    for maps in (images.mean(1), images.std(1)):
        difference = maps - _median_of_others(maps)
        usual = F.avg_pool2d(_pad(difference.abs().median(0).values[None], 2), 5, 1)
        usual = usual + 0.1 * usual.mean() + 1e-6
        for relative in (difference, difference / usual):
            square = relative**2 + 1e-12  # keeps the root's gradient finite
            columns += [F.avg_pool2d(_pad(square, k // 2), k, 1).amax((1, 2, 3)).sqrt() for k in WINDOWS]
            columns.append(square.mean((1, 2, 3)).sqrt())
    return torch.stack(columns, 1) + 1e-9


def _pad(maps: Tensor, pixels: int) -> Tensor:
    return F.pad(maps, (pixels,) * 4, mode="replicate")


def _median_of_others(values: Tensor) -> Tensor:
    """(m, …) -> (m, …): for every client the median over all the others (the mean of the middle two)."""
    others = [torch.cat([values[:i], values[i + 1 :]]) for i in range(len(values))]
    low, high = (len(values) - 2) // 2, (len(values) - 1) // 2
    ranked = [other.sort(0).values for other in others]
    return torch.stack([(r[low] + r[high]) / 2 for r in ranked])


def map_evidence(log: Tensor, scale: tuple[float, float], before: Sequence[Tensor] = ()) -> Tensor:
    """How peculiar each client is for this federation: (m, 12) -> (m,), differentiable.

    The largest over the columns of ``log`` minus the (lower) median of this round's and the last rounds' values of all
    clients, in units of the standard deviation ``scale`` that it has for honest clients. The earlier rounds steady that
    median where clients are few: of four, one that sends the mean of the others, and so draws what is least peculiar, would
    otherwise make honest ones stand out.

    Args:
        log: logarithm of `peculiarity`.
        scale: for columns as they are, and for those divided by what is usual.
        before: the same of earlier rounds, (clients, 12) each.
    """
    columns = len(WINDOWS) + 1
    unit = torch.tensor([*[scale[0]] * columns, *[scale[1]] * columns] * 2, device=log.device)
    usual = torch.cat([*before, log]).median(0).values
    return ((log - usual) / unit).amax(1)


def loss_evidence(losses: np.ndarray, floor: float) -> np.ndarray:
    """(m,) one-sided robust z of each reported loss among the others': (loss − median) / max(1.4826 MAD, floor).

    −inf (no evidence) without a finite loss of its own or without two others: what is not reported accuses nobody.
    """
    evidence = np.full(len(losses), -np.inf)
    for i, loss in enumerate(losses):
        others = np.delete(losses, i)
        others = others[np.isfinite(others)]
        if np.isfinite(loss) and len(others) >= LEAST_CLIENTS - 1:
            centre = np.median(others)
            evidence[i] = (loss - centre) / max(MAD_TO_SD * np.median(np.abs(others - centre)), floor)
    return evidence


def flag_threshold(fpr: float) -> float:
    """Standard normal quantile of 1 − ``fpr`` / 13: Bonferroni's correction for 12 map statistics and the loss."""
    return float(-special.ndtri(fpr / (4 * (len(WINDOWS) + 1) + 1)))


@dataclasses.dataclass(eq=False)
class Hardened:
    """Our repair: two kinds of evidence, calibrated, with a memory that forgives.

    *Evidence.* (1) The paper's own: reported losses, but the mean of the epoch, only upwards, and robustly scaled
    (`loss_evidence`). (2) What needs nobody's honesty: the server draws from every returned generator with fresh latents
    that it keeps secret, and looks for a place where one client's images differ from the others' by more than clients
    differed from each other in this and the last rounds (`map_evidence`). A client's evidence e is the larger of the two.

    *Flag.* e above `flag_threshold`.

    *Memory.* A one-sided CUSUM (Page 1954, Biometrika 41:100): S ← clip(S + e − drift, 0, 2 limit), with drift and limit
    in units of the flag's threshold. A client below the limit counts fully, any other counts nothing: one very strong
    sign, or weaker ones in a row, take a client out, and quiet rounds bring it back. (A weight that fades with S looks
    milder and is not: an honest client that counts less in the average is less like it in the next round, so that its
    suspicion feeds itself.)

    It looks on during the second part of the warm-up and acts after it. Without a finite loss the images alone speak. A
    generator that draws NaN counts as caught, and the others are compared without it. The price: n images from every
    generator a round, and each client's update in the clear, which rules out plain secure aggregation.

    Args:
        draw: ``(state, round) -> (n, C, S, S)`` images from a client's state, the same latents for all in a round.
        state: what the server holds before the first round.
        warm_up: rounds without action.
        watch: first round whose evidence is remembered; before it the generators are too raw to be compared.
        fpr: target false-positive rate of the flag, per client and round.
        scale: standard deviations of an honest client's log ratios (`map_evidence`); chosen on tuning seeds.
        window: number of rounds, this one included, that say how much clients usually differ.
        loss_floor: least scale of the losses (nats).
        drift, limit: of the CUSUM, in units of the threshold.
    """

    draw: Callable[[State, int], Tensor]
    state: State
    _: dataclasses.KW_ONLY
    warm_up: int
    watch: int
    fpr: float
    scale: tuple[float, float]
    window: int
    loss_floor: float
    drift: float
    limit: float

    def __post_init__(self):
        self.threshold = flag_threshold(self.fpr)
        self.drift, self.limit = self.drift * self.threshold, self.limit * self.threshold
        self.suspicion: dict[int, float] = {}
        self.recent: deque[Tensor] = deque(maxlen=self.window - 1)  # log peculiarities of the rounds before

    def evidence(self, updates: Sequence[Update], round: int) -> np.ndarray:
        """(m,) each client's evidence in this round, which is remembered as one of the last.

        −inf where there are fewer than three to compare, ∞ for a generator whose images are not finite.
        """
        if len(updates) < LEAST_CLIENTS:
            return np.full(len(updates), -np.inf)
        with torch.no_grad():
            images = torch.stack([self.draw(u.state, round) for u in updates])
            drawn = torch.isfinite(images).flatten(1).all(1)
            seen = torch.where(drawn, -math.inf, math.inf).double()
            if drawn.sum() >= LEAST_CLIENTS:
                log = peculiarity(images[drawn]).log()
                seen[drawn] = map_evidence(log, self.scale, self.recent).double()
                self.recent.append(log)
        return np.maximum(seen.cpu().numpy(), loss_evidence(reported(updates, "loss_g"), self.loss_floor))

    def __call__(self, updates: Sequence[Update], round: int) -> tuple[State, dict]:
        _need(updates)
        clients = [u.client for u in updates]
        evidence = self.evidence(updates, round) if round >= self.watch else np.full(len(updates), -np.inf)
        for client, e in zip(clients, evidence, strict=True):
            if e != -np.inf:  # else nothing was seen of it: neither accused nor forgiven
                before = self.suspicion.get(client, 0.0)
                self.suspicion[client] = float(np.clip(before + e - self.drift, 0.0, 2 * self.limit))
        weights = dict.fromkeys(clients, 1.0)
        if round >= self.warm_up:
            weights = {client: float(self.suspicion.get(client, 0.0) < self.limit) for client in clients}
        shares = weights
        if sum(weights.values()) > 0:
            self.state, shares = _average(updates, weights)
        return self.state, {
            "weights": shares,
            "flagged": _by_client(updates, evidence > self.threshold),
            "evidence": dict(zip(clients, evidence.tolist(), strict=True)),
        }


def _by_client(updates: Sequence[Update], flags: np.ndarray) -> dict[int, bool]:
    return {u.client: bool(flag) for u, flag in zip(updates, flags, strict=True)}
