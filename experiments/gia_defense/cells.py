"""What notebook 03 measures: what an attacker gets out of each defence's gradients, and what the defence costs.

`attack_cell` is one seed of one defence under all attacks; `sweep_cell` the same with another batch, labels to infer or more
local steps; `federation_cell` trains one federation with the defence, and attacks it on the way. A defence is judged by the
best that an attacker who knows it can do, per victim. The clients are in `experiments.gia_defense.clients`, the attackers in
`experiments.gia_defense.adaptive`.

Scenarios: ``naive``, the attacks as if there were no defence; ``adaptive``, those and all that knowledge of the defence
allows; ``ceiling``, what an attacker has who recovers the changed image x′ exactly (image-space defences only); ``change``,
what is added to the image: ``rms``, ``offset_share`` (of its energy) and ``lesion_ratio`` (rms inside lesions over outside);
``fingerprint``, whose gradient it is, without a reconstruction (`experiments.gia_defense.fingerprint`); ``imprint`` and
``secagg``, a dishonest server (`experiments.gia_defense.imprint`);
``prior_only``, the floor: what an attacker has without any gradient; ``utility``, the classifier that comes out.

Key columns: ``attack``, one attack by itself; ``batch``, ``labels``, ``steps``, ``round`` (as a share of all rounds): empty
for one image with its label, one step, the untrained network; ``strength``: another value of a defence's parameter than
the headline's; ``region``: empty for the whole image, else ``lesion`` or ``outside``, by the masks of the cohort.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from experiments.gia_defense import adaptive as attackers
from experiments.gia_defense import clients as instruments
from experiments.gia_defense import fingerprint as fingerprints
from experiments.gia_defense import imprint as imprints
from experiments.gia_defense.adaptive import Case
from experiments.gia_defense.clients import BASELINES, Setup, prepare
from experiments.params import Params
from medsec import data
from medsec.core.errors import InputError
from medsec.evidence import cells, intervals, tables
from medsec.federated import classifier as fedcls
from medsec.inversion import defences as gradient_defences
from medsec.inversion import perturbation
from medsec.inversion import scores as reconstruction
from medsec.inversion.attacks import Reconstructions

KEYS = ("attack", "batch", "round", "labels", "steps", "strength", "region")
QUICK = {  # what the notebook itself runs: variants under attack, and those whose cost it measures
    "attack": (
        "none",
        "soteria",
        "shadow_released",
        "shadow_described",
        "shadow_hardened",
        "autoencoder_only",
    ),
    "utility": ("none", "shadow_hardened", "public_only"),
}
QUICK["fingerprint"] = (*QUICK["attack"], "public_only")
QUICK["imprint"] = ("none", "dp_sgd", "shadow_released", "shadow_hardened")
ADAPTIVE = ("known", "smoother", "smoothest", "joint", "generator", "purified", "unmasked")
DELTA = 1e-5  # of differential privacy


# How good a reconstruction is ----------------------------------------------------------------------------------------

Measure = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
Scores = Mapping[str, Mapping[str, np.ndarray]]


def measures(setup: Setup, images: Sequence[Tensor], labels: Sequence[Tensor], index: Tensor) -> Measure:
    """Function of reconstructions and originals (V, B, …) -> every metric for every victim (V,), means over a batch.

    Args:
        images, labels: all clients' images and labels. ``retrieval`` searches among the images. ``retrieval_projected`` does
            so after the defender's autoencoder, for them and for the reconstruction. ``retrieval_latent`` searches where the
            server would: among the images of this client and this class, in the latent space of the autoencoder.
        index: (V, B) the victims' places in the first client's images.
    """
    gallery = torch.cat(list(images))
    projected, own = _projected(setup, gallery), instruments.latents(setup, images[0])
    gallery = gallery.numpy()
    other = labels[0][None, :] != labels[0][index.flatten()][:, None]  # (V·B, N) of another class

    def measure(found: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
        v, b = truth.shape[:2]
        ordered = paired(found, truth)
        flat, at = truth.reshape(v * b, *truth.shape[2:]), index.flatten().numpy()
        values = {
            "psnr": reconstruction.psnr(ordered, flat),
            "ssim": reconstruction.ssim(ordered, flat),
            "retrieval": reconstruction.retrieval(ordered, gallery, at),
            "retrieval_projected": reconstruction.retrieval(
                _projected(setup, torch.from_numpy(ordered)), projected, at
            ),
            "retrieval_latent": (
                torch.cdist(instruments.latents(setup, torch.from_numpy(ordered)), own)
                .masked_fill(other, torch.inf)
                .argmin(1)
                .numpy()
                == at
            ),
        }
        return {name: np.asarray(value, dtype=np.float64).reshape(v, b).mean(1) for name, value in values.items()}

    return measure


def _projected(setup: Setup, images: Tensor) -> np.ndarray:
    with torch.no_grad():
        return setup.autoencoder(images).numpy()


def paired(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(V, B, …) twice -> (V·B, …): reconstructions, each beside the original of its batch that it fits."""
    return np.concatenate([reconstruction.match(f, t) for f, t in zip(found, truth, strict=True)])


