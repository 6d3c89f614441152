"""medsec.data: cohorts, canonical order, duplicates, partitions, and every wrong input."""

import hashlib
import io
import itertools
import pickle
import shutil
import socket
import sys
import types
import urllib.error
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from medmnist import INFO

from medphantom import chest as phantom
from medphantom import fundus
from medsec import data
from medsec.core import paths, settings
from medsec.core.errors import InputError
from medsec.data import medmnist as medmnist_files
from medsec.data import sources


def image_set(split):
    return {image.tobytes() for image in split.images}


def assert_disjoint(cohort):
    """No image of one split occurs in another, and none twice in one."""
    for name, split in cohort.splits.items():
        assert len(image_set(split)) == len(split), name
    for one, other in itertools.combinations(cohort.splits, 2):
        assert not image_set(cohort[one]) & image_set(cohort[other]), (one, other)


def same(one: data.Split, other: data.Split) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


def arrays_of(file):
    with np.load(file) as content:
        return dict(content)


# ---------------------------------------------------------------------------------------------------------- partition

federations = st.fixed_dictionaries(
    {
        "labels": st.lists(st.integers(0, 4), min_size=40, max_size=120).map(np.array),
        "n_clients": st.integers(1, 6),
        "scheme": st.sampled_from(["iid", "dirichlet", "style"]),
        "seed": st.integers(0, 2**31 - 1),
        "alpha": st.floats(0.3, 100),
        "n_sites": st.integers(1, 5),
    }
)


def deal(federation, **more):
    arguments = {key: value for key, value in federation.items() if key != "n_sites"}
    site = np.arange(len(federation["labels"])) % federation["n_sites"]
    return data.partition(**arguments, site=site, **more)


@given(federations)
def test_partition_uses_every_image_once(federation):
    clients = deal(federation)
    assert len(clients) == federation["n_clients"]
    assert all(len(members) for members in clients)
    assert all((np.diff(members) > 0).all() for members in clients)  # sorted, none twice
    assert sorted(np.concatenate(clients)) == list(range(len(federation["labels"])))
    assert all(np.array_equal(a, b) for a, b in zip(clients, deal(federation), strict=True))


@given(federations, st.integers(1, 30))
def test_per_client_caps_and_only_leaves_out(federation, cap):
    capped, whole = deal(federation, per_client=cap), deal(federation)
    assert [len(members) for members in capped] == [min(cap, len(members)) for members in whole]
    assert all(np.isin(few, many).all() for few, many in zip(capped, whole, strict=True))
    assert all((np.diff(members) > 0).all() for members in capped)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_style_keeps_hospitals_together(n_clients, n_sites, seed):
    site = np.arange(90) % n_sites
    clients = data.partition(np.zeros(90, int), n_clients, "style", seed=seed, site=site)
    held = [set(site[members]) for members in clients]
    if n_clients >= n_sites:
        assert held == [{c % n_sites} for c in range(n_clients)]
    else:
        assert held == [set(range(c, n_sites, n_clients)) for c in range(n_clients)]


def test_partition_follows_its_seed_and_not_the_global_one():
    labels = np.arange(200) % 2
    for scheme in ("iid", "dirichlet", "style"):
        deals = []
        for numpy_seed, seed in ((1, 0), (2, 0), (1, 1)):
            np.random.seed(numpy_seed)  # noqa: NPY002 - the point: it must not matter
            before = np.random.get_state()[1].copy()  # noqa: NPY002
            deals.append(data.partition(labels, 4, scheme, seed=seed, site=labels, alpha=1.0))
            assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002
        assert all(np.array_equal(a, b) for a, b in zip(deals[0], deals[1], strict=True)), scheme
        assert not all(np.array_equal(a, b) for a, b in zip(deals[0], deals[2], strict=True)), scheme


