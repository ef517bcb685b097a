"""Writes what the published algorithm decides, computed by TensorFlow in single precision.

The averages, the rule, the rounding and the clipping are built from TensorFlow 1 operations in the
order in which the authors' code applies them, and fed random variances and losses. Run it with
TensorFlow installed: ``python tests/golden/published_decisions.py``.
"""

import json
from pathlib import Path

import numpy as np
import tensorflow.compat.v1 as tf

STEPS = 300


def main() -> None:
    tf.disable_eager_execution()
    tf.disable_resource_variables()
    variance, loss, rate = (tf.placeholder(tf.float32, []) for _ in range(3))
    smoothing = tf.constant(0.95, tf.float32)
    mean_variance, mean_loss = tf.Variable(0.0), tf.Variable(1.0)
    updates = [
        mean_loss.assign(smoothing * mean_loss + (1.0 - smoothing) * loss),
        mean_variance.assign(smoothing * mean_variance + (1.0 - smoothing) * variance),
    ]
    with tf.control_dependencies(updates):
        raw = rate * tf.divide(mean_variance, mean_loss)
    size = tf.cast(tf.clip_by_value(tf.round(raw), 16.0, 2048.0), tf.int32)

    random = np.random.default_rng(20170628)
    records = []
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for step in range(STEPS):
            scale = 10.0 ** (2.0 + 5.0 * step / STEPS)
            observation = {
                "learning_rate": float(random.choice([0.01, 0.1, 0.3])),
                "variance_trace": float(np.float32(scale * random.lognormal())),
                "loss": float(np.float32(random.lognormal(sigma=0.5))),
            }
            feed = dict(zip((rate, variance, loss), observation.values(), strict=True))
            value, chosen = session.run([raw, size], feed)
            records.append({**observation, "raw": float(value), "batch_size": int(chosen)})
    written = {"tensorflow": tf.__version__, "decisions": records}
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(written, indent=0) + "\n")
    sizes = [record["batch_size"] for record in records]
    print(f"{path.name}: sizes from {min(sizes)} to {max(sizes)}, {len(set(sizes))} different")


if __name__ == "__main__":
    main()
