from __future__ import annotations

import subprocess
import sys

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
