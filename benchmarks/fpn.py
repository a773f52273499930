"""FPN50 and FPN101 beside torchvision's `resnet_fpn_backbone`: the same pyramid, weights, images and rounds.

    python benchmarks/fpn.py
    python benchmarks/fpn.py --models FPN50 --sizes 480x640 800x1344 --batches 1 2 4 --plot fpn.png --json fpn.json

Both packages run in every form that they have: eager, channels_last, batch norm folded, compiled, in bfloat16, in int8
by PyTorch's own quantization (torchao's, on the CPU), in ONNX Runtime, as a CUDA graph. One whose library is missing is
left out. All forms of a row's problem take turns in one run, and their outputs are compared before anything is timed.
The row "convolutions alone" is the fused model's convolutions as PyTorch computes them, one after another, each on the
input that it had there.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

# This file is called fpn, and its folder comes first on the path of a script.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

import fpn
from benchmarks import arguments
from benchmarks.harness import describe, environment, interleaved, ratio, table, version_of, write_json
from fpn.graphs import capture
from fpn.norm import FrozenBatchNorm2d
from tests.reference.comparison import largest_relative_error
from tests.reference.process_memory import in_a_process, reset_peak_resident, resident
from tests.reference.random_weights import randomise

Network = Callable[[Tensor], Any]
Prepare = Callable[[nn.Module, Tensor], Network]

MODELS = ("FPN18", "FPN34", "FPN50", "FPN101", "FPN152")
FROZEN, PLAIN = "frozen batch norm", "batch norm"


def ours(model: str, norm: str) -> nn.Module:
    layer = nn.BatchNorm2d if norm == PLAIN else FrozenBatchNorm2d
    build = getattr(fpn, model)
    return build(upsample="nearest", smooth_top=True, extra="maxpool", trunk={"norm_layer": layer})


def torchvisions(model: str, norm: str) -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops import FrozenBatchNorm2d as TheirFrozenBatchNorm2d

    layer = nn.BatchNorm2d if norm == PLAIN else TheirFrozenBatchNorm2d
    name = model.replace("FPN", "resnet")
    return resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=layer, trainable_layers=5)


BUILDERS = {"fpn-roi": ours, "torchvision": torchvisions}


def build(package: str, model: str, norm: str) -> nn.Module:
    """The same weights for a model in both packages and with both norms."""
    torch.manual_seed(0)
    source = randomise(ours(model, PLAIN))
    state = source.state_dict()
    if package == "torchvision":
        state = {f"body.{k}": v for k, v in source.bottom_up.state_dict().items()}
        for part, name in (("lateral", "inner"), ("smooth", "layer")):
            for key, value in getattr(source, part).state_dict().items():
                index, _, rest = key.partition(".")
                state[f"fpn.{name}_blocks.{3 - int(index)}.0.{rest}"] = value
    network = BUILDERS[package](model, norm)
    network.load_state_dict(state)
    return network


def as_it_is(network: nn.Module, images: Tensor) -> Network:
    return network


def channels_last(network: nn.Module, images: Tensor) -> Network:
    return network.to(memory_format=torch.channels_last)


def fused(network: nn.Module, images: Tensor) -> Network:
    return network.fuse()


def folded(network: nn.Module, images: Tensor) -> Network:
    """torch.fx's folding of batch norm, for torchvision's model, which has none of its own."""
    from torch.fx.experimental.optimization import fuse

    return fuse(network).to(memory_format=torch.channels_last)


def compiled(prepare: Prepare) -> Prepare:
    def prepare_compiled(network: nn.Module, images: Tensor) -> Network:
        return torch.compile(prepare(network, images))

    return prepare_compiled


def bfloat16(prepare: Prepare) -> Prepare:
    def prepare_autocast(network: nn.Module, images: Tensor) -> Network:
        run = prepare(network, images)

        def autocast(images: Tensor) -> Any:
            with torch.autocast(images.device.type, torch.bfloat16):
                return run(images)

        return autocast

    return prepare_autocast


def cuda_graph(prepare: Prepare) -> Prepare:
    def prepare_graph(network: nn.Module, images: Tensor) -> Network:
        return capture(prepare(network, images), images)

    return prepare_graph


def int8(network: nn.Module, images: Tensor) -> Network:
    """Convolutions, residual sums and the maps between them in int8; the ranges are those of another random batch."""
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        observed = prepare_pt2e(torch.export.export(network, (images,), strict=True).module(), quantizer)
        observed(torch.randn(images.shape, generator=torch.Generator().manual_seed(2)))
        return lower_pt2e_quantized_to_x86(convert_pt2e(observed), (images,))


def onnx_runtime(network: nn.Module, images: Tensor) -> Network:
    import onnxruntime

    program = torch.onnx.export(network, (images,), dynamo=True, verbose=False)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    provider = "CUDAExecutionProvider" if images.is_cuda else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), settings, providers=[provider])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(level) for level in session.run(None, {name: images.cpu().numpy()})]


def convolutions_alone(network: nn.Module, images: Tensor) -> Network:
    network = network.fuse()
    calls: list[tuple[nn.Conv2d, Tensor]] = []
    hooks = [
        conv.register_forward_pre_hook(lambda conv, inputs: calls.append((conv, inputs[0].detach().clone())))
        for conv in network.modules()
        if isinstance(conv, nn.Conv2d)
    ]
    network(images.clone().requires_grad_())  # with gradients, the fused model calls its convolutions as they are
    for hook in hooks:
        hook.remove()

    def run(images: Tensor) -> list[Tensor]:
        for conv, x in calls:
            conv(x)
        return []

    return run


def checkpointed(network: nn.Module, images: Tensor) -> Network:
    network.bottom_up.checkpoint_stages = (True, True, True, True)
    return network


@dataclass(frozen=True)
class Form:
    """A package's model as one of its users runs it: `prepare` makes the call that is timed, once."""

    package: str
    name: str
    norm: str
    prepare: Prepare = as_it_is
    tolerance: float = 1e-4  # of the levels, relative to those of the mode's first form
    needs: str = "torch"  # the module without which there is no such form
    device: str = ""  # the kind of device that it is for; else any

    def __str__(self) -> str:
        return f"{self.package}, {self.name}"

    def runs_on(self, device: str) -> bool:
        return device.startswith(self.device) and find_spec(self.needs) is not None


