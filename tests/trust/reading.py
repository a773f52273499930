"""Reads mutated files in a process of its own, which they may take down: `python -m tests.trust.reading FOLDER 0 500`.

Prints, as JSON, how many files of each kind there were and what was wrong.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fpn
from fpn.checkpoints.errors import CheckpointError
from fpn.checkpoints.files import read_checkpoint
from fpn.demo.photo import PhotoError, read_photo
from fpn.weights import transfer
from tests.reference.process_memory import reset_peak_resident, resident
from tests.trust.mutations import model, mutated

PHOTO_BYTES = 1.2e9  # of what `fpn.demo.photo.MAX_PIXELS` allows, decoded
ADDRESSES = 3 * 2**30  # bytes that may be asked for at once; beyond it a MemoryError, not the end of the machine
CHECKPOINT_BYTES = 100e6  # and a few times the file


def transferred(path: Path) -> None:
    """Into a model that is as it was unless the file is as it should be."""
    own = model()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    try:
        transfer(own, read_checkpoint(path))
    except CheckpointError:
        assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items()), (
            "the model has changed"
        )
        raise
    assert all(value.isfinite().all() for value in own.state_dict().values()), "what was loaded is not finite"


def built(path: Path) -> None:
    made: nn.Module = fpn.from_checkpoint(path)
    assert all(value.isfinite().all() for value in made.state_dict().values()), "what was loaded is not finite"


READERS: tuple[tuple[Callable[[Path], Any], type[Exception], float], ...] = (
    (transferred, CheckpointError, CHECKPOINT_BYTES),
    (built, CheckpointError, CHECKPOINT_BYTES),
    (read_photo, PhotoError, PHOTO_BYTES),
)


def problems(path: Path, read: Callable[[Path], Any], error_type: type[Exception], limit: float) -> list[str]:
    """What is wrong with how a file is read: nothing, if it is read or refused with an error of ours."""
    found = []
    ctypes.CDLL(None).malloc_trim(0)
    before = reset_peak_resident()
    try:
        read(path)
    except error_type as error:
        if not str(error) or "\n" in str(error):
            found.append(f"an error that says nothing, or too much: {error}")
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    taken = resident("VmHWM") - before
    if taken > limit + 8 * path.stat().st_size:
        found.append(f"took {taken / 1e6:.0f} MB for a file of {path.stat().st_size / 1e6:.1f} MB")
    return found


def main() -> None:
    folder, start, stop = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    witness, kinds, wrong = folder / "witness", Counter[str](), []
    limit = int(resident("VmSize")) + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    for number in range(start, stop):
        file = mutated(number, witness)
        path = folder / f"file{number}{file.suffix}"
        path.write_bytes(file.content)
        kinds[file.kind] += 1
        for reader in READERS:
            found = problems(path, *reader)
            if witness.exists():
                found.append("its code was run")
                witness.unlink() if witness.is_file() else witness.rmdir()
            wrong += [f"{number}, {file.kind}{file.suffix}, {reader[0].__name__}: {problem}" for problem in found]
        path.unlink()
    print(json.dumps({"kinds": kinds, "wrong": wrong}))


if __name__ == "__main__":
    main()
