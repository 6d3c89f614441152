"""All parameters of the companion: ``params.yaml``, overlaid with a profile, checked before anything runs."""

from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator

from experiments.params.adversarial_pruning_defense import (
    EvasionParams,
    EvasionRecord,
    Near,
    Review,
    RisingRecipe,
    Transfer,
)
from experiments.params.backdoor_fedgan import Drawing, FedGANRecord
from experiments.params.data_and_threats import Threats
from experiments.params.feddetect import FedDetectParams, FedDetectRecord, Hospitals
from experiments.params.gia_defense import FingerprintParams, ImprintParams, InversionParams, InversionRecord
from experiments.params.threat_matrix import MatrixParams
from medsec.core.params import Section, Seeds, merge, read, registered, validated
from medsec.core.settings import ClassifierParams, Cohorts, FedGANParams, WassersteinGAN

__all__ = ["Params", "load", "merge", "validate"]


class OtherModality(Section):
    """What the record of a second modality has: headline rows only, of these scenarios and variants.

    ``change`` holds, by their section, parameters that are others there; ``near`` what some arms of ``evasion`` meet besides.
    """

    feddetect: list[str]
    inversion: list[str]
    evasion: list[str]
    near: Near
    change: dict[Literal["inversion", "evasion"], dict]


class Own(Section):
    """What users have registered and want to see beside the rest; no finished cell depends on it."""

    rules: list[str]
    defences: list[str]
    attacks: list[str]

    @field_validator("rules")
    @classmethod
    def _rules(cls, names):
        from medsec.federated.aggregators import RULES  # here, as below: it loads PyTorch

        return registered(names, list(RULES), "server rule")

    @field_validator("defences")
    @classmethod
    def _defences(cls, names):
        from medsec.inversion.defences import DEFENCES

        return registered(names, list(DEFENCES), "gradient defence")

    @field_validator("attacks")
    @classmethod
    def _attacks(cls, names):
        from medsec.evasion import scenarios

        return registered(names, scenarios.names(), "attack")


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
    drawing: Drawing
    feddetect: FedDetectParams
    hospitals: Hospitals
    regularised: WassersteinGAN
    inversion: InversionParams
    fingerprint: FingerprintParams
    imprint: ImprintParams
    evasion: EvasionParams
    at_ramp: RisingRecipe
    transfer: Transfer
    review: Review
    matrix: MatrixParams
    own: Own
    record: Records

    @model_validator(mode="after")
    def _changes_fit(self):
        """What a record changes is checked as what it becomes."""
        changes = self.record.other_modality.change
        for name in ("inversion", "evasion"):
            section, where = getattr(self, name), f"record.other_modality.change.{name}"
            if name not in changes:
                raise ValueError(f"{where} is missing; write {name}: {{}} for no change")
            validated(type(section), merge(section.model_dump(), changes[name]), where)
        return self


def load(profile: str = "quick", file: Path | None = None) -> Params:
    """Parameters of a profile: ``params.yaml`` (quick), overlaid with ``profiles/<profile>.yaml`` for any other.

    A ``profile`` that ends with ``.yaml`` is the path of such a file.

    Raises:
        InputError: the file is missing, is no YAML, or a key is unknown, of the wrong type or impossible.
    """
    return validated(Params, *read(profile, file))


def validate(tree: dict[str, Any], name: str = "params.yaml") -> Params:
    """Parameters from nested dictionaries; `InputError` names the first wrong key of the file ``name``."""
    return validated(Params, tree, name)
