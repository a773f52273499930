"""Checkpoint files: a state dict out of a `.pth`, `.pkl` or `.safetensors` file, without running code from it."""

from __future__ import annotations

import gzip
import mmap
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from fpn.checkpoints.content import Found, find_state_dict
from fpn.checkpoints.errors import CheckpointError
from fpn.checkpoints.unpickling import INERT, Unpickler

LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6 begins with a pickled magic number
ZIP = b"PK\x03\x04"
SHARED_BY = 16  # entries; detectors' heads share a convolution between five levels
SAFETENSORS_HEADER = 100_000_000  # bytes, the format's own limit
# What is no checkpoint of PyTorch's, by how it begins, and what to do.
OTHERS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself: run `git lfs pull`",
    b"<!DOCTYPE": "a page of HTML, not a checkpoint: the download needs another address, or a login",
    b"<html": "a page of HTML, not a checkpoint: the download needs another address, or a login",
    b"\x1f\x8b": "compressed by gzip: unpack it first (`gunzip`)",
    b"GGUF": "a GGUF file; its weights are quantized for llama.cpp",
    b"\x89HDF": "an HDF5 file, as Keras writes them",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"{": "JSON, such as the index of a sharded checkpoint: give one of the files that it names",
}


def read_checkpoint(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU; no code in the file is run.

    Formats, recognised by content: what `torch.save` writes, new and old, state dicts, training checkpoints and whole
    modules; pickles of arrays and tensors, as detectron2's model zoo has them; safetensors (with the package of that
    name). Objects of other classes, such as options and optimizers, are skipped: their classes are neither imported nor
    called.

    Args:
        key: which of several state dicts, by the keys that lead to it: "model_ema". Default: the trained model; see
            `fpn.checkpoints.content.find_state_dict`.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the file is safetensors, and the package `safetensors` is not installed.
        CheckpointError: the file is damaged, of another format, or holds no state dict; the message says what it holds.
    """
    return read_file(path, key).state


def read_file(path: str | Path, key: str | None = None) -> Found:
    """`read_checkpoint`, with where the state dict was and what else is in the file."""
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"cannot read the checkpoint {path}: it is a folder; give one of its files")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        found = find_state_dict(load_content(path), key)
    except CheckpointError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from error
    check_sizes(path, found.state)
    # torch's files are mapped: a file that is written to later must not change the weights.
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.state.items()}
    return found._replace(state=copies)


def check_sizes(path: Path, state: dict[str, Tensor]) -> None:
    """Whether tensors are as large as they claim."""
    stored = {}  # bytes, by address
    for name, tensor in state.items():
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            address, own = storage.data_ptr(), storage.nbytes()
        else:
            address, own = 0, 0
        if byte_size(tensor) > own:  # strides of 0: a few bytes that would fill the memory
            raise CheckpointError(f"{path}: {name} claims shape {tuple(tensor.shape)}, but stores {own} bytes")
        stored[address] = own
    if sum(map(byte_size, state.values())) > SHARED_BY * sum(stored.values()):  # the same few bytes, many times over
        raise CheckpointError(f"{path}: its {len(state)} entries share {sum(stored.values())} bytes")


def byte_size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def load_content(path: Path) -> Any:
    """What the file holds, whatever it is."""
    with path.open("rb") as file:
        head = file.read(32)
        if not head:
            raise CheckpointError("it is empty")
        if head.startswith(ZIP):
            refuse_archives(path)
            return load_torch(path, mapped=True)
        if head.startswith(LEGACY_TORCH):
            refuse_tar(path)
            return load_torch(path, mapped=False)
        if is_safetensors(head):
            return load_safetensors(path)
        for start, what in OTHERS.items():
            if head.startswith(start):
                raise CheckpointError(f"it is {what}")
        return load_pickle(file)


def load_torch(path: Path, mapped: bool) -> Any:
    """What `torch.save` wrote."""
    try:
        return torch.load(path, map_location="cpu", pickle_module=INERT, weights_only=False, mmap=mapped)
    except Exception as error:  # bytes that are no checkpoint fail in any way there is
        fail(error)


def fail(error: Exception) -> NoReturn:
    """Raises a CheckpointError for `error`."""
    if isinstance(error, CheckpointError):
        raise error
    cause = str(error).strip().partition("\n")[0]
    raise CheckpointError(f"damaged, or of no format that is known ({type(error).__name__}: {cause})") from error


def refuse_archives(path: Path) -> None:
    """Refuses TorchScript, which is a program, and archives that torch never writes: their entries are compressed, or
    overlap, and could fill the memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        fail(error)
    if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
        raise CheckpointError(
            "it is a TorchScript archive, which is a program; load it by torch.jit.load and save its state_dict()"
        )
    if not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        raise CheckpointError("it is a ZIP archive that torch.save did not write: unpack it first")
    if unpacked > path.stat().st_size:
        raise CheckpointError(f"its {path.stat().st_size} bytes unpack to {unpacked}, which no file of torch's does")


def refuse_tar(path: Path) -> None:
    """Refuses what torch.load would unpack into a folder: a file may be both."""
    try:
        tarfile.open(path, mode="r:").close()
    except (tarfile.TarError, OSError, ValueError, gzip.BadGzipFile):
        return
    raise CheckpointError("it is a tar archive: unpack it first")


def is_safetensors(head: bytes) -> bool:
    """Eight bytes of the header's length, little-endian, and the header, a JSON object."""
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= SAFETENSORS_HEADER


def load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path} is a safetensors file: pip install safetensors to read it") from error
    try:
        content: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        fail(error)
    return content


def load_pickle(file: BinaryIO) -> Any:
    """What a plain pickle holds."""
    try:
        # Mapped, so that what a hostile length asks for ends where the file ends.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return Unpickler(mapped, encoding="latin1").load()
    except Exception as error:  # as above
        fail(error)
