"""What the record of notebook 01 adds (section ``record.fedgan``); ``fedgan`` is in `medsec.core.settings`."""

from typing import Annotated, Literal

from pydantic import Field

from medsec.core.params import Count, Rate, Section


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