def test_dirichlet_alpha_sets_the_skew():
    """Mean absolute deviation of the clients' class shares from the cohort's: large for small alpha, ~0 for large."""
    labels = np.arange(4000) % 2

    def skew(scheme, alpha):
        deals = (data.partition(labels, 4, scheme, seed=seed, alpha=alpha) for seed in range(20))
        return np.mean([abs(labels[members].mean() - 0.5) for clients in deals for members in clients])

    assert skew("dirichlet", 0.1) > 0.35 > 0.25 > skew("dirichlet", 2.0) > 0.1
    assert skew("dirichlet", 1e4) < 0.03
    assert skew("iid", 0.5) < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_clients": 0}, "n_clients = 0 must be an integer, at least 1"),
        ({"n_clients": 2.5}, "n_clients = 2.5"),
        ({"n_clients": 21}, "20 images for 21 clients"),
        ({"scheme": "random"}, "unknown partition 'random': choose iid, dirichlet or style"),
        ({"scheme": "style"}, "cohort has no sites; use iid or dirichlet"),
        ({"scheme": "style", "site": np.zeros(3, int)}, "site is"),
        ({"scheme": "style", "site": np.r_[np.zeros(19, int), 1], "n_clients": 4}, "site 1 has 1 images for 2 clients"),
        ({"scheme": "dirichlet", "alpha": 0.0}, "alpha = 0.0 must be"),
        ({"scheme": "dirichlet", "alpha": float("nan")}, "alpha = nan must be"),
        ({"scheme": "dirichlet", "alpha": 1e-4, "n_clients": 8}, "20 images, 8 clients, alpha 0.0001"),
        ({"per_client": 0}, "per_client = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"labels": np.zeros((20, 1), int)}, "one-dimensional"),
    ],
)
def test_impossible_partitions(change, message):
    arguments = {"labels": np.arange(20) % 2, "n_clients": 2, "scheme": "iid", "seed": 0} | change
    with pytest.raises(InputError) as error:
        data.partition(**arguments)
    assert message in str(error.value)


# -------------------------------------------------------------------------------------- canonical order, fingerprint


@given(st.integers(0, 2**31 - 1))
def test_order_plays_no_part_and_every_pixel_does(seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 3, (30, 1, 3, 3), dtype=np.uint8) * 100  # few grey levels: long equal beginnings
    split = data.Split(images, rng.integers(0, 2, 30), site=np.arange(30))
    ordered = data.canonical(split)
    keys = [(label, image.tobytes()) for label, image in zip(ordered.labels, ordered.images, strict=True)]
    assert keys == sorted(keys)
    assert np.array_equal(ordered.images, images[ordered.site])  # the site travels with its image
    shuffled = data.canonical(split.take(rng.permutation(30)))
    print_ = data.fingerprint({"train": ordered})
    assert data.fingerprint({"train": shuffled}) == print_
    altered = images.copy()
    altered[rng.integers(30), 0, rng.integers(3), rng.integers(3)] ^= 1
    assert data.fingerprint({"train": data.canonical(data.Split(altered, split.labels))}) != print_
    relabelled = split.labels.copy()
    relabelled[rng.integers(30)] ^= 1
    assert data.fingerprint({"train": data.canonical(data.Split(images, relabelled))}) != print_
    assert data.fingerprint({"val": ordered}) != print_


def test_split_take_and_float():
    images = np.arange(8, dtype=np.uint8).reshape(4, 1, 1, 2) * 36
    split = data.Split(images, np.arange(4), lesion=np.eye(4, 2, dtype=bool).reshape(4, 1, 2))
    part = split.take([2, 0])
    assert len(part) == 2
    assert part.site is None
    assert part.labels.tolist() == [2, 0]
    assert np.array_equal(part.lesion, split.lesion[[2, 0]])
    assert part.float().dtype == np.float32
    assert np.array_equal(part.float(), images[[2, 0]].astype(np.float32) / 255)


# ---------------------------------------------------------------------------------------- files in MedMNIST's layout


@pytest.mark.parametrize(("classes", "channels", "size"), [(2, 1, 28), (3, 3, 32), (7, 1, 36)])
def test_npz_cohort(tiny_npz, npz_cohorts, classes, channels, size):
    file = tiny_npz(classes, channels, size, per_class=20)
    cohort = data.load("npz", npz_cohorts(file))
    assert tuple(cohort.splits) == data.SPLITS
    assert (cohort.n_classes, cohort.channels, cohort.size) == (classes, channels, size)
    counts = {"client": 10, "public": 4, "reference": 6, "val": 20, "test": 20}  # of each class: shares .5, .2, .3
    for name, count in counts.items():
        assert np.bincount(cohort[name].labels).tolist() == [count] * classes
        assert cohort[name].images.dtype == np.uint8
        assert cohort[name].labels.dtype == np.int64
    assert cohort.removed == {"train": 0, "val": 0, "test": 0}
    assert_disjoint(cohort)
    official = arrays_of(file)
    official = official["val_images"].reshape(len(official["val_images"]), size, size, channels)
    assert image_set(cohort["val"]) == {image.transpose(2, 0, 1).tobytes() for image in official}


