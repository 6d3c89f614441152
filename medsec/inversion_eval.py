"""What notebook 03 measures: what an attacker gets out of each defence's gradients, and what the defence costs.

`prepare` makes the instruments of a cohort; `attack_cell` is one seed of one defence under all attacks; `utility_cell` trains
one federation with it. A defence is judged by the best that an attacker who knows it can do, per victim.

Scenarios: ``naive``, the attacks as if there were no defence; ``adaptive``, those and all that knowledge of the defence
allows; ``ceiling``, what an attacker has who recovers the changed image x′ exactly (image-space defences only);
``prior_only``, the floor: what an attacker has without any gradient.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from medsec import (
    convnet,
    data,
    fedcls,
    gradient_defences,
    inversion,
    metrics,
    perturbation,
    purifier,
    reconstruction,
    shadow,
    suppression,
    tables,
)
from medsec.autoencoder import Autoencoder, Prior, train_autoencoder
from medsec.errors import InputError
from medsec.federated import derive_seed, torch_generator
from medsec.inversion import Found, View
from medsec.params import Params

KEYS = ("attack", "batch", "round", "labels", "region")
VARIANTS = (
    "none",
    "gradient_noise",
    "dp_sgd",
    "topk",
    "soteria",
    "image_noise",
    "shadow_released",
    "shadow_described",
    "shadow_shuffled",
    "shadow_inverted",
    "offset",
    "gaussian",
    "shadow_hardened",
    "autoencoder_only",
    "random_grouping",
)
CONTROLS = {  # of the same norm as `shadow_described`
    "shadow_shuffled": perturbation.shuffled,
    "shadow_inverted": perturbation.inverted,
    "offset": perturbation.offset,
    "gaussian": perturbation.gaussian,
}
QUICK = {  # what the notebook itself runs: variants under attack, and those whose cost it measures
    "attack": (
        "none",
        "gradient_noise",
        "topk",
        "soteria",
        "shadow_released",
        "shadow_described",
        "shadow_hardened",
        "autoencoder_only",
    ),
    "utility": ("none", "topk", "shadow_hardened"),
}
SUPPRESSION = {"shadow_hardened": "similar", "random_grouping": "random", "autoencoder_only": "similar"}
UNITS = {
    "psnr": "dB",
    "ssim": "similarity",
    "retrieval": "share",
    "retrieval_projected": "share",
    "failed": "share",
    "auc": "AUC",
    "psnr_minus_none": "dB",
    "ssim_minus_none": "similarity",
    "psnr_minus_shuffled": "dB",
    "auc_minus_none": "AUC",
    "macro_f1_minus_none": "share",
    "macro_f1": "share",
    "balanced_accuracy": "share",
}


@dataclass(frozen=True)
class Setup:
    """The instruments of one cohort and one set of parameters, the same for every seed.

    ``autoencoder`` is the defender's, ``prior`` the attacker's own generator; both are trained on ``public``.
    """

    cohort: data.Cohort
    params: Params
    splits: dict[str, tuple[Tensor, Tensor]]
    autoencoder: Autoencoder
    prior: nn.Module


@dataclass(frozen=True)
class Client:
    """What one client does to its gradients: ``send``; image-space defences have ``perturb``, x -> x′, as well."""

    send: gradient_defences.Defence
    perturb: gradient_defences.Perturbation | None = None


def prepare(cohort: str, params: Params) -> Setup:
    """Load a cohort and train the two autoencoders on ``public``.

    Raises:
        InputError: the cohort cannot be loaded, or has too few images for the clients.
    """
    return _prepare(cohort, params.model_dump_json())


@functools.lru_cache(maxsize=2)
def _prepare(name: str, params_json: str) -> Setup:
    params = Params.model_validate_json(params_json)
    cohort = data.load(name, params.cohorts)
    splits = {
        split: (torch.from_numpy(part.float()), torch.from_numpy(part.labels)) for split, part in cohort.splits.items()
    }
    public, coders = splits["public"][0], params.inversion.autoencoder
    seeds = [derive_seed(params.seeds.tuning[0], who) for who in ("defender", "attacker")]
    options = {"epochs": coders.epochs, "lr": coders.lr, "batch": coders.batch}
    own, other = (
        train_autoencoder(public, latent=latent, seed=seed, **options)
        for latent, seed in zip((coders.latent, coders.latent_prior), seeds, strict=True)
    )
    return Setup(cohort, params, splits, own, Prior(other, public))


def deal(setup: Setup, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """The clients' images and labels of one run: disjoint parts of the ``client`` split."""
    p, (images, labels) = setup.params.inversion.federation, setup.splits["client"]
    parts = data.partition(
        setup.cohort["client"].labels,
        p.n_clients,
        "iid",
        seed=derive_seed(seed, "partition"),
        per_client=p.images_per_client,
    )
    return [images[part] for part in parts], [labels[part] for part in parts]


