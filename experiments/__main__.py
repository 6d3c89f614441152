"""The companion's commands: ``python -m experiments COMMAND --help``."""

import argparse
import signal
import sys
import threading

import medsec  # noqa: F401  (pins the instruction set before numpy and torch are imported)

# isort: split

import joblib
import yaml

from medsec.core import parallel, paths
from medsec.core.errors import command


def notebook(args: argparse.Namespace) -> int:
    """Run one notebook and put its outputs in place."""
    from experiments import params  # here, as below: a command loads only what it needs
    from medsec.evidence import execute

    parallel.end_with_pipeline()
    p = params.load(args.profile)
    file = paths.NOTEBOOKS / f"{args.notebook.removesuffix('.ipynb').removeprefix('notebooks/')}.ipynb"
    try:
        execute.execute(execute.Job(file, args.cohort, args.profile, paths.out().resolve()), p.cohorts)
    except execute.RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the previous outputs are untouched", file=sys.stderr)
        return 130
    return 0


def finish_cells(args: argparse.Namespace) -> int:
    """Run the cells of all notebooks at once, over all cores: they then only draw."""
    from experiments import params
    from experiments.catalogue import EXPERIMENTS, QUICK
    from medsec import data
    from medsec.evidence import cells

    end_when_told()
    p = params.load(args.profile)
    cohort = data.load(args.cohort, p.cohorts)
    with parallel.locked(paths.cells(args.cohort) / "cells.lock"):
        cells.finish(args.cohort, p, [(EXPERIMENTS[name], plan(p, cohort)) for name, plan in QUICK.items()])
    return 0


def end_when_told() -> None:
    """Ended from outside, take the worker processes along: they would go on writing cells."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def make_record(args: argparse.Namespace) -> int:
    """Make or resume a record."""
    from experiments import params
    from experiments.catalogue import DESIGNS
    from medsec.evidence import record

    end_when_told()
    p, how = params.load(args.profile), DESIGNS[args.notebook]
    options = {"processes": args.processes, "restart": args.restart, "only_plan": args.plan}
    return record.run(how, args.cohort, p, args.profile, **options)


def compare(args: argparse.Namespace) -> int:
    """Compare the tables in the working tree with those of the last commit."""
    from medsec.evidence import check

    return check.run(args.cohort)


def write_ledger(args: argparse.Namespace) -> int:
    """Write all verdicts to results/findings.csv, and their counts into the README."""
    from medsec.evidence import ledger

    ledger.write()
    return 0


def make_panels(args: argparse.Namespace) -> int:
    """Compute every position of the panels that the book shows without a kernel."""
    from experiments import panels, params

    panels.write(args.cohort, params.load(args.profile))
    return 0


def show_params(args: argparse.Namespace) -> int:
    """Check and print the parameters of a profile."""
    from experiments import params

    print(yaml.safe_dump(params.load(args.profile).model_dump(), sort_keys=False), end="")
    return 0


RECORDS = ("01_backdoor_fedgan", "02_feddetect", "03_gia_defense", "04_adversarial_pruning_defense", "05_threat_matrix")


@command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 2 after a mistake that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description="Run and compare the companion's notebooks."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, function, profile: str | None) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        own.set_defaults(function=function)
        if profile:
            own.add_argument("--profile", default=profile, help="parameters to use (default: %(default)s)")
        return own

    run = add("run", notebook, "quick")
    run.add_argument("notebook", help="e.g. 01_backdoor_fedgan")
    run.add_argument("--cohort", required=True, help="e.g. phantom")
    add("cells", finish_cells, "quick").add_argument("--cohort", default="phantom")
    made = add("record", make_record, "full")
    made.add_argument("notebook", choices=RECORDS)
    made.add_argument("--cohort", default="phantom")
    made.add_argument("--plan", action="store_true", help="print the cells and their cost, run nothing")
    made.add_argument(
        "--restart", action="store_true", help="run again what other parameters or another generation made"
    )
    made.add_argument("--processes", type=parallel.count, default=joblib.cpu_count())
    add("check", compare, None).add_argument("--cohort", default="phantom")
    add("ledger", write_ledger, None)
    add("panels", make_panels, "quick").add_argument("--cohort", default="phantom")
    add("params", show_params, "quick")
    args = parser.parse_args(argv)
    return args.function(args)


if __name__ == "__main__":
    sys.exit(main())
