"""Networks of every size; a classifier that learns, repeats itself and is scored as scikit-learn would; a federation of them."""

import copy
import random

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from torch import nn

from medsec.core.errors import InputError
from medsec.core.seeds import torch_generator
from medsec.core.settings import ClassifierParams, FedClsParams
from medsec.federated import classifier as fedcls
from medsec.nets import convnet, models
from medsec.nets import fit as classifier
from medsec.nets.models import Discriminator, Generator, SmallResNet, doublings

PARAMS = ClassifierParams(lr=2e-3, weight_decay=5e-4, batch=32, shift=2)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


# -------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(("size", "n"), [(28, 2), (32, 2), (36, 2), (56, 3), (64, 3), (96, 3), (128, 4), (224, 5)])
def test_doublings(size, n):
    assert doublings(size) == n
    assert size % 2**n == 0
    assert 7 <= size // 2**n <= 24


@pytest.mark.parametrize("size", [29, 30, 1, 63])
def test_sizes_that_cannot_be_doubled(size):
    with pytest.raises(ValueError, match=f"size {size} must be a multiple of 4"):
        doublings(size)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [28, 32, 64, 224])
def test_shapes_and_ranges(size, channels, classes):
    g = seeded(lambda: Generator(size, channels, classes, z_dim=5, width=2))
    d = seeded(lambda: Discriminator(size, channels, classes, width=2))
    r = seeded(lambda: SmallResNet(channels, classes))
    y = torch.arange(4) % classes
    for train in (True, False):
        images = g.train(train)(20 * torch.randn(4, 5, generator=rng()), y)
        assert images.shape == (4, channels, size, size)
        assert images.dtype == torch.float32
        assert 0 <= images.min() < images.max() <= 1
        logits = d.train(train)(images, y)
        assert logits.shape == (4,)
        assert torch.isfinite(logits).all()
        assert r.train(train)(images).shape == (4, classes)
        assert r.features(images).shape == (4, SmallResNet.n_features)
    (logits.sum() + r(images).sum()).backward()
    for net in (g, d, r):
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
        assert sum(float(p.grad.abs().sum()) for p in net.parameters()) > 0


def test_pixels_reach_both_ends():
    """The last layer's output, not the range, limits a pixel: strong weights give black and white."""
    g = seeded(lambda: Generator(28, 1, 2, z_dim=4, width=2)).eval()
    with torch.no_grad():
        g.up[-1].weight *= 1e4
        images = g(torch.randn(8, 4, generator=rng()), torch.zeros(8, dtype=torch.long))
    assert images.min() == 0
    assert images.max() == 1


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_label_has_an_effect(classes):
    g = seeded(lambda: Generator(28, 1, classes, z_dim=5, width=4)).eval()
    d = seeded(lambda: Discriminator(28, 1, classes, width=4)).eval()
    y = torch.arange(classes)
    with torch.no_grad():
        images = g(torch.randn(1, 5, generator=rng()).expand(classes, -1), y)
        logits = d(torch.rand(1, 1, 28, 28, generator=rng()).expand(classes, -1, -1, -1), y)
    for i in range(classes):
        for j in range(i):
            assert (images[i] - images[j]).abs().max() > 1e-3
            assert (logits[i] - logits[j]).abs() > 1e-5


def test_the_latent_vector_has_an_effect():
    g = seeded(lambda: Generator(28, 1, 2, z_dim=5, width=4)).eval()
    with torch.no_grad():
        images = g(torch.randn(2, 5, generator=rng()), torch.zeros(2, dtype=torch.long))
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_one_hot_signs():
    assert models.one_hot_signs(torch.tensor([2, 0]), 3).tolist() == [[-1, -1, 1], [1, -1, -1]]


@pytest.mark.parametrize(("channels", "classes"), [(1, 2), (3, 7)])
def test_the_size_of_the_classifier(channels, classes):
    """Convolutions of 3 × 3 (1 × 1 on a skip) without bias, two numbers a map for each normalisation, a linear head."""
    convolutions = 9 * (channels * 16 + 2 * 16 * 16 + 16 * 32 + 32 * 32 + 32 * 64 + 64 * 64) + 16 * 32 + 32 * 64
    normalised = 16 + 2 * 16 + 3 * 32 + 3 * 64
    expected = convolutions + 2 * normalised + 65 * classes
    assert sum(p.numel() for p in SmallResNet(channels, classes).parameters()) == expected


@pytest.mark.parametrize("net", [lambda: Discriminator(28, 1, 2, width=4), lambda: Generator(28, 1, 2, 4, 4)])
def test_networks_are_made_of_plain_layers(net):
    """Normalisation lives inside the model and no layer draws random numbers in the forward pass."""
    assert not [m for m in net().modules() if isinstance(m, nn.Dropout | nn.InstanceNorm2d)]


# ---------------------------------------------------------------------------------------------------------- classifier


