"""Types of the benchmarks' command-line arguments: what cannot be measured is an error before anything is timed."""

from __future__ import annotations

from argparse import ArgumentTypeError

import torch

DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device(name: str) -> str:
    """The name of a device on which a tensor can be made."""
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise ArgumentTypeError(f"{name!r} is unknown; there are cpu, cuda, cuda:1, mps, …") from None
    try:
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ArgumentTypeError(f"{name!r} cannot be used: {reason}") from None
    return name


def size(text: str) -> tuple[int, int]:
    """Height and width of "480x640"."""
    numbers = text.split("x")
    if len(numbers) != 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ArgumentTypeError(f"{text!r} is not HxW, e.g. 480x640")
    return int(numbers[0]), int(numbers[1])


def count(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)
