"""The CUDA kernels on the CPU (see cuda_on_cpu) under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer.

Each sanitizer also gets faults that it has to find: without them a silent run would prove nothing.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cuda_on_cpu import COMPILER, build_stress

# Optimising the instrumented code takes longer than running it does without.
ADDRESS = ("-O0", "-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all")
THREAD = ("-O0", "-g", "-fsanitize=thread")


def sanitizer_runs(options: tuple[str, ...], folder: Path) -> bool:
    """Whether an empty program under the sanitizer builds and starts: its runtime may be absent, or refuse the kernel's
    address space layout."""
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}\n")
    built = subprocess.run([str(COMPILER), *options, str(source), "-o", str(program)], capture_output=True, check=False)
    return built.returncode == 0 and subprocess.run([str(program)], capture_output=True, check=False).returncode == 0


def built(factory: pytest.TempPathFactory, options: tuple[str, ...], *more: str) -> Path:
    if COMPILER is None:
        pytest.skip("needs g++")
    folder = factory.mktemp("sanitizer")
    if not sanitizer_runs(options, folder):
        pytest.skip(f"{' '.join(options)} does not work here")
    return build_stress(folder, (*options, *more))


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, check=False, env=environment, timeout=120
    )


@pytest.fixture(scope="module")
def under_address_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory, ADDRESS)


def test_no_access_out_of_bounds_and_no_undefined_behaviour(under_address_sanitizer):
    done = run(under_address_sanitizer)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("short-output", "AddressSanitizer: use-after-poison|AddressSanitizer: heap-buffer-overflow"),
        ("misaligned-input", "misaligned address"),
        ("float-to-int", "outside the range of representable values"),
    ],
)
def test_a_planted_fault_is_found(fault, report, under_address_sanitizer):
    done = run(under_address_sanitizer, fault)
    assert done.returncode != 0
    assert any(text in done.stderr for text in report.split("|")), done.stderr


def test_no_data_race(tmp_path_factory):
    done = run(built(tmp_path_factory, THREAD))
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("macro", ["CUDA_ON_CPU_WITHOUT_BARRIER", "CUDA_ON_CPU_WITHOUT_ATOMICS"])
def test_a_planted_race_is_found(macro, tmp_path_factory):
    done = run(built(tmp_path_factory, THREAD, f"-D{macro}", "-DSTRESS_ONE_KIND"))
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr, done.stderr
