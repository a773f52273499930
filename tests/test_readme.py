"""README's examples are run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(
            code, marks=[pytest.mark.torchvision] if re.search("^from torchvision", code, re.MULTILINE) else []
        )
        for code in EXAMPLES
    ],
)
def test_example_runs(example: str) -> None:
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4
