"""One image file (PNG, JPEG, DICOM) as a small square array: what ``folder`` makes a cohort of."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsec.core.errors import InputError

__all__ = []  # `folder` is what users call

PILLOW = (".png", ".jpg", ".jpeg")
DICOM = (".dcm", ".dicom")
PIXELS = 2**26  # of an image, more than any radiograph's: what is larger is refused before it is decoded
BYTES = 2**29  # of a file
DARK = (
    "all pixels are 0 or 1 of 255, nearly black: masks, or images that were divided by 255 and then cast to integers?"
)
_LUMA = np.array([0.299, 0.587, 0.114])  # grey of a colour, ITU-R BT.601


@dataclass(frozen=True)
class Picture:
    """A file's central square at the size asked for.

    ``pixels`` (C, S, S), C = 1 or 3: uint8, or float64 in the file's own units where ``top``, its highest value, is
    not None: a 16-bit PNG does not say how many of its bits are used, only all of them together do. ``shape``
    (height, width) of the file; ``notes`` on what was done to it; ``patient`` the PatientID of a DICOM file or "".
    """

    pixels: np.ndarray
    top: int | None
    shape: tuple[int, int]
    notes: tuple[str, ...]
    patient: str


def is_image(file: Path) -> bool:
    """Whether it is to be read: PNG and JPEG by the suffix, DICOM as in `is_dicom`.

    Raises:
        InputError: the file may not be opened.
    """
    try:
        return file.suffix.lower() in PILLOW or is_dicom(file)
    except OSError as error:
        raise InputError(f"{file} cannot be opened ({error.strerror}); correct its permissions, or move it") from None


def is_dicom(file: Path) -> bool:
    """By its suffix, or, of a file with another one or none (``IM0001``, ``1.2.840.1``), by its first bytes."""
    suffix = file.suffix.lower()
    if suffix in DICOM or suffix in PILLOW:
        return suffix in DICOM
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _printable(text: str) -> str:
    """A text that may repeat what a damaged file holds, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def read(file: Path, size: int, where: str) -> Picture:
    """``file``'s central square, resampled to ``size`` pixels a side: area averages, bilinear if it is smaller.

    Raises:
        InputError: begins with ``where``; the file cannot be read, is too large (`PIXELS`, `BYTES`), has several frames, or
            a header that contradicts itself or names pixels of an unknown kind.
    """
    try:
        with warnings.catch_warnings(record=True) as remarks:  # many a DICOM header breaks a rule without harm
            warnings.simplefilter("always")
            if file.stat().st_size > BYTES:
                raise _RefusedError(f"is larger than {BYTES >> 20} MiB; make it smaller, or take it out of the folder")
            values, white, notes, patient = (_dicom if is_dicom(file) else _pillow)(file)
            if not np.isfinite(values).all():
                raise _RefusedError("has values that are no numbers; correct its header or save it anew")
            pixels = _square(values, size)
    except _RefusedError as refused:
        raise InputError(f"{where} {_printable(str(refused))}") from None
    except Exception as error:  # the decoders meet damaged files with almost anything
        what = (str(error).splitlines() or [""])[0][:160]
        why = _printable(f"{type(error).__name__}: {what}".rstrip(": "))
        raise InputError(f"{where} cannot be read ({why}); replace it, or take it out of the folder") from None
    if remarks:
        notes.append("their reader warned about the header")
    if max(values.shape[:2]) != min(values.shape[:2]):
        notes.append("not square: only the central square is kept")
    if min(values.shape[:2]) < size:
        notes.append(f"smaller than {size} px: enlarged")
    top = None if white else int(values.max())
    pixels = to_uint8(pixels, white) if white else pixels
    return Picture(pixels, top, values.shape[:2], tuple(notes), patient)


def to_uint8(pixels: np.ndarray, white: float) -> np.ndarray:
    """Values from 0 to ``white`` as 0 to 255, rounded; what lies outside is clipped."""
    return np.rint(np.clip(pixels * 255 / white, 0, 255)).astype(np.uint8)


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """(C, S, S) uint8 with 1 channel (luma of the colours) or 3 (equal ones of a grey image)."""
    if len(pixels) == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=0)
    return np.rint(np.tensordot(_LUMA, pixels, axes=1)).astype(np.uint8)[None]


class _RefusedError(Exception):
    """Why a file that can be read is not used; the message continues "<file> …"."""


def _check_pixels(width: int, height: int) -> None:
    if height * width > PIXELS:
        raise _RefusedError(f"has {width} × {height} pixels, more than {PIXELS >> 20} million; save it smaller")


