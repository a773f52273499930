"""A convolution in its inference form, with what follows it: batch norm, an addition, an activation."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fpn._activation import RELU, Activation
from fpn._tracing import is_recorded, is_traced
from fpn.inference import winograd

if TYPE_CHECKING:
    from typing_extensions import Self


class FusedConv2d(nn.Module):
    """activation(conv(x) + addend), with the batch norm that followed the convolution folded into it.

    Its weight is contiguous, whatever layout the module is asked to take: it is what an exported program holds.

    On the CPU, where no gradient is recorded and nothing is traced, the weights are prepared once. A change in place
    that PyTorch does not count is not seen there: one through `.data`, or of an inference tensor but by
    `load_state_dict`.

    Args:
        conv: the convolution; its options, dtype and device are kept.
        norm: the batch norm after it; None where there is none.
        activation: what comes last; None where nothing does.

    Raises:
        ValueError: with the norm in it, the weights are larger than their dtype can hold.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None = None, activation: Activation | None = None) -> None:
        super().__init__()
        self.conv = conv if norm is None else fold(conv, norm)
        self.activation = activation
        self.prepared: dict[object, Prepared] = {}
        make_contiguous(self.conv)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"prepared": {}}  # in layouts that can be neither copied nor saved

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.prepared.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        make_contiguous(self.conv)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        self.prepared.clear()
        unfused = f"{prefix}weight" in state_dict or f"{prefix}0.weight" in state_dict
        if f"{prefix}conv.weight" not in state_dict and (strict or unfused):
            note_once(LOAD_BEFORE_FUSING, lists[-1])
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)

    def forward(self, x: Tensor, addend: Tensor | None = None, overwrite: bool = False) -> Tensor:
        """The map, in channels_last memory; where it is recorded for elsewhere, in the layout that the operators give.

        Args:
            x: Tensor[N, in_channels, H, W].
            addend: of the output's shape.
            overwrite: whether the memory of `addend` may be used for the output.
        """
        if type(x) is not Tensor or is_recorded() or x.dim() != 4:
            return self.plain(x, addend)
        x = x.contiguous(memory_format=torch.channels_last)
        dtype = autocast_dtype(x)
        if not fits(self.conv, x, addend, dtype) or not one_pass_works(working_dtype(dtype)):
            return self.plain(x, addend)
        x = x.to(working_dtype(dtype))
        bias = None if self.conv.bias is None else self.conv.bias.to(x.dtype)
        if addend is not None:
            given = addend
            # oneDNN adds in the layout of its output. In another one half precision fails.
            addend = given.to(x.dtype).contiguous(memory_format=torch.channels_last)
            overwrite = overwrite or addend is not given
        if winograd.serves(self.conv, x):
            y = winograd.conv2d(x, self.weight_for(x, winograd.transform), bias, addend, self.activation)
        else:
            if addend is not None and not overwrite:
                addend = addend.clone()
            y = one_pass(self.conv, x, self.weight_for(x, pack), bias, addend, self.activation)
        return y.to(dtype)

    def plain(self, x: Tensor, addend: Tensor | None) -> Tensor:
        """The same by PyTorch's documented operators, none of which writes into anything."""
        y = cast(Tensor, self.conv(x))
        if addend is not None:
            total = y + addend
            y = total if isinstance(x, Proxy) or total.dtype == y.dtype else total.to(y.dtype)
        return y if self.activation is None else self.activation(y)

    def weight_for(self, x: Tensor, prepare: Callable[[nn.Conv2d, Tensor], Tensor]) -> Tensor:
        """The weight as `prepare` makes it, for the first map of each dtype and once for all."""
        weight = self.conv.weight
        version = None if weight.is_inference() else weight._version
        kept = self.prepared.get((prepare, x.dtype))  # other threads may replace it meanwhile
        if kept is None or kept.source.data_ptr() != weight.data_ptr() or kept.version != version:
            kept = self.prepared[prepare, x.dtype] = Prepared(weight.detach(), version, prepare(self.conv, x))
        return kept.weight


LOAD_BEFORE_FUSING = (
    "this model is fused, and the state dict is of one that is not: load it before fuse() or accelerate(fuse=True)"
)


def note_once(message: str, messages: list[str]) -> None:
    if message not in messages:
        messages.append(message)


class Prepared(NamedTuple):
    """A weight in the form in which it is used, and what it was made of, which keeps its address from being reused."""

    source: Tensor
    version: int | None
    weight: Tensor


def fold(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """norm(conv(x)) as one new convolution; its weights are computed in float64 and rounded once."""
    device, dtype = conv.weight.device, conv.weight.dtype
    wide_conv, wide_norm = (copy.deepcopy(module).cpu().double() for module in (conv, norm))
    wide = fuse_conv_bn_eval(cast(nn.Conv2d, wide_conv), cast(nn.BatchNorm2d, wide_norm))
    folded = wide.to(device, dtype).requires_grad_(False)
    if not all(parameter.isfinite().all() for parameter in folded.parameters()):
        raise ValueError(f"folded into the convolution, its scale and shift are more than {dtype} can hold")
    return folded


def make_contiguous(conv: nn.Conv2d) -> None:
    """Puts the weight in order in memory, the strides of dimensions of size 1 too, which some runtimes read."""
    weight, requires_grad = conv.weight, conv.weight.requires_grad
    if weight.stride() != torch.empty(weight.shape, device="meta").stride():
        conv.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad)


