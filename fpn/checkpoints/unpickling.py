"""Pickles without code: what a pickle names is neither imported nor called.

Tensors, NumPy arrays and plain containers come out as they are. In place of every other object stands a `StandIn`. It
holds what was pickled, and can do nothing.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from fpn.checkpoints.errors import CheckpointError

# Of a dict; hashing others, tuples of tuples, could take forever.
KEYS = (str, int, float, bool, bytes, type(None))


class Global:
    """Stands for a class or a function: a name, and what is done here where the pickle calls it."""

    __slots__ = ("function", "name")

    def __init__(self, module: str, name: str) -> None:
        self.name = f"{module}.{name}"
        self.function = FUNCTIONS.get(self.name)

    def __call__(self, *args: Any) -> Any:
        return StandIn(self.name) if self.function is None else self.function(*args)


class StandIn:
    """An object of a class that is not known here.

    Attributes:
        name: of the class, or of the function that would have made it.
        state: what its attributes were set from.
        items: what it holds as a dict.
        elements: what it holds as a list.
    """

    __slots__ = ("elements", "items", "name", "state")

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Any = None
        self.items: dict[Any, Any] = {}
        self.elements: list[Any] = []


class Array:
    """Stands for `numpy.ndarray`: the array is made from its bytes, never by code of NumPy's that trusts a pickle."""

    def __init__(self) -> None:
        self.array: np.ndarray[Any, Any] | None = None  # of objects, and the like: none

    def set_state(self, state: tuple[int, tuple[int, ...], Any, bool, bytes | str]) -> None:
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, DType) or not isinstance(content, bytes | str):
            return
        content = content.encode("latin1") if isinstance(content, str) else content  # from Python 2
        self.array = np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if fortran else "C")


