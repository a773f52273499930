"""`fpn export`: a backbone as an ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path

from fpn.command.errors import CommandError
from fpn.command.options import add_model_arguments, load_model, megabytes, name_of, output_files, print_report

HELP = "write a backbone as an ONNX file"
EXAMPLE = "{prog} export fpn50.onnx --model FPN50 --weights DEFAULT"
DESCRIPTION = """\
Writes a backbone as one ONNX file, for any batch and any image size.

The input is "images", (N, 3, H, W) in float32. The outputs are "p2", "p3", "p4", "p5", or the
levels there are. A checkpoint (--weights PATH) says itself what model it is, and --model is
not used."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the file to write, e.g. fpn50.onnx")
    add_model_arguments(parser)


def run(options: argparse.Namespace) -> None:
    from fpn.export import export_onnx

    path: Path = options.file
    if not path.name:
        raise CommandError(f"FILE must name a file; got {str(path)!r}")
    model, weights = load_model(options.model, options.weights, options.stride_in_1x1, options.weights_key)
    print(f"model  {name_of(options)}; {weights}", flush=True)
    print_report(model)
    with output_files(path.parent, [path.name]) as (unfinished,):
        try:
            export_onnx(model, unfinished)
        except (ImportError, RuntimeError, ValueError) as error:
            raise CommandError(f"export: {error}") from error
    print(f"wrote {path} ({megabytes(path)})")
