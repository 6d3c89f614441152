"""A procedural chest-radiograph phantom: synthetic patients whose images are the same bits on every machine.

The physics is that of a plain radiograph. Rays run parallel from front to back, so each organ is described directly by
its projected thickness in cm at every pixel: an ellipsoid projects to ``2 c sqrt(1 - (x/a)^2 - (y/b)^2)``. Thicknesses
times attenuation coefficients add up to a line integral, Beer-Lambert turns it into transmitted intensity, and scatter,
quantum noise, detector blur and a display curve turn intensity into grey levels (dense tissue bright, air dark).

The arithmetic and the random numbers of `medphantom.exact` keep the output reproducible to the last bit.

Coordinates are patient centimetres: x grows towards the image's right (the patient's left), y towards the feet. Arrays
are (B, n, n) for B patients and n pixels a side; a parameter drawn once per patient is (B, 1, 1).
"""

from dataclasses import dataclass

import numpy as np

from medphantom import exact
from medphantom.exact import (
    Draws,
    blurred,
    checked,
    counted,
    ease,
    ellipse,
    exp,
    finished,
    lattice_noise,
    log,
    root,
    sq,
    three_taps,
    turn,
    where,
)

KINDS = ("lobar", "patchy", "diffuse", "round")
CLASSES = ("normal", "pneumonia")
SIZES = (28, 224)

# What a hospital changes: everything after the patient. Pairs are ranges drawn per image, single numbers probabilities
# (`*_rate`). Lengths are in cm, `blur` is the detector's sigma in 1/64 of the field of view, `dose` the quanta a pixel
# of a 64-pixel image gets behind two attenuation lengths, `centre` and `width` shift and stretch the display window.
# fmt: off
STYLES: dict[str, dict] = {
    # A digital room with an anti-scatter grid: clean, sharp, a neutral window.
    "A": {
        "half_field": (13.6, 15.4), "shift_y": (-0.6, 0.6), "collimated_rate": 0.2, "shutter": (0.94, 0.99),
        "marker_rate": 0.5, "marker_right": 0.5, "lead_rate": 0.05, "scatter": (0.08, 0.20), "grid_lines": (0.0, 0.0),
        "heel": (-0.03, 0.03), "dose": (3000, 7000), "blur": (0.2, 0.45), "centre": (-0.08, 0.12),
        "width": (0.90, 1.10), "film": (0.0, 0.0), "fog": (0.0, 0.03), "white": (0.95, 1.0),
    },
    # Film and screen, scanned: a steep S-shaped film curve, an unsharp screen, the marker always on the left.
    "B": {
        "half_field": (13.0, 14.6), "shift_y": (-0.6, 0.6), "collimated_rate": 0.0, "shutter": (0.94, 0.99),
        "marker_rate": 0.9, "marker_right": 0.0, "lead_rate": 0.05, "scatter": (0.15, 0.30), "grid_lines": (0.0, 0.0),
        "heel": (-0.05, 0.05), "dose": (1200, 2500), "blur": (0.7, 1.0), "centre": (0.02, 0.22),
        "width": (0.78, 0.95), "film": (0.3, 0.7), "fog": (0.0, 0.04), "white": (0.86, 0.94),
    },
    # A storage-phosphor room run at low dose: quantum noise, grid lines, heel effect, tight shutters.
    "C": {
        "half_field": (12.4, 13.6), "shift_y": (-1.0, 0.4), "collimated_rate": 0.8, "shutter": (0.88, 0.96),
        "marker_rate": 0.9, "marker_right": 1.0, "lead_rate": 0.1, "scatter": (0.12, 0.25), "grid_lines": (0.06, 0.16),
        "heel": (0.10, 0.25), "dose": (100, 250), "blur": (0.0, 0.25), "centre": (-0.27, -0.07),
        "width": (0.85, 1.05), "film": (0.0, 0.2), "fog": (0.0, 0.03), "white": (0.92, 1.0),
    },
    # A portable unit on the ward: no grid, so heavy scatter and a flat image; far away, leads on the chest.
    "D": {
        "half_field": (14.8, 16.2), "shift_y": (-1.2, 1.2), "collimated_rate": 0.1, "shutter": (0.94, 0.99),
        "marker_rate": 0.2, "marker_right": 0.5, "lead_rate": 0.6, "scatter": (0.30, 0.60), "grid_lines": (0.0, 0.0),
        "heel": (-0.25, -0.08), "dose": (1500, 3000), "blur": (0.3, 0.6), "centre": (-0.32, -0.12),
        "width": (1.00, 1.30), "film": (0.0, 0.0), "fog": (0.05, 0.12), "white": (0.84, 0.94),
    },
}
# fmt: on

_MU_TISSUE, _MU_BONE, _MU_LEAD = 0.19, 0.30, 3.2  # attenuation per cm; bone and lead over the tissue they displace
_MARKERS = {"R": (30, 17, 17, 30, 20, 18, 17), "L": (16, 16, 16, 16, 16, 16, 31)}  # 5 x 7 dots, a row per number

