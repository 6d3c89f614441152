"""Evasion attacks: against another implementation, example by example, and on models whose answer is known."""

import numpy as np
import pytest
import torch
from torch import nn

from medsec.core.errors import InputError
from medsec.evasion import attacks as adv
from medsec.evasion import libraries as library
from medsec.nets.models import SmallResNet

EPS = 8 / 255


@pytest.fixture(scope="module")
def model():
    """Trained for a moment on a task with texture, so that its gradients are those of a classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SmallResNet(1, 3)
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for step in range(40):
            x, y = batch(48, seed=step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval()


def batch(n=24, seed=100, classes=3):
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=rng)
    waves = torch.stack([torch.sin((k + 1) * torch.arange(16) * 0.8) for k in range(classes)])
    x = 0.5 + 0.05 * waves[y][:, None, None, :] + 0.1 * torch.randn(n, 1, 16, 16, generator=rng)
    return x.clamp(0, 1), y


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(weight, bias=0.0):
    """Two classes; the second wins where weight · x + bias > 0."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(weight.numel(), 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([torch.zeros_like(weight.flatten()), weight.flatten()]))
        net[1].bias.copy_(torch.tensor([0.0, bias]))
    return net.eval()


# Against adversarial-robustness-toolbox -------------------------------------------------------------------------------


def same(ours, theirs, share=1.0):
    """Nearly equal: a sign of a gradient that is almost 0 may differ in single pixels."""
    agree = np.isclose(ours.numpy(), theirs, atol=1e-5).mean()
    return agree >= share - 1e-3


def test_mi_fgsm_is_the_toolboxs_example_by_example(model):
    from art.attacks.evasion import MomentumIterativeMethod

    x, y = batch()
    attack = MomentumIterativeMethod(
        library.oracle(model, (1, 16, 16), 3), eps=EPS, eps_step=EPS / 10, decay=1.0, max_iter=10, verbose=False
    )
    ours = adv.mi_fgsm(model, x, y, EPS, rng())
    assert same(ours, attack.generate(x.numpy(), np.eye(3)[y]), 0.99)
    assert not same(ours, adv.bim(model, x, y, EPS, steps=10, step=0.1), 0.99), "the momentum changes something"
    without = adv.mi_fgsm(model, x, y, EPS, rng(), decay=0.0)
    assert same(without, adv.bim(model, x, y, EPS, steps=10, step=0.1), 0.99)


