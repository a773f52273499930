"""The CUDA path: launches of the kernels that CuPy compiles.

The functions take checked CUDA tensors of one device and return new ones. Memory comes from torch's allocator, launches
go to torch's current stream, nothing waits for the device and nothing is read back: after a first call, which compiles,
a CUDA graph can capture them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roi.kernels import get_kernel
from roi.layout import empty_argmax, empty_pooled, memory_format


class KernelLimitError(ValueError):
    """The CUDA kernels do not take tensors of this size or dtype; the torch path does."""


# C++ names of the element types.
_FEATURES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "__half",
    torch.bfloat16: "__nv_bfloat16",
}
_COORDINATES = {torch.float32: "float", torch.float64: "double"}
_INDICES = {torch.int32: "int", torch.int64: "long long"}
_COORDINATE_SCALARS = {torch.float32: np.float32, torch.float64: np.float64}

# The rest is to agree with roi_pool.cu.
_THREADS = 256
_CHANNELS_PER_THREAD = 4
_VECTOR_BYTES = 16
_EDGES_BYTES = 8
_CANDIDATE_BYTES = 28

_MAX_GRID_Y = 65535
_MAX_EXTENT = 2**30
_MAX_BINS_PER_SIDE = 48 * 1024 // _EDGES_BYTES


def roi_pool(
    input: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int, pooled_width: int, with_argmax: bool
) -> tuple[Tensor, Tensor]:
    """RoI max pooling.

    Args:
        input: Tensor[N, C, H, W], float32, float64, float16 or bfloat16. Contiguous and channels_last memory is read as
            it lies; any other is copied to contiguous first.
        rois: Tensor[K, 5] of (batch index, x1, y1, x2, y2), float32 or float64. A fraction in an index is dropped.
        spatial_scale: cells of the map per unit of the boxes.
        pooled_height, pooled_width: bins of the output.
        with_argmax: whether to keep what the gradient needs.

    Returns:
        output: Tensor[K, C, pooled_height, pooled_width] in the dtype and the memory format of `input`; a row that is
            not finite or off the batch is NaN.
        argmax: the same shape and format, integer: the cell y·W + x of the first maximum, or of the last NaN where
            there is one; -1 for an empty bin. Tensor[0] where it was not asked for.

    Raises:
        KernelLimitError: a size or a dtype is not one that the kernels take.
    """
    batch, channels, height, width = input.shape
    _check_limits(batch, channels, height, width, pooled_height, pooled_width)
    channels_last = memory_format(input) == torch.channels_last
    if not channels_last:
        input = input.contiguous()
    rois = rois.contiguous()
    boxes = rois.shape[0]
    output = empty_pooled(input, boxes, pooled_height, pooled_width)
    argmax = empty_argmax(input, output, with_argmax, memory_format(output))
    if output.numel() == 0:
        return output, argmax

    bins = pooled_height * pooled_width
    types = _types(input.dtype, rois.dtype, argmax.dtype, with_argmax)
    if channels_last:
        lanes = _lanes(input)
        items = channels // lanes * bins
        expression = f"roi::roi_pool_channels_last<{types}, {lanes}>"
    else:
        items = _ceil_divide(channels, _CHANNELS_PER_THREAD) * bins
        expression = f"roi::roi_pool_contiguous<{types}>"
    grid, block = _per_box(boxes, items)
    pointers = (input.data_ptr(), rois.data_ptr(), output.data_ptr(), argmax.data_ptr() if with_argmax else 0)
    scale = _COORDINATE_SCALARS[rois.dtype](spatial_scale)
    arguments = (*pointers, scale, *_int32(batch, channels, height, width, pooled_height, pooled_width))
    shared_bytes = _EDGES_BYTES * (pooled_height + pooled_width)
    _launch("roi_pool", expression, grid, block, arguments, shared_bytes, input.device)
    return output, argmax


def roi_pool_backward(
    grad: Tensor, rois: Tensor, argmax: Tensor, spatial_scale: float, batch: int, channels: int, height: int, width: int
) -> Tensor:
    """Gradient of `roi_pool` with respect to its input: each bin's gradient is added at the bin's argmax.

    Under `torch.use_deterministic_algorithms(True)` one thread sums each element, in the order of the boxes and of the
    bins, so that every run gives the same; otherwise by atomic additions. Half precision is accumulated in float32.

    Args:
        grad: Tensor[K, C, pooled_height, pooled_width] in the dtype of the input, in any memory format.
        rois, spatial_scale: those of the forward pass.
        argmax: what the forward pass gave.
        batch, channels, height, width: shape of the input.

    Returns:
        Tensor[batch, channels, height, width] in the dtype of `grad` and the memory format of `argmax`.

    Raises:
        KernelLimitError: a size or a dtype is not one that the kernels take.
    """
    pooled_height, pooled_width = argmax.shape[2:]
    _check_limits(batch, channels, height, width, pooled_height, pooled_width)
    boxes = rois.shape[0]
    layout = memory_format(argmax)
    channels_last = layout == torch.channels_last
    rois = rois.contiguous()
    grad = grad.contiguous(memory_format=layout)
    argmax = argmax.contiguous(memory_format=layout)

    deterministic = torch.are_deterministic_algorithms_enabled()
    accumulator = torch.float32 if grad.dtype.itemsize < 4 and not deterministic else grad.dtype
    shape = (batch, channels, height, width)
    grad_input = torch.empty(shape, dtype=accumulator, device=grad.device, memory_format=layout)
    if grad_input.numel() == 0:
        return grad_input.to(grad.dtype)
    if grad.numel() == 0:
        return grad_input.zero_().to(grad.dtype)

    types = _types(grad.dtype, rois.dtype, argmax.dtype, channels_last)
    pointers = (grad.data_ptr(), rois.data_ptr(), argmax.data_ptr(), grad_input.data_ptr())
    sizes = _int32(batch, channels, height, width, pooled_height, pooled_width)
    arguments: tuple[Any, ...]
    if deterministic:
        expression = f"roi::roi_pool_backward_gather<{types}>"
        grid, block, shared_bytes = _per_cell(batch, channels, height, width, channels_last)
        arguments = (*pointers, _COORDINATE_SCALARS[rois.dtype](spatial_scale), *_int32(boxes), *sizes)
    else:
        expression = f"roi::roi_pool_backward_atomic<{types}>"
        grid, block = _per_box(boxes, channels * pooled_height * pooled_width)
        shared_bytes = 0
        arguments = (*pointers, *sizes)
        grad_input.zero_()
    _launch("roi_pool", expression, grid, block, arguments, shared_bytes, grad.device)
    return grad_input.to(grad.dtype)


def _check_limits(batch: int, channels: int, height: int, width: int, pooled_height: int, pooled_width: int) -> None:
    if height > _MAX_EXTENT or width > _MAX_EXTENT:
        raise KernelLimitError(f"the CUDA kernels take maps of at most 2**30 rows and columns, got {height} x {width}")
    if pooled_height < 1 or pooled_width < 1 or pooled_height + pooled_width > _MAX_BINS_PER_SIDE:
        raise KernelLimitError(
            f"the CUDA kernels take an output size of at least 1 x 1 whose sides sum to at most {_MAX_BINS_PER_SIDE}, "
            f"got {pooled_height} x {pooled_width}"
        )
    if channels * pooled_height * pooled_width > _MAX_EXTENT:
        raise KernelLimitError(
            "the CUDA kernels take at most 2**30 output elements per box, "
            f"got {channels} x {pooled_height} x {pooled_width}"
        )
    if batch * channels >= 2**31:
        raise KernelLimitError(f"the CUDA kernels take batch size x channels below 2**31, got {batch} x {channels}")


@lru_cache(maxsize=256)
def _types(features: torch.dtype, coordinates: torch.dtype, index: torch.dtype, flag: bool) -> str:
    """Template arguments that the kernels have in common: element types and a switch."""
    if features not in _FEATURES:
        raise KernelLimitError(f"the CUDA kernels take {', '.join(map(str, _FEATURES))}, got {features}")
    return f"{_FEATURES[features]}, {_COORDINATES[coordinates]}, {_INDICES[index]}, {str(flag).lower()}"


def _ceil_divide(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _lanes(input: Tensor) -> int:
    """Channels per vector access: as many as 16 bytes hold, or 1 where C or the alignment forbids it."""
    lanes = _VECTOR_BYTES // input.element_size()
    return lanes if input.shape[1] % lanes == 0 and input.data_ptr() % _VECTOR_BYTES == 0 else 1


@lru_cache(maxsize=256)
def _int32(*values: int) -> tuple[np.int32, ...]:
    """Arguments for `int` parameters: a Python int would be passed as 64 bits. Kept, as sizes recur."""
    return tuple(np.int32(value) for value in values)


def _per_box(boxes: int, items: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Grid and block of the kernels in which blockIdx.x is the box and a thread takes one of its items."""
    threads = min(_THREADS, 32 * _ceil_divide(items, 32))
    return (boxes, min(_ceil_divide(items, threads), _MAX_GRID_Y)), (threads,)


