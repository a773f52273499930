"""Test scenes with what was detected in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from scenes import CLASSES
from torch import Tensor
from torchvision.ops import box_iou

COLUMNS = 4
RIGHT, WRONG, MISSED = "#80ed99", "#f25c54", "#ffd166"


def draw(
    images: Sequence[Tensor],
    targets: Sequence[Mapping[str, Tensor]],
    detections: Sequence[Mapping[str, Tensor]],
    path: Path,
    least_score: float = 0.5,
) -> None:
    """Writes the scenes as a picture, with their detections of at least that score.

    A detection is right if it covers a digit of its class with an IoU of 0.5 or more; a digit that none so covers is
    missed.
    """
    rows = -(-len(images) // COLUMNS)
    figure = Figure(figsize=(3 * COLUMNS, 3 * rows + 0.4), layout="constrained")
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for ax in axes:
        ax.axis("off")
    for ax, image, target, detection in zip(axes, images, targets, detections, strict=False):
        ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="bilinear")
        kept = detection["scores"] >= least_score
        boxes, labels, scores = (detection[name][kept] for name in ("boxes", "labels", "scores"))
        covers = box_iou(boxes, target["boxes"]) >= 0.5
        same = covers & (labels[:, None] == target["labels"])
        for box, label, score, right in zip(boxes, labels, scores, same.any(1), strict=True):
            outline(ax, box, RIGHT if right else WRONG, f"{CLASSES[label]} {score:.0%}")
        for box, label in zip(target["boxes"][~same.any(0)], target["labels"][~same.any(0)], strict=True):
            outline(ax, box, MISSED, f"{CLASSES[label]}?", missed=True)
    figure.suptitle(f"Test scenes: score ≥ {least_score:g}; green: right, red: wrong, yellow: missed")
    figure.savefig(path, dpi=100)


def outline(ax: Axes, box: Tensor, color: str, text: str, missed: bool = False) -> None:
    """A missed digit's text is at the bottom, where it leaves a wrong detection's readable."""
    x1, y1, x2, y2 = (box - 0.5).tolist()  # a pixel's centre is where matplotlib has its index
    style = {"color": color, "linestyle": "--" if missed else "-", "linewidth": 1.5}
    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))
    around = [withStroke(linewidth=2.5, foreground="black")]
    x, y, side = (x1 + 1, y2 - 1, "bottom") if missed else (x1 + 1, y1 + 1, "top")
    ax.text(x, y, text, color=color, size=9, va=side, path_effects=around)