_F = np.float32


@dataclass(frozen=True)
class Phantoms:
    """Rendered patients: `images` (N, H, W) uint8, `lesion` and `lung` (N, H, W) bool, `kind` (N,) int64 into KINDS.

    A label-0 patient has an empty `lesion`; its `kind` is the one it would have shown at label 1.
    """

    images: np.ndarray
    lesion: np.ndarray
    lung: np.ndarray
    kind: np.ndarray


def render(patients, labels, *, seed: int, size: int = 32, style="A") -> Phantoms:
    """Render one image per patient at `size` pixels a side, healthy (label 0) or with pneumonia (label 1).

    `patients` is (N,) integers >= 0; `style` is one letter of STYLES or one letter per image. An image depends on
    (seed, patient, label, size, style) only; the label adds a lesion and changes nothing else of the anatomy.
    """
    patients, labels, styles = checked(patients, labels, size, style, classes=CLASSES, sizes=SIZES, styles=STYLES)
    labels = labels.astype(bool)
    n, blocks = exact.blocks(len(patients), size)
    draws = Draws(seed, patients, styles, STYLES)
    images = np.empty((len(patients), size, size), np.uint8)
    lesion, lung, kind = np.empty_like(images, bool), np.empty_like(images, bool), np.empty(len(patients), np.int64)
    for rows in blocks:
        *drawn, kind[rows] = _render_block(draws.rows(rows), labels[rows], n)
        images[rows], lesion[rows], lung[rows] = (finished(array, size) for array in drawn)
    return Phantoms(images, lesion, lung, kind)


# ---------------------------------------------------------------------------------------- patient and geometry


@dataclass(frozen=True)
class _Frame:
    """Where each pixel lies, in cm."""

    x: np.ndarray  # (B, n, n) patient coordinates: across, from the midline to the patient's left
    y: np.ndarray  # (B, n, n) down
    across: np.ndarray  # (B, n, n) |x|
    right: np.ndarray  # (B, n, n) bool, the patient's right half
    upright_x: np.ndarray  # (B, 1, n) patient coordinates before the patient leans: x and y stay separable
    upright_y: np.ndarray  # (B, n, 1)
    plate_x: np.ndarray  # (B, 1, n) detector coordinates
    plate_y: np.ndarray  # (B, n, 1)
    half_field: np.ndarray  # (B, 1, 1) half the side of the field of view
    pixel: np.ndarray  # (B, 1, 1) side of a pixel

    def at_least(self, radius, pixels: float):
        """A radius widened to some pixels: thinner structures would fall between pixel centres."""
        return np.maximum(radius, pixels * self.pixel)


@dataclass(frozen=True)
class _Habitus:
    """What several organs share; all (B, 1, 1)."""

    depth: np.ndarray  # cm, half the chest's front-to-back thickness
    child: np.ndarray  # 0 adult proportions .. 1 child
    yaw: np.ndarray  # turn about the long axis, about -1.4 .. 1.4
    breath: np.ndarray  # cm by which the diaphragm stands low (inspiration)


@dataclass(frozen=True)
class _Lungs:
    """The lung fields before the central organs are put in front."""

    air: np.ndarray  # (B, n, n) cm of lung along the ray
    centre: np.ndarray  # (B, n, n) cm from the midline to the middle of the lung
    half_width: np.ndarray  # (B, n, n) cm
    apex: np.ndarray  # (B, 1, 1) cm, height of the top
    dome: np.ndarray  # (B, n, n) cm, height of the diaphragm's dome
    half_depth: np.ndarray  # (B, 1, 1) cm


def _frame(d: Draws, n: int) -> _Frame:
    """Pixel centres in detector and patient coordinates: the patient stands off-centre and leans a little."""
    unit = ((np.arange(n) + 0.5) * (2 / n) - 1).astype(_F)
    half_field = d.styled("half_field")
    plate_x, plate_y = unit[None, None, :] * half_field, unit[None, :, None] * half_field
    upright_x = plate_x + d("offset x", -1.7, 1.7)
    upright_y = plate_y + d("offset y", -2.1, 1.9) + d.styled("shift_y")
    cos, sin = turn(d("lean", -0.05, 0.05) + d("lean more", -0.03, 0.03))
    x, y = cos * upright_x + sin * upright_y, cos * upright_y - sin * upright_x
    pixel = half_field * (2 / n)
    return _Frame(x, y, np.abs(x), x < 0, upright_x, upright_y, plate_x, plate_y, half_field, pixel)


def _habitus(d: Draws) -> _Habitus:
    return _Habitus(
        depth=d("depth", 8.3, 11.5),
        child=np.maximum(d("child", -0.6, 1.0), 0),
        yaw=1.4 * d("yaw", -1, 1) * d("yaw scale", 0, 1),
        breath=d("breath", -2.2, 1.2),
    )


