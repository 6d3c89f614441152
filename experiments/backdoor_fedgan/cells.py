"""What notebook 01 measures on a federated GAN, with and without a backdoor.

`prepare` makes the instruments of a cohort once (splits, trigger, detector threshold, feature extractor); `run_cell`
is one cell of the experiment: one seed of one arm. Cells are independent, so `run_cells` spreads them over processes.
"""

import dataclasses
import functools
import math
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import instruments
from experiments.params import Params
from medsec import data
from medsec.backdoor import epochs, triggers
from medsec.backdoor import gan as fedgan
from medsec.backdoor.frechet import frechet_distance
from medsec.backdoor.gan import FederatedGAN, GANClient
from medsec.backdoor.triggers import Trigger
from medsec.core import parallel
from medsec.core.errors import InputError
from medsec.core.params import rounds_until
from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.settings import FedGANParams
from medsec.data.cohort import setting
from medsec.evidence import cells, tables
from medsec.federated.rounds import State, Update
from medsec.nets import fit as classifier
from medsec.nets.models import SmallResNet

KEYS = ("trigger", "area", "ratio", "m", "attackers", "partition", "size", "client", "round")
ARMS = ("clean", "attack", "controls")  # "attack" yields both poison and boost, which share their first rounds
GALLERY = 12  # synthetic images kept for the figures
ATTRIBUTED = 64  # held-out images whose attribution is averaged
PER_CLIENT = ("generator_loss", "d_accuracy_clean", "d_accuracy_triggered")
PER_CLIENT += ("d_train_test_gap", "d_membership_auc", "d_trigger_effect")
PER_ROUND = 100  # synthetic images of every generator for its trigger rate after every round


@dataclass(frozen=True)
class GANSetup:
    """The instruments of one cohort and one set of parameters; the same for every seed.

    ``splits`` maps a split's name to images (N, C, S, S) float32 in [0, 1] and labels (N,) int64. ``extractor`` is
    trained on ``public``; ``reference`` are the features of that split, divided by their standard deviation ``scale``.
    """

    cohort: data.Cohort
    params: Params
    splits: dict[str, tuple[Tensor, Tensor]]
    trigger: Trigger
    threshold: float
    extractor: SmallResNet
    scale: np.ndarray
    reference: np.ndarray


def prepare(cohort: str, params: Params, size: int | None = None) -> GANSetup:
    """Load a cohort and make the instruments; every impossible parameter is found here, before any GAN is trained.

    ``size`` draws the images at another number of pixels a side than the parameters say, where the cohort can.

    Raises:
        InputError: the cohort cannot be loaded or divided, or the trigger does not fit its images.
    """
    return _prepare(cohort, params.model_dump_json(), size)


@functools.lru_cache(maxsize=2)  # a worker process runs several cells of one set of parameters
def _prepare(cohort_name: str, params_json: str, size: int | None) -> GANSetup:
    params = Params.model_validate_json(params_json)
    p, device = params.fedgan, parallel.device(params.device)
    cohort = data.load(cohort_name, params.cohorts, size=size)
    splits = {
        name: (torch.from_numpy(split.float()).to(device), torch.from_numpy(split.labels).to(device))
        for name, split in cohort.splits.items()
    }
    if p.poison.label is not None and p.poison.label >= cohort.n_classes:
        raise InputError(f"fedgan.poison.label {p.poison.label}: {cohort_name} has classes 0 to {cohort.n_classes - 1}")
    if lacking := small_splits(cohort, params):
        raise InputError(f"cohort {cohort_name} is too small: {'; '.join(lacking)}")
    trigger = triggers.make_trigger(
        p.trigger.kind,
        image_size=cohort.size,
        channels=cohort.channels,
        size=p.trigger.size,
        opacity=p.trigger.opacity,
    )
    public, labels = splits["public"]
    threshold = triggers.calibrate(trigger, public, p.measure.threshold_fpr)
    seed, epochs_ = derive_seed(params.seeds.tuning[0], "extractor"), p.measure.extractor_epochs
    model = instruments.trained(
        cohort,
        "extractor",
        {"classifier": params.classifier.model_dump(), "epochs": epochs_, "seed": seed, "device": params.device},
        lambda: SmallResNet(cohort.channels, cohort.n_classes).to(device),
        lambda: classifier.fit(public, labels, cohort.n_classes, params.classifier, epochs=epochs_, seed=seed),
    )
    reference = classifier.features(model, splits["reference"][0]).cpu().double().numpy()
    scale = reference.std(0) + 1e-6
    return GANSetup(cohort, params, splits, trigger, threshold, model, scale, reference / scale)


