"""An attack of one's own on trial: attacks of known strength, one that is none, ones that break the rules."""

import copy
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from medsec.__main__ import main
from medsec.core.errors import InputError
from medsec.evasion.attacks import ATTACKS, ascend, fgsm, margin, pgd
from medsec.judge import paired
from medsec.judge.attack import OWN, REST, judge_attack

SIDE, N, EPS = 6, 80, 8 / 255
PIXELS = 3 * SIDE * SIDE
MOST = 16 / 255  # distance to the boundary of the farthest image


def linear():
    """Two classes by the sign of w · x + b, so that it is known which images can be turned."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 2))
    w = torch.randn(PIXELS, generator=torch.Generator().manual_seed(1))
    network[1].weight.data.copy_(torch.stack([-w, w]))
    network[1].bias.data.copy_(torch.stack([w.sum(), -w.sum()]) / 2)  # grey lies on the boundary
    return network.eval()


class Hidden(nn.Module):
    """The same network, whose gradient is 0."""

    def __init__(self):
        super().__init__()
        self.inside = linear()

    def forward(self, x):
        return self.inside((x * 255).round() / 255)


@pytest.fixture(scope="module")
def images():
    """Every second image half as far from the boundary as the largest distance, evenly spread; and their classes."""
    w = linear()[1].weight[1].detach()
    y = torch.arange(N) % 2
    distance = torch.linspace(0.02, 1, N) * MOST * (2 * y - 1)
    x = (0.5 + distance[:, None] * w.sign()).view(N, 3, SIDE, SIDE)
    return x, y


def same(model, x, y, eps, generator):
    return x


def small(model, x, y, eps, generator):
    """A gradient's step that is much smaller than allowed."""
    return fgsm(model, x, y, eps / 3)


def through(model, x, y, eps, generator):
    """Made for `Hidden`: the gradient of the network inside."""
    return fgsm(getattr(model, "inside", model), x, y, eps)


def cell(report, part, measure, column="value"):
    table = report.table
    return table[(table["part"] == part) & (table["measure"] == measure)][column].item()


def counts(report, other, part="turned more than by"):
    return [int(count) for count in re.findall(r"\d+(?=[,;])", cell(report, part, other, "note"))]


# What it says ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [same, ATTACKS["noise"]])
def test_what_changes_nothing_or_is_noise_is_no_attack(attack, images):
    report = judge_attack(attack, linear(), *images, eps=EPS)
    assert report.verdict.startswith("It is no attack: it turns no more than random noise")
    assert cell(report, "right answers left", OWN) > 0.9
    assert cell(report, "right answers left", "PGD") < 0.6  # something was there to be found


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_pgd_is_as_strong_as_pgd(norm, images):
    def l2(model, x, y, eps, generator):
        return x - eps * (2 * y - 1)[:, None, None, None] * w.view(1, 3, SIDE, SIDE) / w.norm()

    w = linear()[1].weight[1].detach()
    eps = EPS if norm == "Linf" else EPS * float(w.abs().sum() / w.norm())  # which turns the same images
    report = judge_attack(pgd if norm == "Linf" else l2, linear(), *images, eps=eps, norm=norm)
    assert re.match(r"It is stronger than random noise[^;]*; as strong as PGD", report.verdict)
    assert "It turns no image that nothing else here turns" in report.verdict
    could = (torch.linspace(0.02, 1, N) * MOST < EPS).float().mean()
    assert cell(report, "right answers left", OWN) == pytest.approx(1 - float(could), abs=0.03)
    assert any("without a gradient" in sentence for sentence in report.not_tested) == (norm == "L2")


def test_a_weak_attack_beats_noise_and_nothing_else(images):
    report = judge_attack(small, linear(), *images, eps=EPS)
    assert report.verdict.startswith("It beats random noise and nothing else: it is weaker than PGD, FGSM")
    only, other, both, neither = counts(report, "PGD")
    assert only == 0 < other
    assert only + other + both + neither == cell(report, "turned more than by", "PGD", "n") == N
    assert cell(report, "turned more than by", "PGD", "high") < 0
    assert cell(report, "cost", "size of a change that turns (median)") == pytest.approx(255 * EPS / 3)
    assert cell(report, "cost", "calls of the network an image") == 1


