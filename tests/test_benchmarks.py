"""What a benchmark is asked for is checked before anything is timed."""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import arguments

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    ("convert", "text", "message"),
    [
        (arguments.device, "gpu", "'gpu' is unknown; there are cpu, cuda"),
        (arguments.device, "meta", "'meta' cannot be used: "),
        (arguments.size, "10", "'10' is not HxW"),
        (arguments.size, "0x10", "'0x10' is not HxW"),
        (arguments.size, "-5x10", "'-5x10' is not HxW"),
        (arguments.count, "0", "'0' is not a number from 1"),
        (arguments.count, "1.5", "'1.5' is not a number from 1"),
    ],
)
def test_bad_arguments(convert: Callable[[str], object], text: str, message: str) -> None:
    with pytest.raises(ArgumentTypeError, match=message):
        convert(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ArgumentTypeError, match="'cuda' cannot be used: "):
        arguments.device("cuda")


def test_good_arguments() -> None:
    assert arguments.device("cpu") == "cpu"
    assert arguments.size("480x640") == (480, 640)
    assert arguments.count("3") == 3


@pytest.mark.parametrize(
    "use",
    [
        "fpn.py --forms nosuch",
        "fpn.py --models FPN7",
        pytest.param("detector.py --size 10", marks=pytest.mark.torchvision),  # its detectors are torchvision's
    ],
)
def test_bad_use_ends_with_one_line_and_no_traceback(use: str) -> None:
    script, *options = use.split()
    run = subprocess.run(
        [sys.executable, SCRIPTS / script, *options], capture_output=True, text=True, check=False, cwd=SCRIPTS.parent
    )
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith(f"{script}: error: argument {options[0]}")
