"""Sections ``inversion``, ``fingerprint``, ``imprint`` and ``record.inversion`` of the parameters."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from medsec.core.params import MOST, Count, NotNegative, Section, Seed, Size, registered
from medsec.core.settings import AutoencoderParams, FedClsParams, InversionSettings, PurifierParams, ShadowParams

Strength = Annotated[int, Field(ge=0, le=MOST)] | NotNegative


class InversionParams(Section):
    federation: FedClsParams
    victims: Count
    sweep_victims: Count
    joint_rounds: int = Field(ge=2, le=MOST)
    attacks: list[str] = Field(min_length=1)
    adaptive: list[Literal["known", "joint", "generator", "purified", "unmasked", "smoother"]]
    attack: InversionSettings
    purifier: PurifierParams
    autoencoder: AutoencoderParams
    defences: dict[str, dict[str, Strength]]
    shadow: ShadowParams

    @field_validator("attacks")
    @classmethod
    def _attacks(cls, names):
        from medsec.inversion.attacks import ATTACKS  # here: it loads PyTorch

        return registered(names, ATTACKS, "attack")

    @field_validator("defences")
    @classmethod
    def _defences(cls, own):
        from medsec.inversion.defences import DEFENCES  # here: it loads PyTorch

        registered(list(own), [*DEFENCES, "image_noise", "shadow_hardened"], "defence with parameters")
        return own


class FingerprintParams(Section):
    victims: Count
    batches: list[Count] = Field(min_length=1)
    gallery: Count | None
    copies: Size


class ImprintParams(Section):
    victims: Count
    batches: list[Count] = Field(min_length=1)
    gallery: Count
    bins: int = Field(ge=2, le=MOST)
    gain: NotNegative
    bound: Annotated[float, Field(gt=0, lt=1)]
    rounds: Count


class FingerprintRecord(Section):
    """What the record adds to the fingerprint of every defence: on networks that have learnt, and other strengths."""

    seeds: Count
    later: list[str]
    batches: list[Count] = Field(min_length=1)
    shares: list[Annotated[float, Field(ge=0, le=1)]]
    released_scale: NotNegative


class LongerRecord(Section):
    """A longer search against larger batches without a defence: is it the batch that protects, or the search that is short?"""

    iterations: Count
    batches: list[Count]


class InversionRecord(Section):
    """What notebook 03's record adds to every attack on every defence."""

    seeds: Count
    variants: list[str]
    batch: list[Count]
    inferred: list[Count]
    longer: LongerRecord
    steps: list[Annotated[int, Field(ge=2, le=1024)]]
    shares: list[Annotated[float, Field(ge=0, le=1)]]
    utility_seeds: list[Seed]
    utility_variants: list[str]
    other_utility_seeds: Count
    spare_seeds: dict[str, Count]
    control_seeds: Count
    condition_seeds: Count
    released_batch: Count
    strengths: dict[str, dict[str, list[Strength]]]
    fingerprint: FingerprintRecord
