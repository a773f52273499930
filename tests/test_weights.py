from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpn
from fpn import FPN18, FPN50, resnet
from fpn.checkpoints import imagenet
from fpn.checkpoints.matching import match_by_name
from fpn.norm import FrozenBatchNorm2d
from fpn.resnet import ResNetClassifier, build
from fpn.weights import CheckpointError, freeze, load_weights, read_checkpoint, transfer
from tests.reference.random_weights import randomise

State = dict[str, Tensor]


def classifier_state(name: str = "resnet18", seed: int = 1) -> State:
    torch.manual_seed(seed)
    return dict(randomise(build(ResNetClassifier, name), seed).state_dict())


def equal_states(model: nn.Module, expected: State) -> bool:
    state = model.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


def snapshot(model: nn.Module) -> State:
    return {key: value.clone() for key, value in model.state_dict().items()}


def renamed(state: State) -> State:
    """The same entries in the same order under names of another repository's."""
    other = {}
    for key, value in state.items():
        for ours, theirs in (("layer", "stage"), ("downsample", "shortcut"), ("conv", "convolution"), ("bn", "norm")):
            key = key.replace(ours, theirs)
        other[key] = value
    return other


# --- transfer


def test_by_name_a_classifier_loads_into_the_trunk_and_fc_is_reported() -> None:
    state = classifier_state()
    trunk = resnet.resnet18()
    report = transfer(trunk, state)
    assert report.by == "name"
    assert report.unexpected == ("fc.weight", "fc.bias")
    assert equal_states(trunk, {k: v for k, v in state.items() if not k.startswith("fc.")})


@pytest.mark.parametrize("counters", [True, False], ids=["with counters", "without counters"])
def test_by_order_the_first_318_entries_are_the_trunk(counters: bool) -> None:
    source = classifier_state("resnet50")
    trunk_entries = {k: v for k, v in source.items() if not k.startswith("fc.")}
    assert len(trunk_entries) == 318
    checkpoint = renamed(trunk_entries) | {"toplayer.weight": torch.zeros(3), "latlayer1.weight": torch.zeros(4)}
    if not counters:
        checkpoint = {k: v for k, v in checkpoint.items() if not k.endswith("num_batches_tracked")}
    trunk = resnet.resnet50()
    report = transfer(trunk, checkpoint, by="order")
    assert report.by == "order"
    assert len(report.matched) == (318 if counters else 318 - 53)
    assert report.unexpected == ("toplayer.weight", "latlayer1.weight")
    for key, value in trunk.state_dict().items():
        assert torch.equal(value, trunk_entries[key])


def test_by_order_where_only_some_names_differ() -> None:
    """kuangliu's pytorch-fpn: the blocks' names are torchvision's but for `shortcut`."""
    state = {k: v for k, v in classifier_state().items() if not k.startswith("fc.")}
    checkpoint = {k.replace("downsample", "shortcut"): v for k, v in state.items()}
    trunk = resnet.resnet18()
    with pytest.raises(CheckpointError, match=r"fit by order: transfer\(module, checkpoint, by='order'\)"):
        transfer(trunk, checkpoint)
    assert transfer(trunk, checkpoint, by="order").by == "order"
    assert equal_states(trunk, state)


def swap(state: State, first: str, second: str) -> State:
    """`state` with two entries in each other's place in the order."""
    order = list(state)
    i, j = order.index(first), order.index(second)
    order[i], order[j] = order[j], order[i]
    return {key: state[key] for key in order}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("bn1.running_mean", "bn1.running_var"),  # the same shape, another role
        ("layer1.0.conv1.weight", "layer1.0.conv2.weight"),  # the same shape, names that the model knows
        ("conv1.weight", "bn1.weight"),  # another shape
    ],
)
def test_order_is_not_trusted_against_roles_names_or_shapes(first: str, second: str) -> None:
    state = {k: v for k, v in classifier_state().items() if not k.startswith("fc.")}
    swapped = {k.replace("downsample", "shortcut"): v for k, v in swap(state, first, second).items()}
    trunk = resnet.resnet18()
    before = snapshot(trunk)
    with pytest.raises(CheckpointError, match=r"does not fit ResNet by order"):
        transfer(trunk, swapped, by="order")
    with pytest.raises(CheckpointError, match=r"by name.*missing: layer2\.0\.downsample\.0\.weight") as caught:
        transfer(trunk, swapped)
    assert "fit by order" not in str(caught.value)
    assert equal_states(trunk, before)


