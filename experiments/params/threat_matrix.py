"""Section ``matrix`` of the parameters."""

from typing import Literal

from pydantic import Field, model_validator

from medsec.core.params import MOST, Count, Factor, Positive, Rate, Section, Size, rounds_until
from medsec.core.settings import FedClsParams


class MatrixParams(Section):
    federation: FedClsParams
    warm_up: float = Field(ge=0, lt=1)
    patience: Size
    looks: int = Field(ge=8, le=MOST)
    scale: Positive
    scale_relative: Positive
    target: int = Field(ge=0, le=MOST)
    poison_few: Rate
    poison_many: Rate
    boost: Factor
    prune_after: Rate
    leak_after: Rate
    shadow_steps: Count
    shadow_freeze: Rate
    victims: Count
    purifier_images: int = Field(ge=32, le=MOST)
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
        if rounds_until(self.prune_after, self.federation.rounds) < 1:
            raise ValueError(
                f"prune_after {self.prune_after:g} of {self.federation.rounds} rounds is before the first: nothing is pruned"
            )
        if self.leak_after < self.prune_after:
            raise ValueError(
                f"leak_after {self.leak_after:g} is before prune_after {self.prune_after:g}: nothing is pruned yet"
            )
        return self