def task(n, classes=2, channels=1, size=28, seed=0):
    """Noise with a bright bar whose place is the class."""
    y = torch.arange(n) % classes
    x = 0.5 * torch.rand(n, channels, size, size, generator=rng(seed))
    for k in range(classes):
        x[y == k, :, 6 + 6 * k : 10 + 6 * k] += 0.5
    return x, y


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(("classes", "channels"), [(2, 1), (3, 3)])
def test_it_learns_a_separable_task(classes, channels):
    model = classifier.fit(*task(192, classes, channels), classes, PARAMS, epochs=4, seed=1)
    x, y = task(120, classes, channels, seed=9)
    p = classifier.predict(model, x)
    assert not model.training
    assert p.shape == (120, classes)
    torch.testing.assert_close(p.sum(1), torch.ones(120))
    assert classifier.auc(p, y) > 0.95
    assert classifier.balanced_accuracy(p, y) > 0.85


def test_no_auc_without_a_signal():
    x, y = task(192)
    shuffled = y[torch.randperm(192, generator=rng(5))]
    model = classifier.fit(x, shuffled, 2, PARAMS, epochs=4, seed=1)
    other, truth = task(200, seed=9)
    assert 0.2 < classifier.auc(classifier.predict(model, other), truth[torch.randperm(200, generator=rng(6))]) < 0.8


def test_fit_repeats_itself_and_leaves_the_global_streams_alone():
    x, y = task(50)
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 the global stream is what this test is about
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    first = classifier.fit(x, y, 2, PARAMS, epochs=1, seed=5)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    torch.manual_seed(99)
    assert same_bits(first, classifier.fit(x, y, 2, PARAMS, epochs=1, seed=5))
    assert not same_bits(first, classifier.fit(x, y, 2, PARAMS, epochs=1, seed=6))
    assert torch.equal(x, task(50)[0])


@pytest.mark.parametrize("n", [1, 2, 33])
def test_fit_with_odd_numbers_of_images(n):
    """Fewer than a batch, and one more than a batch."""
    x, y = task(n)
    model = classifier.fit(x, y, min(n, 2), PARAMS, epochs=1, seed=0)
    assert torch.isfinite(classifier.predict(model, x)).all()


def test_a_missing_class():
    x, y = task(20, classes=2)
    with pytest.raises(InputError, match="no image of class 2"):
        classifier.fit(x, y, 3, PARAMS, epochs=1, seed=0)


def test_predictions_and_features_do_not_depend_on_the_batches():
    model = seeded(lambda: SmallResNet(1, 2)).eval()
    x = torch.rand(1001, 1, 28, 28, generator=rng())
    p, f = classifier.predict(model, x), classifier.features(model, x)
    assert p.shape == (1001, 2)
    assert f.shape == (1001, 64)
    with torch.no_grad():
        torch.testing.assert_close(p[499:502], model(x[499:502]).softmax(1))
        torch.testing.assert_close(f[-1:], model.features(x[-1:]))
    assert not p.requires_grad


def test_random_shift():
    x = torch.rand(2, 3, 8, 8, generator=rng())
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    windows = {(dy, dx): padded[:, :, dy : dy + 8, dx : dx + 8] for dy in range(5) for dx in range(5)}
    seen = set()
    generator = rng(1)
    for _ in range(200):
        shifted = classifier.random_shift(x, 2, generator).numpy()
        (place,) = (place for place, window in windows.items() if np.array_equal(window, shifted))
        seen.add(place)
    assert seen == set(windows)
    assert torch.equal(classifier.random_shift(x, 0, generator), x)


# ------------------------------------------------------------------------------------------------------------- scoring


def probabilities(n, classes, seed):
    y = torch.arange(n) % classes
    logits = torch.randn(n, classes, generator=rng(seed)) + 0.8 * nn.functional.one_hot(y, classes)
    return logits.softmax(1), y


@pytest.mark.parametrize("seed", [0, 1])
def test_auc_of_two_classes(seed):
    p, y = probabilities(90, 2, seed)
    positive, negative = p[y == 1, 1].tolist(), p[y == 0, 1].tolist()
    wins = np.mean([(a > b) + (a == b) / 2 for a in positive for b in negative])
    assert classifier.auc(p, y) == pytest.approx(wins, abs=1e-12)
    assert classifier.auc(p, y) == pytest.approx(sklearn.metrics.roc_auc_score(y, p[:, 1]), abs=1e-12)
    assert classifier.auc(p, y.tolist()) == classifier.auc(p, y)
    assert 0.6 < classifier.auc(p, y) < 0.95