class DType:
    """Stands for a numeric `numpy.dtype`."""

    def __init__(self, code: str) -> None:
        self.dtype = np.dtype(code)

    def set_state(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


def dtype(code: Any, align: bool = False, copy: bool = False) -> Any:
    numeric = isinstance(code, str) and re.fullmatch(r"[<>|=]?[biufc?]\d{0,2}", code)
    return DType(code) if numeric else StandIn("numpy.dtype")


def reconstruct(kind: Any, shape: Any, code: Any) -> Array:
    """`numpy._core.multiarray._reconstruct`: the empty array that gets its state afterwards."""
    return Array()


def from_buffer(content: Any, dtype: Any, shape: tuple[int, ...], order: str) -> Array:
    """`numpy._core.numeric._frombuffer`."""
    made = Array()
    made.set_state((1, shape, dtype, order == "F", bytes(content)))
    return made


def scalar(dtype: Any, content: Any = b"") -> Any:
    """`numpy._core.multiarray.scalar`."""
    if not isinstance(dtype, DType) or not isinstance(content, bytes | str):
        return StandIn("numpy.generic")
    return np.frombuffer(content.encode("latin1") if isinstance(content, str) else content, dtype.dtype)[0]


def encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode`, by which Python 3 writes bytes for Python 2."""
    return text.encode("latin1")


def tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`, which would make a storage larger that is too small."""
    elements = storage._untyped_storage.nbytes() // max(storage.dtype.itemsize, 1)
    last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= elements):
        raise CheckpointError(f"a tensor of shape {tuple(size)} is beyond its {elements} stored numbers")
    return cast(Tensor, _rebuild_tensor_v2(storage, offset, size, stride, False, {}))  # type: ignore[no-untyped-call]


def parameter(data: Any, *rest: Any) -> Any:
    """`torch._utils._rebuild_parameter`: the values."""
    return data


def from_type(function: Any, kind: Any, args: tuple[Any, ...], state: Any = None) -> Any:
    """`torch._tensor._rebuild_from_type_v2`, of a subclass of Tensor: the tensor."""
    return function(*args) if isinstance(function, Global) else StandIn(str(kind))


def module(kind: Any, *rest: Any) -> StandIn:
    """`copyreg._reconstructor`, by which protocols 0 and 1 make any object."""
    return StandIn(kind.name if isinstance(kind, Global) else "an object")


def load_storage(content: bytes) -> Any:
    """`torch.storage._load_from_bytes`, which itself would unpickle anything."""
    return torch.load(io.BytesIO(content), map_location="cpu", pickle_module=INERT, weights_only=False)


def as_dict(items: Any = ()) -> dict[Any, Any]:
    """A dict of pairs, or of a dict."""
    pairs = items.items() if isinstance(items, dict) else items
    return {key: value for key, value in pairs if isinstance(key, KEYS)}


def default_dict(factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    return as_dict(items)


def as_list(items: Iterable[Any] = ()) -> list[Any]:
    """For sets too: what is in one would have to be hashed."""
    return list(items)


def as_tuple(items: Iterable[Any] = ()) -> tuple[Any, ...]:
    return tuple(items)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": encode,
    "collections.OrderedDict": as_dict,
    "collections.defaultdict": default_dict,
    "copyreg._reconstructor": module,
    "copy_reg._reconstructor": module,
    "numpy.dtype": dtype,
    "torch.Size": as_tuple,
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_parameter": parameter,
    "torch._utils._rebuild_parameter_with_state": parameter,
    "torch._tensor._rebuild_from_type_v2": from_type,
    "torch.storage._load_from_bytes": load_storage,
}
for builtins in ("builtins", "__builtin__"):  # of Python 3 and 2
    FUNCTIONS |= {f"{builtins}.set": as_list, f"{builtins}.frozenset": as_list, f"{builtins}.list": as_list}
    FUNCTIONS |= {f"{builtins}.dict": as_dict, f"{builtins}.tuple": as_tuple}
for core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    FUNCTIONS |= {f"{core}.multiarray._reconstruct": reconstruct, f"{core}.multiarray.scalar": scalar}
    FUNCTIONS[f"{core}.numeric._frombuffer"] = from_buffer


def made(what: Any, args: Any) -> Any:
    """What a call in a pickle gives: `what` is called if it is a `Global`, and nothing else is."""
    if isinstance(what, Global):
        return what(*args)
    return StandIn(what.name if isinstance(what, StandIn) else type(what).__name__)


class Unpickler(pickle._Unpickler):  # the one in Python: its memo takes no memory for indices not used
    """Every opcode that would import, call, hash or set an attribute does what this module says."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)
    _storage_of: Callable[[Any], Any] = staticmethod(lambda pid: StandIn("a persistent object"))

    def find_class(self, module: str, name: str) -> Any:
        return Global(module, name)

    @property
    def persistent_load(self) -> Callable[[Any], Any]:
        """torch.load sets its own, for storages; a plain pickle has none."""

        def load(pid: Any) -> Any:
            # Before 1.6 a module came with its source, which torch would compare with that of the class.
            if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":
                return pid[1]
            return self._storage_of(pid)

        return load

    @persistent_load.setter
    def persistent_load(self, load: Callable[[Any], Any]) -> None:
        self._storage_of = load

    def get_extension(self, code: int) -> None:
        raise CheckpointError(f"it names an object by the number {code}, which means nothing outside of the program")

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = made(self.stack[-1], args)

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = made(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keywords
        self.load_newobj()

    def _instantiate(self, kind: Any, args: Any) -> None:
        self.append(made(kind, args))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Array | DType):
            target.set_state(state)
        elif isinstance(target, StandIn):
            target.state = state

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        put(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        pairs = self.pop_mark()
        put(self.stack[-1], pairs)

    def load_dict(self) -> None:
        pairs = self.pop_mark()
        self.append({})
        put(self.stack[-1], pairs)

    def load_append(self) -> None:
        value = self.stack.pop()
        extend(self.stack[-1], [value])

    def load_appends(self) -> None:
        values = self.pop_mark()
        extend(self.stack[-1], values)

    def load_empty_set(self) -> None:
        self.append([])

    def load_frozenset(self) -> None:
        items = self.pop_mark()
        self.append(items)

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.EMPTY_SET[0]: load_empty_set,
        pickle.ADDITEMS[0]: load_appends,
        pickle.FROZENSET[0]: load_frozenset,
    }


def put(target: Any, pairs: list[Any]) -> None:
    items = target.items if isinstance(target, StandIn) else target
    if isinstance(items, dict):
        items.update((key, value) for key, value in zip(pairs[::2], pairs[1::2], strict=True) if isinstance(key, KEYS))


def extend(target: Any, values: list[Any]) -> None:
    elements = target.elements if isinstance(target, StandIn) else target
    if isinstance(elements, list):
        elements.extend(values)


class INERT:
    """What torch.load takes as a pickle module."""

    __name__ = __name__
    Unpickler = Unpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()
