"""Benchmarks: ratios of things timed side by side in one run. `python -m tests.benchmarks [NAME …]`."""

from __future__ import annotations

import argparse

from tests.benchmarks import (
    cifar,
    crashes,
    dump,
    encodings,
    labels,
    memory,
    objectives,
    reading,
    remote,
    sweep,
    training,
    views,
)

BENCHMARKS = {
    "training": training.run,
    "dump": dump.run,
    "reading": reading.run,
    "remote": remote.run,
    "encodings": encodings.run,
    "memory": memory.run,
    "crashes": crashes.run,
    "views": views.run,
    "objectives": objectives.run,
    "labels": labels.run,
    "cifar": cifar.run,
    "sweep": sweep.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all if none is given")
    parser.add_argument("--rounds", type=int, default=7, help="times that each side is measured, in turn")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    for name in options.names or BENCHMARKS:
        BENCHMARKS[name](rounds=options.rounds, device=options.device)
        print(flush=True)


if __name__ == "__main__":
    main()