def scored(found: Mapping[str, Reconstructions], measure: Measure, truth: np.ndarray) -> Scores:
    """Every metric of every attack, NaN for victims of whom the search found nothing finite."""
    scores = {}
    for name, each in found.items():
        values, failed = measure(each.images.numpy(), truth), each.failed.numpy()
        scores[name] = {metric: np.where(failed, np.nan, value) for metric, value in values.items()}
    return scores


def strongest(scores: Scores) -> np.ndarray:
    """(V,) which of several attacks has the highest PSNR, as its place in ``scores``; those that failed come last."""
    return np.argmax([np.nan_to_num(each["psnr"], nan=-np.inf) for each in scores.values()], axis=0)


def chosen(best: np.ndarray, values: Sequence[np.ndarray]) -> np.ndarray:
    """Victim by victim the value (or image) of the attack that was the strongest."""
    return np.stack([values[k][v] for v, k in enumerate(best)])


# One defence under attack --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One seed of one defence: what the clients hold, and which images of the first one are attacked, ``index`` (V, B)."""

    setup: Setup
    variant: str
    seed: int
    images: list[Tensor]
    labels: list[Tensor]
    index: Tensor

    def clients(self) -> list[instruments.Client]:
        """Fresh ones."""
        return instruments.clients(self.variant, self.setup, self.images, self.labels, self.seed)

    def case(self, model: nn.Module, round: int = 0, own: instruments.Client | None = None, **options) -> Case:
        """What the server sees of the victims; of a fresh client unless ``own`` is given."""
        x, y = self.images[0][self.index], self.labels[0][self.index]
        return attackers.case(own or self.clients()[0], model, x, y, round, **options)

    def rows(self, scenario: str) -> tables.Rows:
        return tables.Rows(KEYS, self.seed, self.variant, scenario)

    @functools.cached_property
    def measure(self) -> Measure:
        return measures(self.setup, self.images, self.labels, self.index)

    @functools.cached_property
    def lesions(self) -> np.ndarray | None:
        """(V·B, S, S) bool, the victims' masks; None if the cohort has none."""
        masks = self.setup.cohort["client"].lesion
        if masks is None:
            return None
        return masks[instruments.places(self.setup, self.seed)[0]][self.index.flatten().numpy()].astype(bool)


def _begin(cohort: str, params: Params, variant: str, seed: int, victims: int | None, batch: int = 1) -> Run:
    """``victims``: how many batches of the first client; None: all its images, one a batch."""
    torch.set_num_threads(1)
    setup = prepare(cohort, params)
    images, labels = instruments.deal(setup, seed)
    n = len(images[0]) if victims is None else victims
    return Run(setup, variant, seed, images, labels, attackers.victims(setup, images[0], n, batch, seed))


def attack_cell(cohort: str, params: Params, variant: str, seed: int) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """One seed of one defence: untrained network, batch 1, every attack.

    Returns:
        Rows with the key columns `KEYS`, means over the victims; and the pictures (V, C, S, S) of the originals, of what
        the defence makes of them, and of the strongest naive and adaptive reconstruction.
    """
    p = params.inversion
    run = _begin(cohort, params, variant, seed, p.victims)
    case = run.case(instruments.network(run.setup, seed))
    later = later_rounds(run) if "joint" in p.adaptive else []
    rows, shown = _attacked(run, case, [a for a in p.attacks if a != "bn"], later, {})
    parts = [rows]
    if case.changed is not None:
        parts.append(_change_rows(run, case))
    if "bn" in p.attacks:
        parts.append(_statistics_rows(run))
    return pd.concat(parts).reset_index(drop=True), shown


