"""Files that are replaced as a whole.

Guarantees: whatever happens while a file is written, a kill included, its path leads to the old
content or to the new one; when the ``with`` block has ended, the new one is on the disk, as far as
the file system can be told to put it there.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write a file that takes its place when the block ends, and not if it raises.

    The content goes to a file beside it, with a random name and the ending ``.partial``, which a
    kill can leave behind. One process at a time may write a path.

    Args:
        path: The file; its folder must exist.

    Yields:
        A binary file to write to.

    Raises:
        OSError: If the folder does not exist, or the content cannot be written; the old file is
            there, then.
        ValueError: If the path leads to something that is no file, such as a pipe.

    Example:
        Model, optimizer and loader in one file, which is never half a file::

            with cabs.runs.atomic_write("checkpoint.pt") as file:
                torch.save({"model": model.state_dict(), "loader": loader.state_dict()}, file)

        >>> import json, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "state.json"
        >>> with atomic_write(path) as file:
        ...     _ = file.write(json.dumps({"epoch": 1}).encode())
        >>> json.loads(path.read_bytes())
        {'epoch': 1}
    """
    # Through links, which would otherwise be replaced by the file.
    target = os.path.realpath(os.fsdecode(path))
    folder = os.path.dirname(target)
    mode = os.stat(target).st_mode if os.path.exists(target) else None
    if mode is not None and not stat.S_ISREG(mode):
        raise ValueError(f"path must lead to a file, or to none yet, got path = {path!r}")
    beside = os.path.join(folder, f"{secrets.token_hex(8)}.partial")
    file = open(beside, "xb")  # noqa: SIM115
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(beside, stat.S_IMODE(mode))
        os.replace(beside, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(beside)
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    # Not every system lets folders be opened, nor every file system has them synced; the file is
    # in its place all the same.
    with suppress(OSError):
        number = os.open(folder, getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(number)
        finally:
            os.close(number)
