"""The instruments of notebook 03: a cohort's clients, their network, and every defence as a client applies it."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from experiments import instruments
from experiments.params import Params
from medsec import data
from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed
from medsec.core.settings import AutoencoderParams, Cohorts
from medsec.data.cohort import setting
from medsec.inversion import defences, perturbation, shadow, substitution
from medsec.inversion.defences import DEFENCES, Defence, Perturbation
from medsec.nets import convnet
from medsec.nets.autoencoder import Autoencoder, Prior, new_autoencoder, train_autoencoder

BASELINES = ("gradient_noise", "dp_sgd", "topk", "soteria", "image_noise")
CHANGES = {  # defences of images, and what they change them by
    **dict.fromkeys(("image_noise", "shadow_released", "shadow_described"), "noise"),
    **dict.fromkeys(("shadow_shuffled", "shadow_inverted", "offset", "gaussian"), "noise"),
    **dict.fromkeys(("shadow_hardened", "random_grouping"), "substitute"),
    **dict.fromkeys(("shadow_suppressed", "autoencoder_only", "public_only"), "substitute"),
}
FAMILIES = {**dict.fromkeys(DEFENCES, "gradient"), "none": "none", **CHANGES}
VARIANTS = tuple(dict.fromkeys(("none", *BASELINES, *CHANGES, *DEFENCES)))  # a new gradient defence comes last
CONTROLS = {  # of the same norm as `shadow_described`
    "shadow_shuffled": perturbation.shuffled,
    "shadow_inverted": perturbation.inverted,
    "offset": perturbation.offset,
    "gaussian": perturbation.gaussian,
}
STAND_INS = {"shadow_hardened": "similar", "random_grouping": "random"}  # public images, chosen for groups
DRAWINGS = ("shadow_suppressed", "autoencoder_only")  # what the generator draws, for groups and for each by itself


@dataclass(frozen=True)
class Setup:
    """The instruments of one cohort and one set of parameters, the same for every seed.

    ``autoencoder`` is the defender's, ``prior`` the attacker's own generator; both are trained on ``public``.
    """

    params: Params
    cohort: data.Cohort
    splits: dict[str, tuple[Tensor, Tensor]]
    autoencoder: Autoencoder
    prior: nn.Module


@dataclass(frozen=True)
class Client:
    """What one client does to its gradients: ``defend``; image-space defences have ``perturb``, x -> x′, as well."""

    defend: Defence
    perturb: Perturbation | None = None


def prepare(cohort: str, params: Params) -> Setup:
    """Load a cohort and train the two autoencoders on ``public``.

    Raises:
        InputError: the cohort cannot be loaded, or has too few images for the clients.
    """
    # By what it depends on: defences of another strength shall not train the generators anew.
    kept = params.seeds.tuning[0], params.cohorts.model_dump_json(), params.inversion.autoencoder.model_dump_json()
    return Setup(params, *_prepare(cohort, *kept))


@functools.lru_cache(maxsize=2)
def _prepare(name: str, seed: int, cohorts_json: str, autoencoder_json: str) -> tuple:
    coders = AutoencoderParams.model_validate_json(autoencoder_json)
    cohort = data.load(name, Cohorts.model_validate_json(cohorts_json))
    splits = {
        split: (torch.from_numpy(part.float()), torch.from_numpy(part.labels)) for split, part in cohort.splits.items()
    }
    public = splits["public"][0]
    own, other = (
        autoencoder(cohort, public, coders, latent, derive_seed(seed, who))
        for latent, who in ((coders.latent, "defender"), (coders.latent_prior, "attacker"))
    )
    return cohort, splits, own, Prior(other, public)


def autoencoder(cohort: data.Cohort, public: Tensor, p: AutoencoderParams, latent: int, seed: int) -> Autoencoder:
    """An autoencoder of public images (`experiments.instruments`)."""
    how = {"epochs": p.epochs, "lr": p.lr, "batch": p.batch, "seed": seed}
    return instruments.trained(
        cohort,
        "autoencoder",
        {"latent": latent, **how},
        lambda: new_autoencoder(cohort.size, cohort.channels, latent=latent, seed=seed).requires_grad_(False),
        lambda: train_autoencoder(public, latent=latent, **how),
    )


def places(setup: Setup, seed: int) -> list:
    """Which images of the ``client`` split each client holds in one run: disjoint index arrays."""
    p = setup.params.inversion.federation
    return data.partition(
        setup.cohort["client"].labels,
        p.n_clients,
        "iid",
        seed=derive_seed(seed, "partition"),
        per_client=p.images_per_client,
    )


def lacks(cohort: data.Cohort, params: Params, variants: Sequence[str], seed: int, victims: int) -> list[str]:
    """What a cohort is too small for, a line each: ``victims`` images at every client, and groups to hide in."""
    setup, found = Setup(params, cohort, {}, None, None), []
    try:
        held = [cohort["client"].labels[part] for part in places(setup, seed)]
    except InputError as error:
        return [str(error)]
    if min(map(len, held)) < victims:
        found.append(f"a client holds {min(map(len, held))} images, {victims} are attacked; lower victims or n_clients")
    grouped = [v for v in variants if v in STAND_INS or v == "shadow_suppressed"]
    alone = [np.flatnonzero(np.bincount(labels) == 1) for labels in held]
    if grouped and params.inversion.defences["shadow_hardened"]["k"] > 1:
        found += [
            f"seed {seed}: client {i} holds a single image of class {cohort.classes[k]}, which {grouped[0]} can hide in no "
            f"group; lower n_clients, raise {setting(cohort, 'client')} or change cohorts seed"
            for i, classes in enumerate(alone)
            for k in classes
        ]
    least = 3 * (8 + cohort.n_classes)  # a third of them protects, and a purifier needs eight
    if len(cohort["public"]) < least:
        what = f"split public has {len(cohort['public'])} images, attackers who undo a defence need {least}"
        found.append(f"{what}; raise {setting(cohort, 'public')} or add images")
    return found


def deal(setup: Setup, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """The clients' images and labels of one run."""
    images, labels = setup.splits["client"]
    parts = places(setup, seed)
    return [images[part] for part in parts], [labels[part] for part in parts]


