"""A folder of pictures as arrays: what each file is, is asked of the file; what cannot be read rightly is named."""

import stat
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from growconv.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".pbm", ".pgm", ".ppm", ".webp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "GIF", "TIFF")
"""Formats that Pillow may open; its other readers, of which some start programs, are never asked."""

MOST_PIXELS = 100_000_000
"""Larger pictures are refused: a file of a few bytes can ask for any memory."""


def class_names(folder: Path) -> list[str]:
    """Names of the folders inside one that hold pictures, sorted; hidden and empty ones are no classes."""
    if not folder.is_dir():
        return []
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and any(map(_is_picture, entry.iterdir()))
    )


def read_class(folder: Path, root: Path, size: int, channels: int) -> list[np.ndarray]:
    """The pictures of one class, in the order of their names; files of other kinds are counted in a warning.

    Args:
        folder: the class's folder.
        root: the whole set's folder, out of which no link may lead.
        size: height and width to scale to.
        channels: 1 for grey, 3 for colour.

    Returns:
        uint8 arrays (channels, size, size).

    Raises:
        DataError: names the file that cannot be read, or not rightly.
    """
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    left_out = Counter(entry.suffix.lower() or "no suffix" for entry in entries if not _is_picture(entry))
    if left_out:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(left_out.items()))
        warnings.warn(
            f"{folder}: files that are not images are skipped ({kinds}); supported are {', '.join(SUFFIXES)}",
            stacklevel=2,
        )
    return [_read_picture(entry, root, size, channels) for entry in entries if _is_picture(entry)]


def _read_picture(path: Path, root: Path, size: int, channels: int) -> np.ndarray:
    """One picture, turned as its camera says, scaled to a square; what is transparent is shown on white.

    Of several pictures in one file (.gif, .tif) the first is taken.
    """
    try:
        if not path.resolve(strict=True).is_relative_to(root.resolve()):
            raise _refused(path, "This is a link that leads out of the folder of pictures.", path.resolve())
        if not stat.S_ISREG(path.stat().st_mode):
            raise _refused(path, "This has a picture's name, but is no file.")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as opened:
                if opened.width * opened.height > MOST_PIXELS:
                    raise _refused(path, "The picture is too large.", opened.size, f"at most {MOST_PIXELS} pixels")
                picture = _in_eight_bits(path, opened)
                ImageOps.exif_transpose(picture, in_place=True)  # pictures are large: no copy of those that stand
                square = _on_white(picture).convert("L" if channels == 1 else "RGB").resize((size, size))
    except DataError:
        raise
    except Exception as error:  # each of Pillow's readers raises what it pleases for a broken file
        raise _refused(path, "The picture cannot be read.", f"{type(error).__name__}: {error}") from error
    array = np.array(square)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _in_eight_bits(path: Path, picture: Image.Image) -> Image.Image:
    """Grey levels of 16 bits scaled to 8; deeper ones and floats have no range that a file would tell."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        levels = np.asarray(picture, dtype=np.int32)
        scaled = Image.fromarray(np.clip((levels + 128) // 257, 0, 255).astype(np.uint8))
        turn = ExifTags.Base.Orientation
        scaled.info, scaled.getexif()[turn] = picture.info, picture.getexif().get(turn, 1)
        return scaled
    if picture.mode in ("I", "F"):
        depth = "whole numbers of 32 bits" if picture.mode == "I" else "floating-point numbers"
        raise _refused(
            path, f"The picture's levels are {depth}, whose range nobody tells.", picture.mode, "8 or 16 bits"
        )
    return picture


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB") if picture.mode == "P" else picture
    shown = picture.convert("RGBA")
    white = Image.new("RGBA", shown.size, "white")
    return Image.alpha_composite(white, shown).convert("RGB")


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _refused(path: Path, problem: str, got: object = None, expected: object = None) -> DataError:
    return DataError(
        problem, where=str(path), expected=expected, got=got, fix="convert it, or remove it from the folder"
    )


def check_classes(train: Sequence[str], test: Sequence[str], folder: Path) -> None:
    """Refuse a folder whose two halves have no class at all, or whose test has one that the training lacks."""
    if not train or not test:
        raise DataError(
            "There are no images in data.root.",
            where=str(folder / ("test" if train else "train")),
            expected="train/CLASS/*.png and test/CLASS/*.png",
            fix="set data.root to the folder that holds train and test",
        )
    strangers = sorted(set(test) - set(train))
    if strangers:
        raise DataError(
            "the test folder has a class that the training folder lacks",
            where=str(folder / "test"),
            got=", ".join(strangers),
        )
