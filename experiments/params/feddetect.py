"""Sections ``feddetect``, ``hospitals`` and ``record.feddetect`` of the parameters."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from medsec.core.params import MOST, Count, Factor, Positive, Rate, Section, Seed, Size, registered


class HardenedParams(Section):
    draws: int = Field(ge=32, le=MOST)
    watch: float = Field(ge=0, le=1)
    fpr: float = Field(gt=0, lt=0.5)
    scale: Positive
    scale_relative: Positive
    window: Size
    loss_floor: Positive
    drift: Positive
    limit: Positive


class AwareParams(Section):
    evade: Positive
    steps: Count
    draws: int = Field(ge=8, le=MOST)
    lr: Positive
    late_evade: Positive
    late_rounds: Count


class ScenarioParams(Section):
    stealth_ratio: Rate
    stealth_boost: Factor
    strike_every: Count
    colluders: list[Size] = Field(min_length=2, max_length=2)
    faint_opacity: Rate
    aware: AwareParams

    @model_validator(mode="after")
    def _minority(self):
        if 2 * self.colluders[0] >= self.colluders[1]:
            raise ValueError(f"colluders {self.colluders}: attackers must be fewer than half of the clients")
        return self


class NullParams(Section):
    clients: list[Annotated[int, Field(ge=3, le=1024)]]
    rounds: Count


class DownstreamParams(Section):
    real_per_class: list[Count]
    synthetic: int = Field(ge=100, le=MOST)
    share: float = Field(gt=0, lt=1)
    steps: Count


class FedDetectParams(Section):
    warm_up: float = Field(ge=0, lt=1)
    decay: float = Field(gt=0, lt=1)
    patience: Size
    hardened: HardenedParams
    scenario: ScenarioParams
    null_test: NullParams
    downstream: DownstreamParams


class KnowingParams(Section):
    steps: Count
    draws: int = Field(ge=8, le=MOST)
    lr: Positive
    looks: Count


class Hospitals(Section):
    """Every rule where hospitals differ; only its own cells depend on it."""

    public: int = Field(ge=2, le=MOST)
    passes: Count
    aware: KnowingParams


class FedDetectRecord(Section):
    """What notebook 02's record adds to every defence against every attacker."""

    baseline_seeds: Count
    seeds: Count
    variants: list[str]
    scenarios: list[str]
    n_clients: list[Annotated[int, Field(ge=3, le=1024)]]
    partition: list[Literal["dirichlet", "style"]]
    trigger: list[Literal["grid"]]
    evade: list[Positive]
    false_alarm_seeds: list[Seed]

    @field_validator("scenarios")
    @classmethod
    def _scenarios(cls, names):
        from medsec.backdoor.attackers import SCENARIOS  # here: it loads PyTorch

        return registered(names, SCENARIOS, "scenario")
