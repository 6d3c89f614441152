"""The classifiers that notebook 04 compares: with and without pruning, attention and adversarial training."""

import copy
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as packed
from torch import Tensor, nn

from experiments import instruments
from experiments.params import Params
from experiments.params.adversarial_pruning_defense import EvasionParams
from medsec import data
from medsec.core import files, paths
from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed
from medsec.core.settings import Recipe
from medsec.data.cohort import tensors
from medsec.evasion import training as robust
from medsec.evidence import cells
from medsec.nets import convnet, fit


@dataclass(frozen=True)
class Arm:
    """What an arm is made of.

    Attributes:
        recipe: which of the parameters' recipes trains it (`recipe_of`): ``clean``, ``robust``, ``hardened``, ``at_ramp``; or
            ``longer``, as ``at_ramp`` without an attack.
        cbam: with attention in every block.
        prune: "no"; "yes", pruned and trained on; "control", trained on as long, and nothing pruned.
        other_seed: trained like another arm, from another seed.
    """

    recipe: str = "clean"
    cbam: bool = False
    prune: str = "no"
    other_seed: bool = False


ARMS = {
    "base": Arm(),
    "finetune": Arm(prune="control"),
    "prune": Arm(prune="yes"),
    "cbam": Arm(cbam=True),
    "prune_cbam": Arm(cbam=True, prune="yes"),
    "retrain": Arm(other_seed=True),
    "at": Arm("robust"),
    "at_prune": Arm("robust", prune="yes"),
    "at_cbam": Arm("robust", cbam=True),
    "hardened": Arm("hardened", cbam=True, prune="yes"),
    "hardened_plain": Arm("hardened", prune="control"),
    "longer": Arm("longer"),
    "at_ramp": Arm("at_ramp"),
}
VARIANTS = tuple(ARMS)
QUICK = ("base", "retrain", "prune", "cbam", "prune_cbam", "hardened", "at_ramp")  # what the notebook itself attacks
FIRST = 8  # test images that figures show
GENERATION = 1  # raised by hand when what trains an arm is meant to give other networks


@dataclass(frozen=True, eq=False)
class Setup:
    """The images of one cohort: ``splits`` has ``train``, ``val`` and ``test`` as (N, C, S, S) in [0, 1] and (N,) int64."""

    params: Params
    cohort: data.Cohort
    splits: dict[str, tuple[Tensor, Tensor]]


def prepare(cohort: str, params: Params) -> Setup:
    """Load a cohort; the training images are those of all splits that ``evasion.train`` names.

    The test images are shuffled once for all (the splits are sorted by class); ``evasion.test_images`` takes the first.

    Raises:
        InputError: the cohort cannot be loaded, or too few test images are attacked for every class to be among them.
    """
    return _prepared(cohort, params.model_dump_json())


@functools.lru_cache(maxsize=1)  # a process runs several cells of one cohort
def _prepared(name: str, params_json: str) -> Setup:
    params = Params.model_validate_json(params_json)
    cohort = data.load(name, params.cohorts)
    whole = tensors(cohort)
    train = (torch.cat(parts) for parts in zip(*(whole[split] for split in params.evasion.train), strict=True))
    x, y = whole["test"]
    order, slow = test_order(params, y), params.evasion.attacks.slow_images
    check_every_class("evasion.test_images", y[order], cohort)
    check_every_class("evasion.attacks.slow_images", y[order][:slow], cohort)
    return Setup(params, cohort, {"train": tuple(train), "val": whole["val"], "test": (x[order], y[order])})


def test_order(params: Params, labels: Tensor) -> Tensor:
    """Which of the test images with ``labels`` (N,) are attacked, in which order: the same for every arm and seed.

    Shuffled, and however rare a class is, it is among the `FIRST`: figures and attacks on few images meet every class.
    """
    rng = torch.Generator().manual_seed(derive_seed(params.seeds.tuning[0], "test images"))
    order = fit.with_every_class(torch.randperm(len(labels), generator=rng), labels, FIRST)
    return order[: params.evasion.test_images]


