"""The state dict in what a checkpoint file holds: wrapped, beside others, or inside a pickled module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fpn.checkpoints.errors import CheckpointError
from fpn.checkpoints.unpickling import Array, StandIn

# What DistributedDataParallel, torch.compile, FSDP and checkpoint_wrapper put between the parts of a name.
WRAPPED = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
AVERAGED = "n_averaged"  # AveragedModel's counter
# Of several models in a file the first of these is taken, else the first in the file: the trained one before the one
# that is averaged from it, and a teacher before its student.
FIRST = ("", "state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights")
LAST = ("teacher", "student", "ema", "model_ema", "state_dict_ema")
PARTS = ("_parameters", "_buffers", "_modules")  # of a pickled module
MODEL_NAMES = ("arch", "model", "model_name", "architecture")
CONTAINERS = (Mapping, list, tuple, StandIn)
DEEPEST = 8  # keys that lead to a container
LONGEST = 200  # characters of such a key: of a hostile one each container under it would have a copy


class Found(NamedTuple):
    """The state dict of a file.

    Attributes:
        key: where it was, such as "checkpoint.model"; empty for the file itself.
        state: names and tensors, without the names of wrappers.
        skipped: what else the file holds, by key and kind.
        told: the model's name, where the file says it.
    """

    key: str
    state: dict[str, Tensor]
    skipped: tuple[str, ...]
    told: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """For a report."""
        place = (f"its state dict is under {self.key!r}",) if self.key else ()
        more = f" and {len(self.skipped) - 5} more" if len(self.skipped) > 5 else ""
        return (*place, *((f"skipped: {', '.join(self.skipped[:5])}{more}",) if self.skipped else ()))


def state_dict_in(content: Any, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a checkpoint's content; see `find_state_dict`."""
    return find_state_dict(content, key).state


def find_state_dict(content: Any, key: str | None = None) -> Found:
    """Names and tensors from what a checkpoint file holds.

    Looked for in dicts and lists one in another, and in pickled modules. NumPy arrays become tensors. Parts of names
    that wrappers of modules add (`module.`, `_orig_mod.`, …), the counter of `AveragedModel`, and entries that are no
    tensors are left out.

    Args:
        key: which of several: the keys that lead to it, with dots between them. Default: the first of "state_dict",
            "model_state_dict", "model_state", "model", "net", "network", "module" and "weights" (the last key counts),
            then another, then "teacher", "student", "ema", "model_ema" and "state_dict_ema".

    Raises:
        CheckpointError: there is no state dict in it, or none under that key; the message lists what there is.
    """
    nodes, above = containers(content)
    found = {path: entries for path, node in nodes.items() if (entries := tensors_of(node))}
    found = {path: entries for path, entries in found.items() if not is_numbered(path, nodes.get(above.get(path, "")))}
    found = {path: entries for path, entries in found.items() if len(entries) >= largest_within(path, found)}
    if not found:
        raise CheckpointError(f"it holds no state dict (a dict of names and tensors); it {listed(content)}")
    if key is None:
        key = min(found, key=lambda path: rank(path.rpartition(".")[2]))
    elif key not in found:
        raise CheckpointError(f"it holds no state dict under {key!r}, but under {', '.join(map(repr, found))}")
    others = [f"{path} (a state dict)" for path in found if path != key]
    beside = (
        [] if is_module(nodes[key]) else [(name, value) for name, value in items(nodes[key]) if name not in found[key]]
    )
    inner = key
    while inner in above:
        outer = above[inner]
        beside += [(name, value) for name, value in items(nodes[outer]) if value is not nodes[inner]]
        inner = outer
    skipped = [entry(name, value) for name, value in beside if str(name) not in found]
    return Found(key, named(found[key]), (*others, *skipped), name_told(beside))


def name_told(beside: list[tuple[Any, Any]]) -> str | None:
    """The model's name as timm's and torchvision's scripts save it: an entry, or one of the options."""
    for name, value in beside:
        options = dict(items(value)) if isinstance(value, Mapping | StandIn) else {}
        for told in (value if name in MODEL_NAMES else None, *(options.get(word) for word in MODEL_NAMES)):
            if isinstance(told, str):
                return told
    return None


