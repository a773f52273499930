"""Checkpoints and photos that are damaged or made to do harm, each drawn from its number."""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import operator
import os
import pickle
import random
import runpy
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fpn.demo.photo import DEFAULT_PHOTO
from tests.trust.calls import small_fpn

CHECKPOINTS = ("zip", "legacy", "pickle", "pickle 0", "safetensors")
PHOTOS = ("jpg", "png", "tif", "gif", "webp", "bmp", "ico", "ppm")
EXTENSIONS = (".pth", ".pkl", ".safetensors", ".bin", *(f".{suffix}" for suffix in PHOTOS))


class File(NamedTuple):
    kind: str  # of mutation
    suffix: str
    content: bytes


def model() -> nn.Module:
    """What the checkpoints are of."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 40))


def packed(content: Any, form: str) -> bytes:
    """A checkpoint file of that form."""
    file = io.BytesIO()
    if form == "safetensors":
        from safetensors.torch import save

        return save(content)
    if form.startswith("pickle"):
        return pickle.dumps(content, 0 if form == "pickle 0" else pickle.DEFAULT_PROTOCOL)
    torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    return file.getvalue()


@functools.cache
def forms() -> tuple[str, ...]:
    """Those that this machine can write."""
    try:
        importlib.import_module("safetensors")
    except ImportError:
        return CHECKPOINTS[:-1]
    return CHECKPOINTS


@functools.cache
def whole_checkpoint(form: str) -> bytes:
    state: dict[str, Any] = dict(model().state_dict())
    if form != "safetensors":
        state = {name: value.numpy() if name.startswith("2") else value for name, value in state.items()}
        return packed({"state_dict": state, "epoch": 3, "history": [0.5, None, "text"]}, form)
    return packed(state, form)


@functools.cache
def whole_pyramid(form: str) -> bytes:
    return packed(small_fpn().state_dict(), form)


@functools.cache
def whole_photo(suffix: str) -> bytes:
    file = io.BytesIO()
    with Image.open(DEFAULT_PHOTO) as image:
        image.resize((96, 64)).save(file, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    return file.getvalue()


# --- Damage


def flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 3, 20))):
        # Half of them where the structure is, at the ends.
        place = draw.choice(
            (draw.randrange(len(changed)), draw.randrange(min(len(changed), 400)), -draw.randint(1, 60))
        )
        changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncated(content: bytes, draw: random.Random) -> bytes:
    return content[
        : draw.choice((draw.randrange(len(content)), draw.randrange(40), len(content) - draw.randint(1, 40)))
    ]


def spliced(content: bytes, draw: random.Random) -> bytes:
    a, b = sorted(draw.randrange(len(content)) for _ in range(2))
    piece = draw.choice((b"", content[a:b] * 2, draw.randbytes(b - a), bytes(b - a)))
    return content[:a] + piece + content[b:]


def stretched(content: bytes, draw: random.Random) -> bytes:
    """A number somewhere made as large as it can be: it may be a length."""
    size = draw.choice((2, 4, 8))
    place = draw.choice((draw.randrange(len(content)), draw.randrange(min(len(content), 200))))
    large = draw.choice((b"\xff" * size, b"\xff" * (size - 1) + b"\x7f", b"\x7f" + b"\xff" * (size - 1)))
    return content[:place] + large + content[place + size :]


DAMAGE = (flipped, truncated, spliced, stretched)

# --- Bombs: little that claims to be much


def deflated(draw: random.Random) -> bytes:
    """1 GB of zeros in an archive as torch writes them, but compressed."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(packed({"0.weight": torch.zeros(1)}, "zip"))) as source,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
    ):
        for name in source.namelist():
            with bomb.open(name, "w", force_zip64=True) as entry:
                for _ in range(1024 if "/data/" in name else 0):
                    entry.write(bytes(2**20))
                if "/data/" not in name:
                    entry.write(source.read(name))
    return file.getvalue()


def expanded(draw: random.Random) -> bytes:
    return packed({"0.weight": torch.ones(1).expand(10 ** draw.randint(9, 15))}, draw.choice(CHECKPOINTS[:4]))


def aliased(draw: random.Random) -> bytes:
    """Thousands of entries, all of them the same 4 MB."""
    one = torch.zeros(1000, 1000)
    return packed({f"layer{i}.weight": one for i in range(5000)}, draw.choice(CHECKPOINTS[:3]))


def aliased_blocks(draw: random.Random) -> bytes:
    """An FPN of thousands of blocks, all of them the same one."""
    state = dict(small_fpn().state_dict())
    block = {name: value for name, value in state.items() if name.startswith("bottom_up.layer4.0.conv2")}
    block |= {name: value for name, value in state.items() if name.startswith("bottom_up.layer4.0.bn")}
    for number in range(1, 3000):
        for name, value in block.items():
            other = name.replace("layer4.0", f"layer4.{number}")
            state[other] = value
            state[other.replace("conv2", "conv1")] = value
    return packed(state, draw.choice(CHECKPOINTS[:3]))