def _per_cell(
    batch: int, channels: int, height: int, width: int, channels_last: bool
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Grid, block and shared memory of the gather."""
    # Along x lie the neighbours in memory: a full warp of them, or as many as there are.
    neighbours = _ceil_divide(channels, _CHANNELS_PER_THREAD) if channels_last else width
    across = min(32, 1 << (neighbours - 1).bit_length())
    down = _THREADS // across
    if channels_last:
        patches = _ceil_divide(width, down) * height
        groups = _ceil_divide(channels, _CHANNELS_PER_THREAD * across)
    else:
        patches = _ceil_divide(width, across) * _ceil_divide(height, down)
        groups = _ceil_divide(channels, _CHANNELS_PER_THREAD)
    threads = across * down
    shared_bytes = _CANDIDATE_BYTES * threads + 4 * _ceil_divide(threads, 32)
    return (patches, min(batch * groups, _MAX_GRID_Y)), (across, down), shared_bytes


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


def _launch(
    source: str,
    expression: str,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    arguments: tuple[Any, ...],
    shared_bytes: int,
    device: torch.device,
) -> None:
    index = device.index
    kernel = get_kernel(source, expression, index)
    stream = _cupy_stream(torch.cuda.current_stream(device).cuda_stream, index)
    if torch.cuda.current_device() == index:
        with stream:
            kernel(grid, block, arguments, shared_mem=shared_bytes)
    else:
        with torch.cuda.device(index), stream:
            kernel(grid, block, arguments, shared_mem=shared_bytes)
