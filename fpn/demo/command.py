"""`python -m fpn`: a photo goes through the backbone; a table, a picture and the features come out."""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeGuard

import numpy as np
import torch

import fpn
from fpn._output import written_whole

if TYPE_CHECKING:  # these need Pillow, whose absence `read_photo` reports
    from fpn.demo.photo import Photo
    from fpn.demo.run import Box, Result

MODELS = ("FPN18", "FPN34", "FPN50", "FPN101", "FPN152")
SEED = 0
PICTURE, FEATURES = "pyramid.png", "features.npz"

# In the package's photo: the astronaut, her head, the shuttle, the helmet, the mission patch, the name tag.
DEFAULT_PHOTO_BOXES: tuple[Box, ...] = (
    (18, 14, 366, 512),
    (152, 14, 302, 188),
    (354, 0, 473, 291),
    (277, 344, 512, 512),
    (133, 345, 210, 424),
    (278, 338, 330, 378),
)

DESCRIPTION = """\
Runs a photo through an FPN backbone and pools boxes from its pyramid.

Prints the levels and their times, and writes to DIR
  pyramid.png   the photo with its boxes, a heat map per level, the pooled RoIs
  features.npz  p2, p3, p4, p5, or the levels there are, (1, 256, h, w); boxes (K, 4) in pixels of the photo;
                model_boxes (K, 4) in pixels of the model's input; levels (K,), the
                k of the level Pk that a box is pooled from; rois (K, 256, 7, 7)

The photo is turned upright (EXIF) and resized as detectors do: shorter side 800, longer
side at most 1333, enlarged at most twice. A box of w by h pixels of that input is pooled
from level k = floor(4 + log2(sqrt(w h) / 224)), or the nearest there is (Lin et al. 2017,
eq. 1).

A checkpoint (--weights PATH) of torchvision, detectron2, mmdetection, kuangliu/pytorch-fpn or
this package says itself what model it is, and --model is not used.

Random weights are the same at every run (seed 0). Their batch norm takes its statistics
from the photo: with none, activations grow from block to block, and the top of the pyramid
drowns the fine levels. Nothing is downloaded unless --weights names ImageNet weights."""

EPILOG = """\
examples:
  python -m fpn street.jpg --model FPN101 --boxes 40,60,380,420 500,120,610,300 --out street
  python -m fpn --model FPN50 --weights DEFAULT --export fpn50.onnx"""


class DemoError(Exception):
    """What the user can put right, in one sentence."""


def main() -> int:
    """Runs the command; its exit status is 0, 2 after a one-line error, 130 when interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal without × and file names that are no text
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: complain("warning", message)
            run(parse(sys.argv[1:]))
            sys.stdout.flush()
    except DemoError as error:
        complain("error", error)
        return 2
    except KeyboardInterrupt:
        complain("error", "interrupted")
        return 130
    except BrokenPipeError:  # `python -m fpn | head -1`; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def complain(kind: str, message: object) -> None:
    """One line on stderr."""
    print(f"python -m fpn: {kind}: {' '.join(str(message).split())}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse, with its errors on one line."""

    def error(self, message: str) -> NoReturn:
        raise DemoError(f"{message} (see --help)")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m fpn",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("photo", nargs="?", metavar="PHOTO", help="an image file (default: a photo in the package)")
    parser.add_argument(
        "--model", choices=MODELS, default="FPN50", metavar="NAME", help=f"{', '.join(MODELS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--weights",
        metavar="NAME|PATH",
        help="DEFAULT, IMAGENET1K_V1 or IMAGENET1K_V2, or the path of a checkpoint (default: random weights)",
    )
    parser.add_argument(
        "--stride-in-1x1",
        action=argparse.BooleanOptionalAction,
        help="where a checkpoint's bottlenecks have their stride, which its names do not tell (default: by its source)",
    )
    parser.add_argument(
        "--boxes",
        nargs="+",
        action="extend",
        type=parse_box,
        metavar="x1,y1,x2,y2",
        help="in pixels of the upright photo (default: all of it and its central 1/3, 1/6 and 1/12)",
    )
    parser.add_argument(
        "--out", type=Path, default="fpn-demo", metavar="DIR", help="folder for both files (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="write the model as ONNX, for any batch and image size, instead of running it on a photo",
    )
    # argparse takes -5,0,9,9 for an option, but no word with a space in it.
    return parser.parse_args([f" {word}" if re.match(r"-[\d.]+,", word) else word for word in arguments])


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