def _square(values: np.ndarray, size: int) -> np.ndarray:
    """(C, size, size) float64 of the central square of (H, W) or (H, W, 3) values."""
    from PIL import Image

    height, width = values.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = np.atleast_3d(values[top : top + side, left : left + side])
    planes = [np.ascontiguousarray(cut[..., c]) for c in range(cut.shape[2])]
    if side >= size:
        part = _overlap(side, size)
        return np.stack([part @ plane.astype(np.float64) @ part.T / side**2 for plane in planes])
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in planes]
    how = Image.Resampling.BILINEAR
    return np.stack([np.asarray(plane.resize((size, size), how)) for plane in planes]).astype(np.float64)


def _overlap(n: int, size: int) -> np.ndarray:
    """(size, n) how much of each of n pixels lies in each of ``size`` equal parts of a side; a pixel is ``size`` long.

    Whole numbers, so that means of whole grey levels are exact. (Pillow's BOX gives every pixel that a part touches by more
    than half the same weight: up to 5 grey levels off from 64 to 28 pixels.)
    """
    part, pixel = np.arange(size)[:, None], np.arange(n)
    ends = np.minimum((part + 1) * n, (pixel + 1) * size) - np.maximum(part * n, pixel * size)
    return np.maximum(ends, 0).astype(np.float64)


# --------------------------------------------------------------------------------------------------------- PNG, JPEG


def _pillow(file: Path) -> tuple[np.ndarray, float | None, list[str], str]:
    """Values (H, W) or (H, W, 3), the value of white (None: 16 bits, see `Picture`), notes, and no patient."""
    from PIL import Image, ImageOps

    notes = []
    with Image.open(file, formats=("PNG", "JPEG")) as opened:
        if opened.format == "PNG" and getattr(opened, "n_frames", 1) > 1:
            raise _RefusedError(f"has {opened.n_frames} frames; save the one that is meant as an image of its own")
        _check_pixels(*opened.size)
        if ";16" in str(opened.tile) and opened.mode in ("RGB", "RGBA", "LA"):
            notes.append("colour or transparency at 16 bits: only the upper 8 are read")
        if opened.getexif().get(0x0112, 1) != 1:
            notes.append("turned as their EXIF orientation says")
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):
        return np.asarray(image).astype(np.float32), None, notes, ""
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("P", "PA"):
        notes.append("colours of a palette: converted")
        image = image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
        pixels = np.asarray(image)
        if (pixels[..., :3] == pixels[..., :1]).all():
            image = image.convert("LA" if image.mode == "RGBA" else "L")
    elif image.mode in ("CMYK", "YCbCr"):
        notes.append(f"{image.mode} colours: converted")
        image = image.convert("RGB")
    elif image.mode in ("L", "RGB") and "transparency" in image.info:  # a colour that stands for it
        image = image.convert({"L": "LA", "RGB": "RGBA"}[image.mode])
    if image.mode in ("LA", "RGBA"):
        notes.append("transparency removed: put on black")
        pixels = np.asarray(image).astype(np.float32)
        values = pixels[..., :-1] * pixels[..., -1:] / 255
        return values[..., 0] if image.mode == "LA" else values, 255, notes, ""
    if image.mode not in ("L", "RGB"):
        raise _RefusedError(f"has pixels of the kind {image.mode}; save it as 8-bit grey or RGB")
    return np.asarray(image).astype(np.float32), 255, notes, ""


# ------------------------------------------------------------------------------------------------------------- DICOM


def _dicom(file: Path) -> tuple[np.ndarray, float | None, list[str], str]:
    """Values (H, W) or (H, W, 3) in [0, 1] as a viewer shows them, 1 for white, notes, and the PatientID."""
    import pydicom
    from pydicom.filereader import read_file_meta_info
    from pydicom.pixels import apply_color_lut, pixel_array
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    if read_file_meta_info(file).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:  # of no known size
        raise _RefusedError("is deflated as a whole, which is not read here; decompress it first")
    header = pydicom.dcmread(file)
    patient = str(header.get("PatientID") or "").strip()
    if "PixelData" not in header:
        raise _RefusedError("is DICOM without an image; take it out of the folder")
    frames = int(header.get("NumberOfFrames") or 1)
    if frames > 1:
        raise _RefusedError(f"has {frames} frames; save the one that is meant as a file of its own")
    _check_pixels(header.Columns, header.Rows)
    if odd := _contradiction(header):
        raise _RefusedError(f"has {odd}: which picture is meant is not known; correct the header, or export it as PNG")
    try:
        stored = pixel_array(header)  # decompressed; YBR is RGB from here on
    except (RuntimeError, NotImplementedError):  # no decoder for this compression
        name = getattr(header.file_meta.get("TransferSyntaxUID"), "name", "unknown")
        raise _RefusedError(f"is compressed in a way that is not read here ({name}); decompress it first") from None
    kind = header.PhotometricInterpretation
    if kind in ("MONOCHROME1", "MONOCHROME2"):
        shown, notes = _grey(header, stored)
        return (1 - shown if kind == "MONOCHROME1" else shown), 1, notes, patient
    if kind == "PALETTE COLOR":
        colours = apply_color_lut(stored, header)
        return colours / np.iinfo(colours.dtype).max, 1, ["colours of a palette: converted"], patient
    return stored / (2.0**header.BitsStored - 1), 1, [], patient


