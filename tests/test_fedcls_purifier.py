"""The federation of classifiers against plain FedAvg, its measures, and the purifiers against closed forms."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from medsec.core.errors import InputError
from medsec.core.seeds import torch_generator
from medsec.core.settings import FedClsParams, PurifierParams
from medsec.federated import classifier as fedcls
from medsec.inversion import purifier
from medsec.nets import convnet

SETTINGS = FedClsParams(width=4, n_clients=2, images_per_client=12, rounds=2, batch=4, lr=0.05, momentum=0.9)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


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
            "auc": roc_auc_score(labels, score),
            "macro_f1": f1_score(labels, called, average="macro"),
            "balanced_accuracy": balanced_accuracy_score(labels, called),
        }
    )
    assert 0.8 < found["macro_f1"] < 1


def pairs(n=200, noise=0.1):
    """Smooth images and the same with noise."""
    coarse = torch.rand(n, 1, 3, 3, generator=rng(1))
    clean = F.interpolate(coarse, (8, 8), mode="bilinear", align_corners=True)
    return clean + noise * torch.randn(clean.shape, generator=rng(2)), clean


def test_the_wiener_filter_is_ridge_regression():
    changed, clean = pairs()
    a, b = changed.flatten(1).double().numpy(), clean.flatten(1).double().numpy()
    strength = 0.01 * ((a - a.mean(0)) ** 2).sum(0).mean()
    expected = Ridge(alpha=strength).fit(a, b).predict(a).clip(0, 1)
    np.testing.assert_allclose(purifier.wiener(changed, clean, 0.01)(changed).flatten(1), expected, atol=1e-5)


def test_a_purifier_removes_what_can_be_removed():
    """An offset goes entirely; noise goes in part; of an image that says nothing the mean is left."""
    params = PurifierParams(images=64, width=8, epochs=20, batch=32, lr=3.0e-3)
    changed, clean = pairs()
    for made, bound in ((clean + 0.3, 1e-4), (changed, 0.3 * 0.1**2)):
        purify, name = purifier.fit(made[:150], clean[:150], params, 0)
        assert name in ("wiener", "network")
        assert F.mse_loss(purify(made[150:]), clean[150:]) < bound
    blind, _ = purifier.fit(torch.zeros_like(clean[:150]), clean[:150], params, 0)
    assert F.mse_loss(blind(torch.zeros_like(clean[150:])), clean[150:]) < 1.1 * F.mse_loss(
        clean.mean(0).expand(50, -1, -1, -1), clean[150:]
    )
    same, name = purifier.fit(clean[:150], clean[:150], params, 0)
    assert F.mse_loss(same(clean[150:]), clean[150:]) < 1e-6
    state = torch.get_rng_state()
    again, _ = purifier.fit(changed[:150], clean[:150], params, 0)
    assert torch.equal(again(changed), purifier.fit(changed[:150], clean[:150], params, 0)[0](changed))
    assert torch.equal(state, torch.get_rng_state())


def test_purifiers_need_pairs():
    changed, clean = pairs()
    for a, b in ((changed[:10], clean[:9]), (changed[:4], clean[:4]), (changed[:, 0], clean[:, 0])):
        with pytest.raises(InputError, match="must be the same"):
            purifier.fit(a, b, PurifierParams(images=64, width=2, epochs=1, batch=4, lr=1e-3), 0)
