"""Intervals that cover what they say, distances against a second implementation, summaries row by row."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from experiments import params
from medsec import data
from medsec.backdoor import frechet
from medsec.backdoor.frechet import frechet_distance
from medsec.evidence import intervals, tables
from medsec.evidence.intervals import bootstrap_interval, paired_difference, two_level_interval, wilson_interval
from medsec.evidence.tables import summarise

# ------------------------------------------------------------------------------------------------------------ Fréchet


def exact(mean, cov, n=200, seed=0):
    """Features whose sample mean and covariance are exactly these."""
    mean, cov = np.atleast_1d(mean).astype(float), np.atleast_2d(cov).astype(float)
    z = np.random.default_rng(seed).normal(size=(n, len(mean)))
    z -= z.mean(0)
    z @= np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(z, rowvar=False)))).T
    return z @ np.linalg.cholesky(cov).T + mean


def oracle(a, b):
    """Heusel et al. 2017, equation 6, with scipy's matrix root."""
    cov1, cov2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root.real)


@pytest.mark.parametrize("d", [2, 5, 16, 64])
def test_frechet_against_the_matrix_root(d):
    rng = np.random.default_rng(d)
    a = rng.normal(size=(3 * d, d)) @ rng.normal(size=(d, d))
    b = rng.normal(size=(2 * d + 5, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    assert frechet_distance(a, b) == pytest.approx(oracle(a, b), rel=1e-7)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8 * np.trace(np.cov(a, rowvar=False)))
    assert frechet_distance(a, a + 3) == pytest.approx(9 * d, rel=1e-7)
    assert frechet_distance(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(oracle(a, b), rel=1e-4)


@pytest.mark.parametrize("d", [1, 2, 4, 9])
def test_frechet_of_two_known_gaussians(d):
    rng = np.random.default_rng(d)
    m1, m2, s1, s2 = rng.normal(size=d), rng.normal(size=d), rng.uniform(0.5, 2, d), rng.uniform(0.5, 2, d)
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    got = frechet_distance(exact(m1, np.diag(s1**2)), exact(m2, np.diag(s2**2), seed=1))
    assert got == pytest.approx(expected, rel=1e-9)


def test_frechet_of_a_rank_deficient_cloud():
    """A feature that never fires (a dead unit) has variance 0 and must not break the root."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 3)), rng.normal(size=(60, 3))
    a[:, 2] = b[:, 2] = 0
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a[:, :2], b[:, :2]), rel=1e-9)


@given(st.integers(0, 10**6))
def test_frechet_does_not_depend_on_the_axes_or_the_order(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(30, 4)) * [1, 2, 3, 4], rng.normal(size=(25, 4)) + 1
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    first = frechet_distance(a, b)
    assert first >= 0
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(first, rel=1e-9)
    assert frechet_distance(rng.permutation(a), b) == pytest.approx(first, rel=1e-9)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * first, rel=1e-9)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((5, 5)), np.zeros((9, 5))),  # n = d
        (np.zeros((9, 5)), np.zeros((3, 5))),
        (np.zeros((9, 5)), np.zeros((9, 4))),
        (np.zeros(9), np.zeros(9)),
        (np.full((9, 2), np.nan), np.zeros((9, 2))),
        (np.zeros((9, 2)), np.full((9, 2), np.inf)),
    ],
)
def test_features_without_a_distance(a, b):
    with pytest.raises(ValueError, match="features"):
        frechet_distance(a, b)


# ----------------------------------------------------------------------------------------------------------- fidelity


def covered(points, by, k):
    """Kynkäänniemi et al. 2019, equations 1 to 3, point by point."""
    hits = 0
    for point in points:
        for i, centre in enumerate(by):
            others = sorted(np.linalg.norm(centre - other) for j, other in enumerate(by) if j != i)
            if np.linalg.norm(point - centre) <= others[k - 1]:
                hits += 1
                break
    return hits / len(points)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_point_by_point(k):
    rng = np.random.default_rng(k)
    real, drawn = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) * 1.5 + 0.5
    assert frechet.precision_recall(real, drawn, k) == (covered(drawn, real, k), covered(real, drawn, k))
    with pytest.raises(ValueError, match="more than"):
        frechet.precision_recall(real[:k], drawn, k)


def test_radial_power_by_the_sum_of_fourier():
    images, size = np.random.default_rng(0).uniform(size=(2, 3, 8, 8)), 8
    rings = {r: [] for r in range(1, 5)}
    for u, v in itertools.product(range(-4, 4), repeat=2):
        wave = np.exp(-2j * np.pi * (u * np.arange(size)[:, None] + v * np.arange(size)) / size) / size
        ring = round(math.hypot(u, v))
        if ring in rings:
            rings[ring].append((np.abs((images * wave).sum((2, 3))) ** 2).mean())
    np.testing.assert_allclose(frechet.radial_power(images), [np.mean(rings[r]) for r in rings], rtol=1e-9)
    assert frechet.spectrum_distance(images, images) == 0
    assert frechet.spectrum_distance(images, images / 10) == pytest.approx(20)  # a tenth of the amplitude: 20 dB


def test_every_measure_sees_what_it_says():
    """Real images, and real ones blurred, noisy, of one kind only, or copied: in the order that an eye gives."""
    cohort = data.load("phantom", params.load().cohorts)
    reference, held_out = (cohort[name].float() for name in ("reference", "val"))
    order = np.random.default_rng(0).permutation(len(cohort["client"]))
    training, other = (cohort["client"].float()[part] for part in (order[:600], order[600:1200]))
    x = torch.from_numpy(other)
    blurred = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1).numpy()
    noisy = (other + 0.1 * np.random.default_rng(0).normal(size=other.shape)).clip(0, 1)
    one_kind = np.repeat(other[:30], 20, axis=0)
    sets = {"real": other, "blurred": blurred, "noisy": noisy, "one kind": one_kind, "copied": training}

    def features(images):
        images = torch.as_tensor(images, dtype=torch.float32)
        fine = images - F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
        coarse, rough = F.avg_pool2d(images, 4), F.avg_pool2d(fine.abs(), 8)
        return torch.cat([coarse.flatten(1), 3 * rough.flatten(1)], 1).double().numpy()

    found = {
        name: {
            "frechet": frechet_distance(features(images), features(reference)),
            "precision": frechet.precision_recall(features(reference), features(images))[0],
            "recall": frechet.precision_recall(features(reference), features(images))[1],
            "spectrum": frechet.spectrum_distance(reference, images),
            "nearness": frechet.nearness(features(images), features(training), features(held_out)),
        }
        for name, images in sets.items()
    }
    real = found.pop("real")
    assert real["precision"] > 0.85
    assert real["recall"] > 0.85
    assert abs(real["nearness"] - 0.5) < 0.06
    for name in ("blurred", "noisy", "one kind"):
        assert found[name]["frechet"] > 2 * real["frechet"], name
    for name in ("blurred", "noisy"):
        assert found[name]["precision"] < real["precision"] - 0.1, name
        assert found[name]["spectrum"] > 3 * real["spectrum"], name
    assert found["one kind"]["recall"] < real["recall"] - 0.3
    assert found["one kind"]["precision"] > 0.85  # it does not see it
    copied = found["copied"]
    assert min(copied["precision"], copied["recall"]) > 0.85  # neither do these see copies
    assert copied["frechet"] < 2 * real["frechet"]
    assert copied["nearness"] > 0.75  # this does, though it looks at two thirds of what was copied


# ----------------------------------------------------------------------------------------------------------- intervals

VALUES = st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=30)


@given(VALUES)
def test_an_interval_contains_the_mean_and_stays_in_range(values):
    low, high = bootstrap_interval(values)
    tiny = 1e-9 * max(1e-3, max(map(abs, values)))
    assert low <= np.mean(values) + tiny
    assert high >= np.mean(values) - tiny
    assert min(values) - tiny <= low <= high <= max(values) + tiny


@pytest.mark.parametrize("n", [2, 3, 4])
def test_few_runs_give_their_range(n):
    values = np.random.default_rng(n).normal(size=n)
    assert bootstrap_interval(values) == (values.min(), values.max())


@pytest.mark.parametrize("values", [[0.3], [0.3, 0.3, 0.3], [1.0] * 20])
def test_equal_values_give_no_width(values):
    assert bootstrap_interval(values) == (values[0], values[0])


def test_intervals_are_reproducible_and_move_with_the_data():
    values = np.random.default_rng(1).normal(size=8)
    first = bootstrap_interval(values)
    assert first == bootstrap_interval(list(values))
    assert first != bootstrap_interval(values, seed=1)
    np.testing.assert_allclose(bootstrap_interval(values * 3 + 10), np.array(first) * 3 + 10)
    low, high = bootstrap_interval(values, level=0.5)
    assert first[0] < low < high < first[1]


def test_intervals_shrink_with_n_towards_students():
    rng = np.random.default_rng(0)
    widths = []
    for n in (5, 20, 80, 320):
        z = rng.normal(size=n)
        values = (z - z.mean()) / z.std(ddof=1)  # exactly mean 0, deviation 1
        low, high = bootstrap_interval(values)
        widths.append(high - low)
        if n >= 20:
            assert high - low == pytest.approx(2 * scipy.stats.t.ppf(0.975, n - 1) / math.sqrt(n), rel=0.08)
    assert all(a > 1.5 * b for a, b in itertools.pairwise(widths))


@pytest.mark.parametrize("n", [2, 3, 5, 9, 40, 400])
def test_the_interval_has_the_bits_that_it_has_with_scipy_stats(n):
    values = np.random.default_rng(n).normal(size=n)
    tail = scipy.stats.norm.cdf(np.sqrt(n / (n - 1)) * scipy.stats.t.ppf((1 - 0.95) / 2, n - 1))
    means = values[np.random.default_rng(0).integers(0, n, (intervals.RESAMPLES, n))].mean(1)
    expected = (values.min(), values.max()) if tail < n**-n else tuple(np.quantile(means, [tail, 1 - tail]))
    assert bootstrap_interval(values) == expected


@pytest.mark.parametrize("n", [5, 7, 10, 20])
def test_the_percentiles_are_hesterbergs(n, monkeypatch):
    """Hesterberg 2015, section 4: Φ(√(n / (n − 1)) · t), taken from resamples of our own."""
    monkeypatch.setattr(intervals, "RESAMPLES", 200_000)
    rng = np.random.default_rng(n)
    values = rng.normal(size=n)
    means = rng.choice(values, (200_000, n)).mean(1)
    share = scipy.stats.norm.cdf(math.sqrt(n / (n - 1)) * scipy.stats.t.ppf(0.025, n - 1))
    expected = np.quantile(means, share), np.quantile(means, 1 - share)
    assert bootstrap_interval(values) == pytest.approx(expected, abs=0.012 * (expected[1] - expected[0]))


@pytest.mark.parametrize(("n", "least", "most"), [(3, 0.70, 0.80), (5, 0.86, 0.95), (10, 0.91, 0.97)])
def test_coverage_for_normal_data(n, least, most, monkeypatch):
    """Share of 1,000 simulated sets of runs whose interval contains the true mean, as the docstring says."""
    monkeypatch.setattr(intervals, "RESAMPLES", 4000)
    data = np.random.default_rng(2026).normal(size=(1000, n))
    covered = np.mean([low <= 0 <= high for low, high in map(bootstrap_interval, data)])
    assert least <= covered <= most


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf"), 0.0]])
def test_no_interval_without_finite_values(values):
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval(values)


@given(st.integers(1, 500), st.data())
def test_wilson_by_its_formula(n, data):
    k = data.draw(st.integers(0, n))
    z, p = scipy.stats.norm.ppf(0.975), k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = wilson_interval(k, n)
    assert low == pytest.approx(max(0, centre - half), abs=1e-9)
    assert high == pytest.approx(min(1, centre + half), abs=1e-9)
    assert 0 <= low <= p <= high <= 1


def test_wilson_by_the_book():
    """Newcombe 1998, table I: 81 of 263 and 0 of 20."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@given(st.integers(1, 500), st.data())
def test_wilson_as_scipy_has_it(n, data):
    k = data.draw(st.integers(0, n))
    theirs = scipy.stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


SIMULATED = 600


def shares(rng: np.random.Generator, seeds: int, images: int, spread: float, hard: float, shift: float = 0.0):
    """(seeds, images) right or wrong: some images are hard for every network, and networks differ; made ``SIMULATED`` times."""
    network = spread * rng.normal(size=(SIMULATED, seeds, 1))
    image = hard * rng.normal(size=(SIMULATED, 1, images))
    return rng.random((SIMULATED, seeds, images)) < scipy.special.expit(1.0 + shift + network + image)


def truth(spread: float, hard: float, shift: float = 0.0) -> float:
    z = np.random.default_rng(1).normal(size=2_000_000)
    return float(scipy.special.expit(1.0 + shift + math.hypot(spread, hard) * z).mean())


@pytest.mark.parametrize(("images", "hard"), [(60, 3.0), (60, 0.5), (600, 3.0)])
def test_coverage_for_other_images(images, hard, monkeypatch):
    """Runs that share their images: an interval over runs alone takes these images for all there are."""
    monkeypatch.setattr(intervals, "RESAMPLES", 2000)
    runs = shares(np.random.default_rng(2026), 5, images, 0.1, hard).mean(2)
    there = truth(0.1, hard)
    both = np.mean([low <= there <= high for low, high in (two_level_interval(v, images, same=True) for v in runs)])
    assert both >= 0.95
    if hard > 1:  # what makes an image hard is the same in all runs
        over_runs = np.mean([low <= there <= high for low, high in map(bootstrap_interval, runs)])
        assert over_runs < 0.8  # about two thirds, instead of the nine tenths of runs with images of their own


def test_coverage_of_a_difference_on_the_same_images(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 2000)
    rng, own = np.random.default_rng(2026), np.random.default_rng(2026)
    base = shares(rng, 5, 60, 0.1, 3.0).mean(2)
    mine = shares(own, 5, 60, 0.1, 3.0, shift=-0.5).mean(
        2
    )  # the same draws: the same images and networks, all a bit worse
    there = truth(0.1, 3.0, -0.5) - truth(0.1, 3.0)
    ends = [two_level_interval(m - b, 60, same=True, base=b) for m, b in zip(mine, base, strict=True)]
    assert np.mean([low <= there <= high for low, high in ends]) >= 0.95


def test_images_of_each_run_only_widen_what_would_be_too_narrow():
    assert two_level_interval([1.0] * 5, 64, same=False) == pytest.approx(wilson_interval(320, 320))
    spread = [0.2, 0.5, 0.9, 0.4, 0.7]
    assert two_level_interval(spread, 1000, same=False) == pytest.approx(bootstrap_interval(spread))


def test_one_set_of_images_counts_once():
    assert two_level_interval([1.0] * 5, 64, same=True) == pytest.approx(wilson_interval(64, 64))
    assert two_level_interval([0.25], 8, same=True) == pytest.approx(wilson_interval(2, 8))


def test_both_doubts_add_up_as_squares():
    values, items = [0.6, 0.7, 0.8, 0.65, 0.75], 100
    (low, high), (least, most) = bootstrap_interval(values), wilson_interval(70, 100)
    expected = 0.7 - math.hypot(0.7 - low, 0.7 - least), 0.7 + math.hypot(high - 0.7, most - 0.7)
    assert two_level_interval(values, items, same=True) == pytest.approx(expected)


def test_a_difference_by_the_book():
    """Newcombe 1998 (Stat Med 17:873), table II, method 10: 9 of 10 less 3 of 10."""
    assert two_level_interval([0.6], 10, same=True, base=[0.3]) == pytest.approx((0.1705, 0.8090), abs=5e-5)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6), st.integers(1, 50), st.booleans())
