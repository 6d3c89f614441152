"""The command ``medsec`` (or ``python -m medsec``): test something of your own, run a notebook on images of your own."""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

from medsec.core.errors import InputError, command

# Everything slow to import is imported where it is used: `medsec --help` answers at once.

LARGEST = 224  # pixels a side that images are read at, unless --size says so
MOST_BYTES = 2**32  # of the arrays of an .npz, unpacked
FORMATS = {".html": "to_html", ".md": "to_markdown", ".csv": "to_csv"}
EPILOG = """examples:
  medsec describe my-images
  medsec run 04 --data my-images
  medsec audit model.pt2 --data my-images --eps 4/255 --out report.html
  medsec judge server my_rule.py:rule --out server.html
  medsec judge attack my_attack.py:attack --against model.pt2 --data my-images
  medsec judge gradient my_defence.py:defend
`medsec COMMAND --help` says more.

exit status:
  0    done, whatever the verdict is
  1    of `run`: the notebook failed, and nothing of it was put in place; else an error of ours, please report it
  2    a mistake that you can mend, told in one line
  130  ended with Ctrl-C (143: ended from outside)"""
FORMS = "a torch.export file (.pt2), a TorchScript file, or my_model.py:make"


@command
def main(argv: list[str] | None = None) -> int:
    """Returns the exit status, as `EPILOG` says."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        _tell("\ninterrupted: no report was written")
        return 130


def _parser() -> argparse.ArgumentParser:
    about = "Test something of your own. All of it runs here: nothing leaves this machine."
    how = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EPILOG}
    parser = argparse.ArgumentParser(prog="medsec", description=about, **how)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    audit = commands.add_parser("audit", help="attack a classifier with adversarial examples")
    audit.add_argument("model", help=f"{FORMS}, a function that returns the model")
    audit.set_defaults(run=_audit)
    judge = commands.add_parser("judge", help="test a defence or an attack").add_subparsers(
        required=True, metavar="WHAT"
    )
    server = judge.add_parser("server", help="a server's rule, against backdoors in a federated GAN")
    server.add_argument("rule", help="my_rule.py:rule, a function of (updates, round) or a class of such objects")
    server.set_defaults(run=_server)
    attack = judge.add_parser("attack", help="an attack on classifiers, beside noise, FGSM, PGD and a search")
    attack.add_argument("attack", help="my_attack.py:attack, a function of (model, x, y, eps, generator)")
    attack.add_argument(
        "--against", required=True, action="append", metavar="MODEL", help="as of audit; may be repeated"
    )
    attack.set_defaults(run=_attack)
    gradient = judge.add_parser("gradient", help="a defence of gradients, against reconstruction and identification")
    gradient.add_argument("defence", help="my_defence.py:defend, a function of (model, x, y, round) or a class")
    gradient.set_defaults(run=_gradient)
    for each in (audit, attack):
        _add_attacked(each)
    for each in (audit, server, attack, gradient):
        each.add_argument("--seed", type=int, default=0, help="of all random choices (default: 0)")
        each.add_argument("--out", type=Path, help="report.html, .md or .csv (default: Markdown on the screen)")
    _add_own_images(commands)
    return parser


def _add_attacked(each: argparse.ArgumentParser) -> None:
    """What is attacked, and how much."""
    each.add_argument(
        "--data", required=True, type=Path, help="folder of class folders, or .npz with images and labels"
    )
    each.add_argument("--eps", default="4/255", help="largest change, in units of an image in [0, 1] (default: 4/255)")
    each.add_argument("--norm", default="Linf", choices=("Linf", "L2"))
    each.add_argument("--size", type=int, help="folder: pixels a side (default: those of the first image, at most 224)")
    each.add_argument(
        "--channels", type=int, choices=(1, 3), help="folder: grey or colour (default: as the first image)"
    )
    each.add_argument("--attacked", type=int, default=100, help="most images that are attacked (default: 100)")
    each.add_argument("--examples", type=Path, help="write a CSV with a row an image here")


# The commands ----------------------------------------------------------------------------------------------------------


def _audit(args: argparse.Namespace) -> int:
    files, how = _asked(args)
    images, labels, said = _images(args.data, args.size, args.channels)
    model = _model(args.model)
    _tell(f"{len(images)} images of shape {images.shape[1:]}; {said}")

    from medsec.judge.classifier import audit

    report = audit(model, images, labels, name=Path(args.model).name, **how)
    report = dataclasses.replace(report, remarks=[*report.remarks, f"Images: {said}."])
    return _give(report, *files)


def _asked(args: argparse.Namespace) -> tuple[list[Path | None], dict]:
    """Where report and examples go, and what an attack is told; looked at before anything is read."""
    files = [_free(args.out, FORMATS), _free(args.examples, [".csv"])]
    how = {"norm": args.norm, "attacked": args.attacked, "seed": args.seed, "progress": True}
    return files, how | {"eps": _number(args.eps)}


def _server(args: argparse.Namespace) -> int:
    file = _free(args.out, FORMATS)
    rule = _from_python(args.rule)

    from medsec.judge.server import judge_server_rule

    return _give(judge_server_rule(rule, name=Path(args.rule).name, seeds=(args.seed,), progress=True), file)


def _attack(args: argparse.Namespace) -> int:
    files, how = _asked(args)
    own = _from_python(args.attack)
    images, labels, said = _images(args.data, args.size, args.channels)
    models = {Path(text).name: _model(text) for text in args.against}
    if len(models) < len(args.against):
        raise InputError("--against names two models alike; rename one of the files")
    _tell(f"{len(images)} images of shape {images.shape[1:]}; {said}")

    from medsec.judge.attack import judge_attack

    against = models if len(models) > 1 else next(iter(models.values()))
    return _give(judge_attack(own, against, images, labels, name=Path(args.attack).name, **how), *files)


def _gradient(args: argparse.Namespace) -> int:
    file = _free(args.out, FORMATS)
    defence = _from_python(args.defence)

    from medsec.judge.gradients import judge_gradient_defence

    return _give(judge_gradient_defence(defence, name=Path(args.defence).name, seed=args.seed, progress=True), file)


# What is read ----------------------------------------------------------------------------------------------------------


def _number(text: str) -> float:
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        raise InputError(f"--eps {text}: no number; write it like 4/255 or 0.0157") from None


def _images(place: Path, size: int | None, channels: int | None):
    """Images (n, C, H, W) float32 in [0, 1], labels (n,), and a sentence on what was done to them."""
    import numpy as np

    if place.is_dir():
        return _from_folder(place, size, channels)
    if not place.is_file():
        raise InputError(
            f"--data {place} does not exist; give a folder of class folders, or an .npz with images and labels"
        )
    if size or channels:
        raise InputError("--size and --channels are for a folder; the arrays of a file are used as they are")
    try:
        if (unpacked := sum(part.file_size for part in zipfile.ZipFile(place).infolist())) > MOST_BYTES:
            raise InputError(
                f"{place.name} unpacks to {unpacked >> 20} MiB, more than {MOST_BYTES >> 20}; give fewer images"
            )
        with np.load(place, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (KeyError, IndexError, TypeError):
        raise InputError(f"{place.name} needs two arrays, images (n, C, H, W) in [0, 1] and labels (n,)") from None
    except InputError:
        raise
    except (ValueError, OSError, zipfile.BadZipFile, EOFError):
        raise InputError(f"{place.name} is no .npz file of plain arrays; save it with numpy.savez") from None
    return images, labels, "as they are in the file"


def _from_folder(root: Path, size: int | None, channels: int | None):
    import numpy as np

    from medsec.data import folder, images

    files, skipped = folder.find(root)
    files = [file for file in files if "/" in file]
    classes = sorted({file.split("/")[0] for file in files})
    if len(classes) < 2:
        raise InputError(
            f"{root.name} has {len(classes)} class folders with images; lay them out as {root.name}/<class>/<file>"
        )
    first = images.read(root / files[0], 28, files[0])
    size, channels = size or min(*first.shape, LARGEST), channels or len(first.pixels)
    if not 1 <= size <= 1024:
        raise InputError(f"--size {size}: must be 1 to 1024 pixels")
    pictures = [images.read(root / file, size, f"{root.name}/{file}") for file in files]
    report = list(skipped)
    read = folder._alike(pictures, files, channels, report)  # the same grey levels as in a cohort
    notes = Counter(note for picture in pictures for note in picture.notes)
    report += [f"{count} images: {note}" for note, count in sorted(notes.items())]
    said = [f"classes by number: {', '.join(f'{k} {name}' for k, name in enumerate(classes))}", *report]
    labels = np.array([classes.index(file.split("/")[0]) for file in files])
    return read.astype(np.float32) / np.float32(255), labels, "; ".join(said)


def _model(text: str):
    """A model from a file, or from Python code. (Crafted files of PyTorch's own formats can run code too: SECURITY.md.)"""
    if ".py:" in text:
        make = _from_python(text)
        try:
            return make()
        except Exception as error:  # whatever their code raises
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            raise InputError(
                f"{text} must be a function that takes nothing and returns the model; it raised {why}"
            ) from error
    file = Path(text)
    if not file.is_file():
        raise InputError(f"model {text} does not exist; give {FORMS}")
    if file.suffix == ".py":
        raise InputError(f"{text}: name the function that returns the model, too, like {text}:make")

    import torch

    if file.suffix == ".pt2":
        program = _opened(file, lambda: torch.export.load(file).module())
        return lambda x: program(x)  # (as a module it calls itself in training mode, and refuses to leave it)
    names = zipfile.ZipFile(file).namelist() if zipfile.is_zipfile(file) else []
    if not any("/code/" in name for name in names):
        kind = (
            "holds weights only, no network"
            if file.suffix == ".safetensors"
            else "is a pickle, which runs whatever is in it"
        )
        raise InputError(f"{file.name} {kind}; give {FORMS}")
    return _opened(file, lambda: torch.jit.load(file, map_location="cpu").eval())


def _opened(file: Path, load):
    try:
        return load()
    except Exception as error:  # of a damaged file the loaders raise many kinds
        why = (str(error).splitlines() or [""])[0][:160]
        raise InputError(f"{file.name} cannot be opened ({type(error).__name__}: {why}); save the model anew") from None


def _from_python(text: str):
    """The object that ``file.py:name`` names. The file is run."""
    path, _, name = text.rpartition(":")
    file = Path(path)
    if file.suffix != ".py" or not name.isidentifier():
        raise InputError(f"{text}: write it as file.py:name, like my_rule.py:rule")
    if not file.is_file():
        raise InputError(f"{path} does not exist; give the path of your Python file")
    spec = importlib.util.spec_from_file_location(f"own_{file.stem}", file)  # (a file torch.py must not become torch)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look there
    sys.path.append(str(file.parent.resolve()))  # for what stands beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever their code raises
        raise InputError(f"{path} cannot be run ({type(error).__name__}: {error}); mend it") from error
    if not callable(found := getattr(module, name, None)):
        what = (
            "nothing of that name"
            if found is None
            else f"a {type(found).__name__} of that name, which cannot be called"
        )
        raise InputError(f"{path} has {what} ({name}); name a function or a class of it")
    return found


# Images of your own, and notebooks on them -----------------------------------------------------------------------------

OPTIONS = {"patient_pattern": "--patients", "table": "--patients", "size": "--size", "channels": "--channels"}
LAYOUT = "folder of class folders, or .npz in MedMNIST's layout"
SETTINGS = "mine.yaml"  # what a run was told, in its output folder
EVERY = 30  # seconds between two lines of progress


def _add_own_images(commands) -> None:
    describe = commands.add_parser("describe", help="what is in a folder of images, and what may give the class away")
    describe.set_defaults(run=_describe)
    describe.add_argument("data", type=Path, help=LAYOUT)
    run = commands.add_parser("run", help="run a notebook on a folder of images")
    run.set_defaults(run=_run)
    run.add_argument("notebook", help="like 01 or 01_backdoor_fedgan")
    run.add_argument("--data", required=True, type=Path, help=LAYOUT)
    run.add_argument("--out", type=Path, help="new folder for all that is made (default: my-images-medsec-01, say)")
    whose = "whose image it is: the group of it, found in the file's name (default: what stands before the first _), or a table"
    for each in (describe, run):
        each.add_argument("--patients", metavar="REGEX|CSV", help=whose)
        each.add_argument("--size", type=int, help="pixels a side, 28 to 224, a multiple of 4 (default: 28)")
        each.add_argument("--channels", type=int, choices=(1, 3), help="grey or colour (default: as the files are)")
        each.add_argument("--profile", default="quick", help="parameters to use (default: quick)")


def _describe(args: argparse.Namespace) -> int:
    print(_first_look(_loaded(*_own(args), args.profile)), end="")
    return 0


def _run(args: argparse.Namespace) -> int:
    import yaml

    from medsec.core import files, params, paths

    known = sorted(file.stem for file in paths.NOTEBOOKS.glob("0*.ipynb"))  # 99 judges this repository's cohorts only
    asked = Path(args.notebook).name.removesuffix(".ipynb")
    if not (notebook := next((name for name in known if asked in (name, name[:2])), "")):
        raise InputError(f"notebook {args.notebook}: choose one of {', '.join(known)}")
    name, change = _own(args)
    cohort = _loaded(name, change, args.profile)

    from medsec.judge import own

    base = {} if args.profile == "quick" else params.read(args.profile)[0]
    usual = params.read()[0]
    less = {  # a profile that sets a section has its way
        name: fewer for name, fewer in own.smaller(notebook, cohort).items() if base.get(name, {}) in ({}, usual[name])
    }
    whole = params.merge(params.merge(base, less), {"cohorts": change})
    settings = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
    out = _output(args, f"{args.data.absolute().stem}-medsec-{notebook[:2]}", settings)
    report = _first_look(cohort)
    for file, text in ((SETTINGS, settings), ("first-look.md", report)):
        files.write(out / file, text)
    print(report, flush=True)
    _tell(f"{notebook} runs; what is made goes to {out}")
    if less:
        _tell_time(cohort, out / SETTINGS)
    command = [sys.executable, "-m", "experiments", "run", notebook, "--cohort", name, "--profile", out / SETTINGS]
    found = os.pathsep.join(filter(None, (str(paths.ROOT), os.environ.get("PYTHONPATH"))))
    plan = out / "cells" / "plan.json"
    places = {"MEDSEC_OUT": out, "MEDSEC_CELLS": out / "cells", "MEDSEC_PLAN": plan, "PYTHONPATH": found}
    environment = os.environ | {name: str(place) for name, place in places.items()}
    if not (code := _follow(list(map(str, command)), environment, plan)):
        _tell(f"the notebook is in {paths.executed(name, out)}, tables and figures in {paths.results(name, out)}")
        _summarise(notebook, name, out)
    return code


def _tell_time(cohort, settings: Path) -> None:
    """How long notebook 04 will take, and what of it is smaller than on the cohorts of this repository."""
    from medsec.core import params
    from medsec.core.settings import Recipe
    from medsec.judge import own

    (tree, file), usual = params.read(str(settings)), params.read()[0]
    evasion, cores = (
        tree["evasion"],
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    )
    fewer, most = ([str(each) for each in own.epochs(found).values()] for found in (tree, usual))
    recipe = params.validated(Recipe, evasion["clean"], f"{file}, evasion.clean")
    busy = own.seconds(cohort, tree, recipe, len(tree["seeds"]["evaluation"])) / 60
    _tell(
        f"it trains its networks first, since none lies ready for these images: about {busy:.0f} minutes of one processor, "
        f"{busy / min(cores, 6):.0f} on the {cores} here. To keep it so short, {evasion['test_images']} images are attacked, and "
        f"training has {', '.join(fewer[:-1])} and {fewer[-1]} epochs (the repository's own cohorts: "
        f"{usual['evasion']['test_images']}; {', '.join(most[:-1])} and {most[-1]}). "
        "A --profile may set evasion and at_ramp otherwise"
    )


def _summarise(notebook: str, cohort: str, out: Path) -> None:
    """Write the page of verdicts, and print what it says."""
    from medsec.core import files, paths
    from medsec.evidence import tables
    from medsec.judge import own

    table = paths.results(cohort, out) / f"{notebook}.csv"
    report = own.summary(notebook, tables.read(table), cohort) if table.is_file() else None
    if report is None:  # 00 makes no claim
        return
    for ending, form in FORMATS.items():
        files.write(out / f"verdicts{ending}", getattr(report, form)())
    print(report.verdict)
    _tell(f"the verdicts, on one page: {out / 'verdicts.html'} (also .md, .csv)")


def _own(args: argparse.Namespace) -> tuple[str, dict]:
    """The cohort's name, and what differs from the parameters' section cohorts."""
    place, whose = args.data.absolute(), args.patients
    if place.is_file() and place.suffix == ".npz":
        if whose or args.size or args.channels:
            raise InputError("--patients, --size and --channels are for a folder; a file's arrays are used as they are")
        return "npz", {"npz": {"path": str(place)}}
    if not place.is_dir():
        raise InputError(f"{args.data} is no folder; give a folder of class folders, or an .npz in MedMNIST's layout")
    given = {"path": str(place)} | {key: getattr(args, key) for key in ("size", "channels") if getattr(args, key)}
    if whose and whose.lower().endswith(".csv"):
        if not Path(whose).is_file():
            raise InputError(f"--patients {whose} does not exist; give a table with the columns file and patient")
        given["table"] = str(Path(whose).absolute())
    elif whose:
        given |= {"patient_pattern": whose, "table": None}
    return "folder", {"folder": given}


def _output(args: argparse.Namespace, name: str, settings: str) -> Path:
    """The folder of a run: outside the repository, and empty unless the same run was begun in it."""
    from medsec.core import files, paths

    beside = paths.ROOT.parent if Path.cwd().is_relative_to(paths.ROOT) else Path.cwd()
    out = (args.out or beside / name).absolute()
    for place, what in ((paths.ROOT, "the repository"), (args.data, "your images")):
        if out.resolve().is_relative_to(place.resolve()):
            raise InputError(f"{out} is inside the folder of {what}; name another with --out")
    used, before = out.is_file() or (out.exists() and any(out.iterdir())), out / SETTINGS
    if used and not (before.is_file() and files.read_text(before) == settings):
        raise InputError(f"{out} holds something else than this run; name another with --out, or delete it")
    return out


def _loaded(name: str, change: dict, profile: str):
    """The cohort of images of one's own; what is wrong with it is told by the command's options."""
    from medsec import data
    from medsec.core import params
    from medsec.core.settings import Cohorts

    tree, file = params.read(profile)
    try:
        both = params.merge(tree.get("cohorts") or {}, change)
        return data.load(name, params.validated(Cohorts, both, f"{file} with your options, section cohorts"))
    except InputError as error:
        said = re.sub(r"(?:cohorts\.)?folder\.(\w+)", lambda found: OPTIONS.get(found[1], found[0]), str(error))
        raise InputError(said) from None


def _first_look(cohort) -> str:
    """The data card and the checks of images of one's own, Markdown."""
    from medsec import data
    from medsec.judge.shortcuts import first_look

    return f"{data.describe(cohort)}\n{first_look(cohort).to_markdown()}"


def _follow(command: list[str], environment: dict[str, str], plan: Path) -> int:
    """Run a command to its end, with a line of progress now and then; returns its exit status.

    Args:
        plan: where the command writes, once it knows them, which files it is going to make (`medsec.evidence.cells.finish`).
    """
    plan.unlink(missing_ok=True)  # of a run that was interrupted
    with subprocess.Popen(command, env=environment) as child:
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            for times in itertools.count(1):
                try:
                    code = child.wait(EVERY)
                    return code if code >= 0 else 128 - code  # as a shell tells it, of one that was ended
                except subprocess.TimeoutExpired:
                    _tell(f"{times * EVERY / 60:.1f} min{_left(plan)}")
                except KeyboardInterrupt:
                    pass  # of the terminal, which tells the child as well: it puts things in order
        finally:
            signal.signal(signal.SIGTERM, before)


def _left(plan: Path) -> str:
    """How far a run is, and how long it will take if what is left is like what was done."""
    if not plan.is_file():
        return ""
    files = [Path(file) for file in json.loads(plan.read_text(encoding="utf-8"))]
    done, spent = sum(file.is_file() for file in files), time.time() - plan.stat().st_mtime
    text = f", {done} of {len(files)} cells finished"
    if 0 < done < len(files):
        text += f", about {max(1, round(spent * (len(files) - done) / done / 60))} min left"
    return text


# What is written -------------------------------------------------------------------------------------------------------


def _free(file: Path | None, endings) -> Path | None:
    """A place that may be written to: asked before anything is run."""
    from medsec.core.files import check_writable

    if file is None:
        return None
    if file.suffix not in endings:
        raise InputError(f"{file}: end the name in {', '.join(endings)}")
    if file.exists():
        raise InputError(f"{file} exists and is not overwritten; choose another name, or delete it")
    check_writable(file.parent)
    return file


def _write(file: Path, text: str) -> None:
    from medsec.core import files

    files.write(file, text)
    _tell(f"written: {file}")


def _give(report, file: Path | None, examples: Path | None = None) -> int:
    if examples:
        _write(examples, report.examples.to_csv())
    if file is None:
        print(report.to_markdown(), end="")
        return 0
    _write(file, getattr(report, FORMATS[file.suffix])())
    print(report.verdict)
    return 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
