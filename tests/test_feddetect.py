"""FedDetect against naive replays, the hardened defence on planted patterns, attackers that know it, and odd input."""

import dataclasses
import math
from collections import deque

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.ensemble import IsolationForest

from medsec.backdoor import attackers, feddetect, triggers
from medsec.backdoor.attackers import SCENARIOS, Aware, BackdoorAttack, falsified
from medsec.backdoor.feddetect import (
    ClipThenTrain,
    Described,
    Hardened,
    NormClip,
    Released,
    isolation_flags,
    loss_evidence,
    map_evidence,
    peculiarity,
)
from medsec.core.errors import InputError
from medsec.federated import aggregators
from medsec.federated.aggregators import RootSet
from medsec.federated.rounds import Update
from medsec.nets.models import Generator

SCALE = (0.3, 0.4)
THRESHOLD = float(scipy.stats.norm.ppf(1 - 0.01 / 13))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def state(vector, count=7):
    """A state of two tensors and an integer buffer that holds a vector's values."""
    vector = torch.as_tensor(np.asarray(vector, dtype=np.float32))
    return {"w": vector[1:].reshape(1, -1).clone(), "b": vector[:1].clone(), "count": torch.tensor(count)}


def vector_of(found):
    return np.concatenate([found["b"].numpy(), found["w"].numpy().ravel()])


def updates_of(losses, rows=None, clients=None):
    """One update a loss; ``None`` for a client that reports none."""
    clients = range(len(losses)) if clients is None else clients
    rows = [[c, 1.0, -c] for c in clients] if rows is None else rows
    metrics = [{} if x is None else {"loss_g": x, "last_loss_g": x} for x in losses]
    return [Update(c, state(row), 1 + 50 * c, m) for c, row, m in zip(clients, rows, metrics, strict=True)]


def smooth(m, n, size=28, seed=0, grain=0.02):
    """(m, n, 1, S, S): m clients' smooth images of the same distribution, nearly the same for the same latents."""
    coarse = torch.rand(1, n, 5, 5, generator=rng(seed)) + 0.1 * torch.rand(m, n, 5, 5, generator=rng(seed + 1))
    images = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)[:, :, None]
    return (images + grain * torch.randn(images.shape, generator=rng(seed + 2))).clamp(0, 1)


# ------------------------------------------------------------------------------------------------- released, described


def replay(losses, rows, warm_up, decay=0.9):
    """The released rule in plain Python: a generator of weights, flags and the weighted sum of each round."""
    m = len(losses[0])
    weights, counts = [1 / m] * m, [0] * m
    for t, found in enumerate(losses):
        forest = IsolationForest(max_samples=m, contamination="auto", random_state=999)
        flags = [label == -1 for label in forest.fit_predict([[0.0, abs(x)] for x in found])]
        if t >= warm_up and 0 < sum(flags) < m // 2:
            for i in range(m):
                if flags[i]:
                    counts[i] += 1
                    weights[i] *= decay ** counts[i]
            weights = [w / sum(weights) for w in weights]
        mean = [sum(w * float(row[k]) for w, row in zip(weights, rows[t], strict=True)) for k in range(len(rows[t][0]))]
        yield weights, flags, mean


@pytest.mark.parametrize("m", [4, 9])
def test_released_is_a_naive_replay_of_the_rule(m):
    draw = np.random.default_rng(m)
    losses, rows = draw.normal(1.0, 0.3, (12, m)), draw.normal(size=(12, m, 3)).astype(np.float32)
    losses[:, 1] += 2 * draw.integers(0, 2, 12)
    defence, acted = Released(warm_up=3), 0
    for t, (weights, flags, mean) in enumerate(replay(losses, rows, 3)):
        found, diagnostics = defence(updates_of(losses[t], rows[t]), t)
        assert diagnostics["flagged"] == dict(enumerate(flags))
        assert diagnostics["weights"] == pytest.approx(dict(enumerate(weights)))
        np.testing.assert_allclose(vector_of(found), mean, rtol=1e-5, atol=1e-6)
        assert t >= 3 or weights == [1 / m] * m
        acted += diagnostics["acted"]
    assert acted >= 2, "the rule never acted: nothing was compared"


def test_released_flags_a_low_loss_as_well():
    """The forest looks at how isolated a loss is, not at its sign: an honest client that learns well is punished."""
    low = [1.0, 1.01, 0.99, 0.1]
    assert isolation_flags(low).tolist() == [False, False, False, True]
    assert isolation_flags([-x for x in low]).tolist() == [False, False, False, True]  # |loss|
    _, diagnostics = Released(warm_up=0)(updates_of(low), 0)
    assert diagnostics["acted"]
    assert diagnostics["weights"][3] == pytest.approx(0.9 / 3.9)


def test_half_of_the_clients_flagged_voids_a_round():
    losses = [1.0, 1.01, 2.0, 0.0]
    assert isolation_flags(losses).sum() == 2
    for defence in (Released(warm_up=0), Described(warm_up=0, patience=1)):
        _, diagnostics = defence(updates_of(losses), 0)
        assert sum(diagnostics["flagged"].values()) == 2
        assert diagnostics["weights"] == dict.fromkeys(range(4), 0.25)


def test_released_forgives_nobody():
    """After quiet rounds the weight is what it was, and the next flag costs more than the first: 0.9, then 0.9^2."""
    odd, quiet = [1.0, 1.01, 0.99, 5.0], [1.0] * 4
    assert isolation_flags(quiet).all()  # a void round
    defence, ratios = Released(warm_up=0), []
    for t, losses in enumerate([odd, quiet, quiet, odd, quiet, odd]):
        _, diagnostics = defence(updates_of(losses), t)
        ratios.append(diagnostics["weights"][3] / diagnostics["weights"][0])
    assert ratios == pytest.approx([0.9, 0.9, 0.9, 0.9**3, 0.9**3, 0.9**6])


def test_the_released_detector_accuses_honest_clients_of_four():
    """The flaw: losses are independent and alike, and somebody is flagged in most rounds."""
    rates = feddetect.null_rates(4, 40, 0)
    some = round(40 * rates["any_flag"])
    assert scipy.stats.binomtest(some, 40).proportion_ci(0.99).low > 0.5
    assert rates["fpr"] >= rates["any_flag"] / 4
    assert 0.1 < rates["acts"] <= rates["any_flag"]
    assert feddetect.null_rates(4, 5, 1) == feddetect.null_rates(4, 5, 1)
    assert feddetect.null_rates(2, 5, 1) == {"fpr": 0.0, "any_flag": 0.0, "acts": 0.0}


