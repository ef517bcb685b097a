"""Keeps what TensorFlow prints while it is loaded off the terminal.

Guarantees: nothing is lost where loading fails. Does nothing for those who have set
``TF_CPP_MIN_LOG_LEVEL`` themselves.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Hold back what is written to the standard error stream, from C++ too."""
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        yield
        return
    # For later messages. Those of loading come before TensorFlow looks at it.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except BaseException:
            held_back.seek(0)
            os.write(terminal, held_back.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
