"""Reads image data sets from the files in which they are published.

Guarantees: nothing is downloaded; images are float32 of shape (n, channels, height, width), with
mean 0 and deviation 1 over the training set, and labels int64 of shape (n,).
"""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


class Dataset(NamedTuple):
    """Images and labels to learn from and to be tested on."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels


def load(name: str, data_dir: Path | None) -> Dataset:
    """Return a data set by name; all but digits are read from ``data_dir``."""
    if name == "digits":
        return _standardized(*_digits())
    if data_dir is None:
        raise SystemExit(f"--data {name} needs --data-dir, the folder that holds its files")
    if name == "cifar10":
        batches = [_records(data_dir / f"data_batch_{number}.bin.xz") for number in range(1, 6)]
        images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        return _standardized(images, labels, *_records(data_dir / "test_batch.bin.xz"))
    return _standardized(
        _idx(data_dir / "train-images-idx3-ubyte.gz")[:, None],
        _idx(data_dir / "train-labels-idx1-ubyte.gz"),
        _idx(data_dir / "t10k-images-idx3-ubyte.gz")[:, None],
        _idx(data_dir / "t10k-labels-idx1-ubyte.gz"),
    )


def _digits() -> tuple[npt.NDArray[np.float64], Labels, npt.NDArray[np.float64], Labels]:
    """Return scikit-learn's bundled 1,797 digits of 8 x 8 pixels, a fifth of them for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    return train.reshape(-1, 1, 8, 8), train_labels, test.reshape(-1, 1, 8, 8), test_labels


def _idx(path: Path) -> npt.NDArray[np.uint8]:
    """Return the array of an idx file: a magic number whose last byte is the rank, sizes, bytes."""
    content = _read(path)
    rank = content[3]
    shape = np.frombuffer(content, ">u4", count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _records(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return images and labels of a CIFAR-10 file: records of a label and 3 x 32 x 32 bytes."""
    records = np.frombuffer(_read(path), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _read(path: Path) -> bytes:
    if not path.exists():
        raise SystemExit(f"there is no {path}; --data-dir must hold the published files")
    with lzma.open(path) if path.suffix == ".xz" else gzip.open(path) as file:
        return file.read()


def _standardized(
    train: npt.NDArray[np.generic],
    train_labels: npt.NDArray[np.generic],
    test: npt.NDArray[np.generic],
    test_labels: npt.NDArray[np.generic],
) -> Dataset:
    images, test_images = train.astype(np.float32), test.astype(np.float32)
    # Over a sample: float64 copies of everything would need gigabytes.
    mean, deviation = images[:5000].mean(dtype=np.float64), images[:5000].std(dtype=np.float64)
    for array in (images, test_images):
        array -= np.float32(mean)
        array /= np.float32(deviation)
    labels = (train_labels.astype(np.int64), test_labels.astype(np.int64))
    return Dataset(images, labels[0], test_images, labels[1])