def network(setup: Setup, seed: int) -> convnet.ConvNet:
    """The untrained classifier of a run."""
    c = setup.cohort
    width = setup.params.inversion.federation.width
    return convnet.new(c.size, c.channels, c.n_classes, width=width, seed=derive_seed(seed, "network"))


# Defences ------------------------------------------------------------------------------------------------------------


def client(variant: str, setup: Setup, images: Tensor, labels: Tensor, seed: int) -> Client:
    """A fresh client with one of `VARIANTS`; ``images`` and ``labels`` are all that it holds."""
    p, rounds = setup.params.inversion.defences, setup.params.inversion.federation.rounds
    simple: dict[str, gradient_defences.Defence] = {
        "none": gradient_defences.none,
        "gradient_noise": functools.partial(gradient_defences.gradient_noise, ratio=p.noise_ratio, seed=seed),
        "dp_sgd": functools.partial(
            gradient_defences.dp_sgd, clip=p.dp_clip, noise_multiplier=p.dp_noise_multiplier, seed=seed
        ),
        "topk": functools.partial(gradient_defences.topk, keep=p.topk_keep),
        "soteria": functools.partial(gradient_defences.soteria, prune=p.soteria_prune),
    }
    if variant in simple:
        return Client(simple[variant])
    perturb = _perturbation(variant, setup, images, labels, seed, rounds)
    return Client(gradient_defences.send(perturb), perturb)


def _perturbation(variant, setup: Setup, images: Tensor, labels: Tensor, seed: int, rounds: int):
    p, c = setup.params.inversion.defences, setup.cohort
    if variant == "image_noise":
        return functools.partial(gradient_defences.noisy_image, rms=p.image_noise_rms, kind="gaussian", seed=seed)
    if variant == "shadow_released":
        latent = setup.params.inversion.autoencoder.latent
        return shadow.shadow_released(
            c.size, c.channels, _shadow_settings(setup), latent=latent, rounds=rounds, seed=seed
        ).perturb
    if variant in SUPPRESSION:
        k = 1 if variant == "autoencoder_only" else p.k
        return suppression.Hardened(
            setup.autoencoder, images, labels, k=k, grouping=SUPPRESSION[variant], seed=seed
        ).perturb
    described = shadow.shadow_described(setup.autoencoder, _shadow_settings(setup), rounds=rounds, seed=seed).perturb
    if variant in CONTROLS:
        return perturbation.controlled(described, CONTROLS[variant], seed=seed)
    if variant != "shadow_described":
        raise InputError(f"defence {variant!r}: choose one of {', '.join(VARIANTS)}")
    return described


def _shadow_settings(setup: Setup) -> shadow.Settings:
    return shadow.Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in setup.params.inversion.shadow})


