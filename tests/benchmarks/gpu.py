"""On a machine with a GPU: everything there is to check and to measure, in PyTorch and in JAX.

    python tests/benchmarks/gpu.py FOLDER

Leaves gpu_torch.json, gpu_feeding.json and gpu_jax.json in the folder, for report.py. Ends with an
error if a statistic is wrong, a step waits for the device, or a batch is not what it should be.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = {"gpu_feeding": "gpu_feeding.py", "gpu_jax": "steps_jax.py", "gpu_torch": "gpu_torch.py"}


def main() -> int:
    """Run the scripts one after the other; return how many fail."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    failed = 0
    for name, script in SCRIPTS.items():
        command = [sys.executable, str(here / script), "--json", str(folder / f"{name}.json")]
        failed += subprocess.run(command, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
