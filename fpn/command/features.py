"""`fpn features`: the pyramid of a photo, and what is pooled from it, as arrays."""

from __future__ import annotations

import argparse

from fpn.command.options import megabytes, output_files
from fpn.command.photos import ABOUT_FEATURES, ABOUT_RUNS, FEATURES, prepare
from fpn.command.photos import add_arguments as add_arguments

HELP = "write the pyramid of a photo, and the pooled RoIs, as arrays"
EXAMPLE = "{prog} features street.jpg --weights DEFAULT --boxes 40,60,380,420 --out street"
DESCRIPTION = f"""\
Runs a photo through an FPN backbone and pools boxes from its pyramid by RoI max pooling.

Writes to DIR
{ABOUT_FEATURES}

{ABOUT_RUNS}"""


def run(options: argparse.Namespace) -> None:
    job = prepare(options)
    with output_files(options.out, (FEATURES,)) as (features,):
        job.run().save(features)
    print(f"wrote {options.out / FEATURES} ({megabytes(options.out / FEATURES)})")