# One defence under attack --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Victims of one client in one round, and what the server and the defence have made of them.

    Attributes:
        x, y: (V, B, C, S, S) and (V, B).
        changed: x′, or None for a defence on gradients.
        view: what the server sees.
    """

    x: Tensor
    y: Tensor
    changed: Tensor | None
    view: View


def victims(setup: Setup, images: Tensor, n: int, batch: int, seed: int) -> Tensor:
    """(n, batch) indices of a client's images, none twice.

    Raises:
        InputError: the client holds fewer.
    """
    if n * batch > len(images):
        raise InputError(
            f"{n} victims with a batch of {batch}: a client holds {len(images)} images; lower inversion.victims"
        )
    return torch.randperm(len(images), generator=torch_generator(seed, "victims"))[: n * batch].view(n, batch)


def case(own: Client, model: nn.Module, x: Tensor, y: Tensor, round: int) -> Case:
    """The victims' gradients under a defence, each batch sent by itself."""
    changed = None
    if own.perturb is None:
        sent = [own.send(model, a, b, round) for a, b in zip(x, y, strict=True)]
    else:  # asked once: a defence may remember what it was asked
        changed = torch.stack([own.perturb(model, a, b, round) for a, b in zip(x, y, strict=True)])
        sent = [gradient_defences.gradients_at(model, a, b) for a, b in zip(changed, y, strict=True)]
    return Case(x, y, changed, View(model, [torch.stack(part).detach() for part in zip(*sent, strict=True)]))


def naive(setup: Setup, found: Case, seed: int) -> dict[str, Found]:
    """The attacks that take the gradient for what it seems."""
    return {
        attack: _invert(
            setup, [found.view], found, attack, seed, **({"generator": setup.prior} if attack == "prior" else {})
        )
        for attack in setup.params.inversion.attacks
    }


def _invert(setup: Setup, views: Sequence[View], found: Case, attack: str, seed: int, **more) -> Found:
    return inversion.invert(
        views,
        found.y,
        tuple(found.x.shape[2:]),
        attack=attack,
        settings=setup.params.inversion.attack,
        seed=derive_seed(seed, "attack", attack),
        **more,
    )


def known_weights(variant: str, view: View) -> list[Tensor]:
    """What an attacker leaves out of the comparison: dropped entries (``topk``), the head's weight (``soteria``)."""
    if variant == "topk":
        return [(g != 0).to(g) for g in view.gradients]
    names = [name for name, _ in view.model.named_parameters()]
    return [
        torch.zeros_like(g) if name == "head.weight" else torch.ones_like(g)
        for name, g in zip(names, view.gradients, strict=True)
    ]


