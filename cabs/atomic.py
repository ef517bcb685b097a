"""Files that are replaced as a whole.

Guarantees: whatever happens while a file is written, a kill included, its path leads to the old
content or to the new one; when the ``with`` block has ended, the new one is on the disk.
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

    The content goes to a file beside it, ``path`` and a random ending, which a kill can leave
    behind. One process at a time may write a path.

    Args:
        path: The file; its folder must exist.

    Yields:
        A binary file to write to.

    Raises:
        OSError: If the folder does not exist, or the content cannot be written; the old file is
            there, then.

    Example:
        Model, optimizer and loader in one file, which is never half a file::

            with cabs.atomic_write("checkpoint.pt") as file:
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
    folder, name = os.path.split(target)
    beside = os.path.join(folder, f"{name}.{secrets.token_hex(4)}.partial")
    file = open(beside, "xb")  # noqa: SIM115
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            os.chmod(beside, stat.S_IMODE(os.stat(target).st_mode))
        os.replace(beside, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(beside)
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    # Where folders cannot be opened, as on Windows, the system orders the renaming itself.
    flags = getattr(os, "O_DIRECTORY", None)
    if flags is not None:
        number = os.open(folder, flags)
        try:
            os.fsync(number)
        finally:
            os.close(number)
