"""Trains a small Keras network on digits with model.fit, while CABS sets the batch size.

    python examples/keras_fit.py

Leaves the run log, run.jsonl, and a figure, run.png, in the folder given by --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cabs
import quiet
from cabs.plot import plot_run
from datasets import load

with quiet.loading():
    import keras

    import cabs_tensorflow


def arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/keras"))
    return parser.parse_args()


def network() -> keras.Model:
    """Return two convolutions and a matrix."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


def main() -> None:
    """Train, and leave the log and the figure."""
    options = arguments()
    keras.utils.set_random_seed(options.seed)
    train_images, train_labels, test_images, test_labels = load("digits", None)
    # Keras has the channels last.
    train, test = train_images.transpose(0, 2, 3, 1), test_images.transpose(0, 2, 3, 1)

    sizes = cabs.BatchSizes.range(16, len(train))
    controller = cabs.Controller(16, sizes=sizes)
    batches = cabs_tensorflow.dataset(controller, (train, train_labels), seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "run.jsonl"

    with cabs.RunLog(path, controller, mode="w") as log:
        model = cabs_tensorflow.adaptive(network(), controller, log=log)
        model.compile(
            optimizer=keras.optimizers.SGD(options.learning_rate),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        model.fit(batches, epochs=options.epochs, validation_data=(test, test_labels))

    run = cabs.read_run(path)
    used = [numbers["examples"] for numbers in run.measurements]
    figure = options.out / "run.png"
    plot_run(run).savefig(figure, dpi=150)
    accuracy = model.evaluate(test, test_labels, verbose=0, return_dict=True)["accuracy"]
    print(f"batch sizes from {min(used)} to {max(used)} in {len(used)} steps")
    print(f"test accuracy {accuracy:.4f}")
    print(f"log {path}, figure {figure}")


if __name__ == "__main__":
    main()
