"""The private names of PyTorch in the sources are those of docs/private-torch.md, and the installed torch has them."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LISTED = re.findall(r"^\| `([\w.]+)`", (ROOT / "docs" / "private-torch.md").read_text(encoding="utf-8"), re.MULTILINE)
ALIASES = {"forward_ad": "torch.autograd.forward_ad", "module_hooks": "torch.nn.modules.module"}


def is_private(name: str) -> bool:
    return any(re.match(r"_(?!_)", part) for part in name.split("."))


def dotted(node: ast.expr) -> str | None:
    """The name a.b.c of an expression that is one."""
    if isinstance(node, ast.Name):
        return ALIASES.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return None


def private_names(source: str) -> set[str]:
    """Private names of torch and torchvision in a module, each as long as it is written."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("torch", "torchvision"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and (name := dotted(node)) and name.startswith(("torch.", "torchvision.")):
            found.add(name)
    return {name for name in found if is_private(name)}


def test_the_sources_use_no_others() -> None:
    used: set[str] = set()
    for folder in ("fpn", "roi", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            used |= private_names(path.read_text(encoding="utf-8"))
    unlisted = {name for name in used if not any(f"{name}.".startswith(f"{known}.") for known in LISTED)}
    prefixes = {name for name in unlisted if any(known.startswith(f"{name}.") for known in LISTED)}
    assert unlisted == prefixes
    unused = {known for known in LISTED if not any(f"{name}.".startswith(f"{known}.") for name in used)}
    assert not unused


@pytest.mark.parametrize("name", LISTED)
def test_this_torch_has(name: str) -> None:
    if name.startswith("torchvision."):
        pytest.importorskip("torchvision")
    parts = name.split(".")
    thing, start = importlib.import_module(parts[0]), 1
    while start < len(parts):
        if not hasattr(thing, parts[start]):
            importlib.import_module(".".join(parts[: start + 1]))
        thing, start = getattr(thing, parts[start]), start + 1
