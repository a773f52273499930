"""timm's relatives of ResNet: their entries are a ResNet's, or nearly, and their features are others."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fpn.checkpoints.errors import CheckpointError

# Entries do not show these: they blur, or average, where a ResNet takes every other cell.
HIDDEN = re.compile(r"(?:se|eca)?resnet(?:blur|aa)\d+\w*")
# What entries do show, by a part of their names.
SHOWN = ((re.compile(r"(^|\.)conv1\.\d"), "a deep stem"), (re.compile(r"\.(se|attn|conv2_s|fc_select)\."), "attention"))


def recipe(name: str) -> str:
    """How timm makes the trunk, with the weights of a file."""
    return (
        f'fpn.FPN(timm.create_model("{name}", pretrained=True, pretrained_cfg_overlay={{"file": path}}, '
        "features_only=True, out_indices=(1, 2, 3, 4))), with `pip install timm`"
    )


def refuse_hidden_relatives(told: str | None, file: Path | None) -> None:
    """Whether what the file says of itself, or its name, is a model that its entries do not show.

    Args:
        told: the model's name in the file.

    Raises:
        CheckpointError: it is such a model.
    """
    for name in (told, file and file.stem):
        if found := HIDDEN.match(name or ""):
            model = found[0].partition("-")[0]
            raise CheckpointError(
                f"it is timm's {model}, which has a ResNet's entries and other features; use {recipe(model)}"
            )


def hint(unexpected: Iterable[str]) -> str:
    """What entries that a ResNet does not have say of the model; empty where they say nothing."""
    names = list(unexpected)
    signs = [what for pattern, what in SHOWN if any(pattern.search(name) for name in names)]
    if not signs:
        return ""
    return f". It has {' and '.join(signs)}, as timm's relatives of ResNet have; use {recipe('its name in timm')}"
