"""One of several processes that train together: ``python -m tests.jax.processes PORT COUNT RANK``.

What goes wrong is an error of the process.
"""

import os
import sys

import jax


def main(port, count, rank):
    """Train, on two devices."""
    # Read when the first array is made.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=2"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, rank)
    # They make arrays, which has to wait.
    from tests.jax.alike import check
    from tests.jax.test_devices_properties import CASES, train
    from tests.one_process import Case, assert_as_one_process

    assert (jax.process_count(), jax.local_device_count()) == (count, 2)
    for number, (engine, way) in enumerate(CASES):
        case = Case(
            widths=(5, 4),
            positions=2,
            is_double=True,
            engine=engine,
            way=way,
            devices=2 * count,
            microbatches=1 if way == "exact" else 2,
            seed=number,
        )
        with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
            assert_as_one_process(case, *train(case))
        sys.stdout.write(f"as one process: {engine}, {way}\n")
    check(rank, count)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
