"""`judge_attack`: whether an attack of your own turns images that random noise, and the attacks that everybody has, do not.

All attacks change the same rightly classified images, so that they are compared image by image (McNemar 1947).
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from tqdm import tqdm

from medsec import judge
from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed
from medsec.evasion.attacks import Attack, margin
from medsec.judge import COLUMNS, Report, paired, probing, row, share, shown
from medsec.judge.classifier import FEW, HALF, checked, size_of
from medsec.judge.probing import ALIKE, STEPS, Classifier, Run, untouched

__all__ = ["judge_attack"]

SURE = 0.05  # p-value below which a difference is no chance
EQUAL = 0.1  # share of the images by which two attacks of the same strength may differ
SLACK = 1e-6  # by which a pixel in single precision may exceed a limit
MOST_STARTS = 10  # of the PGD that may ask the network as often as the attack
DRAWN, PICTURED = 3, 2  # networks that the figure can tell apart, and images, so that it all goes on one page
OWN, NOISE, SEARCH, REST = "this attack", "random noise", "a search without a gradient", "all but this attack"
CONTRACT = "need attack(model, x, y, eps, generator) -> x_adv"


def judge_attack(
    attack: Attack,
    against: Callable[[Tensor], Tensor] | Mapping[str, Callable[[Tensor], Tensor]],
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    *,
    eps: float = 4 / 255,
    norm: str = "Linf",
    attacked: int = 100,
    name: str = "",
    seed: int = 0,
    batch: int = 32,
    progress: bool = False,
) -> Report:
    """Compare an attack, image by image, with random noise, FGSM, PGD and a search without a gradient.

    The networks, and PyTorch's global random numbers, are afterwards as before.

    Args:
        attack: (model, x, y, eps, generator) -> x_adv, as in `medsec.evasion.attacks`: x (n, C, H, W) float32 in [0, 1] and
            y (n,) int64 on the network's device, x_adv of the same kind and at most ``eps`` from x, ``generator`` on the CPU.
        against: a classifier, or name -> classifier: one without a defence, say, and the one that the attack is made for.
            For these and all other arguments see `medsec.judge.classifier.audit`.

    Returns:
        A report; ``examples`` has a row a network and attacked image: whether the answer stayed right under each attack, and the
            size of this one's change.

    Raises:
        InputError: anything is not as said, or the attack breaks a rule: it leaves the ball, returns something else than
            images, alters its input or the network, does not repeat, or raises. One line.

    >>> def brighter(model, x, y, eps, generator):
    ...     return (x + eps).clamp(0, 1)
    >>> def model(x):  # brighter than 0.5: class 1
    ...     return (x.mean((1, 2, 3)) - 0.5)[:, None] * torch.tensor([-1.0, 1.0])
    >>> brightness = torch.cat([torch.linspace(0.1, 0.45, 20), torch.linspace(0.55, 0.9, 20)])
    >>> images = brightness[:, None, None, None].expand(-1, 1, 4, 4)
    >>> report = judge_attack(brighter, model, images, [0] * 20 + [1] * 20, eps=0.25)
    >>> report.verdict[:80]  # of the dark ones it turns the nearest, of the bright ones none
    'It beats random noise and nothing else: it is weaker than PGD, FGSM, a search wi'
    """
    if not callable(attack):
        raise InputError(f"the attack is of type {type(attack).__name__}; {CONTRACT}")
    networks = against if isinstance(against, Mapping) else {"": against}
    if not networks or attacked < 1:
        raise InputError("against, attacked: need at least one classifier, and one attacked image")
    trials = []
    for which, model in networks.items():
        try:
            x, y = checked(model, images, labels, eps, norm, None)
        except InputError as error:
            raise InputError(f"{which}: {error}".removeprefix(": ")) from None
        trials.append(_Trial(attack, str(which), model, Run(Classifier(model), x, y, eps, norm, batch, seed, attacked)))
    stages = [(trial, stage) for stage in (_choose, _own, _others, _rest) for trial in trials]
    with contextlib.ExitStack() as stack:
        for kept in (*(untouched(trial.victim) for trial in trials), torch.random.fork_rng(), judge.one_thread()):
            stack.enter_context(kept)
        torch.manual_seed(derive_seed(seed, "judge_attack"))
        for trial, stage in tqdm(stages, desc="judge", unit="stage", disable=not progress):
            stage(trial)
    return _report(trials, name)


# One network -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Trial:
    """The attack and the others against one network; ``run.right`` says under which the answers stayed right."""

    attack: Attack
    which: str
    victim: Callable
    run: Run
    size: np.ndarray = field(default_factory=lambda: np.empty(0))  # of the attack's changes
    seconds: dict[str, float] = field(default_factory=dict)  # of an attack, in all
    calls: dict[str, int] = field(default_factory=dict)  # images that it put through the network, in all
    more: str = ""  # what REST includes

    @property
    def given(self) -> nn.Module:
        """What the attack gets: the network itself, to look inside, where it computes as attacks expect."""
        plain = isinstance(self.victim, nn.Module) and not isinstance(self.victim, torch.jit.ScriptModule)
        return self.victim if plain and self.run.model.dtype == torch.float32 else self.run.model

    @property
    def right(self) -> dict[str, np.ndarray]:
        return {attack: right for (attack, _), right in self.run.right.items()}

    def left(self, attack: str) -> tuple[float, float, float, int]:
        return share(int(self.right[attack].sum()), len(self.right[attack]))

    @contextlib.contextmanager
    def measured(self, attack: str, asked: nn.Module) -> Iterator[None]:
        """Time, and what goes through a network."""

        def count(_, args: tuple) -> None:
            self.calls[attack] = self.calls.get(attack, 0) + (len(args[0]) if args else 0)

        hook, begin = asked.register_forward_pre_hook(count), time.perf_counter()
        try:
            yield
        finally:
            self.seconds[attack] = self.seconds.get(attack, 0) + time.perf_counter() - begin
            hook.remove()


def _choose(trial: _Trial) -> None:
    run = trial.run
    probing.clean(run)
    order = torch.randperm(len(run.y), generator=run.rng("order")).numpy()
    right = order[run.answers[order] == run.y.numpy()[order]]
    run.chosen = right[: 0 if run.constant else run.attacked]


@torch.no_grad()
def _own(trial: _Trial) -> None:
    """The attack; what it makes of a batch is checked before it is scored."""
    run, right, size, before = trial.run, [np.empty(0, bool)], [np.empty(0)], _state(trial.victim)
    for k, (x, y) in enumerate(run.each(run.chosen) if len(run.chosen) else ()):
        answers = run.model(x)
        with trial.measured(OWN, trial.given):
            x_adv = _called(trial, x, y, k)
        size.append(_valid(x, x_adv, run))
        _not_altered(trial, before, x, answers)
        again = _called(trial, x, y, k) if k == 0 and run.repeats else x_adv
        if not torch.allclose(again, x_adv, atol=ALIKE):
            remedy = "draw every random number from generator, and keep nothing between calls"
            raise InputError(f"the attack, called again with the same generator, gives other examples; {remedy}")
        fell = run.model(x_adv).argmax(1) != y
        run.gallery += list(zip(x[fell].cpu(), x_adv[fell].cpu(), strict=True))[: PICTURED - len(run.gallery)]
        right.append(~fell.cpu().numpy())
    run.right[OWN, run.eps], trial.size = np.concatenate(right), np.concatenate(size)


def _called(trial: _Trial, x: Tensor, y: Tensor, k: int) -> Tensor:
    """What the attack makes of copies of a batch."""
    given, rng = (x.clone(), y.clone()), trial.run.rng("attack", str(k))
    try:
        with torch.enable_grad():
            x_adv = trial.attack(trial.given, *given, trial.run.eps, rng)
    except Exception as error:  # whatever their code raises
        raise InputError(f"the attack raised {judge.said(error)}; mend it: {CONTRACT}") from error
    for what, before, after in (("images", x, given[0]), ("labels", y, given[1])):
        if not torch.equal(before, after):
            raise InputError(f"the attack alters the {what} that it is given; work on a copy: x.clone()")
    if not isinstance(x_adv, Tensor):
        raise InputError(f"the attack returns a {type(x_adv).__name__}, not a tensor; {CONTRACT}")
    kinds = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in (x_adv, x)]
    if kinds[0] != kinds[1]:
        raise InputError(f"the attack returns {kinds[0]} for images {kinds[1]}; return the same kind")
    return x_adv.detach()


def _valid(x: Tensor, x_adv: Tensor, run: Run) -> np.ndarray:
    """(n,) sizes of the changes, if they are allowed."""
    if bad := int((~torch.isfinite(x_adv)).flatten(1).any(1).sum()):
        raise InputError(f"the attack returns NaN or infinite values in {bad} of {len(x)} images; mend it")
    low, high = float(x_adv.min()), float(x_adv.max())
    limit = run.eps + SLACK * (1 if run.norm == "Linf" else math.sqrt(x[0].numel()))
    if low < -SLACK or high > 1 + SLACK:
        found = f"values from {low:.3g} to {high:.3g}, outside [0, 1]"
        raise InputError(f"the attack returns {found}; clamp them: x_adv.clamp(0, 1)")
    change = (x_adv - x).flatten(1)
    size = (change.abs().amax(1) if run.norm == "Linf" else change.norm(dim=1)).cpu().numpy()
    if far := int((size > limit).sum()):
        most, what = float(size.max()), "a pixel by" if run.norm == "Linf" else "an image by a length of"
        found = f"in {far} of {len(x)} images it changes {what} up to {most:.4g}, {most / run.eps:.2f} times eps"
        found += f" ({size_of(run.eps, run.norm)})"
        raise InputError(f"the attack leaves the ball: {found}; project the change onto it")
    return size


def _state(victim) -> dict[str, Tensor]:
    known = (*victim.named_parameters(), *victim.named_buffers()) if isinstance(victim, nn.Module) else ()
    return {key: tensor.detach().clone() for key, tensor in known}


def _not_altered(trial: _Trial, before: dict[str, Tensor], x: Tensor, answers: Tensor) -> None:
    """Raises InputError if the network is another one than before the attack."""
    victim, found = trial.victim, ""
    altered = [key for key, new in _state(victim).items() if key not in before or not torch.equal(before[key], new)]
    if altered:
        found = f"alters {altered[0]} of the network"
    elif isinstance(victim, nn.Module) and any(module.training for module in victim.modules()):
        found = "leaves the network in training mode"
    elif not trial.run.random_answers and not torch.allclose(trial.run.model(x), answers, atol=ALIKE, rtol=ALIKE):
        found = "makes the network answer the same images differently"
    if found:
        raise InputError(f"the attack {found}; attack it as it is, or a copy.deepcopy of it")


def _others(trial: _Trial) -> None:
    """Those that everybody has."""
    run, noise = trial.run, trial.run.rng("noise")
    made = {
        NOISE: lambda x, y: probing.random_change(x, run.eps, run.norm, noise),
        "FGSM": lambda x, y: probing.one_step(x, probing.gradient(run.model, x, y, margin), run.eps, run.norm),
    }
    if run.norm == "Linf":
        made[SEARCH] = partial(probing.square, run.model, eps=run.eps, rng=run.rng("square"))
    for attack, make in made.items():
        run.right[attack, run.eps] = run.holds(make, run.chosen)
    with trial.measured("PGD", run.model):
        run.right["PGD", run.eps] = probing.ascended(run, np.ones(len(run.chosen), bool), "pgd", 2)


def _rest(trial: _Trial) -> None:
    """What all others leave, and PGD from other starts, with about as many calls of the network as the attack needs."""
    right = np.logical_and.reduce([right for attack, right in trial.right.items() if attack != OWN])
    calls = trial.calls.get(OWN, 0) / max(len(right), 1)
    starts = min(MOST_STARTS, max(1, math.ceil(calls / STEPS)))
    trial.run.right[REST, trial.run.eps] = probing.ascended(trial.run, right, "again", starts)
    trial.more = f"PGD from {starts} more start{'s' * (starts > 1)} included"


# What it means ---------------------------------------------------------------------------------------------------------


class _Pairs(NamedTuple):
    """Of the same images: which the attack alone turns, which the other alone, which both, which neither."""

    only: int
    other: int
    both: int
    neither: int

    @classmethod
    def of(cls, trial: _Trial, other: str, own: str = OWN) -> "_Pairs":
        a, b = trial.right[own], trial.right[other]  # (True: left)
        return cls(*(int(found.sum()) for found in (~a & b, a & ~b, ~a & ~b, a & b)))

    @property
    def p(self) -> float:
        """McNemar's test, exact: an image that only one of them turns may be either's, like a coin."""
        n = self.only + self.other
        return float(stats.binomtest(self.only, n).pvalue) if n else 1.0

    @property
    def outcome(self) -> str:
        """Whether the attack turns more than the other."""
        _, low, high = paired(self.only, self.other, sum(self))
        if self.p < SURE:
            return "more" if self.only > self.other else "fewer"
        return "alike" if low >= -EQUAL and high <= EQUAL else "open"


def _proves_nothing(trial: _Trial, turned: str) -> str:
    """Why the result against a network says nothing of the attack; empty if it does."""
    run, guess = trial.run, 1 / trial.run.classes
    if run.constant:
        return f"the network gives every image the same answer, class {run.answers[0]}"
    skill, low, high = judge.balanced(run.answers, run.y.numpy())
    if not low > guess:
        found = f"balanced accuracy {shown(skill)} [{shown(low)}, {shown(high)}], guessing has {shown(guess)}"
        return f"the network is not clearly better than guessing ({found})"
    if trial.right[NOISE].mean() <= HALF:
        return f"random noise alone already breaks the network ({turned}); take a smaller eps"
    if not any(_Pairs.of(trial, NOISE, own).outcome == "more" for own in (OWN, "PGD")):
        return f"neither it nor PGD clearly turns more than random noise ({turned}); take a larger eps, or more images"
    return ""


def _sentence(trial: _Trial) -> str:
    """The verdict on the attack against one network."""
    rates = {attack: share(int((~right).sum()), len(right)) for attack, right in trial.right.items()}
    value, low, high, n = rates[OWN]
    turned = f"it turns {shown(value)} [{shown(low)}, {shown(high)}] of {n} right answers, PGD "
    turned += f"{shown(rates['PGD'][0])}, random noise of that size {shown(rates[NOISE][0])}"
    if why := _proves_nothing(trial, turned):
        return f"This proves nothing: {why}."
    others = [attack for attack in ("PGD", "FGSM", SEARCH) if attack in rates]
    judged = {attack: _Pairs.of(trial, attack).outcome for attack in (NOISE, *others)}
    if judged[NOISE] in ("fewer", "alike"):
        chance = ", and the difference may be chance" if value > rates[NOISE][0] else ""
        return f"It is no attack: it turns no more than random noise ({turned}{chance})."
    names = {what: ", ".join(a for a in judged if judged[a] == what) for what in judged.values()}
    texts = (("more", "stronger than"), ("alike", "as strong as"), ("fewer", "weaker than"))
    start = f"It is {'; '.join(f'{text} {names[what]}' for what, text in texts if what in names)}"
    if judged[NOISE] == "more" and [judged[attack] for attack in others] == ["fewer"] * len(others):
        start = f"It beats random noise and nothing else: it is weaker than {names['fewer']}"
    if "open" in names:
        start = f"{start}; whether it is stronger or weaker than {names['open']} is open".replace("It is ; w", "W")
    alone = _Pairs.of(trial, REST).only
    images = {0: "no image", 1: "1 image"}.get(alone, f"{alone} images")
    return f"{start}: {turned}. It turns {images} that nothing else here turns, {trial.more}."


def _report(trials: list[_Trial], name: str) -> Report:
    texts = [(trial.which, _sentence(trial)) for trial in trials]
    verdict = " ".join(f"Against {of}: {text[0].lower()}{text[1:]}" if of else text for of, text in texts)
    figures, tested = [], [trial for trial in trials if len(trial.run.chosen)]
    if tested:
        left = {a: {t.which or "the network": t.left(a)[:3] for t in tested[:DRAWN]} for a in tested[0].right}
        figures.append(("Right answers that are left; bars: 95 %.", judge.dots(left, "right answers left")))
    if pairs := [pair for trial in tested for pair in trial.run.gallery][:PICTURED]:
        caption = "Image, what this attack made of it, and the change, stretched to be seen."
        figures.append((caption, judge.gallery(pairs)))
    table = pd.DataFrame([each for trial in trials for each in _rows(trial)], columns=COLUMNS)
    known = ({"network": t.which, "image": t.run.chosen, "label": t.run.y.numpy()[t.run.chosen]} for t in trials)
    examples = [pd.DataFrame(a | t.right | {"size": t.size}) for a, t in zip(known, trials, strict=True)]
    title, notes = f"An attack on trial: {name}".removesuffix(": "), (_remarks(tested), _not_tested(trials[0].run))
    return Report(title, verdict, table, *notes, figures, pd.concat(examples, ignore_index=True))


def _rows(trial: _Trial) -> list[dict]:
    run, of = trial.run, f"{trial.which}: ".removeprefix(": ")
    guess, y, n = f"guessing: {shown(1 / run.classes)}", run.y.numpy(), len(run.chosen)
    rows = [row(f"{of}no attack", "balanced accuracy", *judge.balanced(run.answers, y), len(y), note=guess)]
    if not n:
        return rows
    part = f"{of}right answers left"
    rows += [row(part, a, *trial.left(a), note=trial.more if a == REST else "") for a in trial.right]
    for attack in list(trial.right)[1:]:
        pairs = _Pairs.of(trial, attack)
        note = f"only this {pairs.only}, only the other {pairs.other}, both {pairs.both}, neither {pairs.neither}"
        difference = paired(pairs.only, pairs.other, n)
        rows.append(row(f"{of}turned more than by", attack, *difference, n, note=f"{note}; p {pairs.p:.2g}"))
    unit, factor = ("/255", 255) if run.norm == "Linf" else ("", 1)
    part, turning, allowed = f"{of}cost", trial.size[~trial.right[OWN]], f"allowed: {size_of(run.eps, run.norm)}"
    if len(turning):
        size = [factor * v for v in judge.median(turning)]
        rows.append(row(part, "size of a change that turns (median)", *size, len(turning), unit, note=allowed))
    costs = (("time an image", "ms", trial.seconds, 1000), ("calls of the network an image", "", trial.calls, 1))
    for measure, unit, spent, factor in costs:
        own, pgd = (factor * spent.get(attack, 0) / n for attack in (OWN, "PGD"))
        note = f"PGD: {shown(pgd)}; {shown(own / pgd)} times as much"
        rows.append(row(part, measure, own, n=n, unit=unit, note=note))
    return rows


def _remarks(tested: list[_Trial]) -> list[str]:
    remarks = []
    for trial in tested:
        run, of, n = trial.run, f"{trial.which}: ".removeprefix(": "), len(trial.run.chosen)
        right = int((run.answers == run.y.numpy()).sum())
        remarks.append(f"{of}{n} of the {right} rightly classified images were attacked (seed {run.seed}).")
        if n < FEW:
            remarks.append(f"{of}{n} are few: only large differences show.")
        if not (trial.right[OWN].any() or trial.right["PGD"].any()):
            remarks.append(f"{of}This attack and PGD turn every image: a smaller eps would tell them apart.")
        if not run.repeats:
            remarks.append(f"{of}The network does not answer twice alike, to the bit: whether the attack does is open.")
    remarks += [
        f"“Stronger”, “weaker”: McNemar's exact p is below {SURE}, not corrected for several comparisons. “As strong as”: it is "
        f"not, and the whole interval of the difference lies within ±{EQUAL}. Else it is open.",
        f"PGD: {STEPS} steps, two losses. Its further starts ask the network about as often as this attack (1 to {MOST_STARTS} "
        "starts). Times depend on the machine.",
    ]
    return remarks if tested else []


def _not_tested(run: Run) -> list[str]:
    sentences = [
        "Other networks, images and sizes of the change. Transfer to a network that it has not seen.",
        "Defences that know it, such as training with its examples.",
        "Stronger attacks than those of the table (AutoAttack, more steps): to be as strong as PGD is no record.",
        "Whether the network is worth attacking, beyond its accuracy and what random noise does to it.",
    ]
    return sentences if run.norm == "Linf" else ["A search without a gradient: it is there for Linf only.", *sentences]
