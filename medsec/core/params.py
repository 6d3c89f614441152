"""Validated parameters: ``params.yaml``, overlaid with a profile.

Every key is checked for spelling, type and possible value before anything runs. ``python -m medsec.core.params`` prints the
parameters of a profile, or the one line that says what is wrong.
"""

import argparse
import difflib
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from medsec.core import paths
from medsec.core.errors import InputError, command

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Rate = Annotated[float, Field(gt=0, le=1)]
Eps255 = Annotated[float, Field(ge=0, le=255)]  # in 255ths of the range of an image
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A section of params.yaml: unknown keys, wrong types and later changes are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Seeds(Section):
    tuning: list[Seed] = Field(min_length=1)
    evaluation: list[Seed] = Field(min_length=1)

    @model_validator(mode="after")
    def _disjoint(self):
        for name in ("tuning", "evaluation"):
            seeds = getattr(self, name)
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"{name} seeds repeat; every seed is one run")
        if both := sorted(set(self.tuning) & set(self.evaluation)):
            raise ValueError(f"seeds {both} are both tuning and evaluation seeds; the two lists must not overlap")
        return self


class SplitCounts(Section):
    """Images of each split of a cohort that we make ourselves."""

    client: Count
    public: Count
    reference: Count
    val: Count
    test: Count


class SplitShares(Section):
    """Shares of an official training set."""

    client: Rate
    public: Rate
    reference: Rate

    @model_validator(mode="after")
    def _sum(self):
        if abs(self.client + self.public + self.reference - 1) > 1e-9:
            raise ValueError("client + public + reference must be 1")
        return self


class PhantomCohort(Section):
    size: int = Field(ge=28, le=224, multiple_of=4)
    seed: Seed
    images: SplitCounts


class FundusCohort(PhantomCohort):
    grades: Literal[2, 3]


class MedMNISTCohort(Section):
    size: Literal[28, 64, 128, 224]
    seed: Seed
    shares: SplitShares


class NpzCohort(Section):
    path: str | None
    seed: Seed
    shares: SplitShares


class FolderShares(Section):
    """Shares of the images of a folder, as nearly as whole patients allow."""

    client: Rate
    public: Rate
    reference: Rate
    val: Rate
    test: Rate

    @model_validator(mode="after")
    def _sum(self):
        if abs(self.client + self.public + self.reference + self.val + self.test - 1) > 1e-9:
            raise ValueError("client + public + reference + val + test must be 1")
        return self


class FolderCohort(Section):
    path: str | None
    size: int = Field(ge=28, le=224, multiple_of=4)
    channels: Literal[1, 3] | None
    patient_pattern: str
    table: str | None
    seed: Seed
    shares: FolderShares

    @field_validator("patient_pattern")
    @classmethod
    def _one_group(cls, pattern):
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"{pattern!r} has {groups} groups; it needs one pair of round brackets, round the patient")
        return pattern


class Cohorts(Section):
    phantom: PhantomCohort
    fundus: FundusCohort
    medmnist: MedMNISTCohort
    npz: NpzCohort
    folder: FolderCohort


class ClassifierParams(Section):
    lr: Positive
    weight_decay: float = Field(ge=0)
    batch: int = Field(ge=2)
    shift: int = Field(ge=0)


class Threats(Section):
    gallery: Count
    fundus_size: int = Field(ge=28, le=224)
    n_clients: Count
    dirichlet_alpha: Positive
    shift_images: Count
    shift_epochs: Count


class GAN(Section):
    z_dim: Count
    width: Count
    lr_g: Positive
    lr_d: Positive
    beta1: float = Field(ge=0, lt=1)
    batch: int = Field(ge=2)
    decay_after: float = Field(ge=0, le=1)


class TriggerParams(Section):
    kind: Literal["checker", "grid", "moving", "blended"]
    size: Count
    opacity: Rate


class Poison(Section):
    ratio: Rate
    label: Annotated[int, Field(ge=0)] | None
    boost: float = Field(ge=1, allow_inf_nan=False)
    boost_after: float = Field(ge=0, lt=1)


class Measure(Section):
    synthetic: int = Field(ge=100)
    threshold_fpr: float = Field(gt=0, lt=1)
    extractor_epochs: Count
    downstream_epochs: Count
    probe: Count