def _texture(d: Draws, name: str, f: _Frame, cell: float) -> np.ndarray:
    """Smooth noise in [0, 1): random values on a lattice of `cell` cm fixed to the patient, interpolated. (B, n, n)."""
    return lattice_noise(d, name, f.upright_x, f.upright_y, cell=cell, reach=21.0)  # cm, beyond every field of view


# ------------------------------------------------------------------------------------------- soft-tissue anatomy


def _body(d: Draws, f: _Frame, h: _Habitus) -> np.ndarray:
    """Thickness of trunk, shoulders, neck and chin along the ray, cm. (B, n, n)."""
    width, top = d("body width", 14.6, 16.8), d("body top", 16.2, 17.8)
    trunk = 2 * h.depth * root(1 - sq(sq(f.x / width)) - sq(sq(np.minimum(f.y - 6, 0) / top)))
    side = f.across - d("shoulder x", 12.0, 13.6)
    up = f.y - d("shoulder y", -10.4, -8.6)
    shoulder = d("shoulder depth", 12, 15) * ellipse(side, up, d("shoulder a", 7.8, 9.4), d("shoulder b", 5.0, 6.2))
    # The trapezius slopes from the neck down to the shoulder.
    slope = f.y - d("trapezius y", -15.6, -13.6) - d("trapezius slope", 0.28, 0.55) * (f.across - 5)
    trapezius = 13 * ease(slope * 0.22) * ease((-2 - f.y + 0.25 * (f.across - 10)) * 0.16)
    neck = d("neck depth", 11, 13) * root(1 - sq(sq(f.x / d("neck width", 5.6, 7.0)))) * ease((-6 - f.y) * 0.25)
    chin = 15 * ellipse(f.x, f.y - d("chin y", -24.5, -19.5), 6.3, 5.6)
    limbs = np.maximum(np.maximum(shoulder, trapezius), np.maximum(neck, chin))
    return np.maximum(trunk, limbs)


def _lungs(d: Draws, f: _Frame, h: _Habitus) -> _Lungs:
    """Two lungs, tapering to the apex, cut off below by the domes of the diaphragm."""
    widest = 4.0  # cm: the height at which a lung is widest
    apex = d("lung apex", -13.6, -10.8)
    above, below = np.minimum(f.y - widest, 0), np.maximum(f.y - widest, 0)
    centre = d("lung centre", 6.3, 7.3) + 0.9 * d("lung taper", 0.10, 0.17) * above
    # Turning the patient widens one lung's projection and narrows the other's.
    half_width = np.where(
        f.right, d("lung right", 6.0, 6.9) * (1 + 0.05 * h.yaw), d("lung left", 5.9, 6.8) * (1 - 0.05 * h.yaw)
    )
    half_depth = d("lung depth", 0.70, 0.82) * h.depth
    r2 = sq((f.across - centre) / half_width) + sq(above / (widest - apex)) + sq(below / 17)
    air = 2 * half_depth * root(1 - r2 * r2)
    right_dome = d("dome y", 6.6, 8.2) + h.breath
    dome = np.where(f.right, right_dome, right_dome + d("dome left", 0.3, 1.9))  # the liver lifts the right side
    return _Lungs(np.maximum(air - _diaphragm(d, f, dome, half_depth), 0), centre, half_width, apex, dome, half_depth)


def _diaphragm(d: Draws, f: _Frame, dome: np.ndarray, half_depth: np.ndarray) -> np.ndarray:
    """Abdomen in front of the lung, cm: a half ellipsoid rising to `dome`, everything below its equator."""
    height = d("dome height", 4.6, 7.5)
    equator = dome + height
    side = (f.across - d("dome centre", 5.4, 6.8)) / d("dome width", 7.0, 8.6)
    rising = 2.7 * half_depth * root(1 - sq(side) - sq((f.y - equator) / height))
    return np.where(f.y >= equator, _F(99), rising)  # more than any lung holds


def _heart(d: Draws, f: _Frame, h: _Habitus) -> np.ndarray:
    """Tissue the heart and the aortic arch put in the lung's place, cm. (B, n, n)."""
    enlarged = where(d.chance("cardiomegaly", 0.12), 1.17, 1)
    scale = d("heart size", 0.82, 1.12) * (1 + 0.16 * h.child) * enlarged
    shift = 0.9 * h.yaw
    cos, sin = turn(d("heart axis", 0.22, 0.36))  # the axis points 25 to 40 degrees down to the left
    x = f.x - d("heart x", 1.9, 2.9) - shift
    y = f.y - d("heart y", 3.6, 4.8) - 0.55 * h.breath
    ventricles = d("heart depth", 8, 10) * ellipse(cos * x + sin * y, cos * y - sin * x, 6.3 * scale, 4.5 * scale)
    atrium = 8 * ellipse(f.x - shift + 1.4, f.y - 3.8 - 0.5 * h.breath, 2.9 * scale, 4.6)
    arch_x, arch_y = f.x - shift - d("aorta x", 1.6, 2.4), f.y - d("aorta y", -5.8, -4.4)
    arch = 10 * ellipse(arch_x, arch_y, d("aorta radius", 1.5, 2.3), 1.9) * (1 - 0.6 * h.child)
    return np.maximum(np.maximum(ventricles, atrium), arch)