@pytest.mark.parametrize("classes", [3, 7])
def test_auc_of_several_classes(classes):
    p, y = probabilities(210, classes, 1)
    expected = sklearn.metrics.roc_auc_score(y, p.double() / p.double().sum(1, keepdim=True), multi_class="ovr")
    assert classifier.auc(p, y) == pytest.approx(expected, abs=1e-6)
    each = [sklearn.metrics.roc_auc_score(y == k, p[:, k]) for k in range(classes)]
    assert classifier.auc(p, y) == pytest.approx(np.mean(each), abs=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_auc_at_the_ends(classes):
    y = torch.arange(21) % classes
    right = nn.functional.one_hot(y, classes).double()
    assert classifier.auc(right, y) == 1
    assert classifier.auc(1 - right, y) == 0
    assert classifier.auc(torch.full((21, classes), 1 / classes), y) == 0.5


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_balanced_accuracy(classes):
    p, y = probabilities(200, classes, 2)
    keep = (y != 0) | (torch.rand(200, generator=rng()) < 0.2)  # class 0 is rare
    p, y = p[keep], y[keep]
    expected = sklearn.metrics.balanced_accuracy_score(y, p.argmax(1))
    assert classifier.balanced_accuracy(p, y) == pytest.approx(expected, abs=1e-6)
    assert classifier.balanced_accuracy(p, y) != pytest.approx(float((p.argmax(1) == y).float().mean()), abs=1e-4)


# ------------------------------------------------------------------------------------------ a federation of classifiers

SETTINGS = FedClsParams(width=4, n_clients=2, images_per_client=12, rounds=2, batch=4, lr=0.05, momentum=0.9)


def plain(model, x, y, round):
    return convnet.gradients(model, x, y)


def clients(sizes=(12, 9)):
    return [torch.rand(n, 1, 8, 8, generator=rng(n)) for n in sizes], [torch.arange(n) % 2 for n in sizes]


def test_the_federation_is_plain_fedavg():
    """Local SGD by autograd's own backward, and a mean weighted by the number of images."""
    images, labels = clients()
    model = convnet.new(8, 1, 2, width=4, seed=0)
    found = fedcls.train(model, images, labels, [plain] * 2, SETTINGS, seed=3)
    state = model.state_dict()
    assert all(torch.equal(found[0][k], v) for k, v in state.items())
    for round in range(2):
        after = []
        for i, (x, y) in enumerate(zip(images, labels, strict=True)):
            local = copy.deepcopy(model)
            local.load_state_dict(state)
            optimizer = torch.optim.SGD(local.parameters(), lr=0.05, momentum=0.9)
            for batch in torch.randperm(len(x), generator=torch_generator(3, "local", i, round)).split(4):
                optimizer.zero_grad()
                F.cross_entropy(local(x[batch]), y[batch]).backward()
                optimizer.step()
            after.append(local.state_dict())
        state = {k: (12 * after[0][k] + 9 * after[1][k]) / 21 for k in state}
        for k, v in state.items():
            torch.testing.assert_close(found[round + 1][k], v, rtol=1e-4, atol=1e-6)


def test_every_client_asks_its_own_defence_once_a_batch():
    images, labels = clients()
    asked = {0: [], 1: []}

    def defence(i):
        def defend(model, x, y, round):
            asked[i].append((round, len(x)))
            return [torch.zeros_like(p) for p in model.parameters()]

        return defend

    model = convnet.new(8, 1, 2, width=4, seed=0)
    found = fedcls.train(model, images, labels, [defence(0), defence(1)], SETTINGS, seed=3)
    assert asked == {0: [(t, n) for t in (0, 1) for n in (4, 4, 4)], 1: [(t, n) for t in (0, 1) for n in (4, 4, 1)]}
    assert all(torch.equal(found[0][k], v) for k, v in found[-1].items()), "zero gradients change nothing"
    with pytest.raises(InputError, match="one each"):
        fedcls.train(model, images, labels, [plain], SETTINGS, seed=3)


class Scores(torch.nn.Module):
    """A model whose probability of class 1 is the image's first pixel."""

    def forward(self, x):
        p = x[:, 0, 0, 0].clamp(1e-6, 1 - 1e-6)
        return torch.stack([(1 - p).log(), p.log()], 1)


def test_utility_chooses_its_threshold_on_val():
    """All scores lie below one half: a threshold of one half would call everybody healthy."""
    labels = torch.arange(60) % 2
    images = torch.zeros(60, 1, 2, 2)
    images[:, 0, 0, 0] = 0.1 + 0.1 * labels + 0.04 * torch.rand(60, generator=rng())
    noisy = images.clone()
    noisy[::7, 0, 0, 0] += 0.1
    found = fedcls.utility(Scores(), (images, labels), (noisy, labels))
    score = noisy[:, 0, 0, 0].numpy()
    threshold = fedcls.best_threshold(images[:, 0, 0, 0].numpy(), labels.numpy())
    assert 0.14 < threshold < 0.2
    called = score > threshold
    assert found == pytest.approx(
        {
            "auc": sklearn.metrics.roc_auc_score(labels, score),
            "macro_f1": sklearn.metrics.f1_score(labels, called, average="macro"),
            "balanced_accuracy": sklearn.metrics.balanced_accuracy_score(labels, called),
        }
    )
    assert 0.8 < found["macro_f1"] < 1
