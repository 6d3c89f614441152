"""`judge_gradient_defence`: what a defence of your own hides of an image whose gradient is sent, and what it costs.

The attacks are those of `medsec.inversion`; a server that only has to choose among candidates compares gradients. The images are
those of the phantom, nobody's patients.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from medsec import data
from medsec.core import params
from medsec.core.errors import InputError
from medsec.core.guards import check_gradient
from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.settings import Cohorts, FedClsParams, InversionSettings
from medsec.evidence.intervals import bootstrap_interval
from medsec.federated import classifier as federation
from medsec.inversion import adaptive, attacks, scores
from medsec.inversion.attacks import View
from medsec.inversion.defences import none
from medsec.judge import COLUMNS, LOOKS, Report, balanced, fresh, gallery, one_thread, picture, row, said, share, shown
from medsec.nets import convnet, fit
from medsec.nets.convnet import flat

__all__ = ["judge_gradient_defence"]

NAIVE, JOINT = ("dlg", "ig"), 3  # attacks that take the gradient for what it seems; rounds that are matched together
LIST = 10  # a server may also be content with a list of so many candidates
SPARSE = 0.5  # share of zeros from which entries count as dropped
RARE = 0.025  # chance of so many hits by luck, below which they are none
SAME = 1e-5  # relative difference of gradients that is rounding
CLIENTS = 4
SEEN = 3  # reconstructions that the page shows

Defence = Callable[[nn.Module, Tensor, Tensor, int], Sequence[Tensor]]


def judge_gradient_defence(
    defence: Defence | type,
    *,
    victims: int = 16,
    candidates: int = 100,
    rounds: int = 10,
    images: int = 400,
    iterations: int = 100,
    seed: int = 0,
    name: str = "",
    progress: bool = False,
) -> Report:
    """Attack what a client sends under a defence, compare with what it sends without, and train a federation with both.

    Args:
        defence: ``defend(model, x, y, round) -> gradients``, one tensor a parameter, as those of `medsec.inversion.defences`. A
            function is called as it is, with a seed of the client if it takes a ``seed`` after a ``*``; an object, which may
            remember, is copied for every client; a class is called for every client, with a seed if ``__init__`` needs one.
        victims: images that are attacked, each sent alone, of an untrained network.
        candidates: images among which a server looks for the right one.
        rounds, images: of the federation that is trained, and of each of its four clients.
        iterations: of every attack.
        seed: of all random choices.
        name: of the defence, for the title.
        progress: show on stderr how far it is.

    Returns:
        A report; ``examples`` has a row a victim.

    Raises:
        InputError: the defence raises, or sends no gradients of the model's shapes; or numbers that do not fit. One line.

    >>> def silent(model, x, y, round):
    ...     return [torch.zeros_like(p) for p in model.parameters()]
    >>> small = {"victims": 2, "candidates": 4, "images": 16, "rounds": 1, "iterations": 1}
    >>> judge_gradient_defence(silent, **small).verdict[:42]
    'No attack here tells whose image it was: o'
    """
    if not 1 <= victims <= candidates <= images:
        given = f"{victims} victims, {candidates} candidates, {images} images"
        raise InputError(f"{given}: need 1 <= victims <= candidates <= images")
    with torch.random.fork_rng(), one_thread():
        torch.manual_seed(derive_seed(seed, "judge"))
        run = _Run.load(defence, victims, candidates, rounds, images, iterations, seed)
        run.sent(run.client(defence, 0), run.victims[:1], 0)  # a mistake is told before anything is attacked
        found = {}
        stages = list(itertools.product(("undefended", "defended"), (run.attack, run.identify, run.train)))
        for who, stage in tqdm(stages, desc="judge", unit="stage", disable=not progress):
            found[who, stage.__name__] = stage(none if who == "undefended" else run.own)
        return _report(run, found, name)


@dataclass
class _Run:
    """The phantom's images, the network, and the settings of params.yaml, made small."""

    images: list[Tensor]  # of each client
    labels: list[Tensor]
    public: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    model: nn.Module
    settings: InversionSettings
    fed: FedClsParams
    own: Defence | type
    victims: Tensor  # (V,) their places among the first client's images
    candidates: int
    seed: int

    @classmethod
    def load(
        cls, defence, victims: int, candidates: int, rounds: int, images: int, iterations: int, seed: int
    ) -> "_Run":
        tree, file = params.read()
        cohorts = params.validated(Cohorts, tree.get("cohorts"), f"{file}, section cohorts")
        small = {"rounds": rounds, "images_per_client": images, "n_clients": CLIENTS}
        fed = params.validated(FedClsParams, tree["inversion"]["federation"] | small, f"{file}, inversion.federation")
        attack = tree["inversion"]["attack"] | {"iterations": iterations}
        settings = params.validated(InversionSettings, attack, f"{file}, inversion.attack")
        cohort = data.load("phantom", cohorts)
        splits, split = data.tensors(cohort), cohort["client"]
        parts = data.partition(split.labels, CLIENTS, "iid", seed=derive_seed(seed, "partition"), per_client=images)
        x, y = splits["client"]
        model = convnet.new(cohort.size, cohort.channels, cohort.n_classes, width=fed.width, seed=seed)
        drawn = torch.randperm(candidates, generator=torch_generator(seed, "victims"))[:victims]
        held = [x[part] for part in parts], [y[part] for part in parts]
        return cls(*held, splits["public"], splits["test"], model, settings, fed, defence, drawn, candidates, seed)

    def client(self, defence: Defence | type, number: int) -> Defence:
        """The defence of one client; what draws gets a seed that nobody else has."""
        seed = derive_seed(self.seed, "client", number)
        asks = None if inspect.isclass(defence) else inspect.signature(defence).parameters.get("seed")
        if asks is not None and asks.default is asks.empty:
            return _guarded(functools.partial(defence, seed=seed))
        return _guarded(fresh(defence, seed))

    def sent(self, defend: Defence, index: Tensor, round: int) -> list[Tensor]:
        """(n, *shape) a parameter: what is sent for each of the first client's images by itself."""
        x, y = self.images[0], self.labels[0]
        each = [defend(self.model, x[i : i + 1], y[i : i + 1], round) for i in index.tolist()]
        return [torch.stack(part).detach() for part in zip(*each, strict=True)]

    def attack(self, defence: Defence | type) -> dict[str, np.ndarray]:
        """Attack -> (V, C, S, S), what it makes of the victims; those that know the defence where one is there."""
        client = self.client(defence, 0)
        views = [View(self.model, self.sent(client, self.victims, round)) for round in range(JOINT)]
        labels, shape = self.labels[0][self.victims][:, None], tuple(self.images[0].shape[1:])
        how = {"settings": self.settings, "seed": derive_seed(self.seed, "attack")}
        made = {attack: attacks.invert(views[:1], labels, shape, attack=attack, **how) for attack in NAIVE}
        if defence is not none:
            zeros = float(np.mean([float((g == 0).float().mean()) for g in views[0].gradients]))
            known = adaptive.known_entries(views[0]) if zeros > SPARSE else ()
            made |= adaptive.adaptive(
                views[0], labels, shape, weights=known, smoother=not len(known), later=views[1:], **how
            )
        return {attack: each.images[:, 0].numpy() for attack, each in made.items()}

    def identify(self, defence: Defence | type) -> dict[str, np.ndarray]:
        """Way -> (V,) how many candidates look more like the right one than it does: 0 is the right answer.

        ``plain``: the server compares with each candidate's gradient. ``copy``: with what its copy of the defence makes of it.
        """
        everybody, nobody = torch.arange(self.candidates), self.client(none, 0)
        received = _rows(self.sent(self.client(defence, 0), self.victims, 0))
        ways = {"plain": self.sent(nobody, everybody, 0)}
        if defence is not none:  # (the attacker has its own copy, and not the client's seed)
            ways["copy"] = self.sent(self.client(defence, CLIENTS), everybody, 0)
        ranks = {}
        for way, gradients in ways.items():
            alike = received @ _rows(gradients).T
            right = alike.gather(1, self.victims[:, None])
            ranks[way] = ((alike >= right).sum(1) - 1).numpy()  # who ties with the right one comes before it
        return ranks

    def train(self, defence: Defence | type) -> tuple[np.ndarray, float]:
        """The test images' answers, and the area under the curve, after a federation."""
        mine = [self.client(defence, i) for i in range(CLIENTS)]
        state = federation.train(self.model, self.images, self.labels, mine, self.fed, self.seed)[-1]
        model = convnet.new(
            self.images[0].shape[-1], self.images[0].shape[1], self.classes, width=self.fed.width, seed=0
        )
        model.load_state_dict(state)
        probabilities = fit.predict(model, self.test[0])
        diverged = not torch.isfinite(probabilities).all()
        return probabilities.argmax(1).numpy(), math.nan if diverged else fit.auc(probabilities, self.test[1])

    @property
    def classes(self) -> int:
        return int(self.public[1].max()) + 1


