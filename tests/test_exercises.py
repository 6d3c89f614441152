"""The exercises: solutions pass, untouched TODOs and wrong answers are told what is wrong, and both versions agree."""

import contextlib
import importlib.util
import io
import re
from itertools import pairwise

import matplotlib
import nbformat
import pytest
from matplotlib import pyplot as plt
from nbclient import NotebookClient

from medsec.core import paths

matplotlib.use("Agg")
FOLDER = paths.ROOT / "exercises"
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))
LIMIT_KB = 250  # of the folder

# Wrong answers: (notebook, exercise) -> what of the solution is replaced, by what, and what the check must say to that.
WRONG = {
    ("00", 1): [
        (
            "len(images) - len({image.tobytes() for image in images})",
            "len({i.tobytes() for i in images})",
            "all differ",
        ),
        ("image.tobytes() for", "np.sort(image.ravel()).tobytes() for", "a mirrored image"),
        ("image.tobytes() for", "(image // 2).tobytes() for", "one grey level"),
        (
            "len(images) - len({image.tobytes() for image in images})",
            "sum(sum(np.array_equal(a, b) for b in images) > 1 for a in images)",
            "the first may stay); you count 3",
        ),
    ],
    ("00", 2): [
        (
            "np.array([image.tobytes() in seen for image in test])",
            "np.flatnonzero([image.tobytes() in seen for image in test])",
            "asked for is (100,)",
        ),
        (
            "np.array([image.tobytes() in seen for image in test])",
            "np.array([np.array_equal(a, b) for a, b in zip(train[:100], test)])",
            "at other places; you found 0",
        ),
        ("np.array([image.tobytes() in seen for image in test])", "np.ones(len(test), bool)", "you accuse 96"),
        ("np.array([image.tobytes() in seen for image in test])", "np.zeros(len(test))", "True or False"),
    ],
    ("00", 3): [
        (
            "        members = rng.permutation(np.flatnonzero(labels == label))\n"
            "        shares = rng.dirichlet(np.full(n_clients, alpha))",
            "        members = rng.permutation(np.flatnonzero(labels == label))\n"
            "        shares = np.random.default_rng(1).dirichlet(np.full(n_clients, alpha))",
            "draw new shares for every class",
        ),
        ("rng.permutation(np.flatnonzero(labels == label))", "np.flatnonzero(labels == label)", "permute the members"),
        ("np.full(n_clients, alpha)", "np.full(n_clients, 1.0)", "is alpha used"),
        ("held.append(part)", "held.append(part[1:])", "belong to nobody"),
        ("held.append(part)", "held.append(labels[part])", "an index stands twice"),
        ("alpha))", "alpha / 4))", "the largest share of a class is"),
    ],
    ("00", 4): [
        ("balanced[home] - np.array(balanced)", "np.array(balanced) - balanced[home]", "the sign is flipped"),
        ("100 * (", "(", "multiply by 100"),
        (
            "balanced.append(np.mean(recognised))",
            "balanced.append(np.mean(answers[here] == labels[here]))",
            "plain acc",
        ),
        ("balanced[home]", "balanced[1]", "the home hospital loses"),
        ("balanced[home]", "balanced[0]", "do you use `home`"),
    ],
    ("00", 5): [
        ('"b": "knowledge"', '"b": "allowed"', "action b"),
        ('"e": "allowed"', '"e": "capability"', "is allowed: the card says under capability"),
        ('"c": "out_of_scope"', '"c": "knowledge"', "action c is ruled out, but not by knowledge"),
        ('"h": "out_of_scope",', "", "no verdict on action h"),
        ('"g": "allowed"', '"g": "yes"', "neither 'allowed' nor a field"),
    ],
    ("01", 1): [
        ("-k:, -k:] = pattern", "1 - k :, 1 - k :] = pattern[:, 1:, 1:]", "your trigger covers 9 pixels"),
        ("-k:, -k:", ":k, :k", "your patch begins at row 0 and column 0"),
        ("images.clone()", "images", "you changed the images"),
        ("-k:] = pattern", "-k:] += pattern + 0.1", "do not add it"),
        ("= pattern\n", "= pattern.flip(-1)\n", "is it mirrored"),
    ],
    ("01", 2): [
        ("descending=True", "descending=False", "look at the highest scores"),
        ('splits["public"]', 'splits["test"]', "you looked at the split test"),
        ("values[allowed]", "values[0]", "a lower threshold misses fewer"),
        ("return float(", "return (", "one number"),
    ],
    ("01", 3): [
        ("n / total *", "1 / len(states) *", "plain mean"),
        ("n / total *", "n *", "divide by the number of all images"),
        ("for name in states[0]", 'for name in ["weight"]', "no entry 'bias'"),
    ],
    ("01", 4): [
        ("received[name] + (own[name] - received[name]) / share", "own[name] / share", "you scaled the whole model"),
        ("received[name] + (", "(", "add what you received"),
        ("/ share", "* (1 / share - 1)", "0.75 of your update arrives"),
        ("/ share", "* share", "0.06 of your update arrives"),
    ],
    ("01", 5): [
        ("poison - clean", "clean - poison", "the sign is flipped"),
        ("(poison - clean).sort_index()", "poison.sort_index()", "subtract the control"),
        ('"clean")', '"real")', "you compared with real images"),
        ('.set_index("seed")["value"]', '["value"].reset_index(drop=True)', "you subtracted runs of different seeds"),
        ("(poison - clean).sort_index()", "(poison - clean).sort_index(ascending=False)", "sort by seed"),
    ],
    ("02", 1): [
        ("ranked[trim : len(models) - trim]", "models", "the plain mean"),
        ("ranked[trim : len(models) - trim]", "ranked[: len(models) - trim]", "the smallest go as well"),
        (
            "np.sort(models, axis=0)",
            "models[np.argsort(np.linalg.norm(models, axis=1))]",
            "a wild value is still in",
        ),
        ("trim : len(models) - trim", "trim:-trim", "is your slice empty"),
    ],
    ("02", 2): [
        ("np.fill_diagonal(squared, np.inf)", "pass", "counts itself as its nearest neighbour"),
        ("** 2).sum(2)", "** 2).sum(2) ** 0.5", "Krum sums their squares"),
        ("n - n_malicious - 2", "n - n_malicious - 1", "you count 5 neighbours"),
    ],
    ("02", 3): [
        ("np.delete(losses, i)", "losses", "include the client itself"),
        ("(loss - centre)", "abs(loss - centre)", "leave out the absolute value"),
        ("max(spread, floor)", "spread", "the floor is missing"),
        ("return np.array(found)", "return (losses - losses.mean()) / losses.std()", "mean and standard deviation let"),
        ("1.4826 * ", "", "for client"),
    ],
    ("02", 4): [
        ("+ z**2 / (4 * n**2))", ")", "divided by 1 + z²/n"),
        (
            "return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)",
            "return p - z * np.sqrt(p * (1 - p) / n), p + z * np.sqrt(p * (1 - p) / n)",
            "no width at all",
        ),
        ("0.975", "0.95", "leaves 5 % on each side"),
        ("(centre - half)", "(centre + 2 * half)", "are exchanged"),
        (", (centre + half) / (1 + z**2 / n)", ",", "asked for are two"),
    ],
    ("02", 5): [
        ("float(np.median(honest))", "own_loss", "evidence against you in 8 of 8"),
        ("float(np.median(honest))", "0.0", "a loss below the honest ones"),
        ("float(np.median(honest))", "float(honest.max() + 0.5)", "a loss above the honest ones"),
        ("float(np.median(honest))", "honest", "one number"),
    ],
    ("02", 6): [
        (".abs().max()", ".abs().mean()", "take the largest difference, not the mean"),
        ("torch.cat([maps[:i], maps[i + 1 :]])", "maps", "your median is over all clients"),
        ("others.quantile(0.5, dim=0)", "others.mean(0)", "take the median"),
    ],
    ("03", 1): [
        ("bias_gradient.abs().argmax()", "0", "is something divided by 0"),
        (" / bias_gradient[k]", "", "divide by the gradient of the same unit's bias"),
        ("weight_gradient[k] /", "weight_gradient.mean(1) /", "shape"),
    ],
    ("03", 2): [
        ("argmin", "argmax", "look at the signs"),
        ("int(bias_gradient.argmin())", "bias_gradient.argmin()", "one number"),
        ("int(bias_gradient.argmin())", "7", "a label is one of 0 to 4"),
    ],
    ("03", 3): [
        ("1 - first @ second", "first @ second", "this is the cosine itself"),
        (
            "return 1 - first @ second / (first.norm() * second.norm())",
            "return (first - second) @ (first - second)",
            "divide by both lengths",
        ),
        (
            "return 1 - first @ second / (first.norm() * second.norm())",
            "return 1 - torch.stack([F.cosine_similarity(a.flatten(), b.flatten(), 0) for a, b in zip(found, sent)]).mean()",
            "join all layers to one vector first",
        ),
        ("return 1 -", "return 0.5 -", "from itself is -0.500"),
    ],
    ("03", 4): [
        ("-10 *", "10 *", "the sign is flipped"),
        ("-10 *", "-20 *", "10 log10"),
        (".mean((1, 2, 3))", ".sum((1, 2, 3))", "take their mean"),
        ("np.log10(error)", "np.log10(error / 255**2)", "not to 255"),
        (".mean((1, 2, 3))", ".mean()", "asked for is an array"),
    ],
    ("03", 5): [
        ("argmax(1)", "argmin(1)", "largest correlation"),
        ("flat - flat.mean(1, keepdims=True)", "flat", "remove brightness and contrast"),
        (
            "return (standard[0] @ standard[1].T).argmax(1)",
            "return ((found[:, None] - gallery[None]) ** 2).sum((2, 3, 4)).argmin(1)",
            "all darker by 0.3",
        ),
    ],
    ("03", 6): [
        ("0.5 * images", "images + 0.2", "that is no image in [0, 1]"),
        ("0.5 * images", "0.95 * images", "asked for is at most 20"),
        (
            "0.5 * images",
            "np.clip(images + np.random.default_rng(0).normal(0, 0.2, images.shape), 0, 1)",
            "you do hide something",
        ),
        ("0.5 * images", "0.5 - 0.5 * images", "you do hide something"),
    ],
    ("04", 1): [
        ("x + eps", "x - eps", "is the sign flipped"),
        (".clamp(0, 1)", "", "you forgot to clip"),
        ("eps / 255", "eps", "divide eps by 255"),
        ("gradient.sign()", "gradient", "take the sign of the gradient"),
        ("(x + eps", "(at + eps", "still carries a graph"),
        ("x.clone().requires_grad_()", "x.add_(0.1).clamp_(0, 1).requires_grad_()", "you changed the images"),
    ],
    ("04", 2): [
        (".clamp(x - eps, x + eps)", "", "project after each step"),
        (".clamp(x - eps, x + eps).clamp(0, 1)", ".clamp(x - eps, x + eps)", "you forgot to clip"),
        ("found + step", "found - step", "ascent, not descent"),
        ("found.clone()", "start.clone()", "medsec's"),
        ("step * eps *", "0 *", "nothing moves"),
    ],
    ("04", 3): [
        ("own[clean].mean()", "own.mean()", "accuracy over all images"),
        ("own[clean].mean()", "(own & clean).mean()", "divide by the number that is right before"),
        ("base_clean & ~base_own", "~base_own", "were not turned by the attack"),
        ('"recovered": transfer[turned].mean(),', "", "'recovered' is missing"),
        ("transfer[clean].mean()", "own[clean].mean()", "transfer: you find"),
    ],
    ("04", 4): [
        ("copy.deepcopy(model)", "model", "you changed the model"),
        ("w[w.abs() < threshold] = 0", "w[w.abs() > threshold] = 0", "of the weights are zero"),
        (
            "            w[w.abs() < threshold] = 0",
            "            own = w.abs().flatten().sort().values\n            w[w.abs() < own[round(share * len(own))]] = 0",
            "every layer has lost the same share",
        ),
        (
            "            w[w.abs() < threshold] = 0",
            "            w[w.abs() >= sizes[round((1 - share) * len(sizes))]] = 0",
            "smallest",
        ),
        (
            "[m.weight for m in pruned.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]",
            "list(pruned.parameters())",
            "biases and normalisation stay",
        ),
        ("threshold] = 0", "threshold] = 0\n            w *= 2", "must keep their values"),
        (
            "sizes[round(share * len(sizes))]",
            "sizes[round(share * len(sizes)) - 1].nextafter(sizes[-1] + 1)",
            "share of 0 nothing is",
        ),
    ],
    ("04", 5): [
        (
            'right["fgsm"].mean() - right["noise"].mean()',
            'right["noise"].mean() - right["fgsm"].mean()',
            "you accuse it",
        ),
        ('right["pgd"].mean() - right["fgsm"].mean()', "0", "iterative_beats_single_step fails"),
        (
            '(right["pgd"] & ~right["transfer"]).mean()',
            'right["pgd"].mean() - right["transfer"].mean()',
            "other images, as many",
        ),
        ("> tolerance", "> 0", "within the tolerance"),
        ('"whitebox_beats_transfer":', '"white_beats_transfer":', "none of the three names"),
    ],
    ("04", 6): [
        ("rate[0] - rate[1]", "rate[1] - rate[0]", "the sign is flipped"),
        ("after[clean]", "after", "you compared accuracies"),
        ("rate[0] - rate[1]", "rate[0]", "subtract the control's"),
        ("after[clean]", "(after & clean)", "divide by the number that is right before"),
    ],
    ("05", 1): [
        ("(labels != target) & (clean == labels)", "np.ones(len(labels), bool)", "you count all images"),
        ("(labels != target) & (clean == labels)", "clean == labels", "you count images of the target class"),
        ("(labels != target) & (clean == labels)", "labels != target", "called wrongly without the trigger"),
        ("triggered[counted] == target", "triggered[counted] != labels[counted]", "any other"),
        ("(triggered[counted] == target)", "((triggered == target) & counted)", "divide by those that can be turned"),
    ],
    ("05", 2): [
        (
            "np.array([those[seed] - reference[seed] for seed in sorted(those.keys() & reference.keys())])",
            "np.array(list(those.values())) - np.array(list(reference.values()))",
            "only 3 seeds are in both",
        ),
        ("those[seed] - reference[seed]", "reference[seed] - those[seed]", "the sign is flipped"),
        ("sorted(those.keys() & reference.keys())", "[s for s in those if s in reference]", "by rising seed"),
        ("np.array([", "([", "asked for is an array"),
    ],
    ("05", 3): [
        ("updates * (lengths.median() / lengths).clamp(max=1)", "updates", "plain mean"),
        (".clamp(max=1)", "", "lengthen updates"),
        ("lengths.median()", "lengths.mean()", "take the median"),
        (
            "updates * (lengths.median() / lengths).clamp(max=1)",
            "updates.clamp(-lengths.median(), lengths.median())",
            "clip each number by itself",
        ),
        (".mean(0)", ".sum(0)", "this is the sum"),
        ("return (updates *", "return (updates.mul_(1) * 0.5 *", "your mean has the length"),
    ],
    ("05", 4): [
        (
            "(both - none) - (first - none) - (second - none)",
            "(first - none) + (second - none) - (both - none)",
            "flipped",
        ),
        ("(both - none) - (first - none) - (second - none)", "both - none", "take off what each part"),
        ("(both - none) - (first - none) - (second - none)", "both - first - second", "compared with none"),
        ("(both - none) - (first - none) - (second - none)", "both - min(first, second)", "the worse part only"),
    ],
}