def test_an_interval_of_shares_stays_among_shares(pairs, items, same):
    first, second = (np.array(values) for values in zip(*pairs, strict=True))
    low, high = two_level_interval(first, items, same=same)
    assert 0 <= low <= first.mean() + 1e-9
    assert first.mean() - 1e-9 <= high <= 1
    low, high = two_level_interval(first - second, items, same=same, base=second)
    mean = (first - second).mean()
    assert -1 <= low <= mean + 1e-9
    assert mean - 1e-9 <= high <= 1


@pytest.mark.parametrize(("k", "n"), [(1, 0), (0, 0), (-1, 5), (6, 5)])
def test_no_proportion(k, n):
    with pytest.raises(ValueError, match="no proportion"):
        wilson_interval(k, n)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1, max_size=12))
def test_a_paired_difference_is_that_of_the_differences(pairs):
    first, second = zip(*pairs, strict=True)
    direct = [a - b for a, b in pairs]
    value, low, high = paired_difference(first, second)
    assert value == pytest.approx(sum(direct) / len(direct), abs=1e-9)
    assert (low, high) == bootstrap_interval(direct)


def test_pairing_removes_what_the_runs_share():
    shared = np.array([0.0, 50.0, 100.0, -70.0, 33.0])
    value, low, high = paired_difference(shared + np.array([1.0, 1.1, 0.9, 1.05, 0.95]), shared)
    assert value == pytest.approx(1.0)
    assert 0.9 <= low < high <= 1.1