def _mediastinum(d: Draws, f: _Frame, h: _Habitus) -> np.ndarray:
    """The band of vessels and oesophagus between the lungs, cm; a child's thymus widens its upper half."""
    thymus = 0.9 * h.child * ease((1 - f.y) * 0.12)
    width = d("mediastinum", 2.3, 3.0) + thymus + 0.35 * ease((-7 - f.y) * 0.25)
    return 22 * root(1 - sq((f.x - 0.9 * h.yaw) / width))


def _hilum(d: Draws, f: _Frame) -> tuple[np.ndarray, np.ndarray]:
    """Where the vessels enter the lungs: cm from the midline (B, 1, 1), and height (B, n, n), the left higher."""
    y = d("hilum y", -0.9, 0.3)
    return d("hilum x", 3.3, 4.2), np.where(f.right, y, y - 0.9)


def _hila(d: Draws, f: _Frame) -> np.ndarray:
    """Vessel roots beside the heart, cm; prominent in some patients without pneumonia."""
    x, y = _hilum(d, f)
    size = d("hilum size", 0.6, 1.7) * where(d.chance("hilum prominent", 0.15), 1.6, 1)
    return 2.2 * size * ellipse(f.across - x, f.y - y, 1.9, 2.7)


def _vessels(d: Draws, f: _Frame) -> np.ndarray:
    """Pulmonary vessels, cm: bent tapering tubes that fan out from each hilum, with a daughter branch. (B, n, n)."""
    vessels = np.zeros_like(f.x)
    tubes, n = 7, f.x.shape[2]
    reach = n // 2 + n // 8  # columns of one side: half the image and the most a patient stands off-centre
    hilum_x, hilum_y = _hilum(d, f)
    caliber = 0.42 * d("vessel caliber", 0.7, 1.25)
    for side, columns, outward in (("right", np.s_[:reach], -1), ("left", np.s_[n - reach :], 1)):
        x = outward * f.x[:, :, columns] - 0.9 * hilum_x
        y = f.y[:, :, columns] - hilum_y[:, :, columns]
        turns, bend = d.many(f"vessel turn {side}", -0.11, 0.11, tubes), d.many(f"vessel bend {side}", -1, 1, tubes)
        stretch, fork = d.many(f"vessel length {side}", 0.65, 1.15, tubes), d.many(f"vessel fork {side}", -1, 1, tubes)
        for k in range(tubes):
            fan = (k + 0.5) / tubes * 2 - 1  # -1 up .. 1 down
            one = np.s_[:, k, None, None]
            cos, sin = turn(0.62 * fan + turns[one])
            length = (8.5 if abs(fan) < 0.5 else 10.0) * stretch[one]
            along, off = cos * x + sin * y, cos * y - sin * x
            off = off - 0.028 * bend[one] * along * along
            part = along / length
            radius = np.maximum(caliber * (1 - 0.8 * part), 0.07)
            inside = (part > 0) & (part < 1)
            vessels[:, :, columns] += _tube(f, off, radius) * inside
            off = off - where(fork[one] > 0, 0.35, -0.35) * (along - 0.4 * length)
            vessels[:, :, columns] += _tube(f, off, 0.7 * radius) * (inside & (part > 0.4))
    return vessels


