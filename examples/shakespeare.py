"""Trains a small GPT with tied embeddings on text, while CABS sets the batch size.

    python examples/shakespeare.py --text DIR/tinyshakespeare/input.txt
    python examples/shakespeare.py --text any.txt --backend jax --steps 50 --layers 2

Leaves the run log, run.jsonl, and a figure, run.png, in the folder given by --out.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cabs
import training
from cabs.plot import plot_run


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="a file of plain text")
    parser.add_argument("--backend", choices=training.LANGUAGE_BACKENDS, default="torch")
    parser.add_argument("--learning-rate", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--length", type=int, default=32, help="characters in an example")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/shakespeare"))
    return parser.parse_args()


def windows(path: Path, length: int) -> tuple[np.ndarray, int]:
    """Return a text as examples, shape (n, length + 1), and how many characters there are."""
    if not path.exists():
        raise SystemExit(f"there is no {path}; --text must be a file of plain text")
    characters, codes = np.unique(list(path.read_text(encoding="utf-8")), return_inverse=True)
    count = (len(codes) - 1) // length
    if count < 2:
        raise SystemExit(f"{path} must hold more than {2 * length} characters, got {len(codes)}")
    starts = np.arange(count)[:, None] * length
    return codes[starts + np.arange(length + 1)], len(characters)


def main() -> None:
    """Train, show progress, and leave the log and the figure."""
    options = arguments()
    examples, characters = windows(options.text, options.length)
    shape = training.Shape(characters, options.length, options.width, options.heads, options.layers)
    trainer = training.language_trainer(options.backend, shape, options.seed)

    # An example is many characters, whose gradients are averaged: few examples are enough.
    sizes = cabs.BatchSizes.range(4, min(512, len(examples)))
    controller = cabs.Controller(min(16, len(examples)), sizes=sizes)
    sampler = cabs.BatchSampler(len(examples), controller, seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "run.jsonl"

    rate = options.learning_rate
    with (
        cabs.RunLog(path, controller, mode="w") as log,
        tqdm(total=options.steps, unit=" steps") as progress,
    ):
        while progress.n < options.steps:
            for indices in islice(sampler, options.steps - progress.n):
                step = trainer.step(examples[indices], rate)
                decision = controller.update(step.statistics, learning_rate=options.learning_rate)
                # Below 1 only where the rule asks for more than the largest batch.
                rate = options.learning_rate * decision.learning_rate_factor
                log.write(decision, examples=len(indices), accuracy=step.accuracy)
                progress.update()
                progress.set_postfix(
                    loss=f"{decision.observation.loss:.3f}",
                    batch=decision.batch_size,
                    refresh=False,
                )

    run = cabs.read_run(path)
    used = [numbers["examples"] for numbers in run.measurements]
    figure = options.out / "run.png"
    plot_run(run).savefig(figure, dpi=150)
    seen = [decision.observation.loss for decision in run.decisions]
    tenth = max(1, len(seen) // 10)
    print(f"batch sizes from {min(used)} to {max(used)} in {len(used)} steps")
    print(f"loss {np.mean(seen[:tenth]):.3f} at first, {np.mean(seen[-tenth:]):.3f} at last")
    print(f"log {path}, figure {figure}")


if __name__ == "__main__":
    main()
