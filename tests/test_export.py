"""Graphs of the pyramid beside the pyramid itself: torch.compile, torch.export, ONNX in onnxruntime, the command."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fpn import FPN, FPN18
from fpn.command.main import main
from fpn.export import export_onnx, export_program
from fpn.resnet import BasicBlock, ResNet
from tests.reference.comparison import largest_relative_error, relative_error
from tests.reference.random_weights import randomise

OPTIONS: dict[str, dict[str, Any]] = {
    "bilinear": {},
    "nearest": {"upsample": "nearest", "smooth_top": True, "extra": "maxpool"},
    "p6p7": {"extra": "p6p7", "norm_layer": nn.BatchNorm2d},
    "group norm": {"norm_layer": nn.GroupNorm, "trunk": {"norm_layer": nn.GroupNorm}},
    "grey": {"trunk": {"in_channels": 1}},
}
FORMS = pytest.mark.parametrize("fused", [False, True], ids=["model", "fused"])
EVERY_MODEL = pytest.mark.parametrize("options", OPTIONS)

version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
open_sizes = pytest.mark.skipif(
    version < (2, 13), reason="in torch 2.6 max pooling ties a graph to odd or even sizes; 2.13 is free"
)


def small_fpn(options: str, fused: bool) -> FPN:
    torch.manual_seed(0)
    pyramid = dict(OPTIONS[options])
    trunk = ResNet(BasicBlock, (1, 1, 1, 1), **pyramid.pop("trunk", {}))
    model = randomise(FPN(trunk, out_channels=32, **pyramid)).eval()
    return model.fuse() if fused else model


def random_images(model: FPN, *size: int) -> Tensor:
    batch, height, width = size
    return torch.randn(batch, model.bottom_up.in_channels, height, width)


def sizes(model: FPN) -> list[tuple[int, int, int]]:
    """Batches and sizes, even and odd, down to the smallest that has two cells in every level."""
    top = model.strides[-1]
    return [(2, top + 1, top + 2), (3, 3 * top, 2 * top + 7), (5, 2 * top - 1, 3 * top + 31)]


@open_sizes
@FORMS
@EVERY_MODEL
def test_one_graph_for_every_size(options: str, fused: bool) -> None:
    model = small_fpn(options, fused)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in sizes(model):
            images = random_images(model, *size)
            assert largest_relative_error(compiled(images), model(images)) < 1e-5
    assert counter.frame_count == 1


@open_sizes
@FORMS
def test_marked_dimensions(fused: bool) -> None:
    """As for a server that fixes the channels and opens the rest."""
    model = small_fpn("nearest", fused)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for size in sizes(model):
            images = random_images(model, *size)
            for dimension in (0, 2, 3):
                torch._dynamo.mark_dynamic(images, dimension)
            assert largest_relative_error(compiled(images), model(images)) < 1e-5
    assert counter.frame_count == 1


@open_sizes
@FORMS
def test_compiled_by_inductor(fused: bool) -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        pytest.skip(f"torch.compile finds no C++ compiler here ({type(error).__name__})")
    model = small_fpn("bilinear", fused)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in sizes(model):
            images = random_images(model, *size)
            assert largest_relative_error(compiled(images), model(images)) < 1e-4


@open_sizes
@FORMS
@EVERY_MODEL
def test_program(options: str, fused: bool) -> None:
    model = small_fpn(options, fused)
    program = export_program(model)
    assert not [node for node in program.graph.nodes if "mkldnn" in str(node.target)]
    with torch.no_grad():
        for batch, height, width in [*sizes(model), (0, 320, 256), (1, 320, 256), (20, 160, 130)]:
            # In the memory format that fused convolutions give: GroupNorm of torch rounds otherwise in the other.
            images = random_images(model, batch, height, width).contiguous(memory_format=torch.channels_last)
            assert largest_relative_error(program.module()(images), model(images)) < 1e-5


@open_sizes
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_program_keeps_the_dtype(dtype: torch.dtype) -> None:
    model = small_fpn("bilinear", fused=False).to(dtype)
    images = random_images(model, 1, 70, 97).to(dtype)
    with torch.no_grad():
        for level, expected in zip(export_program(model).module()(images), model(images), strict=True):
            assert torch.equal(level, expected)


@open_sizes
@FORMS
@EVERY_MODEL
def test_onnx_in_onnxruntime(options: str, fused: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = small_fpn(options, fused)
    export_onnx(model, tmp_path / "model.onnx")
    assert os.listdir(tmp_path) == ["model.onnx"]

    file = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(file, full_check=True)
    assert {node.domain for node in file.graph.node} == {""}
    assert "BatchNormalization" not in {node.op_type for node in file.graph.node}
    shape = [dim.dim_param or dim.dim_value for dim in file.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", model.bottom_up.in_channels, "height", "width"]

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert names == [f"p{k}" for k in range(2, 2 + len(model.strides))]
    with torch.no_grad():
        for batch, height, width in [*sizes(model), (1, 301, 199)]:
            images = random_images(model, batch, height, width)
            levels = [torch.from_numpy(level) for level in session.run(None, {"images": images.numpy()})]
            for level, expected in zip(levels, model(images), strict=True):
                assert relative_error(level, expected) < 1e-4


@open_sizes
def test_onnx_takes_one_pixel_and_an_empty_batch(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = small_fpn("nearest", fused=False)
    export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for size in ((0, 3, 64, 96), (1, 3, 1, 1)):
        images = torch.randn(size)
        levels = session.run(None, {"images": images.numpy()})
        for level, expected in zip(levels, model(images), strict=True):
            assert relative_error(torch.from_numpy(level), expected) < 1e-4


def test_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"in training mode; call eval\(\) first"):
        export_program(FPN18())


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpn.export.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ImportError, match="ONNX export needs onnxscript: pip install onnx onnxscript"):
        export_onnx(FPN18().eval(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["folder/__main__.py", *map(str, arguments)])
    return main()


@open_sizes
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(1)
    model = randomise(FPN18()).eval()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    path = tmp_path / "new" / "model.onnx"
    assert run_command(monkeypatch, "export", path, "--model", "FPN18", "--weights", tmp_path / "model.pth") == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    assert f"wrote {path} ({path.stat().st_size / 1e6:.0f} MB)" in stdout
    images = torch.randn(1, 3, 64, 96)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    levels = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        for level, expected in zip(levels, model(images), strict=True):
            assert relative_error(torch.from_numpy(level), expected) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("photo.jpg {folder}/model.onnx", "unrecognized arguments"),
        ("--boxes 0,0,9,9 {folder}/model.onnx", "unrecognized arguments: --boxes"),
        ("", "the following arguments are required: FILE"),
        ("{folder}/model.onnx --weights missing.pth", "missing.pth"),
        ("{folder}/model.onnx --weights=", "--weights: the path is empty"),
        ("{folder}", "it is a folder"),
        ("/", "FILE must name a file; got '/'"),
        ("{folder}/file/model.onnx", "cannot write to"),
    ],
)
def test_bad_use_of_the_command(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    assert run_command(monkeypatch, "export", *arguments.format(folder=tmp_path).split(), "--model", "FPN18") == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("python -m fpn: error: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
