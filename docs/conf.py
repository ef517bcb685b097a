"""How the documentation is built."""

from functools import partial
from importlib.metadata import version as installed_version

import tensorflow

project = "cabs"
author = "The cabs developers"
copyright = "2026, the cabs developers"
version = release = installed_version("cabs-batch-size")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # the pages are whole without a network
]
html_theme = "furo"
html_title = f"cabs {version}"
nitpicky = True
# Names of NumPy, PyTorch, JAX and the standard library, which have documentation of their own.
nitpick_ignore_regex = [("py:.*", r"(?!cabs).*")]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Examples are compiled without a file, in which AutoGraph would look for their source.
tensorflow.function = partial(tensorflow.function, autograph=False)
# Two replicas on a machine without a GPU, on one page: in a process, two strategies with several
# replicas take the same numbers for their collectives.
devices = [tensorflow.config.LogicalDeviceConfiguration()] * 2
cpu = tensorflow.config.list_physical_devices("CPU")[0]
tensorflow.config.set_logical_device_configuration(cpu, devices)
doctest_global_setup = """
from cabs import *
from cabs.control import *
from cabs.data import *
from cabs.gradients import *
from cabs.runs import *
"""
exclude_patterns = ["_build"]
