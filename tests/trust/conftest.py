"""How much the trust suite does, and the signs of life that it gives."""

from __future__ import annotations

import faulthandler
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from tests.conftest import TALLY

HANGS_AFTER = 300  # seconds, of what takes milliseconds


class Amounts(NamedTuple):
    """Cases, calls and files in the proportions of the full suite: 20,000, 10,000 and 500."""

    cases: int

    @property
    def calls(self) -> int:
        return self.cases // 2

    @property
    def files(self) -> int:
        return self.cases // 40


@pytest.fixture(scope="session")
def amounts(request: pytest.FixtureRequest) -> Amounts:
    return Amounts(request.config.getoption("--trust-cases"))


@pytest.fixture(scope="session")
def tally(request: pytest.FixtureRequest) -> Counter[str]:
    """What was done, by what it is, for the summary. To be counted where it is done."""
    return request.config.stash.setdefault(TALLY, Counter())


@pytest.fixture
def alive(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """A sign of life: the process ends with a traceback if none follows it in time."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        stderr = os.fdopen(os.dup(2), "w")  # the terminal's: what is captured is lost with the process
    with stderr:
        yield lambda: faulthandler.dump_traceback_later(HANGS_AFTER, exit=True, file=stderr)
        faulthandler.cancel_dump_traceback_later()