def run(options: argparse.Namespace) -> None:
    """The whole command, from options to files."""
    if options.export is not None:
        export(options)
        return
    photo = read_photo(options.photo)
    boxes = options.boxes or (DEFAULT_PHOTO_BOXES if options.photo is None else nested_boxes(photo.size))
    check_boxes(boxes, photo.size)
    device = check_device(options.device)
    print(f"photo  {photo.name}, {by(photo.size)} pixels, resized to {by(photo.image.size)}", flush=True)
    model, weights = load_model(options.model, options.weights, options.stride_in_1x1)
    if options.weights is None:
        weights += ", batch norm statistics of this photo"
    name = name_of(options)
    print(f"model  {name} on {device}; {weights}", flush=True)
    print_report(model)

    with output_files(options.out, (PICTURE, FEATURES)) as (picture, features):
        result = run_on(device, model, photo, boxes, calibrate=options.weights is None)
        result.save(features)
        picture_size = save_picture(picture, photo, result, name, f"{device}, {result.times.total:.0f} ms", weights)
    print_tables(result)
    print(f"wrote {options.out / PICTURE} ({by(picture_size)} pixels) and {options.out / FEATURES}")


def export(options: argparse.Namespace) -> None:
    """`--export`, from options to the file."""
    from fpn.export import export_onnx

    if options.photo is not None or options.boxes:
        raise DemoError("--export takes no photo and no boxes")
    model, weights = load_model(options.model, options.weights, options.stride_in_1x1)
    print(f"model  {name_of(options)}; {weights}", flush=True)
    print_report(model)
    path: Path = options.export
    with output_files(path.parent, [path.name]) as (unfinished,):
        try:
            export_onnx(model, unfinished)
        except (ImportError, RuntimeError, ValueError) as error:
            raise DemoError(f"--export: {error}") from error
    print(f"wrote {path} ({path.stat().st_size / 1e6:.0f} MB)")


def name_of(options: argparse.Namespace) -> str:
    """The model's; that of a checkpoint has none."""
    return "FPN" if is_checkpoint(options.weights) else str(options.model)


def print_report(model: fpn.FPN) -> None:
    """How the checkpoint was read, and what was assumed of it."""
    if model.report is not None:
        print("       " + str(model.report).replace("; ", "\n       "), flush=True)


def read_photo(path: str | None) -> Photo:
    """The photo at `path`, or the package's own."""
    try:
        from fpn.demo import draw, photo  # noqa: F401  (fail here, not after the model has run)
    except ImportError as error:
        raise DemoError(f"the demo needs Pillow and matplotlib ({error}): pip install 'fpn-roi[demo]'") from error
    try:
        return photo.read_photo(photo.DEFAULT_PHOTO if path is None else path)
    except photo.PhotoError as error:
        raise DemoError(str(error)) from error


def nested_boxes(size: tuple[int, int]) -> list[Box]:
    """All of a photo and its central 1/3, 1/6 and 1/12: in inputs of the usual size, one box for each level."""
    width, height = size
    insets = [(1 - side) / 2 for side in (1, 1 / 3, 1 / 6, 1 / 12)]
    return [(width * i, height * i, width * (1 - i), height * (1 - i)) for i in insets]


def check_boxes(boxes: Sequence[Box], size: tuple[int, int]) -> None:
    for x1, y1, x2, y2 in boxes:
        if x1 < 0 or y1 < 0 or x2 > size[0] or y2 > size[1]:
            raise DemoError(f"box {x1:g},{y1:g},{x2:g},{y2:g} reaches off the photo, which is {by(size)} pixels")