def check_every_class(name: str, labels: Tensor, cohort: data.Cohort) -> None:
    """Raises InputError, which names the parameter, unless ``labels`` has all classes: an AUC needs each of them."""
    if lacking := [text for k, text in enumerate(cohort.classes) if not (labels == k).any()]:
        what = f"{len(labels)} test images of {cohort.name} without class {', '.join(lacking)}"
        raise InputError(f"{name} leaves {what}; raise it to {max(FIRST, cohort.n_classes)} or more")


def test_lesions(setup: Setup) -> np.ndarray | None:
    """(N, S, S) bool, the lesion masks of the test images in their order; None for a cohort without masks."""
    part = setup.cohort["test"]
    if part.lesion is None:
        return None
    return part.lesion[test_order(setup.params, torch.from_numpy(part.labels)).numpy()].astype(bool)


def recipe_of(params: Params, arm: Arm) -> Recipe:
    """What trains an arm."""
    if arm.recipe == "longer":
        return params.at_ramp.model_copy(update={"eps": 0.0})
    return params.at_ramp if arm.recipe == "at_ramp" else getattr(params.evasion, arm.recipe)


def section_of(params: Params, variants: Sequence[str]) -> dict:
    """Section ``at_ramp``, by its name, if it trains one of these arms: their cells depend on it, those of others do not."""
    return {"at_ramp": params.at_ramp.model_dump()} if {"at_ramp", "longer"} & set(variants) else {}


def ratio(arm: Arm, params: EvasionParams) -> float | None:
    """The share that an arm prunes: 0 for the control, None for an arm that is not trained on."""
    if arm.prune == "no":
        return None
    if arm.prune == "control":
        return 0.0
    return params.prune_hardened if arm.recipe == "hardened" else params.prune


def train(setup: Setup, variant: str, seed: int, prune: float | None = None) -> nn.Module:
    """One arm of one run, in evaluation mode.

    Its weights are rounded to half precision (and kept in single), so that a checkpoint of half the size is the same network.

    Args:
        prune: another share than the parameters', for an arm that prunes.

    Raises:
        InputError: no such arm, or ``prune`` for an arm that does not.
    """
    arm, p = _arm(variant), setup.params.evasion
    if prune is not None and arm.prune != "yes":
        raise InputError(f"{variant} prunes nothing: prune {prune:g} cannot be set")
    share = ratio(arm, p) if prune is None else prune
    run = derive_seed(seed, "retrain") if arm.other_seed else seed
    model = _fitted(setup, arm.recipe, arm.cbam, run)
    if share is not None:
        model = robust.pruned(model, *setup.splits["train"], recipe_of(setup.params, arm), ratio=share, seed=run)
    return copy.deepcopy(model).half().float()


@functools.lru_cache(maxsize=8)  # arms which prune need not train their start again
def _fitted(setup: Setup, recipe: str, cbam: bool, seed: int) -> nn.Module:
    """A network before it is pruned."""
    chosen, start = recipe_of(setup.params, Arm(recipe)), _untrained(setup, cbam, seed)
    how = {"epochs": chosen.epochs, "lr": chosen.lr}
    if recipe == "at_ramp":
        how |= {"ramp": chosen.ramp, "hold": chosen.hold}
    return robust.fit(start, *setup.splits["train"], chosen, seed=seed, **how)


def _untrained(setup: Setup, cbam: bool, seed: int) -> nn.Module:
    attention = setup.params.evasion.attention if cbam else None
    return robust.new(setup.cohort.channels, setup.cohort.n_classes, seed=seed, cbam=attention)


def _arm(variant: str) -> Arm:
    if variant not in ARMS:
        raise InputError(f"arm {variant!r}: choose one of {', '.join(VARIANTS)}")
    return ARMS[variant]


# Checkpoints ----------------------------------------------------------------------------------------------------------


def checkpoint(cohort: str, variant: str, seed: int) -> Path:
    """Where a record leaves a trained network."""
    return paths.networks(cohort) / f"{variant}-seed{seed}.safetensors"


def identity(setup: Setup, variant: str) -> str:
    """Hash of what a network depends on besides its seed: generation, recipe, images."""
    p, arm = setup.params.evasion, _arm(variant)
    what = {
        "generation": GENERATION,
        "recipe": recipe_of(setup.params, arm).model_dump(),
        "attention": p.attention.model_dump() if arm.cbam else None,
        "arm": dataclasses.asdict(arm),
        "prune": ratio(arm, p),
        "train": p.train,
        "cohort": setup.cohort.fingerprint,
    }
    return cells.digest(what)