@pytest.mark.parametrize("damage", ["missing", "shape", "other depth"])
def test_what_does_not_fit_is_reported_and_nothing_is_loaded(damage: str) -> None:
    state = classifier_state("resnet34" if damage == "other depth" else "resnet18")
    if damage == "missing":
        del state["layer3.1.bn2.bias"]
    elif damage == "shape":
        state["layer3.1.bn2.bias"] = torch.zeros(7)
    trunk = resnet.resnet50() if damage == "other depth" else resnet.resnet18()
    before = snapshot(trunk)
    with pytest.raises(CheckpointError, match="does not fit ResNet") as caught:
        transfer(trunk, state)
    assert equal_states(trunk, before)
    message = str(caught.value)
    if damage == "missing":
        assert "1 missing: layer3.1.bn2.bias" in message
    if damage == "shape":
        assert "1 of another shape: layer3.1.bn2.bias is (256,), given (7,)" in message


def test_counters_may_be_missing() -> None:
    state = {k: v for k, v in classifier_state().items() if not k.endswith("num_batches_tracked")}
    trunk = resnet.resnet18()
    assert transfer(trunk, state).complete
    assert all(torch.equal(v, state[k]) for k, v in trunk.state_dict().items() if k in state)


def test_half_precision_entries_are_widened() -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in classifier_state().items()}
    trunk = resnet.resnet18()
    transfer(trunk, state)
    assert trunk.conv1.weight.dtype == torch.float32
    assert torch.equal(trunk.conv1.weight, state["conv1.weight"].float())


def test_frozen_batch_norm_takes_a_batch_norm_checkpoint_by_name_and_by_order() -> None:
    state = {k: v for k, v in classifier_state().items() if not k.startswith("fc.")}
    for by, checkpoint in (("name", state), ("order", renamed(state))):
        trunk = resnet.resnet18(norm_layer=FrozenBatchNorm2d)
        assert transfer(trunk, checkpoint, by=by).complete
        assert all(torch.equal(v, state[k]) for k, v in trunk.state_dict().items())


def test_report_counts_everything() -> None:
    model = {name: torch.zeros(2) for name in ("a", "b", "c")}
    report = match_by_name(model, {"a": torch.zeros(2), "b": torch.zeros(3), "z": torch.zeros(1)})
    assert not report.complete
    assert str(report) == (
        "1 of 3 entries matched by name; 1 missing: c; 1 unexpected: z; 1 of another shape: b is (2,), given (3,)"
    )


