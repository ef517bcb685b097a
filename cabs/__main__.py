"""The command line: what is in a run log, whether it is what was decided, and its picture.

Guarantees: the exit status is 0 where all went well, 1 where a log says something else than what
follows from it, and 2 where there is nothing to be read or written; an error is one line.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cabs.plot import plot_run
from cabs.runs.replay import NotDecidedError, Replay, read_run
from cabs.runs.summary import Summary

_PROGRAM = "python -m cabs"
# The status of a program that the end of its pipe has ended.
_CLOSED_PIPE = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; ``SystemExit`` for arguments that are none."""
    given = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path or a name need not be what the terminal can show.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        for module in given.modules:
            importlib.import_module(module)
        status: int = given.command(given)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except OSError as error:
        name = given.log if error.filename is None else os.fsdecode(error.filename)
        return _fail(f"{name}: {error.strerror or error}")
    except NotDecidedError as error:
        _fail(str(error))
        return 1
    except (ModuleNotFoundError, ValueError) as error:
        return _fail(str(error))
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_PROGRAM, description="Read the log of a run.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, purpose in (
        ("replay", _replay, "make every decision again, and say whether they are the same"),
        ("show", _show, "print a summary"),
        ("plot", _plot, "draw the loss and the batch size"),
    ):
        of_command = commands.add_parser(name, help=purpose, description=f"{purpose.capitalize()}.")
        of_command.set_defaults(command=command)
        of_command.add_argument("log", type=Path, metavar="RUN.jsonl", help="the log of a run")
        of_command.add_argument(
            *("--import", "-i"),
            dest="modules",
            action="append",
            default=[],
            metavar="MODULE",
            help="imported first, since it registers the rule of the run",
        )
        if name == "plot":
            of_command.add_argument(
                "-o",
                "--output",
                type=Path,
                metavar="FIG.png",
                help="the picture; otherwise beside the log, with the ending .png",
            )
    return parser


def _replay(given: argparse.Namespace) -> int:
    with Replay(given.log) as replay:
        try:
            for _ in replay:
                pass
        except NotDecidedError as error:
            _print(_report(error, replay.lines - 1))
            return 1
    first, after = replay.start.step, replay.state.step
    steps = f" (steps {first} to {after - 1})" if after > first else ""
    _print(f"{given.log}: decisions made again and the same: {after - first}{steps}")
    if replay.cut_off:
        _print("the last line was cut off, and is left out")
    return 0


def _report(error: NotDecidedError, same: int) -> str:
    """Return in words what a line says, and what follows."""
    where = f"{error.path}, line {error.line}"
    if error.damage:
        found = f"{where}, where the decision of step {error.step} belongs: {error.damage}"
    else:
        width = max(map(len, error.differences))
        rows = (
            f"  {name:<{width}}  logged {says}, recomputed {follows}"
            for name, (says, follows) in error.differences.items()
        )
        found = "\n".join([f"{where}: the decision of step {error.step} is another", *rows])
    return f"{found}\ndecisions before it made again and the same: {same}"


def _show(given: argparse.Namespace) -> int:
    with Replay(given.log) as replay:
        _print(str(Summary(replay)))
    return 0


def _plot(given: argparse.Namespace) -> int:
    output = given.log.with_suffix(".png") if given.output is None else given.output
    if output.exists() and output.samefile(given.log):
        raise ValueError(f"{output} is the log itself; name another file for the picture with -o")
    plot_run(read_run(given.log)).savefig(output)
    _print(f"{output} was drawn")
    return 0


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _fail(message: str) -> int:
    sys.stderr.write(f"{_PROGRAM}: error: {message}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