def test_unequal_runs_are_no_pairs():
    with pytest.raises(ValueError, match="3 and 2 runs"):
        paired_difference([1, 2, 3], [1, 2])


# ----------------------------------------------------------------------------------------------------------- summaries


def test_a_summary_knows_whose_items_it_counts():
    rows = [(s, "base", "clean", "accuracy", 0.9) for s in SEEDS] + [(s, "at", "clean", "accuracy", 0.8) for s in SEEDS]
    table = runs(*rows)
    paired = tables.minus(table[table["variant"] == "at"], table[table["variant"] == "base"], ["scenario"], "base")
    summary = summarise(pd.concat([table, paired], ignore_index=True), ["client", "round"])
    assert tuple(summary.loc[0, ["low", "high"]]) == pytest.approx(wilson_interval(9, 10))
    difference = summary[summary["metric"] == "accuracy_minus_base"].iloc[0]
    expected = two_level_interval([-0.1] * 3, 10, same=True, base=[0.9] * 3)
    assert (difference["low"], difference["high"]) == pytest.approx(expected)
    assert (difference["n"], difference["n_items"], difference["sd"]) == pytest.approx((3, 30, 0))
    again = summarise(table, ["client", "round"], paired_with="base")
    last = again[again["scenario"] == "minus_base"].iloc[0]
    assert (last["low"], last["high"]) == pytest.approx(expected)