# --- files


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_read_checkpoint_unwraps(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    state = {f"{prefix}{k}": v for k, v in classifier_state().items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "c.pth")
    assert read_checkpoint(tmp_path / "c.pth").keys() == classifier_state().keys()


class Hostile:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return (Path.touch, (self.witness,))


@pytest.mark.parametrize("kind", ["absent", "empty", "text", "truncated", "hostile", "legacy hostile", "no state dict"])
def test_files_that_are_no_checkpoint(tmp_path: Path, kind: str) -> None:
    path, witness = tmp_path / "c.pth", tmp_path / "witness"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "truncated":
        torch.save(classifier_state(), path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "hostile":
        torch.save({"conv1.weight": Hostile(witness)}, path)
    elif kind == "legacy hostile":
        path.write_bytes(pickle.dumps({"conv1.weight": Hostile(witness)}))
    elif kind == "no state dict":
        torch.save({"lr": 0.1, "steps": [1, 2]}, path)
    expected = FileNotFoundError if kind == "absent" else CheckpointError
    with pytest.raises(expected, match=str(path)):
        FPN18(weights=path)
    assert not witness.exists()


@pytest.mark.parametrize("scope", ["trunk", "whole"])
def test_fpn_loads_a_path(tmp_path: Path, scope: str) -> None:
    torch.manual_seed(5)
    source = randomise(FPN18())
    saved = source if scope == "whole" else source.bottom_up
    torch.save(saved.state_dict(), tmp_path / "c.pth")
    model = FPN18(weights=str(tmp_path / "c.pth"))
    assert equal_states(model if scope == "whole" else model.bottom_up, dict(saved.state_dict()))


def test_entries_beside_the_trunk_are_warned_about_at_the_callers_line(tmp_path: Path) -> None:
    torch.save(classifier_state() | {"rpn.weight": torch.zeros(2)}, tmp_path / "c.pth")
    with pytest.warns(UserWarning, match=r"not of the trunk, and were not loaded: rpn\.weight") as caught:
        FPN18(weights=tmp_path / "c.pth")
    assert caught[0].filename == __file__


def test_a_state_dict_is_taken_as_a_file_is() -> None:
    state = classifier_state()
    model = FPN18(weights=state)
    assert equal_states(model.bottom_up, {k: v for k, v in state.items() if not k.startswith("fc.")})
    assert model.report.notes[0] == "from a classifier (torchvision, timm)"


PAPERS = {"upsample": "nearest", "smooth_top": True, "extra": "maxpool"}


@pytest.mark.parametrize("naming", ["torchvision", "detectron2"])
def test_a_detectors_checkpoint_fills_the_whole_pyramid(naming: str) -> None:
    torch.manual_seed(3)
    source = randomise(FPN18(**PAPERS))
    checkpoint = fpn.export_state_dict(source, naming) | {"rpn.head.conv.weight": torch.zeros(2)}
    model = FPN18(weights=checkpoint, **PAPERS)
    assert equal_states(model, dict(source.state_dict()))
    assert model.report.unexpected == ("rpn.head.conv.weight",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"unexpected: backbone\.fpn\.layer_blocks\.3.*fpn\.from_checkpoint builds"),
        (PAPERS | {"extra": "p6p7"}, r"missing: backbone\.fpn\.extra_blocks\.p6\.weight.*fpn\.from_checkpoint builds"),
    ],
    ids=["default pyramid", "RetinaNet"],
)
def test_a_model_that_would_keep_random_levels_is_refused(options: dict[str, Any], message: str) -> None:
    checkpoint = fpn.export_state_dict(FPN18(**PAPERS), "torchvision")
    with pytest.raises(CheckpointError, match=message):
        FPN18(weights=checkpoint, **options)


def test_options_that_no_entry_tells_are_compared_with_the_sources(recwarn: pytest.WarningsRecorder) -> None:
    source = FPN50(**PAPERS, norm_layer=FrozenBatchNorm2d, trunk={"stride_in_1x1": True})
    checkpoint = fpn.export_state_dict(source, "detectron2")
    FPN50(weights=checkpoint, **PAPERS, norm_layer=FrozenBatchNorm2d, trunk={"stride_in_1x1": True})
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"detectron2, whose .* stride_in_1x1=True \(here False\), upsample='nearest'"):
        FPN50(weights=checkpoint, **PAPERS | {"upsample": "bilinear"}, norm_layer=FrozenBatchNorm2d)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, State]:
    """A folder in the place of PyTorch's server, with one file of the right name and hash, and an empty cache."""
    state = classifier_state("resnet18", seed=7)
    folder = tmp_path / "server"
    folder.mkdir()
    torch.save(state, folder / "file")
    digest = hashlib.sha256((folder / "file").read_bytes()).hexdigest()[:8]
    path = (folder / "file").rename(folder / f"resnet18-{digest}.pth")
    monkeypatch.setattr(imagenet, "IMAGENET_URL", folder.as_uri() + "/")
    monkeypatch.setitem(imagenet.IMAGENET_FILES, "resnet18", {"IMAGENET1K_V1": path.name})
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return path, state


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "DEFAULT"])
def test_imagenet_weights_are_downloaded_once_into_torchs_cache(
    server: tuple[Path, State], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = server
    trunk_state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    assert equal_states(FPN18(weights=name).bottom_up, trunk_state)
    assert (tmp_path / "hub" / "checkpoints" / path.name).read_bytes() == path.read_bytes()
    assert re.search(r"100(\.0)?%", capsys.readouterr().err)  # the progress bar, tqdm's or torch's own
    path.unlink()
    assert equal_states(FPN18(weights=name).bottom_up, trunk_state)


def test_offline_error_says_what_to_put_where(server: tuple[Path, State], tmp_path: Path) -> None:
    path, _ = server
    path.unlink()
    with pytest.raises(OSError, match="cannot download") as caught:
        FPN18(weights="DEFAULT")
    for part in (path.name, path.as_uri(), str(tmp_path / "hub" / "checkpoints")):
        assert part in str(caught.value)


def test_a_download_with_another_hash_is_refused_and_not_kept(server: tuple[Path, State], tmp_path: Path) -> None:
    path, _ = server
    path.write_bytes(b"something else")
    with pytest.raises(OSError, match="invalid hash value"):
        FPN18(weights="DEFAULT")
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())


