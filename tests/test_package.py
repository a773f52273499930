from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec

import pytest


@pytest.mark.parametrize("failure", ["ModuleNotFoundError('no')", "RuntimeError('operator torchvision::nms')"])
def test_both_packages_import_where_torchvision_and_cupy_are_absent_or_broken(failure: str) -> None:
    program = f"""
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torchvision', 'cupy', 'cupy_backends', 'matplotlib', 'PIL', 'timm'):
            raise {failure}
sys.meta_path.insert(0, Broken())
import torch, fpn, roi
levels = fpn.FPN18().eval()(torch.zeros(1, 3, 64, 64))
print(roi.roi_pool(levels[0], torch.tensor([[0., 0, 0, 31, 31]]), 7, 0.25).shape)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "torch.Size([1, 256, 7, 7])"


def test_versions_agree() -> None:
    import fpn
    import roi

    assert fpn.__version__ == roi.__version__
    if version := installed_version("fpn-roi"):
        assert version == fpn.__version__


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


PUBLIC = {
    "fpn": ("checkpoints", "detection", "export", "graphs", "levels", "norm", "resnet", "weights"),
    "roi": ("onnx",),
}


@pytest.mark.parametrize("package", PUBLIC)
def test_public_modules_are_attributes_after_import(package: str) -> None:
    modules = [name for name in PUBLIC[package] if name != "onnx" or find_spec("onnxscript")]
    program = f"import {package}\n" + "\n".join(f"print({package}.{name}.__name__)" for name in modules)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [f"{package}.{name}" for name in modules]


@pytest.mark.parametrize("name", ["FPN18", "FPN34", "FPN50", "FPN101", "FPN152"])
def test_constructors_show_their_options(name: str) -> None:
    import fpn

    build = getattr(fpn, name)
    parameters = inspect.signature(build).parameters
    assert list(parameters)[:4] == ["weights", "trainable_layers", "norm_layer", "neck_norm_layer"]
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    assert f"`resnet{name[3:]}`" in build.__doc__
    assert pickle.loads(pickle.dumps(build)) is build
    with pytest.raises(TypeError, match="unexpected keyword argument 'norm'"):
        build(norm=None)
