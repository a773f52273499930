from __future__ import annotations

import collections
import contextlib
import os
import pickle
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fpn.checkpoints.content import state_dict_in
from fpn.checkpoints.errors import CheckpointError
from fpn.checkpoints.files import read_checkpoint

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
TENSOR = torch.from_numpy(ARRAY)
CONTENT = {
    "model": collections.OrderedDict(
        array=ARRAY,
        fortran=np.asfortranarray(ARRAY),
        big_endian=ARRAY.astype(">f4"),
        half=ARRAY.astype(np.float16),
        scalar=np.float64(3),
        integers=np.arange(3),
        booleans=np.array([True, False]),
        tensor=TENSOR,
        slice=TENSOR[:, 1:],
    ),
    "__author__": "Caffe2",
    "iteration": [1, (2.5, "text", None)],
}


def same_content(path: Path) -> bool:
    state = read_checkpoint(path)
    assert state.keys() == CONTENT["model"].keys()
    for name, value in CONTENT["model"].items():
        expected = value if isinstance(value, torch.Tensor) else torch.tensor(np.asarray(value).tolist())
        assert torch.equal(state[name].double(), expected.double()), name
        assert state[name].is_contiguous() or name == "slice"
    assert state["half"].dtype == torch.float16
    return True


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_arrays_and_tensors(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(CONTENT, protocol))
    assert same_content(tmp_path / "c.pkl")


def test_pickles_of_numpy_1_and_of_python_2(tmp_path: Path) -> None:
    content = pickle.dumps({"a": ARRAY}, 2)
    assert b"numpy._core" in content or b"numpy.core" in content
    (tmp_path / "c.pkl").write_bytes(content.replace(b"numpy._core", b"numpy.core"))
    assert torch.equal(read_checkpoint(tmp_path / "c.pkl")["a"], TENSOR)
    # Python 2 has the array's bytes as a string of its own, which Python 3 reads as text.
    state = (
        b"(I1\n(I2\nI3\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS"
        + repr(ARRAY.tobytes())[1:].encode()
        + b"\ntb"
    )
    python_2 = b"(dS'a'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR" + state + b"s."
    (tmp_path / "c.pkl").write_bytes(python_2)
    assert torch.equal(read_checkpoint(tmp_path / "c.pkl")["a"], TENSOR)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_files_of_torchs_with_arrays_in_them(tmp_path: Path, new_format: bool) -> None:
    torch.save(CONTENT, tmp_path / "c.pth", _use_new_zipfile_serialization=new_format)
    assert same_content(tmp_path / "c.pth")


def test_safetensors(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"module.a": TENSOR, "b": TENSOR.half()}, tmp_path / "c.safetensors")
    state = read_checkpoint(tmp_path / "c.safetensors")
    assert torch.equal(state["a"], TENSOR)
    assert state["b"].dtype == torch.float16
    whole = (tmp_path / "c.safetensors").read_bytes()
    for length in (9, 40, len(whole) - 1):
        (tmp_path / "c.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            read_checkpoint(tmp_path / "c.safetensors")


def test_without_safetensors_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "c.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        read_checkpoint(tmp_path / "c.safetensors")


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_mmengines_training_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_format: bool) -> None:
    """They hold records of losses, objects that name their own methods by `getattr`."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self.history, self.methods = np.zeros(3), {"mean": HistoryBuffer.mean}

        def mean(self) -> float:
            raise AssertionError

    module = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.mean.__module__ = module.__name__
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = {"state_dict": {"a": TENSOR}, "message_hub": {"loss": HistoryBuffer()}}
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=new_format)
    monkeypatch.undo()
    assert torch.equal(read_checkpoint(tmp_path / "c.pth")["a"], TENSOR)


# --- hostile and damaged files


class Calls:
    """Unpickles as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def write(path: Path, content: Any, form: str) -> None:
    if form == "pickle 0":
        path.write_bytes(pickle.dumps(content, 0))
    elif form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["pickle 0", "pickle", "zip", "legacy"])
