"""torchvision's R-CNNs as they come, after `accelerate`, and fused: the same weights, photo, detections and rounds.

    python benchmarks/detector.py
    python benchmarks/detector.py --models FasterRCNN --modes inference --runs 3 --json detector.json

The detectors have the structure of torchvision's trained ones (ResNet-50, frozen batch norm, three trained layers, 91
classes) and random weights. Before anything is timed, every form has to give the detections of torchvision's own, all
of them down to score 0, or its losses. A training step is forward, backward and an SGD step on two images.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

# benchmarks/fpn.py would hide the package: its folder comes first on the path of a script.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from benchmarks import arguments
from benchmarks.harness import describe, environment, interleaved, ratio, table, write_json
from fpn.demo.photo import DEFAULT_PHOTO
from fpn.detection import accelerate
from tests.reference.comparison import unmatched
from tests.reference.random_weights import randomise

MODELS = ("FasterRCNN", "MaskRCNN")
FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torchvision": lambda detector: detector,
    "accelerated": accelerate,
    "accelerated, fused": partial(accelerate, fuse=True),
}
MODES = {"inference": tuple(FORMS), "training step": ("torchvision", "accelerated")}


def build(model: str, height: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)
    sizes = {"min_size": min(height, width), "max_size": max(height, width)}
    return randomise(getattr(detection, model)(backbone, num_classes=91, **sizes)).eval()


def photo(height: int, width: int) -> Tensor:
    """The package's own, Tensor[3, height, width]."""
    with Image.open(DEFAULT_PHOTO) as image:
        array = np.array(image.convert("RGB").resize((width, height)))
    return torch.from_numpy(array).permute(2, 0, 1) / 255


def targets(height: int, width: int, device: str) -> dict[str, Tensor]:
    """Eight objects of several sizes."""
    generator = torch.Generator().manual_seed(0)
    sides = 2 ** torch.linspace(-4, -1, 8)[:, None] * torch.tensor([width, height])
    corners = torch.rand(8, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    boxes = torch.cat([corners, corners + sides], dim=1)
    masks = torch.zeros(8, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return {"boxes": boxes.to(device), "labels": torch.arange(1, 9, device=device), "masks": masks.to(device)}


def infer(detector: nn.Module, images: list[Tensor]) -> list[dict[str, Tensor]]:
    with torch.inference_mode():
        return detector(images)


def step(
    detector: nn.Module, optimizer: torch.optim.Optimizer, images: list[Tensor], objects: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    torch.manual_seed(0)  # of the samples that the losses take
    optimizer.zero_grad()
    losses = detector(images, objects)
    sum(losses.values()).backward()
    optimizer.step()
    return losses


def check_detections(form: str, detector: Any, original: Any, images: list[Tensor]) -> None:
    threshold = original.roi_heads.score_thresh
    detector.roi_heads.score_thresh = original.roi_heads.score_thresh = 0.0
    (found,), (expected,) = infer(detector, images), infer(original, images)
    detector.roi_heads.score_thresh = original.roi_heads.score_thresh = threshold
    missing = unmatched(found, expected) + unmatched(expected, found)
    if missing:
        raise SystemExit(f"{form}: {missing} detections differ, so there is nothing to compare")
    if not len(infer(original, images)[0]["boxes"]):
        raise SystemExit("no detection passes the threshold")


def check_losses(form: str, losses: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        if not torch.allclose(losses[name], value, rtol=1e-4, atol=1e-6):
            raise SystemExit(f"{form}: {name} is {losses[name]}, not {value}, so there is nothing to compare")


def contestants(model: str, mode: str, height: int, width: int, device: str) -> dict[str, Callable[[], Any]]:
    """The calls that are timed, once they are found to give the same."""
    image = photo(height, width).to(device)
    source = build(model, height, width).to(device)
    if mode == "inference":
        # As training leaves it, some classes are likelier than others: without that nothing passes the threshold, and
        # the masks of nothing cost nothing.
        nn.init.normal_(source.roi_heads.box_predictor.cls_score.weight, std=0.2)
    detectors = {form: FORMS[form](copy.deepcopy(source)) for form in MODES[mode]}
    if mode == "inference":
        for form, detector in detectors.items():
            check_detections(form, detector, source, [image])
        return {form: partial(infer, detector, [image]) for form, detector in detectors.items()}
    batch, objects = [image, image.flip(-1)], [targets(height, width, device)] * 2
    calls: dict[str, Callable[[], Any]] = {}
    for form, detector in detectors.items():
        optimizer = torch.optim.SGD(detector.train().parameters(), lr=0.0)  # the work of every round is the same
        calls[form] = partial(step, detector, optimizer, batch, objects)
    expected = calls["torchvision"]()
    for form, call in calls.items():
        check_losses(form, call(), expected)
    return calls


def measure(model: str, mode: str, height: int, width: int, device: str, runs: int) -> list[dict[str, Any]]:
    """A row for each form: all in turn, in the same rounds."""
    times = interleaved(contestants(model, mode, height, width, device), torch.device(device), runs)
    return [
        {
            "model": model,
            "images": f"{height}×{width}",
            "mode": mode,
            "form": form,
            "ms": median(times[form]),
            "least ms": min(times[form]),
            "ratio": ratio(times, peer="torchvision", ours=form),
        }
        for form in times
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="NAME", help=", ".join(MODELS)
    )
    parser.add_argument(
        "--modes", nargs="+", default=list(MODES), choices=list(MODES), metavar="MODE", help=", ".join(MODES)
    )
    parser.add_argument("--size", type=arguments.size, default=(480, 640), metavar="HxW")
    parser.add_argument("--runs", type=arguments.count, default=9, help="rounds that count, after two that do not")
    parser.add_argument("--threads", type=arguments.count, help="CPU threads (default: torch's)")
    parser.add_argument("--device", type=arguments.device, default=arguments.DEFAULT_DEVICE)
    parser.add_argument("--json", type=Path, help="also write the environment and the rows there")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = environment(torch.device(options.device))
    print(describe(facts), end="\n\n")
    height, width = options.size
    rows = []
    for model, mode in product(options.models, options.modes):
        measured = measure(model, mode, height, width, options.device, options.runs)
        print(table(measured), end="\n\n", flush=True)
        rows += measured
    print("ratio: median over the rounds of torchvision's time / this one's; above 1, this one is faster")
    if options.json:
        write_json(options.json, facts, rows)


if __name__ == "__main__":
    main()
