"""``model.fit`` with a batch size that follows the variance of the gradient.

The training step, its losses and masks, and an epoch loop of its own. Imports the tape and the
statistics of ``cabs_tensorflow``; nothing but the front door imports it.
"""
