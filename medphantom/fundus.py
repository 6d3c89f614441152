"""A procedural colour fundus phantom: synthetic eyes whose photographs are the same bits on every machine.

The optics is that of a fundus camera. White light enters through the pupil, passes the retina, is reflected behind it and passes
it again. A tissue is described by how much of each colour it takes away, an absorbance in red, green and blue at every pixel:
blood takes away green and blue, melanin some of all three, the yellow pigment of the macula blue. What reaches the camera is
``base * exp(-absorbance)``. The optic disc, exudates, drusen and cotton-wool spots lie in front and have a colour of their own.
Uneven illumination, haze, a reflex, photon noise, unsharpness and a tone curve make grey levels of it.

The arithmetic and the random numbers of `medphantom.exact` keep the output reproducible to the last bit.

Coordinates are in units of the radius of the field of view (about 22 degrees). `x` and `y` belong to the camera; `t` grows from
the middle of the optic disc towards the macula, whichever eye it is, and `v` grows downwards. Arrays are (B, n, n) for B eyes
and n pixels a side; a parameter drawn once per eye is (B, 1, 1); colours are lists of three such arrays.
"""

from dataclasses import dataclass

import numpy as np

from medphantom import exact
from medphantom.exact import Draws, blurred, checked, counted, ease, exp, finished, lattice_noise, root, sq, turn, where

GRADES = ("normal", "mild", "referable")
SIZES = (28, 224)

# What a camera changes: everything in front of the eye. Pairs are ranges drawn per image, single numbers probabilities
# (`*_rate`). `field` is the radius of the lit circle as a share of half the image: above 1, the circle is cut off; `dose` the
# photons that a pixel of a 64-pixel image gets of white; `blur` is in 1/64 of the image.
# fmt: off
STYLES: dict[str, dict] = {
    # A tabletop camera in a screening centre: the whole circle, even light, natural colours.
    "A": {
        "field": (0.93, 0.98), "vignette": (0.10, 0.25), "off_light": (0.0, 0.12), "warm": (-0.03, 0.05),
        "haze": (0.0, 0.03), "exposure": (0.95, 1.15), "contrast": (0.95, 1.15), "blur": (0.2, 0.4),
        "dose": (3000, 7000), "glare_rate": 0.05, "dust_rate": 0.1,
    },
    # Film, scanned: warm, contrasty, top and bottom of the circle cut off.
    "B": {
        "field": (1.05, 1.18), "vignette": (0.2, 0.45), "off_light": (0.0, 0.2), "warm": (0.06, 0.15),
        "haze": (0.0, 0.04), "exposure": (0.85, 1.05), "contrast": (1.1, 1.35), "blur": (0.4, 0.7),
        "dose": (1500, 3000), "glare_rate": 0.1, "dust_rate": 0.3,
    },
    # Through a narrow pupil: dim, grainy, often a bright crescent at the edge.
    "C": {
        "field": (0.90, 0.97), "vignette": (0.3, 0.6), "off_light": (0.1, 0.4), "warm": (-0.02, 0.08),
        "haze": (0.02, 0.07), "exposure": (0.70, 0.95), "contrast": (0.9, 1.15), "blur": (0.2, 0.5),
        "dose": (500, 1200), "glare_rate": 0.45, "dust_rate": 0.1,
    },
    # Hand-held, through a hazy lens: pale, bluish, unsharp.
    "D": {
        "field": (0.82, 0.93), "vignette": (0.15, 0.4), "off_light": (0.05, 0.3), "warm": (-0.12, -0.04),
        "haze": (0.06, 0.15), "exposure": (0.95, 1.2), "contrast": (0.8, 1.0), "blur": (0.5, 0.8),
        "dose": (1200, 2500), "glare_rate": 0.2, "dust_rate": 0.2,
    },
}

# Red, green and blue. Reflectance behind the retina; absorbances; colours of what lies in front.
_BASE = (1.02, 0.62, 0.36)
_MELANIN, _MACULAR = (0.40, 0.75, 0.85), (0.10, 0.35, 0.75)
_ARTERY, _VEIN, _SPILT = (0.22, 0.80, 0.65), (0.42, 1.05, 0.75), (0.60, 1.40, 0.95)
_DISC, _CUP = (1.00, 0.78, 0.50), (1.00, 0.93, 0.74)
_EXUDATE, _COTTON, _DRUSE = (0.95, 0.86, 0.44), (0.84, 0.79, 0.67), (0.80, 0.58, 0.27)
# fmt: on

_VISIBLE = 0.06  # change of a colour that counts as a lesion
_ARCADES = tuple((kind, side) for kind in ("artery", "vein") for side in ("upper", "lower"))
_F = np.float32


