"""`fpn demo`: a photo goes through a backbone; a table, a picture and the features come out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fpn.command.errors import CommandError
from fpn.command.options import by, megabytes, output_files
from fpn.command.photos import ABOUT_FEATURES, ABOUT_RUNS, FEATURES, Job, prepare
from fpn.command.photos import add_arguments as add_arguments

if TYPE_CHECKING:  # these need Pillow, whose absence `prepare` reports
    from fpn.demo.run import Result

PICTURE = "pyramid.png"

HELP = "run a backbone on a photo, and draw its pyramid and the pooled RoIs"
EXAMPLE = "{prog} demo street.jpg --model FPN101 --boxes 40,60,380,420 500,120,610,300 --out street"
DESCRIPTION = f"""\
Runs a photo through an FPN backbone and pools boxes from its pyramid by RoI max pooling.

Prints the levels and their times, and writes to DIR
  pyramid.png   the photo with its boxes, a heat map per level, the pooled RoIs
{ABOUT_FEATURES}

{ABOUT_RUNS}"""


def run(options: argparse.Namespace) -> None:
    try:
        import matplotlib  # noqa: F401  (fail here, not after the model has run)
    except ImportError as error:
        raise CommandError(f"the demo needs matplotlib ({error}): pip install 'fpn-roi[demo]'") from error
    job = prepare(options)
    with output_files(options.out, (PICTURE, FEATURES)) as (picture, features):
        result = job.run()
        result.save(features)
        picture_size = save_picture(picture, job, result)
    print_tables(result)
    print(f"wrote {options.out / PICTURE} ({by(picture_size)} pixels)")
    print(f"wrote {options.out / FEATURES} ({megabytes(options.out / FEATURES)})")


def save_picture(path: Path, job: Job, result: Result) -> tuple[int, int]:
    """Draws the picture; returns its (width, height) in pixels."""
    from fpn.demo import draw
    from fpn.demo.run import level_numbers

    photo = job.photo
    x_scale, y_scale = photo.scale
    speed = f"{job.device}, {result.times.total:.0f} ms"
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
        title=f"{job.name} feature pyramid",
        facts=f"{draw.shorten(photo.name, 40)}   ·   model input {by(photo.image.size)}   ·   {speed}",
        weights=job.weights[0].upper() + job.weights[1:],
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