def save(model: nn.Module, setup: Setup, variant: str, seed: int) -> Path:
    """Write a checkpoint (safetensors: numbers only, nothing that could run), what it depends on, and a hash of its weights."""
    file = checkpoint(setup.cohort.name, variant, seed)
    state = {name: value.contiguous() for name, value in copy.deepcopy(model).half().state_dict().items()}
    files.write(file, packed(state, metadata={"identity": identity(setup, variant), "sha256": _hashed(state)}))
    return file


def _hashed(state: dict[str, Tensor]) -> str:
    """SHA-256 of names, shapes, types and values."""
    found = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode() + value.numpy().tobytes())
    return found.hexdigest()


def _as_committed(file: Path) -> bool:
    """Whether a network is, to the byte, one that DVC's list of ``networks/`` names: the oldest have no hash inside."""
    try:
        pointer = files.read_yaml(paths.ROOT / "networks.dvc")["outs"][0]["md5"]
        listed = files.read_json(paths.ROOT / "dvcstore" / "files" / "md5" / pointer[:2] / pointer[2:])
        known = {each["relpath"]: each["md5"] for each in listed}
    except (InputError, TypeError, KeyError, IndexError):
        return False
    own = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
    return known.get(f"{file.parent.name}/{file.name}") == own


def load(setup: Setup, variant: str, seed: int) -> nn.Module | None:
    """The stored network of an arm and seed; None if there is none of today's generation, parameters and images.

    One that cannot be read, or whose weights are not those that were written, is said on stderr, and counts as missing.
    """
    file = checkpoint(setup.cohort.name, variant, seed)
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            about = stored.metadata() or {}
            if about.get("identity") != identity(setup, variant):
                return None
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - it is no mapping
        if not (about["sha256"] == _hashed(state) if "sha256" in about else _as_committed(file)):
            raise ValueError("altered weights")
        model = _untrained(setup, _arm(variant).cbam, seed)
        model.load_state_dict(state)  # into single precision
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:  # the last: of weights that do not fit
        reason = error if isinstance(error, ValueError) else type(error).__name__
        print(f"{file.name} cannot be read ({reason}); the network is trained anew", file=sys.stderr)
        return None
    return model.eval()


def network(setup: Setup, variant: str, seed: int) -> nn.Module:
    """The committed network of an arm where there is one, else one that is trained now, once for all cells that need it."""
    stored = load(setup, variant, seed)
    if stored is not None:
        return stored
    return instruments.trained(
        setup.cohort,
        f"{variant}-seed{seed}",
        {"network": identity(setup, variant), "seed": seed},
        lambda: _untrained(setup, _arm(variant).cbam, seed),
        lambda: train(setup, variant, seed),
    )


def convnet_of(setup: Setup, seed: int, width: int) -> nn.Module:
    """A plain network of another architecture, trained as ``base`` is: no residuals, GELU, and a head that sees every place.

    Its seed is derived, so that it shares not even the order of the images with the arms of ``seed``.
    """
    cohort, recipe, run = setup.cohort, setup.params.evasion.clean, derive_seed(seed, "another architecture")

    def new() -> nn.Module:
        return convnet.new(cohort.size, cohort.channels, cohort.n_classes, width=width, seed=run, norm=True)

    def fitted() -> nn.Module:
        return robust.fit(new(), *setup.splits["train"], recipe, seed=run, epochs=recipe.epochs, lr=recipe.lr)

    decides = {"recipe": recipe.model_dump(), "train": setup.params.evasion.train, "seed": run, "width": width}
    return instruments.trained(cohort, f"convnet-seed{seed}", decides, new, fitted)


def seeds_with_checkpoints(setup: Setup, variants: Sequence[str], seeds: Sequence[int]) -> dict[str, list[int]]:
    """By arm the seeds of which there is a network that need not be trained."""
    return {variant: [seed for seed in seeds if load(setup, variant, seed) is not None] for variant in variants}
