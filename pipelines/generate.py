"""The pipelines of both cohorts from one description: ``python pipelines/generate.py`` after a change here.

It writes ``dvc.yaml`` (the phantom, which every clone holds), ``pipelines/pneumoniamnist/dvc.yaml`` (real X-rays, with a lock
file of its own), and the picture of the first one in ``docs/dvc.md``. A test fails where they are out of date.

Outputs are in git (``cache: false``) and are replaced only by a run that succeeded; ``persist`` keeps DVC from deleting them
before it. A stage depends on what the code of some folders *means* (`meaning.py`): a comment runs nothing again, and a notebook
whose cells are finished is drawn again in seconds.
"""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from medsec.core import files

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "dvc.md"
BEGIN, END = "<!-- dag: made by `python pipelines/generate.py`, do not edit -->", "<!-- end of dag -->"
COHORTS = {"phantom": "dvc.yaml", "pneumoniamnist": "pipelines/pneumoniamnist/dvc.yaml"}
KEPT = "{cache: false, persist: true}"
MEANING = "pipelines/meaning.json"
EVERYWHERE = ("core", "data", "evidence", "nets", "show")
HEAD = "# Made by pipelines/generate.py, where it is explained: change that, and run it.\n\nstages:\n"


@dataclass(frozen=True)
class Notebook:
    """A stage that runs one notebook.

    Attributes:
        desc: what it shows.
        experiments: folders below ``experiments/`` that it uses.
        packages: that it uses besides those of `EVERYWHERE`.
        params: sections of ``params.yaml``.
        figures: name -> whether every cohort has it (some need masks or hospitals).
        claims: files below ``claims/`` that it reads: its ledger, and more; besides the metrics, which all read.
        more: other tables that it writes.
        record: it shows a record.
        recorded: sections that only its record uses.
        networks: it attacks stored networks.
    """

    desc: str
    experiments: tuple[str, ...]
    packages: tuple[str, ...]
    params: tuple[str, ...]
    figures: dict[str, bool]
    claims: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    record: bool = False
    recorded: tuple[str, ...] = ()
    networks: bool = False
    metrics: bool = True


def _all(*names: str) -> dict[str, bool]:
    return dict.fromkeys(names, True)


NOTEBOOKS = {
    "00_data_and_threats": Notebook(
        "Cohort, federation and threat models",
        ("data_and_threats",),
        ("medphantom",),
        ("seeds", "cohorts", "classifier", "threats"),
        _all("balance", "classes", "partitions") | dict.fromkeys(("fundus", "masks", "shift", "styles"), False),
        metrics=False,
    ),
    "01_backdoor_fedgan": Notebook(
        "Backdoor attack on a federated GAN, as published and boosted",
        ("data_and_threats", "backdoor_fedgan"),
        ("medsec/federated", "medsec/backdoor"),
        ("device", "seeds", "cohorts", "classifier", "fedgan"),
        _all("attribution", "frechet", "gallery", "mechanism", "record", "trigger", "triggers"),
        claims=("1-fedgan",),
        more=("01_rounds.csv",),
        record=True,
        recorded=("drawing",),
    ),
    "02_feddetect": Notebook(
        "FedDetect as released, described and hardened, against attackers who know it",
        ("data_and_threats", "backdoor_fedgan", "feddetect"),
        ("medsec/federated", "medsec/backdoor"),
        ("device", "seeds", "cohorts", "classifier", "fedgan", "feddetect", "own.rules"),
        _all("aware", "downstream", "evidence", "gallery", "matrix", "no_attack") | {"hospitals": False},
        claims=("1-fedgan-defence",),
        record=True,
        recorded=("hospitals", "drawing", "regularised"),
    ),
    "03_gia_defense": Notebook(
        "Gradient inversion, the shadow defence, and attackers who know it",
        ("data_and_threats", "gia_defense"),
        ("medsec/federated", "medsec/inversion"),
        ("seeds", "cohorts", "inversion", "fingerprint", "imprint", "own.defences", "record.inversion"),
        _all("batch", "named", "plane", "round", "gallery", "spectrum", "noise", "psnr"),
        claims=("2-shadow",),
        record=True,
    ),
    "04_adversarial_pruning_defense": Notebook(
        "Adversarial examples, pruning and attention, and training against the attack",
        ("data_and_threats", "adversarial_pruning_defense"),
        ("medsec/evasion",),
        ("seeds", "cohorts", "evasion", "at_ramp", "transfer", "review", "own.attacks"),
        _all("examples", "rates", "eps", "maps", "sparsity") | {"pointing": False},
        claims=("3-pruning",),
        record=True,
        networks=True,
    ),
    "05_threat_matrix": Notebook(
        "Every defence of the three papers against every attack, in one federation",
        ("data_and_threats", "gia_defense", "adversarial_pruning_defense", "threat_matrix"),
        ("medsec/federated", "medsec/backdoor", "medsec/inversion", "medsec/evasion"),
        ("seeds", "cohorts", "fedgan", "feddetect", "inversion", "evasion", "matrix", "own.rules", "own.defences"),
        _all("matrix"),
        claims=("5-matrix", "matrix-readings"),
        record=True,
    ),
}
JUDGED = tuple(name for name, notebook in NOTEBOOKS.items() if notebook.claims)
RECORDED = tuple(name for name, notebook in NOTEBOOKS.items() if notebook.record)


