"""torch.fx and torch.jit: pyramids and RoI modules recorded; pyramids cut by `create_feature_extractor`, quantized."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fpn import FPN, FPN18, FPN34, FPN50, FPN101, FPN152, SimpleFeaturePyramid
from fpn.detection import Detectron2Backbone, TorchvisionBackbone
from fpn.norm import FrozenBatchNorm2d
from fpn.resnet import resnet18
from roi import (
    MultiScaleRoIAlign,
    MultiScaleRoIPool,
    PSRoIAlign,
    PSRoIPool,
    RoIAlign,
    RoIPool,
    multiscale_roi_align,
    multiscale_roi_pool,
    ps_roi_align,
    ps_roi_pool,
    roi_align,
    roi_pool,
)
from tests.reference.boxes import rpn_like
from tests.reference.comparison import relative_error
from tests.reference.random_weights import randomise

Build = Callable[..., FPN]

BUILDERS: list[Build] = [FPN18, FPN34, FPN50, FPN101, FPN152]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "torchvision's": {"upsample": "nearest", "smooth_top": True, "extra": "maxpool"},
    "frozen, checkpointed": {"trunk": {"norm_layer": FrozenBatchNorm2d, "checkpoint_stages": (True,) * 4}},
    "norm in the neck": {"neck_norm_layer": nn.BatchNorm2d, "extra": "p6p7"},
    "group norm": {"trunk": {"norm_layer": nn.GroupNorm}, "neck_norm_layer": nn.GroupNorm, "extra": "p6p7_on_p5"},
    "some levels": {"trunk": {"returned_layers": (2, 4)}},
}


def random_fpn(build: Build, fused: bool = False, **options: Any) -> FPN:
    torch.manual_seed(0)
    model: FPN = randomise(build(**options)).eval()
    return model.fuse() if fused else model


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("options", OPTIONS)
def test_symbolic_trace(options: str, fused: bool) -> None:
    model = random_fpn(FPN18, fused, **OPTIONS[options])
    graph = fx.symbolic_trace(model)
    with torch.no_grad():
        for size in ((64, 96), (33, 1)):  # nothing of one size is recorded
            images = torch.randn(2, 3, *size)
            for level, expected in zip(graph(images), model(images), strict=True):
                assert relative_error(level, expected) < 1e-5


@pytest.mark.parametrize("build", BUILDERS)
def test_symbolic_trace_of_every_depth(build: Build) -> None:
    model = build(trunk={"norm_layer": FrozenBatchNorm2d}).eval()
    for network in (model, model.fuse()):
        graph = fx.symbolic_trace(network).graph
        convolutions = [node for node in graph.nodes if isinstance(module_of(network, node), nn.Conv2d)]
        assert len(convolutions) == sum(isinstance(module, nn.Conv2d) for module in network.modules())


def module_of(model: nn.Module, node: fx.Node) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def test_a_graph_trains_and_is_saved() -> None:
    model = FPN18(trunk={"norm_layer": FrozenBatchNorm2d})
    graph = fx.symbolic_trace(model)
    images = torch.randn(2, 3, 64, 64)
    for network in (model, graph):
        network.zero_grad()
        sum(level.square().mean() for level in network(images)).backward()
        gradients = [parameter.grad.clone() for parameter in network.parameters()]
    model.zero_grad()
    sum(level.square().mean() for level in model(images)).backward()
    for gradient, parameter in zip(gradients, graph.parameters(), strict=True):
        assert relative_error(gradient, parameter.grad) < 1e-4  # two formulas of frozen batch norm
    twin = saved_and_loaded(graph)
    assert all(torch.equal(a, b) for a, b in zip(twin(images), graph(images), strict=True))


def saved_and_loaded(graph: fx.GraphModule) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(graph, buffer)
    buffer.seek(0)
    twin: nn.Module = torch.load(buffer, weights_only=False)
    return twin


class Patches(nn.Module):
    """A trunk with one map, as a plain ViT's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 16, 16)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images)


