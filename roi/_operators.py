"""The operators as PyTorch's dispatcher knows them, generated from a few facts about each.

An operator is one call of a path (`roi.torch_path` or `roi.cupy_path`). Its schema is flat; here, and nowhere else, it
becomes the records `Pooling` and `Maps`. Every operator but max pooling is linear in the maps. So its gradient is its
adjoint, and the gradient of the adjoint is the operator again. Max pooling is linear once its argmax is known: its
derivatives are those of reading the maps at the argmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from roi import _autograd, _backend, _vmap
from roi._boxes import check_content
from roi._outputs import empty_argmax, empty_gradients, empty_pooled
from roi._problem import Maps, Pooling

NAMESPACE = "fpn_roi"
_library: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]

# Schemas. An option has the name of a field of Pooling; the shape has what Maps has.
ONE_MAP = ("float spatial_scale", "SymInt pooled_height", "SymInt pooled_width")
PYRAMID = ("float[] scales", "SymInt pooled_height", "SymInt pooled_width")
SAMPLING = ("int sampling_ratio", "bool aligned")
LEVELS = ("float canonical_scale", "float canonical_level")
ONE_SHAPE = ("SymInt batch", "SymInt channels", "SymInt height", "SymInt width", "bool channels_last")
SHAPES = ("SymInt batch", "SymInt channels", "SymInt[] heights", "SymInt[] widths", "bool channels_last")


class Family(NamedTuple):
    """Operators that take the same maps and options.

    Attributes:
        name: of the first one in torch.ops.fpn_roi; the others' names begin with it.
        options: of Pooling, in the schema.
        fixed: fields of Pooling that are the same in every call.
        pyramid: whether they take a list of maps. One map could come in a list too, but a tensor costs less.
    """

    name: str
    options: tuple[str, ...]
    fixed: tuple[tuple[str, Any], ...] = ()
    pyramid: bool = False

    def pooling(self, options: Sequence[Any]) -> Pooling:
        scales = tuple(options[0]) if self.pyramid else (options[0],)
        fields = zip(names_of(self.options)[1:], options[1:], strict=True)
        return Pooling(scales, **dict(fields), **dict(self.fixed))

    def maps(self, input: Tensor | list[Tensor]) -> list[Tensor]:
        """What an operator takes or returns as maps, as a list."""
        return cast(list[Tensor], input) if self.pyramid else [cast(Tensor, input)]

    def argument(self, maps: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """The reverse of `maps`."""
        return list(maps) if self.pyramid else maps[0]

    def shape(self, maps: Sequence[Tensor]) -> tuple[Any, ...]:
        """The shape of some maps as the adjoint's schema has it."""
        batch, channels, heights, widths, channels_last = Maps.of(maps)
        sides = (heights, widths) if self.pyramid else (heights[0], widths[0])
        return (batch, channels, *sides, channels_last)

    def shaped(self, shape: Sequence[Any]) -> Maps:
        """The reverse of `shape`."""
        batch, channels, heights, widths, channels_last = shape
        sides = (tuple(heights), tuple(widths)) if self.pyramid else ((heights,), (widths,))
        return Maps(batch, channels, *sides, channels_last)


