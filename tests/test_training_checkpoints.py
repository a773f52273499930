"""Files as training scripts write them: weights among options, optimizers, other models and whole objects."""

from __future__ import annotations

import argparse
import collections
import datetime
import gzip
import pathlib
import tarfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fpn
from fpn import resnet
from fpn.weights import CheckpointError, read_checkpoint


class Config(dict):  # type: ignore[type-arg]
    """A dict of a class of its own, as yacs and mmengine have it."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(entries)
        self.frozen = True


class Callback:
    """An object that names functions and types."""

    def __init__(self) -> None:
        self.monitor, self.kind, self.when = min, datetime.date, datetime.datetime(2026, 1, 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.register_buffer("mean", torch.ones(3), persistent=False)
        self.tied = self.body


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    model.body(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    return model, optimizer


MODEL, OPTIMIZER = trained()
STATE = MODEL.state_dict()
OTHER = {name: value + 1 if value.is_floating_point() else value for name, value in STATE.items()}
NAMESPACE = argparse.Namespace(lr=0.1, output=pathlib.PurePosixPath("/runs"), device=torch.device("cpu"))
LITTERED = {
    "args": NAMESPACE,
    "torch": torch.__version__,
    "when": datetime.datetime(2026, 1, 2),
    "losses": collections.defaultdict(list, {1: [0.5]}),
    "classes": {"cat", "dog"},
    "frozen": frozenset({1, 2}),
    "config": Config(depth=50, nested=Config(norm="BN")),
    "numpy": np.random.get_state(),
    "best": np.float32(0.5),
    "rng": torch.get_rng_state(),
    "dtype": torch.float16,
    "callbacks": [Callback()],
    "optimizer": OPTIMIZER.state_dict(),
}
# Of a file: its content, and where its state dict is.
FILES: dict[str, tuple[Any, str]] = {
    "a state dict": (STATE, ""),
    "torchvision's references": (
        {"model": STATE, "epoch": 3, "optimizer": OPTIMIZER.state_dict(), "args": NAMESPACE},
        "model",
    ),
    "everything beside": ({**LITTERED, "state_dict": STATE}, "state_dict"),
    "flat, with an epoch": ({**STATE, "epoch": 3, "lr": 0.1}, ""),
    "nested": ({"checkpoint": {"model": STATE, "epoch": 1}}, "checkpoint.model"),
    "DeepSpeed": ({"module": STATE, "ds_config": {"zero": 1}, "lr_scheduler": None}, "module"),
    "a list of one": ([STATE], "0"),
    "model_state": ({"model_state": STATE}, "model_state"),
    "net": ({"net": STATE, "acc": 92.1}, "net"),
    "weights": ({"weights": STATE}, "weights"),
    "the model and its average": ({"model_ema": OTHER, "model": STATE}, "model"),
    "state_dict_ema": ({"state_dict_ema": OTHER, "state_dict": STATE, "metric": 0.5}, "state_dict"),
    "student and teacher": ({"student": OTHER, "teacher": STATE, "epoch": 1}, "teacher"),
    "a loss beside": ({"model": STATE, "loss": torch.tensor(0.5)}, "model"),
    "a config of its own class": (Config(model=STATE, epoch=1), "model"),
}
FORMS = ["zip", "legacy"]


def save(content: Any, path: Path, form: str) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


def assert_same(state: Mapping[str, Tensor], expected: Mapping[str, Tensor] = STATE) -> None:
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FILES)
def test_the_weights_come_out(tmp_path: Path, name: str, form: str) -> None:
    content, key = FILES[name]
    path = save(content, tmp_path / "c.pth", form)
    assert_same(read_checkpoint(path))
    assert_same(read_checkpoint(path, key))


def test_the_rest_is_named(tmp_path: Path) -> None:
    path = save({"model": resnet.resnet18().state_dict(), "epoch": 3, "args": NAMESPACE}, tmp_path / "c.pth", "zip")
    notes = fpn.from_checkpoint(path).report.notes
    assert "its state dict is under 'model'" in notes
    assert "skipped: epoch (int), args (argparse.Namespace)" in notes


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"model": STATE, "model_ema": OTHER}, ["model_ema"]),
        ({"student": OTHER, "teacher": STATE}, ["student"]),
        ({"runs": [{"net": STATE}, {"net": OTHER}]}, []),
    ],
    ids=["average", "student", "in a list"],
)
def test_a_key_chooses(tmp_path: Path, content: Any, keys: list[str]) -> None:
    path = save(content, tmp_path / "c.pth", "zip")
    for key in keys:
        assert_same(read_checkpoint(path, key), OTHER)
    with pytest.raises(CheckpointError, match="it holds no state dict under 'nosuch', but under '"):
        read_checkpoint(path, "nosuch")


def test_the_key_of_constructors_and_of_the_command(tmp_path: Path) -> None:
    torch.manual_seed(0)
    one, other = resnet.resnet18(), resnet.resnet18()
    path = save({"model": one.state_dict(), "model_ema": other.state_dict()}, tmp_path / "c.pth", "zip")
    for model in (fpn.from_checkpoint(path, key="model_ema"), fpn.FPN18(weights=path, weights_key="model_ema")):
        assert torch.equal(model.bottom_up.conv1.weight, other.conv1.weight)
    from fpn.command.options import load_model

    model, _ = load_model("FPN18", str(path), key="model_ema")
    assert torch.equal(model.bottom_up.conv1.weight, other.conv1.weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "wrap", [lambda model: model, lambda model: {"model": model, "epoch": 1}], ids=["alone", "wrapped"]
)
def test_a_whole_module(tmp_path: Path, form: str, wrap: Callable[[nn.Module], Any]) -> None:
    """Its tensors by their names, but for buffers that are not saved."""
    path = save(wrap(MODEL), tmp_path / "c.pth", form)
    state = read_checkpoint(path)
    assert set(state) <= set(STATE)
    assert {name for name in STATE if name.startswith("body.")} <= set(state)
    assert all(torch.equal(state[name], STATE[name]) for name in state)


def test_a_whole_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trunk = resnet.resnet18()
    path = save(nn.DataParallel(trunk), tmp_path / "c.pth", "zip")
    model = fpn.from_checkpoint(path)
    assert_same(model.bottom_up.state_dict(), trunk.state_dict())


def test_averaged_models(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(MODEL)
    assert_same(read_checkpoint(save(averaged.state_dict(), tmp_path / "c.pth", "zip")))


def test_an_optimizer_is_no_model(tmp_path: Path) -> None:
    path = save({"optimizer": OPTIMIZER.state_dict(), "args": NAMESPACE}, tmp_path / "c.pth", "zip")
    with pytest.raises(CheckpointError, match=r"it holds optimizer \(dict\), args \(argparse\.Namespace\)"):
        read_checkpoint(path)


def test_a_file_that_is_written_to_later_changes_nothing(tmp_path: Path) -> None:
    path = save(STATE, tmp_path / "c.pth", "zip")
    state = read_checkpoint(path)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same(state)


# --- trunks inside other models


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def trunks() -> tuple[dict[str, Tensor], dict[str, Tensor], nn.Module]:
    torch.manual_seed(0)
    one, other = resnet.resnet18(), resnet.resnet18()
    return one.state_dict(), other.state_dict(), nn.Sequential(*one.children())


TRUNK, ANOTHER, CHILDREN = trunks()
HEAD = torch.ones(3, 512)
# As the sources name them; what is beside the trunk is shortened to an entry or two.
MODELS: dict[str, dict[str, Any]] = {
    "DETR": {**under("backbone.0.body.", TRUNK), "transformer.encoder.0.weight": HEAD, "input_proj.weight": HEAD},
    "torchvision's DeepLab": {
        **under("backbone.", TRUNK),
        "classifier.0.convs.0.0.weight": HEAD,
        "aux_classifier.0.weight": HEAD,
    },
    "segmentation_models_pytorch": {**under("encoder.", TRUNK), "decoder.blocks.0.conv1.0.weight": HEAD},
    "MoCo 1 and 2": {
        "state_dict": {
            **under("module.encoder_q.", TRUNK),
            **under("module.encoder_k.", ANOTHER),
            "module.encoder_q.fc.0.weight": HEAD,
            "module.queue": HEAD,
            "module.queue_ptr": torch.zeros(1, dtype=torch.long),
        },
        "epoch": 200,
    },
    "MoCo 3": {
        **under("module.base_encoder.", TRUNK),
        **under("module.momentum_encoder.", ANOTHER),
        "module.predictor.0.weight": HEAD,
    },
    "SwAV": {**under("module.", TRUNK), "module.projection_head.0.weight": HEAD, "module.prototypes.weight": HEAD},
    "DINO": {
        "student": under("module.backbone.", ANOTHER),
        "teacher": {**under("backbone.", TRUNK), "head.last_layer.weight_g": HEAD},
    },
    "VICReg, Barlow Twins": {"model": {**under("module.backbone.", TRUNK), "module.projector.0.weight": HEAD}},
    "nn.Sequential": CHILDREN.state_dict(),
    "nn.Sequential in a model": {**under("features.", CHILDREN.state_dict()), "head.weight": HEAD},
    "a head of any name": {**TRUNK, "my_head.weight": HEAD},
    "Lightning": {
        "state_dict": {**under("model.", TRUNK), "model.fc.weight": HEAD, "criterion.weight": HEAD},
        "epoch": 1,
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_the_trunk_of_another_model(name: str) -> None:
    model = fpn.from_checkpoint(MODELS[name])
    assert_same(model.bottom_up.state_dict(), TRUNK)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the state dict has entries that are not of the trunk")
        model = fpn.FPN18(weights=MODELS[name])
    assert_same(model.bottom_up.state_dict(), TRUNK)


def test_what_belongs_to_something_else_is_listed() -> None:
    notes = fpn.from_checkpoint(MODELS["DETR"]).report.notes
    assert "not of the trunk, and left out: transformer, input_proj" in notes
    with pytest.warns(UserWarning, match=r"were not loaded: transformer\.encoder\.0\.weight, input_proj\.weight"):
        fpn.FPN18(weights=MODELS["DETR"])


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("conv1.weight"),
        lambda state: state.update(
            {"conv1.0.weight": state.pop("conv1.weight"), "conv1.3.weight": torch.ones(32, 32, 3, 3)}
        ),
        lambda state: state.update({"layer1.0.se.fc1.weight": torch.ones(4, 64, 1, 1)}),
        lambda state: state.update({"maxpool.0.weight": torch.ones(64, 64, 3, 3)}),
        lambda state: state.update({"layer5.0.conv1.weight": torch.ones(64, 64, 3, 3)}),
    ],
    ids=["no stem", "a deep stem", "attention", "a pooling with weights", "a fifth stage"],
)
def test_what_only_looks_like_a_resnet_is_refused(change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = dict(TRUNK)
    change(state)
    for load in (fpn.from_checkpoint, lambda state: fpn.FPN18(weights=state)):
        with pytest.raises(CheckpointError, match=r"conv1|se\.fc1|maxpool|layer5"):
            load(state)


@pytest.mark.parametrize("name", ["resnet50d", "resnet50c", "resnet50t", "seresnet50", "ecaresnet50d", "resnetrs50"])
def test_timms_relatives_that_entries_show(name: str) -> None:
    timm = pytest.importorskip("timm")
    with pytest.raises(CheckpointError, match=r"It has a deep stem|It has attention") as caught:
        fpn.from_checkpoint(timm.create_model(name, pretrained=False).state_dict())
    assert "timm.create_model(" in str(caught.value)


@pytest.mark.parametrize("told", ["arch", "options", "file name"])
@pytest.mark.parametrize("name", ["resnetblur50", "resnetaa50"])
def test_timms_relatives_that_entries_do_not_show(tmp_path: Path, name: str, told: str) -> None:
    """Their features are others, and their entries are a ResNet's: the file has to say what it is."""
    content, file = {
        "arch": ({"state_dict": TRUNK, "arch": name}, "c.pth"),
        "options": ({"state_dict": TRUNK, "args": argparse.Namespace(model=name)}, "c.pth"),
        "file name": (TRUNK, f"{name}-84f4748f.pth"),
    }[told]
    path = save(content, tmp_path / file, "zip")
    for load in (fpn.from_checkpoint, lambda path: fpn.FPN18(weights=path)):
        with pytest.raises(CheckpointError, match=f"it is timm's {name}"):
            load(path)


