"""The examples of README.md and docs/ are run as they stand, and their links lead somewhere."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}


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


EXAMPLES = [
    pytest.param(page, example, marks=marks(example), id=f"{page}-{number}")
    for page, text in TEXTS.items()
    for number, example in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL), start=1)
]


@pytest.mark.parametrize(("page", "example"), EXAMPLES)
def test_example_runs(page: str, example: str) -> None:
    exec(compile(example, page, "exec"), {"__name__": "example"})


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files(page: str) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", TEXTS[page])
    missing = [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()]
    assert not missing


def test_readme_is_short() -> None:
    assert len(TEXTS["README.md"].split()) <= 1000
