"""Three classes of which one is rare: no measure and no figure fails late, and a cohort too small is refused at once."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import params
from experiments.adversarial_pruning_defense import arms as evasion_arms
from experiments.backdoor_fedgan import cells as fedgan_eval
from experiments.gia_defense import cells as inversion_eval
from experiments.threat_matrix import cells as matrix_eval
from medsec import data
from medsec.core import paths
from medsec.core.errors import InputError
from medsec.data import folder
from medsec.evidence import cells
from medsec.nets import fit
from medsec.nets.models import SmallResNet


def written(write_npz, place, train=400, rare=0.05):
    """An npz with 80 %, 15 % and the rest of three classes; the last one last."""
    content = {}
    for split, n in (("train", train), ("val", 40), ("test", 120)):
        cuts = [int(0.8 * n), n - max(1, round(rare * n))]
        content[f"{split}_labels"] = np.searchsorted(cuts, np.arange(n), side="right").astype(np.uint8)
        content[f"{split}_images"] = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    return write_npz(place, name="uneven.npz", **content)


def with_file(file, **change):
    tree = params.merge(params.load().model_dump(), {"cohorts": {"npz": {"path": str(file)}}})
    return params.validate(params.merge(tree, change))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory, write_npz):
    return written(write_npz, tmp_path_factory.mktemp("uneven"), rare=0.02)


@pytest.mark.fuzz
@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(1, 20), st.integers(0, 2**31 - 1))
def test_every_class_is_among_the_first(labels, n, seed):
    labels = torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    found = fit.with_every_class(order, labels, n)
    assert sorted(found.tolist()) == list(range(len(labels)))
    front = max(n, len(labels.unique()))
    assert set(labels[found[:front]].tolist()) == set(labels.tolist())
    if set(labels[order[:n]].tolist()) == set(labels.tolist()):
        assert torch.equal(found, order)  # nothing lacked, nothing moves


def test_the_first_test_images_have_the_last_class_in_every_draw(uneven):
    """Notebook 04 shows the first eight, and maps of those of the last class."""
    lacked = 0
    for seed in range(8):
        p = with_file(uneven, seeds={"tuning": [seed + 100], "evaluation": [0]})
        labels = torch.from_numpy(data.load("npz", p.cohorts)["test"].labels)
        plain = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        lacked += 2 not in labels[plain[: evasion_arms.FIRST]]
        assert set(evasion_arms.prepare("npz", p).splits["test"][1][: evasion_arms.FIRST].tolist()) == {0, 1, 2}
    assert lacked > 4  # a plain draw mostly has none


@pytest.mark.parametrize(
    ("change", "name"),
    [({"test_images": 2}, "evasion.test_images"), ({"attacks": {"slow_images": 1}}, "evasion.attacks.slow_images")],
)
def test_too_few_test_images_are_refused_before_training(uneven, change, name):
    with pytest.raises(
        InputError, match=rf"{name} leaves \d test images of npz without class .*; raise it to 8 or more"
    ):
        evasion_arms.prepare("npz", with_file(uneven, evasion=change))


def test_labels_to_draw_hold_every_class(uneven):
    """A classifier is trained on what a GAN draws: a class that none was drawn of would end it after the training."""
    labels = torch.tensor([0] * 997 + [1, 1, 2])
    setup = type("Setup", (), {"splits": {"reference": (None, labels)}})
    for seed in range(10):
        assert set(fedgan_eval.reference_labels(setup, 100, seed).tolist()) == {0, 1, 2}


def never(*_):
    raise AssertionError("something was trained")


@pytest.mark.parametrize("evaluated", [fedgan_eval, inversion_eval, matrix_eval])
def test_all_that_a_cohort_lacks_is_said_before_any_cell_runs(tmp_path, write_npz, evaluated, monkeypatch):
    p = with_file(written(write_npz, tmp_path, train=100))
    monkeypatch.setattr(cells.parallel, "run_cells", never)
    with pytest.raises(InputError) as caught:
        cells.run(evaluated.EXPERIMENT, "npz", p, evaluated.quick(p))
    message, lacking = str(caught.value), []
    if evaluated is fedgan_eval:
        lacking = [rf"split {name} has [1-9]\d images" for name in ("reference", "client", "public")]
        lacking.append("or raise fedgan.measure.threshold_fpr")
        lacking += ["raise cohorts.npz.shares.reference", "raise cohorts.npz.shares.client"]
    else:
        lacking = [
            r"seed \d: client \d holds a single image of class 2",
            r"split public has \d\d images",
            "lower n_clients",
        ]
    assert message.startswith("cohort npz is too small: ")
    assert message.isprintable()
    assert all(re.search(text, message) for text in lacking), message


def test_the_page_on_own_images_says_how_many_are_needed():
    """With the shares and parameters of params.yaml, of two classes alike and one image a patient."""
    p = params.load()
    shares, rate = p.cohorts.folder.shares, math.ceil(1 / p.fedgan.measure.threshold_fpr)
    needed = {"client": SmallResNet.n_features + 1, "reference": SmallResNet.n_features + 1, "public": rate}
    number = max(math.ceil(least / getattr(shares, split)) for split, least in needed.items())
    page = (paths.ROOT / "docs" / "bring-your-own-images.md").read_text(encoding="utf-8")
    assert f"**{number} images**" in page
    for n, enough in ((number, True), (number - 20, False)):
        split = folder.draw_splits([f"p{i}" for i in range(n)], np.arange(n) % 2, shares, p.cohorts.folder.seed)
        counts = dict(zip(data.SPLITS, np.bincount(split), strict=True))
        assert all(counts[name] >= least for name, least in needed.items()) == enough
