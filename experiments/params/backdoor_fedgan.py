"""What the record of notebook 01 adds (sections ``record.fedgan``, ``drawing``); ``fedgan`` is in `medsec.core.settings`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from medsec.core.params import Count, Factor, Rate, Section, Size, registered
from medsec.core.settings import ProjectionGAN


class Drawing(Section):
    """The GAN that draws: what differs from ``fedgan``, and how it is measured. Only its own cells depend on it."""

    rounds: Count
    average: Literal["generator", "both"]
    gan: ProjectionGAN
    boost: Factor
    boost_after: float = Field(ge=0, lt=1)
    label: int = Field(ge=0, le=1024)
    shift: int = Field(ge=1, le=16)
    real_per_class: Count


class FedGANRecord(Section):
    """One-factor sweeps of notebook 01's record; every list holds the values besides the headline's own."""

    seeds: Count
    trigger: list[str]
    trigger_size: list[Size]
    ratio: list[Rate]
    attackers: list[Size]
    n_clients: list[Size]
    partition: list[Literal["iid", "dirichlet", "style"]]
    image_size: list[Annotated[int, Field(ge=28, le=224, multiple_of=4)]]

    @field_validator("trigger")
    @classmethod
    def _kinds(cls, names):
        from medsec.backdoor.triggers import KINDS  # here: it loads PyTorch

        return registered(names, KINDS, "trigger")
