"""A first look at images: can their class be told from what should not tell it, and are there near copies across splits.

A network learns whatever tells the classes apart: a marker in the corner, a brighter device. Each check has a control on the
same images, and says when there are too few of them to tell.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize, stats
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from medsec.data import Cohort
from medsec.judge import Report, row, share, shown

__all__: list[str] = []  # for the command `medsec`

Labelled = tuple[np.ndarray, np.ndarray]  # images (n, C, S, S), uint8 or floats in [0, 1], and labels (n,)

LEVEL = 0.95
TRAINED_ON, SCORED_ON = (
    1000,
    2000,
)  # most images that a probe is trained and scored on, drawn at random: seconds, not minutes
SHUFFLES = 99  # fits to shuffled labels: above all of them is a chance of one in a hundred ...
COLUMNS = 400  # ... or fewer where many classes make a fit dear
PENALTIES = np.logspace(0, 5, 6)  # of the ridge regression, the best on left-out training images
LEAST = 5  # images of each class to train on, and to score on
WEIGHTY = 0.7  # area under the ROC curve: who can order 70 of 100 pairs has found something that a network would use
LINE = 28  # pixels a side that the ring is cut from: finer ones add numbers, not knowledge
RING = 2  # of them, 7 % of a side
THUMBNAIL = 8
PIECE = 256  # images that are floats at a time

COMPARED = 4000  # most images that are compared with one another
LEAST_COMPARED = 40
GRID, SIDE = 32, 16  # pixels a side: images are shifted on the first and compared on the second
REACH, STEP = 1.0, 0.5  # pixels of GRID: how far images are shifted against one another, and by what steps
DIRECTIONS = 64  # the strongest in which the images differ, made equally strong: all chests look alike without this
UNRELATED = 0.99  # share of the images whose nearest unrelated one is less alike than the closest
CERTAIN = 0.97  # correlation that is enough in any case where unrelated images are never so much alike


# The views ------------------------------------------------------------------------------------------------------------


def _unit(images: np.ndarray) -> np.ndarray:
    """Images as float32 in [0, 1]."""
    images = np.asarray(images)
    return images.astype(np.float32) / np.float32(255 if images.dtype == np.uint8 else 1)


def _bins(n: int, side: int, start: float = 0, stop: float | None = None) -> np.ndarray:
    """(side, n) weights: means over ``side`` equal parts of the stretch from ``start`` to ``stop`` of n pixels."""
    ends = np.linspace(start, n if stop is None else stop, side + 1)[:, None]
    pixel = np.arange(n)
    part = np.minimum(ends[1:], pixel + 1) - np.maximum(ends[:-1], pixel)
    return (np.maximum(part, 0) / (ends[1:] - ends[:-1])).astype(np.float32)


def _shrunk(images: np.ndarray, side: int) -> np.ndarray:
    """(n, C, side, side) by area averages."""
    part = _bins(images.shape[2], side)
    pieces = (images[at : at + PIECE] for at in range(0, len(images), PIECE))
    return np.concatenate([part @ _unit(piece) @ part.T for piece in pieces])


def ring(images: np.ndarray) -> np.ndarray:
    """(n, features): the outermost pixels, `RING` of `LINE` a side."""
    small = _shrunk(images, min(LINE, images.shape[2]))
    outer = np.ones(small.shape[2:], bool)
    outer[RING:-RING, RING:-RING] = False
    return small[:, :, outer].reshape(len(images), -1)


def thumbnail(images: np.ndarray) -> np.ndarray:
    """(n, features): the whole image, `THUMBNAIL` pixels a side."""
    return _shrunk(images, THUMBNAIL).reshape(len(images), -1)


def brightness(images: np.ndarray) -> np.ndarray:
    """(n, 2): the mean of all pixels and its square, so that a class may also be both darker and brighter."""
    mean = images.mean((1, 2, 3), dtype=np.float64) / (255 if images.dtype == np.uint8 else 1)
    return np.stack([mean, (mean - 0.5) ** 2], 1)


VIEWS: dict[
    str, tuple[Callable[[np.ndarray], np.ndarray], str, str]
] = {  # name -> function, in words, what it may mean
    "border": (ring, "the border alone", "Look there for letters, frames and collimators, and at how the body lies"),
    "brightness": (brightness, "the mean brightness alone", "It may be the disease; it may be the device"),
    "thumbnail": (
        thumbnail,
        f"{THUMBNAIL} × {THUMBNAIL} pixels",
        "It may be a large finding; it may be pose or device",
    ),
}

SUSPECT = ("border", "brightness")


# Can the class be told? -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """How well the class is told from a view: the area under the ROC curve, on images that were not trained on.

    ``value`` (the mean over classes, each against the rest) and its interval, NaN where ``few``; ``shuffled`` the same
    with labels shuffled, before training and before scoring; ``n`` images were scored.
    """

    value: float
    low: float
    high: float
    n: int
    shuffled: np.ndarray
    few: str = ""

    @property
    def found(self) -> bool:
        return not self.few and self.value > self.shuffled.max() and self.low > 0.5

    @property
    def weighty(self) -> bool:
        return self.found and self.low >= WEIGHTY

    @property
    def open(self) -> bool:
        """Whether so much could still be in it that nothing can be said."""
        return not self.found and (bool(self.few) or self.high >= WEIGHTY)


def told(view: Callable[[np.ndarray], np.ndarray], train: Labelled, test: Labelled, seed: int = 0) -> Told:
    """How well a ridge regression, trained on ``train``, tells the classes of ``test`` from a view of the images."""
    classes = np.unique(np.concatenate([train[1], test[1]]))
    counts = [int((part == k).sum()) for part in (train[1], test[1]) for k in classes]
    if len(classes) < 2 or min(counts) < LEAST:
        few = f"a class has {min(counts)} images to train or to score on, {LEAST} are needed"
        return Told(np.nan, np.nan, np.nan, len(test[1]), np.empty(0), few)
    rng = np.random.default_rng(seed)
    (x, y), (x_test, y_test) = _some(train, TRAINED_ON, rng), _some(test, SCORED_ON, rng)
    targets = classes[1:] if len(classes) == 2 else classes  # of two, one says it all
    times = max(19, min(SHUFFLES, COLUMNS // len(targets)))
    orders = [np.arange(len(y)), *(rng.permutation(len(y)) for _ in range(times))]
    scored = [y_test, *(rng.permutation(y_test) for _ in range(times))]  # else a lucky direction tells the true labels
    scaler = StandardScaler().fit(features := view(x).astype(np.float64))
    wanted = np.stack([(y[order] == k) for order in orders for k in targets], 1).astype(np.float64)
    ridge = RidgeCV(PENALTIES, alpha_per_target=True).fit(scaler.transform(features), wanted)
    answers = ridge.predict(scaler.transform(view(x_test).astype(np.float64)))
    right = np.stack([(order == k) for order in scored for k in targets], 1)
    areas = _areas(answers.reshape(right.shape), right).reshape(len(scored), -1)
    sizes = [int((y_test == k).sum()) for k in targets]
    ends = np.array([area_interval(a, m, len(y_test) - m) for a, m in zip(areas[0], sizes, strict=True)])
    low, high = ends.mean(0)  # as if the classes' errors went together: the widest that it can be
    return Told(float(areas[0].mean()), float(low), float(high), len(y_test), areas[1:].mean(1))


def _some(labelled: Labelled, most: int, rng: np.random.Generator) -> Labelled:
    """About so many of the images, and at least `LEAST` of each class."""
    images, labels = labelled
    drawn = rng.permutation(len(labels))
    rare = [drawn[labels[drawn] == k][:LEAST] for k in np.unique(labels)]
    kept = np.union1d(np.concatenate(rare), drawn[:most])
    return images[kept], labels[kept]


def _areas(answers: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each column: how often a right one (bool) has the higher answer; ties are halves."""
    m, ranks = right.sum(0), stats.rankdata(answers, axis=0)
    return ((ranks * right).sum(0) - m * (m + 1) / 2) / (m * (len(right) - m))


