"""How a kernel accesses maps and pooled tensors: as they lie, or contiguous maps through a copy in channels_last.

In channels_last memory neighbouring threads take neighbouring channels of one cell, which lie together. In contiguous
maps they take neighbouring bins, whose cells lie apart: every load and every atomic addition moves a sector of its own.
A copy reads and writes each element of the maps once, so that it pays where they are small beside the pooled tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from roi._problem import Maps
from roi.cupy_path import launch
from roi.cupy_path.transpose_launches import to_channels_last

# Of the kernels that turn pooled tensors in shared memory (Transposed of roi_layout.cuh): several blocks of them are to
# fit on a multiprocessor.
TILE_BYTES = 16 * 1024
# A block of max pooling takes so many bytes of a cell of channels_last maps, two lines of the cache: the cells that
# neighbouring bins share are then still there. RoIAlign's geometry is dear, and every block works it out.
LINES_BYTES = 256
# A forward pass reads at least one cell for each element of the pooled tensor: a sector of 32 bytes, while copying an
# element moves 8.
READS = 1
# RoIAlign's backward pass adds to at least four cells for each.
ADDITIONS = 8


class Work(NamedTuple):
    """What the blocks of one launch share among them.

    Attributes:
        boxes, channels, bins: of the pooled tensor: Tensor[boxes, channels, bins].
        used_bytes: shared memory in which a block keeps the geometry of its box.
        most: channels that a block takes at a time, at most.
    """

    boxes: int
    channels: int
    bins: int
    used_bytes: int
    most: int

    def turn(self, per_thread: int, most: int) -> int:
        """Channels that a block takes: few enough for all boxes to make enough blocks; whole threads' channels."""
        turns = max(launch.ceil_divide(self.channels, most), launch.ceil_divide(launch.ENOUGH_BLOCKS, self.boxes))
        return per_thread * launch.ceil_divide(self.channels, per_thread * min(turns, self.channels))


class Access(NamedTuple):
    """Of one launch.

    Attributes:
        layout: C++ name.
        per_thread: channels of a thread.
        turn: channels that a block takes at a time for all bins; 0 where it takes neighbouring bins.
        shared_bytes: dynamic shared memory, tiles included.
        turned: whether the maps are in channels_last memory and the pooled tensors contiguous.
    """

    layout: str
    per_thread: int
    turn: int
    shared_bytes: int
    turned: bool = False

    def grid(self, work: Work) -> launch.LaunchGrid:
        """For kernels in which blockIdx.x is the box, and a thread takes its items one by one."""
        items = launch.ceil_divide(self.turn or work.channels, self.per_thread) * work.bins
        threads = min(launch.THREADS, 32 * launch.ceil_divide(items, 32))
        if self.turn:
            blocks = launch.ceil_divide(work.channels, self.turn)
        else:
            blocks = min(launch.ceil_divide(items, threads), launch.ceil_divide(launch.ENOUGH_BLOCKS, work.boxes))
        return launch.LaunchGrid((work.boxes, min(blocks, launch.MAX_GRID_Y)), (threads,), self.shared_bytes)


def as_they_lie(work: Work, channels_last: bool, per_thread: int) -> Access:
    """Maps and pooled tensors of one memory format."""
    turn = work.turn(per_thread, work.most) if channels_last else 0
    return Access(launch.layout(channels_last, per_thread), per_thread, turn, work.used_bytes)


def of_maps(work: Work, maps: Sequence[Tensor], tile: Sequence[int]) -> tuple[Sequence[Tensor], Access]:
    """The maps that a forward kernel is to read, and how.

    Args:
        maps: of one memory format.
        tile: bytes of an element of each pooled tensor.
    """
    shape = Maps.of(maps)
    if not shape.channels_last and copy_pays(work, shape, READS):
        lanes = launch.lanes_of(shape.channels, maps[0].element_size())
        access = transposed(work, lanes, tile)
        if lanes > 1 and access is not None:
            return [to_channels_last(x) for x in maps], access
    per_thread = launch.lanes(maps) if shape.channels_last else launch.CHANNELS_PER_THREAD
    return maps, as_they_lie(work, shape.channels_last, per_thread)


def copy_pays(work: Work, maps: Maps, accesses: int) -> bool:
    """Whether contiguous maps are to be copied. `accesses`: READS or ADDITIONS."""
    cells = sum(height * width for height, width in maps.sizes)
    return 0 < maps.batch * maps.channels * cells <= accesses * work.boxes * work.channels * work.bins


def transposed(work: Work, per_thread: int, tile: Sequence[int]) -> Access | None:
    """Channels_last maps and contiguous pooled tensors; None where not even a thread's channels fit the tile."""
    most = TILE_BYTES // (work.bins * sum(tile)) // per_thread * per_thread
    if most == 0 or work.channels % per_thread:
        return None
    turn = work.turn(per_thread, most)
    shared_bytes = work.used_bytes
    for element_bytes in tile:
        shared_bytes = round_up(shared_bytes) + turn * work.bins * element_bytes
    if shared_bytes > launch.SHARED_BYTES:
        return None
    return Access(f"roi::Transposed<{per_thread}>", per_thread, turn, shared_bytes, turned=True)


def round_up(shared_bytes: int) -> int:
    """To where SharedRest of roi_layout.cuh begins a piece."""
    return launch.ceil_divide(shared_bytes, launch.VECTOR_BYTES) * launch.VECTOR_BYTES
