"""Files under abuse: mutated ones are refused, or read for what they are; written ones are whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpn.demo.photo import DEFAULT_PHOTO
from tests.trust.conftest import Amounts

pytestmark = [
    pytest.mark.trust,
    pytest.mark.skipif(sys.platform != "linux", reason="memory and signals as Linux has them"),
]

REPOSITORY = Path(__file__).parents[2]


def start(*command: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8"}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *map(str, command)], stdout=pipe, stderr=pipe, text=True, env=environment)


def test_mutated_files(amounts: Amounts, tmp_path: Path, tally: Counter[str]) -> None:
    """Errors of ours or none, no code of theirs, bounded memory, and a model that is as it was."""
    process = start("-W", "ignore", "-m", "tests.trust.reading", tmp_path, 0, amounts.files)
    stdout, stderr = process.communicate(timeout=3600)
    assert process.returncode == 0, stderr
    result = json.loads(stdout)
    tally["mutated files"] += sum(result["kinds"].values())
    assert result["wrong"] == []
    assert sum(result["kinds"].values()) == amounts.files


# The writer stops for good where it calls that function for the time of that number: the file has then some of its
# bytes, or all of them under another name.
HALTED = """
import os, runpy, sys, time

def halting(function, count=[0]):
    def halted(*args, **options):
        count[0] += 1
        if count[0] == {number}:
            print("writing", flush=True)
            time.sleep(600)
        return function(*args, **options)
    return halted

{patch}
sys.argv = ["fpn", {photo!r}, "--model", "FPN18", "--out", {folder!r}]
runpy.run_module("fpn", run_name="__main__")
"""

PATCHES = {
    "features": "import numpy.lib.format as f; f.write_array = halting(f.write_array)",
    "picture": "from PIL import PngImagePlugin as f; f._idat.write = halting(f._idat.write)",
    "replace": "os.replace = halting(os.replace)",
}


@pytest.mark.parametrize(
    ("patch", "number", "earlier", "new"),
    [("features", 3, False, set()), ("picture", 2, True, set()), ("replace", 2, True, {"pyramid.png"})],
    ids=["in the features", "in the picture, over an earlier one", "between the two, over earlier ones"],
)
def test_a_demo_that_is_killed_leaves_whole_files(
    patch: str, number: int, earlier: bool, new: set[str], tmp_path: Path, tally: Counter[str]
) -> None:
    with Image.open(DEFAULT_PHOTO) as image:
        image.resize((64, 48)).save(tmp_path / "photo.png")
    folder = tmp_path / "out"
    if earlier:
        folder.mkdir()
        np.savez(folder / "features.npz", p2=np.zeros(1))
        Image.new("RGB", (2, 2)).save(folder / "pyramid.png")
    script = HALTED.format(patch=PATCHES[patch], number=number, photo=str(tmp_path / "photo.png"), folder=str(folder))
    process = start("-c", script)
    assert process.stdout is not None
    assert any(line == "writing\n" for line in process.stdout), process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = {path.name: path for path in folder.iterdir() if path.is_file()}
    assert left.keys() == ({"features.npz", "pyramid.png"} if earlier else set())
    if earlier:
        with np.load(left["features.npz"]) as arrays:
            assert arrays["p2"].shape == (1,)
        with Image.open(left["pyramid.png"]) as picture:
            picture.load()
            assert (picture.size != (2, 2)) == ("pyramid.png" in new)
    tally["writers killed"] += 1


def test_an_examples_checkpoint_is_whole_at_every_moment(tmp_path: Path, tally: Counter[str]) -> None:
    """Killed when the next one is written, and has not its name yet."""
    training = pytest.importorskip("examples.training")
    path = tmp_path / "checkpoint.pth"
    training.save({"step": 1, "weight": torch.ones(1000)}, path)
    script = (
        "import os, signal, torch; from pathlib import Path; from examples import training\n"
        "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"training.save({{'step': 2, 'weight': torch.zeros(1000)}}, Path({str(path)!r}))"
    )
    process = start("-c", script)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True)["step"] == 1
    tally["writers killed"] += 1