@dataclass
class Stage:
    """One stage as text."""

    name: str
    desc: str
    cmd: str
    deps: list[str]
    params: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    outs: list[str] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    frozen: bool = False

    def text(self, wdir: str | None) -> str:
        lines = [f"  {self.name}:", *([f"    wdir: {wdir}"] if wdir else []), f"    desc: {self.desc}"]
        lines += [f"    cmd: {self.cmd}", *(["    frozen: true"] if self.frozen else []), "    deps:"]
        lines += [f"      - {dep}" for dep in self.deps]
        if self.params or self.code:
            lines += ["    params:", *(f"      - {section}" for section in self.params)]
        if self.code:
            lines.append(f"      - {MEANING}: [{', '.join(self.code)}]")
        for kind in ("outs", "plots", "metrics"):
            if files := getattr(self, kind):
                lines += [f"    {kind}:", *(f"      - {file}: {KEPT}" for file in files)]
        return "\n".join(lines) + "\n"


def images(cohort: str) -> str:
    """What stands for a cohort's images: themselves, or the fingerprint of those that are not ours to bring along."""
    return "data/phantom" if cohort == "phantom" else f"pipelines/{cohort}/cohort.json"


def used(notebook: Notebook) -> tuple[str, ...]:
    """The folders of code that decide what a notebook shows, as they are called in `MEANING`."""
    folders = [f"experiments/{name}" for name in notebook.experiments]
    packages = [f"medsec/{name}" for name in EVERYWHERE]
    return (*folders, *packages, *notebook.packages)


def code_stage() -> Stage:
    """From the code to what it means."""
    folders = ["pipelines/meaning.py", "medphantom", "medsec", "experiments"]
    command = "python pipelines/meaning.py"
    return Stage("code", "What the code means, without comments and layout", command, folders, outs=[MEANING])


def record_stage(name: str, cohort: str) -> Stage:
    """A record takes hours: frozen, so that `dvc repro` shows the way and never goes it."""
    notebook, place = NOTEBOOKS[name], f"records/{cohort}/{name}"
    return Stage(
        f"record_{name[:2]}",
        f"Record of notebook {name[:2]} (hours, started by hand)",
        f"python -m experiments record {name} --cohort {cohort}",
        [images(cohort), "profiles/full.yaml"],
        (
            *(section for section in notebook.params if not section.startswith(("record", "own"))),
            *notebook.recorded,
            "record",
        ),
        used(notebook),
        [f"{place}_runs.csv.gz", f"{place}.csv", f"{place}.json"],
        frozen=True,
    )


