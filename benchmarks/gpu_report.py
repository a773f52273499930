"""Everything that rests on a GPU, in one command: tests, sanitizers, timings; raw results and a table made from them.

    python benchmarks/gpu_report.py --out benchmarks/results
    python benchmarks/gpu_report.py --out /tmp/report --parts tests memcheck roi_pool

Needs torch, torchvision, CuPy, pytest-xdist and, for memcheck and racecheck, CUDA's compute-sanitizer; a part whose
tool is not there is named in the report as not run. Each part is a process with a time limit of its own: one that hangs
or fails leaves the others, and makes the exit status 1. The tests and the sanitizers run together, the timings alone;
eight minutes are enough. Written for a GPU called NAME: NAME-report.json (environment, and how each part ended),
NAME-PART.json (each benchmark's own rows), NAME-report.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder comes first otherwise

import torch

from benchmarks.harness import ROOT, describe, environment, table, write_json

# Most of a GPU test is the reference on the host: several processes share them out.
OF_TESTS, OF_SANITIZER = (str(max(1, (os.cpu_count() or 1) * share // 16)) for share in (10, 3))
PYTEST = [sys.executable, "-m", "pytest", "-m", "gpu", "-q"]
# Small cases of every kernel: a sanitizer makes a launch a hundred times as long.
SMALL = ["-n", OF_SANITIZER, "tests/test_roi_pool_gpu.py", "tests/test_roi_align_gpu.py"]
SMALL += ["-k", "match_the_reference and boxes32 and (float32 or float16)"]
OURS = ["--kernel-name", "kns=3roi"]  # by their mangled names: PyTorch's kernels are many
SANITIZER = [
    "compute-sanitizer",
    *OURS,
    "--target-processes",
    "all",
    "--error-exitcode",
    "99",
    "--launch-timeout",
    "60",
]
TAIL = 16_000  # characters kept of what a part printed


@dataclass(frozen=True)
class Part:
    """A command of the report.

    Attributes:
        limit: seconds.
        writes: whether it takes --json and leaves rows there.
    """

    command: list[str]
    limit: int
    writes: bool = False


def benchmark(name: str, limit: int, *options: str) -> Part:
    return Part([sys.executable, f"benchmarks/{name}.py", "--device", "cuda", *options], limit, writes=True)


KERNELS = ("--runs", "20", "--backends", "cupy", "--dtypes", "float32", "float16")
IMAGES = ("--models", "FPN50", "--sizes", "800x1344", "--runs", "5", "--modes", "inference")
FORMS = ("eager", "channels_last", "bfloat16", "folded", "fused", "folded, bfloat16", "fused, bfloat16")
GRAPHS = ("folded, CUDA graph", "fused, CUDA graph", "folded, bfloat16, CUDA graph", "fused, bfloat16, CUDA graph")
COMPILED = ("compiled", "folded, compiled", "fused, compiled")  # which takes most of the time
TOGETHER = ("tests", "memcheck", "racecheck")  # what is not timed
PARTS = {
    "tests": Part([*PYTEST, "-n", OF_TESTS], 160),
    "memcheck": Part([*SANITIZER, "--tool", "memcheck", *PYTEST, *SMALL], 120),
    "racecheck": Part([*SANITIZER, "--tool", "racecheck", *PYTEST, *SMALL], 120),
    "roi_pool": benchmark("roi_pool", 65, *KERNELS, "--peers", "torchvision"),
    "roi_align": benchmark("roi_align", 65, *KERNELS, "--problems", "pyramid", "training", "large", "fast-rcnn"),
    "fpn": benchmark("fpn", 50, *IMAGES, "--batches", "1", "8", "--forms", *FORMS, *GRAPHS),
    "compiled": benchmark("fpn", 80, *IMAGES, "--batches", "1", "--forms", *COMPILED),
}


def run(part: Part, rows: Path) -> dict[str, Any]:
    """How the part ended: its status, seconds, and the end of what it printed."""
    if shutil.which(part.command[0]) is None:
        return {"status": "not run", "why": f"{part.command[0]} is not installed", "ok": True}
    command = [*part.command, *(["--json", str(rows)] if part.writes else [])]
    begin = time.perf_counter()
    # A session of its own: its processes end together, so that none runs on beside the next part.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        printed, _ = process.communicate(timeout=part.limit)
        status = f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        status = f"stopped after {part.limit} s"
    return {
        "status": status,
        "ok": status == "exit status 0",
        "seconds": round(time.perf_counter() - begin, 1),
        "command": [without_folders(word) for word in command],
        "printed": without_folders(printed.decode(errors="replace"))[-TAIL:],
    }


def without_folders(text: str) -> str:
    """Where Python and the repository are means nothing elsewhere."""
    return text.replace(sys.executable, "python").replace(sys.prefix, "…").replace(str(ROOT), ".")


def markdown(facts: dict[str, Any], outcomes: dict[str, dict[str, Any]], folder: Path, device: str) -> str:
    """The report to read, made from what the parts left."""
    lines = [f"# {facts['device']}", "", "```", describe(facts), "```", ""]
    summary = [{"part": name, "outcome": o["status"], "seconds": o.get("seconds", 0.0)} for name, o in outcomes.items()]
    lines += [table(summary), ""]
    for name, outcome in outcomes.items():
        lines += [f"## {name}", ""]
        rows = folder / f"{device}-{name}.json"
        if rows.exists():
            by_columns: dict[tuple[str, ...], list[dict[str, Any]]] = {}
            for row in json.loads(rows.read_text(encoding="utf-8"))["rows"]:
                by_columns.setdefault(tuple(row), []).append(row)
            lines += [text for group in by_columns.values() for text in (table(group), "")]
        else:
            lines += ["```", outcome.get("why") or outcome["printed"].strip()[-1500:], "```", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device, and everything here is measured on one")

    facts = environment(torch.device("cuda"))
    device = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    print(describe(facts), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, dict[str, Any]] = {}
    turns = [[name for name in options.parts if name in TOGETHER], *([n] for n in options.parts if n not in TOGETHER)]
    for names in filter(None, turns):
        files = [(options.out / f"{device}-{name}.json").resolve() for name in names]
        for rows in files:
            if rows.is_file():
                rows.unlink()  # of an earlier report
        with ThreadPoolExecutor() as pool:
            found = pool.map(run, [PARTS[name] for name in names], files)
            outcomes |= zip(names, found, strict=True)
        for name in names:
            print(f"{name}: {outcomes[name]['status']} ({outcomes[name].get('seconds', 0)} s)", flush=True)
        # After every turn: what was measured stays if the machine does not.
        write_json(options.out / f"{device}-report.json", facts, [{"part": n, **o} for n, o in outcomes.items()])
        report = markdown(facts, outcomes, options.out, device)
        (options.out / f"{device}-report.md").write_text(report, encoding="utf-8")
    return 0 if all(outcome["ok"] for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