def _rows(gradients: Sequence[Tensor]) -> Tensor:
    """(n, P) gradients of length 1; one of length 0 stays 0."""
    rows = torch.cat([g.flatten(1) for g in gradients], 1).double()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-24)


def _guarded(defend: Defence) -> Defence:
    """The defence, whose mistakes are told in a line; it gets copies of the images."""

    def guarded(model: nn.Module, x: Tensor, y: Tensor, round: int) -> list[Tensor]:
        try:
            found = defend(model, x.clone(), y.clone(), round)
        except Exception as error:  # whatever their code raises
            raise InputError(f"the defence raised {said(error)}, in round {round}; mend it") from error
        if not isinstance(found, list | tuple) or not all(isinstance(g, Tensor) for g in found):
            raise InputError(f"the defence returned a {type(found).__name__}; need a list of tensors, one a parameter")
        return [g.detach() for g in check_gradient(model, found)]

    return guarded


# What it means ---------------------------------------------------------------------------------------------------------


def _report(run: _Run, found: dict, name: str) -> Report:
    truth, parties = run.images[0][run.victims].numpy(), ("defended", "undefended")
    x, y = run.public
    means = torch.stack([x[y == k].mean(0) for k in range(run.classes)])[run.labels[0][run.victims]].numpy()
    each = {who: {a: scores.psnr(np.nan_to_num(i), truth) for a, i in found[who, "attack"].items()} for who in parties}
    psnr = {who: np.max(list(made.values()), axis=0) for who, made in each.items()}
    psnr["mean image"] = scores.psnr(means, truth)
    rows, use = [], {}
    for who, made in each.items():
        for attack, values in made.items():
            rows.append(_mean(f"reconstruction, {who}", attack, values, "" if attack in NAIVE else "knows the defence"))
        rows.append(_mean(f"reconstruction, {who}", "the best for each victim", psnr[who]))
    rows.append(_mean("reconstruction, control", "the public mean image of the class", psnr["mean image"]))
    for who, (most, what) in itertools.product(parties, ((1, "named"), (LIST, f"among {LIST}"))):
        for way, rank in found[who, "identify"].items():
            hits, note = share(int((rank < most).sum()), len(rank)), f"chance: {shown(most / run.candidates)}"
            rows.append(row(f"right image, {who}", f"{what}, {WAYS[way]}", *hits, note=note))
    for who in parties:
        answers, area = found[who, "train"]
        use[who] = balanced(answers, run.test[1].numpy())
        part, note = f"use, {who}", f"guessing: {shown(1 / run.classes)}"
        rows.append(row(part, "balanced accuracy", *use[who], len(answers), note=note))
        rows.append(row(part, "area under the curve", area, n=len(answers)))
    own, plain = (flat(run.sent(run.client(who, 0), run.victims, 0)) for who in (run.own, none))
    idle = float((own - plain).norm() / plain.norm()) < SAME
    plane = {
        label: (
            use[who],
            share(max(int((rank < 1).sum()) for rank in found[who, "identify"].values()), len(run.victims)),
        )
        for who, label in (("undefended", "no defence"), ("defended", "this defence"))
    }
    figures = [("What it hides, and what it costs: a good defence is at the lower right. Bars: 95 %.", _plane(plane))]
    best = max(
        found["defended", "attack"].values(), key=lambda made: float(scores.psnr(np.nan_to_num(made), truth).mean())
    )
    seen = [
        (torch.from_numpy(a), torch.from_numpy(np.nan_to_num(b)).clamp(0, 1)) for a, b in zip(truth, best, strict=True)
    ]
    figures.append(
        (
            f"Image, what the strongest attack makes of it, and the difference ({len(seen[:SEEN])} victims).",
            gallery(seen[:SEEN]),
        )
    )
    return Report(
        f"A gradient defence on trial: {name}".removesuffix(": "),
        _verdict(run, psnr, found["defended", "identify"], use, idle),
        pd.DataFrame(rows, columns=COLUMNS),
        _remarks(run),
        NOT_TESTED,
        figures,
        examples=pd.DataFrame({f"psnr {who}": v for who, v in psnr.items()}, run.victims.numpy()).rename_axis("image"),
    )


