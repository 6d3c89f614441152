"""Run one notebook for one cohort: what every pipeline stage does.

``python -m experiments run 01_backdoor_fedgan --cohort phantom`` does, in this order:

1. checks the parameters, the notebook and the cohort (a mistake is one line and exit status 2, nothing is written);
2. takes a lock, so that a second run, or one that outlived a killed ``dvc``, cannot write the same outputs;
3. runs the notebook with this very interpreter, all its outputs going to a temporary folder;
4. normalises the executed notebook: two runs give the same bytes;
5. moves everything into place. If any step fails the previous outputs stay as they were (exit status 1).

A notebook writes plain files to ``results/<cohort>/`` whose names begin with its own number (``01_…``). Files with that
number that it no longer writes are removed, so that no table outlives the code that made it.

What a cell writes to stderr (warnings) is shown by this command and left out of the executed notebook: it names
temporary files and process numbers. ``make test`` replays the notebooks and fails on a compared cell that warns.

Below ``.medsec-tmp-<cohort>/`` (never in git) lie the lock, the temporary folder and, after a failure,
``<notebook>.failed.ipynb``. The lock is the operating system's (``flock``: Linux, macOS, WSL): none outlives its owner.
"""

import base64
import contextlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from nbstripout import strip_output
from papermill.exceptions import PapermillExecutionError

from medsec import INLINE, PINNED, data
from medsec.core import files, parallel, paths
from medsec.core.errors import InputError
from medsec.core.settings import Cohorts
from medsec.show import png

__all__: list[str] = []  # for the commands of `experiments`

PIPELINES = paths.ROOT / "pipelines"
# Not: a warning at every start that the local connection is plain, errors when a failed run ends its kernel.
KERNEL = "import logging\nlogging.getLogger('tornado').setLevel(60)\nc.IPKernelApp.log_level = 50\n"
VOLATILE = [
    "metadata.papermill",  # paths, times
    "metadata.language_info.version",
    "cell.metadata.papermill",
    "cell.metadata.execution",
]


class RunError(RuntimeError):
    """The notebook failed, or wrote where it must not; the message is short and says where to look."""


@dataclass(frozen=True)
class Job:
    """One notebook, one cohort, and the places that belong to the pair."""

    notebook: Path
    cohort: str
    profile: str
    out: Path  # absolute: the kernel runs in another folder

    @property
    def number(self) -> str:
        """What the names of all its outputs begin with, e.g. ``01_``."""
        return self.notebook.stem[:3]

    @property
    def temporary(self) -> Path:
        return self.out / f".medsec-tmp-{self.cohort}" / self.notebook.stem

    @property
    def lock(self) -> Path:
        return self.temporary.with_name(f"{self.notebook.stem}.lock")

    @property
    def failed(self) -> Path:
        return self.temporary.with_name(f"{self.notebook.stem}.failed.ipynb")


def check(job: Job, cohorts: Cohorts) -> None:
    """Everything besides the parameters that can be wrong before any training.

    Raises:
        InputError: the notebook or the cohort is not usable, or the outputs may not go where they would.
    """
    if "DVC_STAGE" in os.environ and job.out != paths.ROOT:
        raise InputError(
            "MEDSEC_OUT is set: DVC would take the old files in results/ for those of this run; unset it, or leave DVC out "
            f"and call python -m experiments run {job.notebook.stem} --cohort {job.cohort} yourself"
        )
    if job.profile != "quick" and job.out == paths.ROOT:
        raise InputError(f"results/ holds the quick profile only; for {job.profile!r} set MEDSEC_OUT to another folder")
    _check_notebook(job.notebook)
    cohort = data.load(job.cohort, cohorts)
    pinned = PIPELINES / job.cohort / "cohort.json"
    if pinned.is_file():
        try:
            expected = files.read_json(pinned)["fingerprints"].get(str(cohort.size))
            expected is None or expected.encode()
        except (TypeError, KeyError, AttributeError):
            raise InputError(f"{files.shown(pinned)} names no fingerprints; {files.restore(pinned)}") from None
        if expected not in (None, cohort.fingerprint):
            raise InputError(
                f"cohort {job.cohort} at {cohort.size} pixels is not the one of pipelines/{job.cohort}/cohort.json: "
                f"fingerprint {cohort.fingerprint[:12]}…, expected {expected[:12]}…; restore the data or mend that file"
            )


