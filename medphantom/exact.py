"""Arithmetic and random numbers for phantoms whose images are the same bits on every machine.

* Pixels are computed in float32 with ``+ - * /``, square root, minimum, maximum, floor and comparisons only. IEEE 754 rounds
  each of these exactly, so neither the processor nor numpy's SIMD paths can change a result. ``exp`` and ``log`` are
  polynomials of our own, and sums over pixels are taken over integers: float sums depend on their order.
* Random parameters are not drawn in sequence but hashed from (seed, patient, parameter name), so a patient looks the same in
  every batch, and adding a parameter changes no other one.

Arrays are (B, n, n) for B patients and n pixels a side; a parameter drawn once per patient is (B, 1, 1).
"""

import zlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

_F = np.float32
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of the splitmix64 generator
_MASK64 = 2**64 - 1


def sq(x):
    """A product: `**` may go through the C library's pow."""
    return x * x


def root(x):
    """Square root, 0 outside the body: ``root(1 - r^2)`` is the profile of an ellipsoid of unit radius."""
    return np.sqrt(np.maximum(x, 0))


def ease(x):
    """A smooth step from 0 (x <= 0) to 1 (x >= 1)."""
    x = np.minimum(np.maximum(x, 0), 1)
    return x * x * (3 - 2 * x)


def where(mask, yes, no):
    """`np.where` that stays in float32 (two Python numbers would give float64)."""
    return np.where(mask, np.asarray(yes, _F), np.asarray(no, _F))


def ellipse(x, y, a, b):
    """Profile, 0 to 1, of an ellipsoid with half-axes a and b."""
    return root(1 - sq(x / a) - sq(y / b))


def turn(t):
    """Cosine and sine of the angle whose half has tangent t: a rotation without trigonometric functions."""
    k = 1 / (1 + t * t)
    return (1 - t * t) * k, 2 * t * k


def exp(x):
    """exp(x) for -87 < x <= 0 to 3e-6: 2^floor(t) from the exponent bits, 2^(t - floor(t)) from a polynomial."""
    t = x * 1.4426950408889634
    whole = np.floor(t)
    f = t - whole
    p = ((((0.0018775767 * f + 0.0089893397) * f + 0.055826318) * f + 0.24015361) * f + 0.69315308) * f + 1
    return p * ((whole.astype(np.int32) + 127) << 23).view(_F)


def log(x):
    """log(x) for positive normal x to 1e-5: exponent bits, and 2 artanh((m - 1)/(m + 1)) of the mantissa m."""
    bits = x.view(np.int32)
    exponent = ((bits >> 23) - 127).astype(_F)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).view(_F)
    s = (mantissa - 1) / (mantissa + 1)
    q = s * s
    return exponent * 0.69314718 + 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9)))))


def halve(x):
    """Average 2 x 2 pixels: (B, 2m, 2m) -> (B, m, m), in a fixed order."""
    rows = x[:, 0::2] + x[:, 1::2]
    return (rows[:, :, 0::2] + rows[:, :, 1::2]) * 0.25