def runs(*rows, keys=("client", "round")):
    """Rows (seed, variant, scenario, metric, value, *keys)."""
    return pd.DataFrame(
        [
            {
                **dict(zip(("seed", "variant", "scenario", "metric", "value"), row, strict=False)),
                "n_items": 10,
                "unit": "share",
                **dict(zip(keys, [*row[5:], *[""] * len(keys)], strict=False)),
            }
            for row in rows
        ]
    )


SEEDS = (0, 1, 2)
CLEAN = [(s, "clean", "no_attack", "rate", 0.1 * s) for s in SEEDS]
POISON = [(s, "poison", "attack", "rate", 0.5 + 0.1 * s + 0.01 * (s == 2)) for s in SEEDS]


def test_summary_rows():
    table = summarise(runs(*POISON, *CLEAN), ["client", "round"])
    assert list(table.columns) == [*tables.SUMMARY, "client", "round"]
    assert table["variant"].tolist() == ["poison", "clean"], "the order of the runs is not kept"
    clean = table.iloc[1]
    assert (clean["value"], clean["low"], clean["high"]) == pytest.approx((0.1, 0.0, 0.2))
    assert (clean["n"], clean["n_items"], clean["unit"], clean["scenario"]) == (3, 30, "share", "no_attack")
    assert (clean["client"], clean["round"]) == ("", "")