def _check_notebook(file: Path) -> None:
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in paths.NOTEBOOKS.glob("*.ipynb")))
        raise InputError(f"notebook {file.stem} does not exist; notebooks/ has: {known or 'none'}")
    if not re.fullmatch(r"\d\d_\w+\.ipynb", file.name):
        raise InputError(
            f"notebook {file.name}: the name must be two digits, '_', a word, like 00_data_and_threats.ipynb"
        )
    try:
        cells = nbformat.read(file, as_version=4).cells
    except Exception as error:  # nbformat raises many kinds
        raise InputError(
            f"notebook {file.name} cannot be read: {str(error).split(chr(10))[0] or type(error).__name__}"
        ) from None
    if not any("parameters" in cell.metadata.get("tags", []) for cell in cells):
        raise InputError(f"notebook {file.name} has no cell tagged 'parameters' to set cohort and profile in")


def kernel_environment(job: Job) -> dict[str, str]:
    """Environment of the kernel: outputs to the temporary folder, and nothing of the user's own settings."""
    return {
        "MEDSEC_OUT": str(job.temporary),
        "MEDSEC_REFERENCE": str(job.temporary),  # a fresh table is not judged by the one that it replaces
        "PYTHONPATH": str(paths.ROOT),  # this checkout's medsec, also where another one is installed (dvc exp --temp)
        # Another number of threads gives other bits.
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        **{key: os.environ[key] for key in PINNED if key in os.environ},  # before numpy is imported there
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",  # whatever the locale
        "PYTHONOPTIMIZE": "",  # asserts of notebooks are meant
        "TZ": "UTC",
        **INLINE,
        **parallel.HEAP,
        "TQDM_DISABLE": "1",  # bars are made of times
        "MEDSEC_LIVE": "0",  # nobody moves a slider here, even if this was started from a terminal of `make lab`
        "IPYTHONDIR": str(job.temporary / "ipython"),  # no start-up files of the user
        "JUPYTER_PATH": "",  # no kernels from elsewhere, and of those that are left
        "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, whatever else is installed under its name
        "JUPYTER_RUNTIME_DIR": str(job.temporary / "jupyter"),
        "MATPLOTLIBRC": str(default_style()),  # nor a figure style
    }


def default_style() -> Path:
    """The file with Matplotlib's own defaults, found without loading Matplotlib."""
    return Path(importlib.util.find_spec("matplotlib").origin).with_name("mpl-data") / "matplotlibrc"


@contextlib.contextmanager
def environment(change: dict[str, str]) -> Iterator[None]:
    """For this time the environment has these variables: a kernel that starts inherits them."""
    before = {key: os.environ.get(key) for key in change}
    os.environ.update(change)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def run(job: Job) -> nbformat.NotebookNode:
    """The executed notebook, as papermill leaves it; its results lie in the temporary folder.

    Raises:
        RunError: a cell failed or the kernel died; the notebook so far is at ``job.failed``.
    """
    raw = job.temporary / "raw.ipynb"
    try:
        config = job.temporary / "ipython" / "profile_default" / "ipython_kernel_config.py"
        config.parent.mkdir(parents=True)
        config.write_text(KERNEL, encoding="utf-8")
        with environment(kernel_environment(job)):
            return papermill.execute_notebook(
                _literal(job.notebook.resolve()),
                _literal(raw),
                parameters={"cohort": job.cohort, "profile": job.profile},
                kernel_name="python3",
                language="python",
                cwd=job.notebook.resolve().parent,
                progress_bar=False,
                start_timeout=300,
            )
    except PapermillExecutionError as error:
        what = f"cell [{error.exec_count}]: {error.ename}: {error.evalue}".strip().splitlines()[0]
    except DeadKernelError:
        what = "its kernel died (out of memory, or ended from outside)"
    except RuntimeError as error:  # nbclient, when the kernel does not start
        what = str(error).strip().splitlines()[0]
    if raw.is_file():
        raw.replace(job.failed)
        what += f"\nthe notebook so far: {job.failed}"
    raise RunError(f"{job.notebook.name}, cohort {job.cohort}: {what}")


