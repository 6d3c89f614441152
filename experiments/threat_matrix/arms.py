"""The rows of notebook 05: every defence of the three papers as a part of one federation that trains one classifier.

A defence has up to four places in it, and a row fills some of them: what the server does with the updates (paper 1), which
image a client uses instead of its own (paper 2), which network is trained, and on what (paper 3). Rows that fill several are
stacks. What each place does is what notebooks 02 to 04 have, with two adaptations, since here nobody trains a generator:

* FedDetect reads the losses that clients report; here these are losses of the classifier.
* The hardened one also looks at what a client's generator draws; here at what a client's classifier looks at (`looks`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from experiments import params as parameters
from experiments.adversarial_pruning_defense.params import EvasionParams
from experiments.gia_defense import clients as inversion_clients
from experiments.gia_defense.clients import Setup
from experiments.params import Params
from experiments.threat_matrix.params import MatrixParams
from medsec import data
from medsec.backdoor import feddetect
from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.settings import AutoencoderParams, Cohorts
from medsec.evasion import attacks as adversarial
from medsec.evasion import pruning
from medsec.evasion.pruning import Masks
from medsec.federated.rounds import Aggregator, State
from medsec.nets.autoencoder import train_autoencoder
from medsec.nets.cbam import CBAM
from medsec.nets.convnet import ConvNet


@dataclass(frozen=True)
class Row:
    """What a row is made of.

    Attributes:
        title: for figures.
        server: aggregator, one of `SERVERS`.
        images: a defence of `experiments.gia_defense.clients` that changes images, or "none".
        trained_against: clients train on adversarial examples.
        prune: "no"; "small", the smallest weights; "random", as many at random: the control.
        cbam: attention after the second convolution.
        again: nothing is defended, and the order of the images is another: what a row differs from ``none`` by chance.
    """

    title: str
    server: str = "mean"
    images: str = "none"
    trained_against: bool = False
    prune: str = "no"
    cbam: bool = False
    again: bool = False


GAIN = 0.9
STRIDES = (2, 1, 2)  # of its convolutions
GATES = 4.0  # two gates that are both half open leave a quarter
SERVERS = ("mean", "released", "described", "hardened", "norm_clip")
ROWS = {
    "none": Row("no defence"),
    "none_again": Row("no defence, another order (control)", again=True),
    "feddetect_released": Row("FedDetect, released", server="released"),
    "feddetect_described": Row("FedDetect, described", server="described"),
    "feddetect_hardened": Row("FedDetect, hardened", server="hardened"),
    "norm_clip": Row("norms clipped (control)", server="norm_clip"),
    "shadow_released": Row("shadow, released", images="shadow_released"),
    "shadow_described": Row("shadow, described", images="shadow_described"),
    "shadow_hardened": Row("shadow, hardened", images="shadow_hardened"),
    "public_only": Row("any public image (control)", images="public_only"),
    "prune": Row("pruning", prune="small"),
    "prune_random": Row("random pruning (control)", prune="random"),
    "cbam": Row("attention", cbam=True),
    "prune_cbam": Row("pruning + attention", prune="small", cbam=True),
    "at": Row("adversarial training", trained_against=True),
    "hardened": Row("adv. training + both", trained_against=True, prune="small", cbam=True),
    "feddetect+shadow": Row("FedDetect h. + shadow h.", server="hardened", images="shadow_hardened"),
    "shadow+at": Row("shadow h. + adv. training", images="shadow_hardened", trained_against=True),
    "feddetect+shadow+at": Row("all three", server="hardened", images="shadow_hardened", trained_against=True),
}
FAMILIES = {  # lines of the figure are drawn between them
    "no defence": ("none", "none_again"),
    "paper 1, server": ("feddetect_released", "feddetect_described", "feddetect_hardened", "norm_clip"),
    "paper 2, images": ("shadow_released", "shadow_described", "shadow_hardened", "public_only"),
    "paper 3, network": ("prune", "prune_random", "cbam", "prune_cbam", "at", "hardened"),
    "stacks": ("feddetect+shadow", "shadow+at", "feddetect+shadow+at"),
}


def row(variant: str) -> Row:
    """Raises InputError for a name that is not in `ROWS`."""
    if variant not in ROWS:
        raise InputError(f"row {variant!r} of the matrix: choose one of {', '.join(ROWS)}")
    return ROWS[variant]


def prepare(cohort: str, params: Params) -> Setup:
    """The instruments of notebook 03, with the federation and the attacker's effort of section ``matrix``.

    Raises:
        InputError: the cohort cannot be loaded, or has too few images for the clients.
    """
    p = params.matrix
    own = {
        "federation": p.federation.model_dump(),
        "victims": p.victims,
        "attack": {"iterations": p.iterations},
        "purifier": {"images": p.purifier_images},
        "autoencoder": {"epochs": p.autoencoder_epochs},
        "shadow": {"steps": p.shadow_steps, "freeze": p.shadow_freeze},
    }
    changed = parameters.merge(params.model_dump(), {"inversion": own})
    changed = parameters.validate(changed, "section matrix")
    coder = changed.inversion.autoencoder.model_dump_json()
    return Setup(changed, *_instruments(cohort, changed.seeds.tuning[0], changed.cohorts.model_dump_json(), coder))


@functools.lru_cache(maxsize=2)
def _instruments(name: str, seed: int, cohorts_json: str, autoencoder_json: str) -> tuple:
    """As notebook 03's, without the attacker's generator, which no attacker here has a use for."""
    p = AutoencoderParams.model_validate_json(autoencoder_json)
    cohort = data.load(name, Cohorts.model_validate_json(cohorts_json))
    splits = {
        split: (torch.from_numpy(part.float()), torch.from_numpy(part.labels)) for split, part in cohort.splits.items()
    }
    own = derive_seed(seed, "defender")
    trained = train_autoencoder(splits["public"][0], latent=p.latent, seed=own, epochs=p.epochs, lr=p.lr, batch=p.batch)
    return cohort, splits, trained, nn.Identity()


def network(setup: Setup, row: Row, seed: int) -> nn.Module:
    """The untrained classifier of a run: that of notebook 03, made to learn within a few rounds of seconds.

    It has one convolution less and halves the image at once, which is half the work, and its weights begin wider than
    PyTorch's, with the standard deviation `GAIN` / √(inputs). Wider still it would learn faster and be harder to invert.
    `GAIN`, `STRIDES` and the learning rate were chosen by what the undefended network learns (AUC on val) and gives away
    (PSNR) on the tuning seeds. Every row begins alike; attention has further weights of its own.
    """
    model = inversion_clients.network(setup, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "wider"))
        model.body = model.body[: 2 * len(STRIDES)]  # a convolution and its GELU each
        convolutions = [layer for layer in model.body if isinstance(layer, nn.Conv2d)]
        for layer, stride in zip(convolutions, STRIDES, strict=True):
            layer.stride = (stride, stride)
            nn.init.normal_(layer.weight, std=GAIN * layer.weight[0].numel() ** -0.5)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(model.head.weight, std=model.head.in_features**-0.5)
        nn.init.zeros_(model.head.bias)
        if row.cbam:
            _attend(model, setup.params)
    return model.eval()


def _attend(model: ConvNet, params: Params) -> None:
    """Put attention after the second convolution, and give back what its two gates take away when they are half open."""
    size = params.evasion.attention
    attention = CBAM(params.inversion.federation.width, reduction=size.reduction, kernel=size.kernel)
    model.body = nn.Sequential(
        *model.body[:4], attention, Times(GATES), *model.body[4:]
    )  # a GELU after each convolution


class Times(nn.Module):
    """Multiplies by a constant. (In the weights, it would tell magnitude pruning that they count more than others.)"""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


# What a client does to its images ------------------------------------------------------------------------------------


def perturbation(setup: Setup, row: Row, images: Tensor, labels: Tensor, seed: int) -> Callable | None:
    """``(model, x, y, round) -> x′``: the image that a client really uses; None where it uses its own.

    First the image defence, then (`trained_against`) an adversarial example of what came out.
    """
    first = None
    if row.images != "none":
        first = inversion_clients.client(row.images, setup, images, labels, derive_seed(seed, "defence")).perturb
    if not row.trained_against:
        return first
    recipe = setup.params.evasion.robust

    def both(model: nn.Module, x: Tensor, y: Tensor, round: int) -> Tensor:
        x = x if first is None else first(model, x, y, round)
        return adversarial_images(model, x, y, recipe.eps / 255, recipe.steps, recipe.step, seed, round)

    return both


def adversarial_images(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step: float, seed: int, round: int
) -> Tensor:
    """FGSM-RS (Wong et al. 2020) with one step, PGD with several, of the network as it is at this batch."""
    rng = torch_generator(seed, "adversarial training", round, int(x.sum(dtype=torch.float64) * 2**20))
    return adversarial.pgd(model, x, y, eps, rng, steps=steps, step=step)


# What the network may be ---------------------------------------------------------------------------------------------


def masks(model: nn.Module, row: Row, ratio: float, seed: int) -> Masks | None:
    """Which weights stay (`medsec.evasion.pruning`); the control takes as many in every layer, at random places."""
    if row.prune == "no":
        return None
    keep = pruning.masks(model, ratio)
    if row.prune == "random":
        rng = torch_generator(seed, "random masks")
        keep = {k: m.flatten()[torch.randperm(m.numel(), generator=rng)].view_as(m) for k, m in keep.items()}
    return keep


def ratio(row: Row, p: EvasionParams) -> float:
    """The share of the weights that goes; as in notebook 04, half where the network is trained against attacks as well."""
    return p.prune_hardened if row.trained_against else p.prune


# What the server does ------------------------------------------------------------------------------------------------


def aggregator(setup: Setup, row: Row, p: MatrixParams, model: nn.Module, seed: int) -> Aggregator:
    """A fresh aggregator of one run, ``model`` being what the server starts with."""
    warm_up, state = first_round(p.warm_up, p.federation.rounds), {k: v.clone() for k, v in model.state_dict().items()}
    if row.server == "released":
        return feddetect.Released(warm_up, setup.params.feddetect.decay)
    if row.server == "described":
        return feddetect.Described(warm_up, p.patience)
    if row.server == "norm_clip":
        return feddetect.NormClip(state)
    if row.server == "hardened":
        h = setup.params.feddetect.hardened
        return feddetect.Hardened(
            functools.partial(looks, setup, network(setup, row, seed), p.looks, seed),
            state,
            warm_up=warm_up,
            watch=first_round(h.watch, warm_up),
            fpr=h.fpr,
            scale=(p.scale, p.scale_relative),
            window=h.window,
            loss_floor=h.loss_floor,
            drift=h.drift,
            limit=h.limit,
        )
    return feddetect.uniform_mean


def first_round(share: float, rounds: int) -> int:
    """The round, from 0, that begins after this share of all rounds."""
    return int(share * rounds + 0.5)


def looks(setup: Setup, model: nn.Module, n: int, seed: int, state: State, round: int) -> Tensor:
    """What a client's classifier looks at: (n, C, S, S), the gradient of the margin of some public images, all clients the same.

    It takes the place of images that a client's generator draws. A classifier with a backdoor has learnt to answer to a place
    of the image to which the others pay no attention. The images are drawn anew in every round, and the server keeps them
    secret. Each map is divided by its root mean square, so that a scaled update does not count for its length.
    """
    public, labels = setup.splits["public"]
    chosen = torch.randperm(len(public), generator=torch_generator(seed, "server", round))[:n]
    model.load_state_dict(state)
    x = public[chosen].requires_grad_()
    with torch.enable_grad():
        (found,) = torch.autograd.grad(adversarial.margin(model(x), labels[chosen]).sum(), x)
    return found / found.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)


def undefended(row: Row) -> Row:
    """The row of an attacker who does as it likes: of the defences only the network is left."""
    return replace(row, images="none", trained_against=False)