def test_the_way_through_timm_that_the_message_names(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    source = timm.create_model("resnet18d", pretrained=False).eval()
    path = save(source.state_dict(), tmp_path / "c.pth", "zip")
    overlay = {"file": str(path)}
    trunk = timm.create_model(
        "resnet18d", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, out_indices=(1, 2, 3, 4)
    )
    model = fpn.FPN(trunk).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model.bottom_up(images)[-1], source.forward_features(images), rtol=0, atol=1e-4)
        assert len(model(images)) == 4


# --- what is no checkpoint


def torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), path)


def tar(path: Path) -> None:
    (path.parent / "a").write_bytes(b"a")
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "a", "a")


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1"), "git lfs pull"),
        (lambda path: path.write_text("<!DOCTYPE html><html>"), "a page of HTML"),
        (lambda path: path.write_bytes(gzip.compress(b"x" * 100)), "gunzip"),
        (lambda path: path.write_bytes(b"GGUF" + bytes(60)), "a GGUF file"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n" + bytes(60)), "an HDF5 file"),
        (lambda path: path.write_text('{"metadata": {}, "weight_map": {}}'), "the index of a sharded checkpoint"),
        (torchscript, "a TorchScript archive"),
        (tar, "damaged, or of no format|a tar archive"),
        (lambda path: path.mkdir(), "it is a folder"),
    ],
    ids=["empty", "LFS", "HTML", "gzip", "GGUF", "HDF5", "index", "TorchScript", "tar", "folder"],
)
def test_what_is_no_checkpoint_is_called_by_its_name(
    tmp_path: Path, write: Callable[[Path], Any], message: str
) -> None:
    write(tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "c.pth")
