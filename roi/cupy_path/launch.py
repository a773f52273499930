"""What all launches share: the kernels' arguments, grids, limits and the stream."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from roi._outputs import empty_gradients
from roi._problem import Maps, Pooling, level_range, memory_format
from roi.kernels import get_kernel


class KernelLimitError(ValueError):
    """The CUDA kernels do not take tensors of this size or dtype; the torch path does."""


# C++ names of the element types.
FEATURES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
}
COORDINATES = {torch.float32: "float", torch.float64: "double"}
INDICES = {torch.int32: "int", torch.int64: "long long"}

# These must agree with the sources in kernels/.
THREADS = 256
MAX_LEVELS = 8
CHANNELS_PER_THREAD = 4
VECTOR_BYTES = 16
SHARED_BYTES = 48 * 1024
RANGE_BYTES = 8

MAX_GRID_Y = 65535
MAX_EXTENT = 2**30
MAX_BINS_PER_SIDE = SHARED_BYTES // RANGE_BYTES
# Several times as many as the largest GPUs run at once. With more blocks, each would use its geometry for less work.
ENOUGH_BLOCKS = 4096
# The gather's shared memory, so that a few blocks fit on a multiprocessor.
SLOTS_BYTES = 16 * 1024


class LaunchGrid(NamedTuple):
    """The size of a launch: blocks, threads in a block, bytes of dynamic shared memory."""

    blocks: tuple[int, int]
    threads: tuple[int, ...]
    shared_bytes: int


def levels_struct(coordinates: torch.dtype) -> np.dtype[np.void]:
    """`Levels` of roi_levels.cuh, field for field."""
    number = {torch.float32: np.float32, torch.float64: np.float64}[coordinates]
    return np.dtype(
        [
            ("data", np.uint64, MAX_LEVELS),
            ("scale", number, MAX_LEVELS),
            ("height", np.int32, MAX_LEVELS),
            ("width", np.int32, MAX_LEVELS),
            ("canonical_scale", number),
            ("canonical_level", number),
            ("finest_level", number),
            ("coarsest_level", number),
            ("count", np.int32),
        ],
        align=True,
    )


def levels(maps: Sequence[Tensor], pooling: Pooling, coordinates: torch.dtype) -> npt.NDArray[np.void]:
    """The argument for a `Levels` parameter: CuPy passes a NumPy array of one structure by value."""
    sizes = tuple((x.shape[2], x.shape[3]) for x in maps)
    struct: npt.NDArray[np.void] = _levels_without_data(sizes, pooling, coordinates).copy()
    struct["data"][: len(maps)] = [x.data_ptr() for x in maps]
    return struct


@lru_cache(maxsize=256)
def _levels_without_data(
    sizes: tuple[tuple[int, int], ...], pooling: Pooling, coordinates: torch.dtype
) -> npt.NDArray[np.void]:
    struct = np.zeros((), levels_struct(coordinates))
    count = len(sizes)
    struct["scale"][:count] = pooling.scales
    struct["height"][:count] = [height for height, _ in sizes]
    struct["width"][:count] = [width for _, width in sizes]
    struct["canonical_scale"], struct["canonical_level"] = pooling.canonical_scale, pooling.canonical_level
    struct["finest_level"], struct["coarsest_level"] = level_range(pooling.scales)
    struct["count"] = count
    return struct


@lru_cache(maxsize=256)
def int32(*values: int) -> tuple[np.int32, ...]:
    """Arguments for `int` parameters: a Python int would be passed as 64 bits. Kept, as sizes recur."""
    return tuple(np.int32(value) for value in values)


def feature_type(dtype: torch.dtype) -> str:
    """C++ name of the features' type."""
    if dtype not in FEATURES:
        raise KernelLimitError(f"the CUDA kernels take {', '.join(map(str, FEATURES))}, got {dtype}")
    return FEATURES[dtype]


def number_bytes(dtype: torch.dtype) -> int:
    """Size of what the kernels compute in, for features of that dtype."""
    return max(dtype.itemsize, 4)


def flag(value: bool) -> str:
    """C++ name of a bool."""
    return str(value).lower()


def layout(channels_last: bool, channels: int) -> str:
    """C++ name of a memory format with so many channels per thread."""
    return f"roi::{'ChannelsLast' if channels_last else 'Contiguous'}<{channels}>"


def of_one_format(maps: Sequence[Tensor]) -> list[Tensor]:
    """The maps in the first one's memory format."""
    return [x.contiguous(memory_format=memory_format(maps[0])) for x in maps]


def lanes(maps: Sequence[Tensor]) -> int:
    """Channels per vector access of channels_last maps: what 16 bytes hold, or 1 where C or an address forbids it."""
    aligned = all(x.data_ptr() % VECTOR_BYTES == 0 for x in maps)
    return lanes_of(maps[0].shape[1], maps[0].element_size()) if aligned else 1


