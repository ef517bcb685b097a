"""Trains a small network on images while a rule sets the batch size.

    python examples/digits.py
    python examples/digits.py --rule progress
    python examples/digits.py --backend jax
    python examples/digits.py --backend tensorflow
    python examples/digits.py --backend numpy
    torchrun --nproc-per-node 2 examples/digits.py
    python examples/digits.py --data fashion-mnist --data-dir DIR --epochs 3

Leaves the run log, run.jsonl, and a figure, run.png, in the folder given by --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

import cabs
import training
from cabs.plot import plot_run
from datasets import load

RULES = {"cabs": cabs.CABS(), "progress": cabs.Progress()}


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=training.BACKENDS, default="torch")
    parser.add_argument(
        "--data", choices=("digits", "mnist", "fashion-mnist", "cifar10"), default="digits"
    )
    parser.add_argument("--data-dir", type=Path, help="folder that holds the published files")
    parser.add_argument(
        "--rule",
        choices=RULES,
        default="cabs",
        help="the paper's, or the one for the least time, which measures what a step costs",
    )
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    return parser.parse_args()


def main() -> None:
    """Train, show progress, and leave the log and the figure."""
    options = arguments()
    data = load(options.data, options.data_dir)
    examples, *image_shape = data.train_images.shape
    classes = int(data.train_labels.max()) + 1
    rank, ranks = training.place(options.backend)
    trainer = training.trainer(options.backend, tuple(image_shape), classes, options.seed)

    sizes = cabs.BatchSizes.range(16, min(2048, examples))
    controller = cabs.Controller(16, sizes=sizes, rule=RULES[options.rule])
    watch = cabs.Stopwatch()
    sampler = cabs.BatchSampler(
        examples, controller, seed=options.seed, rank=rank, world_size=ranks
    )
    loader = cabs.data.Loader(
        lambda indices: (data.train_images[indices], data.train_labels[indices]), sampler
    )
    options.out.mkdir(parents=True, exist_ok=True)
    # Each rank decides for itself, and all decide alike.
    path = options.out / (f"run.{rank}.jsonl" if rank else "run.jsonl")

    rate = options.learning_rate
    with (
        cabs.RunLog(path, controller, mode="w") as log,
        tqdm(
            total=options.epochs * examples,
            unit=" examples",
            unit_scale=True,
            disable=rank > 0,
        ) as progress,
    ):
        while loader.epoch < options.epochs:
            for images, labels in loader:
                used = loader.batch.examples
                step = trainer.step(images, labels, rate, training.Whole(used, controller))
                decision = controller.update(
                    step.statistics,
                    learning_rate=options.learning_rate,
                    seconds=watch if options.rule == "progress" else None,
                )
                # Below 1 only where the rule asks for more than the largest batch.
                rate = options.learning_rate * decision.learning_rate_factor
                log.write(decision, examples=used, accuracy=step.accuracy)
                progress.update(used)
                progress.set_postfix(
                    loss=f"{decision.observation.loss:.3f}",
                    accuracy=f"{float(step.accuracy):.3f}",
                    batch=decision.batch_size,
                    refresh=False,
                )

    if rank:
        return
    run = cabs.read_run(path)
    sizes_used = [numbers["examples"] for numbers in run.measurements]
    figure = options.out / "run.png"
    plot_run(run).savefig(figure, dpi=150)
    smallest, largest = min(sizes_used), max(sizes_used)
    together = f" on {ranks} ranks" if ranks > 1 else ""
    print(f"batch sizes from {smallest} to {largest} in {len(sizes_used)} steps{together}")
    if controller.step_cost is not None:
        cost = controller.step_cost
        print(
            f"a step takes {cost.fixed * 1e3:.2f} ms and {cost.per_example * 1e6:.2f} us an "
            f"example: as long as {cost.overhead:.0f} examples more, give or take "
            f"{cost.deviation:.0f}"
        )
    print(f"test accuracy {trainer.accuracy(data.test_images, data.test_labels):.4f}")
    print(f"log {path}, figure {figure}")


if __name__ == "__main__":
    main()