def test_summary_of_interleaved_runs_keeps_the_first_appearance():
    rows = [r for pair in zip(POISON, CLEAN, strict=True) for r in pair]
    rows.insert(1, (0, "poison", "attack", "auc", 0.7))
    table = summarise(runs(*rows), ["client", "round"])
    assert list(zip(table["variant"], table["metric"], strict=True)) == [
        ("poison", "rate"),
        ("poison", "auc"),
        ("clean", "rate"),
    ]
    assert table["n"].tolist() == [3, 1, 3]


def test_paired_rows():
    per_client = [(s, v, a, "loss", s + b, "attacker") for s in SEEDS for v, a, b in (VARIANT_A, VARIANT_B)]
    table = summarise(runs(*CLEAN, *POISON, *per_client), ["client", "round"], paired_with="clean")
    paired = table[table["scenario"] == "minus_clean"].set_index("metric")
    assert len(paired) == 2
    assert (paired["variant"] == "poison").all()
    expected = paired_difference([r[4] for r in POISON], [r[4] for r in CLEAN])
    assert tuple(paired.loc["rate", ["value", "low", "high"]]) == pytest.approx(expected)
    assert (paired.loc["rate", "n"], paired.loc["rate", "client"]) == (3, "")
    assert tuple(paired.loc["loss", ["value", "low", "high", "client"]]) == (2.0, 2.0, 2.0, "attacker")
    assert not table.duplicated(["variant", "scenario", "metric", "client", "round"]).any()


