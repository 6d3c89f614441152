"""The exercises: solutions pass, untouched TODOs and wrong answers are told what is wrong, and both versions agree."""

import contextlib
import importlib.util
import io

import matplotlib
import nbformat
import pytest
from matplotlib import pyplot as plt
from nbclient import NotebookClient

from medsec.core import paths

matplotlib.use("Agg")
FOLDER = paths.ROOT / "exercises"
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))

# Mistakes that students make: the exercise, what of its solution is replaced, by what, and what the check must say to that.
WRONG = [
    ("00.1", "image.tobytes() for", "np.sort(image.ravel()).tobytes() for", "a mirrored image"),
    ("00.1", "image.tobytes() for", "(image // 2).tobytes() for", "one grey level"),
    ("00.2", "np.array([image.tobytes() in seen for image in test])", "np.ones(len(test), bool)", "you accuse 96"),
    ("00.2", "np.array([image.tobytes() in seen for image in test])", "np.zeros(len(test))", "True or False"),
    ("00.3", "np.full(n_clients, alpha)", "np.full(n_clients, 1.0)", "is alpha used"),
    ("00.3", "held.append(part)", "held.append(part[1:])", "belong to nobody"),
    ("00.4", "balanced[home] - np.array(balanced)", "np.array(balanced) - balanced[home]", "the sign is flipped"),
    ("00.4", "100 * (", "(", "multiply by 100"),
    ("00.5", '"b": "knowledge"', '"b": "allowed"', "action b"),
    ("00.5", '"e": "allowed"', '"e": "capability"', "is allowed: the card says under capability"),
    ("01.1", "-k:, -k:] = pattern", "1 - k :, 1 - k :] = pattern[:, 1:, 1:]", "your trigger covers 9 pixels"),
    ("01.1", "-k:, -k:", ":k, :k", "your patch begins at row 0 and column 0"),
    ("01.2", "descending=True", "descending=False", "look at the highest scores"),
    ("01.2", 'splits["public"]', 'splits["test"]', "you looked at the split test"),
    ("01.3", "n / total *", "1 / len(states) *", "plain mean"),
    ("01.3", "n / total *", "n *", "divide by the number of all images"),
    ("01.4", "received[name] + (", "(", "add what you received"),
    ("01.4", "/ share", "* (1 / share - 1)", "0.75 of your update arrives"),
    ("01.5", "poison - clean", "clean - poison", "the sign is flipped"),
    ("01.5", "(poison - clean).sort_index()", "poison.sort_index()", "subtract the control"),
    ("02.1", "ranked[trim : len(models) - trim]", "models", "the plain mean"),
    ("02.1", "ranked[trim : len(models) - trim]", "ranked[: len(models) - trim]", "the smallest go as well"),
    ("02.2", "np.fill_diagonal(squared, np.inf)", "pass", "counts itself as its nearest neighbour"),
    ("02.2", "** 2).sum(2)", "** 2).sum(2) ** 0.5", "Krum sums their squares"),
    ("02.3", "np.delete(losses, i)", "losses", "include the client itself"),
    ("02.3", "(loss - centre)", "abs(loss - centre)", "leave out the absolute value"),
    ("02.4", "+ z**2 / (4 * n**2))", ")", "divided by 1 + z²/n"),
    ("02.4", "0.975", "0.95", "leaves 5 % on each side"),
    ("02.5", "float(np.median(honest))", "own_loss", "evidence against you in 8 of 8"),
    ("02.5", "float(np.median(honest))", "0.0", "a loss below the honest ones"),
    ("02.6", ".abs().max()", ".abs().mean()", "take the largest difference, not the mean"),
    ("02.6", "torch.cat([maps[:i], maps[i + 1 :]])", "maps", "your median is over all clients"),
    ("03.1", "bias_gradient.abs().argmax()", "0", "is something divided by 0"),
    ("03.1", " / bias_gradient[k]", "", "divide by the gradient of the same unit's bias"),
    ("03.2", "argmin", "argmax", "look at the signs"),
    ("03.2", "int(bias_gradient.argmin())", "bias_gradient.argmin()", "one number"),
    ("03.3", "1 - first @ second", "first @ second", "this is the cosine itself"),
    ("03.3", "return 1 -", "return 0.5 -", "from itself is -0.500"),
    ("03.4", "-10 *", "10 *", "the sign is flipped"),
    ("03.4", "-10 *", "-20 *", "10 log10"),
    ("03.5", "argmax(1)", "argmin(1)", "largest correlation"),
    ("03.5", "flat - flat.mean(1, keepdims=True)", "flat", "remove brightness and contrast"),
    ("03.6", "0.5 * images", "images + 0.2", "that is no image in [0, 1]"),
    ("03.6", "0.5 * images", "0.95 * images", "asked for is at most 20"),
    ("04.1", "x + eps", "x - eps", "is the sign flipped"),
    ("04.1", ".clamp(0, 1)", "", "you forgot to clip"),
    ("04.2", ".clamp(x - eps, x + eps)", "", "project after each step"),
    ("04.2", ".clamp(x - eps, x + eps).clamp(0, 1)", ".clamp(x - eps, x + eps)", "you forgot to clip"),
    ("04.3", "own[clean].mean()", "own.mean()", "accuracy over all images"),
    ("04.3", "own[clean].mean()", "(own & clean).mean()", "divide by the number that is right before"),
    ("04.4", "copy.deepcopy(model)", "model", "you changed the model"),
    ("04.4", "w[w.abs() < threshold] = 0", "w[w.abs() > threshold] = 0", "of the weights are zero"),
    ("04.5", 'right["pgd"].mean() - right["fgsm"].mean()', "0", "iterative_beats_single_step fails"),
    ("04.5", "> tolerance", "> 0", "within the tolerance"),
    ("04.6", "rate[0] - rate[1]", "rate[1] - rate[0]", "the sign is flipped"),
    ("04.6", "after[clean]", "after", "you compared accuracies"),
    ("05.1", "(labels != target) & (clean == labels)", "np.ones(len(labels), bool)", "you count all images"),
    ("05.1", "(labels != target) & (clean == labels)", "clean == labels", "you count images of the target class"),
    ("05.2", "those[seed] - reference[seed]", "reference[seed] - those[seed]", "the sign is flipped"),
    ("05.2", "sorted(those.keys() & reference.keys())", "[s for s in those if s in reference]", "by rising seed"),
    ("05.3", "updates * (lengths.median() / lengths).clamp(max=1)", "updates", "plain mean"),
    ("05.3", ".clamp(max=1)", "", "lengthen updates"),
    ("05.4", "(both - none) - (first - none) - (second - none)", "both - none", "take off what each part"),
    ("05.4", "(both - none) - (first - none) - (second - none)", "both - first - second", "compared with none"),
]