def test_reordered_npz_is_the_same_cohort(tiny_npz, npz_cohorts):
    file = tiny_npz()
    cohort = data.load("npz", npz_cohorts(file))
    rng = np.random.default_rng(1)
    content = arrays_of(file)
    for split in data.OFFICIAL:
        order = rng.permutation(20)
        content[f"{split}_images"] = content[f"{split}_images"][order, :, :, None]  # (N, H, W, 1) is the same, too
        content[f"{split}_labels"] = content[f"{split}_labels"][order, 0].astype(np.int32)
    again = data.load("npz", npz_cohorts(tiny_npz(name="reordered.npz", **content)))
    assert again.fingerprint == cohort.fingerprint
    assert all(same(again[name], cohort[name]) for name in data.SPLITS)
    content["test_images"][3, 5, 5] ^= 1
    assert data.load("npz", npz_cohorts(tiny_npz(name="b.npz", **content))).fingerprint != cohort.fingerprint


def test_relative_path_starts_at_the_repository(tiny_npz, npz_cohorts, tmp_path, monkeypatch):
    tiny_npz(name="mine.npz")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert len(data.load("npz", npz_cohorts("mine.npz"))["test"]) == 20


def test_duplicates_are_removed_and_counted(tiny_npz, npz_cohorts):
    content = arrays_of(tiny_npz())
    train, val, test = (content[f"{name}_images"] for name in data.OFFICIAL)
    labels = content["train_labels"]
    train[0], train[1] = test[0], val[1]  # leaves train
    val[2] = test[2]  # leaves val
    train[5] = test[3]  # leaves train although the labels differ (1 and 1 or 0): test keeps its own
    labels[5] = 1 - content["test_labels"][3]
    test[7] = test[5]  # same label: one of them stays
    train[10] = train[12]  # same label: one stays
    train[11] = train[14]  # labels 1 and 0: both go
    content["val_images"][9] = content["val_images"][8]  # labels 1 and 0: both go
    cohort = data.load("npz", npz_cohorts(tiny_npz(name="twice.npz", **content)))
    assert cohort.removed == {"train": 3 + 1 + 2, "val": 1 + 2, "test": 1}
    assert_disjoint(cohort)
    assert sum(len(split) for split in cohort.splits.values()) == 60 - 6 - 3 - 1
    everything = set().union(*map(image_set, cohort.splits.values()))
    assert train[11].tobytes() not in everything
    assert train[10].tobytes() in everything
    assert test[3].tobytes() in image_set(cohort["test"])
    assert "6 from train, 3 from val, 1 from test" in data.describe(cohort)


IMAGES, LABELS = np.full((20, 28, 28), 7, np.uint8), np.arange(20) % 2
WRONG_ARRAYS = [
    ({"val_labels": None}, "key val_labels is missing"),
    ({"train_images": IMAGES.astype(np.float32)}, "train_images is float32, val_images is uint8"),
    ({"train_images": np.full((20, 28, 28), np.nan)}, "train_images is float64, val_images is uint8"),
    ({"test_labels": np.where(LABELS, np.nan, 0.0)}, "test_labels is float64; it must be an integer"),
    ({"train_labels": LABELS * 1.0}, "train_labels is float64; it must be an integer"),
    ({"train_images": IMAGES[:, :24]}, "train_images is (20, 24, 28); it must be square"),
    ({"train_images": np.full((20, 28, 28, 2), 7, np.uint8)}, "(20, 28, 28, 2); it must be square"),
    ({"train_images": IMAGES[0]}, "train_images is (28, 28)"),
    ({"val_images": np.full((20, 32, 32), 7, np.uint8)}, "splits differ in image shape"),
    ({"train_labels": LABELS[:19]}, "train_labels is (19,); it must be (20,) or (20, 1)"),
    ({"train_labels": np.zeros((20, 2), int)}, "train_labels is (20, 2)"),
    ({"train_labels": LABELS - 1}, "train_labels contains -1; labels count from 0"),
    ({"train_labels": LABELS * 10**9}, "train_labels contains 1000000000"),
    ({"val_labels": LABELS * 2}, "class 2 is missing from split train"),
    ({"test_labels": LABELS * 0}, "class 1 is missing from split test"),
    ({f"{split}_labels": LABELS * 0 for split in data.OFFICIAL}, "every label is 0"),
    ({"test_images": IMAGES[:0], "test_labels": LABELS[:0]}, "split test is empty"),
    ({"train_images": IMAGES * 0}, "other ranges from split to split (train 0 to 0, val 0 to 255, test 0 to 255)"),
    ({"train_images": IMAGES}, "without duplicates"),  # all equal under two labels: nothing is left
    ({"train_images": np.full((20, 28, 28), None)}, "train_images holds pickled objects"),
]