AROUND: dict[str, Callable[[], nn.Module]] = {
    "trunk": resnet18,
    "TorchvisionBackbone": lambda: TorchvisionBackbone(FPN18()),
    "Detectron2Backbone": lambda: Detectron2Backbone(FPN18(extra="p6p7")),
    "SimpleFeaturePyramid": lambda: SimpleFeaturePyramid(Patches(), 8, 16, out_channels=8),
}


def as_list(output: Any) -> list[Tensor]:
    return list(output.values() if isinstance(output, dict) else output)


@pytest.mark.parametrize("name", AROUND)
def test_graphs_of_what_is_around_a_pyramid_are_saved(name: str) -> None:
    torch.manual_seed(0)
    model, images = AROUND[name]().eval(), torch.randn(1, 3, 64, 96)
    twin = saved_and_loaded(fx.symbolic_trace(model))
    with torch.no_grad():
        levels, expected = as_list(twin(images)), as_list(model(images))
    assert all(torch.equal(a, b) for a, b in zip(levels, expected, strict=True))


class Leaf(fx.Tracer):
    """The trunk is one call of the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == "bottom_up" or super().is_leaf_module(m, module_qualified_name)


def test_a_trunk_that_is_a_leaf() -> None:
    model = random_fpn(FPN18)
    graph = fx.GraphModule(model, Leaf().trace(model))
    images = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(graph(images), model(images), strict=True))


# --- torchvision's create_feature_extractor


def recorded_values(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """A copy of what every module gives, when it gives it."""
    values: dict[str, Any] = {}
    for name, module in model.named_modules():

        def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            if torch.is_tensor(output):
                values[name] = output.clone()

        module.register_forward_hook(keep)
    with torch.no_grad():
        model(images)
    return values


@pytest.mark.torchvision
@pytest.mark.filterwarnings("ignore:NOTE")
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize(
    "options",
    [{}, {"trunk": {"norm_layer": FrozenBatchNorm2d}, "neck_norm_layer": nn.BatchNorm2d, "extra": "p6p7"}],
    ids=["plain", "frozen"],
)
def test_any_node_can_be_extracted(options: dict[str, Any], fused: bool) -> None:
    """All nodes at once. What an in-place ReLU follows comes out after the ReLU, as in torchvision's own ResNets."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = random_fpn(FPN18, fused, **options)
    names = [name for name in get_graph_node_names(model)[1] if not name.rpartition(".")[2].startswith("get")]
    assert len(names) >= (60 if fused else 80)
    images = torch.randn(1, 3, 65, 96)
    with torch.no_grad():
        found = create_feature_extractor(model, names)(images)
    assert list(found) == names
    compared = 0
    for name, expected in recorded_values(copy.deepcopy(model), images).items():
        inside = [node for node in names if node == name or node.startswith(f"{name}.")]
        if inside and not name.endswith("relu") and not name.startswith("lateral"):  # called twice; takes an addend
            value = found[inside[-1]]
            in_place = not fused and name.endswith(("bn1", "bn2")) and expected.min() < 0 <= value.min()
            assert relative_error(value, expected.relu() if in_place else expected) < 1e-5, name
            compared += 1
    assert compared >= 30
    assert all(torch.is_tensor(value) for value in found.values())


@pytest.mark.torchvision
@pytest.mark.filterwarnings("ignore:NOTE")
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("build", BUILDERS)
def test_levels_and_stages_by_name(build: Build, fused: bool) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model = random_fpn(build, fused, smooth_top=True)
    stages = {f"bottom_up.layer{stage}": f"c{stage + 1}" for stage in (1, 2, 3, 4)}
    extractor = create_feature_extractor(model, stages | {f"smooth.{top}": f"p{5 - top}" for top in range(4)})
    images = torch.randn(1, 3, 64, 33)
    with torch.no_grad():
        found, maps, levels = extractor(images), model.bottom_up(images), model(images)
    for index in range(4):
        assert relative_error(found[f"c{index + 2}"], maps[index]) < 1e-4
        assert relative_error(found[f"p{index + 2}"], levels[index]) < 1e-4


