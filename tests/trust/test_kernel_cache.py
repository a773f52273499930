"""Compilation under abuse: CuPy's own compiler and disk cache, without a GPU. Only loading onto one is left out."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from roi import kernels
from tests.conftest import ALL_TRUST_CASES, import_problem
from tests.test_kernels_nvrtc import Compiler as Toolkit
from tests.trust.conftest import Amounts

pytestmark = [
    pytest.mark.trust,
    pytest.mark.skipif(
        import_problem("cupy.cuda._compiler_cache") is not None, reason="needs a CuPy whose cache can be put elsewhere"
    ),
]

NAME = "roi::roi_pool<float, float, int, true, roi::Contiguous<4>>"
ARCHITECTURE = "80"


class Loaded:
    """In place of `cupy.cuda.function.Module`: keeps what would go to the GPU."""

    def load(self, cubin: bytes) -> None:
        assert cubin[:4] == b"\x7fELF"
        self.cubin = cubin

    def _set_mapping(self, mapping: dict[str, str]) -> None:
        self.mapping = mapping


class RawModule:
    """In place of CuPy's, which asks the device for its architecture and finds CUDA's headers by that."""

    def __init__(self, code: str, options: tuple[str, ...], name_expressions: tuple[str, ...]) -> None:
        include = next(option for option in Toolkit().options if option.endswith("include"))
        self.arguments = {"source": code, "options": (*options, include), "name_expressions": name_expressions}

    def get_function(self, name: str) -> bytes:
        from cupy.cuda import compiler

        module = compiler._compile_module_with_cache(**self.arguments, arch=ARCHITECTURE)
        assert name in module.mapping
        cubin: bytes = module.cubin
        return cubin


class Compiler:
    """CuPy's compiler and its cache in a folder. Counts compilations."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        import cupy
        from cupy.cuda import _compiler_cache, compiler

        self.compilations = 0
        compile_ = compiler._compile_using_nvrtc_no_warning

        def counted(*args: Any) -> Any:
            self.compilations += 1
            return compile_(*args)

        patch.setattr(cupy, "RawModule", RawModule)
        patch.setattr(cupy.cuda, "Device", lambda index: contextlib.nullcontext())
        patch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch=None: (f"-arch=sm_{arch}", "cubin"))
        patch.setattr(compiler.function, "Module", Loaded)
        patch.setattr(compiler, "_compile_using_nvrtc_no_warning", counted)
        self.cache = _compiler_cache.DiskKernelCacheBackend(str(folder))
        patch.setattr(compiler, "_kernel_cache_backend", self.cache)
        patch.setattr(kernels, "_kernels", {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A cache with one kernel, and the kernel."""
    with pytest.MonkeyPatch.context() as patch:
        Compiler(patch, folder := tmp_path_factory.mktemp("cache"))
        return folder, kernels.get_kernel("roi_pool", NAME, 0)


@pytest.mark.parametrize("damage", ["empty", "truncated", "a bit", "text"])
def test_a_damaged_cache_is_compiled_anew(
    damage: str, whole: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tally: Counter[str]
) -> None:
    (entry,) = whole[0].iterdir()
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"empty": b"", "truncated": content[:-7], "a bit": content, "text": b"kernel"}[damage]
    (tmp_path / entry.name).write_bytes(damaged)
    compiler = Compiler(monkeypatch, tmp_path)
    assert kernels.get_kernel("roi_pool", NAME, 0) == whole[1]
    assert compiler.compilations == 1
    tally["damaged kernel caches"] += 1


def test_the_cache_is_used(whole: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(monkeypatch, whole[0])
    assert kernels.get_kernel("roi_pool", NAME, 0) == whole[1]
    assert compiler.compilations == 0


@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_cache_that_cannot_be_written_is_done_without(
    problem: int, whole: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tally: Counter[str]
) -> None:
    def fail(*args: object) -> None:
        raise OSError(problem, os.strerror(problem))

    compiler = Compiler(monkeypatch, tmp_path)
    monkeypatch.setattr(compiler.cache, "_write_encoded", fail)
    assert kernels.get_kernel("roi_pool", NAME, 0) == whole[1]
    assert "CUPY_CACHE_IN_MEMORY" not in os.environ
    tally["kernel caches that cannot be written"] += 1


def test_an_interrupted_compilation_is_made_again(whole: tuple[Path, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    Compiler(monkeypatch, whole[0])
    get_function = RawModule.get_function

    def interrupt(self: RawModule, name: str) -> None:
        monkeypatch.setattr(RawModule, "get_function", get_function)
        raise KeyboardInterrupt

    monkeypatch.setattr(RawModule, "get_function", interrupt)
    with pytest.raises(KeyboardInterrupt):
        kernels.get_kernel("roi_pool", NAME, 0)
    assert kernels.get_kernel("roi_pool", NAME, 0) == whole[1]


def test_threads_compile_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, whole: tuple[Path, bytes]) -> None:
    compiler = Compiler(monkeypatch, tmp_path)
    names = [NAME, NAME.replace("true", "false")]
    got: list[tuple[str, bytes]] = []

    def ask(number: int) -> None:
        name = names[number % 2]
        got.append((name, kernels.get_kernel("roi_pool", name, 0)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8
    assert len(set(got)) == compiler.compilations == 2


def compiled_in(folder: Path) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        Compiler(patch, folder)
        kernel: bytes = kernels.get_kernel("roi_pool", NAME, 0)
    return kernel


def test_processes_share_a_cache(
    whole: tuple[Path, bytes], tmp_path: Path, amounts: Amounts, tally: Counter[str]
) -> None:
    if amounts.cases < ALL_TRUST_CASES:
        pytest.skip(f"four compilers at once: with --trust-cases {ALL_TRUST_CASES}")
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(compiled_in, [tmp_path] * 4, chunksize=1) == [whole[1]] * 4
    assert len(list(tmp_path.iterdir())) == 1
    tally["processes that compile at once"] += 4
