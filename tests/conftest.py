"""Which tests can run here: the markers `gpu` and `torchvision` skip with the reason. How much the trust suite does."""

from __future__ import annotations

import importlib

import pytest
import torch


def import_problem(module: str) -> str | None:
    """Why `module` cannot be imported; a torchvision built for another torch raises RuntimeError, not ImportError."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{module} does not import here ({type(error).__name__}: {error})"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    help_ = "random operator cases of the trust suite, whose calls and files go with them (default: 800; all: 20000)"
    parser.addoption("--trust-cases", type=int, default=800, metavar="N", help=help_)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device here",
        "torchvision": import_problem("torchvision"),
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