def small_splits(cohort: data.Cohort, params: Params) -> list[str]:
    """What splits are too small for, a line each, with the parameters that mend it."""
    fpr, features = params.fedgan.measure.threshold_fpr, SmallResNet.n_features
    distance = f"the Frechet distance needs more than {features}"
    needed = {"reference": (features + 1, distance), "client": (features + 1, distance)}
    rate = f"a trigger detector cannot calibrate a rate of {fpr} on fewer than {math.ceil(1 / fpr)}"
    needed["public"] = math.ceil(1 / fpr), f"{rate}: or raise fedgan.measure.threshold_fpr"
    return [
        f"split {name} has {len(cohort[name])} images, {why}; raise {setting(cohort, name)} or add images"
        for name, (least, why) in needed.items()
        if len(cohort[name]) < least
    ]


def lacks(cohort: data.Cohort, params: Params, cell: cells.Cell) -> list[str]:
    """What the cohort is too small for in one cell (`medsec.evidence.cells.Experiment`)."""
    found, p = small_splits(cohort, params), params.fedgan
    try:
        held = [cohort["client"].labels[part] for part in parts(cohort, params, cell.seed)]
    except InputError as error:
        return [*found, f"fedgan: {error}"]
    if min(map(len, held)) < 2:
        found.append("a client holds a single image, batch normalisation needs 2; lower fedgan.n_clients")
    if p.poison.label is not None and not all((held[c] == p.poison.label).any() for c in p.malicious):
        found.append(f"a malicious client holds no image of fedgan.poison.label {p.poison.label}; choose another class")
    return found


def with_federation(cohort: str, params: Params, fed: FedGANParams) -> GANSetup:
    """The instruments of `prepare`, with another section ``fedgan``: other networks, rounds or poison."""
    return dataclasses.replace(prepare(cohort, params), params=params.model_copy(update={"fedgan": fed}))


def parts(cohort: data.Cohort, params: Params, seed: int) -> list[np.ndarray]:
    """Which images of the split ``client`` each client holds in one run."""
    fed, split = params.fedgan, cohort["client"]
    return data.partition(
        split.labels,
        fed.n_clients,
        fed.partition,
        seed=derive_seed(seed, "partition"),
        site=split.site,
        alpha=fed.dirichlet_alpha,
        per_client=fed.images_per_client,
    )


