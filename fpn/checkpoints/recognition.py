"""Whose names a checkpoint has, and how its entries meet those of one of our models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fpn._report import Report
from fpn.checkpoints.errors import CheckpointError
from fpn.checkpoints.matching import match_by_name
from fpn.checkpoints.namings import Names, recognise
from fpn.checkpoints.relatives import hint

Entries = Mapping[str, Tensor]

# What a ResNet's own parts may be called: entries of these names change its features.
OF_TRUNK = re.compile(r"(conv1|bn1|gn1|act1|maxpool|stem|layer\d+)\b.*")
# Encoders that are averaged from another one, in self-supervised training; the other one is taken.
AVERAGED = ("encoder_k", "momentum_encoder", "target_encoder", "target_network", "key_encoder", "ema")


def the_one_naming(state: Entries) -> Names:
    """The naming and the prefix of the ResNet-FPN, or ResNet, in a state dict; not of an encoder's average.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    found = recognise(state)
    if len(found) > 1:
        found = [names for names in found if not set(names.prefix.split(".")) & set(AVERAGED)] or found
    if not found:
        raise CheckpointError(
            "not the checkpoint of a ResNet-FPN or of a plain ResNet in the naming of any known source: its "
            f"{len(state)} names begin with {', '.join(list(state)[:3])}"
        )
    if len(found) > 1:
        raise CheckpointError(
            "there are several models in it: pass the entries of one, by their prefix "
            + " or ".join(repr(names.prefix) for names in found)
        )
    return found[0]


def beside_trunk(state: Entries, names: Names) -> list[str]:
    """Entries of other parts of the model than a trunk: its neck, its heads, whatever they are called."""
    if names.naming.has_pyramid:
        return []
    unknown = [name for name in state if names.ours(name) is None and not names.is_head(name)]
    return [name for name in unknown if not is_of_trunk(name, names.prefix)]


def is_of_trunk(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and OF_TRUNK.fullmatch(name.removeprefix(prefix)) is not None


def statistics_folded_in(state: Entries, names: Names) -> dict[str, Tensor]:
    """The statistics that make batch norm the scale and shift that it has come as, as far as they are missing."""
    folded = {}
    for name, value in state.items():
        ours = names.ours(name)
        if ours is not None and ours.endswith(".bias"):
            for word, fill in (("running_mean", torch.zeros_like), ("running_var", torch.ones_like)):
                theirs = names.theirs(ours.removesuffix("bias") + word)
                if theirs is not None and theirs not in state:
                    folded[theirs] = fill(value)
    return folded


def match_all(own: Entries, state: Entries, names: Names) -> Report:
    """Every entry of the model with the checkpoint's, and every one of the checkpoint's but for its heads'.

    Raises:
        CheckpointError: there is any that has no counterpart, or one of another shape.
    """
    theirs = {name: names.theirs(name) for name in own}
    expected = {other: own[name] for name, other in theirs.items() if other is not None}
    inside = {name: value for name, value in state.items() if not names.is_head(name)}
    report = match_by_name(expected, inside)
    unnamed = [name for name, other in theirs.items() if other is None]
    if names.naming.has_pyramid and unnamed:
        raise CheckpointError(
            f"{names.naming.source} has no names for {', '.join(unnamed)}, which the arguments ask for"
        )
    if not report.complete or report.unexpected:
        raise CheckpointError(
            f"its names are those of {names.naming.source}, but it is no such model: {report}{hint(report.unexpected)}"
        )
    return replace(
        report,
        matched={name: other for name, other in theirs.items() if other in report.matched},
        unexpected=tuple(name for name in state if name not in inside),
    )