# Answers that are wrong in every exercise, in place of the TODO, and what is said to them.
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


def verdicts(printed, number):
    """What a check said: one line that begins with the number of the exercise."""
    lines = [line for line in printed.splitlines() if line.startswith("Exercise ")]
    assert len(lines) == 1, printed
    assert lines[0].startswith(f"Exercise {number}: "), printed
    return lines[0].removeprefix(f"Exercise {number}: ")


@pytest.fixture(params=SOLUTIONS, ids=lambda file: file.stem)
def file(request):
    return request.param


def test_every_notebook_has_exercises_and_solutions():
    names = {source.name for source in paths.NOTEBOOKS.glob("0[0-5]_*.ipynb")}
    assert len(names) == 6
    assert {file.name for file in SOLUTIONS} == names
    assert {file.name for file in FOLDER.glob("*.ipynb")} == names


def test_the_students_version_is_what_the_script_makes(file):
    made = build.student(nbformat.read(file, as_version=4))
    assert nbformat.writes(made) == (FOLDER / file.name).read_text(encoding="utf-8").rstrip("\n"), (
        "edit exercises/solutions/, then run: python exercises/build.py"
    )
    text = nbformat.writes(made)
    assert "SOLUTION" not in text
    assert all(cell.source not in text for cell in tagged(nbformat.read(file, as_version=4), "answer"))