def largest_within(path: str, found: Mapping[str, Mapping[str, Any]]) -> int:
    """Of state dicts in that one: a dict that has one beside a few tensors of its own is no state dict."""
    inner = f"{path}." if path else ""
    return max(
        (len(entries) for other, entries in found.items() if other != path and other.startswith(inner)), default=0
    )


def rank(name: str) -> int:
    if name in FIRST:
        return FIRST.index(name)
    return len(FIRST) + (1 + LAST.index(name) if name in LAST else 0)


def containers(content: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Every container in the content by the keys that lead to it, and of each key that of the container around it.

    A container is looked at once. Pickled modules are not looked into.
    """
    nodes: dict[str, Any] = {}
    above: dict[str, str] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, Any, str | None]] = [("", content, None)]
    while waiting:
        path, node, outer = waiting.pop()
        if id(node) in seen or not isinstance(node, CONTAINERS):
            continue
        seen.add(id(node))
        nodes[path] = node
        if outer is not None:
            above[path] = outer
        if path.count(".") < DEEPEST and not is_module(node):
            inner = [(str(name), value) for name, value in items(node) if isinstance(value, CONTAINERS)]
            waiting += [(f"{path}.{name}".lstrip("."), value, path) for name, value in inner if len(name) <= LONGEST][
                ::-1
            ]
    return nodes, above


def items(node: Any) -> list[tuple[Any, Any]]:
    """What a container holds, by key or number."""
    if isinstance(node, Mapping):
        return list(node.items())
    if isinstance(node, list | tuple):
        return list(enumerate(node))
    state = node.state.items() if isinstance(node.state, dict) else ()
    return [*state, *node.items.items(), *enumerate(node.elements)]


def tensors_of(node: Any) -> dict[str, Any]:
    """The entries of a dict, or of a pickled module, that are tensors or arrays of numbers."""
    if is_module(node):
        return dict(of_module(node))
    if isinstance(node, list | tuple):
        return {}
    return {name: value for name, value in items(node) if isinstance(name, str) and is_numbers(value)}


def is_numbers(value: Any) -> bool:
    if isinstance(value, Array):
        value = value.array
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc")


def is_module(node: Any) -> bool:
    return isinstance(node, StandIn) and isinstance(node.state, dict) and all(part in node.state for part in PARTS)


def of_module(module: StandIn) -> Iterator[tuple[str, Any]]:
    """A pickled module's state dict."""
    seen: set[int] = set()
    waiting = [("", module)]
    while waiting:
        prefix, node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        parameters, buffers, modules = (as_mapping(node.state[part]) for part in PARTS)
        unsaved = node.state.get("_non_persistent_buffers_set")
        for name, value in (*parameters.items(), *buffers.items()):
            if is_numbers(value) and not (isinstance(unsaved, list) and name in unsaved):
                yield f"{prefix}{name}", value
        waiting += [(f"{prefix}{name}.", child) for name, child in modules.items() if is_module(child)][::-1]


def as_mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else value.items if isinstance(value, StandIn) else {}


def is_numbered(path: str, outer: Any) -> bool:
    """Whether a dict has it under a number, as an optimizer has what it keeps of a parameter."""
    return isinstance(outer, Mapping) and path.rpartition(".")[2].isdecimal()


def named(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, value in entries.items():
        name = WRAPPED.sub("", name)
        if name in state:
            raise CheckpointError(f"two of its entries are {name} once the names of wrappers are taken out")
        state[name] = as_tensor(value)
    if len(state) > 1:
        state.pop(AVERAGED, None)
    return state


def as_tensor(value: Any) -> Tensor:
    value = value.array if isinstance(value, Array) else value
    if isinstance(value, Tensor):
        return value.detach()
    return torch.from_numpy(np.array(value, value.dtype.newbyteorder("="), order="C"))


def entry(name: Any, value: Any) -> str:
    return f"{str(name)[:LONGEST]} ({kind_of(value)[:LONGEST]})"


def kind_of(node: Any) -> str:
    return node.name if isinstance(node, StandIn) else type(node).__name__


def listed(content: Any) -> str:
    """What a file without a state dict holds."""
    if not isinstance(content, Mapping) or not content:
        return f"is {kind_of(content)}" if content else f"is an empty {kind_of(content)}"
    kinds = [entry(name, value) for name, value in content.items()]
    return f"holds {', '.join(kinds[:5])}" + (f" and {len(kinds) - 5} more" if len(kinds) > 5 else "")
