"""The derivatives of the operators, in reverse and forward mode, to any order."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

if TYPE_CHECKING:
    from roi._operators import Family

Operator = Callable[..., Any]


class Pair(NamedTuple):
    """An operator that is linear in its maps, and its adjoint: each is the other's gradient.

    Attributes:
        tensors: how many tensors each takes besides the maps or their gradient.
        forward: (maps, tensors, options, backend) -> Tensor[K, C, h, w].
        adjoint: (grad, tensors, options, shape, backend) -> the maps' gradients.
    """

    family: Family
    tensors: int
    forward: Operator
    adjoint: Operator

    def __call__(self, maps: Sequence[Tensor], *rest: Any) -> Tensor:
        """The operator, for whatever transforms of torch.func are active."""
        if torch._C._are_functorch_transforms_active():
            return cast(Tensor, Linear.apply(self, rest[self.tensors :], *rest[: self.tensors], *maps))
        return cast(Tensor, self.forward(self.family.argument(maps), *rest))

    def transposed(self, grad: Tensor, *rest: Any) -> Sequence[Tensor]:
        """The adjoint, for whatever transforms are active: the maps' gradients as a list."""
        if torch._C._are_functorch_transforms_active():
            gradients: tuple[Tensor, ...] = Adjoint.apply(self, rest[self.tensors :], grad, *rest[: self.tensors])
            return gradients
        return self.family.maps(self.adjoint(grad, *rest))

    def differentiable(self, input: Any, *rest: Any) -> Any:
        """The operator's kernel where gradients may be wanted."""
        tensors, options = rest[: self.tensors], rest[self.tensors :]
        maps = self.family.maps(input)
        if wants_derivatives(*tensors, *maps):
            return Linear.apply(self, options, *tensors, *maps)
        return below_autograd(self.forward, input, *rest)

    def differentiable_adjoint(self, grad: Tensor, *rest: Any) -> Any:
        tensors, options = rest[: self.tensors], rest[self.tensors :]
        if wants_derivatives(grad):
            return self.family.argument(Adjoint.apply(self, options, grad, *tensors))
        return below_autograd(self.adjoint, grad, *rest)


class Linear(Function):
    """`Pair.forward`: (pair, (options, backend), tensors, maps)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pair: Pair, options: tuple[Any, ...], *tensors: Tensor) -> Any:
        others, maps = tensors[: pair.tensors], tensors[pair.tensors :]
        return below_autograd(pair.forward, pair.family.argument(maps), *others, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.pair, ctx.options, *tensors = inputs
        others, maps = tensors[: ctx.pair.tensors], tensors[ctx.pair.tensors :]
        ctx.shape = ctx.pair.family.shape(maps)
        save(ctx, others)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        pair, (*options, backend) = ctx.pair, ctx.options
        wanted = ctx.needs_input_grad[2 + pair.tensors :]
        gradients: Sequence[Tensor | None] = [None] * len(wanted)
        if any(wanted):
            gradients = pair.transposed(grad, *ctx.saved_tensors, *options, *ctx.shape, backend)
        return (None, None, *[None] * pair.tensors, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        pair = ctx.pair
        maps = with_zeros(tangents[2 + pair.tensors :], pair.family.shaped(ctx.shape).shapes)
        return None if maps is None else pair(maps, *ctx.saved_tensors, *ctx.options)


class Adjoint(Function):
    """`Pair.adjoint`: (pair, (options, shape, backend), grad, tensors)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pair: Pair, options: tuple[Any, ...], grad: Tensor, *others: Tensor) -> Any:
        return tuple(pair.family.maps(below_autograd(pair.adjoint, grad, *others, *options)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.pair, ctx.options, _, *others = inputs
        save(ctx, others)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor) -> Any:
        pair, options = ctx.pair, (*ctx.options[:-6], ctx.options[-1])
        output = pair(tangents, *ctx.saved_tensors, *options)
        return (None, None, output, *[None] * pair.tensors)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, tangent: Tensor, *others: None) -> Any:
        return tuple(ctx.pair.transposed(tangent, *ctx.saved_tensors, *ctx.options))


class MaxPool(NamedTuple):
    """RoI max pooling, the operator that gives the argmax too, and reading the maps at an argmax."""

    pool: Operator
    with_argmax: Operator
    gather: Pair

    def __call__(self, maps: Sequence[Tensor], rois: Tensor, *options: Any) -> Tensor:
        """The operator, for whatever transforms of torch.func are active."""
        if torch._C._are_functorch_transforms_active():
            return cast(Tensor, Maxima.apply(self, options, rois, *maps)[0])
        return cast(Tensor, self.pool(self.gather.family.argument(maps), rois, *options))

    def differentiable(self, input: Any, rois: Tensor, *options: Any) -> Any:
        """The operator's kernel where gradients may be wanted."""
        maps = self.gather.family.maps(input)
        if wants_derivatives(rois, *maps):
            return Maxima.apply(self, options, rois, *maps)[0]
        return below_autograd(self.pool, input, rois, *options)

    def differentiable_with_argmax(self, input: Any, rois: Tensor, *options: Any) -> Any:
        maps = self.gather.family.maps(input)
        if wants_derivatives(rois, *maps):
            return Maxima.apply(self, options, rois, *maps)
        return below_autograd(self.with_argmax, input, rois, *options)


class Maxima(Function):
    """`MaxPool.with_argmax`: (operators, (options, backend), rois, maps) -> output, argmax."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operators: MaxPool, options: tuple[Any, ...], rois: Tensor, *maps: Tensor) -> Any:
        return below_autograd(operators.with_argmax, operators.gather.family.argument(maps), rois, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        operators, ctx.options, rois, *maps = inputs
        ctx.pair = operators.gather
        ctx.shape = ctx.pair.family.shape(maps)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # of the argmax it would be zeros, as many as there are outputs
        save(ctx, (rois, output[1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> Any:
        pair, (*options, backend) = ctx.pair, ctx.options
        wanted = ctx.needs_input_grad[3:]
        gradients: Sequence[Tensor | None] = [None] * len(wanted)
        if grad is not None and any(wanted):
            gradients = pair.transposed(grad, *ctx.saved_tensors, *options, *ctx.shape, backend)
        return (None, None, None, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        maps = with_zeros(tangents[3:], ctx.pair.family.shaped(ctx.shape).shapes)
        return (None if maps is None else ctx.pair(maps, *ctx.saved_tensors, *ctx.options)), None


def keep_signature(function: Any) -> None:
    """PyTorch asks for it in every call, and inspect.signature() would make it anew."""
    function.__signature__ = inspect.signature(function)


for _class in (Linear, Adjoint, Maxima):
    keep_signature(_class.forward)


def save(ctx: Any, tensors: Sequence[Tensor]) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def with_zeros(tangents: Sequence[Tensor | None], shapes: Sequence[Sequence[int]]) -> list[Tensor] | None:
    """Tangents of all maps, where some have one; None where none has."""
    given = next((tangent for tangent in tangents if tangent is not None), None)
    if given is None:
        return None
    return [
        given.new_zeros(shape) if tangent is None else tangent for tangent, shape in zip(tangents, shapes, strict=True)
    ]


def wants_derivatives(*tensors: Tensor) -> bool:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    if forward_ad._current_level < 0:
        return False
    return any(has_tangent(tensor) for tensor in tensors)


def has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def below_autograd(operator: Operator, *arguments: Any) -> Any:
    """The operator as it is where nothing is differentiated."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)
