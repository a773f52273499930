"""One script with every RoI operator, run as it stands with torchvision's and, its import line swapped, with ours.

    python benchmarks/swapped_import.py
    python benchmarks/swapped_import.py --rois 64 --channels 32 --runs 3

The outputs and the gradients of the two runs are compared before anything is timed; a difference ends the run.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from statistics import median

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder comes first otherwise

import torch

from benchmarks import arguments
from benchmarks.harness import describe, environment, interleaved, ratio, table, write_json
from tests.reference.swapped_import import Calls, both, compare, inputs


@torch.no_grad()
def forward(calls: Calls, names: list[str]) -> None:
    for name in names:
        calls[name]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rois", type=arguments.count, default=512, help="of each of the two images")
    parser.add_argument("--channels", type=arguments.count, default=256)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--runs", type=arguments.count, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    device = torch.device("cpu")
    print(describe(environment(device)))
    given = inputs(options.rois, options.channels, *options.size)
    print(f"{compare(given)} outputs and gradients of the two imports compared: equal up to rounding\n")

    theirs, ours = both(given)
    rows = []
    for name in (*theirs, "the script"):
        names = [name] if name in theirs else list(theirs)
        contestants = {"ours": partial(forward, ours, names), "torchvision": partial(forward, theirs, names)}
        times = interleaved(contestants, device, options.runs)
        medians = {f"{contestant} ms": median(rounds) for contestant, rounds in times.items()}
        rows.append({"operator": name, **medians, "torchvision / ours": ratio(times, "torchvision", "ours")})
    print(table(rows))
    if options.json:
        write_json(options.json, environment(device), rows)


if __name__ == "__main__":
    main()
