"""Ranks of ``torch.distributed`` that live as long as a file of tests, and are given cases."""

import contextlib
import datetime
import os
import time

import torch

# Here once, and not in each rank as soon as it makes an optimizer.
import torch._dynamo
import torch.distributed as dist
import torch.multiprocessing as mp

# Many times what a case takes on a machine that is busy.
LIMIT = 60.0


class Ranks:
    """Processes in which functions run, in all of them at once."""

    def __init__(self, count, folder, timeout=30.0):
        context = mp.get_context("fork")
        self._pipes, self._processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            arguments = (rank, count, folder / "meeting", timeout, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function, *arguments, limit=LIMIT):
        """Return what the function returns on each rank, or the text of its error."""
        for pipe in self._pipes:
            # A rank that is gone has nothing to say.
            with contextlib.suppress(BrokenPipeError):
                pipe.send((function, arguments))
        deadline = time.monotonic() + limit
        found = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                raise AssertionError(f"rank {rank} did not answer within {limit:g} seconds")
            try:
                found.append(pipe.recv())
            except EOFError:
                found.append("gone")
        return found

    def all(self, function, *arguments):
        """Return what the function returns on each rank, where none of them raises."""
        found = self.run(function, *arguments)
        for rank, one in enumerate(found):
            assert not isinstance(one, str), f"rank {rank}: {one}"
        return found

    def end(self):
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send(None)
            pipe.close()
        for process in self._processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(rank, count, meeting, timeout, pipe):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=timeout),
    )
    with contextlib.suppress(EOFError):
        while (case := pipe.recv()) is not None:
            function, arguments = case
            try:
                answer = function(*arguments)
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}"
            pipe.send(answer)
    os._exit(0)