@lru_cache
def names_of(arguments: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(argument.split()[1] for argument in arguments)


def linear(family: Family, name: str, adjoint_name: str, path: str, *tensors: str) -> _autograd.Pair:
    """Register an operator that is linear in its maps, `path` of the paths, and its adjoint, `path`_adjoint.

    Args:
        tensors: what they take as tensors besides the maps: the boxes first.
    """
    count = len(tensors)

    def forward(input: Any, rois: Tensor, *rest: Any) -> Any:
        maps = family.maps(input)
        check_rois(rois, maps[0].shape[0])
        others, options, backend = rest[: count - 1], rest[count - 1 : -1], rest[-1]
        return _backend.run(path, name, rois.device, backend, maps, rois, *others, family.pooling(options))

    def fake_forward(input: Any, rois: Tensor, *rest: Any) -> Tensor:
        maps, pooling = family.maps(input), family.pooling(rest[count - 1 : -1])
        return empty_pooled(maps[0], rois.shape[0], Maps.of(maps), pooling)

    def adjoint(grad: Tensor, *rest: Any) -> Any:
        others, options, shape, backend = rest[:count], rest[count:-6], rest[-6:-1], rest[-1]
        pooling, maps = family.pooling(options), family.shaped(shape)
        gradients = _backend.run(f"{path}_adjoint", adjoint_name, grad.device, backend, grad, *others, pooling, maps)
        return family.argument(gradients)

    def fake_adjoint(grad: Tensor, *rest: Any) -> Any:
        return family.argument(empty_gradients(grad, family.shaped(rest[-6:-1])))

    maps, shape = ("Tensor[]", SHAPES) if family.pyramid else ("Tensor", ONE_SHAPE)
    others = [f"Tensor {tensor}" for tensor in tensors]
    pooled = [f"{maps} input", *others, *family.options, "str backend"]
    gradient = ["Tensor grad", *others, *family.options, *shape, "str backend"]
    pair = _autograd.Pair(
        family,
        count,
        define(name, pooled, "Tensor", forward, fake_forward),
        define(adjoint_name, gradient, maps, adjoint, fake_adjoint),
    )
    _library.impl(name, pair.differentiable, "Autograd")
    _library.impl(adjoint_name, pair.differentiable_adjoint, "Autograd")
    torch.library.register_vmap(f"{NAMESPACE}::{name}", _vmap.pooling_rule(family, pair.forward, count), lib=_library)
    torch.library.register_vmap(
        f"{NAMESPACE}::{adjoint_name}", _vmap.adjoint_rule(family, pair.adjoint, count), lib=_library
    )
    if family.pyramid:
        # is_grads_batched=True loops over the batch of every operator that returns one tensor, and of no other.
        def flat(*arguments: Any) -> Tensor:
            return torch.cat([gradient.flatten() for gradient in pair.adjoint(*arguments)])

        def fake_flat(*arguments: Any) -> Tensor:
            return torch.cat([gradient.flatten() for gradient in fake_adjoint(*arguments)])

        flat_adjoint = define(f"{adjoint_name}_flat", gradient, "Tensor", flat, fake_flat)

        def batched(*arguments: Any) -> list[Tensor]:
            shapes = family.shaped(arguments[-6:-1]).shapes
            parts = flat_adjoint(*arguments).split([torch.Size(shape).numel() for shape in shapes])
            return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

        _library.impl(adjoint_name, batched, "Batched")
    return pair


def maximum(family: Family) -> _autograd.MaxPool:
    """Register RoI max pooling: the operator, the one that gives the argmax too, and what these are differentiated by.

    A gradient that is wanted is known when the operator runs, not when it is traced: so the operator itself has no
    argmax, and its gradient calls the other one.
    """

    name = family.name

    def pool(input: Any, rois: Tensor, *rest: Any) -> Any:
        maps = family.maps(input)
        check_rois(rois, maps[0].shape[0])
        return _backend.run("max_pool", name, rois.device, rest[-1], maps, rois, family.pooling(rest[:-1]))

    def fake_pool(input: Any, rois: Tensor, *rest: Any) -> Tensor:
        maps = family.maps(input)
        return empty_pooled(maps[0], rois.shape[0], Maps.of(maps), family.pooling(rest[:-1]))

    def with_argmax(input: Any, rois: Tensor, *rest: Any) -> Any:
        maps = family.maps(input)
        check_rois(rois, maps[0].shape[0])
        return _backend.run("max_pool_with_argmax", name, rois.device, rest[-1], maps, rois, family.pooling(rest[:-1]))

    def fake_with_argmax(input: Any, rois: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        maps, pooling = family.maps(input), family.pooling(rest[:-1])
        output = fake_pool(input, rois, *rest)
        return output, empty_argmax(output, rois.shape[0], Maps.of(maps), pooling)

    schema = ["Tensor[] input" if family.pyramid else "Tensor input", "Tensor rois", *family.options, "str backend"]
    operator = _autograd.MaxPool(
        define(name, schema, "Tensor", pool, fake_pool),
        define(f"{name}_with_argmax", schema, "(Tensor output, Tensor argmax)", with_argmax, fake_with_argmax),
        linear(family, f"{name}_gather", f"{name}_backward", "max_gather", "rois", "argmax"),
    )
    _library.impl(name, operator.differentiable, "Autograd")
    _library.impl(f"{name}_with_argmax", operator.differentiable_with_argmax, "Autograd")
    for qualified, overload in ((name, operator.pool), (f"{name}_with_argmax", operator.with_argmax)):
        rule = _vmap.pooling_rule(family, overload, 1)
        torch.library.register_vmap(f"{NAMESPACE}::{qualified}", rule, lib=_library)
    return operator


def define(
    name: str, schema: Sequence[str], returns: str, kernel: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Make an operator known to the dispatcher; its overload, which is called."""
    _library.define(f"{name}({', '.join(schema)}) -> {returns}")
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return cast(Callable[..., Any], getattr(getattr(torch.ops, NAMESPACE), name).default)


def check_rois(rois: Tensor, batch_size: int) -> None:
    """`check_content` where that does not wait for the device."""
    if rois.device.type == "cpu":
        check_content(rois, batch_size)


def aligned(family: Family) -> _autograd.Pair:
    return linear(family, family.name, f"{family.name}_backward", "align", "rois")


ROI_POOL = maximum(Family("roi_pool", ONE_MAP))
MULTISCALE_ROI_POOL = maximum(Family("multiscale_roi_pool", (*PYRAMID, *LEVELS), pyramid=True))
ROI_ALIGN = aligned(Family("roi_align", (*ONE_MAP, *SAMPLING)))
MULTISCALE_ROI_ALIGN = aligned(Family("multiscale_roi_align", (*PYRAMID, *SAMPLING, *LEVELS), pyramid=True))
PS_ROI_ALIGN = aligned(
    Family("ps_roi_align", (*ONE_MAP, "int sampling_ratio"), (("aligned", True), ("position_sensitive", True)))
)
PS_ROI_POOL = linear(
    Family("ps_roi_pool", ONE_MAP, (("position_sensitive", True),)),
    "ps_roi_pool",
    "ps_roi_pool_backward",
    "average_pool",
    "rois",
)