def test_three_to_six_exercises_each_with_prose_todo_check_and_wrong_answers(file):
    cells = build.student(nbformat.read(file, as_version=4)).cells
    kinds = [next(iter(cell.metadata.get("tags", [])), cell.cell_type) for cell in cells]
    n = kinds.count("solution")
    assert 3 <= n <= 6
    assert kinds.count("check") == n
    assert all(kinds[i + 1] == "check" for i, kind in enumerate(kinds) if kind == "solution")
    assert all("**Write**" in _prose_before(cells, i) for i, kind in enumerate(kinds) if kind == "solution")
    headings = [line for cell in cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    numbers = [int(found[1]) for line in headings if (found := re.match(r"## (\d)\. \w", line))]
    assert numbers == list(range(1, n + 1))
    assert {number for notebook, number in WRONG if notebook == file.stem[:2]} == set(numbers)


def _prose_before(cells, i):
    """The text between this cell and the code cell before the last text."""
    while cells[i - 1].cell_type == "code":
        i -= 1
    return cells[i - 1].source


def test_links_lead_somewhere(file):
    for notebook in (file, FOLDER / file.name):
        for cell in nbformat.read(notebook, as_version=4).cells:
            for link in re.findall(r"\]\(([^)#:]+)\)", cell.source if cell.cell_type == "markdown" else ""):
                assert (notebook.parent / link).exists(), f"{notebook.name}: {link}"


def test_solutions_run_to_their_end_and_pass(file):
    notebook, namespace, number = nbformat.read(file, as_version=4), {}, 0
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            printed = run(cell.source, namespace, f"cell {i}")
            if "check" in cell.metadata.get("tags", []):
                number += 1
                assert verdicts(printed, number) == "ok"
    assert number == len(tagged(notebook, "solution"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_untouched_and_wrong_answers_are_told_what_is_wrong(file):
    """The student's notebook from beginning to end, with every exercise tried in several wrong ways."""
    solution = tagged(nbformat.read(file, as_version=4), "solution")
    notebook, namespace, number = build.student(nbformat.read(file, as_version=4)), {}, 0
    missed = []
    for i, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code":
            printed = run(cell.source, namespace, f"cell {i}")
        if "solution" in tags:
            todo = cell.source
        if "check" not in tags:
            continue
        number += 1
        assert verdicts(printed, number) == checks.UNDONE
        tried = [(todo.replace("raise NotImplementedError", code), says) for code, says in ALWAYS_WRONG.items()]
        for old, new, says in WRONG[file.stem[:2], number]:
            right = solution[number - 1].source
            assert old in right, f"exercise {number}: {old!r} is no longer in the solution"
            tried.append((right.replace(old, new), says))
        for code, says in tried:
            trial = dict(namespace)
            run(code, trial)
            said = verdicts(run(cell.source, trial), number)
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


def test_the_plan_names_cells_and_exercises_that_exist_and_its_minutes_add_up():
    plan = (paths.ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
    headings, exercises = {}, set()
    for file in SOLUTIONS:
        source = nbformat.read(paths.NOTEBOOKS / file.name, as_version=4)
        text = "\n".join(cell.source for cell in source.cells if cell.cell_type == "markdown")
        headings[file.stem[:2]] = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        exercises |= {
            f"{file.stem[:2]}.{i + 1}" for i in range(len(tagged(nbformat.read(file, as_version=4), "check")))
        }
    shown = re.findall(r"\b(0\d) “([^”]+)”", plan)
    assert len(shown) > 10
    assert [(number, title) for number, title in shown if title not in headings[number]] == []
    assert set(re.findall(r"\b0[0-4]\.\d\b", plan)) <= exercises
    for section, total in (("Two hours", 120), ("45 minutes", 45), ("Half a day", 240)):
        part = plan.split(f"## {section}")[1].split("\n## ")[0]
        spans = [(int(a), int(b)) for a, b in re.findall(r"^\| (\d+)–(\d+) \|", part, re.MULTILINE)]
        assert spans[0][0] == 0
        assert spans[-1][1] == total
        assert all(before[1] == after[0] for before, after in pairwise(spans))


def test_an_answer_may_be_as_odd_as_it_likes(capsys):
    def deep():
        raise RuntimeError("a long story\nin several lines " + 500 * "x")

    assert not checks.report(1, lambda: deep())
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "`deep`" in said
    assert len(said) < 400
    assert not checks.report(2, lambda: 1 / 0)
    assert "have you run the cells above" in capsys.readouterr().out
    assert checks.report(3, lambda: None)
    assert capsys.readouterr().out == "Exercise 3: ok\n"


def test_a_marked_block_must_be_where_its_tag_is():
    cell = nbformat.v4.new_code_cell("def f():\n    # BEGIN SOLUTION\n    return 1\n    # END SOLUTION")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    with pytest.raises(ValueError, match="expected 0"):
        build.student(notebook)
    cell.metadata["tags"] = ["solution"]
    assert build.student(notebook).cells[0].source.endswith("    raise NotImplementedError")
    cell.source = "def f():\n    return 1"
    with pytest.raises(ValueError, match="expected 1"):
        build.student(notebook)


def test_the_exercises_stay_small():
    files = [file for file in FOLDER.rglob("*") if file.suffix in (".ipynb", ".py")]
    assert sum(file.stat().st_size for file in files) <= LIMIT_KB * 1024
