"""Whether a compiler, an exporter or a transform records what a model computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# torch 2.6 has no such function; its torch.export runs under a mode.
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", is_in_torch_dispatch_mode)


def is_exported() -> bool:
    """Whether the model is being exported or traced, or transformed by `torch.func`."""
    if torch.compiler.is_compiling():
        return is_exporting()  # else it is torch.compile, for this machine
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_recorded() -> bool:
    """The same, or a dispatch mode that sees every operator is active."""
    if torch.compiler.is_compiling():
        return is_exporting()
    return is_exported() or is_in_torch_dispatch_mode()


def is_traced() -> bool:
    """Whether the model is recorded, compiled, transformed or differentiated in forward mode."""
    return torch.compiler.is_compiling() or is_recorded() or forward_ad._current_level >= 0
