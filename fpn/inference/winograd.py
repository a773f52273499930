"""3×3 convolution by minimal filtering F(4×4, 3×3): Lavin & Gray, Fast Algorithms for Convolutional Neural Networks
(2016), section 4.2. A quarter of the multiplications; cuDNN does the same on GPUs, oneDNN on CPUs does not.

The output comes in tiles of 4×4, each made of 6×6 inputs. In transformed form a tile is 36 numbers, and each of the
output depends on its like of the input only: 36 matrices [tiles, in], times as many [in, out], are the convolution.
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
# On both sides of a tile at once, as one matrix.
INPUT_2D, OUTPUT_2D = torch.kron(INPUT, INPUT), torch.kron(OUTPUT, OUTPUT)
CENTRE = 6 + 1  # the place (1, 1) of the 36: it goes into all outputs of its tile, times one

TILES_AT_ONCE = 128  # what they become stays in a CPU's cache
# With fewer, the transforms, or reading four times as many weights, cost more than is saved.
LEAST_TILES = 16
LEAST_CHANNELS = 128


def serves(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `conv2d` computes that convolution of such maps, and in less time than oneDNN."""
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
        Tensor[N, out, H, W] in channels_last memory. Of a map of numbers of one size the relative error is 2 to 3·10⁻⁶,
        four or five times that of oneDNN's sum. A larger number costs the outputs of the tiles it is in their last
        digits, and one that is not finite all of them.
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
    # In whole parts, and so sometimes larger than the map.
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
    """The size of the parts of `count` things, in as few parts as `most` at a time allow, all of about one size."""
    return math.ceil(count / math.ceil(count / max(1, most)))


def fill(padded: Tensor, maps: Tensor, top: int) -> None:
    """The rows of `maps` from `top` on, with one column of zeros at the left, and zeros for rows that there are not."""
    images, height, width, _ = maps.shape
    bottom = top + padded.shape[1]
    start, stop = max(top, 0), min(bottom, height)
    padded[:, : start - top] = 0
    padded[:, stop - top :] = 0
    padded[:images, start - top : stop - top, 1 : width + 1] = maps[:, start:stop]