def later_rounds(run: Run) -> list[Case]:
    """The same victims in the rounds after the first, as the federation goes on with this defence."""
    p, own = run.setup.params.inversion, run.clients()
    short = p.federation.model_copy(update={"rounds": p.joint_rounds - 1})
    model = instruments.network(run.setup, run.seed)
    states = fedcls.train(model, run.images, run.labels, [c.defend for c in own], short, run.seed)
    cases = []
    for round, state in enumerate(states[1:], start=1):
        now = instruments.network(run.setup, run.seed)
        now.load_state_dict(state)
        cases.append(run.case(now, round, own[0]))
    return cases


def _statistics_rows(run: Run) -> pd.DataFrame:
    """On a network with BatchNorm, whose statistics the client sends: gradients with them (``bn``), and without."""
    case = run.case(instruments.network(run.setup, run.seed, norm=True))
    attacks = attackers.naive(run.setup, case, ["bn", "ig"], run.seed)
    scores = scored({"bn": attacks["bn"], "bn_without": attacks["ig"]}, run.measure, case.x.numpy())
    rows = run.rows("naive")
    for attack, each in scores.items():
        _add(rows, each, attack=attack)
    return rows.table()


def _attacked(
    run: Run, case: Case, names: Sequence[str], later: Sequence[Case], keys: Mapping[str, str]
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Rows of all scenarios of one case, and the first image of every victim's batch in pictures."""
    setup, wanted = run.setup, run.setup.params.inversion.adaptive
    plain = attackers.naive(setup, case, names, run.seed)
    everything = plain | attackers.adaptive(run.variant, setup, case, later, wanted, run.seed)
    truth, parts = case.x.numpy(), []
    scores = scored(everything, run.measure, truth)
    shown = {"original": truth, "sent": truth}
    for scenario, attacks in (("naive", plain), ("adaptive", everything)):
        mine = {name: scores[name] for name in attacks}
        best = strongest(mine)
        shown[scenario] = chosen(best, [everything[name].images.numpy() for name in mine])
        values = {metric: chosen(best, [each[metric] for each in mine.values()]) for metric in mine[next(iter(mine))]}
        rows = run.rows(scenario)
        _add(rows, values, **keys)
        _add_finer(rows, run, shown[scenario], truth, keys, lost=np.isnan(values["psnr"]))
        for attack in attacks if len(everything) > 1 else ():
            _add(rows, mine[attack], **keys, attack=attack)
        parts.append(rows.table())
    others = {"prior_only": attackers.floor(setup, case.guess).numpy()}
    if case.changed is not None:
        others["ceiling"] = shown["sent"] = case.changed.clamp(0, 1).numpy()
    for scenario, made in others.items():
        rows = run.rows(scenario)
        _add(rows, run.measure(made, truth), **keys)
        _add_finer(rows, run, made, truth, keys, lost=np.zeros(len(truth), dtype=bool))
        parts.append(rows.table())
    return pd.concat(parts, ignore_index=True), {name: made[:, 0] for name, made in shown.items()}


def _add(rows: tables.Rows, values: Mapping[str, np.ndarray], **keys: str) -> None:
    """The mean over the victims of whom there is a reconstruction, and the share of the others."""
    lost = np.isnan(values["psnr"])
    rows.add("failed", lost.mean(), len(lost), **keys)
    for metric, value in values.items() if not lost.all() else ():
        rows.add(metric, value[~lost].mean(), int((~lost).sum()), **keys)


def _add_finer(rows: tables.Rows, run: Run, images: np.ndarray, truth: np.ndarray, keys, lost: np.ndarray) -> None:
    """What is measured of the strongest attack only: the perceptual distance, and the error inside and outside lesions."""
    if lost.all():
        return
    images, truth = images[~lost], truth[~lost]
    ordered, flat = paired(images, truth), truth.reshape(-1, *truth.shape[2:])
    rows.add("st_lpips", reconstruction.st_lpips(ordered, flat).mean(), len(flat), **keys)
    if run.lesions is None:
        return
    lesion = run.lesions[np.repeat(~lost, run.index.shape[1])]
    ill = lesion.any((1, 2))
    for region, mask in (("lesion", lesion), ("outside", ~lesion)) if ill.any() else ():
        value = reconstruction.region_psnr(ordered[ill], flat[ill], mask[ill])
        rows.add("psnr", value.mean(), int(ill.sum()), **keys, region=region)


def _change_rows(run: Run, case: Case) -> pd.DataFrame:
    delta = (case.changed - case.x).flatten(0, 1)
    rows, lesion = run.rows("change"), run.lesions
    rows.add("rms", float(delta.square().flatten(1).mean(1).sqrt().mean()), len(delta))
    rows.add("offset_share", float(perturbation.offset_share(delta).mean()), len(delta))
    if lesion is not None and lesion.any():
        ill = lesion.any((1, 2))
        energy, mask = delta.square().mean(1).numpy()[ill], lesion[ill]
        inside, outside = ((energy * m).sum((1, 2)) / m.sum((1, 2)) for m in (mask, ~mask))
        rows.add("lesion_ratio", float(np.sqrt(inside / np.maximum(outside, 1e-12)).mean()), int(ill.sum()))
    return rows.table()


@dataclass(frozen=True)
class Changes:
    """What defences add to some images: ``images`` (n, C, S, S), by name δ of the same shape, ``lesions`` (n, S, S) or None."""

    images: np.ndarray
    deltas: dict[str, Tensor]
    lesions: np.ndarray | None


def changes(cohort: str, params: Params, variants: Sequence[str], seed: int) -> Changes:
    """δ of some defences in round 0, on the victims of the last class (on the phantom: those with a lesion).

    That is the last class which the first client holds.
    """
    whole = _begin(cohort, params, "none", seed, None)
    ill = whole.labels[0][whole.index[:, 0]] == whole.labels[0].max()
    run = dataclasses.replace(whole, index=whole.index[ill][: params.inversion.victims])
    model, deltas = instruments.network(run.setup, seed), {}
    for variant in variants:
        case = dataclasses.replace(run, variant=variant).case(model)
        deltas[variant] = (case.changed - case.x)[:, 0]
    return Changes(case.x[:, 0].numpy(), deltas, run.lesions)


def spectrum(delta: Tensor) -> pd.DataFrame:
    """Share of ‖δ‖² at every spatial frequency: columns ``x`` (cycles an image side), ``value, low, high`` over the images."""
    _, total = perturbation.radial_spectrum(delta)
    share = (total / total.sum(1, keepdim=True)).numpy()
    ends = [intervals.bootstrap_interval(values) for values in share.T]
    low, high = zip(*ends, strict=True)
    return pd.DataFrame({"x": range(share.shape[1]), "value": share.mean(0), "low": low, "high": high})


# Other conditions ----------------------------------------------------------------------------------------------------


def sweep_cell(cohort: str, params: Params, variant: str, seed: int, **condition: int | str) -> pd.DataFrame:
    """One seed of one defence on the untrained network, under a condition that the rows have as keys.

    Args:
        condition: ``batch``, images in a batch; ``labels``: ``known``, or ``inferred`` by the attacker; ``steps``, local steps
            on the batch. By default 1, known and 1.
    """
    p = params.inversion
    run = _begin(cohort, params, variant, seed, p.sweep_victims, int(condition.get("batch", 1)))
    public = run.setup.splits["public"][0] if condition.get("labels") == "inferred" else None
    options = {"steps": int(condition.get("steps", 1)), "lr": p.federation.lr, "public": public}
    case = run.case(instruments.network(run.setup, seed), **options)
    return _single_round(run, case, {name: str(value) for name, value in condition.items()})


def longer_cell(cohort: str, params: Params, variant: str, seed: int, batch: int) -> pd.DataFrame:
    """One seed of a longer search of `ig` for a batch: rows with the key ``attack``, such as ``ig, 1000 steps``.

    Args:
        params: with the number of steps in its place.
    """
    p = params.inversion
    run = _begin(cohort, params, variant, seed, p.sweep_victims, batch)
    case = run.case(instruments.network(run.setup, seed))
    found = attackers.naive(run.setup, case, ["ig"], seed)
    rows = run.rows("naive")
    for each in scored(found, run.measure, case.x.numpy()).values():
        _add(rows, each, batch=str(batch), attack=f"ig, {p.attack.iterations} steps")
    return rows.table()


def _single_round(run: Run, case: Case, keys: Mapping[str, str]) -> pd.DataFrame:
    """The attacks that need one round only; no attack by itself."""
    rows, _ = _attacked(run, case, ["ig", "prior"], [], keys)
    return rows[rows["attack"] == ""].reset_index(drop=True)


def federation_cell(cohort: str, params: Params, variant: str, seed: int, shares: Sequence[float] = ()) -> pd.DataFrame:
    """One federation that trains with a defence from beginning to end: what comes out, and what leaks on the way.

    Args:
        shares: of all rounds, after which the first client's gradients are attacked; rows with the key ``round``.

    Returns:
        Rows ``auc``, ``macro_f1``, ``balanced_accuracy`` of the final network (``epsilon`` for ``dp_sgd``), and the attacks'.
    """
    p = params.inversion
    run = _begin(cohort, params, variant, seed, p.sweep_victims if shares else 0)
    own, model = run.clients(), instruments.network(run.setup, seed)
    states = fedcls.train(model, run.images, run.labels, [c.defend for c in own], p.federation, seed)
    model.load_state_dict(states[-1])
    rows, splits = run.rows("utility"), run.setup.splits
    for metric, value in fedcls.utility(model, splits["val"], splits["test"]).items():
        rows.add(metric, value, len(splits["test"][0]))
    if variant == "dp_sgd":
        rows.add("epsilon", epsilon(params, len(run.images[0])), 1)
    parts = [rows.table()]
    for share in shares:
        round = int(share * p.federation.rounds + 0.5)
        model.load_state_dict(states[round])
        parts.append(_single_round(run, run.case(model, round, own[0]), {"round": f"{share:g}"}))
    return pd.concat(parts, ignore_index=True)


def strength_cell(cohort: str, params: Params, variant: str, seed: int, strength: float) -> pd.DataFrame:
    """One seed of a defence at another strength than the headline's: attacked in the first round, and trained with.

    Args:
        params: with the strength in its place.
        strength: what the rows have as their key.
    """
    parts = [sweep_cell(cohort, params, variant, seed), federation_cell(cohort, params, variant, seed)]
    return pd.concat(parts, ignore_index=True).assign(strength=f"{strength:g}")


def epsilon(params: Params, images: int) -> float:
    """ε of a client's whole training at δ = `DELTA`, as if its batches were drawn by Poisson sampling (they are not)."""
    p, noise = params.inversion.federation, params.inversion.defences["dp_sgd"]["noise_multiplier"]
    batches = -(-images // p.batch)
    return gradient_defences.epsilon(noise, min(1.0, p.batch / images), p.rounds * batches, DELTA)


# Tables --------------------------------------------------------------------------------------------------------------


def complete(runs: pd.DataFrame) -> pd.DataFrame:
    """A runs table with paired differences on the same seed.

    ``<metric>_minus_none``: of headline rows, of the attack ``bn``, and of the utility at other strengths, to no defence in
    the same scenario.
    ``macro_f1_minus_baselines``: to the mean of `BASELINES`. ``psnr_minus_shuffled``: of the described defence to the same
    noise at shuffled places. ``psnr_minus_naive``: of one adaptive attack to ``ig``.
    """
    plain = runs[(runs[list(KEYS)] == "").all(axis=1) & runs["scenario"].isin(["naive", "adaptive", "utility"])]
    costs = plain["metric"].isin(["psnr", "ssim", "auc", "macro_f1"])
    none, defended = plain["variant"] == "none", plain["variant"] != "none"
    parts = [tables.minus(plain[costs & defended], plain[costs & none], ["scenario"], "none")]
    statistics = runs[(runs["attack"] == "bn") & runs["metric"].isin(["psnr", "ssim"])]
    none = statistics["variant"] == "none"
    parts.append(tables.minus(statistics[~none], statistics[none], ["scenario"], "none"))
    others = runs[(runs["strength"] != "") & (runs["scenario"] == "utility") & runs["metric"].isin(["auc", "macro_f1"])]
    parts.append(tables.minus(others, plain[plain["variant"] == "none"], ["scenario"], "none"))
    f1 = plain[plain["metric"] == "macro_f1"]
    compared = f1[f1["variant"].isin(BASELINES)]
    whole = compared.groupby("seed")["variant"].nunique() == len(BASELINES)  # no mean over some of them
    compared = compared[compared["seed"].isin(whole.index[whole])]
    parts.append(tables.minus(f1[~f1["variant"].isin(BASELINES)], compared, ["scenario"], "baselines"))
    psnr = runs[(runs["metric"] == "psnr") & runs["scenario"].isin(["naive", "adaptive"])]
    headline = psnr[(psnr[[key for key in KEYS if key != "region"]] == "").all(axis=1)]
    targeted, shuffled = (headline[headline["variant"] == f"shadow_{name}"] for name in ("described", "shuffled"))
    parts.append(tables.minus(targeted, shuffled, ["scenario", "region"], "shuffled"))
    each = psnr[psnr["scenario"] == "adaptive"]
    aware, ig = each[each["attack"].isin(ADAPTIVE)], each[each["attack"] == "ig"]
    parts.append(tables.minus(aware, ig, ["variant"], "naive"))
    return pd.concat([runs, *parts], ignore_index=True)


def summarise(runs: pd.DataFrame, params: Params) -> pd.DataFrame:
    """The summary of a runs table, after `complete`."""
    return tables.summarise(complete(runs), KEYS)


# What the notebook and its record run ---------------------------------------------------------------------------------


def run(cohort: str, p: Params, cell: cells.Cell) -> cells.Finished:
    """One cell: a defence under attack (with ``batch``, ``labels`` or ``steps`` a sweep), or what it costs.

    A federation that found no classifier under its defence is an error in the notebook, and a result in a record
    (``given["may_diverge"]``).
    """
    (variant,) = cell.variants
    if cell.arm == "attack":
        if cell.keys:
            return sweep_cell(cohort, p, variant, cell.seed, **cell.keys), {}
        return attack_cell(cohort, p, variant, cell.seed)
    if cell.arm == "longer":
        return longer_cell(cohort, p, variant, cell.seed, cell.keys["batch"]), {}
    if cell.arm == fingerprints.SCENARIO:
        return fingerprints.cell(_begin(cohort, p, variant, cell.seed, 1), cell), {}
    if cell.arm == imprints.SCENARIO:
        return imprints.cell(_begin(cohort, p, variant, cell.seed, 1), cell), {}
    try:
        if cell.arm == fingerprints.LATER:
            return fingerprints.cell(_begin(cohort, p, variant, cell.seed, 1), cell), {}
        if cell.arm == "strength":
            return strength_cell(cohort, p, variant, cell.seed, cell.keys["strength"]), {}
        if cell.arm == "federation":
            return federation_cell(cohort, p, variant, cell.seed), {}
        rows = federation_cell(cohort, p, variant, cell.seed, cell.given["shares"])
        return rows[rows["round"] != ""], {}  # what comes out of it is the other arm's
    except InputError as error:
        if "diverged" not in str(error) or not cell.given.get("may_diverge"):
            raise
        return _diverged(cell), {}


def _diverged(cell: cells.Cell) -> pd.DataFrame:
    """A federation that found no classifier under its defence: a result, not a gap in the record."""
    if cell.arm == fingerprints.LATER:
        rows = tables.Rows(KEYS, cell.seed, cell.variants[0], fingerprints.SCENARIO)
        rows.add("failed", 1.0, 1, round="1")
        return rows.table()
    rows = tables.Rows(KEYS, cell.seed, cell.variants[0], "utility")
    keys = {"strength": f"{cell.keys['strength']:g}"} if cell.arm == "strength" else {}
    rows.add("failed", 1.0, 1, **keys, **({"round": "1"} if cell.arm == "rounds" else {}))
    return rows.table()


def lacks(cohort: data.Cohort, p: Params, cell: cells.Cell) -> list[str]:
    """What the cohort is too small for in one cell (`medsec.evidence.cells.Experiment`)."""
    if cell.arm in (fingerprints.SCENARIO, fingerprints.LATER, imprints.SCENARIO):
        return instruments.lacks(cohort, p, cell.variants, cell.seed, max(cell.given["batches"]))
    victims = 1
    if cell.arm in ("attack", "longer"):
        victims = p.inversion.sweep_victims if cell.keys else p.inversion.victims
    return instruments.lacks(cohort, p, cell.variants, cell.seed, victims * int(cell.keys.get("batch", 1)))


EXPERIMENT = cells.Experiment(
    "03_gia_defense",
    1,
    ("inversion",),
    run,
    own=("inversion.defences",),
    shared=("shadow_hardened",),
    lacks=lacks,
    family=fingerprints.family,
)


def quick(p: Params) -> list[cells.Cell]:
    """What the notebook itself runs: attacks, federations, whose gradient it is, and a dishonest server."""
    arms = ((fingerprints, p.fingerprint), (imprints, p.imprint))
    attacked, used = (dict.fromkeys((*QUICK[part], *p.own.defences)) for part in ("attack", "utility"))
    return [
        cells.Cell(arm, seed, group=variant, variants=(variant,))
        for arm, variants in (("attack", attacked), ("federation", used))
        for seed in p.seeds.evaluation
        for variant in variants
    ] + [
        arm.plan(variant, seed, own.model_dump())
        for arm, own in arms
        for seed in p.seeds.evaluation
        for variant in dict.fromkeys((*QUICK[arm.SCENARIO], *p.own.defences))
    ]
