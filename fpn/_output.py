"""Files are written whole: at any moment the final name is that of the old file or of the complete new one."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link in a loop",
}


@contextmanager
def written_whole(paths: Sequence[str | os.PathLike[str]]) -> Iterator[list[Path]]:
    """Temporary paths to write to. When all files are on the disk they move to `paths`; after an error none does.

    Links are followed. A file that is there already is replaced by one with its mode.

    Raises:
        OSError: what is at one of `paths` is no regular file, before anything is written; or writing fails.
    """
    targets = [Path(os.path.realpath(path)) for path in paths]
    for path, target in zip(paths, targets, strict=True):
        check_regular(path, target)
    with ExitStack() as folders:
        unfinished = [
            Path(folders.enter_context(tempfile.TemporaryDirectory(prefix=".fpn-", dir=target.parent)), target.name)
            for target in targets
        ]
        yield unfinished
        for path, file, target in zip(paths, unfinished, targets, strict=True):
            with file.open("rb") as written:
                os.fsync(written.fileno())
            check_regular(path, target)
            if target.exists():
                os.chmod(file, stat.S_IMODE(target.stat().st_mode))
            os.replace(file, target)


def check_regular(path: str | os.PathLike[str], target: Path) -> None:
    """Raise if at `target`, to which `path` leads, there is anything but a regular file.

    Raises:
        OSError: there is; the message says what it is.
    """
    try:
        kind = stat.S_IFMT(target.lstat().st_mode)
    except FileNotFoundError:
        return
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"it is {KINDS.get(kind, 'no regular file')}", os.fspath(path))