@pytest.mark.parametrize(("arrays", "message"), WRONG_ARRAYS, ids=[message for _, message in WRONG_ARRAYS])
def test_wrong_arrays(tiny_npz, npz_cohorts, arrays, message):
    with pytest.raises(InputError) as error:
        data.load("npz", npz_cohorts(tiny_npz(**arrays)))
    assert message in str(error.value)
    assert "tiny.npz" in str(error.value)
    assert "\n" not in str(error.value)


def test_too_few_images_for_the_shares(tiny_npz, npz_cohorts):
    with pytest.raises(InputError, match="train divided by shares: split public is empty"):
        data.load("npz", npz_cohorts(tiny_npz(per_class=2)))


@pytest.mark.parametrize(("size", "message"), [(24, "24 px"), (30, "30 px")])
def test_wrong_npz_size(tiny_npz, npz_cohorts, size, message):
    with pytest.raises(InputError, match=message):
        data.load("npz", npz_cohorts(tiny_npz(size=size)))


def test_npz_has_its_own_size(tiny_npz, npz_cohorts):
    cohorts = npz_cohorts(tiny_npz())
    assert data.load("npz", cohorts, size=28).size == 28
    with pytest.raises(InputError, match="28 px a side, not 64"):
        data.load("npz", cohorts, size=64)