@pytest.mark.torchvision
@pytest.mark.filterwarnings("ignore:NOTE")
@pytest.mark.parametrize("name", ["FPN18", "trunk", "TorchvisionBackbone", "Detectron2Backbone"])
def test_extractors_are_scripted(name: str) -> None:
    """torchvision's own test of its extractors scripts them."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    torch.manual_seed(0)
    model = (AROUND | {"FPN18": FPN18})[name]().eval()
    last = [node for node in get_graph_node_names(model)[1] if "getitem" not in node][-1]
    extractor = create_feature_extractor(model, {last: "last"})
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found, expected = torch.jit.script(extractor)(images), extractor(images)
    assert torch.is_tensor(expected["last"])
    assert relative_error(found["last"], expected["last"]) < 1e-6


@pytest.mark.torchvision
@pytest.mark.filterwarnings("ignore:NOTE")
def test_an_extractor_trains() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model = FPN18()
    found = create_feature_extractor(model, ["smooth.3"])(torch.randn(2, 3, 64, 64))
    found["smooth.3"].square().mean().backward()
    assert model.bottom_up.conv1.weight.grad.abs().sum() > 0


@pytest.mark.torchvision
def test_a_trunk_whose_layout_only_shapes_tell_is_recorded() -> None:
    """torchvision's Swin: Tensor[N, H, W, C] in the graph, too."""
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    swin = torchvision.models.swin_transformer.SwinTransformer([4, 4], 8, [1, 1, 1, 1], [1, 1, 1, 1], [7, 7])
    nodes = [f"features.{index}" for index in (1, 3, 5, 7)]
    model = FPN(create_feature_extractor(swin, nodes), (8, 16, 32, 64), (4, 8, 16, 32), out_channels=8).eval()
    graph = fx.symbolic_trace(model)
    images = torch.randn(1, 3, 96, 64)
    levels, expected = graph(images), model(images)
    assert [tuple(level.shape) for level in levels] == [(1, 8, 96 // s, 64 // s) for s in (4, 8, 16, 32)]
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(levels, expected, strict=True))


# --- RoI operators and modules

IMAGES = [(90, 128), (96, 100)]  # before they are padded to 96 by 128
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def maps(channels: int = 18) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, channels, round(96 * scale), round(128 * scale)) for scale in SCALES]


def proposals(count: int) -> list[Tensor]:
    rows = rpn_like(2 * count, 2, 90, 100)
    return [rows[rows[:, 0] == image, 1:] for image in range(2)]


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "roi_pool": lambda x, boxes: roi_pool(x, boxes, (3, 2), 1 / 4),
    "roi_align": lambda x, boxes: roi_align(x, boxes, 3, 1 / 4, 2, True),
    "ps_roi_pool": lambda x, boxes: ps_roi_pool(x, boxes, 3, 1 / 4),
    "ps_roi_align": lambda x, boxes: ps_roi_align(x, boxes, 3, 1 / 4, 2),
    "multiscale_roi_align": lambda x, boxes: multiscale_roi_align([x, x[..., ::2, ::2]], boxes, 3, [1 / 4, 1 / 8], 2),
    "multiscale_roi_pool": lambda x, boxes: multiscale_roi_pool([x, x[..., ::2, ::2]], boxes, 3, [1 / 4, 1 / 8]),
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "RoIPool": lambda: RoIPool((3, 2), 1 / 4),
    "RoIAlign": lambda: RoIAlign(3, 1 / 4, -1, aligned=True),
    "PSRoIPool": lambda: PSRoIPool(3, 1 / 4),
    "PSRoIAlign": lambda: PSRoIAlign((3, 2), 1 / 4, 2),
}
POOLERS: dict[str, Callable[..., nn.Module]] = {
    "MultiScaleRoIAlign": lambda **options: MultiScaleRoIAlign(list("0123"), 7, 2, **options),
    "MultiScaleRoIPool": lambda **options: MultiScaleRoIPool(list("0123"), 7, **options),
}


