"""What has no library of its own as peer: rounds of a federation, loading a folder, trigger scores, Frechet distance.

``make bench`` runs it and it writes ``benchmarks/results.csv``. The bare loop trains the same clients with the same function,
averages states with one line of PyTorch and checks nothing; ours screens every update and keeps the history. Its clients hold
fewer images than in notebook 01, so that what is measured is not hidden behind the training. `medsec.data` checks a folder,
divides it by patient, resamples by true area means and hashes; Pillow alone opens and resizes.
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from common import OURS, compared, one_thread, write
from PIL import Image
from skimage.feature import match_template

from experiments import params
from medphantom import chest as phantom
from medsec import data
from medsec.backdoor import gan, triggers
from medsec.backdoor.frechet import frechet_distance
from medsec.data import folder as folder_source

ROUNDS = ((4, 32), (16, 32), (64, 32), (4, 64), (4, 128))  # clients, pixels a side
OF_CLIENT, IMAGES, SIDE, FEATURES = 64, 600, 64, 64


def drawn(n: int, size: int) -> np.ndarray:
    """(n, size, size) uint8 radiographs, of two classes in turn."""
    return phantom.render(
        range(n), [k % 2 for k in range(n)], seed=params.load().cohorts.phantom.seed, size=size
    ).images


def federation(n: int, size: int) -> gan.FederatedGAN:
    """n clients with `OF_CLIENT` images each."""
    p = params.load()
    x = torch.from_numpy(drawn(OF_CLIENT, size)).float()[:, None] / 255
    y = torch.arange(OF_CLIENT) % 2
    settings = p.fedgan.model_copy(update={"n_clients": n, "malicious": []})
    return gan.new_federation([x] * n, [y] * n, 2, settings, seed=0)


def bare_round(start: gan.FederatedGAN) -> None:
    """One round in plain PyTorch."""
    fed = copy.deepcopy(start)
    sent = [gan.train_client(client, fed.state, fed, 0).state for client in fed.clients]
    fed.state = {k: torch.stack([s[k].double() for s in sent]).mean(0).to(v.dtype) for k, v in sent[0].items()}


def folder(place: Path, images: np.ndarray) -> Callable:
    """PNG files of two classes, six images a patient."""
    for i, image in enumerate(images):
        (place / f"class{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(image).save(place / f"class{i % 2}" / f"p{i // 6}_{i}.png")
    given = params.merge(params.load().model_dump(), {"cohorts": {"folder": {"path": str(place)}}})
    cohorts = params.validate(given).cohorts

    def load():
        folder_source._read.cache_clear()  # pixels are kept for a process that loads them again
        return data.load("folder", cohorts)

    return load


def pillow(place: Path, size: int) -> np.ndarray:
    files = sorted(place.rglob("*.png"))
    return np.stack([np.asarray(Image.open(file).resize((size, size), Image.Resampling.BOX)) for file in files])


def plain_frechet(a: np.ndarray, b: np.ndarray) -> float:
    one, other = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(one @ other).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + other - 2 * root))


def main() -> None:
    one_thread()
    lines = []
    for n, size in ROUNDS:
        start = federation(n, size)
        calls = {OURS: lambda s=start: gan.run(copy.deepcopy(s), 1), "bare loop": lambda s=start: bare_round(s)}
        lines += compared(f"FedGAN round, {n} clients with {OF_CLIENT} images of {size} px", calls)
    images = drawn(IMAGES, SIDE)
    with tempfile.TemporaryDirectory() as place:
        size = params.load().cohorts.folder.size
        calls = {OURS: folder(Path(place), images), "Pillow": lambda: pillow(Path(place), size)}
        lines += compared(f"load {IMAGES} PNG files of {SIDE} px", calls)
    trigger = triggers.make_trigger("moving", image_size=SIDE, channels=1, size=4)
    x, template = torch.from_numpy(images).float()[:, None] / 255, trigger.pattern[0].numpy()
    calls = {
        OURS: lambda: triggers.score(trigger, x),
        "scikit-image": lambda: [match_template(image, template).max() for image in x[:, 0].numpy()],
    }
    apart = np.abs(np.array(calls["scikit-image"]()) - calls[OURS]().numpy())
    said = f"median {np.median(apart):.0e}, at most {apart.max():.0e} apart"  # the latter in regions without contrast
    lines += compared(f"trigger scores of {IMAGES} images of {SIDE} px", calls, {OURS: said})
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((1000, FEATURES)), rng.standard_normal((1000, FEATURES)) + 0.1
    calls = {OURS: lambda: frechet_distance(a, b), "scipy.linalg.sqrtm": lambda: plain_frechet(a, b)}
    lines += compared(
        f"Frechet distance, {FEATURES} features", calls, {name: f"{call():.6f}" for name, call in calls.items()}
    )
    write("others", lines, ("pillow", "scikit-image", "scipy"))


if __name__ == "__main__":
    main()