SAMPLES = {"MONOCHROME1": 1, "MONOCHROME2": 1, "PALETTE COLOR": 1, "RGB": 3}
SAMPLES |= dict.fromkeys(("YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"), 3)  # read as RGB


def _contradiction(header) -> str:
    """What in a header speaks against itself or is not read here; empty if nothing does."""
    kind, allocated, stored = header.PhotometricInterpretation, header.BitsAllocated, header.BitsStored
    samples, slopes = header.SamplesPerPixel, [key in header for key in ("RescaleSlope", "RescaleIntercept")]
    if kind not in SAMPLES:
        return f"pixels of the kind {kind}"
    if samples != SAMPLES[kind]:
        return f"SamplesPerPixel {samples} with PhotometricInterpretation {kind}"
    if allocated not in (1, 8, 16, 32) or not 1 <= stored <= allocated:
        return f"BitsStored {stored} of BitsAllocated {allocated}"
    if header.HighBit != stored - 1:
        return f"HighBit {header.HighBit} with BitsStored {stored} (only {stored - 1} is in use today)"
    if header.PixelRepresentation not in (0, 1) or (
        header.PixelRepresentation and kind not in ("MONOCHROME1", "MONOCHROME2")
    ):
        return f"PixelRepresentation {header.PixelRepresentation} with PhotometricInterpretation {kind}"
    if kind.startswith("YBR") and stored != 8:
        return f"BitsStored {stored} with PhotometricInterpretation {kind}"
    if any(slopes) and (not all(slopes) or not header.RescaleSlope):
        return "a rescaling without a slope, or with one of 0"
    if kind == "MONOCHROME2" and header.get("PresentationLUTShape") == "INVERSE":
        return "PresentationLUTShape INVERSE with PhotometricInterpretation MONOCHROME2"
    return ""


def _grey(header, stored: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Stored values through the modality and the VOI transformation to [0, 1], black to white (DICOM PS3.3 C.11)."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = np.asarray(apply_modality_lut(stored, header), np.float64)
    if header.get("VOILUTSequence"):
        bits = header.VOILUTSequence[0].LUTDescriptor[2]
        return apply_voi(np.rint(values).astype(np.int64), header) / (2.0**bits - 1), []
    if all(key in header and header[key].VM for key in ("WindowCenter", "WindowWidth")):
        return _window(header, values), []
    if header.BitsStored <= 8 and not header.PixelRepresentation and np.array_equal(values, stored):
        return values / (2.0**header.BitsStored - 1), []  # eight bits are grey levels, not measured values
    padding = [header[key].value for key in ("PixelPaddingValue", "PixelPaddingRangeLimit") if key in header]
    used = values[(stored < min(padding)) | (stored > max(padding))] if padding else values
    used = used if used.size else values
    low, high = used.min(), used.max()
    note = "DICOM without a window: stretched from its darkest to its brightest value"
    return np.clip((values - low) / max(high - low, 1e-12), 0, 1), [note]


def _window(header, values: np.ndarray) -> np.ndarray:
    """Values, already rescaled, through the header's first window, in [0, 1] (DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    from pydicom import Dataset
    from pydicom.pixels import apply_windowing

    plain = Dataset()  # without the rescaling, and with one bit: its black is 0 and its white 1
    plain.PhotometricInterpretation, plain.PixelRepresentation, plain.BitsStored = "MONOCHROME2", 0, 1
    plain.WindowCenter, plain.WindowWidth = header.WindowCenter, header.WindowWidth
    plain.VOILUTFunction = header.get("VOILUTFunction") or "LINEAR"
    try:
        with np.errstate(over="ignore"):  # of a sigmoid far below its centre: 0
            return apply_windowing(values, plain)
    except ValueError as error:
        raise _RefusedError(f"has an impossible window ({error})") from None