class FedGANParams(Section):
    n_clients: Count
    malicious: list[Annotated[int, Field(ge=0)]]
    partition: Literal["iid", "dirichlet", "style"]
    dirichlet_alpha: Positive
    images_per_client: Count
    rounds: Count
    average: Literal["generator", "both"]
    gan: GAN
    trigger: TriggerParams
    poison: Poison
    measure: Measure

    @model_validator(mode="after")
    def _clients_exist(self):
        if len(set(self.malicious)) < len(self.malicious):
            raise ValueError("malicious names a client twice")
        if len(self.malicious) > self.n_clients:
            raise ValueError(f"{len(self.malicious)} malicious clients of only {self.n_clients}; raise n_clients")
        if self.malicious and max(self.malicious) >= self.n_clients:
            raise ValueError(
                f"malicious client {max(self.malicious)} does not exist; clients are 0 to {self.n_clients - 1}"
            )
        return self


class HardenedParams(Section):
    draws: int = Field(ge=32)
    watch: float = Field(ge=0, le=1)
    fpr: float = Field(gt=0, lt=0.5)
    scale: Positive
    scale_relative: Positive
    window: Count
    loss_floor: Positive
    drift: Positive
    limit: Positive


class AwareParams(Section):
    evade: Positive
    steps: Count
    draws: int = Field(ge=8)
    lr: Positive
    late_evade: Positive
    late_rounds: Count


class ScenarioParams(Section):
    stealth_ratio: Rate
    stealth_boost: float = Field(ge=1, allow_inf_nan=False)
    strike_every: Count
    colluders: list[Count] = Field(min_length=2, max_length=2)
    faint_opacity: Rate
    aware: AwareParams

    @model_validator(mode="after")
    def _minority(self):
        if 2 * self.colluders[0] >= self.colluders[1]:
            raise ValueError(f"colluders {self.colluders}: attackers must be fewer than half of the clients")
        return self


class NullParams(Section):
    clients: list[Annotated[int, Field(ge=3)]]
    rounds: Count


class DownstreamParams(Section):
    real_per_class: list[Count]
    synthetic: int = Field(ge=100)
    share: float = Field(gt=0, lt=1)
    steps: Count


class FedDetectParams(Section):
    warm_up: float = Field(ge=0, lt=1)
    decay: float = Field(gt=0, lt=1)
    patience: Count
    hardened: HardenedParams
    scenario: ScenarioParams
    null_test: NullParams
    downstream: DownstreamParams


class FedClsParams(Section):
    width: Count
    n_clients: Count
    images_per_client: Count
    rounds: Count
    batch: Count
    lr: Positive
    momentum: float = Field(ge=0, lt=1)


class PurifierParams(Section):
    images: int = Field(ge=32)
    width: Count
    epochs: Count
    batch: Count
    lr: Positive


class InversionSettings(Section):
    iterations: Count
    lr: Positive
    lr_latent: Positive
    tv: float = Field(ge=0, allow_inf_nan=False)
    statistics: float = Field(ge=0, allow_inf_nan=False)
    restarts: Count
    together: Count
    done: float = Field(ge=0, allow_inf_nan=False)


class AutoencoderParams(Section):
    latent: Count
    latent_prior: Count
    epochs: Count
    lr: Positive
    batch: Count


class ShadowParams(Section):
    steps: Count
    lr: Positive
    freeze: Rate
    momentum: float = Field(ge=0, lt=1)
    ema: Rate
    layer: str
    top: Rate
    alpha: list[Annotated[float, Field(ge=0, le=1)]] = Field(min_length=2, max_length=2)
    scale: Positive


class InversionParams(Section):
    federation: FedClsParams
    victims: Count
    sweep_victims: Count
    joint_rounds: int = Field(ge=2)
    attacks: list[Literal["dlg", "ig", "bn", "prior"]] = Field(min_length=1)
    adaptive: list[Literal["known", "joint", "generator", "purified", "unmasked", "smoother"]]
    attack: InversionSettings
    purifier: PurifierParams
    autoencoder: AutoencoderParams
    defences: dict[str, dict[str, int | Annotated[float, Field(ge=0, allow_inf_nan=False)]]]
    shadow: ShadowParams


class Recipe(Section):
    """How a classifier is trained; adversarial examples with eps > 0, TRADES with beta > 0, mean weights with ema > 0.

    ``balanced``: every class counts alike in the loss.
    """

    epochs: Count
    lr: Positive
    weight_decay: float = Field(ge=0, allow_inf_nan=False)
    batch: int = Field(ge=2)
    shift: int = Field(ge=0)
    balanced: bool
    finetune_epochs: int = Field(ge=0)
    finetune_lr: Positive
    eps: Eps255
    steps: Count
    step: Positive
    beta: float = Field(ge=0, allow_inf_nan=False)
    ema: float = Field(ge=0, lt=1)

    @model_validator(mode="after")
    def _pruned_before_the_mean(self):
        if self.ema and not self.finetune_epochs:
            raise ValueError(
                "ema > 0 with finetune_epochs 0: what is pruned would have no step to enter the mean; set one of them"
            )
        return self