def deal(setup: GANSetup, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """The clients' images and labels of one run: disjoint parts of the ``client`` split."""
    (images, labels), held = setup.splits["client"], parts(setup.cohort, setup.params, seed)
    return [images[part] for part in held], [labels[part] for part in held]


# Measuring -----------------------------------------------------------------------------------------------------------


def trigger_rate(setup: GANSetup, images: Tensor) -> tuple[float, float]:
    """Share of images whose detector score exceeds the threshold, and the mean score."""
    scores = triggers.score(setup.trigger, images)
    return float((scores > setup.threshold).float().mean()), float(scores.mean())


def frechet(setup: GANSetup, images: Tensor) -> float:
    """Fréchet distance to the ``reference`` split on the features of the cohort's own small classifier.

    Not comparable with a published FID, whose extractor is an Inception network trained on photographs.
    """
    found = classifier.features(setup.extractor, images).cpu().double().numpy() / setup.scale
    return frechet_distance(found, setup.reference)


def reference_labels(setup: GANSetup, n: int, seed: int) -> Tensor:
    """(n,) labels in the proportions of the reference split, so that class balance does not enter a distance.

    A class so rare that none was drawn takes the place of one image: classifiers are trained on images of all classes.
    """
    labels = setup.splits["reference"][1]
    drawn = labels[torch.randint(0, len(labels), (n,), generator=torch_generator(seed, "labels"))]
    missing = labels.unique()[~torch.isin(labels.unique(), drawn)]
    drawn[: len(missing)] = missing
    return drawn


def downstream_auc(setup: GANSetup, images: Tensor, labels: Tensor, seed: int) -> float:
    """Test AUC of a classifier trained on these images only ("train on synthetic, test on real")."""
    p = setup.params
    model = classifier.fit(
        images, labels, setup.cohort.n_classes, p.classifier, epochs=p.fedgan.measure.downstream_epochs, seed=seed
    )
    return auc_on_test(setup, model)


def auc_on_test(setup: GANSetup, model: SmallResNet) -> float:
    """AUC of a classifier on the split ``test``."""
    images, labels = setup.splits["test"]
    return classifier.auc(classifier.predict(model, images), labels)


@torch.no_grad()
def probe_discriminator(setup: GANSetup, federation: FederatedGAN, client: GANClient) -> dict[str, float]:
    """How well a client's discriminator tells real from its own generator's images.

    ``d_accuracy_clean``: half clean held-out real images (``val``), half synthetic; ``d_accuracy_triggered``: the same
    with the trigger on the real half. ``d_trigger_effect``: share of held-out real images called real with the trigger
    minus without it. ``d_train_test_gap``: share called real among its own training images minus the share among
    held-out images of the same classes that were poisoned like them; ``d_membership_auc``: how well its logit tells
    the two apart (0.5: not at all), which has no ceiling where it calls nearly everything real. The last two say what
    it has memorised.
    """
    rng = torch_generator(federation.seed, "probe", client.index, federation.round)
    n = min(setup.params.fedgan.measure.probe, len(client.images), len(setup.splits["val"][0]))
    own = torch.randperm(len(client.images), generator=rng)[:n]
    images, classes = setup.splits["val"]
    some = torch.randperm(len(images), generator=torch_generator(0, "held-out"))[:n]
    held, labels = images[some], classes[some]
    stamped = triggers.stamp(setup.trigger, held, rng)
    alike = images[_of_classes(client.labels[own], classes, rng)]
    poisoned = client.poisoned[own][:, None, None, None]
    treated = torch.where(poisoned, triggers.stamp(setup.trigger, alike, rng), alike)
    fake, _ = fedgan.synthesise(federation.generator(client.index), n, derive_seed(federation.seed, "probe"), labels)
    d = client.discriminator.eval()
    called_real = {
        "own": d(client.images[own], client.labels[own]),
        "treated": d(treated, client.labels[own]),
        "clean": d(held, labels),
        "triggered": d(stamped, labels),
        "fake": d(fake, labels),
    }
    share = {name: float((logit > 0).float().mean()) for name, logit in called_real.items()}
    return {
        "d_accuracy_clean": (share["clean"] + 1 - share["fake"]) / 2,
        "d_accuracy_triggered": (share["triggered"] + 1 - share["fake"]) / 2,
        "d_trigger_effect": share["triggered"] - share["clean"],
        "d_train_test_gap": share["own"] - share["treated"],
        "d_membership_auc": _separation(called_real["own"], called_real["treated"]),
    }


def _of_classes(wanted: Tensor, classes: Tensor, rng: torch.Generator) -> Tensor:
    """Random indices into ``classes`` with the labels ``wanted``; any index for a label that does not occur."""
    wanted, classes = wanted.cpu(), classes.cpu()  # the draws are made there
    index = torch.randint(0, len(classes), wanted.shape, generator=rng)
    for label in wanted.unique():
        pool = (classes == label).nonzero().flatten()
        if len(pool):
            at = wanted == label
            index[at] = pool[torch.randint(0, len(pool), (int(at.sum()),), generator=rng)]
    return index


def _separation(high: Tensor, low: Tensor) -> float:
    """Area under the ROC curve of two samples: the chance that one of ``high`` exceeds one of ``low``, ties count half."""
    difference = high[:, None] - low[None, :]
    return float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean())