def network(setup: Setup, seed: int, norm: bool = False) -> convnet.ConvNet:
    """The untrained classifier of a run, with or without BatchNorm."""
    c = setup.cohort
    width = setup.params.inversion.federation.width
    return convnet.new(c.size, c.channels, c.n_classes, width=width, seed=derive_seed(seed, "network"), norm=norm)


def clients(variant: str, setup: Setup, images: list[Tensor], labels: list[Tensor], seed: int) -> list[Client]:
    """Fresh clients of one run, all with the same defence."""
    return [
        client(variant, setup, a, b, derive_seed(seed, "defence", i))
        for i, (a, b) in enumerate(zip(images, labels, strict=True))
    ]


def client(
    variant: str,
    setup: Setup,
    images: Tensor,
    labels: Tensor,
    seed: int,
    public: tuple[Tensor, Tensor] | None = None,
) -> Client:
    """A fresh client with one of `VARIANTS`.

    Args:
        images, labels: all that it holds.
        public: images and labels that may stand in for them; default: all public ones.

    Raises:
        InputError: no such variant, or images that the defence cannot work with.
    """
    if variant in DEFENCES:
        own = setup.params.inversion.defences.get(variant, {})
        return Client(defences.configured(variant, own, seed))
    perturb = _perturbation(variant, setup, images, labels, seed, public or setup.splits["public"])
    return Client(defences.send(perturb), perturb)


def _perturbation(variant: str, setup: Setup, images: Tensor, labels: Tensor, seed: int, public) -> Perturbation:
    p, c = setup.params.inversion, setup.cohort
    if variant not in CHANGES:
        raise InputError(f"defence {variant!r}: choose one of {', '.join(VARIANTS)}")
    if variant == "image_noise":
        return functools.partial(defences.noisy_image, **p.defences[variant], kind="gaussian", seed=seed)
    if variant == "public_only":
        return substitution.public_only(*public, seed=seed)
    groups = {"k": int(p.defences["shadow_hardened"]["k"]), "grouping": STAND_INS.get(variant, "similar"), "seed": seed}
    if variant in STAND_INS:
        used = substitution.stand_ins(setup.autoencoder, images, labels, *public, **groups)
        return substitution.substituted(images, labels, used)
    if variant in DRAWINGS:
        groups |= {"k": 1} if variant == "autoencoder_only" else {}
        used = substitution.drawings(setup.autoencoder, images, labels, **groups)
        return substitution.substituted(images, labels, used)
    shared = {"rounds": p.federation.rounds, "seed": seed}
    if variant == "shadow_released":
        return shadow.shadow_released(c.size, c.channels, p.shadow, latent=p.autoencoder.latent, **shared).perturb
    described = shadow.shadow_described(setup.autoencoder, p.shadow, **shared).perturb
    if variant in CONTROLS:
        return perturbation.controlled(described, CONTROLS[variant], seed=seed)
    return described


def latents(setup: Setup, images: Tensor) -> Tensor:
    """(N, d) the autoencoder's latents of images (N, C, S, S), in units of the public images' standard deviation: so
    stand-ins are chosen.
    """
    with torch.no_grad():
        scale = setup.autoencoder.encode(setup.splits["public"][0]).std(0).clamp_min(1e-6)
        return setup.autoencoder.encode(images) / scale
