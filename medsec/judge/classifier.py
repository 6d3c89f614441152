"""`audit`: how a classifier of your own fares under adversarial examples, and whether that number can be trusted.

The attacks are those of `medsec.evasion.attacks`, the checks those that a reviewer asks for (Carlini et al. 2019; Croce & Hein
2020). The model is used as it is, (n, C, H, W) in [0, 1] -> logits, in batches, on its own device and in its own precision.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed
from medsec.evasion.sanity import Check
from medsec.judge import COLUMNS, Report, balanced, curves, gallery, median, row, share, shown
from medsec.judge.probing import (
    ALIKE,
    LEAST_TRAINED,
    MOST_CLASSES,
    STEP,
    STEPS,
    SWEEP,
    Classifier,
    Run,
    checks_of,
    clean,
    distance,
    get_surrogate,
    more_steps,
    noise_and_fgsm,
    pgd,
    search,
    transfer,
    untouched,
    worst_case,
)

__all__ = ["audit"]

SWEPT = ("noise", "FGSM", "PGD")
HALF, FEW = 0.5, 30  # what "most" means; images below which the report warns


NAMES = {  # attack -> how the table calls it
    "noise": "random noise",
    "FGSM": "FGSM",
    "PGD": "PGD",
    "transfer": "transfer from another network",
    "search": "search without a gradient, on what PGD left",
}
PASSES = {  # check -> what is true where it passes, what is true where it fails
    "random": ("asked twice, it answers the same", "asked twice, it answers differently, which misleads an attack"),
    "gradient": ("its gradient is nowhere exactly 0", "its gradient is exactly 0"),
    "steps": ("PGD is no weaker than FGSM", "one step (FGSM) turns more than twenty (PGD)"),
    "noise": ("PGD is no weaker than random noise", "random noise turns more than its gradient does"),
    "larger": ("a larger eps is no weaker", "a larger eps turns fewer"),
    "transfer": (
        "what withstands PGD does not fall to another network's examples",
        "examples made for another network turn what withstood PGD",
    ),
    "search": ("nor to a search without a gradient", "a search without a gradient turns what withstood PGD"),
    "converged": ("three times the steps turn no more", "three times the steps turn more: PGD had not converged"),
    "grey": (
        "a change that can turn any image grey turns every answer",
        "even a change that can turn any image grey leaves right answers",
    ),
}


def audit(
    model: Callable[[Tensor], Tensor],
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    *,
    eps: float = 4 / 255,
    norm: str = "Linf",
    surrogate: Callable[[Tensor], Tensor] | None = None,
    attacked: int = 100,
    name: str = "",
    seed: int = 0,
    batch: int = 32,
    progress: bool = False,
) -> Report:
    """Attack a classifier with changes of at most ``eps``, and check whether the result can be believed.

    The model is not changed: parameters, buffers, mode, gradients and the global random numbers are afterwards as before.

    Args:
        model: (n, C, H, W) float32 in [0, 1] -> (n, K) logits, K ≥ 2. Normalisation belongs inside.
        images: (n, C, H, W) in [0, 1], that the model was not trained on.
        labels: (n,) integers from 0 to K − 1, every class at least once.
        eps: largest change, in units of the image: of every pixel (Linf), or the length of the whole change (L2).
        norm: "Linf" or "L2".
        surrogate: another classifier of the same images, whose adversarial examples are tried on the model; by default a small
            network is trained on half of the images, and its examples are made of the other half.
        attacked: most rightly classified images that are attacked, drawn at random.
        name: of the model, for the title.
        seed: of all random choices.
        batch: images at a time.
        progress: show on stderr how far it is.

    Returns:
        A report; ``examples`` has a row an image, and a column an attack: True where the answer stayed right.

    Raises:
        InputError: anything above is not as said. One line, before any attack.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()  # brighter than 0.5: class 1
    >>> _ = model[1].weight.data.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 16))
    >>> _ = model[1].bias.data.copy_(torch.tensor([8.0, -8.0]))
    >>> brightness = torch.cat([torch.linspace(0.1, 0.45, 20), torch.linspace(0.55, 0.9, 20)])
    >>> images = brightness[:, None, None, None].expand(-1, 1, 4, 4)
    >>> report = audit(model, images, [0] * 20 + [1] * 20, eps=0.1)
    >>> kept = report.table.set_index("measure").loc["PGD, eps 25.5/255"]
    >>> round(float(kept["value"]), 2), int(kept["n"])  # the three of each class that are less than 0.1 from the middle fall
    (0.85, 40)
    """
    x, y = checked(model, images, labels, eps, norm, surrogate)
    if attacked < 1 or batch < 1:
        raise InputError(f"attacked {attacked}, batch {batch}: both must be at least 1")
    with untouched(model), untouched(surrogate), torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "audit"))
        run = Run(Classifier(model), x, y, eps, norm, batch, seed, attacked)
        clean(run)
        stages = [] if run.constant else [get_surrogate(surrogate), noise_and_fgsm]
        stages += (
            []
            if run.constant
            else [*(partial(pgd, factor=factor) for factor in SWEEP), transfer, search, distance, more_steps]
        )
        for stage in tqdm(stages, desc="audit", unit="stage", disable=not progress):
            stage(run)
    return _report(run, name)


# What is handed in -----------------------------------------------------------------------------------------------------


def checked(model, images, labels, eps: float, norm: str, surrogate) -> tuple[Tensor, Tensor]:
    """Images (n, C, H, W) float32 and labels (n,) int64 on the CPU, or an `InputError`."""
    x, y = _images(_tensor(images, "images")), _labels(_tensor(labels, "labels"))
    if norm not in ("Linf", "L2"):
        raise InputError(
            f'norm {norm!r}: choose "Linf" (the largest change of a pixel) or "L2" (the length of the change)'
        )
    if len(y) != len(x):
        raise InputError(f"{len(y)} labels for {len(x)} images: need one each")
    limit = 0.5 if norm == "Linf" else 0.5 * math.sqrt(x[0].numel())
    if not 0 < eps < limit:
        raise InputError(
            f"eps {eps:g}: must be above 0 and below {limit:.3g}, where any image can become grey; it is in units of an image in "
            "[0, 1], so write 4/255, not 4"
        )
    for what, each in (("model", model), ("surrogate", surrogate)):
        if each is not None:
            _logits(each, x, y, what)
    return x, y


def _tensor(given, what: str) -> Tensor:
    try:
        return torch.as_tensor(given).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{what} of type {type(given).__name__} are no array of numbers, all of one shape") from None


def _images(x: Tensor) -> Tensor:
    if x.ndim != 4 or not x.numel():
        hint = "; for grey images add an axis: images[:, None]" if x.ndim == 3 and len(x) else ""
        raise InputError(f"images of shape {tuple(x.shape)}: need (n, C, H, W) with n >= 1{hint}")
    if x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        raise InputError(
            f"images of shape {tuple(x.shape)} have their channels last; move them: images.permute(0, 3, 1, 2)"
        )
    if not x.is_floating_point():
        raise InputError(f"images are {str(x.dtype).removeprefix('torch.')}; scale them to [0, 1]: images / 255")
    x = x.float()
    if not torch.isfinite(x).all():
        raise InputError(
            f"image {int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])} holds NaN or infinite values; mend it"
        )
    low, high = float(x.min()), float(x.max())
    if low < 0 or high > 1:
        hint = "divide them by 255" if low >= 0 and high > 2 else "scale them, and normalise inside the model"
        raise InputError(f"images range from {low:.3g} to {high:.3g}, not within [0, 1]; {hint}")
    return x


def _labels(y: Tensor) -> Tensor:
    if y.ndim != 1:
        raise InputError(f"labels of shape {tuple(y.shape)}: need (n,), a class number an image")
    if y.is_floating_point() or y.is_complex():
        raise InputError(f"labels are {str(y.dtype).removeprefix('torch.')}; need whole numbers, the classes")
    return y.long()


def _logits(model, x: Tensor, y: Tensor, what: str) -> None:
    """Raises InputError unless a model gives logits for these images, and the labels are its classes."""
    if not callable(model):
        raise InputError(f"the {what} is of type {type(model).__name__}; need a torch module, or a function of images")
    if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
        raise InputError(
            f"the {what} is in training mode, where its answer depends on the batch; call model.eval() first"
        )
    some = x[:MOST_CLASSES]
    try:
        with torch.no_grad(), torch.random.fork_rng(), untouched(model):
            logits = Classifier(model)(some)
    except InputError:
        raise
    except Exception as error:  # whatever a model raises
        why = (str(error).splitlines() or [""])[0][:160]
        shape = f"({', '.join(map(str, some.shape))})"
        raise InputError(
            f"the {what} cannot take a batch of shape {shape}; give images of its own size and channels (--size, --channels), or "
            f"resize inside it ({type(error).__name__}: {why[:100]})"
        ) from None
    if logits.ndim != 2 or len(logits) != len(some) or logits.shape[1] < 2:
        hint = "; of one logit z make two: torch.cat([0 * z, z], 1)" if logits.shape[1:] in ((1,), ()) else ""
        raise InputError(
            f"the {what} gives {tuple(logits.shape)} for {len(some)} images: need logits ({len(some)}, K), K >= 2{hint}"
        )
    if not torch.isfinite(logits).all():
        raise InputError(f"the {what} gives NaN or infinite logits for images in [0, 1]; mend it")
    if logits.min() >= 0 and (logits.sum(1) - 1).abs().max() < ALIKE:
        raise InputError(
            f"the {what} gives probabilities, which hide its gradient; return the logits, without the softmax"
        )
    classes = logits.shape[1]
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise InputError(
            f"labels from {int(y.min())} to {int(y.max())}, but the {what} knows the classes 0 to {classes - 1}"
        )
    if missing := sorted(set(range(classes)) - set(y.tolist())):
        raise InputError(
            f"no image of class {missing[0]} of the {what}'s {classes} ({len(missing)} classes are missing); add some, or cut "
            "its logits to the classes that there are"
        )


# What it means ---------------------------------------------------------------------------------------------------------


def size_of(eps: float, norm: str) -> str:
    """An eps as people write it: 4/255 where it is a simple number of 255ths."""
    of_255 = 255 * eps
    simple = norm == "Linf" and abs(2 * of_255 - round(2 * of_255)) < 1e-6
    return f"{of_255:g}/255" if simple else f"{eps:.4g}"


def _verdict(run: Run, failed: list[Check]) -> str:
    if run.constant:
        same = f"It gives every image the same answer, class {run.answers[0]}"
        return f"{same}: it tells nothing apart, and so there is nothing to attack."
    guess, (skill, low, high) = 1 / run.classes, balanced(run.answers, run.y.numpy())
    if not low > guess:
        found = f"balanced accuracy {shown(skill)} [{shown(low)}, {shown(high)}], guessing has {shown(guess)}"
        return f"It is not clearly better than guessing ({found}): its other rates say little."
    worst = worst_case(run)
    kept, low, high, n = share(int(worst.sum()), len(worst))
    reasons = "; ".join(PASSES[check.name][1] for check in failed)
    rate = f"of {n} right answers, {shown(kept)} [{shown(low)}, {shown(high)}] are left with changes of at most "
    rate += size_of(run.eps, run.norm)
    rate += f"; random noise of that size leaves {shown(run.right['noise', run.eps].mean())}"
    if high < HALF:
        doubt = f" Even fewer may be left, since a check failed: {reasons}." if failed else ""
        return f"It loses most of its right answers to an attacker who knows it: {rate}.{doubt}"
    if failed:
        return f"Its robustness cannot be believed: {reasons}. Under the attacks run here, {rate}; a better one may turn more."
    if low > HALF:
        return f"It keeps most of its right answers under the attacks run here: {rate}."
    return f"Whether it keeps most of its right answers is open: {rate}."


def _report(run: Run, name: str) -> Report:
    checks = checks_of(run)
    failed = [check for check in checks if not check.passes]
    table = pd.DataFrame([*_rows(run), *_check_rows(run, checks)], columns=COLUMNS)
    figures = []
    if len(run.chosen):
        unit = 255 if run.norm == "Linf" else 1
        label = "eps, in 255ths" if run.norm == "Linf" else "eps, length of the change"
        series = {
            NAMES[attack]: [
                (unit * e, *share(int(right.sum()), len(right))[:3])
                for (a, e), right in run.right.items()
                if a == attack
            ]
            for attack in SWEPT
        }
        drawn = curves(series, label, "right answers left")
        figures.append(("Right answers that are left, by the size of the change; bars: 95 %.", drawn))
    if run.gallery:
        caption = f"Image, attacked image (at most {size_of(run.eps, run.norm)}), and the change, stretched to be seen."
        figures.append((caption, gallery(run.gallery)))
    title = f"Audit of the classifier {name}".strip()
    return Report(title, _verdict(run, failed), table, _remarks(run), _not_tested(run), figures, _examples(run))


def _rows(run: Run) -> list[dict]:
    y = run.y.numpy()
    clean_part, part = "no attack", "right answers left"
    rows = [
        row(clean_part, "accuracy", *share(int((run.answers == y).sum()), len(y))),
        row(
            clean_part,
            "balanced accuracy",
            *balanced(run.answers, y),
            len(y),
            note=f"guessing: {shown(1 / run.classes)}",
        ),
    ]
    for attack, title in NAMES.items():
        for eps in sorted(e for a, e in run.right if a == attack):
            right = run.right[attack, eps]
            rows.append(row(part, f"{title}, eps {size_of(eps, run.norm)}", *share(int(right.sum()), len(right))))
    if run.constant:
        return rows
    worst = worst_case(run)
    note = f"right under every attack above up to eps {size_of(run.eps, run.norm)}"
    rows.append(row(part, "worst case", *share(int(worst.sum()), len(worst)), note=note))
    if run.surrogate is not None:
        skill = balanced(*run.surrogate_answers)
        rows.append(row("the other network", "balanced accuracy", *skill, len(run.surrogate_answers[1])))
        note = "control: the examples of “transfer” on the network that they were made for"
        rows.append(row("the other network", "right answers left", *share(*run.surrogate_right), note=note))
    if run.distance is not None:
        found = (255 * v if run.norm == "Linf" else v for v in median(run.distance))
        unit = "/255" if run.norm == "Linf" else ""
        rows.append(row("distance", "to the next answer (DeepFool, median)", *found, len(run.distance), unit))
    return rows


def _check_rows(run: Run, checks: list[Check]) -> list[dict]:
    rows = []
    for check in checks:
        says, against = PASSES[check.name]
        note = "passed" if check.passes else f"FAILED: {against}"
        n = run.left[check.name][1] if check.name in run.left else len(run.right.get((check.name, run.eps), run.chosen))
        rows.append(row("check", says, check.value, n=n, note=f"{note} (share of images; limit {check.limit:.2g})"))
    return rows


def _remarks(run: Run) -> list[str]:
    if run.constant:
        return []
    right, n = int((run.answers == run.y.numpy()).sum()), len(run.chosen)
    remarks = [
        f"{n} of the {right} rightly classified images were attacked ({len(run.y)} images in all, seed {run.seed}).",
        f"PGD: {STEPS} steps of {STEP:g} eps from a random start, raising the margin, then the cross-entropy.",
        "Intervals take images as independent. Several of one patient are not: the true ones are then wider.",
    ]
    if n < FEW:
        remarks.append(f"{n} are few: see how wide the intervals are, and that a check allows for two images.")
    if run.trained_on.any():
        trained = int(run.trained_on.sum())
        remarks.append(
            f"The other network was trained on {trained} of the images, and its examples made of the others."
        )
    return remarks


def _not_tested(run: Run) -> list[str]:
    if run.constant:
        return ["Any attack: a network with one answer cannot be attacked, and is of no use."]
    other = "L2" if run.norm == "Linf" else "Linf"
    sentences = [
        "Attacks that are stronger (AutoAttack, more restarts) or made for this very model: what is left here is an upper bound.",
        f"Changes that are not small in {run.norm}: {other}, patches, turns, other scanners, another way to take the image.",
        "Poisoned training, backdoors, privacy. And whether the model was trained on these images: then it looks too good.",
        "Whether it is right often enough for use on patients: this is no clinical evaluation.",
    ]
    if run.surrogate is None:
        sentences.insert(
            0, f"Transfer: fewer than {2 * LEAST_TRAINED} images of a class, too few to train another network."
        )
    elif not balanced(*run.surrogate_answers)[1] > 1 / run.classes:
        sentences.insert(
            0, "Transfer: the other network is not clearly better than guessing, and its examples prove nothing."
        )
    if run.norm == "L2":
        sentences.insert(0, "A search without a gradient: it is there for Linf only.")
    if run.distance is None:
        sentences.insert(0, f"The distance to the next answer: more than {MOST_CLASSES} classes, or no right answer.")
    return sentences


def _examples(run: Run) -> pd.DataFrame:
    """A row an image; attacks are columns, True where the answer stayed right, empty where it was not attacked."""
    table = pd.DataFrame({"label": run.y.numpy(), "answer": run.answers})
    for (attack, eps), right in run.right.items():
        index = run.chosen[run.tested.get(attack, np.ones(len(run.chosen), bool))]
        table[f"{attack} {size_of(eps, run.norm)}"] = pd.Series(right, index, dtype="boolean")
    if run.distance is not None:
        table["distance"] = pd.Series(run.distance, run.chosen[: len(run.distance)])
    return table.rename_axis("image")
