"""The report of what fusing, freezing, checkpointing and accelerating did to the parts of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Changes:
    """What was done to a model, part by part.

    Attributes:
        replaced: name of a part -> what is there now, or how it is run.
        left: name of a part that is as it was -> why.
    """

    replaced: Mapping[str, str] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        replaced = [f"replaced {name}: {what}" for name, what in self.replaced.items()]
        left = [f"left {name} as it was: {why}" for name, why in self.left.items()]
        return "\n".join([*replaced, *left]) or "there was nothing to replace"
