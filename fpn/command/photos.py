"""What the subcommands that take a photo share: the photo, its boxes, and the model's pass over it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import fpn
from fpn.command.errors import CommandError
from fpn.command.options import add_model_arguments, by, check_device, load_model, name_of, print_report

if TYPE_CHECKING:  # these need Pillow, whose absence `read_photo` reports
    from fpn.demo.photo import Photo
    from fpn.demo.run import Box, Result

FEATURES = "features.npz"

# In the package's photo: the astronaut, her head, the shuttle, the helmet, the mission patch, the name tag.
DEFAULT_PHOTO_BOXES: tuple[Box, ...] = (
    (18, 14, 366, 512),
    (152, 14, 302, 188),
    (354, 0, 473, 291),
    (277, 344, 512, 512),
    (133, 345, 210, 424),
    (278, 338, 330, 378),
)

ABOUT_FEATURES = """\
  features.npz  p2, p3, p4, p5, or the levels there are, (1, 256, h, w); boxes (K, 4) in pixels of
                the photo; model_boxes (K, 4) in pixels of the model's input; levels (K,), the k
                of the level Pk that a box is pooled from; rois (K, 256, 7, 7), RoI max pooled.
                55 to 90 MB for most photos: float32 numbers, uncompressed."""

ABOUT_RUNS = """\
The photo is turned upright (EXIF) and resized as detectors do: shorter side 800, longer side at
most 1333, enlarged at most twice. A box of w by h pixels of that input is pooled from level
k = floor(4 + log2(sqrt(w h) / 224)), or the nearest there is (Lin et al. 2017, eq. 1).

A checkpoint (--weights PATH) of torchvision, detectron2, mmdetection, kuangliu/pytorch-fpn or
this package says itself what model it is, and --model is not used.

Random weights are the same at every run (seed 0). Their batch norm takes its statistics from
the photo: without statistics activations grow from block to block, and the top of the pyramid
drowns the fine levels. Nothing is downloaded unless --weights names ImageNet weights."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photo", nargs="?", metavar="PHOTO", help="an image file (default: a photo in the package)")
    add_model_arguments(parser)
    parser.add_argument(
        "--boxes",
        nargs="+",
        action="extend",
        type=parse_box,
        metavar="x1,y1,x2,y2",
        help="in pixels of the upright photo (default: six boxes of the package's photo; of another photo all of it "
        "and its central 1/3, 1/6 and 1/12)",
    )
    parser.add_argument(
        "--out", type=Path, default="fpn-demo", metavar="DIR", help="folder for what is written (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: %(default)s)")


def parse_box(text: str) -> Box:
    """The box of "x1,y1,x2,y2"."""
    text = text.strip()
    try:
        x1, y1, x2, y2 = (float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a box x1,y1,x2,y2") from None
    if not (math.isfinite(x1 + y1 + x2 + y2) and x1 < x2 and y1 < y2):
        raise argparse.ArgumentTypeError(f"{text!r} is not a box: x1 < x2 and y1 < y2 are needed")
    return x1, y1, x2, y2


def nested_boxes(size: tuple[int, int]) -> list[Box]:
    """All of a photo and its central 1/3, 1/6 and 1/12: in inputs of the usual size, one box for each level."""
    width, height = size
    insets = [(1 - side) / 2 for side in (1, 1 / 3, 1 / 6, 1 / 12)]
    return [(width * i, height * i, width * (1 - i), height * (1 - i)) for i in insets]


def check_boxes(boxes: Sequence[Box], size: tuple[int, int]) -> None:
    for x1, y1, x2, y2 in boxes:
        if x1 < 0 or y1 < 0 or x2 > size[0] or y2 > size[1]:
            raise CommandError(f"box {x1:g},{y1:g},{x2:g},{y2:g} reaches off the photo, which is {by(size)} pixels")


def read_photo(path: str | None) -> Photo:
    """The photo at `path`, or the package's own."""
    try:
        from fpn.demo import photo
    except ImportError as error:
        raise CommandError(f"photos need Pillow ({error}): pip install 'fpn-roi[demo]'") from error
    if path == "":
        raise CommandError("PHOTO must be the path of an image file; it is empty")
    try:
        return photo.read_photo(photo.DEFAULT_PHOTO if path is None else path)
    except photo.PhotoError as error:
        raise CommandError(str(error)) from error


@dataclass(frozen=True)
class Job:
    """What a subcommand does with a photo, checked before the model runs.

    Attributes:
        photo: as read.
        boxes: in pixels of the photo.
        model: in eval mode.
        name: of the model.
        weights: a phrase that says which weights it has.
        calibrate: whether batch norm takes its statistics from the photo.
        device: where the model runs.
    """

    photo: Photo
    boxes: Sequence[Box]
    model: fpn.FPN
    name: str
    weights: str
    calibrate: bool
    device: torch.device

    def run(self) -> Result:
        from fpn.demo.run import run_model

        try:
            return run_model(self.model.to(self.device), self.photo, self.boxes, self.calibrate)
        except torch.OutOfMemoryError as error:
            raise CommandError(f"out of memory on {self.device}: {error}") from error


def prepare(options: argparse.Namespace) -> Job:
    """The job that the options describe; prints what photo and what model it is."""
    photo = read_photo(options.photo)
    boxes = options.boxes or (DEFAULT_PHOTO_BOXES if options.photo is None else nested_boxes(photo.size))
    check_boxes(boxes, photo.size)
    device = check_device(options.device)
    print(f"photo  {photo.name}, {by(photo.size)} pixels, resized to {by(photo.image.size)}", flush=True)
    model, weights = load_model(options.model, options.weights, options.stride_in_1x1, options.weights_key)
    calibrate = options.weights is None
    if calibrate:
        weights += ", batch norm statistics of this photo"
    print(f"model  {name_of(options)} on {device}; {weights}", flush=True)
    print_report(model)
    return Job(photo, boxes, model, name_of(options), weights, calibrate, device)
