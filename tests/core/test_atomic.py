"""Files that are replaced as a whole: a kill at any moment leaves the old or the new one."""

import os
import signal
import stat
import sys

import pytest

from cabs.runs import atomic_write
from tests.processes import finished

OLD, NEW = b"old" * 1000, b"new" * 5000

# The process kills itself at one of the moments between the first byte and the last.
DYING = """
import os, signal, sys
import cabs.values.atomic
from cabs.runs import atomic_write

path, moment = sys.argv[1:]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if moment in ("fsync", "chmod", "replace"):
    setattr(os, moment, die)
if moment == "folder":
    cabs.values.atomic._sync_folder = die
with atomic_write(path) as file:
    file.write(b"new" * 2500)
    if moment == "half":
        file.flush()
        die()
    file.write(b"new" * 2500)
    if moment == "unflushed":
        die()
"""


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("half", OLD),
        ("unflushed", OLD),
        ("fsync", OLD),
        ("chmod", OLD),
        ("replace", OLD),
        ("folder", NEW),
        ("never", NEW),
    ],
)
def test_a_kill_while_saving_leaves_the_old_file_or_the_new_one(tmp_path, moment, left):
    path = tmp_path / "checkpoint"
    path.write_bytes(OLD)
    command = [sys.executable, "-c", DYING, str(path), moment]
    status = finished(command).returncode
    assert status == (0 if moment == "never" else -signal.SIGKILL)
    assert path.read_bytes() == left


def test_an_error_while_saving_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "checkpoint"
    path.write_bytes(OLD)
    with pytest.raises(TypeError, match="a bytes-like object"), atomic_write(path) as file:
        file.writelines([NEW, "text"])
    assert os.listdir(tmp_path) == ["checkpoint"]
    assert path.read_bytes() == OLD


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "checkpoint"
    path.write_bytes(OLD)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_write(path) as file:
        file.write(NEW)
    assert os.listdir(tmp_path) == ["checkpoint"]
    assert path.read_bytes() == OLD


def test_links_are_followed_and_permissions_kept(tmp_path):
    path, link = tmp_path / "checkpoint", tmp_path / "latest"
    path.write_bytes(OLD)
    path.chmod(0o640)
    link.symlink_to(path)
    with atomic_write(link) as file:
        file.write(NEW)
    assert link.is_symlink()
    assert path.read_bytes() == NEW
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_new_file_has_the_permissions_that_any_new_file_has(tmp_path):
    (tmp_path / "other").touch()
    with atomic_write(tmp_path / "checkpoint") as file:
        file.write(NEW)
    assert (tmp_path / "checkpoint").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_long_name_is_no_obstacle(tmp_path):
    path = tmp_path / ("x" * 250)
    for content in (OLD, NEW):
        with atomic_write(path) as file:
            file.write(content)
        assert path.read_bytes() == content


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(ValueError, match="path must lead to a file"),
        atomic_write(tmp_path / "pipe"),
    ):
        pass
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "nowhere" / "x"):
        pass