def test_what_an_attack_is_made_for_is_where_it_shows(images):
    report = judge_attack(through, {"plain": linear(), "hidden": Hidden().eval()}, *images, eps=EPS)
    plain, hidden = report.verdict.removeprefix("Against plain: ").split(" Against hidden: ")
    assert "as strong as PGD" in plain
    assert "turns no image that nothing else" in plain
    assert re.match("it is stronger than random noise, PGD, FGSM", hidden)
    alone = counts(report, REST, "hidden: turned more than by")[0]
    assert alone > 0
    assert f"It turns {alone} images that nothing else here turns" in hidden
    examples = report.examples[report.examples["network"] == "hidden"]
    assert (~examples[OWN] & examples[REST]).sum() == alone
    assert cell(report, "hidden: right answers left", OWN) == examples[OWN].mean()
    assert report.to_html().count("<img") == 2


def test_a_network_that_is_not_worth_attacking_proves_nothing(images):
    x, y = images
    large = judge_attack(pgd, linear(), x, y, eps=0.4)
    assert cell(large, "right answers left", OWN) == 0
    assert any("a smaller eps would tell them apart" in sentence for sentence in large.remarks)

    def fragile(x):
        """Brighter than a half is class 1; in an image that is rough, the other way round."""
        mean = x.mean((1, 2, 3))
        rough = (x - mean[:, None, None, None]).abs().mean((1, 2, 3)) > EPS / 2
        return ((mean - 0.5) * torch.where(rough, -1, 1))[:, None] * torch.tensor([-1.0, 1.0])

    smooth = (0.4 + 0.2 * y)[:, None, None, None].expand_as(x)
    broken = judge_attack(pgd, fragile, smooth, y, eps=EPS)
    assert cell(broken, "right answers left", "random noise") == 0
    assert broken.verdict.startswith("This proves nothing: random noise alone already breaks the network")

    assert "not clearly better than guessing" in judge_attack(pgd, linear(), x, 1 - y, eps=EPS).verdict
    constant = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 2)).eval()
    nn.init.zeros_(constant[1].weight)
    assert "every image the same answer" in judge_attack(pgd, constant, x, y, eps=EPS).verdict
    far = judge_attack(same, linear(), x, y, eps=EPS / 100)
    assert far.verdict.startswith("This proves nothing: neither it nor PGD clearly turns more")


@pytest.mark.parametrize(("steps", "starts"), [(1, "1 more start "), (45, "3 more starts "), (300, "10 more starts ")])
def test_pgd_may_ask_as_often(steps, starts, images):
    def long(model, x, y, eps, generator):
        return ascend(model, x, y, eps, steps=steps, step=1.0)

    assert f"PGD from {starts}included" in judge_attack(long, linear(), *images, eps=EPS, attacked=30).verdict


def test_few_images_leave_it_open(images):
    x, y = images
    report = judge_attack(lambda m, x, y, eps, _: fgsm(m, x, y, 0.8 * eps), linear(), x, y, eps=EPS, attacked=20)
    assert "whether it is stronger or weaker than PGD, FGSM" in report.verdict
    assert any("20 are few" in sentence for sentence in report.remarks)