def test_damaged_npz(tiny_npz, npz_cohorts):
    """A cut file, one flipped byte anywhere in the arrays, a pickle, text, a folder: an error, never other images."""
    file = tiny_npz(per_class=5)
    whole = file.read_bytes()
    fingerprint = data.load("npz", npz_cohorts(file)).fingerprint
    rng = np.random.default_rng(0)
    damaged = [whole[: len(whole) // 2], whole[:-1], b"", b"not a zip", pickle.dumps([1])]
    for at in rng.integers(0, len(whole), 60):
        damaged.append(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    outcomes = []
    for content in damaged:
        file.write_bytes(content)
        try:
            outcomes.append(data.load("npz", npz_cohorts(file)).fingerprint)
        except InputError as error:
            outcomes.append(str(error))
    refused = [outcome for outcome in outcomes if outcome != fingerprint]  # a few bytes of a zip carry no content
    assert len(refused) > 0.8 * len(damaged)
    assert all("tiny.npz" in outcome and "\n" not in outcome for outcome in refused)
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match="is no file; correct the path"):
        data.load("npz", npz_cohorts(file))


def test_altered_pixels_without_a_new_checksum(tiny_npz, npz_cohorts):
    content = arrays_of(tiny_npz())
    file = tiny_npz().with_name("stored.npz")
    np.savez(file, **content)  # stored, not deflated: the pixels lie open in the file
    raw = bytearray(file.read_bytes())
    raw[raw.index(content["val_images"].tobytes()) + 100] ^= 1
    file.write_bytes(raw)
    with pytest.raises(InputError, match=r"stored\.npz.* is damaged"):
        data.load("npz", npz_cohorts(file))


def test_bytes_after_an_array(tiny_npz, npz_cohorts):
    """More pixels in the file than its header says: with a correct checksum, too, the file is not what it claims."""
    file = tiny_npz(val_images=None)
    member = io.BytesIO()
    np.save(member, IMAGES)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("val_images.npy", member.getvalue() + b"more")
    with pytest.raises(InputError, match="val_images is damaged"):
        data.load("npz", npz_cohorts(file))


def test_npz_path_missing(cohorts, npz_cohorts):
    with pytest.raises(InputError, match=r"cohorts\.npz\.path is not set"):
        data.load("npz", cohorts)
    with pytest.raises(InputError, match=r"nowhere\.npz' does not exist"):
        data.load("npz", npz_cohorts("nowhere.npz"))


# ----------------------------------------------------------------------------------------------------------- MedMNIST


def network(monkeypatch, download_url):
    """Put a function in the place of the one that the medmnist package downloads with."""
    module = types.SimpleNamespace(download_url=download_url)
    monkeypatch.setitem(sys.modules, "torchvision.datasets.utils", module)


@pytest.fixture
def medmnist_home(tmp_path, monkeypatch):
    """An empty folder in place of ~/.medmnist, no MEDMNIST_ROOT, and a network that cannot be reached."""
    import medmnist.info

    def unreachable(*args, **kwargs):
        unreachable.timeout = socket.getdefaulttimeout()
        raise urllib.error.URLError("no route to host")

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(medmnist.info, "DEFAULT_ROOT", str(home))
    network(monkeypatch, unreachable)
    monkeypatch.delenv("MEDMNIST_ROOT", raising=False)
    return home, unreachable


def test_unreachable_download(medmnist_home, cohorts):
    home, unreachable = medmnist_home
    with pytest.raises(InputError) as error:
        data.load("pneumoniamnist", cohorts, size=64)
    for way in ("pneumoniamnist_64.npz", "set MEDMNIST_ROOT", "cohort phantom", "cohort npz"):
        assert way in str(error.value)
    assert "\n" not in str(error.value)
    assert unreachable.timeout == medmnist_files.STALL  # a silent server cannot hold us for ever
    assert socket.getdefaulttimeout() is None
    assert not list(home.iterdir())


def test_download_reaches_the_cache_whole(medmnist_home, cohorts, tiny_npz, monkeypatch):
    home, _ = medmnist_home
    file = tiny_npz()
    calls = []

    def download(url, root, filename, md5):
        calls.append((url, md5))
        shutil.copy(file, f"{root}/{filename}")

    network(monkeypatch, download)
    first = data.load("breastmnist", cohorts)
    assert [path.name for path in home.iterdir()] == ["breastmnist.npz"]
    assert data.load("breastmnist", cohorts).fingerprint == first.fingerprint
    assert len(calls) == 1  # the second time it is there
    assert any("MD5 is not the published one" in flaw for flaw in first.flaws)


def test_medmnist_root_comes_first(medmnist_home, cohorts, tiny_npz, tmp_path, monkeypatch):
    home, _ = medmnist_home
    tiny_npz(per_class=10, name="breastmnist.npz").rename(home / "breastmnist.npz")
    tiny_npz(per_class=12, name="breastmnist.npz")
    assert len(data.load("breastmnist", cohorts)["test"]) == 20
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path))
    assert len(data.load("breastmnist", cohorts)["test"]) == 24
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="nowhere is no folder"):
        data.load("breastmnist", cohorts)


def test_damaged_cache_does_not_pass(medmnist_home, cohorts, tiny_npz):
    home, _ = medmnist_home
    content = tiny_npz().read_bytes()
    (home / "breastmnist.npz").write_bytes(content[:-200])
    with pytest.raises(InputError, match=r"breastmnist\.npz is damaged"):
        data.load("breastmnist", cohorts)


