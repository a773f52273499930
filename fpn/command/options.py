"""What subcommands share: the model and its weights, the device, the files that are written."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeGuard

import torch

import fpn
from fpn._output import written_whole
from fpn.command.errors import CommandError
from fpn.weights import is_name

MODELS = ("FPN18", "FPN34", "FPN50", "FPN101", "FPN152")
SEED = 0


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", choices=MODELS, default="FPN50", metavar="NAME", help=f"{', '.join(MODELS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--weights",
        metavar="NAME|PATH",
        help="DEFAULT, IMAGENET1K_V1 or IMAGENET1K_V2, or the path of a checkpoint (default: random weights)",
    )
    parser.add_argument(
        "--weights-key",
        metavar="KEY",
        help="which of several models in a checkpoint, e.g. model_ema (default: the trained one)",
    )
    parser.add_argument(
        "--stride-in-1x1",
        action=argparse.BooleanOptionalAction,
        help="whether a checkpoint's bottlenecks have their stride in the 1×1 convolution; no name in it says so "
        "(default: as its source's models)",
    )


def load_model(
    name: str, weights: str | None, stride_in_1x1: bool | None = None, key: str | None = None
) -> tuple[fpn.FPN, str]:
    """The model in eval mode, on the CPU, and a phrase that says which weights it has."""
    if weights == "":
        raise CommandError("--weights: the path is empty")
    try:
        model = build_seeded(name, weights, stride_in_1x1, key)
    except (ValueError, OSError, ImportError) as error:
        raise CommandError(f"--weights: {error}") from error
    if model.report is None:
        return model, f"random weights (seed {SEED})"
    if not any(entry.startswith("lateral.") for entry in model.report.matched):
        return model, f"weights {weights} for the trunk; lateral and smoothing convolutions random (seed {SEED})"
    return model, f"weights {weights}"


def build_seeded(name: str, weights: str | None, stride_in_1x1: bool | None, key: str | None) -> fpn.FPN:
    torch.manual_seed(SEED)
    if is_checkpoint(weights):
        return fpn.from_checkpoint(weights, stride_in_1x1=stride_in_1x1, channel_order="rgb", key=key).eval()
    if key is not None:
        raise CommandError("--weights-key is for a checkpoint; give its path with --weights")
    if stride_in_1x1 is not None:
        raise CommandError("--stride-in-1x1 is for a checkpoint; give its path with --weights")
    model: fpn.FPN = getattr(fpn, name)(weights=weights)
    return model.eval()


def is_checkpoint(weights: str | None) -> TypeGuard[str]:
    """Whether it is the path of a file, and not the name of ImageNet weights."""
    return weights is not None and not is_name(weights)


def name_of(options: argparse.Namespace) -> str:
    """The model's name; a model that a checkpoint describes has none."""
    return "FPN" if is_checkpoint(options.weights) else str(options.model)


def print_report(model: fpn.FPN) -> None:
    """How the checkpoint was read, and what was assumed of it."""
    if model.report is not None:
        print("       " + str(model.report).replace("; ", "\n       "), flush=True)


def check_device(name: str) -> torch.device:
    """The device of that name, once it has held a number."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"device {name!r} is unknown; there are cpu, cuda, cuda:1, mps, …") from error
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CommandError(f"device {name!r} cannot be used: {reason}") from error
    return device


@contextmanager
def output_files(folder: Path, names: Sequence[str]) -> Iterator[list[Path]]:
    """Paths to write to; once all is written, the files move into `folder` under `names`. Else none does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole([folder / name for name in names]) as unfinished:
            yield unfinished
    except OSError as error:
        where = next((folder / name for name in names if str(folder / name) == error.filename), folder)
        raise CommandError(f"cannot write to {where}: {error.strerror or error}") from error


def megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.0f} MB"


def by(sizes: Sequence[int]) -> str:
    """Sizes as text: "3 × 4"."""
    return " × ".join(str(size) for size in sizes)
