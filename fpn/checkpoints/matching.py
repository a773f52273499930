"""How the entries of a checkpoint meet those of a model: by name, or by order."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fpn._report import Report

BATCH_NORM_ENTRIES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
COUNTER = "num_batches_tracked"  # a counter, not a weight: old checkpoints and frozen batch norm lack it


def match_by_name(model: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor]) -> Report:
    shared = [name for name in model if name in checkpoint]
    return Report(
        by="name",
        matched={name: name for name in shared if model[name].shape == checkpoint[name].shape},
        missing=tuple(name for name in model if name not in checkpoint and not name.endswith(COUNTER)),
        unexpected=tuple(name for name in checkpoint if name not in model),
        mismatched={
            name: (model[name].shape, checkpoint[name].shape)
            for name in shared
            if model[name].shape != checkpoint[name].shape
        },
    )


def match_by_order(model: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor]) -> Report | None:
    """The first entries of `checkpoint` paired with those of `model`, or None where any pair disagrees."""
    for counted in (True, False):
        own = [name for name in model if counted or not name.endswith(COUNTER)]
        given = [name for name in checkpoint if counted or not name.endswith(COUNTER)]
        pairs = dict(zip(own, given, strict=False))
        if len(given) >= len(own) and all(
            model[name].shape == checkpoint[other].shape and same_role(name, other, model)
            for name, other in pairs.items()
        ):
            rest = tuple(name for name in given if name not in set(pairs.values()))
            return Report("order", pairs, missing=(), unexpected=rest, mismatched={})
    return None


def same_role(name: str, other: str, model: Mapping[str, Tensor]) -> bool:
    """Whether the checkpoint's name `other` may stand for the model's `name`.

    Shapes cannot tell a mean from a variance, nor one of two equal layers from the other: where the last word is one
    of batch norm's it has to agree, and a name that the model knows stands for itself.
    """
    word, other_word = name.rpartition(".")[2], other.rpartition(".")[2]
    return (other not in model or other == name) and (other_word not in BATCH_NORM_ENTRIES or other_word == word)
