"""The rows of notebook 05: every defence of the three papers, as a part of one federation that trains one classifier.

A defence acts in up to three places: on the server, on updates (paper 1); at a client, on images (paper 2); on the network and
its training (paper 3). Rows that fill several places are stacks. Each place does what it does in notebooks 02 to 04, with two
adaptations, because nobody trains a generator here:

* FedDetect reads the losses that clients report. Here they are losses of the classifier.
* The hardened FedDetect compares the images that clients' generators draw. Here it compares `saliency` maps of classifiers.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from experiments import params as parameters
from experiments.gia_defense import clients as inversion_clients
from experiments.gia_defense.clients import Setup
from experiments.params import Params
from experiments.params.adversarial_pruning_defense import EvasionParams
from experiments.params.threat_matrix import MatrixParams
from medsec import data
from medsec.backdoor import feddetect
from medsec.core.errors import InputError
from medsec.core.params import rounds_until
from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.settings import AutoencoderParams, Cohorts
from medsec.evasion import attacks as adversarial
from medsec.evasion import pruning
from medsec.evasion.pruning import Masks
from medsec.federated import aggregators
from medsec.federated.aggregators import uniform_mean
from medsec.federated.rounds import Aggregator, State
from medsec.inversion import defences
from medsec.inversion.defences import DEFENCES, Defence
from medsec.nets.cbam import CBAM


@dataclass(frozen=True)
class Row:
    """What a row of the matrix is made of.

    Attributes:
        title: its name in figures.
        server: aggregator, one of `SERVERS`, or a rule of `medsec.federated.aggregators.RULES`.
        images: a defence of `experiments.gia_defense.clients` that changes images, or "none".
        gradient: one of `medsec.inversion.defences.DEFENCES`: what clients do to every gradient.
        trained_against: clients train on adversarial examples.
        prune: "no"; "small", the smallest weights; "random", as many at random places (control).
        cbam: attention after the second convolution.
        again: a second undefended run whose images come in another order: it shows the differences made by chance.
    """

    title: str
    server: str = "mean"
    images: str = "none"
    gradient: str = "none"
    trained_against: bool = False
    prune: str = "no"
    cbam: bool = False
    again: bool = False


GAIN = 0.9  # the initial weights of a convolution have the standard deviation GAIN / √(inputs)
STRIDES = (2, 1, 2)  # of the convolutions
GATES = 4.0  # two gates that are both half open leave a quarter
SERVERS = ("mean", "released", "described", "hardened", "norm_clip")
ROWS = {
    "none": Row("no defence"),
    "none_again": Row("no defence, another order (control)", again=True),
    "feddetect_released": Row("FedDetect, released", server="released"),
    "feddetect_described": Row("FedDetect, described", server="described"),
    "feddetect_hardened": Row("FedDetect, hardened", server="hardened"),
    "multi_krum": Row("Multi-Krum", server="multi_krum"),
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
    "multi_krum+public+at": Row(
        "the simplest of each", server="multi_krum", images="public_only", trained_against=True
    ),
}
FAMILIES = {  # groups of rows in the figure
    "no defence": ("none", "none_again"),
    "paper 1, server": ("feddetect_released", "feddetect_described", "feddetect_hardened", "multi_krum", "norm_clip"),
    "paper 2, images": ("shadow_released", "shadow_described", "shadow_hardened", "public_only"),
    "paper 3, network": ("prune", "prune_random", "cbam", "prune_cbam", "at", "hardened"),
    "stacks": ("feddetect+shadow", "shadow+at", "feddetect+shadow+at", "multi_krum+public+at"),
}


def row(variant: str) -> Row:
    """The row of this name, or of a rule or gradient defence that is registered under it; InputError if there is none."""
    if variant in ROWS:
        return ROWS[variant]
    if variant in aggregators.RULES:
        return Row(variant, server=variant)
    if variant in DEFENCES:
        return Row(variant, gradient=variant)
    raise InputError(f"row {variant!r} of the matrix: choose one of {', '.join(ROWS)}, or register it (CONTRIBUTING)")


def families(variants: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """`FAMILIES`, and in a group of their own those of ``variants`` that users have added (``own`` of the parameters)."""
    own = tuple(variant for variant in dict.fromkeys(variants) if variant not in ROWS)
    return FAMILIES | ({"yours": own} if own else {})


def undefended(row: Row) -> Row:
    """The row of a malicious client that leaves out the clients' defences: only the network stays as it is."""
    return replace(row, images="none", gradient="none", trained_against=False)


def prepare(cohort: str, params: Params) -> Setup:
    """The instruments of notebook 03, with the federation and the attacker's effort of section ``matrix``.

    Raises:
        InputError: the cohort cannot be loaded, or has too few images for the clients.
    """
    changed = settings(params)
    coder = changed.inversion.autoencoder.model_dump_json()
    return Setup(changed, *_instruments(cohort, changed.seeds.tuning[0], changed.cohorts.model_dump_json(), coder))


def settings(params: Params) -> Params:
    """The parameters with the federation and the attacker's effort of section ``matrix``."""
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
    return parameters.validate(changed, "section matrix")


@functools.lru_cache(maxsize=2)
def _instruments(name: str, seed: int, cohorts_json: str, autoencoder_json: str) -> tuple:
    """Like notebook 03's, without the attacker's own generator, which no attacker of this notebook uses."""
    p = AutoencoderParams.model_validate_json(autoencoder_json)
    cohort = data.load(name, Cohorts.model_validate_json(cohorts_json))
    splits = data.tensors(cohort)
    own = inversion_clients.autoencoder(cohort, splits["public"][0], p, p.latent, derive_seed(seed, "defender"))
    return cohort, splits, own, nn.Identity()


# Places of a defence -------------------------------------------------------------------------------------------------