@pytest.mark.parametrize("call", ["system", "eval", "getattr", "Path.touch", "chain"])
def test_hostile_pickles_run_nothing(tmp_path: Path, form: str, call: str) -> None:
    """The weights beside a call come out, and the call stays a name; a call in place of a tensor is no entry."""
    witness = tmp_path / "witness"
    hostile = {
        "system": Calls(os.system, f"touch {witness}"),
        "eval": Calls(eval, f"open({str(witness)!r}, 'w')"),
        "getattr": Calls(getattr, {}, "update"),
        "Path.touch": Calls(Path.touch, witness),
        "chain": Calls(map, Calls(eval, "print"), Calls(os.system, f"touch {witness}")),
    }[call]
    write(tmp_path / "c.pth", {"state_dict": {"a": TENSOR, "b": hostile}, "args": hostile}, form)
    state = read_checkpoint(tmp_path / "c.pth")
    assert list(state) == ["a"]
    assert torch.equal(state["a"], TENSOR)
    write(tmp_path / "c.pth", {"state_dict": {"a": hostile}}, form)
    with pytest.raises(CheckpointError, match="it holds no state dict"):
        read_checkpoint(tmp_path / "c.pth")
    assert not witness.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_storage_inside_a_pickle_is_no_way_round(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    for inner in (pickle.dumps(Calls(Path.touch, witness)), b""):
        content = {"a": Calls(torch.storage._load_from_bytes, inner)}
        (tmp_path / "c.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / "c.pkl")
    assert not witness.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"ccollections\nOrderedDict\n(dS'x'\nI1\nsb.",  # state set on a function
        b"ctorch._utils\n_rebuild_tensor_v2\n(N(dS'__defaults__'\nNstb.",  # and on a slot of torch's
        b"cnumpy\ndtype\n(S'O8'\ntR.",
        b"cnumpy\ndtype\n(S'V1000000000'\ntR.",
        b"cnumpy\ndtype\n(S'f4,f4'\ntR.",
        b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
        b"(cos\nsystem\nS'false'\no.",  # calls by the other opcodes
        b"(S'false'\nios\nsystem\n.",
        b"\x80\x02cos\nsystem\nU\x05false\x85\x81.",
        b"(dS'a'\ncos\nsystem\n(S'false'\ntRs.",
        b"\x80\x02\x82\x01.",  # a number that the program may have registered
        b"cos\nsystem\n(S'false'\ntR(S'false'\ntR.",  # a call of what a call gave
    ],
)
def test_what_is_allowed_is_no_tool(tmp_path: Path, program: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"it ran {command}"))
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    (tmp_path / "c.pkl").write_bytes(program)
    with pytest.raises(CheckpointError, match=r"no state dict|means nothing outside"):
        read_checkpoint(tmp_path / "c.pkl")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults


def test_nothing_is_imported(tmp_path: Path) -> None:
    (tmp_path / "c.pkl").write_bytes(b"(dS'a'\nccolorsys\nrgb_to_hls\n(I1\nI1\nI1\ntRs.")
    sys.modules.pop("colorsys", None)
    with pytest.raises(CheckpointError, match=r"holds a \(colorsys\.rgb_to_hls\)"):
        read_checkpoint(tmp_path / "c.pkl")
    assert "colorsys" not in sys.modules


@pytest.mark.parametrize("where", ["a key", "a set", "a frozenset", "an element"])
def test_tuples_of_the_same_tuples_take_no_time(tmp_path: Path, where: str) -> None:
    """Their hash, as a key's, would take twice as long for each level."""
    doubled = b")" + b"".join(b"q" + bytes([i]) + b"0h" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    wrapped = {
        "a key": b"\x80\x04}" + doubled + b"Ns.",
        "a set": b"\x80\x04\x8f(" + doubled + b"\x90.",
        "a frozenset": b"\x80\x04(" + doubled + b"\x91.",
        "an element": b"\x80\x04](" + doubled + b"e.",
    }[where]
    (tmp_path / "c.pkl").write_bytes(wrapped)
    with pytest.raises(CheckpointError, match="no state dict"):
        read_checkpoint(tmp_path / "c.pkl")


@pytest.mark.parametrize(
    ("program", "weights"),
    [
        (b"\x80\x02}q\x00U\x01ah\x00s.", False),  # a dict in itself
        (b"\x80\x02]q\x00h\x00a.", False),
        (b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".", False),  # a list in a list in a list
        (b"\x80\x02}U\x01a" + b"}U\x01a" * 50_000 + b"N" + b"s" * 50_001 + b".", False),
    ],
    ids=["dict", "list", "deep lists", "deep dicts"],
)
def test_cycles_and_depths(tmp_path: Path, program: bytes, weights: bool) -> None:
    (tmp_path / "c.pkl").write_bytes(program)
    with pytest.raises(CheckpointError, match="no state dict"):
        read_checkpoint(tmp_path / "c.pkl")


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes of 2^63
        b"\x80\x04\x8e\x00\x00\x00\x00\x10\x00\x00\x00.",  # of 2^36
        b"\x80\x05\x96\x00\x00\x00\x00\x00\x00\xff\x00.",  # a bytearray
        b"\x80\x04\x95\x00\x00\x00\x00\x10\x00\x00\x00N.",  # a frame
        b"\x80\x04Nr\xff\xff\xff\xff.",  # a place in the memo
        b"(" * 1_000_000,
    ],
)
def test_lengths_beyond_the_file_take_no_memory(tmp_path: Path, content: bytes) -> None:
    resource = pytest.importorskip("resource")
    (tmp_path / "c.pkl").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "c.pkl")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 300_000_000