def odd_one(client):
    """Losses of five clients of which the forest flags one."""
    losses = [1.0, 1.01, 0.99, 1.02, 1.0]
    losses[client] = 5.0
    assert isolation_flags(losses).tolist() == [i == client for i in range(5)]
    return losses


def test_described_blocks_after_a_row_of_flags_for_good():
    defence, shares = Described(warm_up=1, patience=3), []
    voids = {"with 4": [1.0, 1.01, 0.99, 3.0, 5.0], "without 4": [3.0, 5.0, 1.0, 1.01, 0.99]}
    assert [isolation_flags(losses).tolist() for losses in voids.values()] == [
        [False, False, False, True, True],
        [True, True, False, False, False],
    ]
    # The flag of the warm-up does not count; somebody else's turn breaks the row; a void round neither counts nor breaks.
    for t, what in enumerate([4, 4, 4, 3, 4, 4, "with 4", "without 4", 4, 3]):
        _, diagnostics = defence(updates_of(voids[what] if what in voids else odd_one(what)), t)
        shares.append(diagnostics["weights"][4])
    assert shares == pytest.approx([0.2] * 8 + [0.0, 0.0])
    assert diagnostics["weights"] == pytest.approx({0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25, 4: 0.0})
    # If nobody else is present, the blocked count again: there must be some state.
    alone, diagnostics = defence(updates_of([1.0], clients=[4]), 10)
    assert diagnostics["weights"] == {4: 1.0}
    np.testing.assert_array_equal(vector_of(alone), [4.0, 1.0, -4.0])


def test_released_reads_the_last_batch_and_described_the_epoch():
    last, mean = odd_one(4), odd_one(2)
    updates = [
        Update(i, state([i]), 1, {"last_loss_g": a, "loss_g": b})
        for i, (a, b) in enumerate(zip(last, mean, strict=True))
    ]
    flagged = {type(d): d(updates, 0)[1]["flagged"] for d in (Released(0), Described(0, 1))}
    assert [k for k, flag in flagged[Released].items() if flag] == [4]
    assert [k for k, flag in flagged[Described].items() if flag] == [2]


# ------------------------------------------------------------------------------------------------------------- NormClip


@pytest.mark.parametrize(("m", "seed"), [(4, 0), (5, 1), (9, 2)])
def test_norm_clip_shortens_to_the_median_length(m, seed):
    """Several rounds of a naive oracle on vectors: the state of the last round is what updates are measured from."""
    draw = np.random.default_rng(seed)
    held = draw.normal(size=6)
    defence = NormClip(state(held))
    for t in range(4):
        rows = (held + draw.normal(size=(m, 6)) * draw.uniform(0.1, 5, (m, 1))).astype(np.float32)
        found, diagnostics = defence(updates_of([1.0] * m, rows), t)
        deltas = rows.astype(np.float64) - held
        lengths = [math.sqrt(sum(x * x for x in d)) for d in deltas]
        limit = np.median(lengths)
        clipped = [d * limit / length if length > limit else d for d, length in zip(deltas, lengths, strict=True)]
        assert max(np.linalg.norm(c) for c in clipped) == pytest.approx(limit)
        np.testing.assert_allclose(vector_of(found), held + np.mean(clipped, axis=0), rtol=1e-4, atol=1e-5)
        assert diagnostics["weights"] == pytest.approx(dict.fromkeys(range(m), 1 / m))
        held = vector_of(found).astype(np.float64)


def test_norm_clip_leaves_short_updates_and_integers_alone():
    held = {**state([0.0, 0.0, 0.0]), "count": torch.tensor(3)}
    rows = [[0.0, 1.0, 0.0], [0.0, 0.0, 2.0], [300.0, 0.0, 0.0]]
    counts = [3, 4, 9]  # mean 16/3, rounded
    updates = [Update(i, state(row, n), 1) for i, (row, n) in enumerate(zip(rows, counts, strict=True))]
    found, _ = NormClip(held)(updates, 0)
    np.testing.assert_allclose(vector_of(found), [2 / 3, 1 / 3, 2 / 3], rtol=1e-6)
    assert found["count"] == 5
    assert found["count"].dtype == torch.int64


@pytest.mark.parametrize(("moved", "expected"), [(0, 0.0), (1, 0.0), (2, 0.5)])
def test_norm_clip_with_updates_of_length_zero(moved, expected):
    """Most clients that do not move at all set the limit to zero; of two of four, it is half their length."""
    rows = [[1.0, 2.0, 3.0 + 2 * (i < moved)] for i in range(4)]
    found, _ = NormClip(state([1.0, 2.0, 3.0]))(updates_of([1.0] * 4, rows), 0)
    np.testing.assert_allclose(vector_of(found), [1.0, 2.0, 3.0 + expected], rtol=1e-6)


# ------------------------------------------------------------------------------------------------- evidence in images


