"""Section ``threats`` of the parameters."""

from pydantic import Field

from medsec.core.params import Count, Positive, Section, Size


class Threats(Section):
    gallery: Count
    fundus_size: int = Field(ge=28, le=224)
    n_clients: Size
    dirichlet_alpha: Positive
    shift_images: Count
    shift_epochs: Count