def public_pairs(variant: str, setup: Setup, model: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    """Public images after and before an image-space defence (of the first round) that the attacker runs itself."""
    images, labels = setup.splits["public"]
    own = client(variant, setup, images, labels, derive_seed(seed, "attacker's copy"))
    batch = setup.params.inversion.federation.batch
    changed = [own.perturb(model, a, b, 0) for a, b in zip(images.split(batch), labels.split(batch), strict=True)]
    return torch.cat(changed), images


def adaptive(
    variant: str, setup: Setup, found: Case, plain: dict[str, Found], later: Sequence[Case], seed: int
) -> dict[str, Found]:
    """Attacks by somebody who knows the defence; see each one's name.

    ``known``: entries or layers that are known to be useless are left out; ``joint``: several rounds are matched together;
    ``generator``: search in the defender's own generator; ``purified``: x′ is searched within the bounds that it can have,
    and mapped back by a purifier that was trained on public images.
    """
    attacks: dict[str, Found] = {}
    wanted = setup.params.inversion.adaptive
    if "known" in wanted and variant in ("topk", "soteria"):
        weights = known_weights(variant, found.view)
        view = View(found.view.model, found.view.gradients, weights=weights)
        attacks["known"] = _invert(setup, [view], found, "ig", seed)
    if "joint" in wanted:
        attacks["joint"] = _invert(setup, [found.view, *(c.view for c in later)], found, "ig", seed)
    if "generator" in wanted and variant in SUPPRESSION:
        own = Prior(setup.autoencoder, setup.splits["public"][0])
        attacks["generator"] = _invert(setup, [found.view], found, "prior", seed, generator=own)
    if "purified" in wanted and found.changed is not None:
        changed, clean = public_pairs(variant, setup, found.view.model, seed)
        bounds = float(changed.min()), float(changed.max())
        recovered = _invert(setup, [found.view], found, "ig", seed, bounds=bounds)
        purify, _ = purifier.fit(changed, clean, setup.params.inversion.purifier, derive_seed(seed, "purifier"))
        images = purify(recovered.images.flatten(0, 1)).view_as(recovered.images)
        attacks["purified"] = dataclasses.replace(recovered, images=images)
    return attacks


def floor(setup: Setup, y: Tensor) -> Tensor:
    """(V, B, C, S, S): without a gradient, but with the label, the public mean image of that class."""
    images, labels = setup.splits["public"]
    means = torch.stack([images[labels == k].mean(0) for k in range(setup.cohort.n_classes)])
    return means[y]


Measure = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


def measures(setup: Setup, images: Sequence[Tensor], index: Tensor) -> Measure:
    """Function of reconstructions and originals (V, B, …) -> every metric for every victim (V,), means over a batch.

    Args:
        images: all clients' images; retrieval searches among them, and among their projections by the defender's
            autoencoder, which look more like what a suppressing defence lets through.
        index: (V, B) the victims' places in the first client's images.
    """
    gallery = torch.cat(list(images))
    with torch.no_grad():
        projected = setup.autoencoder(gallery).numpy()
    gallery = gallery.numpy()

    def measure(found: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
        v, b = truth.shape[:2]
        ordered = np.concatenate([reconstruction.match(f, t) for f, t in zip(found, truth, strict=True)])
        flat, places = truth.reshape(v * b, *truth.shape[2:]), index.flatten().numpy()
        values = {
            "psnr": reconstruction.psnr(ordered, flat),
            "ssim": reconstruction.ssim(ordered, flat),
            "retrieval": reconstruction.retrieval(ordered, gallery, places),
            "retrieval_projected": reconstruction.retrieval(ordered, projected, places),
        }
        return {name: np.asarray(value, dtype=np.float64).reshape(v, b).mean(1) for name, value in values.items()}

    return measure


def strongest(measured: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Of several attacks the one with the highest PSNR, victim by victim, for all metrics."""
    names = list(measured)
    best = np.argmax([measured[name]["psnr"] for name in names], axis=0)
    return {
        metric: np.array([measured[names[k]][metric][v] for v, k in enumerate(best)]) for metric in measured[names[0]]
    }


def attack_cell(cohort: str, params: Params, variant: str, seed: int) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """One seed of one defence: untrained network, batch 1, every attack.

    Returns:
        Rows with the key columns `KEYS`, means over the victims; and the pictures (V, C, S, S) of the originals, of what
        the defence makes of them, and of the strongest naive and adaptive reconstruction.
    """
    torch.set_num_threads(1)
    setup = prepare(cohort, params)
    images, labels = deal(setup, seed)
    model = network(setup, seed)
    index = victims(setup, images[0], params.inversion.victims, 1, seed)
    x, y = images[0][index], labels[0][index]
    own = client(variant, setup, images[0], labels[0], derive_seed(seed, "defence", 0))
    found = case(own, model, x, y, 0)
    plain = naive(setup, found, seed)
    later = later_rounds(variant, setup, model, images, labels, x, y, seed)
    everything = plain | adaptive(variant, setup, found, plain, later, seed)
    measure, truth = measures(setup, images, index), x.numpy()
    scores = {name: measure(f.images.numpy(), truth) for name, f in everything.items()}
    parts = [
        _rows(seed, variant, "naive", {name: scores[name] for name in plain}, plain),
        _rows(seed, variant, "adaptive", scores, everything),
        _rows(seed, variant, "prior_only", {"floor": measure(floor(setup, y).numpy(), truth)}),
    ]
    if found.changed is not None:
        parts.append(_rows(seed, variant, "ceiling", {"exact": measure(found.changed.clamp(0, 1).numpy(), truth)}))
    shown = {"original": x, "sent": x if found.changed is None else found.changed.clamp(0, 1)}
    shown |= {"naive": _best({n: scores[n] for n in plain}, plain), "adaptive": _best(scores, everything)}
    return pd.concat(parts, ignore_index=True), {name: images[:, 0].numpy() for name, images in shown.items()}


def later_rounds(
    variant: str, setup: Setup, model: nn.Module, images, labels, x: Tensor, y: Tensor, seed: int
) -> list[Case]:
    """The same victims in the rounds after the first, as the federation goes on with this defence."""
    p = setup.params.inversion
    if "joint" not in p.adaptive:
        return []
    clients = [
        client(variant, setup, a, b, derive_seed(seed, "defence", i))
        for i, (a, b) in enumerate(zip(images, labels, strict=True))
    ]
    short = p.federation.model_copy(update={"rounds": p.joint_rounds - 1})
    states = fedcls.train(model, images, labels, [c.send for c in clients], short, seed)
    cases = []
    for round, state in enumerate(states[1:], start=1):
        now = network(setup, seed)
        now.load_state_dict(state)
        cases.append(case(clients[0], now, x, y, round))
    return cases


def _rows(
    seed: int,
    variant: str,
    scenario: str,
    scores: dict[str, dict[str, np.ndarray]],
    found: dict[str, Found] | None = None,
) -> pd.DataFrame:
    """Means over the victims: of the strongest attack per victim (no key), and of each attack where there are several."""
    rows = tables.Rows(KEYS, UNITS, seed, variant, scenario)
    for metric, values in strongest(scores).items():
        rows.add(metric, values.mean(), len(values))
    for attack, each in scores.items() if len(scores) > 1 else ():
        for metric, values in each.items():
            rows.add(metric, values.mean(), len(values), attack=attack)
        if found is not None:
            failed = found[attack].failed.numpy()
            rows.add("failed", failed.mean(), len(failed), attack=attack)
    return rows.table()


def _best(scores: dict[str, dict[str, np.ndarray]], found: dict[str, Found]) -> Tensor:
    names = list(scores)
    best = np.argmax([scores[name]["psnr"] for name in names], axis=0)
    return torch.stack([found[names[k]].images[v] for v, k in enumerate(best)])


# What a defence costs ------------------------------------------------------------------------------------------------


def utility_cell(cohort: str, params: Params, variant: str, seed: int) -> pd.DataFrame:
    """One federation that trains with a defence from beginning to end; rows ``auc``, ``macro_f1``, ``balanced_accuracy``."""
    torch.set_num_threads(1)
    setup = prepare(cohort, params)
    images, labels = deal(setup, seed)
    clients = [
        client(variant, setup, a, b, derive_seed(seed, "defence", i))
        for i, (a, b) in enumerate(zip(images, labels, strict=True))
    ]
    model = network(setup, seed)
    states = fedcls.train(model, images, labels, [c.send for c in clients], params.inversion.federation, seed)
    model.load_state_dict(states[-1])
    rows = tables.Rows(KEYS, UNITS, seed, variant, "utility")
    for metric, value in fedcls.utility(model, setup.splits["val"], setup.splits["test"]).items():
        rows.add(metric, value, len(setup.splits["test"][0]))
    return rows.table()


# Tables --------------------------------------------------------------------------------------------------------------

TARGETED = ("shadow_described", "shadow_shuffled")


def complete(runs: pd.DataFrame) -> pd.DataFrame:
    """A runs table with paired differences, of headline rows on the same seed.

    ``<metric>_minus_none``: to no defence, in the same scenario. ``psnr_minus_shuffled``: of the described defence to the
    same noise at places that were shuffled.
    """
    plain = runs[(runs[list(KEYS)] == "").all(axis=1)]
    parts = [runs]
    by = ["seed", "scenario", "metric"]
    base = plain[plain["variant"] == "none"].set_index(by)["value"]
    others = plain[(plain["variant"] != "none") & plain["metric"].isin(["psnr", "ssim", "auc", "macro_f1"])]
    parts.append(_minus(others, base, by, "_minus_none"))
    base = plain[plain["variant"] == TARGETED[1]].set_index(by)["value"]
    parts.append(
        _minus(plain[(plain["variant"] == TARGETED[0]) & (plain["metric"] == "psnr")], base, by, "_minus_shuffled")
    )
    return pd.concat(parts, ignore_index=True)


def _minus(rows: pd.DataFrame, base: pd.Series, by: list[str], suffix: str) -> pd.DataFrame:
    joined = rows.join(base.rename("base"), on=by).dropna(subset="base")
    joined["value"] -= joined["base"]
    joined["metric"] += suffix
    return joined[rows.columns]


def summarise(runs: pd.DataFrame, params: Params) -> pd.DataFrame:
    """The summary of a runs table, after `complete`."""
    return metrics.summarise(complete(runs), KEYS)