def test_an_attack_made_to_transfer_step_by_step(model):
    """Momentum, smaller copies and the mean loss of two networks, written out once more for a single image."""
    other = SmallResNet(1, 3).eval()
    x, y = batch(1)
    both = nn.ModuleList([model, other])
    ours = adv.mi_fgsm(both, x, y, EPS, rng(5), steps=4, decay=0.7, diverse=0.5, smallest=0.6)
    draws, at, total = rng(5), x.clone(), torch.zeros_like(x)
    sides = []
    for _ in range(4):
        leaf = at.clone().requires_grad_()
        seen = leaf
        if torch.rand((), generator=draws) < 0.5:
            side = int(torch.randint(10, 17, (), generator=draws))
            top, left = torch.randint(0, 17 - side, (2,), generator=draws).tolist()
            seen = torch.zeros_like(x)
            small = nn.functional.interpolate(leaf, (side, side), mode="bilinear")
            seen[:, :, top : top + side, left : left + side] = small
            sides.append(side)
        loss = 0.5 * nn.functional.cross_entropy(model(seen), y) + 0.5 * nn.functional.cross_entropy(other(seen), y)
        loss.backward()
        total = 0.7 * total + leaf.grad / leaf.grad.abs().sum() * leaf.numel()
        at = (at + EPS / 4 * total.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    torch.testing.assert_close(ours, at)
    assert sides, "or nothing was made smaller"
    assert len(sides) < 4
    with pytest.raises(InputError, match=r"0 steps, decay 1, diverse 0, smallest 0\.9"):
        adv.mi_fgsm(model, x, y, EPS, rng(), steps=0)


def test_fgsm_is_the_toolboxs(model):
    from art.attacks.evasion import FastGradientMethod

    x, y = batch()
    theirs = FastGradientMethod(library.oracle(model, (1, 16, 16), 3), eps=EPS).generate(x.numpy(), np.eye(3)[y])
    assert same(adv.fgsm(model, x, y, EPS), theirs)


def test_bim_is_the_toolboxs_example_by_example(model):
    from art.attacks.evasion import BasicIterativeMethod

    x, y = batch()
    attack = BasicIterativeMethod(
        library.oracle(model, (1, 16, 16), 3), eps=EPS, eps_step=EPS / 4, max_iter=10, verbose=False
    )
    theirs = attack.generate(x.numpy(), np.eye(3)[y])
    ours = adv.bim(model, x, y, EPS, steps=10, step=0.25)
    for i in range(len(x)):
        assert same(ours[i], theirs[i], 0.98), i
    with torch.no_grad():
        assert torch.equal(model(ours).argmax(1), model(torch.from_numpy(theirs)).argmax(1))


@pytest.mark.parametrize("classes", [2, 3])
def test_deepfool_is_the_toolboxs_example_by_example(model, classes):
    from art.attacks.evasion import DeepFool

    x, y = batch(classes=classes)
    net = model if classes == 3 else two_classes(model)
    attack = DeepFool(library.oracle(net, (1, 16, 16), classes), max_iter=50, epsilon=0.02, verbose=False)
    theirs = torch.from_numpy(attack.generate(x.numpy()))
    ours = adv.deepfool(net, x, y, norm="l2")
    ours_norm, theirs_norm = ((found - x).flatten(1).norm(dim=1) for found in (ours, theirs))
    torch.testing.assert_close(ours_norm, theirs_norm, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def two_classes(model):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x)[:, :2]

    return Two().eval()


# On models whose answer is known --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_deepfool_finds_the_distance_to_a_plane(norm):
    weight = torch.linspace(-1, 1.5, 64).view(1, 1, 8, 8)
    x = torch.full((1, 1, 8, 8), 0.5)
    net = linear(weight, bias=-float((weight * x).sum()) - 0.3)  # 0.3 below the boundary
    found = adv.deepfool(net, x, torch.tensor([0]), norm=norm)
    distance = 0.3 / (weight.norm() if norm == "l2" else weight.abs().sum())
    change = (found - x).flatten()
    length = change.norm() if norm == "l2" else change.abs().max()
    assert float(length) == pytest.approx(1.02 * float(distance), rel=1e-3)
    assert net(found).argmax(1).item() == 1


def test_an_attack_stays_in_its_ball_and_in_the_range(model):
    x, y = batch()
    x = x.round()  # corners of the range
    for found in (
        adv.noise(model, x, y, EPS, rng()),
        adv.fgsm(model, x, y, EPS),
        adv.bim(model, x, y, EPS, steps=5, step=0.5),
        adv.pgd(model, x, y, EPS, rng(), steps=5, step=0.5, loss=adv.margin),
        adv.capped(x, adv.deepfool(model, x, y, norm="linf"), EPS),
    ):
        assert float((found - x).abs().max()) <= EPS + 1e-6
        assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert torch.equal(adv.pgd(model, x, y, 0.0, rng(), steps=2, step=1.0), x)


def test_steps_win_over_noise(model):
    x, y = batch(120)
    with torch.no_grad():
        right = [
            float((model(found).argmax(1) == y).float().mean())
            for found in (
                x,
                adv.noise(model, x, y, EPS, rng()),
                adv.fgsm(model, x, y, EPS),
                adv.pgd(model, x, y, EPS, rng(), steps=20, step=0.25),
            )
        ]
    assert right[0] > 0.8
    assert right[1] > right[2] > right[3]


def test_stopping_early_fools_the_same_examples_with_less(model):
    x, y = batch(60)
    options = {"steps": 20, "step": 0.25}
    whole, stopped = (adv.pgd(model, x, y, EPS / 2, rng(), stop=stop, **options) for stop in (False, True))
    with torch.no_grad():
        wrong = [model(found).argmax(1) != y for found in (whole, stopped)]
    assert not (wrong[0] & ~wrong[1]).any()
    fooled = wrong[0] & wrong[1]
    with torch.no_grad():
        margins = [adv.margin(model(found), y)[fooled].mean() for found in (whole, stopped)]
    assert margins[0] > margins[1]


def test_the_margin_does_not_saturate():
    """A model that is very sure: the cross-entropy has no gradient in float32, the margin has."""
    weight = torch.full((1, 1, 4, 4), 400.0)
    x, y = torch.full((1, 1, 4, 4), 0.9), torch.tensor([1])
    net = linear(weight, bias=-float(weight.sum()) * 0.85)
    by_ce = adv.bim(net, x, y, 0.1, steps=3, step=0.5)
    by_margin = adv.ascend(net, x, y, 0.1, steps=3, step=0.5, loss=adv.margin)
    assert torch.equal(by_ce, x)
    assert net(by_margin).argmax(1).item() == 0


def test_margin_by_hand():
    logits, y = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]]), torch.tensor([1, 0])
    assert adv.margin(logits, y).tolist() == [-1, 2]