def check_device(name: str) -> torch.device:
    """The device of that name, once it has held a number."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DemoError(f"device {name!r} cannot be used: {reason}") from error
    return device


def load_model(name: str, weights: str | None, stride_in_1x1: bool | None = None) -> tuple[fpn.FPN, str]:
    """The model in eval mode, on the CPU, and a phrase that says which weights it has."""
    try:
        model = build_seeded(name, weights, stride_in_1x1)
    except (ValueError, OSError, ImportError) as error:
        raise DemoError(f"--weights: {error}") from error
    if model.report is None:
        return model, f"random weights (seed {SEED})"
    if not any(entry.startswith("lateral.") for entry in model.report.matched):
        return model, f"weights {weights} for the trunk; lateral and smoothing convolutions random (seed {SEED})"
    return model, f"weights {weights}"


def run_on(device: torch.device, model: fpn.FPN, photo: Photo, boxes: Sequence[Box], calibrate: bool) -> Result:
    from fpn.demo.run import run_model

    try:
        return run_model(model.to(device), photo, boxes, calibrate)
    except torch.OutOfMemoryError as error:
        raise DemoError(f"out of memory on {device}: {error}") from error


def build_seeded(name: str, weights: str | None, stride_in_1x1: bool | None) -> fpn.FPN:
    torch.manual_seed(SEED)
    if is_checkpoint(weights):
        return fpn.from_checkpoint(weights, stride_in_1x1=stride_in_1x1, channel_order="rgb").eval()
    if stride_in_1x1 is not None:
        raise DemoError("--stride-in-1x1 is for a checkpoint; give its path with --weights")
    model: fpn.FPN = getattr(fpn, name)(weights=weights)
    return model.eval()


def is_checkpoint(weights: str | None) -> TypeGuard[str]:
    """Whether it is the path of a file, and not the name of ImageNet weights."""
    return weights is not None and weights != "DEFAULT" and not weights.startswith("IMAGENET")


@contextmanager
def output_files(folder: Path, names: Sequence[str]) -> Iterator[list[Path]]:
    """Paths to write to; once all is written, the files move into `folder` under `names`. Else none does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole([folder / name for name in names]) as unfinished:
            yield unfinished
    except OSError as error:
        where = next((folder / name for name in names if str(folder / name) == error.filename), folder)
        raise DemoError(f"cannot write to {where}: {error.strerror or error}") from error


def save_picture(path: Path, photo: Photo, result: Result, model: str, speed: str, weights: str) -> tuple[int, int]:
    """Draws the picture; returns its (width, height) in pixels."""
    from fpn.demo import draw
    from fpn.demo.run import level_numbers

    x_scale, y_scale = photo.scale
    numbers = level_numbers(result.strides)
    levels = [
        draw.Level(f"P{k}", stride, (stride / x_scale, stride / y_scale), features[0].numpy())
        for k, stride, features in zip(numbers, result.strides, result.pyramid, strict=True)
    ]
    drawing = draw.Drawing(
        image=np.asarray(photo.image),
        size=photo.size,
        levels=levels,
        boxes=result.boxes.numpy(),
        box_levels=[numbers.index(k) for k in result.levels],
        rois=result.rois.numpy(),
        title=f"{model} feature pyramid",
        facts=f"{draw.shorten(photo.name, 40)}   ·   model input {by(photo.image.size)}   ·   {speed}",
        weights=weights[0].upper() + weights[1:],
    )
    return draw.save_picture(drawing, path)


def print_tables(result: Result) -> None:
    from fpn.demo.run import level_numbers

    times = result.times
    ms_of_levels = [f"{ms:.1f}" for ms in times.levels]
    ms_of_levels += [""] * (len(result.strides) - len(times.levels))
    row = "{:<10} {:>6}  {:>17}  {:>9}".format
    print()
    print(row("level", "stride", "channels × h × w", "ms"))
    print(row("C2 to C5", "", "", f"{times.bottom_up:.1f}"))
    for stride, level, ms in zip(result.strides, result.pyramid, ms_of_levels, strict=True):
        (k,) = level_numbers([stride])
        print(row(f"P{k}", stride, by(level.shape[1:]), ms).rstrip())
    if len(result.strides) > len(times.levels):
        print(row("extra", "", "", f"{times.extra:.1f}"))
    print(row("merging", "", "", f"{times.merging:.1f}"))
    print(row("total", "", "", f"{times.total:.1f}"))
    print("\nms of one forward pass after a warm-up. C2 to C5: the trunk. A level: its lateral 1×1 and smoothing 3×3")
    print("convolution, if it has one. Extra: the levels above. Merging: the rest, upsampling and addition.\n")
    row = "{:<4} {:<28} {:>20}  {:>5}".format
    print(row("box", "x1,y1,x2,y2", "in the model's input", "level"))
    for number, (box, k) in enumerate(zip(result.boxes.tolist(), result.levels, strict=True), start=1):
        x1, y1, x2, y2 = result.model_boxes[number - 1].tolist()
        corners = ",".join(f"{value:.6g}" for value in box)
        print(row(number, corners, f"{x2 - x1:.0f} × {y2 - y1:.0f}", f"P{k}"))
    print()


def by(sizes: Sequence[int]) -> str:
    """Sizes as text: "3 × 4"."""
    return " × ".join(str(size) for size in sizes)
