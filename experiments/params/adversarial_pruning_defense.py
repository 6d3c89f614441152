"""Sections ``evasion``, ``at_ramp``, ``transfer``, ``review`` and ``record.evasion`` of the parameters."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from medsec.core.params import Count, Eps255, NotNegative, Positive, Rate, Section, Seed, Size, registered
from medsec.core.settings import AttentionParams, Recipe


class CWParams(Section):
    variants: list[str]
    images: Count
    iterations: Count
    searches: Count
    lr: Positive


class EvasionAttacks(Section):
    scenarios: list[str]
    steps: Count
    step: Positive
    small_step: Positive
    bim_step: Positive
    deepfool_steps: Count
    overshoot: NotNegative
    deepfool_norms: list[Literal["l2", "linf"]]
    square_queries: Count
    slow_images: Count | None
    apgd_iterations: Count
    restarts: Size
    autoattack_more: list[Eps255]
    cw: CWParams

    @field_validator("scenarios")
    @classmethod
    def _known(cls, names):
        from medsec.evasion import scenarios  # here: it loads PyTorch

        return registered(names, scenarios.names(), "attack")

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


class RisingRecipe(Recipe):
    """Section ``at_ramp``: adversarial training whose eps rises from 0 (`medsec.evasion.training.Rising`)."""

    ramp: Rate
    hold: Rate


class Transfer(Section):
    """Section ``transfer``: which networks examples are made for, and an attack made to transfer."""

    networks: Size
    other_width: int = Field(ge=0, le=1024)
    steps: Count
    decay: NotNegative
    diverse: Rate
    smallest: Annotated[float, Field(gt=0, le=1)]


class Review(Section):
    """Section ``review``: bounds of checks that are made from a finished table."""

    one_step_gap: Annotated[float, Field(gt=0, le=1)]
    times_training: Positive


class Near(Section):
    """Arms that the record of another modality attacks at other eps as well."""

    arms: list[str]
    sweep: list[Annotated[float, Field(gt=0, le=255)]] = Field(min_length=1)
    autoattack_more: list[Eps255]


class EvasionRecord(Section):
    """What notebook 04's record adds: other shares of pruning, and the arms that meet examples made for other networks."""

    seeds: Count
    prune: list[Annotated[float, Field(ge=0, lt=1)]]
    variants: list[str]
    transfer: list[str]
    transfer_dear: list[str]
    cost_seeds: list[Seed]
