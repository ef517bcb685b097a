"""The log of a run: written line by line, read again, and proved.

``RunLog`` writes each decision, ``read_run`` decides again from the log alone, and the command line
shows both. Imports ``cabs.control`` and ``cabs.values``; nothing but the command line imports it.
"""

from cabs.runs.log import RunLog
from cabs.runs.replay import NotDecidedError, Replay, Run, read_run

__all__ = ["NotDecidedError", "Replay", "Run", "RunLog", "read_run"]