def nested(draw: random.Random) -> bytes:
    return b"\x80\x04" + draw.choice((b"]", b"}", b"(")) * 10**6 + b"."


def long(draw: random.Random) -> bytes:
    """Pickle's and safetensors' own lengths, of up to 2^63 bytes."""
    size = (2 ** draw.choice((31, 32, 36, 40, 63)) - 1).to_bytes(8, "little")
    header = b'{"a":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (2**40, 2**42)
    return draw.choice(
        (
            b"\x80\x04\x8e" + size + b".",
            b"\x80\x05\x96" + size + b".",
            b"\x80\x04\x95" + size + b"N.",
            b"\x80\x04\x8a\x7f" + bytes(127) + b".",
            size + b"{",
            len(header).to_bytes(8, "little") + header,
        )
    )


def array_of_much(draw: random.Random) -> bytes:
    """An array whose shape is not that of its bytes."""
    array = np.zeros(4, np.float32)
    content = pickle.dumps({"0.weight": array}, 2)
    return content.replace(b"K\x04\x85", b"J" + (2**30).to_bytes(4, "little") + b"\x85")


def huge_photo(draw: random.Random) -> bytes:
    """A header of 100,000 × 100,000 pixels, and none of them."""
    file = io.BytesIO()
    Image.new("1", (8, 8)).save(file, "bmp")
    content = bytearray(file.getvalue())
    content[18:26] = (100_000).to_bytes(4, "little") * 2
    return bytes(content)


BOMBS: tuple[Callable[[random.Random], bytes], ...] = (
    deflated,
    expanded,
    aliased,
    aliased_blocks,
    nested,
    long,
    array_of_much,
    huge_photo,
)

# --- Programs


class Calls:
    """Unpickles as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def programs(witness: Path) -> list[Any]:
    """Objects that make the file `witness` if they are unpickled as Python does it."""
    statement = f"open({str(witness)!r}, 'w')"
    inner = pickle.dumps(Calls(Path.touch, witness))
    return [
        Calls(os.system, f"touch {witness}"),
        Calls(subprocess.check_call, ["touch", str(witness)]),
        Calls(eval, statement),
        Calls(exec, statement),
        Calls(builtins.open, str(witness), "w"),
        Calls(io.open, str(witness), "w"),
        Calls(os.mkdir, str(witness)),
        Calls(Path.touch, witness),
        Calls(shutil.copy, __file__, str(witness)),
        Calls(runpy.run_path, str(witness)),
        Calls(importlib.import_module, "antigravity"),
        Calls(operator.methodcaller, "touch"),
        Calls(functools.partial, os.system, f"touch {witness}"),
        Calls(torch.storage._load_from_bytes, inner),
        Calls(pickle.loads, inner),
        Calls(np.save, str(witness), 1),
        Calls(torch.save, 1, str(witness)),
        Calls(torch.hub.load, "nobody/nothing", "model"),
        Calls(Tensor.numpy, torch.ones(1)),
    ]


def hostile(draw: random.Random, witness: Path) -> bytes:
    program = draw.choice(programs(witness))
    state = dict(model().state_dict())
    content = draw.choice(
        (
            program,
            {"state_dict": {**state, "a": program}},
            {"state_dict": state, "optimizer": program},
            [state, program],
        )
    )
    return packed(content, draw.choice(CHECKPOINTS[:4]))


# --- All of them


def mutated(number: int, witness: Path) -> File:
    """The file of that number. Kinds follow one another, so that a few numbers have some of each."""
    draw = random.Random(number)
    kind = ("checkpoint", "photo", "program", "checkpoint", "photo", "bomb", "extension", "pyramid")[number % 8]
    if kind == "checkpoint":
        damage = DAMAGE[number // 8 % len(DAMAGE)]
        return File(f"{damage.__name__} checkpoint", ".pth", damage(whole_checkpoint(draw.choice(forms())), draw))
    if kind == "photo":
        damage, suffix = DAMAGE[number // 8 % len(DAMAGE)], draw.choice(PHOTOS)
        return File(f"{damage.__name__} photo", f".{suffix}", damage(whole_photo(suffix), draw))
    if kind == "program":
        return File("hostile pickle", draw.choice((".pth", ".pkl")), hostile(draw, witness))
    if kind == "bomb":
        bomb = BOMBS[number // 8 % len(BOMBS)]
        return File(f"bomb, {bomb.__name__}", ".pth" if bomb is not huge_photo else ".bmp", bomb(draw))
    if kind == "extension":
        content = draw.choice(
            (whole_checkpoint(draw.choice(forms())), whole_photo(draw.choice(PHOTOS)), draw.randbytes(99))
        )
        return File("wrong extension", draw.choice(EXTENSIONS), content)
    damage = DAMAGE[number // 8 % len(DAMAGE)]
    return File(f"{damage.__name__} pyramid", ".pth", damage(whole_pyramid(draw.choice(CHECKPOINTS[:3])), draw))