ROUGH = 5e-2  # bfloat16 keeps eight bits
TF32 = 1e-2  # cuDNN's default for float32 on a GPU keeps eleven
COARSE = 1e-1  # int8 has 256 steps for the whole range of a map

# The first form of a mode is what the others are compared with: torchvision's own default.
INFERENCE = (
    Form("torchvision", "eager", FROZEN),
    Form("torchvision", "eager, plain batch norm", PLAIN),
    Form("torchvision", "channels_last", FROZEN, channels_last),
    Form("torchvision", "folded", PLAIN, folded),
    Form("torchvision", "compiled", FROZEN, compiled(channels_last)),
    Form("torchvision", "folded, compiled", PLAIN, compiled(folded)),
    Form("torchvision", "bfloat16", FROZEN, bfloat16(as_it_is), ROUGH),
    Form("torchvision", "folded, bfloat16", PLAIN, bfloat16(folded), ROUGH),
    Form("torchvision", "int8", PLAIN, int8, COARSE, "torchao", "cpu"),
    Form("torchvision", "ONNX Runtime", PLAIN, onnx_runtime, needs="onnxruntime"),
    Form("fpn-roi", "eager", FROZEN),
    Form("fpn-roi", "eager, plain batch norm", PLAIN),
    Form("fpn-roi", "fused", PLAIN, fused),
    Form("fpn-roi", "fused, compiled", PLAIN, compiled(fused)),
    Form("fpn-roi", "fused, bfloat16", PLAIN, bfloat16(fused), ROUGH),
    Form("fpn-roi", "int8", PLAIN, int8, COARSE, "torchao", "cpu"),
    Form("fpn-roi", "ONNX Runtime", PLAIN, onnx_runtime, needs="onnxruntime"),
    Form("fpn-roi", "convolutions alone", PLAIN, convolutions_alone),
    Form("torchvision", "folded, CUDA graph", PLAIN, cuda_graph(folded), device="cuda"),
    Form("torchvision", "folded, bfloat16, CUDA graph", PLAIN, cuda_graph(bfloat16(folded)), ROUGH, device="cuda"),
    Form("fpn-roi", "fused, CUDA graph", PLAIN, cuda_graph(fused), device="cuda"),
    Form("fpn-roi", "fused, bfloat16, CUDA graph", PLAIN, cuda_graph(bfloat16(fused)), ROUGH, device="cuda"),
)


