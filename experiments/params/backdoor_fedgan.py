"""What the record of notebook 01 adds (section ``record.fedgan``); ``fedgan`` is in `medsec.core.settings`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from medsec.core.params import Count, Rate, Section, Size, registered


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
