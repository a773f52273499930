"""Fails unless the wheel named on the command line holds every module and nothing that would clash."""

import sys
import zipfile
from pathlib import Path

REQUIRED = {
    "fpn/__main__.py",
    "fpn/checkpoints/conversion.py",
    "fpn/command/main.py",
    "fpn/detection/__init__.py",
    "fpn/inference/fuse.py",
    "fpn/py.typed",
    "fpn/demo/photos/astronaut.jpg",
    "roi/py.typed",
    "roi/cupy_path/__init__.py",
    "roi/torch_path/__init__.py",
    "roi/torchvision_path/__init__.py",
    "roi/kernels/__init__.py",
    "roi/kernels/roi_common.cuh",
    "roi/kernels/roi_pool.cu",
    "roi/kernels/roi_align.cu",
}
TOP_LEVEL = {"fpn", "roi"}

# Every module of the checkout has to be in it: a folder that setup.py does not list would be left out.
MODULES = {str(path) for folder in TOP_LEVEL for path in Path(folder).rglob("*.py")}
REQUIRED |= MODULES | {f"roi/{path}" for path in Path("kernels").glob("*.*")}

names = set(zipfile.ZipFile(sys.argv[1]).namelist())
top_level = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
missing = REQUIRED - names
if missing or top_level != TOP_LEVEL:
    sys.exit(
        f"missing from the wheel: {sorted(missing)}; at its top level: {sorted(top_level)}, not {sorted(TOP_LEVEL)}"
    )
print(f"{len(names)} files, at the top level {sorted(top_level)}")