@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_roi_operators_are_recorded_as_one_node(name: str) -> None:
    """For any number of boxes and any size, with gradients, and as one call that says what it is."""
    call = FUNCTIONS[name] if name in FUNCTIONS else MODULES[name]()
    graph = fx.symbolic_trace(call)
    recorded = [
        node.target.__name__ for node in graph.graph.nodes if getattr(node.target, "__module__", "")[:3] == "roi"
    ]
    assert len(recorded) == 1
    assert recorded[0].replace("_", "").lower() == name.replace("_", "").lower()
    graph = saved_and_loaded(graph) if name in MODULES else graph
    for x, boxes in ((maps()[0], proposals(20)), (maps()[0][..., :17, :], proposals(3))):
        leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, expected = graph(leaf, boxes), call(twin, boxes)
        assert torch.equal(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(leaf.grad, twin.grad)
        rows = torch.cat([nn.functional.pad(part, (1, 0), value=image) for image, part in enumerate(boxes)])
        assert torch.equal(graph(x, rows), expected)


class RoIHeads(nn.Module):
    """What torchvision's `RoIHeads` computes of proposals, without its control flow, which torch.fx cannot record."""

    def __init__(self, pooler: nn.Module) -> None:
        super().__init__()
        self.box_roi_pool = pooler
        self.box_head = nn.Sequential(nn.Flatten(), nn.Linear(18 * 49, 32), nn.ReLU())
        self.cls_score, self.bbox_pred = nn.Linear(32, 5), nn.Linear(32, 20)

    def forward(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        x = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        return self.cls_score(x), self.bbox_pred(x)


@pytest.mark.torchvision
@pytest.mark.parametrize("options", [{}, {"spatial_scales": SCALES}], ids=["inferred", "given"])
@pytest.mark.parametrize("name", POOLERS)
def test_poolers_are_recorded_in_heads(name: str, options: dict[str, Any]) -> None:
    """Alike before and after a first call, which infers the scales; torchvision's pooler gives the same numbers."""
    from torchvision.ops import MultiScaleRoIAlign as Theirs

    heads = RoIHeads(POOLERS[name](**options)).eval()
    graphs = [fx.symbolic_trace(heads)]
    features = dict(zip("0123", maps(), strict=True)) | {"pool": torch.zeros(2, 18, 2, 2)}
    for count in (1, 30):
        given = features, proposals(count), IMAGES
        expected = heads(*given)
        graphs.append(fx.symbolic_trace(heads))
        twin = saved_and_loaded(fx.symbolic_trace(heads.box_roi_pool))
        assert torch.equal(twin(*given), heads.box_roi_pool(*given))
        for graph in graphs:
            assert all(torch.equal(a, b) for a, b in zip(graph(*given), expected, strict=True))
    if name == "MultiScaleRoIAlign":
        heads.box_roi_pool = Theirs(list("0123"), 7, 2)
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(expected, heads(*given), strict=True))


@pytest.mark.torchvision
def test_a_recorded_pooler_serves_a_detector() -> None:
    from torchvision.models.detection import FasterRCNN

    torch.manual_seed(0)
    pyramid = FPN18(upsample="nearest", smooth_top=True, extra="maxpool")
    pooler = MultiScaleRoIAlign(list("0123"), 7, 2)
    options = {"min_size": 96, "max_size": 128, "box_score_thresh": 0.0, "box_detections_per_img": 20}
    detector = FasterRCNN(TorchvisionBackbone(pyramid), 5, box_roi_pool=pooler, **options).eval()
    images = [torch.rand(3, 96, 128), torch.rand(3, 80, 128)]
    with torch.no_grad():
        expected = detector(images)
        detector.roi_heads.box_roi_pool = fx.symbolic_trace(pooler)
        found = detector(images)
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours["boxes"]) == 20
        assert all(torch.equal(ours[key], theirs[key]) for key in ("boxes", "labels", "scores"))


