"""What the book's page of movable panels shows: every position of three panels of the notebooks, computed beforehand.

``python -m experiments panels --cohort phantom`` writes ``panels.json``, the numbers, and ``panels.png``, the images. It has
one row of `SHOWN` images for each thing that a position can show; the JSON says which rows a position has. The functions are
those of the panels in notebooks 01, 03 and 04. A panel is a dictionary:

- ``controls``: by name the values that can be chosen, in order;
- ``start``: of each control the place of the value to begin with;
- ``rows``: by what is shown the row of the picture, for each position, or one for all positions;
- ``marks``: by position, for each image shown a "1" where it is found, or wrongly answered;
- ``numbers``: by name and position; and those that are the same everywhere.

Positions are nested lists, in the order of the controls; a list may end early, where the controls that are left change nothing.
"""

import dataclasses
import functools
import io
import json

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.adversarial_pruning_defense import arms
from experiments.gia_defense import adaptive, clients
from experiments.params import Params
from medsec import data
from medsec.backdoor import triggers
from medsec.core import files, paths
from medsec.data.cohort import tensors
from medsec.evasion.scenarios import craft
from medsec.inversion import defences, scores
from medsec.nets import fit

SHOWN = 4  # images a row
PLACES = ("corner", "inside")  # of the trigger: where the attacker puts it, and a quarter of a side inside, on anatomy
OPACITIES = tuple(round(0.05 * k, 2) for k in range(1, 21))
NETWORKS = ("base", "prune_cbam", "at_ramp")
EPS = (0, 0.25, 0.5, 1, 2, 4)  # times the headline's
ATTACKED = 50  # test images, of which the first are shown
WHERE = ("image", "gradient")  # what noise is put on
TIMES = (0, 0.5, 1, 2, 5)  # times the usual strength of the defence


class Strips:
    """The rows of the picture, in the order in which they are added."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []

    def add(self, images: Tensor) -> int:
        """The place of a new row: the first images of (N, 1, S, S) in [0, 1], side by side."""
        shown = (255 * images[:SHOWN, 0].detach().clamp(0, 1)).round().byte().numpy()
        self.rows.append(np.concatenate(list(shown), axis=1))
        return len(self.rows) - 1

    def png(self) -> bytes:
        """All rows below one another, grey, without loss."""
        out = io.BytesIO()
        Image.fromarray(np.concatenate(self.rows)).save(out, "PNG", optimize=True)
        return out.getvalue()


def _bits(flags: Tensor | np.ndarray) -> str:
    return "".join(str(int(flag)) for flag in flags[:SHOWN])


# Trigger ---------------------------------------------------------------------------------------------------------------


def trigger_at(p: Params, splits: dict, place: str, size: int) -> tuple[Tensor, list[Tensor], int]:
    """Held-out images with a trigger, in which of them it is found at each opacity, and in how many that have none."""
    held_out, public = splits["val"][0], splits["public"][0]
    side = held_out.shape[-1]
    trigger = triggers.make_trigger(p.fedgan.trigger.kind, image_size=side, channels=held_out.shape[1], size=size)
    if place == "inside":
        trigger = dataclasses.replace(trigger, offset=side // 4)
    stamped, threshold = (
        triggers.stamp(trigger, held_out),
        triggers.calibrate(trigger, public, p.fedgan.measure.threshold_fpr),
    )
    hits = [triggers.score(trigger, held_out + o * (stamped - held_out)) > threshold for o in OPACITIES]
    return stamped, hits, int((triggers.score(trigger, held_out) > threshold).sum())


def trigger_panel(p: Params, splits: dict, strips: Strips) -> dict:
    """Place, size and opacity of a trigger: in how many held-out images the server's detector finds it, and false alarms.

    At an opacity of o, an image is (1 - o) times the clean one and o times the stamped one: the page lays one over the other.
    """
    held_out = splits["val"][0]
    sizes = list(range(2, held_out.shape[-1] // 4 + 1))
    clean, rows, marks, found, alarms = strips.add(held_out), [], [], [], []
    for place in PLACES:
        parts = [trigger_at(p, splits, place, size) for size in sizes]
        rows.append([strips.add(stamped) for stamped, _, _ in parts])
        marks.append([[_bits(each) for each in hits] for _, hits, _ in parts])
        found.append([[int(each.sum()) for each in hits] for _, hits, _ in parts])
        alarms.append([wrong for _, _, wrong in parts])
    start = {"place": 1, "size": sizes.index(p.fedgan.trigger.size), "opacity": OPACITIES.index(0.1)}
    return {
        "controls": {"place": list(PLACES), "size": sizes, "opacity": list(OPACITIES)},
        "start": start,
        "rows": {"clean": clean, "stamped": rows},
        "marks": marks,
        "numbers": {"found": found, "alarms": alarms, "held_out": len(held_out)},
    }


# Adversarial examples --------------------------------------------------------------------------------------------------


def attacked(p: Params, setup: arms.Setup, network: str, times: float) -> tuple[Tensor, Tensor]:
    """What PGD makes of the first test images at so many times the headline's eps, and which answers are then wrong."""
    x, y = (part[:ATTACKED] for part in setup.splits["test"])
    seed, eps = p.seeds.evaluation[0], times * p.evasion.eps / 255
    model = arms.network(setup, network, seed)
    found = craft("pgd20", model, x, y, eps, p.evasion.attacks, seed, stop=False) if times else x
    return found, fit.predict(model, found).argmax(1) != y


