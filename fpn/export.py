"""A pyramid as a graph for other runtimes: torch.export and ONNX, with batch, height and width left open."""

from __future__ import annotations

from importlib.util import find_spec
from os import PathLike
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from fpn._output import written_whole
from fpn.pyramid import FPN


def export_program(model: FPN) -> ExportedProgram:
    """The model as a `torch.export` program that takes any batch and any size of images.

    Args:
        model: in eval mode, fused or not. Over a trunk that is not of `fpn.resnet`, images have 3 channels.

    Returns:
        The program: Tensor[N, C, H, W] of the model's dtype, on its device -> what the model returns. H and W are to be
        larger than the coarsest level's stride: torch takes a map of one row for a case of its own.

    Raises:
        ValueError: the model is in training mode.
        RuntimeError: this torch cannot leave H and W open. 2.6 cannot, 2.13 and later can.
    """
    if model.training:
        raise ValueError("export needs eval mode, and the model is in training mode; call eval() first")
    weight = next(model.parameters())
    side = 2 * model.strides[-1]  # two cells in the coarsest level
    images = weight.new_zeros(2, getattr(model.bottom_up, "in_channels", 3), side, side)
    return torch.export.export(model, (images,), dynamic_shapes=dynamic_shapes(model), strict=False)


def dynamic_shapes(model: FPN) -> dict[str, Any]:
    """The open dimensions of the images, as `torch.export.export` and `torch.onnx.export` take them."""
    smallest = model.strides[-1] + 1
    return {"images": {0: Dim("batch"), 2: Dim("height", min=smallest), 3: Dim("width", min=smallest)}}


def export_onnx(model: FPN, path: str | PathLike[str]) -> None:
    """Writes the model as one ONNX file with the input "images" and the outputs "p2", "p3", ….

    Batch, height and width are open, of any size from 1. The operators are standard ONNX, of opset 18 or later.

    Args:
        model: in eval mode, in float32 or float16, fused or not: batch norm is folded in the file.
        path: of the file. A link is followed; a file that is there is replaced once the new one is whole.

    Raises:
        ImportError: onnx or onnxscript, which PyTorch's exporter needs, is not installed.
        OSError: what is at `path` is no regular file, or it cannot be written.
        ValueError: the model is of another dtype, in which ONNX Runtime has no convolution; or as `export_program`.
        RuntimeError: as `export_program`.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if not dtypes <= {torch.float32, torch.float16}:
        raise ValueError(
            f"ONNX export needs a model in float32 or float16, as ONNX Runtime does; got {', '.join(map(str, dtypes))}"
        )
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ImportError(f"ONNX export needs {' and '.join(missing)}: pip install onnx onnxscript")
    finest = model.strides[0].bit_length() - 1  # the k of Pk, whose stride is 2^k
    with written_whole([path]) as (unfinished,):
        torch.onnx.export(
            export_program(model),
            (),
            unfinished,
            input_names=["images"],
            output_names=[f"p{k}" for k in range(finest, finest + len(model.strides))],
            dynamic_shapes=dynamic_shapes(model),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