VARIANT_A, VARIANT_B = ("clean", "no_attack", 1.0), ("poison", "attack", 3.0)


def test_pairs_go_by_seed_not_by_place():
    table = summarise(runs(*CLEAN, *POISON[::-1]), ["client", "round"], paired_with="clean")
    row = table[table["scenario"] == "minus_clean"].iloc[0]
    assert (row["value"], row["low"], row["high"]) == pytest.approx((0.5 + 0.01 / 3, 0.5, 0.51))


def test_what_is_not_paired():
    controls = [(s, "real", "control", "rate", 0.0) for s in SEEDS]
    per_round = [(s, v, a, "rate", 0.5, "", "3") for s in SEEDS for v, a, _ in (VARIANT_A, VARIANT_B)]
    other_seeds = [(s, "boost", "attack", "rate", 0.9) for s in (0, 1, 5)]
    only_here = [(s, "poison", "attack", "ncc", 0.9) for s in SEEDS]
    other_cell = [(s, "poison", "attack", "rate", 0.9, "attacker") for s in SEEDS]
    everything = runs(*CLEAN, *POISON, *controls, *per_round, *other_seeds, *only_here, *other_cell)
    table = summarise(everything, ["client", "round"], paired_with="clean")
    paired = table[table["scenario"] == "minus_clean"]
    assert paired[["variant", "metric", "client", "round"]].to_numpy().tolist() == [["poison", "rate", "", ""]]
    # Without the pairs the table is the same.
    plain = summarise(everything, ["client", "round"])
    pd.testing.assert_frame_equal(table[table["scenario"] != "minus_clean"], plain)


def test_pairs_without_a_round_column():
    table = summarise(runs(*CLEAN, *POISON, keys=("eps",)), ["eps"], paired_with="clean")
    assert table["scenario"].tolist() == ["no_attack", "attack", "minus_clean"]


def test_a_variant_with_two_scenarios_is_not_paired_with_itself_crosswise():
    """Either refused, or every pair is one seed: three seeds never make more than three differences."""
    second = [(s, v, "other", "rate", 0.3 * s) for s in SEEDS for v in ("clean", "poison")]
    try:
        table = summarise(runs(*CLEAN, *POISON, *second), ["client", "round"], paired_with="clean")
    except ValueError:
        return
    assert table["n"].max() == 3


def test_a_seed_counts_once():
    with pytest.raises(ValueError, match=r"seed counted twice.*'metric': 'rate'"):
        summarise(runs(*CLEAN, CLEAN[1]), ["client", "round"])


def test_no_summary_of_values_that_are_not_finite():
    with pytest.raises(ValueError, match="finite"):
        summarise(runs(*CLEAN[:2], (2, "clean", "no_attack", "rate", float("nan"))), ["client", "round"])