class AttentionParams(Section):
    reduction: Count
    kernel: Count


class CWParams(Section):
    variants: list[str]
    images: Count
    iterations: Count
    searches: Count
    lr: Positive


class EvasionAttacks(Section):
    scenarios: list[
        Literal[
            "fgsm",
            "bim",
            "pgd20",
            "pgd20_eps10",
            "pgd_margin",
            "pgd_detached",
            "deepfool_capped",
            "square",
            "autoattack",
        ]
    ]
    steps: Count
    step: Positive
    small_step: Positive
    bim_step: Positive
    deepfool_steps: Count
    overshoot: float = Field(ge=0, allow_inf_nan=False)
    deepfool_norms: list[Literal["l2", "linf"]]
    square_queries: Count
    slow_images: Count | None
    apgd_iterations: Count
    restarts: Count
    autoattack_more: list[Eps255]
    cw: CWParams

    @model_validator(mode="after")
    def _needed(self):
        if missing := {"fgsm", "pgd20"} - set(self.scenarios):
            raise ValueError(f"scenarios lack {sorted(missing)[0]}, which the reviewer's checks compare with")
        return self


class EvasionChecks(Section):
    images: Count
    more_steps: Count
    large_eps: Eps255
    planted: Count
    inner: int = Field(ge=2, lt=64)  # fewer than features (`medsec.nets.models.SmallResNet`)


class EvasionParams(Section):
    train: list[Literal["client", "public", "reference"]] = Field(min_length=1)
    test_images: Count | None
    eps: Annotated[float, Field(gt=0, le=255)]
    sweep: list[Annotated[float, Field(gt=0, le=255)]] = Field(min_length=1)
    clean: Recipe
    robust: Recipe
    hardened: Recipe
    prune: Annotated[float, Field(ge=0, lt=1)]
    prune_hardened: Annotated[float, Field(ge=0, lt=1)]
    attention: AttentionParams
    attacks: EvasionAttacks
    checks: EvasionChecks
    checkpoint_seeds: list[Seed]

    @model_validator(mode="after")
    def _each_eps_once(self):
        for name, listed in (("sweep", self.sweep), ("attacks.autoattack_more", self.attacks.autoattack_more)):
            if len(set(listed)) < len(listed):
                raise ValueError(f"{name} {listed} names an eps twice")
        if "autoattack" in self.attacks.scenarios and self.eps in self.attacks.autoattack_more:
            raise ValueError(
                f"attacks.autoattack_more names {self.eps:g}, the headline's eps, which is run anyway; take it out"
            )
        return self


class MatrixParams(Section):
    federation: FedClsParams
    warm_up: float = Field(ge=0, lt=1)
    patience: Count
    looks: int = Field(ge=8)
    scale: Positive
    scale_relative: Positive
    target: int = Field(ge=0)
    poison_few: Rate
    poison_many: Rate
    boost: float = Field(ge=1, allow_inf_nan=False)
    prune_after: Rate
    leak_after: Rate
    shadow_steps: Count
    shadow_freeze: Rate
    victims: Count
    purifier_images: int = Field(ge=32)
    autoencoder_epochs: Count
    iterations: Count
    test_images: Count | None
    matters: dict[Literal["auc", "balanced_accuracy", "attack_success", "psnr", "retrieval"], Positive]

    @model_validator(mode="after")
    def _enough_clients(self):
        if self.federation.n_clients < 3:
            raise ValueError(
                f"{self.federation.n_clients} clients: FedDetect compares clients with each other and needs 3; "
                "raise federation.n_clients"
            )
        if self.prune_after * self.federation.rounds < 0.5:
            raise ValueError(
                f"prune_after {self.prune_after:g} of {self.federation.rounds} rounds is before the first: nothing is pruned"
            )
        if self.leak_after < self.prune_after:
            raise ValueError(
                f"leak_after {self.leak_after:g} is before prune_after {self.prune_after:g}: nothing is pruned yet"
            )
        return self


