"""Scenes to detect digits in: real handwriting pasted into crops of real photos, all from scikit-learn."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

Split = Literal["train", "test"]

CLASSES = ("background", *"0123456789")  # a label is an index here: 1 + the digit
TRAIN_SHARE = 0.75  # of the digits, in the data set's order, and of each photo's width, from the left; the rest tests

DIGITS_PER_SCENE = (5, 10)
DIGIT_SIZE = (18, 40)  # pixels of the scene that the 8×8 pixels of a digit become, before its margins are cut
MARGIN = 2  # pixels between the boxes of two digits, at least
ATTEMPTS = 20  # to find a free place for a digit; without one the scene has a digit less
INK = 0.25  # opacity from which a pixel belongs to the box


class Scenes:
    """Scene `index` is a function of the split, the seed and the index; there is no end of them.

    No digit and no part of a photo is in both splits.

    Args:
        split: "train" or "test".
        size: height and width of a scene in pixels, 40 to 160: a digit has to fit in it, and it in the part of a photo.
        seed: another seed, other scenes.

    Raises:
        ValueError: `split` or `size` is none of these.
    """

    def __init__(self, split: Split, size: int = 128, seed: int = 0) -> None:
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test"; got {split!r}')
        digits, photos = handwriting(split), backgrounds(split)
        most = min(min(photo.shape[:2]) for photo in photos)
        if not DIGIT_SIZE[1] <= size <= most:
            raise ValueError(f"size must be {DIGIT_SIZE[1]} to {most} pixels; got {size}")
        self.split, self.size, self.seed = split, size, seed
        self.digits, self.photos = digits, photos

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The image, Tensor[3, size, size] in 0 … 1, and torchvision's target: boxes (x1, y1, x2, y2), labels."""
        rng = np.random.default_rng((self.seed, self.split == "test", index))
        image = self.background(rng)
        boxes, labels = torch.empty(0, 4), []
        images, numbers = self.digits
        for _ in range(rng.integers(*DIGITS_PER_SCENE, endpoint=True)):
            which = rng.integers(len(images))
            glyph = enlarged(images[which], int(rng.integers(*DIGIT_SIZE, endpoint=True)))
            box = free_place(glyph.shape, boxes, self.size, rng)
            if box is not None:
                write(glyph, image, box, rng)
                boxes = torch.cat([boxes, box[None]])
                labels.append(1 + int(numbers[which]))
        return image, {"boxes": boxes, "labels": torch.tensor(labels)}

    def background(self, rng: np.random.Generator) -> Tensor:
        photo = self.photos[rng.integers(len(self.photos))]
        y, x = (rng.integers(side - self.size, endpoint=True) for side in photo.shape[:2])
        crop = torch.from_numpy(photo[y : y + self.size, x : x + self.size].copy())
        return crop.permute(2, 0, 1) / 255


@cache
def handwriting(split: Split) -> tuple[Tensor, NDArray[Any]]:
    """The split's digits, Tensor[N, 8, 8] in 0 … 1, and which they are."""
    digits = load_digits()
    cut = round(TRAIN_SHARE * len(digits.target))
    part = slice(cut) if split == "train" else slice(cut, None)
    return torch.from_numpy(digits.images[part] / 16).float(), digits.target[part]


@cache
def backgrounds(split: Split) -> list[NDArray[Any]]:
    """The split's part of each photo, (height, width, 3), uint8."""
    photos = load_sample_images().images
    cuts = [round(TRAIN_SHARE * photo.shape[1]) for photo in photos]
    return [p[:, :cut] if split == "train" else p[:, cut:] for p, cut in zip(photos, cuts, strict=True)]


def enlarged(digit: Tensor, size: int) -> Tensor:
    """Opacity of the digit's pixels at that size, without the margins."""
    glyph = F.interpolate(digit[None, None], (size, size), mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)
    rows, columns = ((glyph > INK).any(dim).nonzero() for dim in (1, 0))
    return glyph[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def free_place(shape: torch.Size, boxes: Tensor, size: int, rng: np.random.Generator) -> Tensor | None:
    """A box of that shape in the scene, clear of the others; None where no attempt finds one."""
    height, width = shape
    for _ in range(ATTEMPTS):
        x, y = rng.integers(size - width, endpoint=True), rng.integers(size - height, endpoint=True)
        box = torch.tensor([x, y, x + width, y + height], dtype=torch.float32)
        wide = box + torch.tensor([-MARGIN, -MARGIN, MARGIN, MARGIN])
        if not box_iou(wide[None], boxes).any():
            return box
    return None


def write(glyph: Tensor, image: Tensor, box: Tensor, rng: np.random.Generator) -> None:
    """Light ink on a dark part of the image, dark ink on a light one, in place."""
    x1, y1, x2, y2 = box.int().tolist()
    paper = image[:, y1:y2, x1:x2]
    darkest = 0.0 if paper.mean() > 0.5 else 0.7
    ink = torch.from_numpy(rng.uniform(darkest, darkest + 0.3, (3, 1, 1))).float()
    paper.lerp_(ink, glyph.expand_as(paper))
