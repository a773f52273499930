"""The report of a GPU: what becomes of parts that end well, fail, hang or cannot run. On the CPU, with other parts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report
from benchmarks.gpu_report import Part

ROWS = """
import pathlib, sys
pathlib.Path(sys.argv[-1]).write_text('{"environment": {}, "rows": [{"mode": "forward", "ratio": 2.5}, {"rest": 1}]}')
"""
# With a process that it starts.
HANGS = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
time.sleep(60)
"""
PARTS = {
    "good": Part([sys.executable, "-c", ROWS], 20, writes=True),
    "broken": Part([sys.executable, "-c", "print('no such kernel'); raise SystemExit(3)"], 20),
    "hangs": Part([sys.executable, "-c", HANGS], 6),
    "absent": Part(["no-such-sanitizer", "--tool"], 20),
}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_report, "environment", lambda device: {"device": "Some GPU, 80GB", "torch": "2"})
    monkeypatch.setattr(gpu_report, "PARTS", PARTS)
    monkeypatch.setattr(gpu_report, "TOGETHER", ("broken", "hangs"))
    return tmp_path


def outcomes(folder: Path) -> dict[str, dict[str, object]]:
    rows = json.loads((folder / "some-gpu-80gb-report.json").read_text())["rows"]
    return {row["part"]: row for row in rows}


def test_every_part_is_run_and_reported(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--out", str(report)])
    assert gpu_report.main() == 1  # something failed
    found = outcomes(report)
    statuses = {name: outcome["status"] for name, outcome in found.items()}
    assert statuses == {
        "good": "exit status 0",
        "broken": "exit status 3",
        "hangs": "stopped after 6 s",
        "absent": "not run",
    }
    left = int(str(found["hangs"]["printed"]))
    assert not Path(f"/proc/{left}").exists() or "zombie" in Path(f"/proc/{left}/status").read_text()
    text = (report / "some-gpu-80gb-report.md").read_text()
    for expected in ("# Some GPU, 80GB", "| forward |", "2.50", "no such kernel", "no-such-sanitizer is not installed"):
        assert expected in text


def test_rows_of_an_earlier_report_are_not_taken_for_new_ones(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = report / "some-gpu-80gb-broken.json"
    old.write_text('{"rows": [{"mode": "backward", "ratio": 9.75}]}')
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--out", str(report), "--parts", "broken"])
    assert gpu_report.main() == 1
    assert not old.exists()
    assert "9.75" not in (report / "some-gpu-80gb-report.md").read_text()


def test_parts_are_commands_that_their_programs_take() -> None:
    """Only that: with --help they run nothing. And together they end in time."""
    limits = {name: part.limit for name, part in gpu_report.PARTS.items()}
    together = max(limits.pop(name) for name in gpu_report.TOGETHER)
    assert together + sum(limits.values()) <= 8 * 60
    for name, part in gpu_report.PARTS.items():
        if part.writes:
            # The programs refuse a device that is not there.
            words = part.command if torch.cuda.is_available() else ["cpu" if w == "cuda" else w for w in part.command]
            command = [*words, "--json", "rows.json", "--help"]
            done = subprocess.run(command, cwd=gpu_report.ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{name}: {done.stderr}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--out", "nowhere"])
    with pytest.raises(SystemExit):
        gpu_report.main()
    assert "sees no CUDA device" in capsys.readouterr().err
