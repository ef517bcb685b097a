"""Programs that tests run in processes of their own, none of which can hang a test.

What a program prints goes to files: a pipe is held open by whatever process it leaves behind, and
waiting for its end would be waiting for that one too.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import time

# Many times what any of them takes on a machine that is busy.
LIMIT = 600.0


def finished(command, *, limit=LIMIT, text=True, **options):
    """Run a program to its end and return what ``subprocess.run`` would.

    Fails, saying what was printed, if that takes more than ``limit`` seconds; then nothing that
    the program started is left.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, **options}
        process = subprocess.Popen(command, start_new_session=True, **streams)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            end(process)
            said = "\n".join(
                f"{name}:\n{told(file)}" for name, file in (("out", out), ("err", err))
            )
            raise AssertionError(
                f"{command} did not end within {limit:g} seconds, and printed\n{said}"
            ) from None
        except BaseException:
            end(process)
            raise
        printed = [told(file) if text else content(file) for file in (out, err)]
    return subprocess.CompletedProcess(command, process.returncode, *printed)


def end(process):
    """End a program that was started as the first of its session, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def content(file):
    # Not by reading on from the start: the program writes where this process left the file.
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)


def told(file):
    return content(file).decode(errors="replace")


def joined(context, *, limit=LIMIT):
    """Wait for processes that ``torch.multiprocessing.start_processes`` started with join=False."""
    deadline = time.monotonic() + limit
    while not context.join(timeout=1.0):
        if time.monotonic() > deadline:
            left = [process.pid for process in context.processes if process.is_alive()]
            for process in context.processes:
                process.kill()
            raise AssertionError(f"processes {left} did not end within {limit:g} seconds")


def killed_when(command, is_time, *, limit=LIMIT):
    """Kill a program as soon as what it has printed is enough; return all that it printed.

    Fails if that takes more than ``limit`` seconds, or the program ends by itself.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        deadline = time.monotonic() + limit
        try:
            while not is_time(told(out)):
                assert process.poll() is None, f"{command} has ended: {told(err)}"
                assert time.monotonic() < deadline, (
                    f"{command} has printed too little within {limit:g} seconds:\n{told(out)}"
                )
                time.sleep(0.001)
        finally:
            end(process)
        return told(out)
