"""What cohorts and methods can be set to, as sections of ``params.yaml``: types, bounds, and what must fit together."""

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from medsec.core.params import MOST, Count, Eps255, Factor, NotNegative, Positive, Rate, Section, Seed, Size

__all__ = ["Cohorts"]


class SplitCounts(Section):
    """Images of each split of a cohort that we make ourselves."""

    client: Count
    public: Count
    reference: Count
    val: Count
    test: Count


class SplitShares(Section):
    """Shares of an official training set."""

    client: Rate
    public: Rate
    reference: Rate

    @model_validator(mode="after")
    def _sum(self):
        if abs(self.client + self.public + self.reference - 1) > 1e-9:
            raise ValueError("client + public + reference must be 1")
        return self


class PhantomCohort(Section):
    size: int = Field(ge=28, le=224, multiple_of=4)
    seed: Seed
    images: SplitCounts


class FundusCohort(PhantomCohort):
    grades: Literal[2, 3]


class MedMNISTCohort(Section):
    size: Literal[28, 64, 128, 224]
    seed: Seed
    shares: SplitShares


class NpzCohort(Section):
    path: str | None
    seed: Seed
    shares: SplitShares


class FolderShares(Section):
    """Shares of the images of a folder, as nearly as whole patients allow."""

    client: Rate
    public: Rate
    reference: Rate
    val: Rate
    test: Rate

    @model_validator(mode="after")
    def _sum(self):
        if abs(self.client + self.public + self.reference + self.val + self.test - 1) > 1e-9:
            raise ValueError("client + public + reference + val + test must be 1")
        return self


class FolderCohort(Section):
    path: str | None
    size: int = Field(ge=28, le=224, multiple_of=4)
    channels: Literal[1, 3] | None
    patient_pattern: str
    table: str | None
    seed: Seed
    shares: FolderShares

    @field_validator("patient_pattern")
    @classmethod
    def _one_group(cls, pattern):
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        if groups != 1:
            raise ValueError(f"{pattern!r} has {groups} groups; it needs one pair of round brackets, round the patient")
        return pattern


class Cohorts(Section):
    phantom: PhantomCohort
    fundus: FundusCohort
    medmnist: MedMNISTCohort
    npz: NpzCohort
    folder: FolderCohort


class ClassifierParams(Section):
    lr: Positive
    weight_decay: NotNegative
    batch: int = Field(ge=2, le=MOST)
    shift: int = Field(ge=0, le=224)


class GAN(Section):
    """Networks and training of a federated GAN; ``recipe`` is no parameter: it says which class of settings this is."""

    recipe: ClassVar[str]
    z_dim: Size
    width: Size
    lr_g: Positive
    lr_d: Positive
    batch: int = Field(ge=2, le=MOST)
    decay_after: float = Field(ge=0, le=1)


class DCGAN(GAN):
    """A DCGAN with Adam."""

    recipe: ClassVar[str] = "dcgan"
    beta1: float = Field(ge=0, lt=1)


class WassersteinGAN(GAN):
    """A WGAN-GP with RMSprop; ``penalty`` weighs that of the critic's gradient."""

    recipe: ClassVar[str] = "wgan_gp"
    penalty: Positive


class ProjectionGAN(DCGAN):
    """The GAN that draws; besides, what both kinds of images go through before the discriminator sees them."""

    recipe: ClassVar[str] = "projection"
    shift: int = Field(ge=0, le=224)
    brightness: float = Field(ge=0, le=1)
    contrast: float = Field(ge=0, lt=1)


class TriggerParams(Section):
    kind: Literal["checker", "grid", "moving", "blended"]
    size: Size
    opacity: Rate


class Poison(Section):
    ratio: Rate
    label: Annotated[int, Field(ge=0, le=1024)] | None
    boost: Factor
    boost_after: float = Field(ge=0, lt=1)


class Measure(Section):
    synthetic: int = Field(ge=100, le=MOST)
    threshold_fpr: float = Field(gt=0, lt=1)
    extractor_epochs: Count
    downstream_epochs: Count
    probe: Count


class FedGANParams(Section):
    n_clients: Size
    malicious: list[Annotated[int, Field(ge=0, le=1024)]]
    partition: Literal["iid", "dirichlet", "style"]
    dirichlet_alpha: Positive
    images_per_client: Count
    rounds: Count
    average: Literal["generator", "both"]
    gan: DCGAN
    trigger: TriggerParams
    poison: Poison
    measure: Measure

    @model_validator(mode="after")
    def _clients_exist(self):
        if len(set(self.malicious)) < len(self.malicious):
            raise ValueError("malicious names a client twice")
        if len(self.malicious) > self.n_clients:
            raise ValueError(f"{len(self.malicious)} malicious clients of only {self.n_clients}; raise n_clients")
        if self.malicious and max(self.malicious) >= self.n_clients:
            raise ValueError(
                f"malicious client {max(self.malicious)} does not exist; clients are 0 to {self.n_clients - 1}"
            )
        return self


class FedClsParams(Section):
    width: Size
    n_clients: Size
    images_per_client: Count
    rounds: Count
    batch: Count
    lr: Positive
    momentum: float = Field(ge=0, lt=1)


class PurifierParams(Section):
    images: int = Field(ge=32, le=MOST)
    width: Size
    epochs: Count
    batch: Count
    lr: Positive


class InversionSettings(Section):
    iterations: Count
    lr: Positive
    lr_latent: Positive
    tv: NotNegative
    statistics: NotNegative
    restarts: Size
    together: Count
    done: NotNegative


class AutoencoderParams(Section):
    latent: Size
    latent_prior: Size
    epochs: Count
    lr: Positive
    batch: Count


class ShadowParams(Section):
    steps: Count
    lr: Positive
    freeze: Rate
    momentum: float = Field(ge=0, lt=1)
    ema: Rate
    layer: str
    top: Rate
    alpha: list[Annotated[float, Field(ge=0, le=1)]] = Field(min_length=2, max_length=2)
    scale: Positive


class Recipe(Section):
    """How a classifier is trained; adversarial examples with eps > 0, TRADES with beta > 0, mean weights with ema > 0.

    ``balanced``: every class counts alike in the loss.
    """

    epochs: Count
    lr: Positive
    weight_decay: NotNegative
    batch: int = Field(ge=2, le=MOST)
    shift: int = Field(ge=0, le=224)
    balanced: bool
    finetune_epochs: int = Field(ge=0, le=MOST)
    finetune_lr: Positive
    eps: Eps255
    steps: Count
    step: Positive
    beta: NotNegative
    ema: float = Field(ge=0, lt=1)

    @model_validator(mode="after")
    def _pruned_before_the_mean(self):
        if self.ema and not self.finetune_epochs:
            raise ValueError(
                "ema > 0 with finetune_epochs 0: what is pruned would have no step to enter the mean; set one of them"
            )
        return self


class AttentionParams(Section):
    reduction: Size
    kernel: Size