@pytest.mark.parametrize(
    ("flavour", "layout", "message"),
    [
        ("dermamnist", {"classes": 7}, r"\(1, 28, 28\) .* not \(3, 28, 28\)"),
        ("breastmnist", {"size": 64}, r"\(1, 64, 64\) .* not \(1, 28, 28\)"),
        ("breastmnist", {"classes": 3}, "label 2, but breastmnist has 2 classes"),
        ("retinamnist", {"classes": 4, "channels": 3}, "class 4 is missing from split train"),
    ],
)
def test_file_of_another_flavour(medmnist_home, cohorts, tiny_npz, tmp_path, monkeypatch, flavour, layout, message):
    tiny_npz(**layout, name=f"{flavour}.npz")
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path))
    with pytest.raises(InputError, match=message):
        data.load(flavour, cohorts)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "pneumonia",
            "unknown cohort 'pneumonia'; did you mean pneumoniamnist? known: phantom, fundus, npz, folder, pathmnist",
        ),
        ("fantom", "did you mean phantom?"),
        ("xyz", "unknown cohort 'xyz'; known: phantom"),
        ("chestmnist", "cohort chestmnist has several labels an image"),
        ("nodulemnist3d", "cohort nodulemnist3d is three-dimensional"),
    ],
)
def test_cohorts_that_do_not_exist(cohorts, name, message):
    with pytest.raises(InputError) as error:
        data.load(name, cohorts)
    assert message in str(error.value)


def test_every_flavour_with_flat_images_and_one_label_has_a_name():
    flat = {name for name, about in INFO.items() if not name.endswith("3d") and "multi-label" not in about["task"]}
    assert set(data.SOURCES) == flat | {"phantom", "fundus", "npz", "folder"}


def test_tensors(tiny_npz, npz_cohorts):
    cohort = data.load("npz", npz_cohorts(tiny_npz(classes=3, channels=3)))
    held = data.tensors(cohort)
    assert tuple(held) == data.SPLITS
    x, y = held["val"]
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert torch.equal((x * 255).round().to(torch.uint8), torch.from_numpy(cohort["val"].images))
    assert y.tolist() == cohort["val"].labels.tolist()


def test_wrong_sizes(cohorts):
    with pytest.raises(InputError, match="must be 28, 64, 128 or 224"):
        data.load("breastmnist", cohorts, size=32)
    for size in (24, 30, 228):
        with pytest.raises(InputError, match="must be 28 to 224 and a multiple of 4"):
            data.load("phantom", cohorts, size=size)


def test_unknown_split(tiny_npz, npz_cohorts):
    with pytest.raises(InputError, match="no split 'train': choose one of client, public"):
        data.load("npz", npz_cohorts(tiny_npz()))["train"]


# ---------------------------------------------------------------------------------------------------------- real data


def test_real_cohort(real_root, cohorts):
    cohort = data.load("pneumoniamnist", cohorts)
    content = arrays_of(real_root / "pneumoniamnist.npz")
    assert_disjoint(cohort)
    distinct = {image.tobytes() for split in data.OFFICIAL for image in content[f"{split}_images"]}
    kept = set().union(*map(image_set, cohort.splits.values()))
    assert kept == distinct  # no image is lost but for its copies
    assert cohort.removed["train"] >= 8  # those that the official file has in val, too
    for name in ("val", "test"):
        assert image_set(cohort[name]) <= {image.tobytes() for image in content[f"{name}_images"]}
        assert len(content[f"{name}_images"]) - len(cohort[name]) == cohort.removed[name]
    train = sum(len(cohort[name]) for name in ("client", "public", "reference"))
    assert train == len(content["train_images"]) - cohort.removed["train"]
    for name, share in (("client", 0.5), ("public", 0.2), ("reference", 0.3)):
        assert abs(len(cohort[name]) - share * train) <= 2
    card = data.describe(cohort)
    assert cohort.licence == "CC BY 4.0"
    assert cohort.classes == ("normal", "pneumonia")
    assert cohort.fingerprint in card
    assert "no patient ids" in card
    assert "Kermany" in card
    assert "altered" not in card


def test_altered_real_cohort_is_named(real_file, cohorts, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path))
    content = arrays_of(real_file)
    order = np.random.default_rng(0).permutation(len(content["train_images"]))
    for key in ("train_images", "train_labels"):
        content[key] = content[key][order]
    np.savez(tmp_path / "pneumoniamnist.npz", **content)
    reordered = data.load("pneumoniamnist", cohorts)
    assert "altered" not in data.describe(reordered)
    content["train_images"][0, 14, 14] ^= 1
    np.savez(tmp_path / "pneumoniamnist.npz", **content)
    altered = data.load("pneumoniamnist", cohorts)
    assert altered.fingerprint != reordered.fingerprint
    assert "altered: fingerprint differs from the published content" in data.describe(altered)


# ------------------------------------------------------------------------------------------------------------ phantom