class FedGANRecord(Section):
    """One-factor sweeps of notebook 01's record; every list holds the values besides the headline's own."""

    seeds: Count
    trigger: list[Literal["checker", "grid", "moving", "blended"]]
    trigger_size: list[Count]
    ratio: list[Rate]
    attackers: list[Count]
    n_clients: list[Count]
    partition: list[Literal["iid", "dirichlet", "style"]]
    image_size: list[Annotated[int, Field(ge=28, le=224, multiple_of=4)]]


class FedDetectRecord(Section):
    """What notebook 02's record adds to every defence against every attacker."""

    baseline_seeds: Count
    seeds: Count
    variants: list[str]
    scenarios: list[str]
    n_clients: list[Annotated[int, Field(ge=3)]]
    partition: list[Literal["dirichlet", "style"]]
    trigger: list[Literal["grid"]]
    evade: list[Positive]
    false_alarm_seeds: list[Seed]


class InversionRecord(Section):
    """What notebook 03's record adds to every attack on every defence."""

    seeds: Count
    variants: list[str]
    batch: list[Count]
    inferred: list[Count]
    steps: list[Annotated[int, Field(ge=2)]]
    shares: list[Annotated[float, Field(ge=0, le=1)]]
    utility_seeds: list[Seed]
    utility_variants: list[str]
    other_utility_seeds: Count
    spare_seeds: dict[str, Count]
    control_seeds: Count
    condition_seeds: Count
    released_batch: Count
    strengths: dict[str, dict[str, list[int | float]]]


class EvasionRecord(Section):
    """What notebook 04's record adds: other shares of pruning."""

    seeds: Count
    prune: list[Annotated[float, Field(ge=0, lt=1)]]
    variants: list[str]


class OtherModality(Section):
    """What the record of a second modality has: headline rows only, of these scenarios and variants.

    ``change`` holds, by their section, parameters that are others there.
    """

    feddetect: list[str]
    inversion: list[str]
    evasion: list[str]
    change: dict[Literal["inversion", "evasion"], dict]


class Records(Section):
    fedgan: FedGANRecord
    feddetect: FedDetectRecord
    inversion: InversionRecord
    evasion: EvasionRecord
    other_modality: OtherModality


class Params(Section):
    device: Literal["cpu", "cuda"]
    seeds: Seeds
    cohorts: Cohorts
    classifier: ClassifierParams
    threats: Threats
    fedgan: FedGANParams
    feddetect: FedDetectParams
    inversion: InversionParams
    evasion: EvasionParams
    matrix: MatrixParams
    record: Records


def load(profile: str = "quick", file: Path | None = None) -> Params:
    """Parameters of a profile: ``params.yaml`` (quick), overlaid with ``profiles/<profile>.yaml`` for any other.

    A ``profile`` that ends with ``.yaml`` is the path of such a file.

    Raises:
        InputError: the file is missing, is no YAML, or a key is unknown, of the wrong type or impossible.
    """
    file = file or paths.PARAMS
    tree = _read(file)
    if profile != "quick":
        overlay = Path(profile) if profile.endswith(".yaml") else paths.PROFILES / f"{profile}.yaml"
        if not overlay.is_file():
            known = ["quick", *sorted(p.stem for p in paths.PROFILES.glob("*.yaml"))]
            raise InputError(f"unknown profile {profile!r}: choose one of {', '.join(known)}")
        tree, file = merge(tree, _read(overlay)), overlay
    return validate(tree, file.name)


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``base`` with the keys of ``change`` replaced, section by section."""
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def validate(tree: dict[str, Any], name: str = "params.yaml") -> Params:
    """Parameters from nested dictionaries; `InputError` names the first wrong key of the file ``name``."""
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a misspelling explains the rest
        raise InputError(f"{name}: {_explain(first)}") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file.name} is missing; restore it with: git checkout {file.name}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        raise InputError(f"{file.name} is not valid YAML{f' at line {where.line + 1}' if where else ''}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{file.name} must be a mapping of sections, found {type(tree).__name__}")
    return tree


def _explain(error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden":
        known = _keys(error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        return f"unknown key {where}; " + (f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}")
    if error["type"] == "missing":
        return f"{where} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}"
    hint = " (YAML reads 1e-3 as text; write 1.0e-3)" if error["type"] == "float_type" else ""
    return f"{where} = {error['input']!r}: {message[0].lower() + message[1:]}{hint}"


def _keys(loc: tuple) -> list[str]:
    model: Any = Params
    for part in loc:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m medsec.core.params", description="Check and print the parameters.")
    parser.add_argument("--profile", default="quick")
    args = parser.parse_args(argv)
    params = load(args.profile)
    print(yaml.safe_dump(params.model_dump(), sort_keys=False), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
