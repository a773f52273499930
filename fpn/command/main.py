"""The grammar of the command: which subcommand runs, and how it ends."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from fpn import __version__
from fpn.command import demo, export, features
from fpn.command.errors import CommandError

SUBCOMMANDS = {"demo": demo, "features": features, "export": export}

DESCRIPTION = """\
FPN backbones from the command line.

Without a subcommand, `{prog} [PHOTO]` is `{prog} demo [PHOTO]`."""

EPILOG = """\
examples:
  {prog}
  {prog} street.jpg --model FPN101 --weights DEFAULT
  {prog} features street.jpg --out street
  {prog} export fpn50.onnx --model FPN50 --weights DEFAULT

`{prog} SUBCOMMAND --help` describes a subcommand."""


def main() -> int:
    """Runs the command; its exit status is 0, 2 after a one-line error, 130 when interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal without × and file names that are no text
    prog = program(sys.argv[0])

    def complain(kind: str, message: object) -> None:
        print(f"{prog}: {kind}: {' '.join(str(message).split())}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: complain("warning", message)
            options = parse(prog, sys.argv[1:])
            options.run(options)
            sys.stdout.flush()
    except CommandError as error:
        complain("error", error)
        return 2
    except KeyboardInterrupt:
        complain("error", "interrupted")
        return 130
    except BrokenPipeError:  # `python -m fpn | head -1`; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def program(path: str) -> str:
    """How the user called the command."""
    name = os.path.basename(path)
    return "python -m fpn" if name == "__main__.py" else name


class Parser(argparse.ArgumentParser):
    """argparse, with its errors on one line."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def parse(prog: str, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a subcommand, and in `run` what to call with them."""
    parser = Parser(
        prog=prog,
        description=DESCRIPTION.format(prog=prog),
        epilog=EPILOG.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fpn-roi {__version__}")
    subparsers = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND")
    for name, module in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog="example:\n  " + module.EXAMPLE.format(prog=prog),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    # argparse takes -5,0,9,9 for an option, but no word with a space in it.
    words = [f" {word}" if re.match(r"-[\d.]+,", word) else word for word in arguments]
    if not words or words[0] not in (*SUBCOMMANDS, "-h", "--help", "--version"):
        words = ["demo", *words]
    return parser.parse_args(words)