def _literal(path: Path) -> str:
    """A path in which papermill finds no place to put a parameter."""
    return str(path).replace("{", "{{").replace("}", "}}")


def normalise(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Remove, in place, everything from an executed notebook that differs between two equal runs.

    Like ``nbstripout --keep-output --keep-count`` with `VOLATILE` as extra keys (which also numbers the cell ids), and
    further: stdout is one piece however the kernel cut it, stderr goes, and figures are made small (`medsec.show.png`).

    Returns:
        What each cell wrote to stderr, by its prompt, e.g. ``{"[3]": "…/UserWarning: …"}``.
    """
    strip_output(notebook, keep_output=True, keep_count=True, keep_id=False, extra_keys=VOLATILE)
    warned: dict[str, str] = {}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        kept: list[nbformat.NotebookNode] = []
        for output in cell.outputs:
            shown = output.get("data", {})
            if "image/png" in shown:
                shown["image/png"] = base64.b64encode(png.compact(base64.b64decode(shown["image/png"]))).decode()
            stream = output.get("name") if output.output_type == "stream" else None
            if stream == "stderr":
                prompt = f"[{cell.execution_count}]"
                warned[prompt] = warned.get(prompt, "") + output.text
            elif stream and kept and kept[-1].get("name") == stream:
                kept[-1].text += output.text
            else:
                kept.append(output)
        cell.outputs = kept
    return warned


def install(job: Job, notebook: nbformat.NotebookNode) -> None:
    """Move a finished run into place, file by file, the executed notebook last.

    Raises:
        RunError: the notebook wrote a file that is not ``results/<cohort>/NN_…``; nothing has been moved.
    """
    source, target = (paths.results(job.cohort, base) for base in (job.temporary, job.out))
    fresh = sorted(source.rglob("*"))
    for file in [*fresh, *_strays(job, source)]:
        if file.parent != source or not file.is_file() or not file.name.startswith(job.number):
            shown = file.relative_to(job.temporary)
            raise RunError(f"{job.notebook.name} wrote {shown}; it may write results/{job.cohort}/{job.number}* only")
    executed = paths.executed(job.cohort, job.out) / job.notebook.name
    finished = job.temporary / "executed.ipynb"
    nbformat.write(notebook, finished)
    target.mkdir(parents=True, exist_ok=True)
    executed.parent.mkdir(parents=True, exist_ok=True)
    for file in fresh:
        file.replace(target / file.name)
    for old in target.glob(f"{job.number}*"):
        if old.name not in {file.name for file in fresh}:
            old.unlink()
    finished.replace(executed)
    job.failed.unlink(missing_ok=True)


def _strays(job: Job, source: Path) -> list[Path]:
    """Files that the notebook wrote elsewhere below its output folder."""
    ours = {job.temporary / name for name in ("jupyter", "ipython", "raw.ipynb")}
    others = [path for path in job.temporary.iterdir() if path not in ours]
    return [f for path in others for f in [path, *path.rglob("*")] if f.is_file() and source not in f.parents]


def execute(job: Job, cohorts: Cohorts) -> None:
    """Run the notebook and put its outputs in place.

    Raises:
        InputError: something given is wrong, or another run is going on; nothing was written.
        RunError: the run failed; the previous outputs are untouched.
    """
    check(job, cohorts)
    with parallel.locked(job.lock):
        shutil.rmtree(job.temporary, ignore_errors=True)  # of a run that was killed
        job.temporary.mkdir()
        try:
            notebook = run(job)
            for prompt, text in normalise(notebook).items():
                print(f"{job.notebook.name}: cell {prompt} wrote to stderr:\n{text.rstrip()}", file=sys.stderr)
            install(job, notebook)
        finally:
            shutil.rmtree(job.temporary, ignore_errors=True)