def _plane(points: Mapping[str, tuple]) -> bytes:
    """Balanced accuracy against the share that is identified, each (value, low, high), as PNG."""
    fig = Figure(figsize=(3.6, 2.8))
    axes = fig.subplots()
    for (name, (across, up)), (colour, _, marker) in zip(points.items(), LOOKS[::2], strict=True):
        bars = {f"{axis}err": [[at[0] - at[1]], [at[2] - at[0]]] for axis, at in (("x", across), ("y", up[:3]))}
        axes.errorbar(across[0], up[0], **bars, color=colour, marker=marker, capsize=2, label=name)
    axes.set(xlabel="balanced accuracy", ylabel="right image named", xlim=(0, 1.03), ylim=(-0.03, 1.06))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left")
    return picture(fig)


WAYS = {"plain": "by its gradient", "copy": "by a copy of the defence"}


def _mean(part: str, measure: str, values: np.ndarray, note: str = "") -> dict:
    low, high = bootstrap_interval(values) if len(values) > 1 else (math.nan, math.nan)
    return row(part, measure, float(values.mean()), low, high, len(values), "dB", note)


def _verdict(run: _Run, psnr: dict, ranks: dict[str, np.ndarray], use: dict, idle: bool) -> str:
    if idle:
        return "It sends the gradient as it is: it is no defence."
    hits = max(int((rank < 1).sum()) for rank in ranks.values())
    named, low, high, n = share(hits, len(run.victims))
    chance = min(1.0, len(ranks) / run.candidates)  # of the best of several ways
    above = stats.binomtest(hits, n, chance, alternative="greater").pvalue < RARE
    start = "It does not hide whose image it was" if above else "No attack here tells whose image it was"
    told = (
        f"of {n} images, a server with {run.candidates} candidates names {shown(named)} [{shown(low)}, {shown(high)}]"
    )
    db = {who: f"{shown(float(values.mean()))} dB" for who, values in psnr.items()}
    seen = f"reconstructions have {db['defended']}, undefended {db['undefended']}, the mean image {db['mean image']}"
    (value, low, high), plain = use["defended"], use["undefended"]
    cost = f"Balanced accuracy is {shown(value)} [{shown(low)}, {shown(high)}], undefended {shown(plain[0])}"
    learnt = "" if low > 1 / run.classes else ": nothing is clearly learnt"
    if not plain[1] > 1 / run.classes:
        learnt = ": too short a training to say what the defence costs"
    return f"{start}: {told}; {seen}. {cost}{learnt}."


def _remarks(run: _Run) -> list[str]:
    n, fed = len(run.victims), run.fed
    return [
        f"{n} images, each sent alone by an untrained network; {run.settings.iterations} iterations; the label is known.",
        "“the best for each victim” takes the attack with the highest PSNR: more than a real attacker knows.",
        "The attacker's copy of the defence has another seed only if the defence takes one: an argument named seed.",
        f"Use: {CLIENTS} clients of {fed.images_per_client} images, {fed.rounds} rounds, one run: another run may differ.",
    ]


NOT_TESTED = (
    "Attackers made for this very defence, beyond its copy: one who knows how images are replaced or disturbed may undo it.",
    "Batches, trained networks, longer attacks, a generator of such images as a prior, other images.",
    "A bound that holds against everybody: only differential privacy gives one.",
)