# --- torch.jit.trace


def traced(model: Callable[..., Any], *inputs: Tensor) -> Any:
    """Its TorchScript program, saved and loaded."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.parametrize("name", [*FUNCTIONS, *MODULES])
def test_programs_of_roi_operators_take_any_boxes_and_maps(name: str) -> None:
    call = FUNCTIONS[name] if name in FUNCTIONS else MODULES[name]()

    def pooled(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return call(x, [first, second])

    program = traced(pooled, maps()[0], *proposals(5))
    for x, count in ((maps()[0], 30), (maps()[0][..., :17, :20], 4)):
        assert torch.equal(program(x, *proposals(count)), pooled(x, *proposals(count)))
    none = torch.zeros(0, 4)
    assert program(x, none, none).shape[0] == 0


@pytest.mark.parametrize("options", [{}, {"spatial_scales": SCALES}], ids=["inferred", "given"])
@pytest.mark.parametrize("name", POOLERS)
def test_programs_of_poolers(name: str, options: dict[str, Any]) -> None:
    pooler = POOLERS[name](**options)

    def pooled(p2: Tensor, p3: Tensor, p4: Tensor, p5: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return pooler(dict(zip("0123", (p2, p3, p4, p5), strict=True)), [first, second], IMAGES)

    program = traced(pooled, *maps(), *proposals(5))
    larger = [nn.functional.pad(level, (0, 3, 0, 2)) for level in maps()]
    for levels, count in ((maps(), 30), (larger, 2)):
        assert torch.equal(program(*levels, *proposals(count)), pooled(*levels, *proposals(count)))


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_a_scripted_model_holds_a_traced_pyramid(fused: bool) -> None:
    model = random_fpn(FPN18, fused)
    program = torch.jit.script(nn.Sequential(traced(model, torch.randn(1, 3, 64, 64))))
    with torch.no_grad():
        for size in ((96, 64), (33, 70)):
            images = torch.randn(2, 3, *size)
            for level, expected in zip(program(images), model(images), strict=True):
                assert relative_error(level, expected) < 1e-5


# --- PyTorch's graph-mode quantization


def quantization() -> Any:
    return pytest.importorskip("torch.ao.quantization.quantize_fx")


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="no int8 convolutions here")
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("options", ["plain", "frozen, checkpointed", "norm in the neck"])
def test_graph_mode_quantization(options: str, fused: bool) -> None:
    """Every convolution is an int8 one, and the levels are float32's to a few in a hundred (8 bits, 20 layers)."""
    from torch.ao.quantization import get_default_qconfig_mapping

    module = quantization()
    model = random_fpn(FPN18, fused, **OPTIONS[options])
    images = torch.rand(2, 3, 96, 128)
    with torch.no_grad():
        prepared = module.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (images,))
        prepared(images)
        quantized = module.convert_fx(prepared)
        for level, expected in zip(quantized(images), model(images), strict=True):
            assert relative_error(level, expected) < 0.1
        assert quantized(torch.rand(1, 3, 70, 65))[0].shape == (1, 256, 18, 17)
    in_int8 = [layer for layer in quantized.modules() if "quantized" in type(layer).__module__]
    assert len(in_int8) == sum(isinstance(layer, nn.Conv2d) for layer in model.modules())


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="no int8 convolutions here")
def test_quantization_aware_training() -> None:
    from torch.ao.quantization import get_default_qat_qconfig_mapping

    module = quantization()
    images = torch.rand(2, 3, 64, 64)
    prepared = module.prepare_qat_fx(FPN18().train(), get_default_qat_qconfig_mapping("x86"), (images,))
    sum(level.square().mean() for level in prepared(images)).backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    quantized = module.convert_fx(prepared.eval())
    assert [tuple(level.shape[2:]) for level in quantized(images)] == [(16, 16), (8, 8), (4, 4), (2, 2)]
