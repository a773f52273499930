"""Boxes of all kinds for the parity checks, in cells of a map, drawn from a generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FARTHEST = 2.0**28  # cells; a little further and torchvision's 32-bit sizes overflow

# (count, height, width of the map, generator) -> Tensor[count, 4] of (x1, y1, x2, y2) in cells of the map, float64.
Corners = Callable[[int, int, int, torch.Generator], Tensor]


def uniform(count: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, columns, dtype=torch.float64, generator=generator)


def around(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Ordered corners in and around the map."""
    corners = (uniform(count, 4, generator).view(count, 2, 2) * 1.4 - 0.2).sort(dim=1).values
    return corners.flatten(1) * torch.tensor([width, height, width, height])


def half_cells(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """On a grid of half a cell: every second coordinate rounds from exactly one half (where the scale is exact)."""
    return (around(count, height, width, generator) * 2).round() / 2


def off_map(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Beside the map on some side, or just reaching it."""
    shift = (torch.randint(-1, 2, (count, 2), generator=generator) * torch.tensor([width, height])).repeat(1, 2)
    return around(count, height, width, generator) + shift


def reversed_(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    return around(count, height, width, generator)[:, [2, 3, 0, 1]]


def tiny(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Smaller than two cells."""
    corner = uniform(count, 2, generator) * torch.tensor([width, height])
    return torch.cat([corner, corner + 2 * uniform(count, 2, generator) ** 3], dim=1)


def huge(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Many times the map, up to FARTHEST cells to each side."""
    reach = FARTHEST ** uniform(count, 4, generator)
    return reach * torch.tensor([-1, -1, 1, 1]) + torch.tensor([0, 0, width, height])


def mixed(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    every = torch.stack([kind(count, height, width, generator) for kind in KINDS.values() if kind is not mixed])
    return every[torch.randint(len(every), (count,), generator=generator), torch.arange(count)]


KINDS: dict[str, Corners] = {
    "random": around,
    "half-cell": half_cells,
    "off-map": off_map,
    "reversed": reversed_,
    "tiny": tiny,
    "huge": huge,
    "mixed": mixed,
}