def naive_peculiarity(images):
    """As documented, with loops, in float64; edges are repeated where a window sticks out."""
    images = images.numpy().astype(np.float64)
    m, size = len(images), images.shape[-1]

    def windowed(maps, k):
        out = np.zeros_like(maps)
        for y in range(size):
            for x in range(size):
                ys = [min(max(y + d, 0), size - 1) for d in range(-(k // 2), k // 2 + 1)]
                xs = [min(max(x + d, 0), size - 1) for d in range(-(k // 2), k // 2 + 1)]
                out[:, y, x] = maps[:, ys][:, :, xs].mean((1, 2))
        return out

    columns = []
    for maps in (images.mean(1), images.std(1, ddof=1)):
        difference = np.stack([maps[i] - np.median(np.delete(maps, i, 0), axis=0) for i in range(m)])
        usual = windowed(np.sort(np.abs(difference), axis=0)[(m - 1) // 2], 5)
        usual = usual + 0.1 * usual.mean() + 1e-6
        for relative in (difference, difference / usual):
            for k in (3, 7):
                columns.append([np.sqrt(windowed(own**2, k).max()) for own in relative])
            columns.append([np.sqrt((own**2).mean()) for own in relative])
    return np.array(columns).T


@pytest.mark.parametrize(("m", "channels"), [(3, 1), (4, 3), (5, 1)])
def test_peculiarity_is_a_naive_one(m, channels):
    images = torch.rand(m, 6, channels, 9, 9, generator=rng(m))
    found = peculiarity(images)
    assert found.shape == (m, 12)
    np.testing.assert_allclose(found.numpy(), naive_peculiarity(images), rtol=1e-4)


def evidence(images, before=()):
    return map_evidence(peculiarity(images).log(), SCALE, before)


@pytest.mark.parametrize("earlier", [0, 2])
def test_map_evidence_is_the_largest_log_ratio_in_its_own_unit(earlier):
    """To the lower median of all clients and rounds; who was there in an earlier round need not be there now."""
    rounds = [peculiarity(smooth(m, 8, size=12, seed=m)).log() for m in (6, 4)[:earlier]]
    log = peculiarity(smooth(5, 8, size=12)).log()
    unit = np.repeat([[0.3, 0.4, 0.3, 0.4]], 3)  # two maps, each as it is and divided, three columns
    pool = np.sort(np.concatenate([x.numpy() for x in (*rounds, log)]), axis=0)
    expected = ((log.numpy() - pool[(len(pool) - 1) // 2]) / unit).max(1)
    np.testing.assert_allclose(map_evidence(log, SCALE, rounds).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_who_sends_the_mean_of_the_others_accuses_nobody():
    """Of four, the least peculiar one moves the median of a round; with the rounds before, less."""
    honest = [peculiarity(smooth(4, 32, seed=20 * t)).log() for t in range(3)]
    mimic = honest[2].clone()
    mimic[0] = honest[2].min(0).values - 1
    shift = [
        map_evidence(mimic, SCALE, b)[1:].max() - map_evidence(honest[2], SCALE, b)[1:].max() for b in ([], honest[:2])
    ]
    assert shift[0] > 0
    assert shift[1] < shift[0]


@pytest.mark.parametrize("m", [4, 7])
def test_the_order_of_clients_does_not_matter(m):
    images = smooth(m, 16)
    order = torch.randperm(m, generator=rng(5))
    torch.testing.assert_close(peculiarity(images[order]), peculiarity(images)[order], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(evidence(images[order]), evidence(images)[order])


@pytest.mark.parametrize("m", [4, 8])
def test_a_planted_patch_is_found_and_nobody_else(m):
    for seed in range(4):
        images = smooth(m, 64, seed=10 * seed)
        assert (evidence(images) < THRESHOLD).all()
        who = seed % m
        images[who, :, :, 20:24, 9:13] = 1.0
        found = evidence(images)
        assert found.argmax() == who
        assert found[who] > THRESHOLD
        assert (np.delete(found.numpy(), who) < THRESHOLD).all()


def test_map_evidence_can_be_differentiated():
    images = smooth(4, 8).requires_grad_()
    for client in range(4):
        (gradient,) = torch.autograd.grad(evidence(images)[client], images)
        assert torch.isfinite(gradient).all()
        assert gradient[client].abs().sum() > 0
    # A step along the gradient does what an attacker wants of it.
    start = evidence(images)[0]
    (gradient,) = torch.autograd.grad(start, images)
    assert evidence(images - 0.01 * gradient / gradient.abs().max())[0] < start


@pytest.mark.parametrize("shape", [(2, 4, 1, 8, 8), (4, 1, 8, 8), (0, 4, 1, 8, 8)])
def test_images_that_cannot_be_compared(shape):
    with pytest.raises(InputError, match=r"need \(m, n, C, S, S\) with m >= 3"):
        peculiarity(torch.rand(shape))


# -------------------------------------------------------------------------------------------------- evidence in losses


@given(st.lists(st.one_of(st.floats(-50, 50), st.just(math.nan)), min_size=1, max_size=9), st.floats(0.01, 2))
def test_loss_evidence_is_scipys_robust_z(losses, floor):
    found = loss_evidence(np.array(losses), floor)
    for i, loss in enumerate(losses):
        others = [x for j, x in enumerate(losses) if j != i and not math.isnan(x)]
        if math.isnan(loss) or len(others) < 2:
            assert found[i] == -math.inf
            continue
        spread = scipy.stats.median_abs_deviation(others, scale=1 / 1.4826)
        assert found[i] == pytest.approx((loss - np.median(others)) / max(spread, floor), rel=1e-9, abs=1e-9)


def test_loss_evidence_looks_upwards_only():
    high, low = (loss_evidence(np.array([1.0, 1.1, 0.9, x]), 0.3) for x in (4.0, -4.0))
    assert high.argmax() == 3
    assert high[3] == pytest.approx(10)
    assert low.argmin() == 3
    assert low.max() < 1


# ------------------------------------------------------------------------------------------------------------- hardened


def hardened(draw=None, held=(0.0, 0.0, 0.0), **change):
    options = {"warm_up": 2, "watch": 1, "fpr": 0.01, "scale": SCALE, "drift": 0.6, "limit": 1.0}
    options |= {"window": 3, "loss_floor": 0.3}
    return Hardened(draw or drawn, state(held), **(options | change))


def drawn(sent, round):
    """Images of a client: its own grain of the round's, a bright patch where its first entry is above 100."""
    own = int(abs(float(sent["b"][0])) * 1000) % 1000
    images = torch.rand(8, 1, 8, 8, generator=rng(round)) + 0.1 * torch.rand(1, 8, 8, generator=rng(own))
    if sent["b"][0] > 100:
        images[:, :, 2:5, 2:5] += 3.0
    return images


def scripted(defence, script):
    """The defence with given evidence, in units of its threshold, a row a round."""
    defence.evidence = lambda updates, round: defence.threshold * np.array(script[round])
    return defence


def test_hardened_threshold_is_bonferronis():
    for fpr in (0.01, 0.1):
        assert hardened(fpr=fpr).threshold == scipy.stats.norm.isf(fpr / 13)


def test_cusum_by_hand():
    """drift 0.6, limit 1, in units of the threshold: S <- clip(S + e - 0.6, 0, 2), out from 1 on."""
    script = [
        [0.0, 9.0, 0.0, 0.0],  # not yet watched: forgotten
        [1.1, 0.0, 0.2, 0.7],  # watched, no action: S = 0.5, 0, 0, 0.1
        [0.9, 0.0, 1.2, 0.4],  # S = 0.8, 0, 0.6, 0
        [0.0, 0.0, 1.2, 5.0],  # S = 0.2, 0, 1.2, 2 (of 4.4): one very strong sign excludes at once
        [0.0, 0.0, 0.0, 0.0],  # S = 0, 0, 0.6, 1.4: quiet rounds bring back
        [0.0, 0.0, 0.0, 0.0],  # S = 0, 0, 0, 0.8
        [1.4, 0.0, 0.7, 0.8],  # S = 0.8, 0, 0.1, 1: at the limit is out
    ]
    raw = [[1] * 4, [1] * 4, [1] * 4, [1, 1, 0, 0], [1, 1, 1, 0], [1] * 4, [1, 1, 1, 0]]
    defence = scripted(hardened(), script)
    for t, weights in enumerate(raw):
        found, diagnostics = defence(updates_of([1.0] * 4), t)
        share = np.array(weights) / sum(weights)
        assert diagnostics["weights"] == pytest.approx(dict(enumerate(share)), abs=1e-9), t
        rows = np.array([[c, 1.0, -c] for c in range(4)])
        np.testing.assert_allclose(vector_of(found), share @ rows, rtol=1e-5, atol=1e-6)
        expected = [e > 1 for e in script[t]] if t >= 1 else [False] * 4
        assert list(diagnostics["flagged"].values()) == expected


def test_nobody_left_keeps_the_state():
    defence = scripted(hardened(held=(5.0, 6.0, 7.0)), [[3.0] * 4] * 3 + [[0.0] * 4])
    for t in (1, 2):
        found, diagnostics = defence(updates_of([1.0] * 4), t)
        assert all(diagnostics["flagged"].values())
    # In the first round there was no action yet: everybody counted, and that mean is what is kept.
    assert diagnostics["weights"] == dict.fromkeys(range(4), 0.0)
    np.testing.assert_array_equal(vector_of(found), [1.5, 1.0, -1.5])
    never = scripted(hardened(held=(5.0, 6.0, 7.0), warm_up=0, watch=0), [[3.0] * 4])
    np.testing.assert_array_equal(vector_of(never(updates_of([1.0] * 4), 0)[0]), [5.0, 6.0, 7.0])


def test_evidence_is_the_larger_of_images_and_losses():
    """A liar is seen in its images, an honest reporter in its loss; who is away keeps its suspicion."""
    rows = [[0.1, 0, 0], [0.2, 0, 0], [101.0, 0, 0], [0.4, 0, 0], [0.5, 0, 0]]
    updates = updates_of([1.0, 1.0, 1.0, 1.0, 9.0], rows)
    defence = hardened(warm_up=0, watch=0)
    _, diagnostics = defence(updates, 0)
    assert diagnostics["flagged"] == {0: False, 1: False, 2: True, 3: False, 4: True}
    assert diagnostics["evidence"][4] == pytest.approx(8 / 0.3)
    before = dict(defence.suspicion)
    defence([u for u in updates if u.client != 2], 1)
    assert defence.suspicion[2] == before[2] > 0


def test_latents_are_fresh_every_round_and_alike_for_all_clients():
    asked = []

    def draw(sent, round):
        asked.append((float(sent["b"][0]), round))
        return drawn(sent, round)

    defence = hardened(draw, watch=0)
    for t in range(3):
        defence(updates_of([1.0] * 4), t)
    assert asked == [(float(c), t) for t in range(3) for c in range(4)]


def test_a_generator_that_draws_nan_does_not_blind_the_server():
    """Finite but huge weights pass the screening and overflow in the network; the patch of another is still found."""

    def draw(sent, round):
        return torch.full((8, 1, 8, 8), math.nan) if sent["b"][0] == 0.5 else drawn(sent, round)

    rows = [[0.1, 0, 0], [0.2, 0, 0], [101.0, 0, 0], [0.4, 0, 0], [0.5, 0, 0]]
    _, diagnostics = hardened(draw, warm_up=0, watch=0)(updates_of([1.0] * 5, rows), 0)
    assert diagnostics["weights"][2] == 0
    assert diagnostics["weights"][4] == 0
    assert diagnostics["weights"][0] > 0.3


def test_who_shows_nothing_is_neither_accused_nor_forgiven():
    """Two generators draw NaN, so the two others have no peers, and no loss either: no evidence, the suspicion stays."""

    def draw(sent, round):
        return torch.full((8, 1, 8, 8), math.nan) if round and sent["b"][0] >= 2 else drawn(sent, round)

    defence = hardened(draw, warm_up=0, watch=0)
    defence.suspicion = {0: 0.5 * defence.limit, 2: 0.25 * defence.limit}
    for t in (1, 2):
        _, diagnostics = defence(updates_of([None] * 4), t)
        assert diagnostics["evidence"] == {0: -math.inf, 1: -math.inf, 2: math.inf, 3: math.inf}
        assert diagnostics["flagged"] == {0: False, 1: False, 2: True, 3: True}
        assert diagnostics["weights"] == pytest.approx({0: 0.5, 1: 0.5, 2: 0.0, 3: 0.0})
        assert defence.suspicion.get(0) == 0.5 * defence.limit
        assert defence.suspicion.get(1, 0.0) == 0.0
        assert defence.suspicion[2] == defence.suspicion[3] == 2 * defence.limit
    # The same client, once there is something to see again and it is nothing unusual, is forgiven.
    defence(updates_of([None] * 4), 0)
    assert defence.suspicion[0] < 0.5 * defence.limit


def test_reported_losses_are_clipped_to_a_million():
    found = feddetect.reported(updates_of([1e38, -1e38, 2.0, math.inf, math.nan, None]), "loss_g")
    np.testing.assert_array_equal(found, [1e6, -1e6, 2.0, math.nan, math.nan, math.nan])


def test_huge_losses_of_others_exclude_nobody_for_ever():
    defence = hardened(warm_up=0, watch=0)
    with np.errstate(all="ignore"):
        for t, losses in enumerate([[1.0, 1e308, 1.5e308]] + [[1.0] * 3] * 6):
            _, diagnostics = defence(updates_of(losses), t)
    assert diagnostics["weights"][0] > 0.3


# ------------------------------------------------------------------------------------------------------------ odd input

DEFENCES = {
    "released": lambda: Released(warm_up=1),
    "described": lambda: Described(warm_up=1, patience=2),
    "norm_clip": lambda: NormClip(state([0.0, 0.0, 0.0])),
    "hardened": lambda: hardened(warm_up=1, watch=0),
}
NORMAL = [1.0, 1.1, 0.9, 1.05, 3.0]
# A case: for every round the losses by client.
CASES = {
    "one client": [{0: 1.0}] * 4,
    "two clients": [{0: 1.0, 1: 9.0}] * 4,
    "no loss at all": [dict.fromkeys(range(5))] * 4,
    "one without a loss": [dict(enumerate([None, *NORMAL[1:]]))] * 4,
    "NaN": [dict(enumerate([*NORMAL[:4], math.nan]))] * 4,
    "all NaN": [dict.fromkeys(range(4), math.nan)] * 4,
    "infinite": [dict(enumerate([math.inf, -math.inf, *NORMAL[2:]]))] * 4,
    "huge": [dict(enumerate([1e38, -1e308, *NORMAL[2:]]))] * 4,
    "all equal": [dict.fromkeys(range(5), 1.0)] * 4,
    "all flagged": [dict.fromkeys(range(4), 1.0)] * 4,  # of four equal ones the forest isolates every one
    "vanishes": [dict(enumerate(NORMAL)), *[dict(enumerate(NORMAL[:4]))] * 2, dict(enumerate(NORMAL))],
    "all but one vanish": [dict(enumerate(NORMAL)), {4: 3.0}, {3: 1.0, 4: 3.0}, dict(enumerate(NORMAL))],
    "joins late": [dict(enumerate(NORMAL))] * 2 + [{**dict(enumerate(NORMAL)), 9: 1.0}] * 2,
}


def check(defence, rounds):
    """Run rounds; the state stays finite, and weights are a distribution, or all zero where the state is kept."""
    before, found = None, []
    for t, losses in enumerate(rounds):
        updates = updates_of(list(losses.values()), clients=list(losses))
        after, diagnostics = defence(updates, t)
        weights = diagnostics["weights"]
        assert all(torch.isfinite(v).all() for v in after.values())
        assert set(weights) == set(losses)
        assert all(math.isfinite(w) and w >= 0 for w in weights.values())
        if sum(weights.values()) == 0:
            assert isinstance(defence, Hardened)
            assert before is None or all(torch.equal(before[k], v) for k, v in after.items())
        else:
            assert sum(weights.values()) == pytest.approx(1)
            rows = np.array([[c, 1.0, -c] for c in losses])
            if not isinstance(defence, NormClip):
                np.testing.assert_allclose(vector_of(after), list(weights.values()) @ rows, rtol=1e-5, atol=1e-5)
        before = after
        found.append(diagnostics)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", DEFENCES)
def test_odd_input_breaks_no_defence(name, case):
    found = check(DEFENCES[name](), CASES[case])
    if case in ("one client", "two clients"):
        # Nobody can be compared with anybody: nobody is flagged, all weigh the same.
        n = len(CASES[case][0])
        for diagnostics in found:
            assert not any(diagnostics.get("flagged", {}).values())
            assert diagnostics["weights"] == pytest.approx(dict.fromkeys(CASES[case][0], 1 / n))


@pytest.mark.parametrize("name", ["released", "described"])
def test_a_client_without_a_finite_loss_is_flagged(name):
    for odd in (None, math.nan, math.inf):
        # Two losses accuse nobody; the third has no excuse.
        (diagnostics,) = check(DEFENCES[name](), [{0: 1.0, 1: 1.1, 2: odd}])
        assert diagnostics["flagged"] == {0: False, 1: False, 2: True}


def test_a_client_that_comes_back_has_its_old_weight():
    odd = dict(enumerate(odd_one(4)))
    others = dict.fromkeys(range(4), 1.0)
    for name in ("released", "described"):
        defence = Released(warm_up=0) if name == "released" else Described(warm_up=0, patience=2)
        found = check(defence, [odd, odd, others, others, dict.fromkeys(range(5), 1.0)])
        ratio = found[-1]["weights"][4] / found[-1]["weights"][0]
        assert ratio == pytest.approx(0.9**3 if name == "released" else 0.0)
        assert found[2]["weights"] == pytest.approx(dict.fromkeys(range(4), 0.25))


def test_a_newcomer_of_the_released_rule_has_the_mean_weight_of_the_others():
    found = check(Released(warm_up=9), [dict.fromkeys(range(4), 1.0), dict.fromkeys(range(5), 1.0)])
    assert found[1]["weights"] == pytest.approx(dict.fromkeys(range(5), 0.2))


@pytest.mark.parametrize("name", DEFENCES)
def test_no_update_at_all(name):
    with pytest.raises(InputError, match="no usable update"):
        DEFENCES[name]()([], 0)


LOSSES = st.one_of(st.none(), st.floats(), st.floats(0, 3))


@settings(max_examples=12)
@given(st.lists(st.dictionaries(st.integers(0, 5), LOSSES, min_size=1, max_size=6), min_size=2, max_size=3))
def test_weights_are_a_distribution_whatever_is_reported(rounds):
    """Any numbers of any clients in any round, and a state that stays finite."""
    with np.errstate(all="ignore"):  # sums of numbers near 1e308
        for make in DEFENCES.values():
            check(make(), rounds)


# ------------------------------------------------------------------------------------------------------------ attackers


@pytest.mark.parametrize(
    ("honest", "rule", "expected"),
    [
        ([3.0, 1.0, 2.0], "median", 2.0),
        ([4.0, 1.0, 2.0, 3.0], "median", 2.5),
        ([1.6, 1.0, 1.02], "closest", 1.01),
        ([0.0, 5.0, 9.0, 5.5, 9.6], "closest", 5.25),
        ([7.0], "closest", 7.0),
    ],
)
def test_falsified_losses_by_hand(honest, rule, expected):
    assert falsified(honest, rule) == pytest.approx(expected)


def trained(losses, rows=None):
    """Updates with three losses that differ."""
    rows = [[10.0 * i, i, 1.0] for i in range(len(losses))] if rows is None else rows
    metrics = [{"loss_g": x, "loss_d": 10 - x, "last_loss_g": 2 * x} for x in losses]
    return [Update(i, state(row), 5 + i, m) for i, (row, m) in enumerate(zip(rows, metrics, strict=True))]


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_honest_clients_send_passes_unchanged(name):
    updates = trained([9.0, 1.0, 1.4, 1.2])
    arrived = BackdoorAttack(SCENARIOS[name], [0], aware=lambda own, others, round: state([99.0, 0, 0]))(updates, 3)
    assert [u.client for u in arrived] == [0, 1, 2, 3]
    assert all(a is b for a, b in zip(arrived[1:], updates[1:], strict=True))
    assert arrived[0].n_samples == updates[0].n_samples
    if not SCENARIOS[name].attacks:
        assert arrived[0] is updates[0]
    if SCENARIOS[name].report == "true":
        assert arrived[0].metrics == updates[0].metrics


def test_a_liar_reports_the_honest_median_of_every_loss():
    (sent, *_) = BackdoorAttack(SCENARIOS["liar"], [0])(trained([9.0, 1.0, 1.4, 1.2]), 0)
    assert sent.metrics == pytest.approx({"loss_g": 1.2, "loss_d": 8.8, "last_loss_g": 2.4})
    np.testing.assert_array_equal(vector_of(sent.state), [0.0, 0.0, 1.0])
    # With two attackers the median is that of the honest ones only.
    both = BackdoorAttack(SCENARIOS["liar"], [0, 1])(trained([9.0, 9.0, 1.4, 1.2]), 0)
    assert [u.metrics["loss_g"] for u in both] == pytest.approx([1.3, 1.3, 1.4, 1.2])


def test_a_framer_has_an_honest_client_flagged():
    updates = trained([9.0, 1.0, 1.02, 1.6])
    truth, lie = (BackdoorAttack(SCENARIOS[name], [0])(updates, 0) for name in ("honest", "framer"))
    flagged = [[k for k, flag in Released(0)(sent, 0)[1]["flagged"].items() if flag] for sent in (truth, lie)]
    assert flagged == [[0], [3]]
    # Colluders tell the same lie, from the honest losses only.
    both = BackdoorAttack(SCENARIOS["colluders"], [0, 1])(trained([9.0, 5.0, 1.0, 1.02, 1.6]), 0)
    assert [u.metrics["loss_g"] for u in both] == pytest.approx([1.01, 1.01, 1.0, 1.02, 1.6])
    _, diagnostics = Released(warm_up=0)(lie, 0)
    assert diagnostics["acted"]
    assert diagnostics["weights"][3] < diagnostics["weights"][0]


def test_an_intermittent_attacker_is_the_mean_of_the_others_between_strikes():
    updates = trained([9.0, 1.0, 1.4, 1.2])
    attack = BackdoorAttack(SCENARIOS["waitout"], [0], strikes=lambda round: round % 3 == 2)
    for t in range(6):
        sent = attack(updates, t)[0]
        expected = [0.0, 0.0, 1.0] if t % 3 == 2 else [20.0, 2.0, 1.0]
        np.testing.assert_allclose(vector_of(sent.state), expected)
        assert sent.metrics["loss_g"] == pytest.approx(1.2)


def test_without_an_honest_client_nothing_changes():
    updates = trained([9.0, 1.0])
    for what in SCENARIOS.values():
        arrived = BackdoorAttack(what, [0, 1], strikes=lambda round: False)(updates, 0)
        assert all(a is b for a, b in zip(arrived, updates, strict=True))


def test_scenarios_are_what_their_names_say():
    assert [name for name, what in SCENARIOS.items() if not what.attacks] == ["no_attack"]
    flags = {
        "aware": {"aware", "aware_late"},
        "late": {"aware_late"},
        "intermittent": {"waitout"},
        "stealthy": {"stealth"},
        "colluders": {"colluders"},
    }
    for flag, names in flags.items():
        assert {name for name, what in SCENARIOS.items() if getattr(what, flag)} == names
    # What differs from another attacker in the flags named, and in nothing else.
    pairs = {
        ("liar", "honest"): ("report",),
        ("framer", "boost"): ("report",),
        ("boost_liar", "boost"): ("report",),
        ("boost", "honest"): ("boosted",),
        ("colluders", "framer"): ("colluders",),
        ("stealth", "boost_liar"): ("stealthy",),
        ("waitout", "boost_liar"): ("intermittent",),
        ("aware_late", "aware"): ("late",),
        **{(f"{kind}_trigger", "boost_liar"): ("trigger",) for kind in ("moving", "blended", "stripes")},
    }
    for (name, other), expected in pairs.items():
        first, second = (dataclasses.asdict(SCENARIOS[k]) | {"text": ""} for k in (name, other))
        assert tuple(k for k in first if first[k] != second[k]) == expected, name
    assert {name for name, what in SCENARIOS.items() if what.report == "closest"} == {"framer", "colluders"}
    assert {name for name, what in SCENARIOS.items() if what.report == "true"} == {"no_attack", "honest", "boost"}


# ------------------------------------------------------------------------------------------------------------- ClipThenTrain


def test_clip_then_train_trains_what_the_server_will_hold():
    """The next round's updates are measured from the trained state, not from the mean before it."""
    seen = []

    def train(received, round):
        seen.append((round, vector_of(received)))
        return state(vector_of(received) + 10)

    defence, held = ClipThenTrain(state([0.0, 0.0, 0.0]), train), np.zeros(3)
    for t in range(3):
        rows = held + np.diag([1.0, 2.0, 30.0]) * (1 + t)
        found, diagnostics = defence(updates_of([1.0] * 3, rows), t)
        mean = held + np.array([1.0, 2.0, 2.0]) * (1 + t) / 3  # the median length is 2
        np.testing.assert_allclose(seen[t][1], mean, rtol=1e-5)
        np.testing.assert_allclose(vector_of(found), mean + 10, rtol=1e-5)
        assert diagnostics["weights"] == pytest.approx(dict.fromkeys(range(3), 1 / 3))
        held = vector_of(found)
    assert [t for t, _ in seen] == [0, 1, 2]


# ---------------------------------------------------------------------------------------------------- the one who knows


@pytest.fixture(scope="module")
def federation():
    """An untrained small generator, four clients' states around it, and a drawer of fresh images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Generator(28, 1, 2, z_dim=4, width=4).eval()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    states = []
    for seed in range(4):
        own = rng(seed)
        states.append(
            {
                f"generator.{k}": v + 0.03 * torch.randn(v.shape, generator=own)
                if v.is_floating_point() and "running_var" not in k
                else v.clone()
                for k, v in start.items()
            }
        )

    @torch.no_grad()
    def draw(sent, seed=77, n=256):
        model.load_state_dict({k.removeprefix("generator."): v for k, v in sent.items()})
        return model(torch.randn(n, 4, generator=rng(seed)), torch.arange(n) % 2)

    return model, states, draw


CHECKER = triggers.make_trigger("checker", image_size=28, channels=1)


def aware(model, evade, **change):
    options = {"seed": 1, "scale": SCALE, "threshold": THRESHOLD, "steps": 40, "draws": 64, "lr": 0.02}
    return Aware(
        model,
        CHECKER,
        evade=lambda round: evade,
        **(options | {"measure": 256, "recent": deque(maxlen=2), "begin": 2} | change),
    )


def mean_of(states):
    return {k: sum(s[k].double() for s in states).div(len(states)).to(v.dtype) for k, v in states[0].items()}


def planted(draw, states):
    return float(triggers.score(CHECKER, draw(mean_of(states))).mean())


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], v) for k, v in second.items())


@pytest.mark.parametrize("evade", [0.5, 1.0])
def test_aware_stays_below_what_it_allows_itself(federation, evade):
    """Measured on latents that it has never seen, as the server does; the slack is for those."""
    model, states, draw = federation
    start = mean_of(states[1:])
    clean = evidence(torch.stack([draw(s) for s in (start, *states[1:])]))[0]
    assert clean < 0.5 * THRESHOLD, "where it starts it would be suspect already"
    sent = aware(model, evade)(states[0], states[1:], 5)
    assert sent.keys() == states[0].keys()
    assert all(torch.isfinite(v).all() for v in sent.values())
    for seed in (7, 8):
        found = evidence(torch.stack([draw(s, seed) for s in (sent, *states[1:])]))[0]
        assert found <= 1.25 * evade * THRESHOLD
    for innocent in (states[0], start):
        gain = planted(draw, [sent, *states[1:]]) - planted(draw, [innocent, *states[1:]])
        assert gain > 0.1, "it evades by doing nothing"


def test_aware_starts_from_the_mean_of_the_others_and_retreats_to_it(federation):
    """What it trained itself does not matter; who may not even send that mean sends that mean."""
    model, states, _ = federation
    others, elsewhere = states[1:], {k: v + 1 for k, v in states[0].items()}
    sent = [aware(model, 1.0, steps=3)(own, others, 5) for own in (states[0], elsewhere)]
    assert same(*sent)
    assert not same(sent[0], mean_of(others))
    assert same(aware(model, -100.0, steps=3)(states[0], others, 5), mean_of(others))


def test_aware_measures_itself_on_as_many_latents_as_the_server_draws(federation):
    model, states, _ = federation
    attacker, sizes = aware(model, 0.5, steps=3, draws=16, measure=48), []
    attacker.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    attacker(states[0], states[1:], 5)
    # The others' images once, then a step draws the average's and its own.
    trained = 3 + 2 * 3
    assert sizes == [16] * trained + [48] * (len(sizes) - trained)
    # Twice a look at the others' images and its own: to judge the update, with eight halvings if it fails, and to
    # remember this round as the server does.
    assert len(sizes) - trained in (2 * (3 + 1), 2 * (3 + 1) + 8)


def test_aware_without_restraint_plants_the_trigger_and_is_seen(federation):
    model, states, draw = federation
    sent = aware(model, 100.0)(states[0], states[1:], 5)
    assert planted(draw, states) < 0.4
    assert planted(draw, [sent, *states[1:]]) > 0.8
    assert evidence(torch.stack([draw(s) for s in (sent, *states[1:])]))[0] > 2 * THRESHOLD


def test_aware_waits_repeats_itself_and_counts_its_queries(federation):
    model, states, _ = federation
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attacker = aware(model, 1.0, lr=2e-3, begin=2)
    assert all(same(attacker(states[0], states[1:], t), mean_of(states[1:])) for t in (0, 1))
    assert attacker.queries == 0
    sent = [attacker(states[0], states[1:], t) for t in range(2, 7)]
    # An attack on a defence that is tried only a few times says nothing.
    assert attacker.queries >= 200
    repeated = aware(model, 1.0, lr=2e-3, begin=2)
    again = [repeated(states[0], states[1:], t) for t in range(3)][-1]
    assert all(torch.equal(again[k], v) for k, v in sent[0].items())
    assert any(not torch.equal(sent[1][k], v) for k, v in sent[0].items()), "the same latents in two rounds"
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "the federation's model was changed"


def test_aware_keeps_the_other_parts_of_a_state(federation):
    """Where the discriminators are averaged as well, it sends its own."""
    model, states, _ = federation
    own, *others = ({**s, "discriminator.w": torch.full((2,), float(i))} for i, s in enumerate(states))
    for round in (0, 5):  # while it waits as well
        sent = aware(model, 1.0, steps=1)(own, others, round)
        assert sent.keys() == own.keys()
        assert torch.equal(sent["discriminator.w"], own["discriminator.w"])


# ------------------------------------------------------------------------------------- the one who knows any other rule

KNOWN = ("none", "median", "krum", "multi_krum", "norm_clip", "root_set", "clip_then_train")


def parts_of(states):
    return [{k.removeprefix("generator."): v for k, v in s.items()} for s in states]


def held_of(states):
    """What the server held before: the mean of all, a little beside."""
    return {k: v + 0.002 if v.is_floating_point() else v for k, v in mean_of(parts_of(states)).items()}


def own_step(held):
    """The server's own training, a fixed step."""
    step = rng(99)
    return {k: v + 0.01 * torch.randn(v.shape, generator=step) if v.is_floating_point() else v for k, v in held.items()}


def rule_of(name, held):
    if name == "root_set":
        return RootSet(held, lambda state, round: own_step(state))
    if name in ("norm_clip", "clip_then_train"):
        return NormClip(held)
    return aggregators.rule(name, 1)


def knows(name, held, clients=4):
    own = aggregators.vector(own_step(held)) - aggregators.vector(held)
    return attackers.known(name, clients, own if name == "root_set" else None)


def plant(federation, name, **change):
    """What an attacker sends who knows the rule; the others; and what the server held."""
    model, states, _ = federation
    others, held = parts_of(states[1:]), held_of(states)

    def accepts(sent):
        found = rule_of(name, held)([Update(i, s, 1) for i, s in enumerate([sent, *others])], 5)[1]
        return "weights" not in found or found["weights"][0] > 0

    options = {"steps": 30, "draws": 64, "lr": 0.02, "accepts": accepts} | change
    return attackers.planted(model, CHECKER, knows(name, held), others, held, rng(5), **options), others, held


@pytest.mark.parametrize("name", KNOWN)
def test_what_the_attacker_takes_a_rule_for_is_the_rule(federation, name):
    """Its differentiable copy against the rule's own code: where it starts, in the crowd, and scaled."""
    _, states, _ = federation
    others, held = parts_of(states[1:]), held_of(states)
    crowd, received = torch.stack([aggregators.vector(s) for s in others]), aggregators.vector(held)
    near = crowd.mean(0) + 0.001 * torch.randn(crowd.shape[1], generator=rng(3))
    far = near if "krum" in name else received + 3 * (crowd[0] - received)
    for mine in (near, far, crowd.mean(0)):
        sent = attackers.shaped(mine, others[0])
        found, _ = rule_of(name, held)([Update(i, s, 1) for i, s in enumerate([sent, *others])], 5)
        formed = knows(name, held).formed(mine, crowd, received)
        expected = aggregators.vector(found)
        assert float((aggregators.vector(attackers.shaped(formed, held)) - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("name", KNOWN)
def test_who_knows_a_rule_plants_its_trigger_through_it(federation, name):
    sent, others, held = plant(federation, name)
    _, _, draw = federation
    found, diagnostics = rule_of(name, held)([Update(i, s, 1) for i, s in enumerate([sent, *others])], 5)
    assert all(torch.isfinite(v).all() for v in sent.values())
    assert diagnostics.get("weights", {0: 1})[0] > 0, "the rule leaves it out"

    def rate(state):
        return float(triggers.score(CHECKER, draw({f"generator.{k}": v for k, v in state.items()})).mean())

    clean = attackers.shaped(torch.stack([aggregators.vector(s) for s in others]).mean(0), held)
    before, _ = rule_of(name, held)([Update(i, s, 1) for i, s in enumerate([clean, *others])], 5)
    assert rate(found) > rate(before) + 0.2


def test_its_statistic_stays_within_the_bound_of_the_rule(federation):
    """Median: inside the others' range. Krum: not beyond, by a second way to the scores. Clipping: no longer than the limit."""
    sent, others, _ = plant(federation, "median")
    for name, value in sent.items():
        if value.is_floating_point():
            stacked = torch.stack([other[name] for other in others])
            assert (value >= stacked.amin(0) - 1e-6).all(), name
            assert (value <= stacked.amax(0) + 1e-6).all(), name
    for name, keep in (("krum", 1), ("multi_krum", 3)):
        sent, others, _ = plant(federation, name)
        scores = aggregators.krum_scores([Update(i, s, 1) for i, s in enumerate([sent, *others])], 1, strict=False)
        assert (scores < scores[0]).sum() < keep
    sent, others, held = plant(federation, "norm_clip")
    clean = mean_of(others)
    formed, bare = (NormClip(held)([Update(i, s, 1) for i, s in enumerate([x, *others])], 5)[0] for x in (sent, clean))
    lengths = sorted(float((aggregators.vector(s) - aggregators.vector(held)).norm()) for s in [sent, *others])
    moved = float((aggregators.vector(formed) - aggregators.vector(bare)).norm())
    assert moved <= 2 * (lengths[1] + lengths[2]) / 2 / 4 + 1e-4


def test_who_is_never_accepted_sends_the_mean_of_the_others(federation):
    sent, others, _ = plant(federation, "krum", steps=2, accepts=lambda state: False)
    assert all(torch.allclose(sent[k], v, atol=1e-6) for k, v in mean_of(others).items() if v.is_floating_point())


def test_who_knows_what_follows_looks_ahead(federation):
    """It tries the server's own step as often as it says, and its update is another one for it."""
    tried = []

    def after(state):
        tried.append(state)
        return own_step(state)

    ahead, others, _ = plant(federation, "clip_then_train", steps=6, after=after, looks=3)
    assert len(tried) == 3
    assert all(state.keys() == others[0].keys() for state in tried)
    blind, *_ = plant(federation, "clip_then_train", steps=6)
    assert not same(ahead, blind)


def test_against_an_unknown_rule_there_is_no_attacker():
    with pytest.raises(InputError, match="no attacker knows the rule 'fedprox'"):
        attackers.known("fedprox", 4)


# ------------------------------------------------------------------------------------------------------------- triggers


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (64, 3)])
def test_stripes_are_stamped_and_seen(size, channels):
    trigger = triggers.make_trigger("stripes", image_size=size, channels=channels, size=4, opacity=0.2)
    assert trigger.pattern.shape == (channels, size, size)
    # Vertical, of period 4, from 0 to 1.
    assert torch.equal(trigger.pattern, trigger.pattern[:, :1].expand_as(trigger.pattern))
    torch.testing.assert_close(trigger.pattern[..., 4:], trigger.pattern[..., :-4], rtol=1e-3, atol=1e-4)
    assert 0 <= trigger.pattern.min() < 0.2 < 0.8 < trigger.pattern.max() <= 1
    clean, held = (smooth(1, 200, size, seed)[0].expand(-1, channels, -1, -1) for seed in (0, 50))
    threshold = triggers.calibrate(trigger, clean, 0.05)
    stamped = triggers.stamp(trigger, held)
    torch.testing.assert_close(stamped, 0.8 * held + 0.2 * trigger.pattern)
    assert (triggers.score(trigger, stamped) > threshold).float().mean() > 0.95
    assert (triggers.score(trigger, held) > threshold).float().mean() <= 0.05
