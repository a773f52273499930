"""What the launches have in common: arguments as the kernels take them, grids, limits, the stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from roi._problem import memory_format
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

# The rest is to agree with the sources in kernels/.
THREADS = 256
MAX_LEVELS = 8
CHANNELS_PER_THREAD = 4
VECTOR_BYTES = 16
SHARED_BYTES = 48 * 1024
RANGE_BYTES = 8

MAX_GRID_Y = 65535
MAX_EXTENT = 2**30
MAX_BINS_PER_SIDE = SHARED_BYTES // RANGE_BYTES
# Several times what the largest GPUs run at once. In more, each would do less for the geometry that it works out.
ENOUGH_BLOCKS = 4096
# Of the gather's shared memory: what leaves room for a few blocks on a multiprocessor.
SLOTS_BYTES = 16 * 1024

ONE_LEVEL = (1.0, 0.0)  # canonical scale and level, which say nothing where there is one map


class Grid(NamedTuple):
    """Of a launch: blocks, threads in a block, bytes of dynamic shared memory."""

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
            ("count", np.int32),
        ],
        align=True,
    )


def levels(
    maps: Sequence[Tensor], scales: Sequence[float], canonical: tuple[float, float], coordinates: torch.dtype
) -> npt.NDArray[np.void]:
    """The argument for a `Levels` parameter: CuPy passes a NumPy array of one structure by value."""
    sizes = tuple((x.shape[2], x.shape[3]) for x in maps)
    struct: npt.NDArray[np.void] = _levels_without_data(sizes, tuple(scales), canonical, coordinates).copy()
    struct["data"][: len(maps)] = [x.data_ptr() for x in maps]
    return struct


@lru_cache(maxsize=256)
def _levels_without_data(
    sizes: tuple[tuple[int, int], ...],
    scales: tuple[float, ...],
    canonical: tuple[float, float],
    coordinates: torch.dtype,
) -> npt.NDArray[np.void]:
    struct = np.zeros((), levels_struct(coordinates))
    count = len(sizes)
    struct["scale"][:count] = scales
    struct["height"][:count] = [height for height, _ in sizes]
    struct["width"][:count] = [width for _, width in sizes]
    struct["canonical_scale"], struct["canonical_level"] = canonical
    struct["finest_level"] = -math.log2(scales[0])
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


def layout(channels_last: bool, channels: int) -> str:
    """C++ name of a memory format with so many channels per thread."""
    return f"roi::{'ChannelsLast' if channels_last else 'Contiguous'}<{channels}>"


def of_one_format(maps: Sequence[Tensor]) -> list[Tensor]:
    """The maps in the first one's memory format."""
    return [x.contiguous(memory_format=memory_format(maps[0])) for x in maps]


def lanes(maps: Sequence[Tensor]) -> int:
    """Channels per vector access of channels_last maps: what 16 bytes hold, or 1 where C or an address forbids it."""
    most = VECTOR_BYTES // maps[0].element_size()
    aligned = all(x.data_ptr() % VECTOR_BYTES == 0 for x in maps)
    return most if aligned and maps[0].shape[1] % most == 0 else 1


def ceil_divide(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def check_limits(
    batch: int, channels: int, sizes: Sequence[tuple[int, int]], elements: int, pooled_height: int, pooled_width: int
) -> None:
    """Whether the kernels take maps of these sizes (height, width) and output of so many elements per box."""
    if len(sizes) > MAX_LEVELS:
        raise KernelLimitError(f"the CUDA kernels take at most {MAX_LEVELS} levels, got {len(sizes)}")
    for height, width in sizes:
        if height > MAX_EXTENT or width > MAX_EXTENT:
            raise KernelLimitError(
                f"the CUDA kernels take maps of at most 2**30 rows and columns, got {height} x {width}"
            )
    if pooled_height < 1 or pooled_width < 1 or pooled_height + pooled_width > MAX_BINS_PER_SIDE:
        raise KernelLimitError(
            f"the CUDA kernels take an output size of at least 1 x 1 whose sides sum to at most {MAX_BINS_PER_SIDE}, "
            f"got {pooled_height} x {pooled_width}"
        )
    if elements > MAX_EXTENT:
        raise KernelLimitError(
            f"the CUDA kernels take at most 2**30 output elements per box, got {elements}: "
            f"{channels} channels and {pooled_height} x {pooled_width} bins"
        )
    if batch * channels >= 2**31:
        raise KernelLimitError(f"the CUDA kernels take batch size x channels below 2**31, got {batch} x {channels}")


def check_shared(shared_bytes: int, what: str) -> None:
    if shared_bytes > SHARED_BYTES:
        raise KernelLimitError(
            f"the CUDA kernels keep in {SHARED_BYTES} bytes of shared memory {what}, which take {shared_bytes}"
        )


def per_box(boxes: int, items: int, shared_bytes: int) -> Grid:
    """For kernels in which blockIdx.x is the box and a thread takes its items one by one."""
    threads = min(THREADS, 32 * ceil_divide(items, 32))
    blocks = min(ceil_divide(items, threads), ceil_divide(ENOUGH_BLOCKS, boxes), MAX_GRID_Y)
    return Grid((boxes, blocks), (threads,), shared_bytes)


def per_cell(
    batch: int,
    channels: int,
    sizes: Sequence[tuple[int, int]],
    channels_last: bool,
    candidate_bytes: int,
    weight_bytes: int,
    pooled_height: int,
    pooled_width: int,
) -> tuple[Grid, int]:
    """Of the gather (roi_gather.cuh): the grid, and `slots`. `weight_bytes` is 0 where cells have no weights."""
    # Along x lie the neighbours in memory: a full warp of them, or as many as there are.
    neighbours = ceil_divide(channels, CHANNELS_PER_THREAD) if channels_last else max(width for _, width in sizes)
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
    patches = sum(ceil_divide(height, rows) * ceil_divide(width, columns) for height, width in sizes)
    groups = ceil_divide(channels, CHANNELS_PER_THREAD * (across if channels_last else 1))
    grid = Grid((patches, min(batch * groups, MAX_GRID_Y)), (across, down), rest + slots * slot)
    return grid, slots


def gradient_maps(
    grad: Tensor, batch: int, channels: int, sizes: Sequence[tuple[int, int]], channels_last: bool
) -> list[Tensor]:
    """What a backward kernel writes to: for a gather anything, in the dtype of `grad`; else zeros, at least float32."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    dtype = grad.dtype if deterministic else torch.promote_types(grad.dtype, torch.float32)
    maps = [
        torch.empty((batch, channels, *size), dtype=dtype, device=grad.device, memory_format=format_of(channels_last))
        for size in sizes
    ]
    if grad.numel() == 0 or not deterministic:
        for x in maps:
            x.zero_()
    return maps


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


def run(source: str, expression: str, grid: Grid, arguments: tuple[Any, ...], device: torch.device) -> None:
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
