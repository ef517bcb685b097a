"""Several ranks of ``torch.distributed``: whose examples are meant, and where their gradients lie.

Engines that average gradients over ranks are known here alone. Imports the core,
``cabs_torch.errors`` and ``norms``; whatever has statistics of several ranks imports it.
"""