# Answers that are wrong in every exercise, in place of the TODO.
ALWAYS_WRONG = {
    "return None": "your function returns None",
    'return "something"': "your function returns a str",
    "return [][1]": "stops in line",
}


def load(name):
    """A module of the folder exercises, which is no package."""
    spec = importlib.util.spec_from_file_location(f"exercises_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, checks = load("build"), load("checks")


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def run(source, namespace, name="cell"):
    """Run a cell, and return what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, name, "exec"), namespace)
    plt.close("all")
    return printed.getvalue()


def verdict(printed, number):
    """What a check said: one line that begins with the number of the exercise."""
    (line,) = [line for line in printed.splitlines() if line.startswith("Exercise ")]
    assert line.startswith(f"Exercise {number}: ")
    return line.removeprefix(f"Exercise {number}: ")


@pytest.fixture(params=SOLUTIONS, ids=lambda file: file.stem)
def file(request):
    return request.param


def test_every_notebook_has_exercises_and_every_exercise_its_mistakes():
    names = {source.name for source in paths.NOTEBOOKS.glob("0[0-5]_*.ipynb")}
    assert {file.name for file in SOLUTIONS} == names == {file.name for file in FOLDER.glob("*.ipynb")}
    made = {file.stem[:2]: len(tagged(nbformat.read(file, as_version=4), "check")) for file in SOLUTIONS}
    assert all(3 <= n <= 6 for n in made.values())
    assert {number for number, *_ in WRONG} == {f"{book}.{i + 1}" for book, n in made.items() for i in range(n)}


def test_the_students_version_is_what_the_script_makes(file):
    made = build.student(nbformat.read(file, as_version=4))
    assert nbformat.writes(made) == (FOLDER / file.name).read_text(encoding="utf-8").rstrip("\n"), (
        "edit exercises/solutions/, then run: python exercises/build.py"
    )
    assert "SOLUTION" not in nbformat.writes(made)
    assert not tagged(made, "answer")


def test_solutions_run_to_their_end_and_pass(file):
    notebook, namespace, number = nbformat.read(file, as_version=4), {}, 0
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            printed = run(cell.source, namespace, f"cell {i}")
            if "check" in cell.metadata.get("tags", []):
                number += 1
                assert verdict(printed, number) == "ok"
    assert number == len(tagged(notebook, "solution"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_untouched_and_wrong_answers_are_told_what_is_wrong(file):
    """The student's notebook from beginning to end, with every exercise tried in several wrong ways."""
    solution = tagged(nbformat.read(file, as_version=4), "solution")
    notebook, namespace, number, missed = build.student(nbformat.read(file, as_version=4)), {}, 0, []
    for i, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code":
            printed = run(cell.source, namespace, f"cell {i}")
        if "solution" in tags:
            todo = cell.source
        if "check" not in tags:
            continue
        number += 1
        assert verdict(printed, number) == checks.UNDONE
        tried = [(todo.replace("raise NotImplementedError", code), says) for code, says in ALWAYS_WRONG.items()]
        for exercise, old, new, says in WRONG:
            if exercise == f"{file.stem[:2]}.{number}":
                right = solution[number - 1].source
                assert old in right, f"{exercise}: {old!r} is no longer in the solution"
                tried.append((right.replace(old, new), says))
        for code, says in tried:
            trial = dict(namespace)
            run(code, trial)
            said = verdict(run(cell.source, trial), number)
            if says not in said or len(said) > 400:
                missed.append(f"exercise {number}, expected {says!r}: {said}\n{code}")
    assert not missed, "\n\n".join(missed)


def test_a_notebook_runs_in_a_kernel_of_its_own(tmp_path, monkeypatch):
    """From a folder that is not the repository's, as a student's copy does; every check says that nothing is done yet."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(FOLDER / "01_backdoor_fedgan.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [output["text"] for cell in tagged(notebook, "check") for output in cell.outputs]
    assert printed == [f"Exercise {i + 1}: {checks.UNDONE}\n" for i in range(len(printed))]
    assert len(printed) >= 3
