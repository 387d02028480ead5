"""The command line: `afd-ray`. Nothing heavy is imported before a command runs, so that help is instant."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

from actors.commands import (
    checkpoint,
    decisions,
    demo,
    doctor,
    drain,
    generate,
    keys,
    plan,
    profile,
    scale,
    serve,
    simulate,
    status,
    trace,
)

COMMANDS = (serve, status, scale, drain, decisions, generate, trace, plan, simulate, profile, doctor, checkpoint, keys, demo)
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; each command sets `run`."""
    parser = Parser(prog="afd-ray", description="Serve mixture-of-experts models with attention and FFN apart, on Ray.")
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. 0: done; 1: it failed; 2: it was asked for what cannot be."""
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for policies by `module:function`; Ray's workers look there too
    try:
        args = parser.parse_args([word for word in words if word != "--debug"])
        if args.version:
            print(f"afd-ray {_version()}")
            return 0
        if not hasattr(args, "run"):
            parser.print_help(sys.stderr)
            return 2
        return int(args.run(args))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (a pager, `head`): nothing more can be said, and flushing at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"afd-ray: {describe(error)}", file=sys.stderr)
        return exit_code(error)


def _version() -> str:
    try:
        return metadata.version("afd-ray")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def exit_code(error: Exception) -> int:
    """2: a bad key, value or path; 1: everything that failed on the way (a broken checkpoint, a port, resources, time)."""
    return 2 if isinstance(error, ValueError | FileNotFoundError | NotADirectoryError) else 1


def describe(error: Exception) -> str:
    """One line; an error that nobody foresaw says its type and how to see more."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | RuntimeError | OSError) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
