"""Threads, processes, workers and interruptions: everybody gets the same bits, and nothing global is left changed."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import roi
from fpn.checkpoints.files import read_checkpoint
from fpn.demo.photo import DEFAULT_PHOTO, read_photo
from tests.conftest import ALL_TRUST_CASES
from tests.reference.comparison import same_bits
from tests.trust.calls import OPERATORS, forward_and_backward
from tests.trust.conftest import Amounts

pytestmark = pytest.mark.trust

THREADS = 8
PROCESSES = 4


def in_threads(work: Callable[[int], None]) -> None:
    """Runs `work` with the numbers of `THREADS` threads that start together; raises what the first of them raises."""
    barrier = threading.Barrier(THREADS)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            barrier.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def global_state() -> tuple[Any, ...]:
    """What readers change for a moment and share with all threads."""
    return list(warnings.filters), Image.MAX_IMAGE_PIXELS, set(torch.serialization.get_safe_globals())


@pytest.fixture(autouse=True)
def nothing_global_is_left_changed() -> Iterator[None]:
    before = global_state()
    yield
    assert global_state() == before


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Tensor]]:
    return {operator: forward_and_backward(operator) for operator in OPERATORS}


def test_threads_get_the_same_bits(expected: dict[str, list[Tensor]], amounts: Amounts, tally: Counter[str]) -> None:
    def work(number: int) -> None:
        for turn in range(max(amounts.calls // 200, 2)):
            for operator in OPERATORS if (number + turn) % 2 else reversed(OPERATORS):
                assert all(map(same_bits, forward_and_backward(operator), expected[operator])), operator

    in_threads(work)
    tally[f"calls in {THREADS} threads"] += THREADS * max(amounts.calls // 200, 2) * len(OPERATORS)


def test_threads_that_make_the_first_call(expected: dict[str, list[Tensor]], tally: Counter[str]) -> None:
    for operator in OPERATORS:
        for cached in first_call_caches():
            cached.cache_clear()

        def work(number: int, operator: str = operator) -> None:
            assert all(map(same_bits, forward_and_backward(operator), expected[operator])), operator

        in_threads(work)
        tally[f"calls in {THREADS} threads"] += THREADS


def test_threads_read_photos(tally: Counter[str]) -> None:
    whole = np.asarray(read_photo(DEFAULT_PHOTO).image)

    def work(number: int) -> None:
        for _ in range(4):
            assert np.array_equal(np.asarray(read_photo(DEFAULT_PHOTO).image), whole)

    in_threads(work)
    tally[f"files read in {THREADS} threads"] += 4 * THREADS


def test_threads_read_checkpoints_with_arrays_in_them(tmp_path: Path, tally: Counter[str]) -> None:
    """To read these, the reader has torch's own unpickler allow more for a moment."""
    content = {"state_dict": {"a": torch.arange(6.0), "b": np.arange(3.0)}}
    torch.save(content, tmp_path / "c.pth")

    def work(number: int) -> None:
        for _ in range(25):
            assert read_checkpoint(tmp_path / "c.pth").keys() == {"a", "b"}

    in_threads(work)
    tally[f"files read in {THREADS} threads"] += 25 * THREADS


def digests(number: int) -> list[str]:
    """Of what every operator gives, called and compiled, in a process of its own."""
    torch.set_num_threads(1)
    compiled = torch.compile(OPERATORS["roi_align"], backend="aot_eager")
    found = [x for operator in OPERATORS for x in forward_and_backward(operator)]
    found.append(compiled(ones := [torch.ones(2, 16, 64, 64)]) - OPERATORS["roi_align"](ones))
    return [hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest() for x in found]


def test_processes_get_the_same_bits(tally: Counter[str]) -> None:
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        found = pool.map(digests, range(PROCESSES), chunksize=1)
    tally["processes that call and compile"] += PROCESSES
    assert found == found[:1] * PROCESSES


class Pooled(Dataset[list[Tensor]]):
    """A photo and every operator, in the worker."""

    def __len__(self) -> int:
        return len(OPERATORS)

    def __getitem__(self, index: int) -> list[Tensor]:
        read_photo(DEFAULT_PHOTO)
        return forward_and_backward(list(OPERATORS)[index])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader(start: str, expected: dict[str, list[Tensor]], tally: Counter[str]) -> None:
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {start}")
    # Collated in lists, not by `default_collate`, whose shared memory is not what is tried here.
    loader = DataLoader(Pooled(), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=300)
    for operator, got in zip(OPERATORS, loader, strict=True):
        # A worker has one thread, and sums the gradient in another order.
        for x, wanted in zip(got, expected[operator], strict=True):
            torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5)
    tally["calls in workers"] += len(OPERATORS)


# --- Interruptions


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_first_call_that_is_interrupted_anywhere(
    operator: str, expected: dict[str, list[Tensor]], amounts: Amounts, tally: Counter[str]
) -> None:
    """At every line of ours that the first call comes to; the next call is then as good as any."""
    step = 1 if amounts.cases >= ALL_TRUST_CASES else 29
    line = 0
    while interrupted(functools.partial(forward_and_backward, operator), line):
        tally["interruptions"] += 1
        assert all(map(same_bits, forward_and_backward(operator), expected[operator])), f"after line {line}"
        line += step


def interrupted(call: Callable[[], object], line: int) -> bool:
    """Whether a first call, raising KeyboardInterrupt at its line of that number in the package, came to it."""
    for cached in first_call_caches():
        cached.cache_clear()
    package, lines = str(Path(roi.__file__).parent), 0

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line":
            lines += 1
            if lines > line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def first_call_caches() -> list[Any]:
    modules = [module for name, module in sys.modules.items() if name.startswith("roi.")]
    return [thing for module in modules for thing in vars(module).values() if hasattr(thing, "cache_clear")]