def lanes_of(channels: int, element_bytes: int) -> int:
    """Channels per vector access of aligned channels_last maps."""
    most = VECTOR_BYTES // element_bytes
    return most if channels % most == 0 else 1


def ceil_divide(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def check_limits(maps: Maps, pooling: Pooling) -> None:
    """Whether the kernels take such maps, and the output of a box."""
    if len(maps.sizes) > MAX_LEVELS:
        raise KernelLimitError(f"the CUDA kernels take at most {MAX_LEVELS} levels, got {len(maps.sizes)}")
    for height, width in maps.sizes:
        if height > MAX_EXTENT or width > MAX_EXTENT:
            raise KernelLimitError(
                f"the CUDA kernels take maps of at most 2**30 rows and columns, got {height} x {width}"
            )
    bins = pooling.pooled_height, pooling.pooled_width
    if min(bins) < 1 or sum(bins) > MAX_BINS_PER_SIDE:
        raise KernelLimitError(
            f"the CUDA kernels take an output size of at least 1 x 1 whose sides sum to at most {MAX_BINS_PER_SIDE}, "
            f"got {bins[0]} x {bins[1]}"
        )
    elements = pooling.output_channels(maps.channels) * pooling.bins
    if elements > MAX_EXTENT:
        raise KernelLimitError(
            f"the CUDA kernels take at most 2**30 output elements per box, got {elements}: "
            f"{pooling.output_channels(maps.channels)} channels and {bins[0]} x {bins[1]} bins"
        )
    if maps.batch * maps.channels >= 2**31:
        raise KernelLimitError(
            f"the CUDA kernels take batch size x channels below 2**31, got {maps.batch} x {maps.channels}"
        )


def check_shared(shared_bytes: int, what: str) -> None:
    if shared_bytes > SHARED_BYTES:
        raise KernelLimitError(
            f"the CUDA kernels keep in {SHARED_BYTES} bytes of shared memory {what}, which take {shared_bytes}"
        )


def per_cell(maps: Maps, pooling: Pooling, candidate_bytes: int, weight_bytes: int) -> tuple[LaunchGrid, int]:
    """Of the gather (roi_gather.cuh): the grid, and `slots`. `weight_bytes` is 0 where cells have no weights."""
    # Along x lie the neighbours in memory: a full warp of them, or as many as there are.
    channels_last, pooled_height, pooled_width = maps.channels_last, pooling.pooled_height, pooling.pooled_width
    neighbours = ceil_divide(maps.channels, CHANNELS_PER_THREAD) if channels_last else max(maps.widths)
    across = min(32, 1 << (neighbours - 1).bit_length())
    down = THREADS // across
    while True:
        threads = across * down
        rows, columns = (1, down) if channels_last else (down, across)
        rest = candidate_bytes * threads + 4 * ceil_divide(threads, 32)
        slot = RANGE_BYTES * (rows + columns) + weight_bytes * (rows * pooled_height + columns * pooled_width)
        if rest + slot <= SHARED_BYTES or rows == columns == 1:
            break
        # A smaller patch for very many bins.
        if channels_last or across == 1 or (down > 1 and rows * pooled_height > columns * pooled_width):
            down //= 2
        else:
            across //= 2
    check_shared(rest + slot, f"the weights of {pooled_height} x {pooled_width} bins")
    slots = max(1, min(threads, SLOTS_BYTES // slot, (SHARED_BYTES - rest) // slot))
    patches = sum(ceil_divide(height, rows) * ceil_divide(width, columns) for height, width in maps.sizes)
    groups = ceil_divide(maps.channels, CHANNELS_PER_THREAD * (across if channels_last else 1))
    grid = LaunchGrid((patches, min(maps.batch * groups, MAX_GRID_Y)), (across, down), rest + slots * slot)
    return grid, slots


def zeros(grad: Tensor, maps: Maps) -> list[Tensor]:
    """What an atomic backward kernel adds to: at least float32."""
    gradients = empty_gradients(grad.new_empty(0, dtype=torch.promote_types(grad.dtype, torch.float32)), maps)
    return [x.zero_() for x in gradients]


class _StreamHandle:
    """A stream of torch's, by the protocol that CuPy takes streams over with."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


@lru_cache(maxsize=256)
def _cupy_stream(handle: int, device: int) -> Any:
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_StreamHandle(handle))
    return cupy.cuda.ExternalStream(handle, device)  # CuPy before 14


def run(source: str, expression: str, grid: LaunchGrid, arguments: tuple[Any, ...], device: torch.device) -> None:
    """Launch an instantiation of a kernel in `kernels/` on torch's current stream of `device`."""
    index = device.index
    kernel = get_kernel(source, expression, index)
    stream = _cupy_stream(torch.cuda.current_stream(device).cuda_stream, index)
    if torch.cuda.current_device() == index:
        with stream:
            kernel(grid.blocks, grid.threads, arguments, shared_mem=grid.shared_bytes)
    else:
        with torch.cuda.device(index), stream:
            kernel(grid.blocks, grid.threads, arguments, shared_mem=grid.shared_bytes)
