"""Memory: none is lost over many calls, none waits for the collector, and a call takes a few times its data."""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor

import roi
from tests.reference.boxes import rpn_like
from tests.reference.process_memory import in_a_process, reset_peak_resident, resident
from tests.trust.calls import OPERATORS, forward_and_backward, maps, small_fpn
from tests.trust.conftest import Amounts

pytestmark = pytest.mark.trust
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set as Linux reports it")

FLAT = 16e6  # bytes. One map lost by each call of the smallest slice would be 200 MB


@linux
def test_calls_lose_no_memory(amounts: Amounts, tally: Counter[str]) -> None:
    model, images = small_fpn(), torch.randn(2, 3, 32, 32)

    def call(number: int) -> None:
        tally["forward and backward calls"] += 1
        if number % 8 == 0:
            model(images)[0].sum().backward()
        else:
            forward_and_backward(list(OPERATORS)[number % 8 - 1])

    warm_up = max(amounts.calls // 10, 16)
    for number in range(warm_up):
        call(number)
    gc.collect()
    before, tensors = resident_without_free_memory(), living_tensors()
    for number in range(warm_up, amounts.calls):
        call(number)
    assert resident_without_free_memory() - before < FLAT
    assert living_tensors() == tensors


def resident_without_free_memory() -> float:
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later goes back to the system
    return resident("VmRSS")


def living_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())  # proxies say more of themselves


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("operator", OPERATORS)
def test_no_cycle_holds_a_tensor(operator: str, tally: Counter[str]) -> None:
    """Everything is gone once the last name for it is: nothing waits for the collector, which is off."""
    leaves = maps()
    output = OPERATORS[operator](leaves)
    gradients = torch.autograd.grad(output.square().sum(), leaves, allow_unused=True, create_graph=True)
    gradients[0].square().sum().backward()
    things = [output, output.grad_fn, *leaves, *(x for x in gradients if x is not None)]
    references = [weakref.ref(thing) for thing in things]
    del leaves, output, gradients, things
    assert [reference() for reference in references] == [None] * len(references)
    tally["graphs without a cycle"] += 1


@pytest.mark.usefixtures("no_collector")
def test_no_cycle_holds_a_model() -> None:
    model = small_fpn()
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    outputs = model(images)
    torch.stack([level.sum() for level in outputs]).sum().backward()
    references = [weakref.ref(thing) for thing in (model, images, *outputs, *model.parameters())]
    del model, images, outputs
    assert [reference() for reference in references] == [None] * len(references)


# Peak memory beyond the arguments, output and gradient included, by the memory of maps and output: forward, and forward
# and backward. For float32 maps of a call that is not small; the boxes' own numbers are below it. A half as much again
# as was measured with torch 2.14, whose own operators are part of it.
PEAKS = {
    "roi_pool": (2, 4),
    "roi_align": (1.5, 4),
    "roi_align, adaptive": (3.3, 8.5),
    "ps_roi_pool": (3, 11.5),
    "ps_roi_align": (0.5, 6.5),
    "multiscale_roi_pool": (1, 3.5),
    "multiscale_roi_align": (1, 3.3),
}


def peaks(operator: str, layout: torch.memory_format) -> tuple[float, float]:
    """The factors of `PEAKS`, as they are here: of a process's second call."""
    torch.set_num_threads(1)  # each thread has buffers of its own
    channels = 98 if operator.startswith("ps_") else 64
    sides = (256, 128, 64, 32) if operator.startswith("multiscale") else (256,)
    features = [torch.randn(1, channels, side, side).contiguous(memory_format=layout) for side in sides]
    boxes, scales = rpn_like(512, 1, 1024, 1024), [side / 1024 for side in sides]
    call = {
        "roi_pool": lambda maps: roi.roi_pool(maps[0], boxes, 7, 1 / 4),
        "roi_align": lambda maps: roi.roi_align(maps[0], boxes, 7, 1 / 4, 2),
        "roi_align, adaptive": lambda maps: roi.roi_align(maps[0], boxes, 7, 1 / 4),
        "ps_roi_pool": lambda maps: roi.ps_roi_pool(maps[0], boxes, 7, 1 / 4),
        "ps_roi_align": lambda maps: roi.ps_roi_align(maps[0], boxes, 7, 1 / 4, 2),
        "multiscale_roi_pool": lambda maps: roi.multiscale_roi_pool(maps, boxes, 7, scales),
        "multiscale_roi_align": lambda maps: roi.multiscale_roi_align(maps, boxes, 7, scales, 2),
    }[operator]

    def forward() -> None:
        call(features)

    def both() -> None:
        leaves = [x.requires_grad_() for x in features]
        output = call(leaves)
        torch.autograd.grad(output, leaves, output.detach())

    data = 4 * sum(x.numel() for x in (*features, call(features)))
    factors = []
    for step in (forward, both):
        step()
        ctypes.CDLL(None).malloc_trim(0)
        before = reset_peak_resident()
        step()
        factors.append((resident("VmHWM") - before) / data)
    return factors[0], factors[1]


@linux
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_peak_memory_is_a_few_times_the_data(layout: torch.memory_format, tally: Counter[str]) -> None:
    found = in_a_process(partial(all_peaks, layout))
    tally["peaks of memory"] += 2 * len(found)
    assert {name: peak for name, peak in found.items() if peak[0] > PEAKS[name][0] or peak[1] > PEAKS[name][1]} == {}
    assert all(min(peak) > 0 for peak in found.values())  # or nothing was measured


def all_peaks(layout: torch.memory_format) -> dict[str, tuple[float, float]]:
    return {operator: peaks(operator, layout) for operator in PEAKS}
