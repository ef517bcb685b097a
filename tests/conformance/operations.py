"""The operations that networks of the suite are written in, in NumPy.

A framework's table holds functions of the same names. These also take complex numbers, and are
analytic in them: an imaginary part that is infinitely small comes out multiplied by the derivative,
exact to rounding and without a line of differentiation.
"""

import numpy as np

einsum = np.einsum
tanh = np.tanh
sin = np.sin
sqrt = np.sqrt
exp = np.exp
reshape = np.reshape
transpose = np.transpose
stop_gradient = np.real


def stack(arrays, axis):
    return np.stack(arrays, axis)


def concatenate(arrays, axis):
    return np.concatenate(arrays, axis)


def mean(x, axes, keepdims=False):
    return np.mean(x, axis=tuple(axes), keepdims=keepdims)


def total(x, axes, keepdims=False):
    return np.sum(x, axis=tuple(axes), keepdims=keepdims)


def relu(x):
    return np.where(np.real(x) > 0, x, 0.0)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def log_softmax(x):
    x = x - np.max(np.real(x), axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def softmax(x):
    return np.exp(log_softmax(x))


def cross_entropy(scores, labels):
    """Return the losses of scores [..., classes] and labels [...]."""
    return -np.take_along_axis(log_softmax(scores), labels[..., None], axis=-1)[..., 0]


def take(table, numbers):
    """Return the rows of a table [rows, width] with these numbers [...]."""
    return table[numbers]


def convolve(x, kernel, *, stride=1, groups=1):
    """Convolve x [m, H, W, C] with a kernel [h, w, C / groups, D], without padding."""
    height, width, shared, features = kernel.shape
    windows = np.lib.stride_tricks.sliding_window_view(x, (height, width), axis=(1, 2))
    windows = windows[:, ::stride, ::stride]
    windows = windows.reshape(*windows.shape[:3], groups, shared, height, width)
    kernel = kernel.reshape(height, width, shared, groups, features // groups)
    found = np.einsum("myxgchw,hwcgd->myxgd", windows, kernel)
    return found.reshape(*found.shape[:3], features)


def layer_norm(x, scale, offset):
    x = x - np.mean(x, axis=-1, keepdims=True)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 0.1) * scale + offset