@pytest.fixture
def stored(cohorts, tmp_path, monkeypatch):
    """The small phantom cohort, written to a data folder of its own; (its folder, its parameters)."""
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    data.generate(cohorts.phantom)
    return tmp_path / "data" / "phantom", cohorts


def test_phantom_cohort(stored):
    _, cohorts = stored
    cohort = data.load("phantom", cohorts)
    assert tuple(cohort.splits) == data.SPLITS
    assert {name: len(split) for name, split in cohort.splits.items()} == cohorts.phantom.images.model_dump()
    for split in cohort.splits.values():
        table = np.zeros((2, 4), int)
        np.add.at(table, (split.labels, split.site), 1)
        assert (table == len(split) // 8).all()  # labels 50/50, styles 25 % each, within each label as well
        assert split.lesion.dtype == split.lung.dtype == bool
        assert not split.lesion[split.labels == 0].any()
        assert split.lung.any(axis=(1, 2)).all()
    assert cohort.sites == tuple(phantom.STYLES)
    assert (cohort.n_classes, cohort.channels, cohort.size) == (2, 1, 28)
    assert_disjoint(cohort)
    card = data.describe(cohort)
    assert "| client | 24 | 12 | 12 | 6 | 6 | 6 | 6 |" in card
    assert "lesion and lung" in card


@pytest.mark.parametrize(("grades", "classes"), [(2, ("normal", "referable")), (3, ("normal", "mild", "referable"))])
def test_fundus_cohort(cohorts, grades, classes):
    section = cohorts.fundus.model_copy(update={"grades": grades})
    cohort = data.load("fundus", cohorts.model_copy(update={"fundus": section}))
    assert (cohort.classes, cohort.channels, cohort.size) == (classes, 3, 28)
    assert cohort.sites == tuple(fundus.STYLES)
    assert {name: len(split) for name, split in cohort.splits.items()} == section.images.model_dump()
    for split in cohort.splits.values():
        counts = np.bincount(split.labels, minlength=grades)
        assert counts.max() - counts.min() <= 1
        assert split.images.dtype == np.uint8
        assert split.images.mean((0, 2, 3))[0] > split.images.mean((0, 2, 3))[2]  # red before blue
        assert split.lung is None
        assert not split.lesion[split.labels == 0].any()
        assert split.lesion[split.labels == grades - 1].any((1, 2)).all()
    assert_disjoint(cohort)
    card = data.describe(cohort)
    assert "Masks: lesion\n" in card
    assert data.load("fundus", cohorts, size=32).size == 32


def test_fundus_of_a_size_that_cannot_be(cohorts):
    with pytest.raises(InputError, match="size 30 of cohort fundus must be 28 to 224 and a multiple of 4"):
        data.load("fundus", cohorts, size=30)


def test_stored_phantom_is_the_rendered_one(stored):
    """What comes off the disk, bit-packed masks included, is what the renderer draws."""
    _, cohorts = stored
    drawn = sources._render(cohorts.phantom, 28)
    expected = {
        (i, s, split, image.tobytes()): (lesion.tobytes(), lung.tobytes())
        for i, s, split, image, lesion, lung in zip(
            *(drawn[key] for key in ("labels", "site", "split", "images", "lesion", "lung")), strict=True
        )
    }
    cohort = data.load("phantom", cohorts)
    found = {}
    for number, split in enumerate(cohort.splits.values()):
        for i in range(len(split)):
            key = (split.labels[i], split.site[i], number, split.images[i].tobytes())
            found[key] = (split.lesion[i].tobytes(), split.lung[i].tobytes())
    assert found == expected


def test_patients_are_distinct(cohorts, monkeypatch):
    seen = []
    render = phantom.render

    def spy(patients, *args, **kwargs):
        seen.extend(patients)
        return render(patients, *args, **kwargs)

    monkeypatch.setattr(phantom, "render", spy)
    first = data.load("phantom", cohorts, size=32)
    assert len(set(seen)) == len(seen) == sum(len(split) for split in first.splits.values())
    numbers, seen[:] = list(seen), []
    second = data.load("phantom", cohorts, size=36)
    assert seen == numbers  # another size, the same patients
    assert (first.size, second.size) == (32, 36)


def test_generate_is_deterministic_to_the_byte(cohorts, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        assert "written" in data.generate(cohorts.phantom, folder)
    names = [sorted(file.name for file in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] == sorted([*(f"{name}.npy" for name in sources._STORED), "meta.json"])
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # nothing temporary is left


def test_generate_replaces_nothing_unasked(stored):
    folder, cohorts = stored
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert "unchanged" in data.generate(cohorts.phantom)
    other = cohorts.phantom.model_copy(update={"seed": 8})
    with pytest.raises(InputError, match=r"holds another cohort; .*--force"):
        data.generate(other)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert "written" in data.generate(other, force=True)
    assert (folder / "images.npy").read_bytes() != before["images.npy"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="no phantom cohort; choose another --out"):
        data.generate(cohorts.phantom, force=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == ["phantom"]


def test_generate_where_it_cannot_write(cohorts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        data.generate(cohorts.phantom, tmp_path / "file" / "phantom")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "has seed 7, the parameters ask for 8"),
        ({"size": 32}, "has size 28, the parameters ask for 32"),
        ({"images": {"client": 32, "public": 8, "reference": 8, "val": 8, "test": 8}}, "has images"),
    ],
)
def test_stored_phantom_of_other_parameters(stored, change, message):
    _, cohorts = stored
    section = settings.PhantomCohort.model_validate(cohorts.phantom.model_dump() | change)
    with pytest.raises(InputError, match=r"run: python -m medsec\.data") as error:
        data.load("phantom", cohorts.model_copy(update={"phantom": section}))
    assert message in str(error.value)


def test_stored_phantom_of_an_older_recipe(stored, monkeypatch):
    monkeypatch.setattr(sources, "GENERATION", sources.GENERATION + 1)
    with pytest.raises(InputError, match=r"has generation .* run: python -m medsec.data"):
        data.load("phantom", stored[1])


@pytest.mark.parametrize("name", [*(f"{name}.npy" for name in sources._STORED), "meta.json"])
def test_stored_phantom_missing_or_damaged(stored, name):
    folder, cohorts = stored
    file = folder / name
    content = bytearray(file.read_bytes())
    content[-1 if name != "meta.json" else 0] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is damaged"):
        data.load("phantom", cohorts)
    file.unlink()
    with pytest.raises(InputError, match=f"{name}.*dvc pull.*make data.*python -m medsec.data"):
        data.load("phantom", cohorts)


def test_phantom_of_a_class_too_few(cohorts):
    images = cohorts.phantom.images.model_copy(update={"val": 1})
    section = cohorts.phantom.model_copy(update={"images": images})
    with pytest.raises(InputError, match="class pneumonia is missing from split val"):
        data.load("phantom", cohorts.model_copy(update={"phantom": section}), size=32)


# ----------------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def command(cohorts, monkeypatch, tmp_path):
    """`medsec.data.sources.main` on the small cohorts and an empty data folder."""
    monkeypatch.setattr(sources.params, "validated", lambda *_: cohorts)
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    return sources.main


def test_command_line(command, capsys, cohorts):
    assert command(["describe"]) == 2
    assert command([]) == 0
    assert command(["generate"]) == 0
    assert command(["describe"]) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith("error: the phantom cohort is missing")
    written, unchanged, card = out.split("\n", 2)
    assert written.endswith("written")
    assert unchanged.endswith("unchanged")
    assert card == data.describe(data.load("phantom", cohorts))


def test_command_line_out_and_force(command, capsys, tmp_path, cohorts):
    out = tmp_path / "elsewhere"
    assert command(["--out", str(out)]) == 0
    digest = hashlib.sha256((out / "images.npy").read_bytes()).hexdigest()
    data.generate(cohorts.phantom.model_copy(update={"seed": 8}), out, force=True)
    assert command(["--out", str(out)]) == 2
    assert "holds another cohort" in capsys.readouterr().err
    assert command(["--out", str(out), "--force"]) == 0
    assert hashlib.sha256((out / "images.npy").read_bytes()).hexdigest() == digest
    assert not (tmp_path / "data").exists()


def test_command_line_wrong_cohort(command, capsys):
    assert command(["describe", "--cohort", "phantm"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown cohort 'phantm'; did you mean phantom?")
