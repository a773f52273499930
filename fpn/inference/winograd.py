"""3×3 convolution by minimal filtering F(4×4, 3×3): Lavin & Gray, Fast Algorithms for Convolutional Neural Networks
(2016), section 4.2. It takes a quarter of the multiplications. cuDNN has it on GPUs; oneDNN does not use it on CPUs.

The output is computed in tiles of 4×4, each from 6×6 inputs. A transformed tile is 36 numbers. Number i of the output
is a sum over number i of the input channels, so the convolution is 36 matrix products [tiles, in] × [in, out].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fpn._activation import Activation

# The algorithm's matrices for the points 0, 1, -1, 2, -2 and infinity: Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A.
INPUT = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float32,
    device="cpu",
)
WEIGHT = torch.tensor(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    dtype=torch.float64,
    device="cpu",
)
OUTPUT = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    dtype=torch.float32,
    device="cpu",
)
# The transform of rows and columns of a tile together, as one matrix.
INPUT_2D, OUTPUT_2D = torch.kron(INPUT, INPUT), torch.kron(OUTPUT, OUTPUT)
CENTRE = 6 + 1  # place (1, 1) of the 36: every output of the tile contains it once

TILES_AT_ONCE = 128  # their transforms fit into a CPU's cache
# With fewer, the transforms cost more than they save, or the weights do, which are four times as large.
LEAST_TILES = 16
LEAST_CHANNELS = 128


def serves(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `conv2d` computes that convolution of such maps, in less time than oneDNN."""
    batch, _, height, width = x.shape
    return (
        x.dtype == torch.float32
        and batch * tiles_of(height) * tiles_of(width) >= LEAST_TILES
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == conv.padding == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    )


def transform(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The weight of `conv`, Tensor[out, in, 3, 3], as Tensor[36, in, out] of the dtype of `x`."""
    transformed = WEIGHT @ conv.weight.double() @ WEIGHT.T
    return transformed.flatten(2).permute(2, 1, 0).to(x.dtype).contiguous()


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None, activation: Activation | None
) -> Tensor:
    """activation(conv(x) + addend), for a convolution with padding and stride 1. Without gradient.

    Args:
        x: Tensor[N, in, H, W] of float32 on the CPU, not empty.
        weight: as `transform` gives it.
        bias: Tensor[out].
        addend: Tensor[N, out, H, W].
        activation: what comes last.

    Returns:
        Tensor[N, out, H, W] in channels_last memory. Where the numbers of the map are about equally large, the relative
        error is 2 to 3·10⁻⁶, four or five times that of oneDNN. A much larger number takes precision from the outputs
        of its tiles. A number that is not finite may make all of them non-finite.
    """
    batch, channels, height, width = x.shape
    down, across = tiles_of(height), tiles_of(width)
    images, rows = even_share(batch, TILES_AT_ONCE // (down * across)), even_share(down, TILES_AT_ONCE // across)
    tiles, out_channels = images * rows * across, weight.shape[2]

    maps = x.permute(0, 2, 3, 1)
    padded = x.new_zeros((images, 4 * rows + 2, 4 * across + 2, channels))
    image, row, column, channel = padded.stride()
    windows = padded.as_strided(
        (6, 6, images, rows, across, channels), (row, column, image, 4 * row, 4 * column, channel)
    )
    inputs = x.new_empty(windows.shape)
    transformed = x.new_empty((36, tiles, channels))
    products = x.new_empty((36, tiles, out_channels))
    results = x.new_empty((4, 4, images, rows, across, out_channels))
    # A whole number of parts: it may be larger than the map.
    output = x.new_empty((round_up(batch, images), round_up(down, rows), 4, across, 4, out_channels))
    for first in range(0, batch, images):
        for top in range(0, down, rows):
            fill(padded, maps[first : first + images], 4 * top - 1)
            inputs.copy_(windows)
            torch.mm(INPUT_2D, inputs.view(36, -1), out=transformed.view(36, -1))
            torch.bmm(transformed, weight, out=products)
            if bias is not None:
                products[CENTRE] += bias
            torch.mm(OUTPUT_2D, products.view(36, -1), out=results.view(16, -1))
            part = output[first : first + images, top : top + rows].permute(2, 4, 0, 1, 3, 5)
            part.copy_(results if activation is None or addend is not None else activation.apply_(results))
    cells = output.view(len(output), -1, 4 * across, out_channels)[:batch, :height, :width]
    y = cells.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    if addend is not None:
        y += addend
        if activation is not None:
            y = activation.apply_(y)
    return y


def tiles_of(cells: int) -> int:
    return math.ceil(cells / 4)


def round_up(count: int, step: int) -> int:
    return math.ceil(count / step) * step


def even_share(count: int, most: int) -> int:
    """The size of parts of `count`: as few parts as there can be with at most `most` in each, of about one size."""
    return math.ceil(count / math.ceil(count / max(1, most)))


def fill(padded: Tensor, maps: Tensor, top: int) -> None:
    """Fill `padded` with the rows of `maps` from `top` on, a column of zeros before them, and zeros beyond the map."""
    images, height, width, _ = maps.shape
    bottom = top + padded.shape[1]
    start, stop = max(top, 0), min(bottom, height)
    padded[:, : start - top] = 0
    padded[:, stop - top :] = 0
    padded[:images, start - top : stop - top, 1 : width + 1] = maps[:, start:stop]
