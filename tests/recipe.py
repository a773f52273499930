"""Checkpoints and features of other frameworks, small enough to keep: weights by recipe, features by sample.

A checkpoint is stored as the names and shapes of its entries. The values come from the names, through numpy's legacy
generator, whose streams are fixed for good, so that whoever has the other framework gets the same model from them.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

REFERENCES = Path(__file__).with_name("data")
SAMPLES = 97  # values kept of a level


def entry(name: str, shape: Iterable[int]) -> Tensor:
    """The value of one entry: of the size that training leaves there, so that no signal dies or explodes."""
    shape = tuple(shape)
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return torch.tensor(1000)
    if name.endswith("running_var"):
        value = random.uniform(0.5, 2.0, shape)
    elif name.endswith("running_mean"):
        value = random.uniform(-0.3, 0.3, shape)
    elif name.endswith("bias"):
        value = random.uniform(-0.5, 0.5, shape)
    elif len(shape) == 1:
        value = random.uniform(0.5, 1.2, shape)
    else:
        value = random.standard_normal(shape) * (2 / np.prod(shape[1:])) ** 0.5
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def state_dict(entries: Mapping[str, Iterable[int]]) -> dict[str, Tensor]:
    """The checkpoint with these names and shapes."""
    return {name: entry(name, shape) for name, shape in entries.items()}


def images(height: int, width: int) -> Tensor:
    """Tensor[1, 3, height, width], normal."""
    return torch.from_numpy(np.random.RandomState(0).standard_normal((1, 3, height, width)).astype(np.float32))


def sample(level: Tensor) -> Tensor:
    """`SAMPLES` values, or all where there are fewer, spread evenly over a level."""
    values = level.detach().flatten()
    return values[torch.linspace(0, len(values) - 1, min(SAMPLES, len(values)), dtype=torch.float64).long()]


def save_reference(
    name: str, made_with: str, size: tuple[int, int], state: Mapping[str, Tensor], levels: Iterable[Tensor]
) -> None:
    content = {
        "made_with": made_with,
        "size": size,
        "entries": {key: list(value.shape) for key, value in state.items()},
        "shapes": [list(level.shape) for level in levels],
        "samples": [[float(value) for value in sample(level)] for level in levels],
    }
    packed = gzip.compress(json.dumps(content).encode(), mtime=0)
    (REFERENCES / f"{name}.json.gz").write_bytes(packed)


def load_reference(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(gzip.decompress((REFERENCES / f"{name}.json.gz").read_bytes()))
    return content
