"""Server rules work on pieces that fit the cache, sort in float32 and add up in float64; here against plain float64."""

import numpy as np
import pytest
import torch

from medsec.federated import aggregators as agg
from medsec.federated.rounds import Update


def sent(n, size=3 * agg.CHUNK + 5, ratio=1.0, outlier=1.0):
    """n updates around common weights, ``ratio`` the size of an update to that of the weights; the first is farther out."""
    rng = np.random.default_rng(n)
    middle = rng.standard_normal(size)
    steps = ratio * rng.standard_normal((n, size)) * (1 + 0.1 * np.arange(n)[:, None])
    steps[0] *= outlier
    rows = (middle + steps).astype(np.float32)
    return [Update(i, {"w": torch.from_numpy(row), "n": torch.tensor(i)}, 10 + i) for i, row in enumerate(rows)]


def stacked(updates):
    return np.stack([update.state["w"].numpy() for update in updates]).astype(np.float64)


@pytest.mark.parametrize("n", [3, 4, 9, 64])
def test_means_and_medians_have_the_bits_of_float64(n):
    updates, rows = sent(n), stacked(sent(n))
    weights = np.array([update.n_samples for update in updates], dtype=np.float64)
    trim = (n - 1) // 2
    expected = {
        agg.fedavg(updates)[0]["w"]: sum(w * row for w, row in zip(weights / weights.sum(), rows, strict=True)),
        agg.median(updates)[0]["w"]: np.median(rows, axis=0),
        agg.trimmed_mean(updates, trim=trim)[0]["w"]: np.sort(rows, axis=0)[trim : n - trim].mean(0),
    }
    for found, by_hand in expected.items():
        assert np.array_equal(found.numpy(), by_hand.astype(np.float32))
    assert agg.median(updates)[0]["n"] == round((n - 1) / 2)


@pytest.mark.parametrize("ratio", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("outlier", [1.0, 10.0, 1e4])
@pytest.mark.parametrize("n", [5, 16])
def test_krum_measures_right_however_small_the_updates_and_however_far_an_attacker(n, outlier, ratio):
    """Distances by subtraction, in float64. An uncentred Gram matrix in float32 chooses wrongly from 1e-3 on."""
    updates, rows = sent(n, ratio=ratio, outlier=outlier), stacked(sent(n, ratio=ratio, outlier=outlier))
    distance = np.square(rows[:, None] - rows[None]).sum(2)
    np.fill_diagonal(distance, np.inf)
    by_hand = np.sort(distance, axis=1)[:, : n - 1 - 2].sum(1)
    found = agg.krum_scores(updates, 1)
    np.testing.assert_allclose(found, by_hand, rtol=1e-9)
    assert found.argmin() == by_hand.argmin()
    assert (agg.krum_scores([*updates[:2], *updates[:2], *updates[:2]], 1) >= 0).all(), (
        "equal updates are at distance 0"
    )