def _tube(f: _Frame, off: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Thickness of a tube at distance `off` from its axis, cm; widened to a pixel at equal cross-section."""
    drawn = f.at_least(radius, 0.45)
    return (2 * radius * radius / drawn) * root(1 - sq(off / drawn))


def _scar(d: Draws, f: _Frame) -> np.ndarray:
    """A linear scar in about one lung in five, with or without pneumonia, cm."""
    x = f.x - d("scar x", 4, 9) * where(d.chance("scar side", 0.5), 1, -1)
    y = f.y - d("scar y", -6, 7)
    cos, sin = turn(d("scar angle", -0.5, 0.5))
    strip = ellipse(cos * x + sin * y, cos * y - sin * x, d("scar length", 1.5, 3.5), f.at_least(_F(0.4), 0.6))
    return d.chance("scar", 0.22) * d("scar depth", 0.5, 1.3) * strip


def _air_outside_lungs(d: Draws, f: _Frame, h: _Habitus, dome: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stomach gas below the left dome, and trachea with main bronchi: cm of air in place of tissue."""
    x = (f.x - d("gas x", 4.5, 7.5)) / d("gas a", 1.6, 3.4)
    y = (f.y - dome - d("gas y", 2.4, 4.0)) / d("gas b", 0.9, 1.8)
    gas = 4 * root(1 - sq(x) - sq(y)) * ((f.x > 0) & d.chance("gas", 0.6))
    fork = -4.2  # cm: the carina
    trachea = 1.8 * root(1 - sq((f.x - 0.72 * h.yaw - 0.15) / d("trachea radius", 0.75, 1.05))) * (f.y < fork)
    bronchi = 1.4 * root(1 - sq((f.y - fork - 0.65 * (f.across - 0.2)) / 0.75))
    return gas, np.maximum(trachea, bronchi * ((f.across < 3.4) & (f.y > fork - 0.2)))


def _breasts(d: Draws, f: _Frame, h: _Habitus) -> np.ndarray:
    """Breast tissue over the lower lungs in some adults, cm: a haze that is no pneumonia."""
    x = (f.across - d("breast x", 6.8, 8.4)) / d("breast a", 4.6, 6.0)
    y = (f.y - d("breast y", 3.0, 6.2)) / d("breast b", 4.2, 5.6)
    return d.chance("breast", 0.40) * (1 - h.child) * d("breast depth", 1.5, 4.5) * root(1 - sq(x) - sq(y))


# -------------------------------------------------------------------------------------------------- skeleton


def _skeleton(d: Draws, f: _Frame, lungs: _Lungs) -> np.ndarray:
    """Bone along the ray, cm. (B, n, n)."""
    pitch, first = d("rib pitch", 2.15, 2.5), d("rib first", -13.4, -12.4)
    bend = d("scoliosis", -0.5, 0.5) + d("scoliosis tilt", -0.015, 0.015) * f.y
    bend = bend + d("scoliosis bow", -1, 1) * sq(f.y * 0.06)
    ribs = _ribs(d, f, lungs, bend, pitch, first)
    return ribs + _spine(d, f, f.x - bend, pitch, first) + _shoulder_girdle(d, f)


def _ribs(d: Draws, f: _Frame, lungs: _Lungs, bend, pitch, first) -> np.ndarray:
    """Ribs, cm. Each is a hoop about the chest, tilted forward and down: behind it runs high, in front low.

    At |x| = cage sin(phi) the back of hoop k lies drop/2 (1 - cos phi) below its joint, the front drop/2 (1 + cos phi).
    """
    above = np.minimum(f.y - 4, 0) / (5 - lungs.apex)
    cage = np.maximum(lungs.centre + lungs.half_width * root(1 - sq(above)) + 0.5, 3.2)
    sin = np.minimum(np.abs(f.x - 1.4 * bend) / cage, 1)
    cos = root(1 - sin * sin)
    half_drop = 0.5 * d("rib drop", 7.5, 10.5)
    run2 = sq(cage * cos) + sq(half_drop * sin) + 1e-3
    # Where the hoop turns towards the ray, the ray runs through more of it.
    oblique = np.sqrt(1 + sq(0.75 * cage * sin) / run2)
    steep = np.maximum(cage * cos / np.sqrt(run2), 0.35)  # distance across a rib from distance along y
    radius = d("rib radius", 0.55, 0.80)
    drawn = f.at_least(radius, 0.6)
    jitter = d.many("rib jitter", -0.22, 0.22, 32)
    row, side = np.arange(len(jitter))[:, None, None], 16 * f.right
    back = half_drop * (1 - cos) - 3 * d("rib rise", -0.6, 0.5) * sin * (1 - sin)
    front = half_drop * (1 + cos)
    bone_end = ease((sin - 0.42) * 5) * 0.75  # towards the sternum ribs turn into cartilage
    bone = np.zeros_like(f.x)
    for drop, last, weight in ((back, 10, np.abs(f.x - bend) > 1.6), (front, 7, bone_end)):
        phase = (f.y - drop - first) / pitch
        k = np.floor(phase + 0.5)
        which = np.minimum(np.maximum(k, 0), 15).astype(np.intp)
        off = ((phase - k) * pitch + jitter[row, which + side]) * steep
        solid = root(1 - sq(off / drawn))
        marrow = root(1 - sq(off / (0.72 * drawn)))  # less dense than the shell around it
        bone += (1.35 * solid - 0.44 * marrow) * ((k >= 0) & (k <= last)) * weight
    return bone * (d("rib depth", 0.65, 1.1) * radius / drawn * oblique) * ((sin < 0.999) & (f.across < cage + 0.2))


def _spine(d: Draws, f: _Frame, x: np.ndarray, pitch, first) -> np.ndarray:
    """Vertebral bodies, thinner at the discs, with spinous processes and pedicles, cm; `x` from the spine's axis."""
    width = d("spine width", 1.6, 2.1)
    phase = (f.y - first) / pitch
    level = phase - np.floor(phase) - 0.5  # -0.5 .. 0.5 from one disc to the next
    y = level * pitch
    disc = ease((2 * np.abs(level) - 0.6) * 4)
    bodies = d("spine depth", 1.3, 2.3) * root(1 - sq(sq(x / width))) * (1 - 0.32 * disc)
    return bodies + 1.1 * ellipse(x, y, 0.42, 0.75) + 0.7 * ellipse(np.abs(x) - 0.68 * width, y + 0.3, 0.38, 0.5)


def _shoulder_girdle(d: Draws, f: _Frame) -> np.ndarray:
    """Clavicles, shoulder blades and the heads of the upper arms, cm."""
    out = f.across - 1.7  # cm from the sternal end of the clavicle
    joint = np.where(f.right, d("clavicle right", -11.0, -9.4), d("clavicle left", -11.0, -9.4))
    axis = joint - 0.5 - d("clavicle slope", 0.02, 0.26) * out + d("clavicle bow", 0.4, 1.4) * sq((out - 5) * 0.2)
    radius = f.at_least(0.62 + 0.22 * ease((3 - out) * 0.4), 0.6)
    clavicles = 1.05 * root(1 - sq((f.y - axis) / radius)) * ((out > 0) & (out < 12.5))
    blade_x = f.across - d("scapula x", 10.4, 13.6) - 0.12 * (f.y + 4)
    q = sq(blade_x / 3.1) + sq((f.y + 4.2) / 6.4)
    rim = ((q > 0.72) & (q < 1)).astype(_F)
    blades = 0.25 * root(1 - q) + 0.34 * rim
    arm_x, arm_y = np.minimum(f.across - d("humerus x", 15.0, 17.5), 0), f.y - d("humerus y", -10.6, -8.6)
    arms = 1.6 * np.sqrt(ellipse(arm_x, arm_y, 2.4, 2.5))
    return clavicles + blades + arms


# --------------------------------------------------------------------------------------------------- lesion


def _kind(d: Draws) -> np.ndarray:
    """Index into KINDS, (B, 1, 1): 34 % lobar, 36 % patchy, 22 % diffuse, 8 % round."""
    draw = d("kind", 0, 1)
    return (draw >= 0.34).astype(np.int64) + (draw >= 0.70) + (draw >= 0.92)


def _consolidation(d: Draws, f: _Frame, kind: np.ndarray) -> np.ndarray:
    """The share of lung air that inflammation has filled with fluid, 0 .. 0.92, as if every patient were ill."""
    lobar, diffuse, single = kind == 0, kind == 2, kind == 3
    density = np.zeros_like(f.x)
    x, y, a, b, present = _foci(d, kind)
    for k in range(x.shape[1]):
        one = np.s_[:, k, None, None]
        q = sq((f.x - x[one]) / a[one]) + sq((f.y - y[one]) / b[one])
        density += sq(np.maximum(1 - 0.5 * q, 0)) * present[one]
    # A mottled, ragged edge: the density is modulated before it is thresholded.
    mottle = 0.55 * _texture(d, "lesion coarse", f, 3.5) + 0.45 * _texture(d, "lesion fine", f, 1.4) - 0.5
    ragged = where(lobar, d("rag lobar", 0.6, 1.6), d("rag focal", 0.8, 2.0))
    ragged = np.where(diffuse, d("rag diffuse", 2.4, 4.0), ragged)
    filled = ease(np.minimum(1.6 * density, 1.4) * (1 + ragged * mottle) - d("lesion threshold", 0.05, 0.25))
    # Lobar pneumonia stops at a fissure: a straight edge through the focus, above or below it.
    cos, sin = turn(d("fissure tilt", -0.18, 0.18))
    beyond = cos * (f.y - y[:, :1, None]) - sin * (f.across - 6.5)
    beyond = beyond * where(d.chance("fissure up", 0.5), 1, -1) + d("fissure gap", 0.3, 2.2)
    filled = np.where(lobar, filled * ease(0.8 * beyond), filled)
    low = np.array([0.30, 0.30, 0.22, 0.40], _F)[kind]
    high = np.array([0.90, 0.90, 0.55, 0.80], _F)[kind]
    severity = d("severity", low, high) * where(d.chance("subtle", 0.12) & ~single, 0.5, 1)
    return np.minimum(filled * severity, 0.92)


def _foci(d: Draws, kind: np.ndarray) -> tuple[np.ndarray, ...]:
    """Five candidate foci: centre x, y and half-axes a, b in cm, and which of them are present; (B, 5) each.

    One for lobar and round pneumonia, three to five for patchy, and five spread over both lungs for diffuse.
    """
    kind = kind[:, :, 0]  # (B, 1), against (B, 5)
    patchy, diffuse = kind == 1, kind == 2
    k = np.arange(5)

    def once(name, low, high):
        return d(name, low, high)[:, :, 0]

    count = np.where(patchy, np.floor(once("foci", 3, 5.99)), where(diffuse, 5, 1))
    # Position in the lung, -1 .. 1 across and down; the others scatter about the first.
    v = d.many("focus down", -0.5, 0.5, 5)
    u = d.many("focus across", -0.5, 0.5, 5)
    first = k == 0
    v0, u0 = once("lesion down", -0.75, 0.85), once("lesion across", -0.32, 0.5)
    spread = np.arange(-2, 3, dtype=_F) * 0.42
    down = np.where(diffuse, spread + 0.3 * v, np.minimum(np.maximum(v0 + 1.1 * v, -0.8), 0.9))
    across = np.where(diffuse, 0.1 + 0.8 * u, np.minimum(np.maximum(u0 + 1.2 * u, -0.6), 0.65))
    down, across = np.where(first, v0, down), np.where(first, u0, across)
    other = (diffuse & (k % 2 == 1)) | (patchy & (once("bilateral", 0, 1) < 0.35) & (k >= 2))
    side = where(once("lesion side", 0, 1) < 0.5, -1, 1) * where(other, -1, 1)
    y = 8.1 * down - 2.5
    x = side * (6.3 + 0.13 * np.minimum(y - 4, 0) + 5 * across)
    size = d.many("focus size", 0, 1, 5)
    a = np.where(diffuse, 3.2 + 2.4 * size, 1.8 + 2.2 * size)
    a = np.where(kind == 0, once("lobar size", 4.2, 8.5), np.where(kind == 3, once("round size", 1.7, 3.0), a))
    return x, y, a, a * d.many("focus aspect", 0.75, 1.35, 5), (k < count).astype(_F)


# ----------------------------------------------------------------------------------- from patient to grey levels


def _render_block(d: Draws, labels: np.ndarray, n: int) -> tuple[np.ndarray, ...]:
    """Grey levels in 0 .. 1 (B, n, n), lesion and lung masks (B, n, n) bool, kind (B,)."""
    f, h, kind = _frame(d, n), _habitus(d), _kind(d)
    attenuation, lesion, lung = _attenuation(d, f, h, kind, labels[:, None, None])
    intensity = exp(-np.minimum(attenuation, 14))  # Beer-Lambert: exp(-line integral); 14 is black enough
    intensity = _uneven_beam(d, f, intensity + d.styled("scatter") * _scatter(intensity))
    grey = _display(d, h, -log(blurred(_quantum_noise(d, intensity), d.styled("blur"))))
    return _collimate(d, f, grey), lesion, lung, kind[:, 0, 0]


def _attenuation(d: Draws, f: _Frame, h: _Habitus, kind: np.ndarray, ill: np.ndarray) -> tuple[np.ndarray, ...]:
    """The line integral of attenuation along each ray (no unit), the lesion mask and the lung mask; (B, n, n) each."""
    body, lungs = _body(d, f, h), _lungs(d, f, h)
    lung = np.maximum(lungs.air - _mediastinum(d, f, h), 0)
    lung = np.maximum(lung - _heart(d, f, h), 0)
    lung = np.maximum(lung - _hila(d, f), 0)
    mask = lung > 0.22 * lungs.half_depth
    # Inflated lung has about a quarter of the density of tissue, more at its base, where it is better perfused.
    grain = 0.55 * _texture(d, "lung coarse", f, 4.4) + 0.45 * _texture(d, "lung fine", f, 1.8) - 0.5
    density = d("lung density", 0.20, 0.30) + 0.008 * (f.y + 2) + d("lung grain", 0.05, 0.13) * grain
    filled = _consolidation(d, f, kind) * ill
    airy = (1 - density) * (1 - filled)
    strands = np.minimum(_vessels(d, f), 0.6 * lung) + np.minimum(_scar(d, f), 0.5 * lung)
    gas, trachea = _air_outside_lungs(d, f, h, lungs.dome)
    tissue = body - (lung - strands) * airy - np.minimum(gas, 0.6 * body) - np.minimum(trachea, 0.5 * body)
    tissue = np.maximum(tissue + _breasts(d, f, h), 0)
    bone = _skeleton(d, f, lungs)
    total = (_MU_TISSUE * tissue + _MU_BONE * bone) * (body > 0) + _leads(d, f) + _MU_LEAD * _marker(d, f)
    opacity = _MU_TISSUE * filled * (1 - density) * lung  # the lesion's own line integral
    peak = opacity.max(axis=(1, 2), keepdims=True)
    return total, opacity > np.maximum(0.35 * peak, 0.02), mask


def _leads(d: Draws, f: _Frame) -> np.ndarray:
    """Line integral of a monitoring wire across the chest and its electrode."""
    wire = f.at_least(_F(0.18), 0.5)
    path = d("wire y", -8, 8) + d("wire slope", -0.5, 0.5) * f.x + d("wire bow", -0.02, 0.02) * f.x * f.x
    wires = 0.9 * root(1 - sq((f.y - path) / wire)) * (0.18 / wire)
    electrode = 1.3 * ellipse(f.x - d("electrode x", -10, 10), f.y - d("electrode y", -9, 9), 0.7, 0.7)
    return (wires + electrode) * d.styled_chance("lead_rate")


def _marker(d: Draws, f: _Frame) -> np.ndarray:
    """The lead letter, R or L, that names the side, in an upper corner of the plate: 1 on its dots."""
    dot = d("marker size", 0.46, 0.62)
    right = d.styled_chance("marker_right")
    x0 = np.where(right, -0.94 * f.half_field, 0.94 * f.half_field - 5 * dot)
    y0 = d("marker y", 0, 1.5) - 0.92 * f.half_field
    column, row = np.floor((f.plate_x - x0) / dot), np.floor((f.plate_y - y0) / dot)
    inside = (column >= 0) & (column < 5) & (row >= 0) & (row < 7)
    column = np.minimum(np.maximum(column, 0), 4).astype(np.intp)
    row = np.minimum(np.maximum(row, 0), 6).astype(np.intp)
    letters = np.array([_MARKERS["L"], _MARKERS["R"]])
    dots = (letters[right.astype(np.intp), row] >> (4 - column)) & 1
    return (inside & (dots == 1) & d.styled_chance("marker_rate")).astype(_F)


def _scatter(intensity: np.ndarray) -> np.ndarray:
    """Scattered photons: the primary beam spread so wide that eight cells a side describe it. (B, n, n)."""
    n, cells = intensity.shape[1], 8
    edges = np.arange(cells) * n // cells
    counts = np.diff(np.append(edges, n)).astype(_F)
    # Sums of integers are exact in any order, sums of floats are not.
    quanta = (intensity * 65536).astype(np.int32)
    total = np.add.reduceat(np.add.reduceat(quanta, edges, axis=1), edges, axis=2)
    mean = total.astype(_F) * _F(1 / 65536) / (counts[:, None] * counts)
    mean = np.minimum(mean, 0.25)  # the open beam beside the patient meets nothing to scatter at
    mean = three_taps(three_taps(mean, 1, 1, 0.25), 2, 1, 0.25)
    t = np.minimum(np.maximum((np.arange(n, dtype=_F) + 0.5) * _F(cells / n) - 0.5, 0), cells - 1)
    low = np.minimum(np.floor(t), cells - 2).astype(np.intp)
    part = t - low.astype(_F)
    rows = mean[:, low] + (mean[:, low + 1] - mean[:, low]) * part[:, None]
    return rows[:, :, low] + (rows[:, :, low + 1] - rows[:, :, low]) * part


def _uneven_beam(d: Draws, f: _Frame, intensity: np.ndarray) -> np.ndarray:
    """The heel effect, a beam weaker towards one end, and the lines of an anti-scatter grid, aliased to wide bands."""
    heel = 1 + d.styled("heel") * f.plate_y / f.half_field
    lines = f.plate_x / d("grid period", 1.6, 2.6)
    wave = np.abs(2 * (lines - np.floor(lines)) - 1)  # a triangle wave, 0 .. 1
    return intensity * (heel * (1 - d.styled("grid_lines") * wave))


def _quantum_noise(d: Draws, intensity: np.ndarray) -> np.ndarray:
    """Counting N quanta has a standard deviation of sqrt(N), so a low dose is grainy. (B, n, n), never zero."""
    n = intensity.shape[1]
    per_unit = d.styled("dose") * _F(7.389 * (64 / n) ** 2)  # e^2: the dose is quoted behind two attenuation lengths
    return counted(d, f"quanta {n}", intensity, per_unit, least=0.3)


def _display(d: Draws, h: _Habitus, density: np.ndarray) -> np.ndarray:
    """Grey level, 0 .. 1, of an optical density: a window set from the patient's thickness, ends rolled off.

    `film` mixes in the S-shaped curve of film, steep in the middle and flat at its toe and shoulder.
    """
    middle = _MU_TISSUE * 1.06 * h.depth + 1.2 * d.styled("centre")
    z = (density - middle) / (2.45 * d.styled("width"))
    grey = 0.5 + 0.5 * z / np.sqrt(0.55 + z * z)
    grey = grey + d.styled("film") * (ease(grey) - grey)
    fog = d.styled("fog")
    return fog + (d.styled("white") - fog) * grey


def _collimate(d: Draws, f: _Frame, grey: np.ndarray) -> np.ndarray:
    """Shutters: in some images the borders got no beam and are shown black."""
    across, down = np.abs(f.plate_x) / f.half_field, np.abs(f.plate_y) / f.half_field
    border = (across > d.styled("shutter")) | (down > d("shutter down", 0.92, 1.0))
    return np.where(d.styled_chance("collimated_rate") & border, _F(0.02), grey)