def pack(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The weight of `conv` in the layout that oneDNN works in, and would else bring it to in every call.

    Nobody else knows that layout. It is the best for maps of the shape of `x`; for others oneDNN may change it again.
    """
    options = (conv.padding, conv.stride, conv.dilation, conv.groups, list(x.shape))
    return cast(Tensor, torch.ops.mkldnn._reorder_convolution_weight(conv.weight.to(x.dtype), *options))


def one_pass(
    conv: nn.Conv2d,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    addend: Tensor | None,
    activation: Activation | None,
) -> Tensor:
    """activation(conv(x) + addend), in the memory of `addend`: oneDNN adds and clamps what is still in the cache.

    torch.compile turns the pattern into these same operators. They are not documented; hence `one_pass_works`. After an
    addition they have no activation but ReLU.

    Args:
        conv: for its options.
        weight: as `pack` gives it.
    """
    options = (weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups)
    if addend is not None:
        last = "relu" if activation == RELU else None
        y = torch.ops.mkldnn._convolution_pointwise_.binary(addend, x, *options, "add", 1.0, last, [], None)
        return cast(Tensor, y if activation in (None, RELU) else activation.apply_(y))
    if activation is None or not is_post_operation(activation, x.dtype):
        y = torch.ops.mkldnn._convolution_pointwise(x, *options, "none", [], "")
        return cast(Tensor, y if activation is None else activation.apply_(y))
    return cast(Tensor, torch.ops.mkldnn._convolution_pointwise(x, *options, *activation_arguments(activation)))


def activation_arguments(activation: Activation) -> tuple[str, list[float], str]:
    return activation.name, list(activation.scalars), activation.algorithm


def fits(conv: nn.Conv2d, x: Tensor, addend: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether operators that have no gradient and cannot be recorded may do it, for `x` taken in `dtype`."""
    if is_traced() or not all(type(tensor) in (Tensor, nn.Parameter) for tensor in (x, conv.weight)):
        return False
    if torch.is_grad_enabled():
        taking_part = (x, *conv.parameters()) if addend is None else (x, addend, *conv.parameters())
        if any(tensor.requires_grad for tensor in taking_part):
            return False
    # A 1×1 map has no layout, and without channels_last oneDNN's bfloat16 takes a path that fails.
    if x.device.type != "cpu" or x.numel() == 0 or x.shape[2:].numel() == 1:
        return False
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    return torch.is_autocast_enabled("cpu") or conv.weight.dtype == dtype


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution on the CPU takes `x`."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


@cache
def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where this processor has no instructions for products of that dtype.

    Without them oneDNN converts what it reads again and again, and takes three times as long as for float32.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return dtype
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        return torch.float32
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return torch.float32
    return dtype


@cache
def one_pass_works(dtype: torch.dtype) -> bool:
    """Whether this torch has `one_pass` for that dtype on this processor, and it computes what it should."""
    uses = (
        (False, None, [-2, 0, 1, 3]),
        (False, RELU, [0, 0, 1, 3]),
        (True, RELU, [0, 0, 1, 5]),
        (True, None, [-5, -1, 1, 5]),
    )
    with torch.inference_mode():
        conv, x, bias = sample(dtype)
        try:
            weight = pack(conv, x)
            return all(
                one_pass(conv, x, weight, bias, x.clone() if added else None, activation)[0, 1].flatten().tolist() == y
                for added, activation, y in uses
            )
        except (AttributeError, RuntimeError):
            return False


@cache
def is_post_operation(activation: Activation, dtype: torch.dtype) -> bool:
    """Whether oneDNN applies that activation to a convolution in that dtype, and computes what it should."""
    if activation == RELU:
        return True  # `one_pass_works` has tried it
    with torch.inference_mode():
        conv, x, bias = sample(dtype)
        options = (pack(conv, x), bias, conv.padding, conv.stride, conv.dilation, conv.groups)
        try:
            y = torch.ops.mkldnn._convolution_pointwise(x, *options, *activation_arguments(activation))
        except RuntimeError:
            return False
        expected = activation((x + 1).double())
        return bool(torch.allclose(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps))


def sample(dtype: torch.dtype) -> tuple[nn.Conv2d, Tensor, Tensor]:
    """A convolution by the identity, its input -3, -1, 0 and 2, and its bias of 1."""
    conv = nn.Conv2d(2, 2, 1, device="meta")
    conv.weight = nn.Parameter(torch.eye(2, dtype=dtype, device="cpu")[:, :, None, None])
    x = torch.tensor([-3.0, -1.0, 0.0, 2.0], dtype=dtype, device="cpu").reshape(1, 1, 2, 2).expand(1, 2, 2, 2)
    return conv, x.contiguous(memory_format=torch.channels_last), torch.ones(2, dtype=dtype, device="cpu")
