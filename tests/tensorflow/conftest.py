"""TensorFlow is quiet while it is imported, has four devices, and draws the same numbers."""

import os

# Read when the libraries are loaded.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import pytest
import tensorflow as tf

# Before anything is computed, after which it is too late: each replica has a device.
(PROCESSOR,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(PROCESSOR, [tf.config.LogicalDeviceConfiguration()] * 4)


def pytest_configure(config):
    # Keras saves variables by a conversion that NumPy 2 frowns upon.
    ignored = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    config.addinivalue_line("filterwarnings", ignored)


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def mirrored():
    """Two replicas. Collectives of a second such strategy would meet those of the first."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
