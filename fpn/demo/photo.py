"""Photos in: any file that Pillow reads, upright, in RGB, at the size a detector would see it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fpn.preprocessing import IMAGENET, Preprocessing

DEFAULT_PHOTO = Path(__file__).parent / "photos" / "astronaut.jpg"

MAX_PIXELS = 200_000_000  # the largest phone cameras; decoded, about 0.8 GB

# Detectors' usual test size (Ren et al., Faster R-CNN, 2015, as Detectron and torchvision run it).
SHORTER_SIDE = 800
LONGER_SIDE = 1333
MAX_ENLARGEMENT = 2.0  # beyond it there is nothing to see but blur

_pillow = threading.Lock()


class PhotoError(ValueError):
    """The photo cannot be read."""


@dataclass(frozen=True)
class Photo:
    """A photo as the model sees it.

    Attributes:
        name: the file's name.
        size: (width, height) of the upright original, pixels.
        image: the upright RGB copy for the model, resized by `model_size`.
    """

    name: str
    size: tuple[int, int]
    image: Image.Image

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the model's copy per pixel of the original, (x, y). The two differ by rounding alone."""
        return self.image.width / self.size[0], self.image.height / self.size[1]


def read_photo(path: str | Path) -> Photo:
    """Reads a photo: the first frame, turned upright as its EXIF orientation says.

    Palettes and CMYK become RGB, transparency lies on white, 16-bit grey keeps its upper eight bits. Grey that Pillow
    holds in 32 bits, where files agree on no white, is stretched from its least to its greatest finite value.

    Raises:
        PhotoError: no file there, not an image, damaged, or above `MAX_PIXELS` pixels. The message is one sentence.
    """
    path = Path(path)
    try:
        with pixel_limit(MAX_PIXELS), Image.open(path) as image:
            return decode(image, path.name)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{MAX_PIXELS // 1_000_000} million"
        raise PhotoError(f"{path} has more than {limit} pixels; make a smaller copy first") from error
    except UnidentifiedImageError as error:
        raise PhotoError(f"{path} is not an image that Pillow can read") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise PhotoError(f"cannot read {path}: {reason}") from error


@contextmanager
def pixel_limit(pixels: int) -> Iterator[None]:
    """Pillow's guard against decompression bombs at `pixels` instead of its default of 89 million.

    It is a global, and so are the filters of warnings: one thread at a time.
    """
    with _pillow:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = pixels
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of odd metadata, which a photo may have
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def decode(image: Image.Image, name: str) -> Photo:
    """The `Photo` of an image that Pillow has opened, not yet loaded."""
    stored = image.size
    width, height = model_size(stored)
    # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size; twice the target leaves the resizing its antialiasing.
    image.draft(None, (2 * width, 2 * height))
    drafted = image.size != stored
    sideways = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    upright = to_rgb(turn_upright(image))
    size = upright.size
    if drafted:
        size = stored[::-1] if sideways else stored
    return Photo(name, size, upright.resize(model_size(size), Image.Resampling.BILINEAR, reducing_gap=3.0))


def turn_upright(image: Image.Image) -> Image.Image:
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image  # exif_transpose would copy it
    return ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes as 8-bit RGB, as `read_photo` says."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(stretch(np.asarray(image)))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def stretch(grey: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey of any range, (H, W), as uint8. What is not finite becomes black; a flat image, too."""
    values: NDArray[np.float64] = grey.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(grey.shape, np.uint8)
    low, high = values[finite].min(), values[finite].max()
    unit: NDArray[np.float64] = (np.where(finite, values, low) - low) / ((high - low) or 1.0)
    return np.rint(255 * unit).astype(np.uint8)


def model_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in which the model sees a photo of `size`.

    The shorter side is 800 pixels unless the longer would then exceed 1333, or the photo be enlarged more than twice.
    """
    scale = min(SHORTER_SIDE / min(size), LONGER_SIDE / max(size), MAX_ENLARGEMENT)
    width, height = (max(1, round(side * scale)) for side in size)
    return width, height


def to_tensor(image: Image.Image, preprocessing: Preprocessing = IMAGENET) -> Tensor:
    """A model's input of an RGB image: float32 Tensor[1, 3, H, W]."""
    rgb = torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)
    return preprocessing(rgb[None]).contiguous()