def network(setup: Setup, row: Row, seed: int) -> nn.Module:
    """The untrained classifier of a run: that of notebook 03, changed so that it learns within a few short rounds.

    It has one convolution less and halves the image at once, which halves the work. Its initial weights are larger than
    PyTorch's: larger still, it would learn faster and be harder to invert. `GAIN`, `STRIDES` and the learning rate were chosen
    on the tuning seeds, by the AUC on val and the PSNR of gradient inversion without a defence. All rows start from the same
    weights; attention has further weights of its own, and its output is scaled by `GATES`.
    """
    model = inversion_clients.network(setup, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "wider"))
        model.body = model.body[: 2 * len(STRIDES)]  # each convolution is followed by a GELU
        convolutions = [layer for layer in model.body if isinstance(layer, nn.Conv2d)]
        for layer, stride in zip(convolutions, STRIDES, strict=True):
            layer.stride = (stride, stride)
            nn.init.normal_(layer.weight, std=GAIN * layer.weight[0].numel() ** -0.5)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(model.head.weight, std=model.head.in_features**-0.5)
        nn.init.zeros_(model.head.bias)
        if row.cbam:
            size = setup.params.evasion.attention
            attention = CBAM(setup.params.inversion.federation.width, reduction=size.reduction, kernel=size.kernel)
            model.body = nn.Sequential(*model.body[:4], attention, Times(GATES), *model.body[4:])
    return model.eval()


class Times(nn.Module):
    """Multiplies by a constant. (A factor in the weights would change which of them magnitude pruning removes.)"""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def perturbation(setup: Setup, row: Row, images: Tensor, labels: Tensor, seed: int) -> Callable | None:
    """``(model, x, y, round) -> x′``: the image on which a client trains; None if it is its own.

    The image defence comes first. With `Row.trained_against` follows an adversarial example for the network as it is at this
    batch: by FGSM-RS (Wong et al. 2020) for one step, by PGD for several.

    Args:
        images, labels: all that the client holds, (N, C, S, S) and (N,).
    """
    defended = None
    if row.images != "none":
        defended = inversion_clients.client(row.images, setup, images, labels, derive_seed(seed, "defence")).perturb
    if not row.trained_against:
        return defended
    recipe = setup.params.evasion.robust

    def adversarial_images(model: nn.Module, x: Tensor, y: Tensor, round_idx: int) -> Tensor:
        x = x if defended is None else defended(model, x, y, round_idx)
        rng = torch_generator(seed, "adversarial training", round_idx, int(x.sum(dtype=torch.float64) * 2**20))
        return adversarial.pgd(model, x, y, recipe.eps / 255, rng, steps=recipe.steps, step=recipe.step)

    return adversarial_images


def gradient_defence(setup: Setup, row: Row, seed: int) -> Defence | None:
    """What a client does to every gradient; None if it sends it as it is."""
    if row.gradient == "none":
        return None
    own = setup.params.inversion.defences.get(row.gradient, {})
    return defences.configured(row.gradient, own, derive_seed(seed, "defence"))


def masks(model: nn.Module, row: Row, p: EvasionParams, seed: int) -> Masks | None:
    """Which weights stay; None for a row that does not prune.

    As in notebook 04, `p.prune` of all weights go, and `p.prune_hardened` of them if the network is also trained against
    attacks. The random control keeps as many in every layer, at random places.
    """
    if row.prune == "no":
        return None
    keep = pruning.masks(model, p.prune_hardened if row.trained_against else p.prune)
    if row.prune == "random":
        rng = torch_generator(seed, "random masks")
        keep = {k: m.flatten()[torch.randperm(m.numel(), generator=rng)].view_as(m) for k, m in keep.items()}
    return keep


def aggregator(setup: Setup, row: Row, p: MatrixParams, model: nn.Module, seed: int) -> Aggregator:
    """A fresh aggregator for one run. ``model`` is what the server starts with."""
    warm_up, state = rounds_until(p.warm_up, p.federation.rounds), {k: v.clone() for k, v in model.state_dict().items()}
    if row.server == "released":
        return feddetect.Released(warm_up, setup.params.feddetect.decay)
    if row.server == "described":
        return feddetect.Described(warm_up, p.patience)
    if row.server == "norm_clip":
        return feddetect.NormClip(state)
    if row.server == "hardened":
        h = setup.params.feddetect.hardened
        return feddetect.Hardened(
            functools.partial(saliency, setup, network(setup, row, seed), p.looks, seed),
            state,
            warm_up=warm_up,
            watch=rounds_until(h.watch, warm_up),
            fpr=h.fpr,
            scale=(p.scale, p.scale_relative),
            window=h.window,
            loss_floor=h.loss_floor,
            drift=h.drift,
            limit=h.limit,
        )
    if row.server in aggregators.RULES:
        return aggregators.rule(row.server, 1)
    return uniform_mean


def saliency(setup: Setup, model: nn.Module, n: int, seed: int, state: State, round_idx: int) -> Tensor:
    """Saliency maps of one client's classifier: the gradient of the margin at ``n`` public images, (n, C, S, S).

    They take the place of the images that a client's generator draws: a classifier with a backdoor reacts to a place in the
    image that other classifiers ignore. All clients are compared on the same images. The server draws new ones in every
    round and keeps them secret. Each map is divided by its root mean square, so that the scale of an update does not count.
    """
    public, labels = setup.splits["public"]
    chosen = torch.randperm(len(public), generator=torch_generator(seed, "server", round_idx))[:n]
    model.load_state_dict(state)
    x = public[chosen].requires_grad_()
    with torch.enable_grad():
        (maps,) = torch.autograd.grad(adversarial.margin(model(x), labels[chosen]).sum(), x)
    return maps / maps.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)
