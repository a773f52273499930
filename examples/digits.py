"""Trains a detector on handwritten digits, from random weights: FPN18 and our RoIAlign in torchvision's Faster R-CNN.

    pip install '.[examples]'
    python examples/digits.py
    python examples/digits.py --peer torchvision
    torchrun --nproc-per-node 2 examples/digits.py

The scenes are scikit-learn's digits pasted into its photos; no digit and no part of a photo is both trained on and
tested on. Nothing is downloaded. With --peer, torchvision's backbone and pooler are trained too, from the same weights,
on the same scenes: the two take turns, step by step, so that their times compare.

The same command continues a training that was interrupted, from its last checkpoint, and ends as it would have ended.

Written to --output: checkpoint.pt, report.json (mAP, seconds per step), and for each detector NAME-detections.png.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from detectors import BUILDERS
from picture import draw
from scenes import Scenes
from torch import Tensor, distributed, nn
from torchmetrics.detection import MeanAveragePrecision
from tqdm import tqdm
from training import Trainee, load, on_device, save

OURS = "fpn-roi"
DRAWN = 12  # scenes in the picture


@dataclass(frozen=True)
class Process:
    """This process among those that train together, and its device."""

    rank: int
    count: int
    device: torch.device


@contextmanager
def process_group(device: str) -> Iterator[Process]:
    """The processes that torchrun started, on one machine or more; else this one alone."""
    if "RANK" not in os.environ:
        yield Process(0, 1, torch.device(device))
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield Process(distributed.get_rank(), distributed.get_world_size(), torch.device(device))
    finally:
        distributed.destroy_process_group()


def train(trainees: Mapping[str, Trainee], options: argparse.Namespace, process: Process) -> None:
    """Up to the last step, from the last checkpoint."""
    settings = {name: getattr(options, name) for name in ("batch", "learning_rate", "peer", "seed", "size", "steps")}
    path = options.output / "checkpoint.pt"
    checkpoint = load(path, settings)
    done = 0
    if checkpoint:
        done = checkpoint["step"]
        for name, trainee in trainees.items():
            trainee.load_state_dict(checkpoint["trainees"][name])
    scenes = Scenes("train", options.size, options.seed)
    with tqdm(initial=done, total=options.steps, unit="step", disable=process.rank > 0) as progress:
        for step in range(done, options.steps):
            # A step's scenes are the same whatever the number of processes that share them.
            images, targets = batch(scenes, range(step * options.batch, (step + 1) * options.batch), process)
            order = list(trainees.values())
            for trainee in order if step % 2 else order[::-1]:
                trainee.step(images, targets, seed=(options.seed + step) * process.count + process.rank)
            progress.set_postfix({f"{name} loss": f"{t.losses[-1]:.3f}" for name, t in trainees.items()})
            progress.update()
            due = (step + 1) % options.checkpoint_every == 0 or step + 1 == options.steps
            if due and process.rank == 0:
                states = {name: trainee.state_dict() for name, trainee in trainees.items()}
                save({"options": settings, "step": step + 1, "trainees": states}, path)


def batch(scenes: Scenes, indices: range, process: Process) -> tuple[Sequence[Tensor], Sequence[dict[str, Tensor]]]:
    """This process's share of those scenes: images and targets."""
    images, targets = zip(*(scenes[index] for index in indices[process.rank :: process.count]), strict=True)
    return images, targets


def evaluate(detector: nn.Module, options: argparse.Namespace, process: Process) -> dict[str, float]:
    """COCO's mAP (the mean of those at IoU 0.5 to 0.95) and mAP@0.5 on the test scenes, which the processes share."""
    # Since the last step every process has batch statistics of its own; the first one's are saved.
    if process.count > 1:
        for buffer in detector.buffers():
            distributed.broadcast(buffer, src=0)
    metric = MeanAveragePrecision().to(process.device)
    scenes = Scenes("test", options.size, options.seed)
    for start in range(0, options.test_scenes, options.batch):
        images, targets = batch(scenes, range(start, start + options.batch), process)
        metric.update(detect(detector, images, process.device), on_device(targets, process.device))
    results = metric.compute()
    return {"mAP": results["map"].item(), "mAP@0.5": results["map_50"].item()}