def test_the_interval_of_a_paired_difference_covers():
    """By simulation; and it is the mirror image where the two are exchanged."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(200):
        only, other, _ = rng.multinomial(60, [0.2, 0.05, 0.75])
        found, low, high = paired(int(only), int(other), 60)
        assert low <= found <= high
        np.testing.assert_allclose(paired(int(other), int(only), 60), (-found, -high, -low), atol=1e-6)
        inside += low <= 0.15 <= high
    assert 180 <= inside < 200
    assert paired(5, 0, 5)[2] == 1
    assert paired(0, 5, 5)[1] == -1


def test_a_network_that_answers_at_random_is_no_fault_of_the_attack(images):
    noisy = linear()
    network = nn.Sequential(nn.Dropout(0.0), noisy).eval()
    network.forward = lambda x: noisy(x + 0.001 * torch.randn_like(x))
    report = judge_attack(lambda m, x, y, eps, _: fgsm(m, x, y, eps), network, *images, eps=EPS)
    assert "stronger than random noise" in report.verdict
    assert any("does not answer twice alike" in sentence for sentence in report.remarks)


# What it refuses -------------------------------------------------------------------------------------------------------


def cheat(model, x, y, eps, generator):
    return fgsm(model, x, y, 2.5 * eps)


def in_place(model, x, y, eps, generator):
    return x.add_(eps / 2).clamp_(0, 1)


def relabel(model, x, y, eps, generator):
    y.zero_()
    return x


def spoil(model, x, y, eps, generator):
    model[1].bias.data += 1
    return x


def unsettle(model, x, y, eps, generator):
    model.train()
    return x


def swap(model, x, y, eps, generator):
    model.forward = lambda x: torch.zeros(len(x), 2)
    return x


def global_random(model, x, y, eps, generator):
    return (x + eps * torch.rand_like(x)).clamp(0, 1)


def give(change):
    return lambda model, x, y, eps, generator: change(x)


@pytest.mark.parametrize(
    ("attack", "told"),
    [
        (cheat, "in 32 of 32 images it changes a pixel by up to 0.07843, 2.50 times eps (8/255); project"),
        (give(lambda x: x.clamp(max=0.5) - 0.5), "values from -"),
        (give(lambda x: x.where(x < 0.55, torch.nan)), "NaN or infinite values in"),
        (give(lambda x: x[:, :1]), "the attack returns (32, 1, 6, 6) float32"),
        (give(lambda x: x.double()), "float64"),
        (give(lambda x: x.numpy()), "a ndarray, not a tensor"),
        (give(lambda x: None), "a NoneType"),
        (give(lambda x: 1 / 0), "raised ZeroDivisionError"),
        (lambda model, x, y, eps: x, "need attack(model, x, y, eps, generator)"),
        ("pgd", "is of type str"),
        (in_place, "alters the images"),
        (relabel, "alters the labels"),
        (spoil, "alters 1.bias of the network"),
        (unsettle, "leaves the network in training mode"),
        (swap, "makes the network answer the same images differently"),
        (global_random, "draw every random number from generator"),
    ],
)
def test_an_attack_that_breaks_a_rule_is_told_in_a_line(attack, told, images):
    network = linear()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(InputError, match=re.escape(told)) as error:
        judge_attack(attack, network, *images, eps=EPS)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    assert not network.training  # and the network is repaired
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_a_cheat_is_refused_in_the_other_norm_too(images):
    with pytest.raises(InputError, match="an image by a length of up to"):
        judge_attack(fgsm, linear(), *images, eps=EPS, norm="L2")
    with pytest.raises(InputError, match="hidden: the model is in training mode"):
        judge_attack(fgsm, {"plain": linear(), "hidden": Hidden()}, *images)
    for wrong in ({"against": {}}, {"against": linear(), "attacked": 0}):
        with pytest.raises(InputError, match="at least one"):
            judge_attack(fgsm, images=images[0], labels=images[1], **wrong)


def test_it_repeats_and_leaves_no_trace(images):
    network = linear()
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    first = judge_attack(pgd, network, *images, eps=EPS, attacked=20)
    assert torch.rand(1) == drawn
    assert not network._forward_pre_hooks
    assert all(p.requires_grad for p in network.parameters())
    again = judge_attack(pgd, network, *images, eps=EPS, attacked=20)
    pd.testing.assert_frame_equal(first.examples, again.examples)


@pytest.mark.parametrize("change", [lambda m: m.forward, torch.jit.script, lambda m: copy.deepcopy(m).double()])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_it_takes_a_model_as_it_is(change, images):
    def steps(model, x, y, eps, generator):
        return ascend(model, x, y, eps, steps=4, loss=margin)

    report = judge_attack(steps, change(linear()), *images, eps=EPS)
    assert "as strong as PGD" in report.verdict
    assert cell(report, "cost", "calls of the network an image") == 4


# The command -----------------------------------------------------------------------------------------------------------


MINE = """
import torch
from torch import nn


def attack(model, x, y, eps, generator):
    return (x + eps * torch.where(y == 0, 1, -1)[:, None, None, None]).clamp(0, 1)


def make():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)).eval()
    for k, sign in enumerate((-1.0, 1.0)):  # brighter than a half: class 1
        nn.init.constant_(model[2].weight[k], sign)
        nn.init.constant_(model[2].bias[k : k + 1], -sign / 2)
    return model


def far(model, x, y, eps, generator):
    return 1 - x
"""


def test_the_command_judges_an_attack(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    bright = np.linspace(0.3, 0.7, 60, dtype=np.float32)
    np.savez("mine.npz", images=np.tile(bright[:, None, None, None], (1, 1, 8, 8)), labels=(bright > 0.5).astype(int))
    asked = ["judge", "attack", "mine.py:attack", "--against", "mine.py:make", "--data", "mine.npz", "--eps", "0.1"]
    assert main([*asked, "--out", "r.html", "--examples", "e.csv"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("It is stronger than random noise")
    assert "mine.py:attack" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert len(pd.read_csv("e.csv")) == 60
    asked[2] = "mine.py:far"
    assert main(asked) == 2
    assert "error: the attack leaves the ball" in capsys.readouterr().err
    assert main([*asked, "--against", "mine.py:make"]) == 2
    assert "two models alike" in capsys.readouterr().err