def eps_panel(p: Params, setup: arms.Setup, strips: Strips) -> dict:
    """Network and eps: what 20 steps of PGD make of images, and which answers are wrong."""
    clean, rows, marks, wrong = strips.add(setup.splits["test"][0]), [], [], []
    for network in NETWORKS:
        found = [attacked(p, setup, network, times) for times in EPS]
        rows.append([strips.add(x) if times else clean for times, (x, _) in zip(EPS, found, strict=True)])
        marks.append([_bits(missed) for _, missed in found])
        wrong.append([int(missed.sum()) for _, missed in found])
    return {
        "controls": {"network": list(NETWORKS), "eps": [times * p.evasion.eps for times in EPS]},
        "start": {"network": 0, "eps": EPS.index(1)},
        "rows": {"clean": clean, "attacked": rows},
        "marks": marks,
        "numbers": {"wrong": wrong, "attacked": ATTACKED},
    }


# Gradient inversion ----------------------------------------------------------------------------------------------------


def noisy_client(p: Params, where: str, times: float) -> clients.Client:
    """One that puts noise on its image, or on its gradient, of so many times the usual strength."""
    usual, seed = p.inversion.defences, p.seeds.evaluation[0]
    if where == "gradient":
        ratio = times * usual["gradient_noise"]["ratio"]
        return clients.Client(functools.partial(defences.gradient_noise, ratio=ratio, seed=seed))
    rms = times * usual["image_noise"]["rms"]
    perturb = functools.partial(defences.noisy_image, rms=rms, kind="gaussian", seed=seed)
    return clients.Client(defences.send(perturb), perturb)


def inverted(
    p: Params, setup: clients.Setup, where: str, times: float
) -> tuple[Tensor, Tensor, Tensor, list[bool], float]:
    """The victims' images, what is sent of them, what is reconstructed; whose is found, and the mean PSNR in dB."""
    seed = p.seeds.evaluation[0]
    images, labels = (part[0] for part in clients.deal(setup, seed))
    index = adaptive.victims(setup, images, SHOWN, 1, seed)
    case = adaptive.case(noisy_client(p, where, times), clients.network(setup, seed), images[index], labels[index], 0)
    rebuilt = adaptive.naive(setup, case, ["ig"], seed)["ig"].images[:, 0]
    original, sent = images[index[:, 0]], (case.x if case.changed is None else case.changed)[:, 0]
    found = scores.retrieval(rebuilt.numpy(), images.numpy(), index[:, 0].numpy())
    psnr = float(np.mean(scores.psnr(rebuilt.numpy(), original.numpy())))
    return original, sent, rebuilt, [bool(each) for each in found], round(psnr, 1)


def noise_panel(p: Params, setup: clients.Setup, strips: Strips) -> dict:
    """Where noise goes, and how much of it: what the client uses, and what the server reconstructs from its gradient."""
    without = inverted(p, setup, "gradient", 0)  # no noise is the same in both places
    clean, none = strips.add(without[0]), strips.add(without[2])
    used, rebuilt, marks, psnr, strength = [], [], [], [], []
    usual = {
        "image": p.inversion.defences["image_noise"]["rms"],
        "gradient": p.inversion.defences["gradient_noise"]["ratio"],
    }
    for where in WHERE:
        found = [inverted(p, setup, where, times) if times else without for times in TIMES]
        noisy = [times > 0 and where == "image" for times in TIMES]
        used.append([strips.add(each[1]) if own else clean for own, each in zip(noisy, found, strict=True)])
        rebuilt.append([strips.add(each[2]) if times else none for times, each in zip(TIMES, found, strict=True)])
        marks.append([_bits(each[3]) for each in found])
        psnr.append([each[4] for each in found])
        strength.append([round(times * usual[where], 3) for times in TIMES])
    held = len(clients.deal(setup, p.seeds.evaluation[0])[0][0])
    return {
        "controls": {"where": list(WHERE), "times": list(TIMES)},
        "start": {"where": 0, "times": TIMES.index(2)},
        "rows": {"image": clean, "used": used, "reconstructed": rebuilt},
        "marks": marks,
        "numbers": {"psnr": psnr, "strength": strength, "held": held},
    }


# All of them -----------------------------------------------------------------------------------------------------------


def inversion_setup(cohort: str, p: Params) -> clients.Setup:
    """That of notebook 03 without its autoencoders, which no attack here needs."""
    loaded = data.load(cohort, p.cohorts)
    return clients.Setup(p, loaded, tensors(loaded), None, None)


def write(cohort: str, p: Params) -> None:
    """Compute all positions of all panels and write the two files to the cohort's results.

    Raises:
        InputError: the cohort cannot be loaded, or is too small.
    """
    torch.set_num_threads(1)
    strips, setup = Strips(), inversion_setup(cohort, p)
    panels = {
        "trigger": trigger_panel(p, setup.splits, strips),
        "eps": eps_panel(p, arms.prepare(cohort, p), strips),
        "noise": noise_panel(p, setup, strips),
    }
    about = {"cohort": cohort, "side": setup.cohort.size, "shown": SHOWN, "rows": len(strips.rows)}
    files.write(paths.results(cohort) / "panels.png", strips.png())
    files.write(paths.results(cohort) / "panels.json", json.dumps(about | {"panels": panels}) + "\n")
