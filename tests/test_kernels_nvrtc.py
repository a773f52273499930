"""The CUDA kernels under NVRTC, which needs no GPU, and their compilation at run time."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from roi import kernels
from roi.cupy_path import launch
from tests.cuda_on_cpu import (
    COORDINATES,
    FEATURES,
    KERNELS,
    levels_assertions,
    ps_roi_pool_variants,
    roi_align_variants,
    roi_pool_variants,
    transpose_variants,
)

# What CuPy adds to the options of every kernel.
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
VARIANTS = {
    "roi_pool": roi_pool_variants,
    "roi_align": roi_align_variants,
    "ps_roi_pool": ps_roi_pool_variants,
    "transpose": transpose_variants,
}
# Compiled for every architecture; all variants for one.
REPRESENTATIVES = {
    "roi_pool": roi_pool_variants(("float", "__nv_bfloat16"), ("float",), ("int",)),
    "roi_align": roi_align_variants(("float", "__nv_bfloat16"), ("float",)),
    "ps_roi_pool": ps_roi_pool_variants(("__nv_bfloat16",), ("float",)),
    "transpose": transpose_variants(("float", "__nv_bfloat16")),
}
OLDEST = 75


def toolkit_include(major: int) -> Path | None:
    """The CUDA headers of NVRTC's major version: those of a wheel, else those that CuPy finds."""
    import cupy

    wheel = "nvidia/cuda_runtime/include" if major < 13 else f"nvidia/cu{major}/include"
    candidates = [Path(folder) / wheel for folder in sys.path]
    toolkit = cupy.cuda.get_cuda_path()
    if toolkit is not None:
        candidates.append(Path(toolkit) / "include")
    return next((folder for folder in candidates if (folder / "cuda_fp16.h").is_file()), None)


class Compiler:
    def __init__(self) -> None:
        self.nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", exc_type=ImportError)
        try:
            major, _ = self.nvrtc.getVersion()
        except Exception as error:  # CuPy loads NVRTC on first use
            pytest.skip(f"NVRTC is not available: {error}")
        include = toolkit_include(major)
        if include is None:
            pytest.skip(f"the headers of CUDA {major} are not available")
        self.options = (*kernels.compile_options(), f"-I{include}", *CUPY_OPTIONS)

    def architectures(self) -> list[int]:
        return [arch for arch in self.nvrtc.getSupportedArchs() if arch >= OLDEST]

    def compile(self, source: str, variants: list[str], arch: int) -> tuple[list[str], str, bytes]:
        """Mangled names, log and cubin."""
        program = self.nvrtc.createProgram(kernels.read_source(source), f"{source}.cu", (), ())
        try:
            for name in variants:
                self.nvrtc.addNameExpression(program, name)
            options = (*self.options, f"-arch=sm_{arch}", "--ptxas-options=-v")
            try:
                self.nvrtc.compileProgram(program, options)
            except self.nvrtc.NVRTCError:
                pytest.fail(self.nvrtc.getProgramLog(program))
            names = [self.nvrtc.getLoweredName(program, name) for name in variants]
            return names, self.nvrtc.getProgramLog(program), self.nvrtc.getCUBIN(program)
        finally:
            self.nvrtc.destroyProgram(program)


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler()


REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)a?'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def max_registers(variant: str) -> int:
    """What kMinBlocks of roi_common.cuh leaves to a thread."""
    return 128 if "double" in variant else 64


def check(compiler: Compiler, source: str, variants: list[str], arch: int) -> None:
    names, log, cubin = compiler.compile(source, variants, arch)
    assert cubin.startswith(b"\x7fELF")
    assert "warning" not in log, log
    reports = {report["name"]: report for report in REPORT.finditer(log)}
    assert sorted(reports) == sorted(names)
    for variant, name in zip(variants, names, strict=True):
        report = reports[name]
        assert int(report["arch"]) == arch
        used = {what: int(report[what]) for what in ("stack", "stores", "loads")}
        assert used == {"stack": 0, "stores": 0, "loads": 0}, f"{variant} for sm_{arch}: {used}"
        assert 0 < int(report["registers"]) <= max_registers(variant), f"{variant} for sm_{arch}"


def test_the_variants_are_those_that_are_launched():
    """The lists of the tests name the element types of the launches, and every source."""
    assert tuple(launch.FEATURES.values()) == FEATURES
    assert tuple(launch.COORDINATES.values()) == COORDINATES
    assert sorted(VARIANTS) == list(kernels.sources())


@pytest.mark.parametrize("source", VARIANTS)
def test_compiles_for_every_architecture_without_spills(source, compiler):
    architectures = compiler.architectures()
    assert architectures
    for arch in architectures:
        check(compiler, source, REPRESENTATIVES[source], arch)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("source", VARIANTS)
def test_every_variant_compiles_without_spills(source, feature, compiler):
    arch = min(compiler.architectures(), key=lambda arch: abs(arch - 90))
    check(compiler, source, VARIANTS[source]((feature,)), arch)


def test_the_levels_have_the_layout_that_the_launch_fills_in(compiler, monkeypatch):
    text = kernels.read_source("ps_roi_pool")
    variants = ps_roi_pool_variants(("float",), ("float",))[:1]
    monkeypatch.setattr(kernels, "read_source", lambda source: "\n".join((text, *levels_assertions())))
    check(compiler, "ps_roi_pool", variants, compiler.architectures()[0])


