"""Networks of notebook 04 that its quick run attacks and need not train: ``python -m medsec.checkpoints --cohort phantom``.

A record leaves the two that it has to train anyway (`evasion_arms.EXPENSIVE`). This leaves the others of the quick run as
well, which would otherwise spend half of its time on their training. They are the networks that it would have trained itself.
"""

import argparse
import sys

import torch

from medsec import evasion_arms, params, paths
from medsec.errors import command
from medsec.parallel import run_cells
from medsec.params import Params

VARIANTS = tuple(variant for variant in evasion_arms.QUICK if variant not in evasion_arms.EXPENSIVE)


def leave(cohort: str, params: Params, seed: int) -> list[str]:
    """Train and write what is missing of one seed; returns the paths below the repository, those written."""
    torch.set_num_threads(1)
    setup, written = evasion_arms.prepare(cohort, params), []
    for variant in VARIANTS:
        if evasion_arms.load(setup, variant, seed) is None:
            file = evasion_arms.save(evasion_arms.train(setup, variant, seed), setup, variant, seed)
            written.append(str(file.relative_to(paths.ROOT)))
    return written


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m medsec.checkpoints", description=__doc__.splitlines()[0])
    parser.add_argument("--cohort", required=True, help="e.g. phantom")
    args = parser.parse_args(argv)
    p = params.load("quick")
    evasion_arms.prepare(args.cohort, p)  # a wrong cohort is named before any training
    for files in run_cells(leave, [(args.cohort, p, seed) for seed in p.seeds.evaluation]):
        print("\n".join(files) or "nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