def area_interval(area: float, m: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Interval of the area under a ROC curve of m positive and n negative items (Newcombe 2006, Stat. Med. 25:559, method 5).

    Unlike the usual ones it has a width where every pair is ordered rightly.

    >>> [round(end, 2) for end in area_interval(1.0, 6, 6)]
    [0.69, 1.0]
    """
    z, mean = stats.norm.ppf((1 + level) / 2), (m + n) / 2 - 1

    def beyond(a: float) -> float:
        variance = a * (1 - a) * (1 + mean * ((1 - a) / (2 - a) + a / (1 + a))) / (m * n)
        return (a - area) ** 2 - z**2 * variance

    edge = 1e-9  # beyond() is 0 at 0 and 1 where the area is, and negative beside them
    low = optimize.brentq(beyond, 0, min(area, 1 - edge)) if area > edge else 0.0
    high = optimize.brentq(beyond, max(area, edge), 1) if area < 1 - edge else 1.0
    return float(low), float(high)


# Near copies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copies:
    """Images with a near copy in another split.

    ``index`` (k,) which ones and ``of`` (k,) their nearest; ``alike`` the correlation from which two images count as copies;
    ``unrelated`` how many have an image of another class in another split that is as much alike, of the ``n`` compared.
    """

    index: np.ndarray
    of: np.ndarray
    alike: float
    unrelated: int
    n: int
    few: str = ""


def near_copies(images: np.ndarray, labels: np.ndarray, splits: np.ndarray, seed: int = 0) -> Copies:
    """Which images have a near copy in another split: brightened, saved anew, moved by up to `REACH` pixels of `GRID`.

    Two images of different classes are no copies, as a rule. So how much alike unrelated images are is learned from them,
    and raised by how much more alike images of one class are in the median. A pair counts as copies if it is at most half as
    far from identical as the closest of those (see `UNRELATED`), or `CERTAIN`. So says `_limit`.

    Args:
        images: (n, C, S, S) uint8, or floats in [0, 1].
        labels: (n,).
        splits: (n,) the split of each.
        seed: of the choice among more than `COMPARED` images.
    """
    labels, splits = np.asarray(labels), np.asarray(splits)
    kept = np.sort(np.random.default_rng(seed).permutation(len(labels))[:COMPARED])
    labels, splits, n = labels[kept], splits[kept], len(kept)
    apart = splits[:, None] != splits
    other = apart & (labels[:, None] != labels)
    if n < LEAST_COMPARED or not other.any(1).all():
        few = f"{n} images in {len(np.unique(splits))} splits; {LEAST_COMPARED} in two, of two classes, are needed"
        return Copies(np.empty(0, int), np.empty(0, int), np.nan, 0, n, few)
    likeness = _likeness(images[kept])
    unrelated, same = (np.where(pairs, likeness, -1).max(1) for pairs in (other, apart & ~other))
    alike = _limit(unrelated, same)
    likeness[~apart] = -1
    found = np.flatnonzero(likeness.max(1) >= alike)
    return Copies(kept[found], kept[likeness[found].argmax(1)], alike, int((unrelated >= alike).sum()), n)


def _limit(unrelated: np.ndarray, same: np.ndarray) -> float:
    """From which likeness on two images are copies, by each image's nearest of another and of its own class."""
    closest = float(np.quantile(unrelated, UNRELATED))
    more = max(0.0, float(np.median(same) - np.median(unrelated)))  # of the median, which few copies do not move ...
    raised = min((1 + closest + more) / 2, CERTAIN)  # ... and where all have copies, they are told by this
    return max((1 + closest) / 2, raised)


def _likeness(images: np.ndarray) -> np.ndarray:
    """(n, n) correlation of all pairs, each at the shift at which it is largest."""
    small = _shrunk(images, min(GRID, images.shape[2]))
    plain = _described(small, 0, 0)
    mean = plain.mean(0)
    _, strength, ways = np.linalg.svd(plain - mean, full_matrices=False)
    k = max(1, min(DIRECTIONS, len(images) // 4, int((strength > 1e-4 * strength[0]).sum())))
    whiten = (ways[:k] / np.maximum(strength[:k], 1e-12)[:, None]).T

    def point(dy: float, dx: float) -> np.ndarray:
        return _normed((_described(small, dy, dx) - mean) @ whiten)

    still, best = point(0, 0), np.full((len(images), len(images)), -1, np.float32)
    steps = np.arange(-REACH, REACH + STEP / 2, STEP)
    for dy, dx in itertools.product(steps, steps):
        np.maximum(best, point(dy, dx) @ still.T, out=best)
    return np.maximum(best, best.T)


def _described(images: np.ndarray, dy: float, dx: float) -> np.ndarray:
    """(n, features) of the inner part, moved: the same under another brightness or contrast."""
    s = images.shape[2]
    down, across = (_bins(s, SIDE, REACH + by, s - REACH + by) for by in (dy, dx))
    flat = (down @ images @ across.T).reshape(len(images), -1)
    return _normed(flat - flat.mean(1, keepdims=True))


def _normed(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


# The report -----------------------------------------------------------------------------------------------------------


def first_look(cohort: Cohort, seed: int = 0) -> Report:
    """All checks of a cohort: views are trained on the split client and scored on the others, which have other patients."""
    names = list(cohort.splits)
    images = np.concatenate([cohort[name].images for name in names])
    labels = np.concatenate([cohort[name].labels for name in names])
    splits = np.repeat(np.arange(len(names)), [len(cohort[name]) for name in names])
    train = splits == names.index("client")
    views = {
        name: told(view, (images[train], labels[train]), (images[~train], labels[~train]), seed)
        for name, (view, *_) in VIEWS.items()
    }
    copies = near_copies(images, labels, splits, seed)
    rows = [_told_row(VIEWS[name][1], found) for name, found in views.items()]
    note = copies.few and f"cannot be judged: {copies.few}"
    note = note or f"as much alike to one of another class: {copies.unrelated}"
    n = 0 if copies.few else copies.n
    rows.append(row("near copies", "images with one in another split", *share(len(copies.index), n), note=note))
    remarks = [_told_sentence(name, found) for name, found in views.items()]
    remarks.append(_copies_sentence(copies, splits, names))
    return Report(
        f"First look at the images of cohort {cohort.name}",
        _verdict(views, copies),
        pd.DataFrame(rows),
        remarks,
        NOT_TESTED,
    )


NOT_TESTED = (
    "markers inside the image, textures of a device, and whatever a small linear classifier does not see",
    "copies that were turned, mirrored, cut or enlarged, and other images of the same patient",
    "whether classes and patients are right; and intervals take every image for a patient of its own",
)


def _told_row(words: str, found: Told) -> dict:
    note = (
        f"cannot be judged: {found.few}"
        if found.few
        else f"shuffled labels {shown(found.shuffled.mean())}, at most {shown(found.shuffled.max())}"
    )
    return row("class told from", words, found.value, found.low, found.high, found.n, "AUC", note)


def _told_sentence(name: str, found: Told) -> str:
    words, meaning = VIEWS[name][1:]
    if found.few:
        return f"From {words}: cannot be judged, {found.few}."
    pairs = f"of 100 pairs of two classes {100 * found.value:.0f} are told rightly (50 by guessing)"
    if found.found:
        return f"From {words} the class can be told {'well' if found.weighty else 'a little'}: {pairs}. {meaning}."
    if found.open:
        return f"From {words}: {pairs}, no more than chance may give; with so few images {100 * found.high:.0f} are possible."
    return f"From {words} the class is not told better than chance allows: {pairs}."


def _copies_sentence(copies: Copies, splits: np.ndarray, names: Sequence[str]) -> str:
    if copies.few:
        return f"Near copies across splits: cannot be judged, {copies.few}."
    if not len(copies.index):
        return f"None of the {copies.n} images that were compared has a near copy in another split."
    where = ", ".join(
        f"{(splits[copies.index] == s).sum()} in {name}"
        for s, name in enumerate(names)
        if (splits[copies.index] == s).any()
    )
    return (
        f"{len(copies.index)} of {copies.n} images have a near copy in another split ({where}): results on them are too good. "
        f"The same likeness between two classes, where it is chance as a rule: {copies.unrelated} images."
    )


def _verdict(views: dict[str, Told], copies: Copies) -> str:
    """What was found, else what is open. Few pixels are no warning: a large finding shows in them, too."""
    warned = [f"the class can be told from {VIEWS[name][1]}" for name in SUSPECT if views[name].weighty]
    if len(copies.index) > copies.unrelated:
        warned.append(f"{len(copies.index)} images have a near copy in another split")
    weak = [VIEWS[name][1] for name in SUSPECT if views[name].found and not views[name].weighty]
    unknown = [VIEWS[name][1] for name, at in views.items() if at.open] + ["near copies"] * bool(copies.few)
    said = [f"Look before you train: {'; '.join(warned)}."] if warned else []
    said += [f"A little can be told from {' and '.join(weak)}."] if weak else []
    said += [f"The class shows in {VIEWS['thumbnail'][1]} already."] if views["thumbnail"].weighty else []
    said += [f"Too few images to judge: {', '.join(unknown)}."] if unknown else []
    return " ".join(said) or "Nothing gives the class away, and there are no near copies."