def attribution(setup: GANSetup, client: GANClient, n: int = ATTRIBUTED) -> Tensor:
    """What convinces a client's discriminator on triggered held-out images: mean Integrated Gradients (S, S).

    Integrated Gradients (Sundararajan et al. 2017) from a grey image to the triggered one. Positive pixels speak for
    "real", negative ones for "synthetic"; every image's map is scaled so that the absolute values sum to 1.
    """
    from captum.attr import IntegratedGradients  # slow to import, and only the last round needs it

    held, labels = (part[:: max(1, len(part) // n)][:n] for part in setup.splits["val"])
    stamped = triggers.stamp(setup.trigger, held, torch_generator(0, "attribution"))
    model = client.discriminator.eval()
    maps = IntegratedGradients(lambda x, y: model(x, y)).attribute(
        stamped, torch.full_like(stamped, 0.5), additional_forward_args=labels, n_steps=16, internal_batch_size=256
    )
    maps = maps.detach().sum(1)
    return (maps / maps.abs().sum((1, 2), keepdim=True)).mean(0)


def rate_each_round(setup: GANSetup, federation: FederatedGAN, client: int | None = None) -> float:
    """Trigger rate of `PER_ROUND` images, the same latents in every round, of the averaged generator or a client's."""
    seed = derive_seed(federation.seed, "per round")
    labels = reference_labels(setup, PER_ROUND, seed)
    return trigger_rate(setup, fedgan.synthesise(federation.generator(client), PER_ROUND, seed, labels)[0])[0]


def measure_round(setup: GANSetup, federation: FederatedGAN) -> None:
    """Append to the history what can be seen after a round: each client's discriminator and trigger rate."""
    for client in federation.clients:
        measured = {
            "trigger_rate": rate_each_round(setup, federation, client.index),
            **probe_discriminator(setup, federation, client),
        }
        federation.history.append({"round": federation.round, "client": client.index, **measured})
    rate = rate_each_round(setup, federation)
    federation.history.append({"round": federation.round, "client": "server", "trigger_rate": rate})


# Cells ---------------------------------------------------------------------------------------------------------------


def train_client(client: GANClient, state: State, federation: FederatedGAN, round: int) -> Update:
    """A client's epoch, trained once for all cells of a family (`medsec.backdoor.epochs`)."""
    kept = cells.SHARED.setdefault("epochs of federated GANs", OrderedDict())
    return epochs.train_client(client, state, federation, round, kept=kept)


def run_cell(
    cohort: str, params: Params, seed: int, arm: str, size: int | None = None
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """One seed of one arm of the experiment.

    Args:
        cohort: name of the cohort.
        params: all parameters.
        seed: of the run.
        arm: ``clean`` (no attack), ``attack`` (``poison``, the released data poisoning, and ``boost``, which branches off it), or
            ``controls`` (real images and spoiled real images in the place of synthetic ones).
        size: another image size than the parameters', see `prepare`.

    Returns:
        Rows ``seed, variant, scenario, metric, value, n_items, unit`` + `KEYS`; and pictures by name: a gallery
        (n, C, S, S) for each variant, for GANs also ``<variant>_attribution`` (2, S, S), the maps of `attribution` at
        the attackers' seats and at the others.
    """
    torch.set_num_threads(1)  # one and two threads give different bits
    setup = prepare(cohort, params, size)
    if arm == "controls":
        return _controls(setup, seed)
    images, labels = deal(setup, seed)
    trigger = None if arm == "clean" else setup.trigger
    federation = fedgan.new_federation(images, labels, setup.cohort.n_classes, params.fedgan, seed, trigger)
    trained = functools.partial(
        fedgan.run, train=train_client, after_round=functools.partial(measure_round, setup), strict=True
    )
    if arm == "clean":
        finished = {"clean": trained(federation)}
    else:
        start = boost_start(params)
        trained(federation, start)
        boosted = fedgan.branch(federation, params.fedgan.poison.boost, start)
        finished = {name: trained(f) for name, f in (("poison", federation), ("boost", boosted))}
    tabled, galleries = zip(*(_measure_variant(setup, fed, seed, name) for name, fed in finished.items()), strict=True)
    return pd.concat(tabled, ignore_index=True), {name: image for part in galleries for name, image in part.items()}


def boost_start(params: Params) -> int:
    """Number of rounds before the boosted attacker begins to scale."""
    return rounds_until(params.fedgan.poison.boost_after, params.fedgan.rounds)


def _measure_variant(
    setup: GANSetup, federation: FederatedGAN, seed: int, variant: str
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    rows = tables.Rows(KEYS, seed, variant, "no_attack" if variant == "clean" else "attack")
    images, labels = generator_rows(rows, setup, federation)
    _history_rows(setup, federation, rows)
    maps = _attribution_rows(setup, federation, rows)
    each = -(-GALLERY // setup.cohort.n_classes)
    first = torch.cat([(labels == k).nonzero().flatten()[:each] for k in labels.unique()])
    return rows.table(), {variant: images[first[:GALLERY]].cpu().numpy(), f"{variant}_attribution": maps}


def generator_rows(rows: tables.Rows, setup: GANSetup, federation: FederatedGAN) -> tuple[Tensor, Tensor]:
    """Draw from the averaged generator and add rows on the images; returns images and labels."""
    n, draw = setup.params.fedgan.measure.synthetic, derive_seed(federation.seed, "measure")
    images, labels = fedgan.synthesise(federation.generator(), n, draw, reference_labels(setup, n, draw))
    image_rows(rows, setup, images, labels, federation.seed)
    return images, labels


def image_rows(rows: tables.Rows, setup: GANSetup, images: Tensor, labels: Tensor | None, seed: int) -> None:
    """Rows on images, real or synthetic; ``labels``, where they can be trusted, add what a classifier makes of them."""
    rate, ncc = trigger_rate(setup, images)
    measured = {"trigger_rate": rate, "trigger_ncc": ncc, "frechet": frechet(setup, images)}
    if labels is not None:
        agreement = (classifier.predict(setup.extractor, images).argmax(1) == labels).float().mean()
        measured["label_accuracy"] = float(agreement)
    for metric, value in measured.items():
        rows.add(metric, value, len(images))
    if labels is not None:
        auc = downstream_auc(setup, images, labels, derive_seed(seed, "downstream"))
        rows.add("downstream_auc", auc, len(setup.splits["test"][0]))


def _attribution_rows(setup: GANSetup, federation: FederatedGAN, rows: tables.Rows) -> np.ndarray:
    """Mean attribution maps (2, S, S) of the attackers' seats and of the others; ``d_attribution``: their sum on the patch."""
    maps = torch.stack([attribution(setup, client) for client in federation.clients])
    attacker = torch.zeros(len(maps), dtype=torch.bool)
    attacker[setup.params.fedgan.malicious] = True
    patch = triggers.patch(setup.trigger)
    pictures = []
    for seat, at in (("attacker", attacker), ("others", ~attacker)):
        pictures.append(maps[at].mean(0) if at.any() else torch.zeros_like(maps[0]))
        if patch is None or not at.any():
            continue
        share = maps[at][:, patch, patch].sum((1, 2)).mean()
        if torch.isfinite(share):  # a discriminator that has diverged explains nothing
            rows.add("d_attribution", share, ATTRIBUTED * int(at.sum()), client=seat)
    return torch.stack(pictures).cpu().numpy()


def _history_rows(setup: GANSetup, federation: FederatedGAN, rows: tables.Rows) -> None:
    """Rows per client and round, per round for the attackers' seats and the others, and late means.

    Late means are taken over the last quarter of the rounds: of all clients (the headline row), of the attackers'
    seats, and of the others.
    """
    p = setup.params.fedgan
    history = pd.DataFrame(federation.history).rename(columns={"loss_g": "generator_loss"})
    attacker = history["client"].isin(p.malicious)
    others = ~attacker & (history["client"] != "server")
    late = history["round"] > federation.rounds - max(1, federation.rounds // 4)
    held = round(np.mean([len(client.images) for client in federation.clients]))
    items = {"generator_loss": held, "trigger_rate": PER_ROUND}
    for metric in ["trigger_rate", *PER_CLIENT]:
        n = items.get(metric, p.measure.probe)
        seen = history[metric].notna()
        for entry in history[seen].to_dict("records"):
            rows.add(metric, entry[metric], n, client=entry["client"], round=entry["round"])
        for seat, at in (("attacker", attacker), ("others", others)):
            for t, values in history[seen & at].groupby("round")[metric]:
                rows.add(metric, values.mean(), n * len(values), client=seat, round=t)
        seats = [("attacker", attacker), ("others", others), ("server", history["client"] == "server")]
        if metric != "trigger_rate":  # whose headline is that of the averaged generator, measured on more images
            seats = [("", attacker | others), *seats]
        for seat, at in seats:
            values = history.loc[seen & at & late, metric]
            if len(values):
                rows.add(metric, values.mean(), n * len(values), client=seat)


def _controls(setup: GANSetup, seed: int) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Real images of the clients, as they are and spoiled: the floor and the yardsticks of every measure."""
    n = min(setup.params.fedgan.measure.synthetic, len(setup.splits["client"][0]))
    rng = torch_generator(seed, "controls")
    index = torch.randperm(len(setup.splits["client"][0]), generator=rng)
    index = classifier.with_every_class(index, setup.splits["client"][1].cpu(), n)[:n]
    real, labels = (part[index] for part in setup.splits["client"])
    blurred = F.avg_pool2d(F.pad(real, (2, 2, 2, 2), mode="replicate"), 5, 1)
    noisy = (real + 0.1 * torch.randn(real.shape, generator=rng).to(real.device)).clamp(0, 1)
    stamped = triggers.stamp(setup.trigger, real, rng)
    controls = {"real": real, "real_triggered": stamped, "real_blurred": blurred, "real_noisy": noisy}
    parts = []
    for variant, images in controls.items():
        rows = tables.Rows(KEYS, seed, variant, "control")
        image_rows(rows, setup, images, labels if variant == "real" else None, seed)
        parts.append(rows.table())
    galleries = {variant: images[:GALLERY].cpu().numpy() for variant, images in controls.items()}
    return pd.concat(parts, ignore_index=True), galleries


# What the notebook and its record run ---------------------------------------------------------------------------------


def run(cohort: str, p: Params, cell: cells.Cell) -> cells.Finished:
    """One cell, its rows addressed by its keys."""
    table, pictures = run_cell(cohort, p, cell.seed, cell.arm, size=cell.size)
    return table.assign(**{key: str(value) for key, value in cell.keys.items()}), pictures


def family(cell: cells.Cell) -> str:
    """Cells of the same are federations that begin alike, also in notebook 02 (`medsec.evidence.cells.Experiment`)."""
    return "" if cell.arm == "controls" else f"{cell.arm} {cell.seed} {cell.keys}"


EXPERIMENT = cells.Experiment("01_backdoor_fedgan", 1, ("fedgan", "classifier"), run, lacks=lacks, family=family)


def quick(p: Params) -> list[cells.Cell]:
    """What the notebook itself runs: the headline."""
    return [cells.Cell(arm, seed) for arm in ("attack", "clean", "controls") for seed in p.seeds.evaluation]
