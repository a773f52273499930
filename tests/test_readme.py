"""README's examples are run as they stand."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def marks(example: str) -> list[pytest.MarkDecorator]:
    if re.search("^from torchvision", example, re.MULTILINE):
        return [pytest.mark.torchvision]
    if "torch.onnx" in example:
        version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
        return [
            pytest.mark.skipif(find_spec("onnxscript") is None, reason="needs onnxscript"),
            pytest.mark.skipif(version < (2, 13), reason="torch 2.6 exports no open sizes"),
        ]
    return []


@pytest.mark.parametrize("example", [pytest.param(code, marks=marks(code)) for code in EXAMPLES])
def test_example_runs(example: str) -> None:
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4
