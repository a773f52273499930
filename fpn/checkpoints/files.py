"""Checkpoint files: a state dict out of a `.pth`, `.pkl` or `.safetensors` file, without running code from it."""

from __future__ import annotations

import io
import mmap
import pickle
import re
import struct
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

WRAPPERS = ("state_dict", "model", "model_state_dict")  # under which training loops put a state dict
# What DistributedDataParallel, torch.compile, FSDP and checkpoint_wrapper put between the parts of a name.
WRAPPED = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6 begins with a pickled magic number
SHARED_BY = 16  # entries; detectors' heads share a convolution between five levels
SAFETENSORS_HEADER = 100_000_000  # bytes, the format's own limit

# What torch's unpickler allows is one list for all threads, and `load_torch` lengthens it for a moment. Reentrant: a
# file may hold another.
_torch_load = threading.RLock()


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model. The model is as it was."""


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU; no code in the file is run.

    Formats, recognised by content: what `torch.save` writes, new and old (read with `weights_only`); pickles of arrays
    and tensors in plain containers, as detectron2's model zoo has them; safetensors (with the package of that name).
    See `state_dict_in` for what is taken out of the content.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the file is safetensors, and the package `safetensors` is not installed.
        CheckpointError: the file is damaged, names a global that is not allowed, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        state = state_dict_in(load_content(path))
    except CheckpointError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from error
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
    return state


def byte_size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def state_dict_in(content: Any) -> dict[str, Tensor]:
    """Names and tensors from what a checkpoint file holds.

    A state dict under "state_dict", "model" or "model_state_dict" is taken. NumPy arrays become tensors. Parts of names
    that wrappers of modules add (`module.`, `_orig_mod.`, …) are removed.

    Raises:
        CheckpointError: there is no state dict in it.
    """
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(name, str) for name in content):
        raise CheckpointError("it holds no state dict (a dict of names and tensors)")
    state = {}
    for name, value in content.items():
        name = WRAPPED.sub("", name)
        if name in state:
            raise CheckpointError(f"two of its entries are {name} once the names of wrappers are taken out")
        state[name] = as_tensor(name, value)
    return state


def as_tensor(name: str, value: Any) -> Tensor:
    value = value.array if isinstance(value, Array) else value
    if isinstance(value, np.ndarray | np.generic):
        try:
            return torch.from_numpy(np.array(value, value.dtype.newbyteorder("="), order="C"))
        except TypeError as error:  # text, objects, structs
            raise CheckpointError(f"it holds no state dict: {name} is an array of {value.dtype}") from error
    if not isinstance(value, Tensor):
        raise CheckpointError(f"it holds no state dict (a dict of names and tensors): {name} is {type(value).__name__}")
    return value


def load_content(path: Path) -> Any:
    """What the file holds, whatever it is."""
    with path.open("rb") as file:
        head = file.read(len(LEGACY_TORCH))
        if head.startswith(b"PK\x03\x04"):
            refuse_inflation(path)
        if head.startswith((b"PK\x03\x04", LEGACY_TORCH)):
            return load_torch(path)
        if is_safetensors(head):
            return load_safetensors(path)
        return load_pickle(file)


def load_torch(file: Path | BinaryIO) -> Any:
    """What `torch.save` wrote, by torch's own restricted unpickler."""
    with _torch_load:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # bytes that are no checkpoint fail in any way there is
            if refused_global(error) not in ALLOWED:
                fail(error)
        # Arrays, and mmengine's records of losses. Only for this retry: the program's own torch.load, in another
        # thread, would see the stand-ins as well.
        try:
            with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in ALLOWED.items()]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            fail(error)


def refused_global(error: Exception) -> str:
    """The name that torch's unpickler refused; empty where it failed for another reason."""
    found = re.search(r"GLOBAL ([\w.]*\w)", str(error))
    return found[1] if found else ""


def fail(error: Exception) -> NoReturn:
    """Raises a CheckpointError for `error`."""
    if isinstance(error, CheckpointError):
        raise error
    if name := refused_global(error):
        refuse(name, error)
    # torch puts the cause last, after the advice to run whatever is in the file.
    cause = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
    raise CheckpointError(f"damaged, or of no format that is known ({type(error).__name__}: {cause})") from error