def test_a_long_key_of_many_containers_takes_no_memory(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({"k" * 1_000_000: [[i] for i in range(5000)]}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="no state dict"):
        read_checkpoint(tmp_path / "c.pkl")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 300_000_000


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "c.pth")
    with (
        zipfile.ZipFile(tmp_path / "c.pth") as source,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    with pytest.raises(CheckpointError, match=r"bytes unpack to 4\d{6}"):
        read_checkpoint(tmp_path / "bomb.pth")


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
def test_entries_that_claim_more_than_is_stored_are_refused(tmp_path: Path, form: str) -> None:
    write(tmp_path / "c.pth", {"a": torch.ones(1).expand(10**12)}, form)
    with pytest.raises(CheckpointError, match=r"a claims shape \(1000000000000,\), but stores 4 bytes"):
        read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
def test_entries_that_share_the_same_bytes_are_refused_beyond_what_heads_share(tmp_path: Path, form: str) -> None:
    """A model is built with memory for each of them: 5000 entries of 4 MB would be 20 GB."""
    shared = torch.zeros(1000)
    write(tmp_path / "c.pth", {f"a{i}": shared for i in range(16)}, form)
    assert len(read_checkpoint(tmp_path / "c.pth")) == 16
    write(tmp_path / "c.pth", {f"a{i}": shared for i in range(17)}, form)
    with pytest.raises(CheckpointError, match="its 17 entries share 4000 bytes"):
        read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
def test_truncated_files(tmp_path: Path, form: str) -> None:
    write(tmp_path / "c.pth", {f"a{i}": torch.randn(100) for i in range(10)}, form)
    whole = (tmp_path / "c.pth").read_bytes()
    for part in range(20):
        (tmp_path / "c.pth").write_bytes(whole[: len(whole) * part // 20])
        with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
            read_checkpoint(tmp_path / "c.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_bytes_are_errors_of_ours_or_no_errors(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    for form in ("pickle", "zip", "legacy"):
        write(tmp_path / "c.pth", CONTENT, form)
        whole = np.frombuffer((tmp_path / "c.pth").read_bytes(), np.uint8)
        for _ in range(200):
            damaged = whole.copy()
            damaged[random.randint(0, len(whole), 3)] = random.randint(0, 256, 3)
            (tmp_path / "c.pth").write_bytes(damaged.tobytes())
            with contextlib.suppress(CheckpointError):
                read_checkpoint(tmp_path / "c.pth")


# --- what counts as a state dict


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no state dict"),
        ([1], "no state dict"),
        ({1: torch.ones(1)}, "no state dict"),
        ({"a": 0.1}, r"it holds a \(float\)"),
        ({"a": np.array(["text"])}, r"it holds a \(ndarray\)"),
        ({"a": np.array([None])}, r"it holds a \(ndarray\)"),
        ({"module.a": torch.ones(1), "a": torch.ones(1)}, "two of its entries are a"),
    ],
)
def test_what_is_no_state_dict(content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        state_dict_in(content)


def test_names_of_wrappers_are_taken_out_wherever_they_stand() -> None:
    names = ("module.a.b", "_orig_mod.module.c", "d._orig_mod.e", "f._fsdp_wrapped_module._checkpoint_wrapped_module.g")
    assert list(state_dict_in({name: torch.ones(1) for name in names})) == ["a.b", "c", "d.e", "f.g"]
    assert list(state_dict_in({"my_module.a": torch.ones(1), "modules.b": torch.ones(1)})) == [
        "my_module.a",
        "modules.b",
    ]
