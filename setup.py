"""Distribution metadata. `kernels/` sits at the top of the repository and installs as `roi.kernels`.

A top-level `kernels` package in site-packages would overwrite Hugging Face's library of that name.
"""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (HERE / "fpn" / "__init__.py").read_text(encoding="utf-8"), re.M)

# NVRTC and the runtime headers come as wheels, so that no CUDA toolkit has to be installed on the machine.
CUDA12 = ["cupy-cuda12x", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12"]
CUDA13 = ["cupy-cuda13x", "nvidia-cuda-nvrtc>=13", "nvidia-cuda-runtime>=13"]
TORCHVISION = ["torchvision"]
DEMO = [*TORCHVISION, "pillow", "matplotlib"]
EXAMPLES = [*DEMO, "scikit-learn", "torchmetrics", "pycocotools", "tqdm"]
ONNX = ["onnx", "onnxscript", "onnxruntime"]

setup(
    name="fpn-roi",
    version=VERSION,
    description="ResNet-FPN backbones and RoI operators for PyTorch detectors, with no compiled extension",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "numpy"],
    extras_require={
        "cuda12": CUDA12,
        "cuda13": CUDA13,
        "torchvision": TORCHVISION,
        "demo": DEMO,
        "safetensors": ["safetensors"],
        "onnx": ONNX,
        "examples": EXAMPLES,
        # There are no CUDA wheels for macOS; the tests that need them skip.
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "timm",
            "safetensors",
            *ONNX,
            *EXAMPLES,
            *(f"{name}; platform_system != 'Darwin'" for name in CUDA12),
        ],
        "lint": ["ruff", "mypy", "import-linter"],
    },
    packages=[
        "fpn",
        "fpn.checkpoints",
        "fpn.command",
        "fpn.demo",
        "fpn.detection",
        "fpn.inference",
        "roi",
        "roi.cupy_path",
        "roi.torch_path",
        "roi.torchvision_path",
        "roi.kernels",
    ],
    package_dir={"roi.kernels": "kernels"},
    package_data={
        "fpn": ["py.typed"],
        "fpn.demo": ["photos/*"],
        "roi": ["py.typed"],
        "roi.kernels": ["*.cu", "*.cuh"],
    },
    entry_points={"console_scripts": ["fpn = fpn.command.main:main"]},
    zip_safe=False,
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