@dataclass(frozen=True)
class Fundi:
    """Rendered eyes: `images` (N, H, W, 3) uint8, and `lesion` (N, H, W) bool, empty for a normal eye."""

    images: np.ndarray
    lesion: np.ndarray


@dataclass(frozen=True)
class _Eye:
    """Where each pixel lies, and what of the anatomy several layers share."""

    plate_x: np.ndarray  # (B, 1, n) camera coordinates
    plate_y: np.ndarray  # (B, n, 1)
    radius: np.ndarray  # (B, n, n) from the middle of the field
    t: np.ndarray  # (B, n, n) from the disc towards the macula
    v: np.ndarray  # (B, n, n) from the disc down
    fovea_t: np.ndarray  # (B, 1, 1)
    fovea_v: np.ndarray  # (B, 1, 1)
    disc: np.ndarray  # (B, 1, 1) radius of the optic disc
    pixel: np.ndarray  # (B, 1, 1) side of a pixel

    def take(self, rows: np.ndarray) -> "_Eye":
        """Some of the eyes."""
        return _Eye(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def render(patients, labels, *, seed: int, size: int = 32, style="A") -> Fundi:
    """Render one photograph per patient at `size` pixels a side; `labels` (N,) are places in GRADES.

    A mild retinopathy has microaneurysms and small dots of blood only, a referable one more of them, and blots, exudates,
    cotton-wool spots. `patients` is (N,) integers >= 0; `style` is one letter of STYLES or one letter per image. An image
    depends on (seed, patient, grade, size, style) only; the grade adds lesions and changes nothing else of the eye.
    """
    patients, grades, styles = checked(patients, labels, size, style, classes=GRADES, sizes=SIZES, styles=STYLES)
    n, blocks = exact.blocks(len(patients), size)
    draws = Draws(seed, patients, styles, STYLES)
    out = Fundi(np.empty((len(patients), size, size, 3), np.uint8), np.empty((len(patients), size, size), bool))
    for rows in blocks:
        colours, lesion = _render_block(draws, rows, grades[rows], n)
        out.lesion[rows] = finished(lesion, size)
        for channel, value in enumerate(colours):
            out.images[rows, :, :, channel] = finished(value, size)
    return out


def _render_block(draws: Draws, rows: np.ndarray, grades: np.ndarray, n: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Colours in 0 .. 1, three (B, n, n), and the lesion mask (B, n, n) bool."""
    d = draws.rows(rows)
    e = _eye(d, n)
    light, vessels = _healthy(d, e), _vessels(d, e)
    colours = [value * exp(-depth) for value, depth in zip(light, vessels, strict=True)]
    lesion, ill = np.zeros(e.t.shape, bool), grades > 0
    if ill.any():
        severe = (grades[ill] == GRADES.index("referable"))[:, None, None]
        drawn = [c[ill] for c in light], [c[ill] for c in vessels]
        some = _diseased(draws.rows(rows[ill]), e.take(ill), severe, *drawn)
        change = [np.abs(sick - value[ill]) for sick, value in zip(some, colours, strict=True)]
        lesion[ill] = (np.maximum(np.maximum(change[0], change[1]), change[2]) > _VISIBLE) & (e.radius[ill] < 1)
        for value, sick in zip(colours, some, strict=True):
            value[ill] = sick
    return _photograph(d, e, colours), lesion


def _eye(d: Draws, n: int) -> _Eye:
    """Pixel centres: a left or right eye, a little tilted, centred on the macula or between it and the disc."""
    unit = ((np.arange(n) + 0.5) * (2 / n) - 1).astype(_F)
    field = d.styled("field")
    plate_x, plate_y = unit[None, None, :] / field, unit[None, :, None] / field
    cos, sin = turn(d("tilt", -0.06, 0.06))
    across = (cos * plate_x + sin * plate_y) * where(d.chance("left eye", 0.5), 1, -1)
    fovea_t, fovea_v = d("disc to fovea", 0.62, 0.74), d("fovea down", 0.02, 0.10)
    centre = where(d.chance("macula centred", 0.6), 0, 0.33) + d("gaze across", -0.08, 0.08)
    t = across + fovea_t - centre
    v = cos * plate_y - sin * plate_x + fovea_v + d("gaze down", -0.08, 0.08)
    radius = np.sqrt(sq(plate_x) + sq(plate_y))
    return _Eye(plate_x, plate_y, radius, t, v, fovea_t, fovea_v, d("disc radius", 0.115, 0.155), 2 / (n * field))


def _texture(d: Draws, name: str, e: _Eye, cell: float) -> np.ndarray:
    """Smooth noise in [0, 1) with knots `cell` apart, (B, n, n)."""
    return lattice_noise(d, name, e.plate_x, e.plate_y, cell=cell, reach=1.5)


# ------------------------------------------------------------------------------------------------ the healthy eye


def _healthy(d: Draws, e: _Eye) -> list[np.ndarray]:
    """Light from behind the retina and from the disc, without vessels."""
    mottle = 0.6 * _texture(d, "choroid coarse", e, 0.35) + 0.4 * _texture(d, "choroid fine", e, 0.12) - 0.5
    disc, cup, crescent = _disc(d, e)
    fovea = _fovea(d, e)
    pigment = d("pigment", 0.15, 1.0) * (1 + d("tessellation", 0.2, 0.9) * mottle) + 0.55 * fovea + 0.5 * crescent
    reflected = d("reflectance", 0.92, 1.08) * (0.94 + 0.12 * _texture(d, "slow", e, 0.75))
    pallor, druse = d("disc pallor", 0.70, 0.90), _drusen(d, e)
    light = []
    for c in range(3):
        value = _BASE[c] * reflected * exp(-(_MELANIN[c] * pigment + _MACULAR[c] * fovea))
        value = _cover(value, druse, _DRUSE[c])
        value = _cover(value, disc, _DISC[c] * pallor)
        light.append(_cover(value, cup, _CUP[c]))
    return light


def _cover(value, share, colour):
    """Something of a colour of its own in front, covering a share of each pixel."""
    return value + share * (colour - value)


def _disc(d: Draws, e: _Eye) -> tuple[np.ndarray, ...]:
    """Coverage by the optic disc and its cup, and a pigmented crescent beside it in some eyes."""
    r = np.sqrt(sq(e.t) + sq(e.v * d("disc tall", 0.86, 0.98))) / e.disc
    disc = ease((1 - r) * d("disc edge", 2.5, 5) + 0.5)
    cup_r = np.sqrt(sq(e.t - 0.12 * e.disc) + sq(e.v)) / e.disc
    cup = ease((d("cup ratio", 0.25, 0.6) - cup_r) * 4 + 0.5) * d("cup pallor", 0.4, 0.95)
    beside = np.sqrt(sq(e.t - 0.2 * e.disc) + sq(e.v)) / e.disc
    return disc, cup, ease((1.3 - beside) * 6) * d.chance("crescent", 0.25) * (1 - disc)


def _fovea(d: Draws, e: _Eye) -> np.ndarray:
    """Depth of the macula's pigment, deepest in the fovea."""
    r = np.sqrt(sq(e.t - e.fovea_t) + sq(e.v - e.fovea_v))
    wide, deep = ease(1 - r / d("macula", 0.26, 0.40)), ease(1 - r / d("foveola", 0.09, 0.14))
    return d("macula depth", 0.3, 0.6) * wide + d("fovea depth", 0.15, 0.5) * deep


def _drusen(d: Draws, e: _Eye) -> np.ndarray:
    """Coverage by small yellow deposits, in some eyes with or without retinopathy: they are no sign of it."""
    spots = _Spots(d, "druse", 10, 0.42, (0.010, 0.024))
    return 0.6 * np.minimum(sum(spots.each(e, soft=True)), 1) * d.chance("drusen", 0.25)


def _vessels(d: Draws, e: _Eye) -> list[np.ndarray]:
    """Absorbance of arteries and veins: four arcades that bend about the macula, branches, and vessels to the nasal side."""
    depth = {"artery": np.zeros_like(e.t), "vein": np.zeros_like(e.t)}
    n = e.t.shape[1]
    reach = n - n // 3  # rows that may lie above, or below, the disc
    calibre = d("calibre", 0.85, 1.2)
    for kind, side in _ARCADES:
        rows = np.s_[:, :reach] if side == "upper" else np.s_[:, n - reach :]
        v = -e.v[rows] if side == "upper" else e.v[rows]
        width = calibre * (0.0125 if kind == "artery" else 0.0165)
        depth[kind][rows] += _arcade(d, e, f"{kind} {side}", e.t[rows], v, width, 1.1 if kind == "artery" else 0.92)
    artery, vein = (np.minimum(value, 1.3) for value in depth.values())
    return [_ARTERY[c] * artery + _VEIN[c] * vein for c in range(3)]


def _arcade(d: Draws, e: _Eye, name: str, t, v, width, bend: float) -> np.ndarray:
    """One arcade: a parabola t = k v^2 from the disc about the macula, with branches inwards and outwards, and a nasal vessel."""
    k = bend * d(f"{name} arc", 1.3, 2.0)
    wave = d(f"{name} wave", -0.035, 0.035) * _triangle(1.7 * v + d(f"{name} phase", 0, 1)) + k * sq(v)
    off = (t - wave) / np.sqrt(1 + sq(2 * k * v))
    depth = _tube(e, off, width * np.maximum(1 - 0.55 * v, 0.3)) * (v > 0)
    turns, bends = d.many(f"{name} turn", -0.2, 0.2, 6), d.many(f"{name} bend", -0.6, 0.6, 6)
    places, sizes = d.many(f"{name} place", 0, 0.10, 6), d.many(f"{name} size", 0.7, 1.1, 6)
    for i in range(6):
        one = np.s_[:, i, None, None]
        start = 0.10 + 0.12 * i + places[one]
        inwards = i % 2 == 0
        cos, sin = turn((0.30 if inwards else 0.62) + turns[one])
        cos, sin = (cos, -sin) if inwards else (cos, sin)
        along, off = _along(t - k * sq(start), v - start, cos, sin)
        off = off - bends[one] * sq(along)
        length = (0.50 if inwards else 0.80) * sizes[one]
        taper = np.maximum(1 - 0.75 * along / length, 0.2)
        depth += _tube(e, off, 0.6 * width * sizes[one] * taper) * ((along > 0) & (along < length))
    cos, sin = turn(d(f"{name} nasal", 0.22, 0.60))
    along, off = _along(-t, v, cos, sin)
    off = off - d(f"{name} nasal bend", -0.25, 0.25) * sq(along)
    depth += _tube(e, off, 0.75 * width * np.maximum(1 - 0.5 * along, 0.25)) * ((along > 0) & (v > -0.05))
    return depth


def _along(t, v, cos, sin):
    """Distance along and beside a line through the origin."""
    return cos * t + sin * v, cos * v - sin * t


def _triangle(x):
    """A smoothed triangle wave of period 1, -1 .. 1."""
    return 2 * ease(2 * np.abs(x - np.floor(x) - 0.5)) - 1


def _tube(e: _Eye, off, radius) -> np.ndarray:
    """Depth of a tube at distance `off` from its axis, 0 .. 1; widened to a pixel at equal cross-section."""
    drawn = np.maximum(radius, 0.5 * e.pixel)
    return (radius / drawn) * root(1 - sq(off / drawn))


# ------------------------------------------------------------------------------------------------ retinopathy


class _Spots:
    """Some round spots about the fovea: where they lie and how large they are, (B, count) each."""

    def __init__(self, d: Draws, name: str, count: int, reach: float, radii: tuple[float, float]):
        self.t, self.v = d.many(f"{name} t", -reach, reach, count), d.many(f"{name} v", -reach, reach, count)
        share = d.many(f"{name} r", 0, 1, count)
        self.radius = radii[0] + (radii[1] - radii[0]) * share * share  # most are small

    def each(self, e: _Eye, *, soft: bool = False):
        """Coverage by one after the other, 0 .. 1; widened to a pixel at equal area."""
        for k in range(self.radius.shape[1]):
            one = np.s_[:, k, None, None]
            radius = self.radius[one]
            drawn = np.maximum(radius, 0.6 * e.pixel)
            q = (sq(e.t - e.fovea_t - self.t[one]) + sq(e.v - e.fovea_v - self.v[one])) / sq(drawn)
            inside = sq(np.maximum(1 - 0.5 * q, 0)) if soft else np.minimum(1.8 * np.maximum(1 - q, 0), 1)
            yield sq(radius / drawn) * inside


def _shown(spots, how_many) -> np.ndarray:
    """The first few of some spots together."""
    return sum(spot * (k < how_many) for k, spot in enumerate(spots))


def _diseased(d: Draws, e: _Eye, severe: np.ndarray, light: list[np.ndarray], vessels: list[np.ndarray]):
    """Eyes with retinopathy: blood outside the vessels; exudates and cotton-wool spots where it is ``severe`` (B, 1, 1) bool.

    Nothing of it lies on the disc.
    """
    off_disc = ease((np.sqrt(sq(e.t) + sq(e.v)) / e.disc - 1.1) * 3)
    severity = d("severity", 0, 1)
    how_many = where(severe, 5 + 13 * severity, 3 + 5 * severity)
    dots = _shown(_Spots(d, "dot", 18, 0.75, (0.010, 0.022)).each(e), how_many)
    spilt = np.minimum(dots + _blots(d, e, (1 + 7 * severity) * severe), 1.2) * off_disc
    exudate = np.minimum(_exudates(d, e), 0.95) * off_disc * severe
    wool = _shown(_Spots(d, "wool", 4, 0.65, (0.035, 0.065)).each(e, soft=True), d("wool", -2, 4))
    wool = np.minimum(0.8 * wool, 0.8) * off_disc * severe
    colours = []
    for c in range(3):
        value = _cover(light[c], wool, _COTTON[c]) * exp(-(vessels[c] * (1 - 0.6 * wool) + _SPILT[c] * spilt))
        colours.append(_cover(value, exudate, _EXUDATE[c]))
    return colours


def _blots(d: Draws, e: _Eye, how_many) -> np.ndarray:
    """Blot and flame haemorrhages: ragged ellipses, the long ones along the nerve fibres."""
    count = 8
    place = _Spots(d, "blot", count, 0.75, (0.022, 0.055))
    turns, long = d.many("blot turn", -0.8, 0.8, count), d.many("blot long", 1.0, 2.4, count)
    ragged = 1.25 - 0.7 * _texture(d, "blot edge", e, 0.06)
    total = np.zeros_like(e.t)
    for k in range(count):
        one = np.s_[:, k, None, None]
        cos, sin = turn(turns[one])
        along, off = _along(e.t - e.fovea_t - place.t[one], e.v - e.fovea_v - place.v[one], cos, sin)
        q = sq(along / (place.radius[one] * long[one])) + sq(off / place.radius[one])
        total += np.minimum(2.2 * np.maximum(ragged - q, 0), 1) * (k < how_many)
    return total


def _exudates(d: Draws, e: _Eye) -> np.ndarray:
    """Hard exudates: clusters of small sharp spots, in about two of three eyes."""
    spots, centres = _Spots(d, "exudate", 24, 0.15, (0.009, 0.024)), _Spots(d, "cluster", 3, 0.45, (0, 0))
    which = np.arange(24) % 3
    spots.t, spots.v = spots.t + centres.t[:, which], spots.v + centres.v[:, which]
    return _shown(spots.each(e), 24 * d("exudates", -0.5, 1))


# ------------------------------------------------------------------------------------------------ the camera


def _photograph(d: Draws, e: _Eye, colours: list[np.ndarray]) -> list[np.ndarray]:
    """Grey levels, 0 .. 1, of the light that leaves the eye."""
    from_x, from_y = d("light x", -1, 1), d("light y", -1, 1)
    slope = from_x * e.plate_x + from_y * e.plate_y
    light = 1 - d.styled("vignette") * sq(np.minimum(e.radius, 1.1)) + 0.7 * d.styled("off_light") * slope
    light = d.styled("exposure") * np.maximum(light, 0.1) * _dust(d, e)
    # A crescent where the pupil's edge sends light back.
    side = slope / np.sqrt(sq(from_x) + sq(from_y) + 0.01)
    glare = d("glare", 0.15, 0.5) * ease((e.radius - 0.72) * 4) * ease(side * 1.6 - 0.4) * d.styled_chance("glare_rate")
    haze, warm, contrast = d.styled("haze"), d.styled("warm"), d.styled("contrast")
    per_unit = d.styled("dose") * _F((64 / e.t.shape[1]) ** 2)
    inside = ease((1 - e.radius) * 40 + 0.5)
    out = []
    for c, (tint, veil, flare) in enumerate(((1, 0.50, 0.90), (0, 0.52, 0.95), (-1, 0.55, 1.00))):
        value = colours[c] * (light * (1 + tint * warm))
        value = _cover(_cover(value, haze, veil), glare, flare)
        value = counted(d, f"photons {e.t.shape[1]} {c}", np.maximum(value, 0.002), per_unit, least=0)
        value = blurred(value, d.styled("blur"))
        value = np.maximum(0.45 + (np.minimum(value, 1.4) - 0.45) * contrast, 0)
        rolled = value / np.sqrt(np.sqrt(1 + sq(sq(value))))  # towards 1, without clipping
        out.append(0.01 + 0.99 * rolled * inside)
    return out


def _dust(d: Draws, e: _Eye) -> np.ndarray:
    """Share of the light that specks on the lens let through."""
    x, y, r = d.many("dust x", -0.8, 0.8, 3), d.many("dust y", -0.8, 0.8, 3), d.many("dust r", 0.02, 0.06, 3)
    shade = np.zeros_like(e.t)
    for k in range(3):
        one = np.s_[:, k, None, None]
        shade += np.maximum(1 - (sq(e.plate_x - x[one]) + sq(e.plate_y - y[one])) / sq(r[one]), 0)
    return 1 - 0.25 * np.minimum(shade, 1) * d.styled_chance("dust_rate")