def test_a_spill_would_be_reported(compiler, monkeypatch):
    text = kernels.read_source("roi_pool")
    crowded = text.replace("__launch_bounds__(kMaxThreads, kMinBlocks<T, Coord>)", "__launch_bounds__(kMaxThreads, 8)")
    assert crowded != text
    monkeypatch.setattr(kernels, "read_source", lambda source: crowded)
    with pytest.raises(AssertionError, match="stores"):
        check(compiler, "roi_pool", roi_pool_variants(("float",), ("float",), ("int",)), compiler.architectures()[0])


class FakeCuPy(ModuleType):
    """Stands in for CuPy where there is no GPU: counts what is compiled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        super().__init__("cupy")
        self.compiled: list[tuple[int, dict[str, Any]]] = []
        self.error = error
        fake = self

        class CompileError(Exception):
            pass

        class Device:
            current = -1

            def __init__(self, index: int) -> None:
                self.index = index

            def __enter__(self) -> None:
                Device.current = self.index

            def __exit__(self, *_: object) -> None:
                Device.current = -1

        class RawModule:
            def __init__(self, **arguments: Any) -> None:
                self.arguments = arguments

            def get_function(self, name: str) -> object:
                fake.compiled.append((Device.current, {**self.arguments, "name": name}))
                if fake.error is not None:
                    raise fake.error
                return object()

        self.CompileException = CompileError
        self.RawModule = RawModule
        self.cuda = ModuleType("cupy.cuda")
        self.cuda.Device = Device
        compiler_module = ModuleType("cupy.cuda.compiler")
        compiler_module.CompileException = CompileError
        for name, module in (("cupy", self), ("cupy.cuda", self.cuda), ("cupy.cuda.compiler", compiler_module)):
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(kernels, "_kernels", {})


NAME = "roi::roi_pool<float, float, int, true, roi::Contiguous<4>>"


def test_a_kernel_is_compiled_once_per_device_and_name(monkeypatch):
    fake = FakeCuPy(monkeypatch)
    other = NAME.replace("true", "false")
    requests = list(itertools.product((NAME, other), (0, 1)))
    first = [kernels.get_kernel("roi_pool", name, device) for name, device in requests]
    assert len(set(map(id, first))) == 4
    assert [kernels.get_kernel("roi_pool", name, device) for name, device in requests] == first
    assert [(device, compiled["name"]) for device, compiled in fake.compiled] == [(d, n) for n, d in requests]
    assert all(compiled["name_expressions"] == (compiled["name"],) for _, compiled in fake.compiled)
    assert all(compiled["options"] == kernels.compile_options() for _, compiled in fake.compiled)


def test_threads_that_ask_at_once_share_one_compilation(monkeypatch):
    fake = FakeCuPy(monkeypatch)
    barrier = threading.Barrier(8)
    got = []

    def ask() -> None:
        barrier.wait()
        got.append(kernels.get_kernel("roi_pool", NAME, 0))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len(set(map(id, got))) == 1
    assert len(fake.compiled) == 1


def test_an_error_of_the_compiler_comes_with_its_log(monkeypatch):
    fake = FakeCuPy(monkeypatch)
    fake.error = fake.CompileException("roi_pool.cu(7): error: expected a ;")
    with pytest.raises(kernels.KernelCompilationError, match=r"roi_pool\.cu\(7\): error: expected a ;") as caught:
        kernels.get_kernel("roi_pool", NAME, 0)
    assert NAME in str(caught.value)
    # It is remembered, for compiling at every call would be slow, and holds back no other kernel and no other GPU.
    fake.error = None
    with pytest.raises(kernels.KernelCompilationError, match="expected a ;"):
        kernels.get_kernel("roi_pool", NAME, 0)
    assert kernels.get_kernel("roi_pool", NAME, 1) is not None
    assert kernels.get_kernel("roi_pool", NAME.replace("true", "false"), 0) is not None


@pytest.mark.parametrize("error", [RuntimeError("no libnvrtc.so.12"), ImportError("cannot open shared object file")])
def test_a_compiler_that_is_not_there_is_the_same_error(monkeypatch, error):
    fake = FakeCuPy(monkeypatch)
    fake.error = error
    with pytest.raises(kernels.KernelCompilationError, match=str(error)):
        kernels.get_kernel("roi_pool", NAME, 0)


def test_an_unknown_source_is_refused(monkeypatch):
    FakeCuPy(monkeypatch)
    assert "roi_pool" in kernels.sources()
    with pytest.raises(ValueError, match=r"source must be one of .*roi_pool.*'nothing'"):
        kernels.get_kernel("nothing", NAME, 0)


def test_a_changed_header_changes_the_options(tmp_path, monkeypatch):
    """CuPy's disk cache does not look into headers."""
    shutil.copytree(KERNELS, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(kernels, "_FOLDER", tmp_path)
    kernels.compile_options.cache_clear()
    try:
        before = kernels.compile_options()
        header = tmp_path / "roi_common.cuh"
        header.write_text(header.read_text() + "\n// changed\n")
        kernels.compile_options.cache_clear()
        assert kernels.compile_options() != before
    finally:
        kernels.compile_options.cache_clear()


def test_imports_without_cupy():
    code = "import sys; sys.modules['cupy'] = None; import roi.kernels, roi.cupy_path; print(roi.kernels.sources())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "roi_pool" in done.stdout