def training(norm: str) -> tuple[Form, ...]:
    return (
        Form("torchvision", "eager", norm),
        Form("fpn-roi", "eager", norm),
        Form("fpn-roi", "checkpointed", norm, checkpointed),
    )


MODES = {
    "inference": INFERENCE,
    f"training, {FROZEN}": training(FROZEN),
    f"training, {PLAIN}": training(PLAIN),
}


def levels(output: Any) -> list[Tensor]:
    return list(output.values() if isinstance(output, dict) else output)


def forward(network: Network, images: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return levels(network(images))


def step(network: nn.Module, images: Tensor) -> list[Tensor]:
    network.zero_grad(set_to_none=True)
    outputs = levels(network(images))
    sum(level.mean() for level in outputs).backward()
    return outputs


def prepared(mode: str, form: Form, model: str, shape: Sequence[int], device: str) -> Callable[[], list[Tensor]]:
    """The call that is timed: one forward pass, or one with its backward pass."""
    network = build(form.package, model, form.norm).to(device).train(mode != "inference")
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    return partial(forward if mode == "inference" else step, form.prepare(network, images), images)


def largest_difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    if not outputs:  # of convolutions alone
        return math.nan
    return largest_relative_error(outputs, expected)


def peak_megabytes(mode: str, index: int, model: str, shape: Sequence[int], device: str) -> float:
    """Peak memory of the form's third call beyond that of the model and its input, in MB; the first may compile.

    On the CPU it is the growth of the resident set of a process that does nothing else, which is why this is run in
    one; NaN where the system does not tell (it is read from Linux's /proc).
    """
    call = prepared(mode, MODES[mode][index], model, shape, device)
    call(), call()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = reset_peak_resident()
    call()
    return (resident("VmHWM") - before) / 1e6


def measure(
    mode: str, forms: Sequence[Form], model: str, shape: Sequence[int], device: str, runs: int, memory: bool
) -> list[dict[str, Any]]:
    """A row for each form: all in turn, in the same rounds."""
    calls = {str(form): prepared(mode, form, model, shape, device) for form in forms}
    expected = calls[str(forms[0])]()
    differences = {form: largest_difference(calls[str(form)](), expected) for form in forms}
    for form, difference in differences.items():
        if difference > (max(form.tolerance, TF32) if device.startswith("cuda") else form.tolerance):
            raise SystemExit(f"{model}, {form}: outputs differ by {difference:.2g}, so there is nothing to compare")
    times = interleaved(calls, torch.device(device), runs)
    del calls, expected
    rows = []
    for form in forms:
        row = {
            "model": model,
            "images": "×".join(map(str, shape)),
            "mode": mode,
            "package": form.package,
            "form": form.name,
            "ms": median(times[str(form)]),
            "least ms": min(times[str(form)]),
            "ratio": ratio(times, peer=str(forms[0]), ours=str(form)),
            "difference": f"{differences[form]:.1e}",
        }
        if memory:
            index = MODES[mode].index(form)
            row["MB"] = in_a_process(partial(peak_megabytes, mode, index, model, shape, device))
        rows.append(row)
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Inference: bars of every form, in a column of panels for each image size and a row for each model and batch."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        if row["mode"] == "inference":
            batch, _, height, width = row["images"].split("×")
            across = panels.setdefault((row["model"], batch), {})
            across.setdefault(f"{height}×{width}", []).append(row)
    columns = len(next(iter(panels.values())))
    forms = max(len(shown) for across in panels.values() for shown in across.values())
    figure = Figure(figsize=(3 + 4 * columns, (1 + 0.25 * forms) * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), columns, sharey=True, squeeze=False)
    for ((model, batch), across), line in zip(panels.items(), grid, strict=True):
        for (size, shown), axis in zip(across.items(), line, strict=True):
            names = [f"{row['package']}, {row['form']}" for row in shown]
            colours = ["C0" if row["package"] == "fpn-roi" else "C7" for row in shown]
            bars = axis.barh(names, [row["ms"] / int(batch) for row in shown], color=colours)
            axis.bar_label(bars, fmt="%.0f", padding=3)
            axis.margins(x=0.15, y=0.02)
            axis.set_title(f"{model}, {size}, batch {batch}", fontsize=10)
    for axis in grid[-1]:
        axis.set_xlabel("ms per image, median")
    grid[0, 0].invert_yaxis()  # shared by all
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(form.name for forms in MODES.values() for form in forms))
    parser.add_argument(
        "--models", nargs="+", default=["FPN50", "FPN101"], choices=MODELS, metavar="NAME", help=", ".join(MODELS)
    )
    parser.add_argument("--sizes", nargs="+", default=[(480, 640)], type=arguments.size, metavar="HxW")
    parser.add_argument("--batches", nargs="+", type=arguments.count, default=[1], metavar="N")
    parser.add_argument(
        "--modes", nargs="+", default=list(MODES), choices=list(MODES), metavar="MODE", help=", ".join(MODES)
    )
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"only these forms, beside the first of a mode (default: all): {', '.join(map(repr, names))}",
    )
    parser.add_argument("--runs", type=arguments.count, default=9, help="rounds that count, after two that do not")
    parser.add_argument("--threads", type=arguments.count, help="CPU threads (default: torch's)")
    parser.add_argument("--device", type=arguments.device, default=arguments.DEFAULT_DEVICE)
    parser.add_argument("--memory", action="store_true", help="also peak memory, of each form in a process of its own")
    parser.add_argument("--json", type=Path, help="also write the environment and the rows there")
    parser.add_argument("--plot", type=Path, help="also draw inference, by model, image size and batch, there")
    options = parser.parse_args()
    if options.plot and "inference" not in options.modes:
        parser.error(f"--plot draws the mode inference; got --modes {options.modes}")
    if options.threads:
        torch.set_num_threads(options.threads)
    facts = environment(torch.device(options.device)) | {name: version_of(name) for name in ("onnxruntime", "torchao")}
    print(describe(facts), end="\n\n")
    rows = []
    for model, size, batch, mode in product(options.models, options.sizes, options.batches, options.modes):
        first, *rest = (form for form in MODES[mode] if form.runs_on(options.device))
        chosen = [form for form in rest if not options.forms or form.name in options.forms]
        shape = (batch, 3, *size)
        rows += measure(mode, [first, *chosen], model, shape, options.device, options.runs, options.memory)
        print(table(rows[-len(chosen) - 1 :]), end="\n\n", flush=True)
        if options.json:  # after every problem: what was measured stays if the next one fails
            write_json(options.json, facts, rows)
    print("ratio: median over the rounds of the first form's time / this one's; above 1, this one is faster")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    # In the processes that `in_a_process` starts, memory that is freed goes back to the system and is counted anew.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    main()