def blocks(count: int, size: int) -> tuple[int, list[np.ndarray]]:
    """Pixels a side to draw at, and the patients block by block: working arrays of 32768 pixels stay in the cache.

    Ribs and vessels of a small image are finer than its pixels: it is drawn at twice the size, then averaged.
    """
    n = size if size >= 56 else 2 * size
    step = max(1, 32768 // (n * n))
    return n, [np.arange(start, min(start + step, count)) for start in range(0, count, step)]


def finished(x: np.ndarray, size: int) -> np.ndarray:
    """Grey levels in 0 .. 1, or a mask, of `blocks` at `size` pixels a side: (B, size, size) uint8, or bool."""
    mask = x.dtype == bool
    if x.shape[1] != size:
        x = halve(x.astype(_F))
        x = x >= 0.5 if mask else x
    return x if mask else np.minimum(np.maximum(np.floor(x * 255 + 0.5), 0), 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------- named draws


def _mix(z):
    """The splitmix64 finaliser: a bijection of uint64 that scatters neighbouring keys."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


def _unit(z):
    """uint64 -> float32 uniform in [0, 1), from the top 24 bits."""
    return (z >> 40).astype(_F) * 2.0**-24


class Draws:
    """Random parameters by name. A value depends on (seed, patient, name), not on what else is drawn or when."""

    def __init__(self, seed: int, patients: np.ndarray, styles: Sequence[str], table: Mapping[str, Mapping]):
        """`patients` (N,) uint64, `styles` N letters, `table` what each letter stands for: numbers, or pairs of them."""
        world = _mix(np.array([(int(seed) + 1) * _GOLDEN & _MASK64], np.uint64))
        self._keys = _mix(world + patients * _GOLDEN)
        self._styles, self._table = styles, table
        self._rows = slice(None)
        self._units: dict[str, np.ndarray] = {}  # drawn for the whole batch at once, shared by its blocks
        self._presets: dict[str, np.ndarray] = {}

    def rows(self, rows: np.ndarray | slice) -> "Draws":
        """The same draws for a block of the patients."""
        block = object.__new__(Draws)
        block.__dict__.update(self.__dict__, _rows=rows)
        return block

    def bits(self, name: str, count: int = 0) -> np.ndarray:
        """uint64 words: (N,) for all patients of the batch or, with `count`, (B, count) for this block's."""
        salt = zlib.crc32(name.encode()) * _GOLDEN & _MASK64
        if not count:
            return _mix(self._keys ^ salt)
        first = _mix(self._keys[self._rows] ^ salt)
        return _mix(first[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)

    def __call__(self, name: str, low, high) -> np.ndarray:
        """Uniform in [low, high), (B, 1, 1) float32."""
        if name not in self._units:
            self._units[name] = _unit(self.bits(name)).reshape(-1, 1, 1)
        return low + self._units[name][self._rows] * (high - low)

    def many(self, name: str, low: float, high: float, count: int) -> np.ndarray:
        """`count` uniform numbers per patient, (B, count) float32."""
        return low + _unit(self.bits(name, count)) * (high - low)

    def chance(self, name: str, probability) -> np.ndarray:
        """True with the given probability, (B, 1, 1) bool."""
        return self(name, 0, 1) < probability

    def preset(self, key: str) -> np.ndarray:
        """A style's entry for each image: (B, 1, 1, 2) float32, a single number twice."""
        if key not in self._presets:
            table = {s: np.broadcast_to(np.array(self._table[s][key], _F), 2) for s in set(self._styles)}
            self._presets[key] = np.array([table[s] for s in self._styles], _F).reshape(-1, 1, 1, 2)
        return self._presets[key][self._rows]

    def styled(self, key: str) -> np.ndarray:
        """Uniform in the range the image's style gives `key`, (B, 1, 1) float32."""
        span = self.preset(key)
        return self("style " + key, span[..., 0], span[..., 1])

    def styled_chance(self, key: str) -> np.ndarray:
        """True with the probability the image's style gives `key`, (B, 1, 1) bool."""
        return self.chance("style " + key, self.preset(key)[..., 0])


# ------------------------------------------------------------------------------------------- fields and pictures


def lattice_noise(d: Draws, name: str, x: np.ndarray, y: np.ndarray, *, cell: float, reach: float) -> np.ndarray:
    """Smooth noise in [0, 1): random values on a square lattice, interpolated. (B, n, n).

    `x` (B, 1, n) and `y` (B, n, 1) are where the pixels lie, `cell` the lattice's step, which spans -reach .. reach.
    """
    cells = int(2 * reach / cell)
    knots = d.many(name, 0, 1, (cells + 1) * (cells + 1)).reshape(-1, cells + 1, cells + 1)

    def lattice(position):
        t = np.minimum(np.maximum((position + reach) * (1 / cell), 0), cells - 0.5)
        low = np.floor(t)
        return low.astype(np.intp), ease(t - low)

    (ix, fx), (iy, fy) = lattice(x), lattice(y)
    left, right = np.take_along_axis(knots, ix, 2), np.take_along_axis(knots, ix + 1, 2)
    rows = left + (right - left) * fx
    patient, iy = np.arange(len(knots))[:, None], iy[:, :, 0]
    upper, lower = rows[patient, iy], rows[patient, iy + 1]
    return upper + (lower - upper) * fy


def counted(d: Draws, name: str, intensity: np.ndarray, per_unit: np.ndarray, *, least: float) -> np.ndarray:
    """`intensity` as counted, `per_unit` quanta for 1, never below `least`: N quanta have a standard deviation of sqrt(N)."""
    n = intensity.shape[1]
    words = d.bits(name, n * n).reshape(-1, n, n)
    # A sum of eight random bytes is near enough to normal: mean 1020, standard deviation 209.02.
    pairs = (words & 0x00FF00FF00FF00FF) + ((words >> 8) & 0x00FF00FF00FF00FF)
    total = (pairs * 0x0001000100010001) >> 48
    normal = (total.astype(_F) - 1020) * _F(1 / 209.02)
    quanta = intensity * per_unit
    return np.maximum(quanta + np.sqrt(quanta) * normal, least) / per_unit


def three_taps(x: np.ndarray, axis: int, offset: int, weight) -> np.ndarray:
    """Move `weight` of every pixel to each neighbour `offset` pixels away along `axis`; edges repeat."""
    n = x.shape[axis]
    index = np.arange(-offset, n + offset).clip(0, n - 1)
    wide = np.take(x, index, axis)
    before, after = (wide[:, :n], wide[:, 2 * offset :]) if axis == 1 else (wide[:, :, :n], wide[:, :, 2 * offset :])
    return x + weight * (before - 2 * x + after)


def blurred(x: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Unsharpness of `sigma` 1/64 of the image: rounds of three taps at offsets 1 .. reach, whose variances add up."""
    n = x.shape[1]
    reach, rounds = max(1, round(n / 64)), 2
    offsets = range(1, reach + 1)
    variance = sq(sigma) * _F((n / 64) ** 2)  # pixels^2; one round at an offset adds 2 w offset^2
    weight = variance * _F(1 / (2 * rounds * sum(k * k for k in offsets)))
    for offset in (*offsets,) * rounds:
        for axis in (1, 2):
            x = three_taps(x, axis, offset, weight)
    return x


def checked(patients, labels, size, style, *, classes: Sequence[str], sizes: tuple[int, int], styles: Collection[str]):
    """The arguments of a phantom's `render`: patients (N,) uint64, labels (N,), and one style an image.

    Raises:
        ValueError: one line that says what is wrong.
    """
    patients, labels = np.asarray(patients), np.asarray(labels)
    if patients.ndim != 1 or labels.shape != patients.shape:
        raise ValueError(f"patients {patients.shape} and labels {labels.shape} must be one-dimensional, of one length")
    if patients.size and (patients.dtype.kind not in "iu" or patients.min() < 0):
        raise ValueError("patients must be integers >= 0")
    if not np.isin(labels, range(len(classes))).all():
        raise ValueError("labels must be " + ", ".join(f"{i} ({name})" for i, name in enumerate(classes)))
    if not isinstance(size, int | np.integer) or not sizes[0] <= size <= sizes[1]:
        raise ValueError(f"size must be a whole number from {sizes[0]} to {sizes[1]}, not {size}")
    letters = [style] * len(patients) if isinstance(style, str) else [str(s) for s in style]
    if len(letters) != len(patients):
        raise ValueError(f"{len(letters)} styles for {len(patients)} patients: give one letter, or one per patient")
    unknown = sorted(set([style] if isinstance(style, str) else letters) - set(styles))
    if unknown:
        raise ValueError(f"unknown style {', '.join(map(repr, unknown))}: the styles are {', '.join(styles)}")
    return patients.astype(np.uint64), labels, letters
