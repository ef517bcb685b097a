"""What a run leaves behind: its log, written line by line, read again and proved, and its files.

``RunLog`` writes each decision, ``read_run`` decides again from the log alone, the command line
shows both, and ``atomic_write`` keeps a checkpoint from being half a file. Imports ``cabs.control``
and ``cabs.values``; the front door, the command line and ``cabs.plot`` import it.
"""

from cabs.runs.log import RunLog
from cabs.runs.replay import NotDecidedError, Replay, Run, read_run
from cabs.values.atomic import atomic_write

__all__ = ["NotDecidedError", "Replay", "Run", "RunLog", "atomic_write", "read_run"]