def notebook_stage(name: str, cohort: str) -> Stage:
    """What runs one notebook."""
    notebook, results = NOTEBOOKS[name], f"results/{cohort}"
    deps = [images(cohort), f"notebooks/{name}.ipynb"]
    deps += [f"claims/{file}.yaml" for file in ("metrics", *notebook.claims)]
    if notebook.record:
        deps += [f"records/{cohort}/{name}.csv", f"records/{cohort}/{name}.json"]
    if notebook.networks:
        deps.append(f"networks/{cohort}")
    figures = [figure for figure, everywhere in notebook.figures.items() if everywhere or cohort == "phantom"]
    tables = [f"{name}.csv", f"{name}_runs.csv.gz", *notebook.more]
    return Stage(
        name,
        notebook.desc,
        f"python -m experiments run {name} --cohort {cohort}",
        deps,
        notebook.params,
        used(notebook),
        [f"executed/{cohort}/{name}.ipynb", *(f"{results}/{table}" for table in tables)],
        [f"{results}/{name}_{figure}.png" for figure in figures],
        [f"{results}/{name[:2]}_metrics.json"] if notebook.metrics else [],
    )


def ledger_stages() -> list[Stage]:
    """From the tables of all cohorts to the verdicts, and to the notebook that shows them.

    The tables of the other cohort stand for themselves by their lock file: as a dependency they would make `dvc repro` run its
    pipeline too, whose images not everybody has.
    """
    judged = [f"results/phantom/{name}.csv" for name in JUDGED]
    findings = "results/findings.csv"
    shown = [f"results/phantom/99_claims_{figure}.png" for figure in ("headlines", "hero")]
    return [
        Stage(
            "ledger",
            "Every claim on every cohort, and the README's count of verdicts",
            "python -m experiments ledger",
            ["claims", *judged, "pipelines/pneumoniamnist/dvc.lock", "records"],
            code=("medsec/core", "medsec/evidence"),
            outs=[findings],
        ),
        Stage(
            "99_claims",
            "Every claim over all cohorts, and the row that decides it",
            "python -m experiments run 99_claims --cohort phantom",
            ["notebooks/99_claims.ipynb", "claims", findings, *judged],
            ("seeds", "cohorts"),
            ("experiments/claims", "medsec/core", "medsec/evidence", "medsec/show"),
            ["executed/phantom/99_claims.ipynb", "results/phantom/99_claims.csv"],
            shown,
        ),
    ]


def panels_stage() -> Stage:
    """What computes every position of the panels that the book shows without a kernel."""
    experiments = ("gia_defense", "adversarial_pruning_defense")
    packages = ("core", "data", "nets", "federated", "backdoor", "inversion", "evasion")
    return Stage(
        "panels",
        "Every position of the panels that can be moved in the book",
        "python -m experiments panels --cohort phantom",
        [images("phantom"), "networks/phantom", "experiments/panels.py"],
        ("seeds", "cohorts", "fedgan", "inversion", "evasion", "at_ramp"),
        (*(f"experiments/{name}" for name in experiments), *(f"medsec/{name}" for name in packages)),
        [f"results/phantom/panels.{kind}" for kind in ("json", "png")],
    )


def pipeline(cohort: str) -> str:
    """The text of a cohort's dvc.yaml."""
    root = "" if cohort == "phantom" else "../../"
    stages = [*(record_stage(n, cohort) for n in RECORDED), *(notebook_stage(n, cohort) for n in NOTEBOOKS)]
    stages = [code_stage(), *stages, *ledger_stages(), panels_stage()] if cohort == "phantom" else stages
    plot = (
        f"plots:\n  - trigger_rate_{cohort}:\n      title: Trigger rate of the averaged generator ({cohort})\n"
        "      x: round\n      y_label: share of the images\n"
        f"      y: {{{root}results/{cohort}/01_rounds.csv: [clean, poison, boost]}}\n"
    )
    return HEAD + "\n".join(stage.text(root.rstrip("/") or None) for stage in stages) + "\n" + plot


def picture() -> str:
    """The page's block, marks included, of the default pipeline as it is on disk.

    Raises:
        RuntimeError: DVC cannot read the pipeline; the message is DVC's.
    """
    command = [sys.executable, "-m", "dvc", "dag", "--mermaid", "dvc.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr.strip()}")
    return f"{BEGIN}\n```mermaid\n{done.stdout.strip()}\n```\n{END}"


def main() -> None:
    for cohort, file in COHORTS.items():
        files.write(ROOT / file, pipeline(cohort))
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    files.write(PAGE, before + picture() + rest.split(END)[1])


if __name__ == "__main__":
    main()