def detect(detector: nn.Module, images: Sequence[Tensor], device: torch.device) -> list[dict[str, Tensor]]:
    """Boxes, labels and scores in each image."""
    with torch.inference_mode():
        detections: list[dict[str, Tensor]] = detector.eval()([image.to(device) for image in images])
    return detections


def report(trainees: Mapping[str, Trainee], options: argparse.Namespace, process: Process) -> None:
    """Prints what came out, and writes it and the pictures; all processes take part in the evaluation."""
    rows = [
        {"detector": name, **evaluate(trainee.detector, options, process), "seconds per step": median(trainee.seconds)}
        for name, trainee in trainees.items()
    ]
    if process.rank > 0:
        return
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name() if process.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processes": process.count,
        "steps": options.steps,
        "batch": options.batch,
        "rows": rows,
    }
    print("detector        mAP  mAP@0.5  seconds per step (median)")
    for row in rows:
        print(f"{row['detector']:<12}{row['mAP']:>7.3f}{row['mAP@0.5']:>9.3f}{row['seconds per step']:>18.3f}")
    if options.peer:
        pairs = zip(trainees[options.peer].seconds, trainees[OURS].seconds, strict=True)
        facts["ratio"] = median(theirs / ours for theirs, ours in pairs)
        print(f"{OURS} is {facts['ratio']:.2f} times as fast as {options.peer} (median over the steps)")
    (options.output / "report.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    scenes = Scenes("test", options.size, options.seed)
    images, targets = zip(*(scenes[index] for index in range(DRAWN)), strict=True)
    for name, trainee in trainees.items():
        detections = detect(trainee.detector, images, process.device)
        draw(images, targets, on_device(detections, torch.device("cpu")), options.output / f"{name}-detections.png")
    print(f"pictures and report in {options.output}/")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["torchvision"], help="also train this package's backbone and pooler")
    parser.add_argument("--steps", type=int, default=500, help="of training (default: 500)")
    parser.add_argument("--batch", type=int, default=8, help="scenes of a step, all processes together (default: 8)")
    parser.add_argument("--size", type=int, default=128, help="height and width of a scene in pixels (default: 128)")
    parser.add_argument("--test-scenes", type=int, default=200, help="scenes that mAP is computed on (default: 200)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="the highest (default: 5e-4)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the scenes (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("digits-run"),
        help="folder; with several machines one that all see (default: digits-run)",
    )
    parser.add_argument("--checkpoint-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--sync-batchnorm", action="store_true", help="batch norm over the scenes of all processes; on GPUs only"
    )
    options = parser.parse_args(arguments)
    for name in ("steps", "batch", "test_scenes", "checkpoint_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {getattr(options, name)}")
    if options.test_scenes % options.batch:
        parser.error(f"--test-scenes must be a multiple of --batch, {options.batch}; got {options.test_scenes}")
    if options.sync_batchnorm and options.device == "cpu":
        parser.error("--sync-batchnorm needs GPUs: torch has no SyncBatchNorm for the CPU")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    with process_group(options.device) as process:
        if options.batch % process.count:
            raise SystemExit(f"--batch must be a multiple of the {process.count} processes; got {options.batch}")
        trainees = {}
        for name in filter(None, (OURS, options.peer)):
            detector: nn.Module = BUILDERS[name](options.seed, options.size)
            if options.sync_batchnorm:
                detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
            trainees[name] = Trainee(detector, options.steps, options.learning_rate, process.device)
        train(trainees, options, process)
        report(trainees, options, process)


if __name__ == "__main__":
    main()
