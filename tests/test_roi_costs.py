"""What a call of the torch path costs, without a clock: ATen calls, copies of maps, memory, launches of threads.

On a busy machine every parallel call may wait for a core. So their number is bounded, and it hardly depends on the
number of boxes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import roi
from roi import torch_path
from roi._problem import Maps, Pooling
from roi.torch_path import memory, product, threads
from tests.reference.boxes import ordinary_boxes

STRIDES = (4, 8, 16, 32)
IMAGE = (320, 448)
PYRAMID = Pooling(tuple(1 / stride for stride in STRIDES), 7, 7, 2)
ADAPTIVE = PYRAMID._replace(sampling_ratio=-1)
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])


class Calls(TorchDispatchMode):
    """Counts ATen calls, and keeps the sizes of what they copy and make."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.copied: list[int] = []
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.count[name] += 1
        if name in ("copy_", "_to_copy", "clone"):
            self.copied.append(result.numel())
        if name == "empty":
            self.made.append(result.numel() * result.element_size())
        return result


def counted(call: Callable[[], Any]) -> Calls:
    with Calls() as calls:
        call()
    return calls


def maps(channels: int, layout: torch.memory_format = torch.contiguous_format) -> list[Tensor]:
    sizes = [(IMAGE[0] // stride, IMAGE[1] // stride) for stride in STRIDES]
    return [torch.randn(2, channels, *size).contiguous(memory_format=layout) for size in sizes]


def boxes(count: int) -> Tensor:
    return ordinary_boxes(count, 2, *IMAGE, seed=count).float()


@layouts
@pytest.mark.parametrize("pooling", [PYRAMID, ADAPTIVE], ids=["2 samples", "adaptive"])
@pytest.mark.parametrize("what", ["forward", "gradient"])
def test_calls_do_not_depend_on_the_number_of_boxes(what: str, pooling: Pooling, layout) -> None:
    features = maps(32, layout)

    def calls(count: int) -> int:
        rois = boxes(count)
        grad = torch.randn(count, 32, 7, 7).contiguous(memory_format=layout)
        if what == "forward":
            return counted(lambda: torch_path.align(features, rois, pooling)).count.total()
        return counted(lambda: torch_path.align_adjoint(grad, rois, pooling, Maps.of(features))).count.total()

    few, many = calls(100), calls(1000)
    assert many <= 400
    assert many <= few + 40  # lookups, or outputs, of more than is worked on at once come in parts


@layouts
@pytest.mark.parametrize("what", ["forward", "gradient"])
def test_calls_for_256_channels(what: str, layout) -> None:
    """Outputs of more than VALUES_AT_ONCE come in parts."""
    features, rois = maps(256, layout), boxes(1000)
    grad = torch.randn(1000, 256, 7, 7).contiguous(memory_format=layout)
    if what == "forward":
        calls = counted(lambda: torch_path.align(features, rois, PYRAMID))
    else:
        calls = counted(lambda: torch_path.align_adjoint(grad, rois, PYRAMID, Maps.of(features)))
    assert calls.count.total() <= 400


@layouts
def test_calls_of_max_pooling(layout) -> None:
    """Each group of RoIs whose bins have about one size is a call of adaptive_max_pool2d: few, however many RoIs."""
    features = maps(8, layout)
    sides = [len({1, 2, 3, 4, 6, 8, 12, 16} & set(range(-(-side // 7) + 2))) for side in (80, 112)]
    for count in (100, 1000):
        rois = boxes(count)
        for monkey in (product.serves, lambda *_: False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(product, "serves", monkey)
                calls = counted(lambda rois=rois: torch_path.max_pool_with_argmax(features, rois, PYRAMID))
            groups = calls.count["adaptive_max_pool2d"]
            assert groups <= len(features) * sides[0] * sides[1]
            assert calls.count.total() <= 100 * len(features) + 30 * groups


@layouts
@pytest.mark.parametrize("operator", ["align", "max_pool"])
def test_many_boxes_copy_each_map_once(operator: str, layout) -> None:
    features = maps(16, layout)
    calls = counted(lambda: getattr(torch_path, operator)(features, boxes(2000), PYRAMID))
    copies = [sum(size == map_.numel() for size in calls.copied) for map_ in features]
    assert copies == [0 if layout is torch.channels_last else 1] * len(features)


def test_few_boxes_copy_no_map() -> None:
    features = maps(16)
    calls = counted(lambda: torch_path.align(features, boxes(4), PYRAMID))
    assert max(calls.copied) < min(map_.numel() for map_ in features[:2])


def test_maps_are_copied_to_memory_that_is_kept() -> None:
    features, rois = maps(16), boxes(2000)
    largest = features[0].numel() * 4
    roi.empty_cache()
    first = counted(lambda: torch_path.align(features, rois, PYRAMID)).made
    second = counted(lambda: torch_path.align(features, rois, PYRAMID)).made
    output = len(rois) * 16 * 49 * 4
    assert sum(size >= largest for size in first) == (2 if output >= largest else 1)
    assert max(second) == output
    assert memory._kept.blocks["maps"].numel() < largest + 64


@pytest.mark.skipif(threads._set_threads is None, reason="PyTorch's OpenMP library was not found")
def test_little_work_is_done_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch, "embedding_bag", _noting(torch.embedding_bag, seen))
    usual = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(threads, "free_cores", lambda usual: usual)
        for count in (1, 1000):
            roi.roi_align(torch.randn(1, 16, 50, 84), boxes(count) * torch.tensor([0.0, 1, 1, 1, 1]), 7, 1 / 16, 2)
        assert seen == [1, 2]
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(threads, "free_cores", lambda usual: 1)
        roi.roi_align(torch.randn(1, 16, 50, 84), boxes(1000) * torch.tensor([0.0, 1, 1, 1, 1]), 7, 1 / 16, 2)
        assert seen == [1, 2, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(usual)


def _noting(call: Callable[..., Any], seen: list[int]) -> Callable[..., Any]:
    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.get_num_threads())
        return call(*args, **kwargs)

    return noting


@pytest.mark.parametrize(
    ("stalled", "expected"), [({}, 8), ({8}, 7), ({8, 7}, 4), ({8, 7, 4}, 1)], ids=["free", "one", "half", "all"]
)
def test_as_many_threads_as_have_a_core(stalled: set[int], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All, all but one, half of them or one: the most whose parallel call does not wait."""
    monkeypatch.setattr(threads, "_set_threads", lambda count: None)
    monkeypatch.setattr(threads, "_known", threads._Known())
    asked: list[int] = []

    def stalls(count: int) -> bool:
        asked.append(count)
        return count in stalled

    monkeypatch.setattr(threads, "stalls", stalls)
    assert threads.free_cores(8) == expected
    before = len(asked)
    threads._known.until = float("inf")
    assert threads.free_cores(8) == expected
    assert len(asked) == before  # it is remembered
