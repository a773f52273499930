"""Which tests can run here: the markers `gpu` and `torchvision` skip with the reason. How much the trust suite does."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import pytest
import torch

from roi.cupy_path import access

ALL_TRUST_CASES = 20_000
TALLY = pytest.StashKey[Counter[str]]()  # of what the trust suite did


def import_problem(module: str) -> str | None:
    """Why `module` cannot be imported; a torchvision built for another torch raises RuntimeError, not ImportError."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{module} does not import here ({type(error).__name__}: {error})"
    return None


@pytest.fixture(params=["contiguous", "copied", "channels_last"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.memory_format:
    """Of the features that a test of the CUDA path takes, for those that do not say it themselves.

    "copied": contiguous ones that the launches copy to channels_last, whatever their size; else they never do.
    """
    monkeypatch.setattr(access, "copy_pays", lambda work, maps, accesses: request.param == "copied")
    return torch.channels_last if request.param == "channels_last" else torch.contiguous_format


def pytest_addoption(parser: pytest.Parser) -> None:
    help_ = "random operator cases of the trust suite, whose calls and files go with them (default: 400; all: 20000)"
    parser.addoption("--trust-cases", type=int, default=400, metavar="N", help=help_)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device here",
        "torchvision": import_problem("torchvision"),
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """What a process of pytest-xdist counted goes to the one that prints it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["trust"] = dict(session.config.stash.get(TALLY, {}))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash.setdefault(TALLY, Counter()).update(getattr(node, "workeroutput", {}).get("trust", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tally = config.stash.get(TALLY, Counter())
    if tally:
        cases = config.getoption("--trust-cases")
        scope = "" if cases >= ALL_TRUST_CASES else f" (a slice; --trust-cases {ALL_TRUST_CASES} is all)"
        counts = ", ".join(f"{count:,} {what}" for what, count in tally.items())
        terminalreporter.write_line(f"trust: {counts}{scope}")
