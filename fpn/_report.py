"""The report of how a checkpoint was loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Report:
    """How the entries of a checkpoint meet those of a model.

    Attributes:
        by: "name" or "order".
        matched: name in the model -> name in the checkpoint.
        missing: names of the model that the checkpoint lacks.
        unexpected: names of the checkpoint that the model lacks.
        mismatched: name in the model -> (its shape, the checkpoint's shape).
        notes: the checkpoint's source, and what was assumed because no key says it.
    """

    by: str
    matched: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, tuple[torch.Size, torch.Size]]
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every entry of the model has its counterpart."""
        return not self.missing and not self.mismatched

    def __str__(self) -> str:
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        lines = [f"{len(self.matched)} of {total} entries matched by {self.by}"]
        shapes = [f"{name} is {tuple(own)}, given {tuple(given)}" for name, (own, given) in self.mismatched.items()]
        for label, names in (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"{len(names)} {label}: {', '.join(names[:5])}{more}")
        return "; ".join((*lines, *self.notes))