def refuse_inflation(path: Path) -> None:
    """Refuses compressed or overlapping entries, which torch never writes and which could fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        fail(error)
    if unpacked > path.stat().st_size:
        raise CheckpointError(f"its {path.stat().st_size} bytes unpack to {unpacked}, which no file of torch's does")


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
    """What a plain pickle holds, tensors, arrays and plain containers only."""
    try:
        # Mapped, so that what a hostile length asks for ends where the file ends.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return RestrictedUnpickler(mapped, encoding="latin1").load()
    except Exception as error:  # the cause, as above
        fail(error)


def refuse(name: str, cause: Exception | None = None) -> NoReturn:
    raise CheckpointError(
        f"refused, and nothing of it was run: it calls for {name}, and a checkpoint may hold only tensors, arrays and "
        "plain containers"
    ) from cause


class DType:
    """Stands for `numpy.dtype` while unpickling."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not re.fullmatch(r"[<>|=]?[biufc?]\d{0,2}", code):
            refuse(f"an array of {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """Stands for `numpy.ndarray`: the array is made from its bytes, never by code of NumPy's that trusts a pickle."""

    def __init__(self) -> None:
        self.array: np.ndarray[Any, Any] = np.empty(0)

    def __setstate__(self, state: tuple[int, tuple[int, ...], DType, bool, bytes | str]) -> None:
        _, shape, dtype, fortran, content = state
        content = content.encode("latin1") if isinstance(content, str) else content  # from Python 2
        self.array = np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if fortran else "C")

    @classmethod
    def from_buffer(cls, content: bytes, dtype: DType, shape: tuple[int, ...], order: str) -> Array:
        made = cls()
        made.__setstate__((1, shape, dtype, order == "F", content))
        return made


def reconstruct(kind: type, shape: tuple[int, ...], code: bytes) -> Array:
    """`numpy._core.multiarray._reconstruct`: the empty array that gets its state afterwards."""
    return Array()


def scalar(dtype: DType, content: bytes | str) -> Any:
    """`numpy._core.multiarray.scalar`."""
    return np.frombuffer(content.encode("latin1") if isinstance(content, str) else content, dtype.dtype)[0]


def load_storage(content: bytes) -> Any:
    """`torch.storage._load_from_bytes`, which itself would unpickle anything."""
    return load_torch(io.BytesIO(content))


def ordered_dict(items: Any = ()) -> dict[Any, Any]:
    return dict(items)


class HistoryBuffer:
    """Stands for mmengine's record of a loss, which its training checkpoints contain; it keeps nothing."""

    def __setstate__(self, state: Any) -> None:
        pass


def method_of_history_buffer(owner: Any, name: str) -> str:
    """`getattr`, by which those records name their methods; of anything else it is refused."""
    if owner is not HistoryBuffer:
        refuse("getattr")
    return name


def encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode`, by which Python 3 writes bytes for Python 2."""
    return text.encode("latin1")


ALLOWED: dict[str, Callable[..., Any]] = {
    "_codecs.encode": encode,
    "builtins.getattr": method_of_history_buffer,
    "mmengine.logging.history_buffer.HistoryBuffer": HistoryBuffer,
    "collections.OrderedDict": ordered_dict,
    "numpy.dtype": DType,
    "numpy.ndarray": Array,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch.storage._load_from_bytes": load_storage,
}
for core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    ALLOWED[f"{core}.multiarray._reconstruct"] = reconstruct
    ALLOWED[f"{core}.multiarray.scalar"] = scalar
    ALLOWED[f"{core}.numeric._frombuffer"] = Array.from_buffer


class RestrictedUnpickler(pickle._Unpickler):  # the one in Python: its memo takes no memory for indices not used
    """Unpickles tensors, arrays and plain containers; anything else is refused before it is looked up."""

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        allowed = ALLOWED.get(f"{module}.{name}")
        if allowed is None:
            refuse(f"{module}.{name}")
        return allowed

    def load_build(self) -> None:
        """Sets state on the stand-ins only; on other objects it could change functions and classes."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Array | DType | HistoryBuffer):
            self.stack[-1].__setstate__(state)
        elif not isinstance(self.stack[-1], dict):  # an OrderedDict's attributes, e.g. _metadata, are left out
            refuse(f"the state of {type(self.stack[-1]).__name__}")

    dispatch[pickle.BUILD[0]] = load_build
