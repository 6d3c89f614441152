"""The attacks that `medsec.judge.classifier.audit` runs, stage by stage, and a reviewer's questions on what they found."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.settings import ClassifierParams
from medsec.evasion.attacks import Loss, climb, cross_entropy, deepfool, margin
from medsec.evasion.sanity import TOLERANCE, Check
from medsec.judge import one_thread
from medsec.nets.fit import fit

__all__: list[str] = []  # `medsec.judge.classifier` is what users call

STEPS, STEP = 20, 0.25  # of PGD; a step in units of eps
MORE_STEPS = 3 * STEPS  # of the checks whether 20 steps are enough, and whether a very large change breaks everything
SWEEP = (0.5, 1.0, 2.0)  # in units of eps
GREY = 128 / 255  # a change of every pixel that can turn any image grey
CHECKED = 16  # images of the checks that need many steps, and of DeepFool
QUERIES = 100  # of the attack without a gradient
MOST_CLASSES = 10  # with more, DeepFool, which needs a gradient a class, is left out
SURROGATE = ClassifierParams(lr=4e-3, weight_decay=5e-4, batch=16, shift=2)  # as params.yaml, in smaller batches
EPOCHS, PIXELS, MOST_TRAINED = 30, 64, 512  # of the surrogate: passes, pixels a side that it sees, images
LEAST_TRAINED = 8  # images of each class, below which no surrogate is worth training
SHOWN = 4  # images of the gallery
ALIKE = 1e-4  # of sums of probabilities, and of logits of the same image asked for twice


class Classifier(nn.Module):
    """A model as attacks need it: any device and precision, float32 logits, and a gradient (0) also where it has none."""

    def __init__(self, model: Callable[[Tensor], Tensor]):
        super().__init__()
        self.hidden = [model]  # not as a submodule: nothing here may change it
        parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
        floating = [p for p in parameters if p.is_floating_point()]
        self.dtype = floating[0].dtype if floating else torch.float32
        self.device = parameters[0].device if parameters else torch.device("cpu")
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.hidden[0](x.to(self.device, self.dtype, copy=True))
        if not isinstance(logits, Tensor):
            raise InputError(f"the model returns a {type(logits).__name__}; need the logits alone, a tensor (n, K)")
        logits = logits.to(x.device, torch.float32)
        return logits + 0.0 * x.flatten(1).sum(1, keepdim=True) if x.requires_grad else logits


@contextlib.contextmanager
def untouched(model) -> Iterator[None]:
    """Give a model back as it was: parameters, buffers, gradients, what needs a gradient, modes."""
    if not isinstance(model, nn.Module):
        yield
        return
    tensors = [*model.parameters(), *model.buffers()]
    before = [(t, t.detach().clone(), t.requires_grad, t.grad) for t in tensors]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)  # only the images' gradient is needed
        yield
    finally:
        with torch.no_grad():
            for tensor, value, needs, grad in before:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
                tensor.requires_grad_(needs)
                tensor.grad = grad
        for module, training in modes:
            module.training = training


# Attacks ---------------------------------------------------------------------------------------------------------------


def _length(change: Tensor) -> Tensor:
    """(n, 1, 1, 1) Euclidean lengths of changes (n, C, H, W)."""
    return change.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]


def random_change(x: Tensor, eps: float, norm: str, rng: torch.Generator) -> Tensor:
    """The control without a gradient: every pixel up or down by eps, or a random change of that length."""
    if norm == "Linf":
        return (x + eps * (2.0 * torch.randint(0, 2, x.shape, generator=rng).to(x) - 1)).clamp(0, 1)
    change = torch.randn(x.shape, generator=rng).to(x)
    return (x + eps * change / _length(change)).clamp(0, 1)


def gradient(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> Tensor:
    with torch.enable_grad():
        at = x.clone().requires_grad_()
        return torch.autograd.grad(loss(model(at), y).sum(), at)[0]


def one_step(x: Tensor, gradient: Tensor, eps: float, norm: str) -> Tensor:
    """FGSM from a gradient (n, C, H, W); of the Euclidean norm its straight counterpart."""
    return (x + eps * (gradient.sign() if norm == "Linf" else gradient / _length(gradient))).clamp(0, 1)


def _ascend(
    model, x: Tensor, y: Tensor, eps: float, norm: str, rng, *, loss: Loss, steps: int = STEPS, stop=True
) -> Tensor:
    """PGD from a random start; with ``stop`` an example is left alone as soon as it is misclassified."""
    start = x + (random_change(x, eps, norm, rng) - x) * torch.rand(x.shape, generator=rng).to(x)
    if norm == "Linf":
        return climb(model, x, y, eps, steps=steps, step=STEP, start=start, loss=loss, stop=stop)
    x_adv, left = start, torch.arange(len(x), device=x.device)
    for _ in range(steps):
        with torch.enable_grad():
            at = x_adv[left].requires_grad_()
            logits = model(at)
            (g,) = torch.autograd.grad(loss(logits, y[left]).sum(), at)
        keep = logits.detach().argmax(1) == y[left] if stop else torch.ones_like(left, dtype=torch.bool)
        change = (at.detach() + STEP * eps * g / _length(g) - x[left])[keep]
        left = left[keep]
        x_adv[left] = (x[left] + change * (eps / _length(change)).clamp(max=1)).clamp(0, 1)
        if not len(left):
            break
    return x_adv


@torch.no_grad()
def square(model: nn.Module, x: Tensor, y: Tensor, eps: float, rng: torch.Generator) -> Tensor:
    """A search without a gradient (after Andriushchenko et al. 2020, Square): stripes, then squares of ±eps where they help."""
    n, channels, height, width = x.shape

    def signs(*shape: int) -> Tensor:
        return 2.0 * torch.randint(0, 2, shape, generator=rng).to(x) - 1

    best = (x + eps * signs(n, channels, 1, width)).clamp(0, 1)
    score = margin(model(best), y)
    for query in range(QUERIES):
        side = max(1, round(math.sqrt(0.3 * (1 - query / QUERIES) * height * width)))
        side = min(side, height, width)
        top, left = (int(torch.randint(0, size - side + 1, (1,), generator=rng)) for size in (height, width))
        place = (..., slice(top, top + side), slice(left, left + side))
        tried = best.clone()
        tried[place] = (x[place] + eps * signs(n, channels, 1, 1)).clamp(0, 1)
        found = margin(model(tried), y)
        better = found > score
        best, score = torch.where(better[:, None, None, None], tried, best), torch.where(better, found, score)
        if (score > 0).all():
            break
    return best


# The stages of a run ---------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What is attacked, and what was found: ``right`` by (attack, eps), which of the attacked images are still right."""

    model: Classifier
    x: Tensor
    y: Tensor
    eps: float
    norm: str
    batch: int
    seed: int
    attacked: int
    answers: np.ndarray = field(init=False)  # (n,) classes
    random_answers: bool = False
    trained_on: np.ndarray = field(init=False)  # (n,) bool, images that the surrogate was trained on
    surrogate: Classifier | None = None
    surrogate_answers: tuple[
        np.ndarray, np.ndarray
    ] = ()  # (n,) its answers, and the labels, of images that it has not seen
    surrogate_right: tuple[int, int] = (0, 0)  # of its own examples: right, of how many
    chosen: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # indices of the attacked images
    right: dict[tuple[str, float], np.ndarray] = field(default_factory=dict)
    tested: dict[str, np.ndarray] = field(default_factory=dict)  # attacks that were not run on all of them: on which
    flat: int = 0  # how many gradients are exactly 0
    distance: np.ndarray | None = None
    left: dict[str, tuple[int, int]] = field(default_factory=dict)  # of the checks: how many are left, of how many
    gallery: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def each(self, index: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images and labels, on the model's device."""
        for part in torch.from_numpy(np.asarray(index, np.int64)).split(self.batch):
            yield self.x[part].to(self.model.device), self.y[part].to(self.model.device)

    def rng(self, *keys: str) -> torch.Generator:
        return torch_generator(self.seed, *keys)

    @torch.no_grad()
    def holds(
        self, made: Callable[[Tensor, Tensor], Tensor], index: np.ndarray, judge: nn.Module | None = None
    ) -> np.ndarray:
        """Which answers are right on the examples that ``made(x, y)`` gives for the images at ``index``."""
        judge = judge or self.model
        parts = [(judge(made(x, y)).argmax(1) == y).cpu().numpy() for x, y in self.each(index)]
        return np.concatenate([np.empty(0, bool), *parts])

    @property
    def repeats(self) -> bool:
        """Whether the network answers the same, to the bit: on an accelerator sums differ."""
        return not self.random_answers and self.model.device.type == "cpu"

    @property
    def constant(self) -> bool:
        """Whether every image gets the same answer."""
        return len(np.unique(self.answers)) == 1

    @property
    def classes(self) -> int:
        return int(self.y.max()) + 1


def clean(run: Run) -> None:
    """What the model answers, and whether it answers the same when it is asked again."""
    with torch.no_grad():
        logits = torch.cat([run.model(x).cpu() for x, _ in run.each(np.arange(len(run.x)))])
        if len(bad := (~torch.isfinite(logits)).any(1).nonzero()):
            raise InputError(
                f"the model gives NaN or infinite logits for image {int(bad[0])}, of {len(bad)} in all; mend it"
            )
        first = next(run.each(np.arange(min(len(run.x), run.batch))))[0]
        run.random_answers = not torch.allclose(run.model(first), run.model(first), atol=ALIKE, rtol=ALIKE)
    run.answers = logits.argmax(1).numpy()


def get_surrogate(given: Callable | None) -> Callable[[Run], None]:
    """The stage that gets another network, and then chooses the images to attack: first those that it has not seen."""

    def other_network(run: Run) -> None:
        order = torch.randperm(len(run.y), generator=run.rng("order")).numpy()
        run.trained_on = np.zeros(len(run.y), bool)
        halves = [order[run.y.numpy()[order] == k] for k in range(run.classes)]
        halves = [members[: min(len(members) // 2, MOST_TRAINED // run.classes)] for members in halves]
        if given is not None:
            run.surrogate = Classifier(given)
        elif min(map(len, halves)) >= LEAST_TRAINED:
            run.trained_on[np.concatenate(halves)] = True
            run.surrogate = Classifier(_trained(run))
        if run.surrogate is not None:
            unseen, judge = np.flatnonzero(~run.trained_on), run.surrogate
            with torch.no_grad():
                answers = [judge(x).argmax(1).cpu().numpy() for x, _ in run.each(unseen)]
            run.surrogate_answers = np.concatenate(answers), run.y.numpy()[unseen]
        order = order[np.argsort(run.trained_on[order], kind="stable")]
        right = order[run.answers[order] == run.y.numpy()[order]]
        run.chosen = right[: run.attacked]

    return other_network


def _trained(run: Run) -> nn.Module:
    """A small network trained on half of the images; it sees at most `PIXELS` a side, and its gradient all of them."""
    side = min(PIXELS, *run.x.shape[2:])
    small = nn.AdaptiveAvgPool2d(side)
    index = np.flatnonzero(run.trained_on)
    x = torch.cat([small(x) for x, _ in run.each(index)])
    y = run.y[torch.from_numpy(index)].to(x.device)
    with one_thread():
        network = fit(x, y, run.classes, SURROGATE, epochs=EPOCHS, seed=derive_seed(run.seed, "surrogate"))
    return nn.Sequential(small, network).eval()


def noise_and_fgsm(run: Run) -> None:
    gradients = [gradient(run.model, x, y, margin) for x, y in run.each(run.chosen)]
    run.flat = sum(int((g.flatten(1).abs().amax(1) == 0).sum()) for g in gradients)
    for factor in SWEEP:
        eps = factor * run.eps
        rng, step = run.rng("noise", str(factor)), iter(gradients)
        run.right["noise", eps] = run.holds(lambda x, y: random_change(x, eps, run.norm, rng), run.chosen)  # noqa: B023
        run.right["FGSM", eps] = run.holds(lambda x, y: one_step(x, next(step), eps, run.norm), run.chosen)  # noqa: B023


def pgd(run: Run, factor: float) -> None:
    """PGD on two losses, each from another random start; the second only where the first failed."""
    eps, rng, right = factor * run.eps, run.rng("pgd", str(factor)), np.ones(len(run.chosen), bool)
    for loss in (margin, cross_entropy):
        rest = np.flatnonzero(right)
        right[rest] = run.holds(lambda x, y: _kept(run, x, y, eps, rng, loss), run.chosen[rest])  # noqa: B023
    run.right["PGD", eps] = right


def ascended(run: Run, right: np.ndarray, key: str, starts: int) -> np.ndarray:
    """What PGD leaves of these, with two losses in turn, each from another start; the next only where the last failed."""
    rng, left = run.rng(key), right.copy()
    for start in range(starts):
        loss, rest = (margin, cross_entropy)[start % 2], np.flatnonzero(left)
        make = functools.partial(_ascend, run.model, eps=run.eps, norm=run.norm, rng=rng, loss=loss)
        left[rest] = run.holds(make, run.chosen[rest])
    return left


def _kept(run: Run, x: Tensor, y: Tensor, eps: float, rng: torch.Generator, loss: Loss) -> Tensor:
    """PGD's examples; the first that fall at the headline's eps are kept for the gallery."""
    x_adv = _ascend(run.model, x, y, eps, run.norm, rng, loss=loss)
    if eps == run.eps and len(run.gallery) < SHOWN:
        fell = run.model(x_adv).argmax(1) != y
        run.gallery += list(zip(x[fell].cpu(), x_adv[fell].cpu(), strict=True))[: SHOWN - len(run.gallery)]
    return x_adv


def transfer(run: Run) -> None:
    """Examples made for the surrogate, of images that it was not trained on; they stop at no success, so that they carry over."""
    if run.surrogate is None:
        return
    held = ~run.trained_on[run.chosen]
    index, rng, made = run.chosen[held], run.rng("transfer"), []

    def transferred(x: Tensor, y: Tensor) -> Tensor:
        made.append(_ascend(run.surrogate, x, y, run.eps, run.norm, rng, loss=margin, stop=False))
        return made[-1]

    run.right["transfer", run.eps] = run.holds(transferred, index)
    run.tested["transfer"] = held
    own, again = run.holds(lambda x, y: x, index, run.surrogate), iter(made)
    fell = own & ~run.holds(lambda x, y: next(again), index, run.surrogate)
    run.surrogate_right = int(own.sum() - fell.sum()), int(own.sum())


def search(run: Run) -> None:
    """A search without a gradient on what PGD left: if it turns any of that, the gradient was to blame."""
    left, rng = run.right["PGD", run.eps], run.rng("square")
    if run.norm == "Linf" and left.any():
        made = functools.partial(square, run.model, eps=run.eps, rng=rng)
        run.right["search", run.eps] = run.holds(made, run.chosen[left])
        run.tested["search"] = left


def distance(run: Run) -> None:
    """DeepFool: how far the nearest other answer is, ∞ where it finds none."""
    if run.classes > MOST_CLASSES or not len(run.chosen):
        return
    found, norm = [], {"Linf": "linf", "L2": "l2"}[run.norm]
    for x, y in run.each(run.chosen[:CHECKED]):
        x_adv = deepfool(run.model, x, y, norm=norm, steps=STEPS)
        change = (x_adv - x).flatten(1)
        length = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
        with torch.no_grad():
            found.append(length.masked_fill(run.model(x_adv).argmax(1) == y, torch.inf).cpu().numpy())
    run.distance = np.concatenate(found)


def more_steps(run: Run) -> None:
    """PGD with more steps on some that withstood it, and with a change that can turn any image grey."""
    grey = GREY if run.norm == "Linf" else GREY * math.sqrt(run.x[0].numel())
    withstood = run.chosen[run.right["PGD", run.eps]][:CHECKED]
    for check, eps, index in (("converged", run.eps, withstood), ("grey", grey, run.chosen[:CHECKED])):
        rng = run.rng(check)
        right = run.holds(
            lambda x, y: _ascend(run.model, x, y, eps, run.norm, rng, loss=margin, steps=MORE_STEPS),  # noqa: B023
            index,
        )
        run.left[check] = int(right.sum()), len(index)


# What it means ------------------------------------------------------------------------------------------------------


def checks_of(run: Run) -> list[Check]:
    """The reviewer's questions; a difference of two images, or of `TOLERANCE`, may be chance."""

    def limit(n: int) -> float:
        return max(TOLERANCE, 2 / n) if n else math.nan

    n, right, steps = len(run.chosen), run.right, [factor * run.eps for factor in SWEEP]
    if not n:
        return []
    survived = right["PGD", run.eps]
    checks = [Check("random", float(run.random_answers), 0.0), Check("gradient", run.flat / n, 0.0)]
    for name, easy in (("steps", "FGSM"), ("noise", "noise")):
        excess = max(float(right["PGD", e].mean() - right[easy, e].mean()) for e in steps)
        checks.append(Check(name, excess, limit(n)))
    rise = max(float(right["PGD", b].mean() - right["PGD", a].mean()) for a, b in itertools.pairwise(steps))
    checks.append(Check("larger", rise, limit(n)))
    for attack in ("transfer", "search"):
        if (attack, run.eps) in right:  # (a bad network's examples fail no check)
            among = survived[run.tested[attack]]
            if among.any():  # else there is nothing to turn
                fell = among & ~right[attack, run.eps]
                checks.append(Check(attack, float(fell.mean()), limit(len(fell))))
    for name in ("converged", "grey"):
        kept, of = run.left[name]
        turned = of - kept if name == "converged" else kept
        if of:
            checks.append(Check(name, turned / of, limit(of)))
    return checks


def worst_case(run: Run) -> np.ndarray:
    """Which of the attacked images are right under every attack of at most the headline's eps."""
    worst = np.ones(len(run.chosen), bool)
    for (attack, eps), right in run.right.items():
        if eps <= run.eps:
            tested = run.tested.get(attack, np.ones(len(worst), bool))
            worst[tested] &= right
    return worst
