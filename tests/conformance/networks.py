"""Networks written once, over a table of operations, and drawn block by block.

A block takes the operations, hidden states of shape (m, LENGTH, WIDTH) and its parameters, whose
shapes stand beside it.
"""

import numpy as np

LENGTH, WIDTH, WORDS = 5, 4, 7
SQUARE, VECTOR = (WIDTH, WIDTH), (WIDTH,)


def attention(ops, h, p):
    packed = ops.einsum("btd,de->bte", h, p["packed"])
    packed = ops.reshape(packed, (-1, LENGTH, 3, 2, WIDTH // 2))
    q, k, v = (packed[:, :, part] for part in range(3))
    weights = ops.softmax(ops.einsum("bthk,bshk->bhts", q, k))
    mixed = ops.reshape(ops.einsum("bhts,bshk->bthk", weights, v), (-1, LENGTH, WIDTH))
    return h + mixed @ p["out"]


def heads_in_the_batch(ops, h, p):
    split = ops.transpose(ops.reshape(h @ p["m"], (-1, LENGTH, 2, 2)), (0, 2, 1, 3))
    folded = ops.reshape(split, (-1, LENGTH, 2))
    mixed = ops.softmax(folded @ ops.transpose(folded, (0, 2, 1))) @ folded
    back = ops.transpose(ops.reshape(mixed, (-1, 2, LENGTH, 2)), (0, 2, 1, 3))
    return ops.reshape(back, (-1, LENGTH, WIDTH))


def sequence_first(ops, h, p):
    turned = ops.transpose(h, (1, 0, 2))
    rows = ops.reshape(turned, (-1, WIDTH)) @ p["m"]
    return ops.transpose(ops.reshape(rows, (LENGTH, -1, WIDTH)), (1, 0, 2))


def recurrent(ops, h, p):
    state, states = h[:, 0], []
    for step in range(LENGTH):
        state = ops.tanh(h[:, step] @ p["m"] + state @ p["n"] + p["v"])
        states.append(state)
    return ops.stack(states, 1)


def padded(ops, h):
    nothing = 0.0 * h[:, :1]
    return ops.reshape(ops.concatenate([nothing, h, nothing], 1), (-1, LENGTH + 2, 1, WIDTH))


def convolved(groups):
    def block(ops, h, p):
        found = ops.convolve(padded(ops, h), p["kernel"], groups=groups)
        return ops.reshape(found, (-1, LENGTH, WIDTH))

    return block


def weight_normalized(ops, h, p):
    norms = ops.sqrt(ops.total(p["m"] * p["m"], (0,)))
    return h @ (p["m"] / norms * p["v"])


def twice_the_same_matrix(ops, h, p):
    return ops.tanh(h @ p["m"]) @ ops.transpose(p["m"], (1, 0))


def partly_frozen(ops, h, p):
    return ops.tanh(h @ ops.stop_gradient(p["m"])) @ p["n"]


BLOCKS = {
    "matrix": (lambda ops, h, p: ops.tanh(h @ p["m"] + p["v"]), {"m": SQUARE, "v": VECTOR}),
    "twice the same matrix": (twice_the_same_matrix, {"m": SQUARE}),
    "halves of a matrix": (
        lambda _, h, p: (h[..., :2] @ p["m"][:2]) * (h[..., 2:] @ p["m"][2:]),
        {"m": SQUARE},
    ),
    "bias": (lambda _, h, p: h + p["v"], {"v": VECTOR}),
    "scale": (lambda _, h, p: h * p["v"] - p["w"], {"v": VECTOR, "w": VECTOR}),
    "gate": (lambda ops, h, p: h * ops.sigmoid(h @ p["m"]), {"m": SQUARE}),
    "rectified": (lambda ops, h, p: ops.relu(h @ p["m"]), {"m": SQUARE}),
    "places": (lambda _, h, p: h + p["places"][:LENGTH], {"places": (LENGTH + 2, WIDTH)}),
    "layer norm": (
        lambda ops, h, p: ops.layer_norm(h, p["v"], p["w"]),
        {"v": VECTOR, "w": VECTOR},
    ),
    "slopes": (lambda ops, h, p: ops.relu(h) - p["v"] * ops.relu(-h), {"v": VECTOR}),
    "attention": (attention, {"packed": (WIDTH, 3 * WIDTH), "out": SQUARE}),
    "heads in the batch": (heads_in_the_batch, {"m": SQUARE}),
    "sequence first": (sequence_first, {"m": SQUARE}),
    "recurrence": (recurrent, {"m": SQUARE, "n": SQUARE, "v": VECTOR}),
    "convolution": (convolved(1), {"kernel": (3, 1, WIDTH, WIDTH)}),
    "grouped convolution": (convolved(2), {"kernel": (3, 1, WIDTH // 2, WIDTH)}),
    "depthwise convolution": (convolved(WIDTH), {"kernel": (3, 1, 1, WIDTH)}),
    "weight normalization": (weight_normalized, {"m": SQUARE, "v": VECTOR}),
    "partly frozen": (partly_frozen, {"m": SQUARE, "n": SQUARE}),
}


class Network:
    """A table of words, blocks of which some come again, and the table again, or a matrix.

    Args:
        names: Of its blocks, in their order.
        again: Numbers of the blocks that are used again behind them, with the same parameters.
        is_tied: Whether the table of words is also the matrix of the last layer.
    """

    def __init__(self, names, *, again=(), is_tied=True):
        self.names, self.is_tied = names, is_tied
        self.order = [*range(len(names)), *(place % len(names) for place in again)]

    def parameters(self, rng, dtype=np.float64):
        """Draw named parameters."""
        shapes = {"table": (WORDS, WIDTH)} | ({} if self.is_tied else {"out": (WIDTH, WORDS)})
        for index, name in enumerate(self.names):
            shapes |= {f"{index} {key}": shape for key, shape in BLOCKS[name][1].items()}
        drawn = {name: 0.7 * rng.normal(size=shape) for name, shape in shapes.items()}
        return {name: one.astype(dtype) for name, one in drawn.items()}

    def batch(self, rng, examples, dtype=np.float64):
        """Draw examples of LENGTH words, the words to be guessed, and a weight each."""
        words, labels = rng.integers(WORDS, size=(2, examples, LENGTH))
        weights = rng.uniform(0.5, 2.0, size=examples).astype(dtype)
        return {"words": words, "labels": labels, "weights": weights}

    def losses_of(self, ops, parameters, batch):
        """Return a loss for each example, shape (m,)."""
        h = ops.take(parameters["table"], batch["words"])
        for place in self.order:
            block, shapes = BLOCKS[self.names[place]]
            h = h + ops.tanh(block(ops, h, {key: parameters[f"{place} {key}"] for key in shapes}))
        table = parameters["table"]
        scores = h @ (ops.transpose(table, (1, 0)) if self.is_tied else parameters["out"])
        return batch["weights"] * ops.mean(ops.cross_entropy(scores, batch["labels"]), (1,))
