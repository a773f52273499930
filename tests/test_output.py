"""Where files go: links are followed, modes kept, and what is no regular file is refused before anything is written."""

from __future__ import annotations

import os
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fpn._output import written_whole
from fpn.command import options
from fpn.export import export_onnx
from tests.test_export import run_command, small_fpn

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, FIFOs and modes as POSIX has them")


def write(path: Path, text: str) -> None:
    with written_whole([path]) as (unfinished,):
        unfinished.write_text(text)


def write_half(path: Path) -> None:
    with written_whole([path]) as (unfinished,):
        unfinished.write_text("half")
        raise KeyError


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def a_device(path: Path) -> None:
    """A node of our own, of a number that no driver has."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(254, 254))
    except PermissionError:
        pytest.skip("only root makes devices")


def a_link_to_a_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("fifo"))
    path.symlink_to("fifo")


ODD: dict[str, Callable[[Path], object]] = {
    "it is a FIFO": lambda path: os.mkfifo(path),
    "it is a socket": a_socket,
    "it is a character device": a_device,
    "it is a folder": lambda path: path.mkdir(),
    "it is a link in a loop": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("what", ODD)
def test_what_is_no_file_is_refused_and_stays(what: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    ODD[what](path)
    before = path.lstat()
    with pytest.raises(OSError, match=what):
        write(path, "new")
    assert (path.lstat().st_mode, path.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("what", ODD)
def test_nothing_is_exported_to_what_is_no_file(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    path = tmp_path / "model.onnx"
    ODD[what](path)
    before = path.lstat()
    with pytest.raises(OSError, match=what):
        export_onnx(small_fpn("bilinear", fused=False), path)
    assert run_command(monkeypatch, "export", path, "--model", "FPN18") == 2
    stderr = capsys.readouterr().err
    assert what in stderr
    assert str(path) in stderr
    assert (path.lstat().st_mode, path.lstat().st_ino) == (before.st_mode, before.st_ino)
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_a_link_to_what_is_no_file_is_refused(tmp_path: Path) -> None:
    a_link_to_a_fifo(tmp_path / "link")
    with pytest.raises(OSError, match="it is a FIFO"):
        write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "fifo").is_fifo()


@pytest.mark.parametrize("dangling", [False, True])
def test_links_are_followed(dangling: bool, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "target"
    if not dangling:
        target.write_text("old")
    (tmp_path / "link").symlink_to("middle")
    (tmp_path / "middle").symlink_to(Path("folder", "target"))
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert target.read_text() == "new"
    assert os.listdir(tmp_path / "folder") == ["target"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o440])
def test_the_mode_of_a_file_that_is_there_is_kept(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    write(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_text() == "new"


def test_what_fails_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_half(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_files_of_the_demo_follow_links(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").symlink_to(Path("elsewhere", "a"))
    with options.output_files(tmp_path, ["a", "b"]) as paths:
        for path in paths:
            path.write_text(path.name)
    assert (tmp_path / "elsewhere" / "a").read_text() == "a"
    assert (tmp_path / "b").read_text() == "b"