# Libraries ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
def test_autoattack_is_at_least_as_strong_as_pgd(model, classes):
    x, y = batch(40, classes=classes)
    net = model if classes == 3 else two_classes(model)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    found = library.autoattack(net, x, y, EPS / 2, seed=0, iterations=20, queries=50)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert float((found - x).abs().max()) <= EPS / 2 + 1e-6
    with torch.no_grad():
        left = net(found).argmax(1) == y
        by_pgd = net(adv.pgd(net, x, y, EPS / 2, rng(), steps=20, step=0.25, stop=True)).argmax(1) == y
    assert left.sum() <= by_pgd.sum() + 1
    again = library.autoattack(net, x, y, EPS / 2, seed=0, iterations=20, queries=50)
    assert torch.equal(found, again)


def test_square_needs_no_gradient(model):
    class Rounded(nn.Module):
        """No gradient at all: its logits are rounded."""

        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return (4 * self.inner(x)).round() / 4

    x, y = batch(40)
    net = Rounded().eval()
    with torch.no_grad():
        clean = net(x).argmax(1) == y
        by_pgd = net(adv.bim(net, x, y, 2 * EPS, steps=5, step=0.5)).argmax(1) == y
        by_square = net(library.square(net, x, y, 2 * EPS, seed=0, queries=200)).argmax(1) == y
    assert torch.equal(by_pgd, clean), "a gradient of 0 moves nothing"
    assert by_square.sum() < clean.sum() - 5


def test_cw_finds_a_small_change(model):
    x, y = batch(16)
    found = library.cw_l2(model, x, y, iterations=30, searches=4, lr=0.01)
    with torch.no_grad():
        clean, fooled = model(x).argmax(1) == y, model(found).argmax(1) != y
    assert fooled[clean].float().mean() > 0.8
    norm = (found - x).flatten(1).norm(dim=1)[clean & fooled]
    deepfool = (adv.deepfool(model, x, y, norm="l2") - x).flatten(1).norm(dim=1)[clean & fooled]
    assert norm.median() < 2 * deepfool.median()


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.rand(2, 1, 16, 16) + 0.5}, r"images range from .* scale them to \[0, 1\]"),
        ({"x": torch.rand(2, 16, 16)}, r"images of shape \(2, 16, 16\)"),
        ({"y": torch.tensor([0, 1, 2])}, r"labels of shape \(3,\)"),
        ({"y": torch.tensor([0.0, 1.0])}, r"labels of shape \(2,\), torch.float32"),
        ({"y": torch.tensor([0, -1])}, "labels from -1 to 0"),
        ({"y": torch.tensor([0, 7])}, "labels from 0 to 7, but the model knows the classes 0 to 2"),
        ({"eps": -0.1}, r"eps -0.1: must be in \[0, 1\]"),
        ({"eps": 4.0}, "4/255 is 0.0157"),
    ],
)
def test_bad_input_is_named(model, change, message):
    given = {"x": torch.rand(2, 1, 16, 16), "y": torch.tensor([0, 1]), "eps": EPS} | change
    for attack in (
        adv.fgsm,
        lambda m, x, y, eps: adv.bim(m, x, y, eps, steps=2, step=0.5),
        lambda m, x, y, eps: adv.pgd(m, x, y, eps, rng(), steps=2, step=0.5),
        lambda m, x, y, eps: library.square(m, x, y, eps, seed=0, queries=5),
        lambda m, x, y, eps: library.autoattack(m, x, y, eps, seed=0, iterations=2, queries=5),
    ):
        with pytest.raises(InputError, match=message):
            attack(model, **given)


def test_training_mode_steps_and_norms_are_named(model):
    x, y = batch(2)
    with pytest.raises(InputError, match=r"training mode.*model.eval\(\)"):
        adv.fgsm(SmallResNet(1, 3).train(), x, y, EPS)
    with pytest.raises(InputError, match=r"0 steps of 0.5 eps"):
        adv.bim(model, x, y, EPS, steps=0, step=0.5)
    with pytest.raises(InputError, match="norm 'l1': must be l2 or linf"):
        adv.deepfool(model, x, y, norm="l1")
    with pytest.raises(InputError, match=r"0 steps, overshoot 0\.02"):
        adv.deepfool(model, x, y, norm="l2", steps=0)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
def test_a_step_that_is_no_length_is_named(model, wrong):
    """Else the examples would be NaN, and count as wrong answers."""
    x, y = batch(2)
    with pytest.raises(InputError, match=f"steps of {wrong:g} eps"):
        adv.pgd(model, x, y, EPS, rng(), steps=2, step=wrong)
    with pytest.raises(InputError, match=f"decay {wrong:g}"):
        adv.mi_fgsm(model, x, y, EPS, rng(), decay=wrong)
    with pytest.raises(InputError, match=f"overshoot {wrong:g}"):
        adv.deepfool(model, x, y, norm="linf", overshoot=wrong)
