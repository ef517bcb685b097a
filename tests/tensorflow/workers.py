"""Workers of ``MultiWorkerMirroredStrategy``, each of which is a process.

``run("module:function", ...)`` starts two of them, each of which calls these functions, one after
the other, with the strategy and its own number, and prints what they return.
"""

import importlib
import json
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.processes import finished

WORKERS = 2
ROOT = Path(__file__).parents[2]


def run(*places):
    """Return what functions return on each of two workers, by their names, as JSON has it."""
    ports = []
    for _ in range(WORKERS):
        with socket.create_server(("127.0.0.1", 0)) as server:
            ports.append(f"127.0.0.1:{server.getsockname()[1]}")

    def start(index):
        task = {"cluster": {"worker": ports}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(task), "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, "-m", "tests.tensorflow.workers", *places]
        return finished(command, limit=300.0, cwd=ROOT, env=environment)

    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(start, range(WORKERS)))
    for one in ended:
        assert one.returncode == 0, one.stderr[-3000:]
    return [json.loads(one.stdout.splitlines()[-1]) for one in ended]


def main(*places):
    # It has to start with its cluster, before anything is imported that uses it.
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    assert strategy.num_replicas_in_sync == WORKERS
    found = {}
    for place in places:
        module, _, name = place.partition(":")
        function = getattr(importlib.import_module(module), name)
        found[name] = function(strategy, strategy.cluster_resolver.task_id)
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
