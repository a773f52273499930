"""CUDA graphs: a backbone, and whatever follows it, queued as one piece of work for images of one size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Output = TypeVar("Output")

WARMUP_CALLS = 3  # the first ones allocate, choose algorithms and compile kernels, none of which a graph can hold


def capture(call: Callable[..., Output], *inputs: Tensor) -> Callable[..., Output]:
    """Records one call of `call`, without gradients, and returns a function that replays it.

    A replay costs the host one launch instead of hundreds, for inputs of the recorded shapes and dtypes:

        def detect(images, boxes):
            return pooler(dict(zip("0123", model(images))), [boxes], [(480, 640)])

        replay = capture(detect, images, boxes)
        rois = replay(next_images, next_boxes)

    Args:
        call: takes the inputs; returns tensors, in any structure. It must not read a tensor's values on the host, and
            is called four times.
        inputs: CUDA tensors of one device. The memory format of each is kept.

    Returns:
        The function: inputs like those recorded -> what `call` returned, in the same memory every time. Copy what has
        to outlast the next replay. Weights that are changed in place are seen; weights that are replaced are not.

    Raises:
        ValueError: there are no inputs, or they are not on one CUDA device; later, those of a replay differ in number,
            shape, dtype or device from those recorded.
    """
    devices = {tensor.device for tensor in inputs}
    if len(devices) != 1 or inputs[0].device.type != "cuda":
        raise ValueError(f"inputs must be tensors on one CUDA device; got {sorted(map(str, devices)) or 'none'}")
    recorded = [tensor.detach().clone() for tensor in inputs]
    with torch.no_grad(), torch.cuda.device(inputs[0].device):
        warmup = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        warmup.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warmup):
            for _ in range(WARMUP_CALLS):
                call(*recorded)
        torch.cuda.current_stream().wait_stream(warmup)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call(*recorded)

    def replay(*inputs: Tensor) -> Output:
        given, expected = [signature(tensor) for tensor in inputs], [signature(tensor) for tensor in recorded]
        if given != expected:  # copy_ would broadcast and convert
            raise ValueError(f"inputs must be as recorded, {expected}; got {given}")
        for own, tensor in zip(recorded, inputs, strict=True):
            own.copy_(tensor)
        graph.replay()
        return output

    # The graph knows the weights by their addresses; whoever keeps the function keeps them.
    replay.call = call  # type: ignore[attr-defined]
    return replay


def signature(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, str]:
    """What a graph fixes of an input."""
    return tuple(tensor.shape), tensor.dtype, str(tensor.device)
