"""The operators under PyTorch's transforms: torch.func, forward mode, batched gradients, torch.fx."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.fx
from torch import Tensor, nn
from torch.autograd import forward_ad

import roi

SCALES = [1 / 4, 1 / 8]
ROIS = torch.tensor([[0.0, 1, 2, 9, 12], [1, 0, 0, 24, 20], [1, 3, 3, 4, 5], [0, 5, 6, 34, 25]], dtype=torch.float64)
ALIGN = {"sampling_ratio": 2, "aligned": True}
LEVELS = {"canonical_scale": 10, "canonical_level": 3}

Op = Callable[..., Tensor]  # (maps, rois)
OPS: dict[str, Op] = {
    "roi_pool": lambda maps, rois: roi.roi_pool(maps[0], rois, 2, SCALES[0]),
    "roi_align": lambda maps, rois: roi.roi_align(maps[0], rois, 2, SCALES[0], **ALIGN),
    "ps_roi_pool": lambda maps, rois: roi.ps_roi_pool(maps[0], rois, 2, SCALES[0]),
    "ps_roi_align": lambda maps, rois: roi.ps_roi_align(maps[0], rois, 2, SCALES[0], 2),
    "multiscale_roi_pool": lambda maps, rois: roi.multiscale_roi_pool(maps, rois, 2, SCALES, **LEVELS),
    "multiscale_roi_align": lambda maps, rois: roi.multiscale_roi_align(maps, rois, 2, SCALES, **ALIGN, **LEVELS),
}
every_op = pytest.mark.parametrize("name", list(OPS))


def maps_for(name: str, *batch: int, seed: int = 0) -> list[Tensor]:
    """Distinct values a unit apart: a small step moves no maximum."""
    sizes = ((6, 9), (3, 5)) if name.startswith("multiscale") else ((6, 9),)
    generator = torch.Generator().manual_seed(seed)
    shapes = [torch.Size((*batch, 2, 4, *size)) for size in sizes]
    return [torch.randperm(shape.numel(), generator=generator).double().view(shape) for shape in shapes]


def squares(name: str, rois: Tensor = ROIS) -> Callable[..., Tensor]:
    return lambda *maps: (OPS[name](list(maps), rois) / 100).square().sum()


def gradients(name: str, maps: list[Tensor], rois: Tensor = ROIS) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in maps]
    return torch.autograd.grad(squares(name, rois)(*leaves), leaves)


def each(count: int) -> tuple[int, ...]:
    return tuple(range(count))


@every_op
def test_grad(name: str) -> None:
    maps = maps_for(name)
    found = torch.func.grad(squares(name), argnums=each(len(maps)))(*maps)
    for actual, expected in zip(found, gradients(name, maps), strict=True):
        torch.testing.assert_close(actual, expected)


@every_op
@pytest.mark.parametrize("in_dim", [0, 2])
def test_vmap_over_maps(name: str, in_dim: int) -> None:
    batches = maps_for(name, 3)
    moved = [x.movedim(0, in_dim) for x in batches]
    actual = torch.func.vmap(lambda *maps: OPS[name](list(maps), ROIS), in_dims=in_dim)(*moved)
    expected = torch.stack([OPS[name]([x[i] for x in batches], ROIS) for i in range(3)])
    torch.testing.assert_close(actual, expected)


@every_op
@pytest.mark.parametrize("maps_too", [False, True])
def test_vmap_over_boxes(name: str, maps_too: bool) -> None:
    rois = torch.stack([ROIS, ROIS.flip(0), ROIS + torch.tensor([0.0, 1, 1, 2, 2])])
    batches = maps_for(name, 3)
    if maps_too:
        actual = torch.func.vmap(lambda rois, *maps: OPS[name](list(maps), rois))(rois, *batches)
        expected = [OPS[name]([x[i] for x in batches], rois[i]) for i in range(3)]
    else:
        maps = [x[0] for x in batches]
        actual = torch.func.vmap(lambda rois: OPS[name](maps, rois))(rois)
        expected = [OPS[name](maps, rois[i]) for i in range(3)]
    torch.testing.assert_close(actual, torch.stack(expected))


@every_op
def test_vmap_keeps_rows_off_the_batch_apart(name: str) -> None:
    """Image 2 of a batch of two is refused, and is not the first image of the next problem."""
    rois = torch.stack([ROIS, ROIS])
    rois[0, 0, 0] = 2
    with pytest.raises(ValueError, match=r"row 0 is"):
        torch.func.vmap(lambda rois, *maps: OPS[name](list(maps), rois))(rois, *maps_for(name, 2))


@every_op
@pytest.mark.parametrize("boxes_too", [False, True])
def test_vmap_of_grad(name: str, boxes_too: bool) -> None:
    batches = maps_for(name, 3)
    rois = torch.stack([ROIS, ROIS.flip(0), ROIS]) if boxes_too else ROIS
    grad = torch.func.grad(
        lambda rois, *maps: squares(name, rois)(*maps), argnums=tuple(i + 1 for i in each(len(batches)))
    )
    found = torch.func.vmap(grad, in_dims=(0 if boxes_too else None, *[0] * len(batches)))(rois, *batches)
    for i in range(3):
        expected = gradients(name, [x[i] for x in batches], rois[i] if boxes_too else rois)
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual[i], wanted)


@every_op
def test_batched_gradients(name: str) -> None:
    leaves = [x.requires_grad_() for x in maps_for(name)]
    output = OPS[name](leaves, ROIS)
    grads = torch.randn(3, *output.shape, dtype=torch.float64)
    found = torch.autograd.grad(output, leaves, grads, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        expected = torch.autograd.grad(output, leaves, grads[i], retain_graph=True)
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual[i], wanted)


@every_op
@pytest.mark.parametrize("how", ["jvp", "dual numbers", "jacfwd"])
def test_forward_mode(name: str, how: str) -> None:
    maps, tangents = maps_for(name), [torch.randn_like(x) for x in maps_for(name)]
    step = 1e-4

    def op(*maps: Tensor) -> Tensor:
        return OPS[name](list(maps), ROIS)

    if how == "jvp":
        _, actual = torch.func.jvp(op, tuple(maps), tuple(tangents))
    elif how == "dual numbers":
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(maps, tangents, strict=True)]
            actual = forward_ad.unpack_dual(op(*duals)).tangent
    else:
        along = torch.zeros((), dtype=torch.float64)
        actual = torch.func.jacfwd(lambda t: op(*[x + t * d for x, d in zip(maps, tangents, strict=True)]))(along)
    ahead = [x + step * t for x, t in zip(maps, tangents, strict=True)]
    behind = [x - step * t for x, t in zip(maps, tangents, strict=True)]
    torch.testing.assert_close(actual, (op(*ahead) - op(*behind)) / (2 * step), rtol=1e-6, atol=1e-6)


@every_op
def test_a_tangent_of_some_maps_only(name: str) -> None:
    maps = maps_for(name)
    tangent = torch.randn_like(maps[0])
    _, alone = torch.func.jvp(lambda x: OPS[name]([x, *maps[1:]], ROIS), (maps[0],), (tangent,))
    others = [torch.zeros_like(x) for x in maps[1:]]
    _, all_ = torch.func.jvp(lambda *x: OPS[name](list(x), ROIS), tuple(maps), (tangent, *others))
    torch.testing.assert_close(alone, all_)


@every_op
def test_forward_over_reverse(name: str) -> None:
    """A Hessian times a vector, in both ways."""
    maps, tangents = maps_for(name), [torch.randn_like(x) for x in maps_for(name)]
    grad = torch.func.grad(squares(name), argnums=each(len(maps)))
    _, forward = torch.func.jvp(grad, tuple(maps), tuple(tangents))
    leaves = [x.clone().requires_grad_() for x in maps]
    first = torch.autograd.grad(squares(name)(*leaves), leaves, create_graph=True)
    product = sum((a * b).sum() for a, b in zip(first, tangents, strict=True))
    for actual, expected in zip(forward, torch.autograd.grad(product, leaves), strict=True):
        torch.testing.assert_close(actual, expected)


@every_op
def test_gradcheck_of_every_mode(name: str) -> None:
    maps = [x.requires_grad_() for x in maps_for(name)]

    def op(*maps: Tensor) -> Tensor:
        return OPS[name](list(maps), ROIS)

    assert torch.autograd.gradcheck(op, maps, check_forward_ad=True, check_batched_grad=True)


# --- what is traced does not depend on the moment


class Pooler(nn.Module):
    def forward(self, x: Tensor, rois: Tensor) -> Tensor:
        return roi.roi_pool(x, rois, 2, SCALES[0])


@pytest.mark.parametrize("grad_mode", [False, True])
@pytest.mark.parametrize("leaf", [False, True])
def test_an_exported_pooler_runs_and_trains(grad_mode: bool, leaf: bool) -> None:
    """Whether it was exported under no_grad or not; and its program has no argmax that nobody reads."""
    (example,) = maps_for("roi_pool")
    with torch.set_grad_enabled(grad_mode):
        program = torch.export.export(Pooler(), (example.clone().requires_grad_(leaf), ROIS))
    assert "with_argmax" not in program.graph_module.code
    module = program.module()
    (x,) = maps_for("roi_pool", seed=1)
    with torch.no_grad():
        assert torch.equal(module(x, ROIS), Pooler()(x, ROIS))
    x.requires_grad_()
    (actual,) = torch.autograd.grad(module(x, ROIS).sum(), x)
    (expected,) = torch.autograd.grad(Pooler()(x, ROIS).sum(), x)
    assert torch.equal(actual, expected)


# --- torch.fx


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = roi.RoIPool(2, SCALES[0])
        self.align = roi.RoIAlign(2, SCALES[0], 2)
        self.ps_pool = roi.PSRoIPool(2, SCALES[0])
        self.ps_align = roi.PSRoIAlign(2, SCALES[0], 2)

    def forward(self, x: Tensor, boxes: list[Tensor]) -> Tensor:
        pooled = self.pool(x, boxes) + self.align(x, boxes)
        sensitive = self.ps_pool(x, boxes) + self.ps_align(x, boxes)
        levels = roi.multiscale_roi_align([x, x[:, :, ::2, ::2]], boxes, 2, SCALES)
        return pooled + sensitive + levels


def test_symbolic_trace() -> None:
    """Every operator is one node, whatever its boxes come as."""
    (x,) = maps_for("roi_pool")
    boxes = [ROIS[ROIS[:, 0] == n, 1:] for n in range(2)]
    traced = torch.fx.symbolic_trace(Everything())
    names = [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]
    assert [name for name in names if "roi" in name] == [
        "roi_pool",
        "roi_align",
        "ps_roi_pool",
        "ps_roi_align",
        "multiscale_roi_align",
    ]
    assert torch.equal(traced(x, boxes), Everything()(x, boxes))


@pytest.mark.parametrize("op", [roi.roi_pool, roi.roi_align, partial(roi.ps_roi_pool)])
def test_a_list_of_proxies_is_traced(op: Op) -> None:
    traced = torch.fx.symbolic_trace(lambda x, first, second: op(x, [first, second], 2))
    (x,) = maps_for("roi_pool")
    boxes = ROIS[:2, 1:]
    assert torch.equal(traced(x, boxes, boxes + 1), op(x, [boxes, boxes + 1], 2))