def test_a_damaged_file_in_the_cache_is_refused(server: tuple[Path, State], tmp_path: Path) -> None:
    path, _ = server
    FPN18(weights="DEFAULT")
    cached = tmp_path / "hub" / "checkpoints" / path.name
    cached.write_bytes(cached.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged"):
        FPN18(weights="DEFAULT")


@pytest.mark.torchvision
@pytest.mark.parametrize("variant", resnet.VARIANTS)
def test_names_and_files_are_torchvisions(variant: str) -> None:
    from torchvision.models import get_model_weights

    theirs = get_model_weights(variant)
    ours = {name: imagenet.IMAGENET_URL + file for name, file in imagenet.IMAGENET_FILES[variant].items()}
    assert ours == {member.name: member.url for member in theirs}
    assert max(ours) == theirs.DEFAULT.name


# --- freezing


@pytest.mark.torchvision
@pytest.mark.parametrize("trainable", range(6))
def test_trainable_layers_are_torchvisions(trainable: int) -> None:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    theirs = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=trainable, norm_layer=nn.BatchNorm2d
    )
    trained = {name for name, parameter in theirs.body.named_parameters() if parameter.requires_grad}
    model = FPN18(trainable_layers=trainable)
    assert {name for name, p in model.bottom_up.named_parameters() if p.requires_grad} == trained
    assert all(p.requires_grad for p in (*model.lateral.parameters(), *model.smooth.parameters()))


@pytest.mark.parametrize("trainable", range(6))
def test_training_moves_what_is_trainable_and_nothing_else(trainable: int) -> None:
    torch.manual_seed(0)
    model = randomise(FPN18(trainable_layers=trainable)).train()
    before = snapshot(model.bottom_up)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(level.square().mean() for level in model.train()(torch.randn(2, 3, 64, 64))).backward()
        optimizer.step()
    frozen = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")[: (6 - trainable if trainable < 5 else 0)]
    for key, value in model.bottom_up.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith(frozen or ("nothing",)), key


def test_frozen_stages_compute_what_they_did_in_eval_mode() -> None:
    trunk = randomise(resnet.resnet18()).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = trunk(images)
    freeze(trunk, 0)
    for ours, reference in zip(trunk.train()(images), expected, strict=True):
        assert torch.equal(ours, reference)


def test_load_weights_returns_the_report(tmp_path: Path) -> None:
    torch.save(classifier_state("resnet50"), tmp_path / "c.pth")
    model = FPN50()
    report = load_weights(model, tmp_path / "c.pth", "resnet50")
    assert len(report.matched) == 318
    assert str(report) == (
        "318 of 318 entries matched by name; 2 unexpected: fc.weight, fc.bias; from a classifier (torchvision, timm); "
        "images in RGB, from 0 to 1, less (0.485, 0.456, 0.406), divided by (0.229, 0.224, 0.225)"
    )
