"""All parameters of the companion: ``params.yaml``, overlaid with a profile, checked before anything runs."""

from pathlib import Path
from typing import Any, Literal

from experiments.adversarial_pruning_defense.params import EvasionParams, EvasionRecord
from experiments.backdoor_fedgan.params import FedGANRecord
from experiments.data_and_threats.params import Threats
from experiments.feddetect.params import FedDetectParams, FedDetectRecord
from experiments.gia_defense.params import InversionParams, InversionRecord
from experiments.threat_matrix.params import MatrixParams
from medsec.core.params import Section, Seeds, merge, read, validated
from medsec.core.settings import ClassifierParams, Cohorts, FedGANParams

__all__ = ["Params", "load", "merge", "validate"]


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
    return validated(Params, *read(profile, file))


def validate(tree: dict[str, Any], name: str = "params.yaml") -> Params:
    """Parameters from nested dictionaries; `InputError` names the first wrong key of the file ``name``."""
    return validated(Params, tree, name)
