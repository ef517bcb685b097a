"""A program on several ranks may end as soon as it has read its statistics."""

import multiprocessing
import os
import sys

import pytest

from tests.processes import finished

# Each rank is a fork that ends as programs do, with Python taken down. The thread of gloo that adds
# up runs only where nothing else wants to, so that it lets go of its work late, as under load.
PROGRAM = """
import os, sys, tempfile
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
import torch._dynamo
import cabs_torch

def train(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{{folder}}/meet", rank=rank, world_size=2)
    dist.barrier()
    for task in os.listdir("/proc/self/task"):
        if "gloo" in open(f"/proc/self/task/{{task}}/comm").read():
            os.sched_setscheduler(int(task), os.SCHED_IDLE, os.sched_param(0))
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
    for _ in range(2):
        model.zero_grad()
        losses = model(torch.randn(4, 3) + rank).square().squeeze(1)
        statistics = cabs_torch.backward(losses)
        assert statistics.read().examples == 8

for _ in range(4):
    folder = tempfile.mkdtemp(dir={folder!r})
    ranks = []
    for rank in range(2):
        if not (pid := os.fork()):
            break
        ranks.append(pid)
    else:
        print([os.waitpid(pid, 0)[1] for pid in ranks])
        continue
    train(rank, folder)
    break
"""


def is_busy():
    while True:
        pass


@pytest.fixture
def busy_machine():
    context = multiprocessing.get_context("fork")
    busy = [context.Process(target=is_busy, daemon=True) for _ in range(os.cpu_count() or 1)]
    for one in busy:
        one.start()
    yield
    for one in busy:
        one.kill()
        one.join()


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="needs Linux")
@pytest.mark.usefixtures("busy_machine")
def test_a_rank_ends_with_its_last_statistics(tmp_path):
    text = PROGRAM.format(root=os.getcwd(), folder=str(tmp_path))
    done = finished([sys.executable, "-c", text], limit=120.0)
    assert done.stdout == "[0, 0]\n" * 4, done.stderr[-3000:]
