"""The second GAN of notebook 01: one that draws. Only the record trains it.

The headline's networks learn little in 20 rounds. Here the same federation trains other networks (`medsec.backdoor.gan.RECIPES`)
for longer, with and without the same attacker, and is measured more closely: fidelity and diversity told apart, a detector that
forgives a trigger drawn a little beside its place, how strongly it is drawn, and whether a classifier that learns from these
images is harmed.
"""

import dataclasses
import functools

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.backdoor_fedgan import cells as plain
from experiments.backdoor_fedgan.cells import GANSetup
from experiments.params import Params
from medsec.backdoor import frechet, triggers
from medsec.backdoor import gan as fedgan
from medsec.backdoor.gan import FederatedGAN
from medsec.core.params import rounds_until
from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.settings import FedGANParams
from medsec.evidence import cells, tables
from medsec.nets import fit as classifier
from medsec.nets.models import SmallResNet

# Arm -> the variants that its cell measures. Those with "class" poison one class only.
ARMS = {
    "drawing_clean": ("drawn_clean",),
    "drawing_class": ("drawn_poison_class", "drawn_boost_class"),
    "drawing_attack": ("drawn_poison", "drawn_boost"),
    "drawing_controls": ("drawn_real", "drawn_blurred", "drawn_noisy", "drawn_headline"),
}
GALLERY = 32  # images kept of a variant


def federation(params: Params, label: int | None = None) -> FedGANParams:
    """Section ``fedgan`` with what ``drawing`` says otherwise; ``label``: the only class that is poisoned."""
    p, base = params.drawing, params.fedgan
    poison = base.poison.model_copy(update={"label": label, "boost": p.boost, "boost_after": p.boost_after})
    return base.model_copy(update={"rounds": p.rounds, "average": p.average, "gan": p.gan, "poison": poison})


def setup_of(cohort: str, params: Params, label: int | None = None) -> GANSetup:
    """The headline's instruments, with the parameters of the GAN that draws."""
    return plain.with_federation(cohort, params, federation(params, label))


def run(cohort: str, params: Params, cell: cells.Cell) -> cells.Finished:
    """One cell of the record; of an arm of `ARMS` rows as of `plain.run_cell`, and a gallery (n, C, S, S) for every variant."""
    if cell.arm not in ARMS:
        return plain.run(cohort, params, cell)
    torch.set_num_threads(1)
    if cell.arm == "drawing_controls":
        return _controls(cohort, params, cell.seed)
    setup = setup_of(cohort, params, params.drawing.label if cell.arm == "drawing_class" else None)
    trigger = None if cell.arm == "drawing_clean" else setup.trigger
    fed = fedgan.new_federation(
        *plain.deal(setup, cell.seed), setup.cohort.n_classes, setup.params.fedgan, cell.seed, trigger
    )
    p, trained = (
        setup.params.fedgan,
        functools.partial(fedgan.run, after_round=functools.partial(_rate, setup), strict=True),
    )
    if trigger is None:
        finished = [trained(fed)]
    else:
        start = rounds_until(p.poison.boost_after, p.rounds)
        trained(fed, start)
        boosted = fedgan.branch(fed, p.poison.boost, start)
        finished = [trained(fed), trained(boosted)]
    parts, pictures = [], {}
    for variant, each in zip(ARMS[cell.arm], finished, strict=True):
        rows = tables.Rows(plain.KEYS, cell.seed, variant, "no_attack" if trigger is None else "attack")
        pictures[variant] = federation_rows(rows, setup, each)
        parts.append(rows.table())
    return pd.concat(parts, ignore_index=True), pictures


# Measuring -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def tolerant_threshold(trigger: triggers.Trigger, public: Tensor, fpr: float, shift: int) -> float:
    return triggers.calibrate(trigger, public, fpr, shift=shift)


def tolerant_rate(setup: GANSetup, images: Tensor) -> float:
    """Share of images in which the trigger is found within ``drawing.shift`` pixels of its place."""
    shift = setup.params.drawing.shift
    fpr = setup.params.fedgan.measure.threshold_fpr
    threshold = tolerant_threshold(setup.trigger, setup.splits["public"][0], fpr, shift)
    return float((triggers.score(setup.trigger, images, shift) > threshold).float().mean())


def _rate(setup: GANSetup, fed: FederatedGAN) -> None:
    """After each of the last quarter of the rounds, the share of images of the poisoned class with the trigger."""
    if fed.round > fed.rounds - max(1, fed.rounds // 4):
        labels = torch.full((plain.PER_ROUND,), setup.params.drawing.label)
        drawn, _ = fedgan.synthesise(fed.generator(), len(labels), derive_seed(fed.seed, "per round"), labels)
        fed.history.append({"round": fed.round, "client": "server", "rate": tolerant_rate(setup, drawn)})


def fidelity(setup: GANSetup, images: Tensor, training: Tensor) -> dict[str, float]:
    """How near images are to the ``reference`` split, by measures that see different faults (`medsec.backdoor.frechet`).

    ``training``: the clients' images, which a generator might have copied.
    """
    drawn, seen, unseen = (_features(setup, part) for part in (images, training, setup.splits["val"][0]))
    precision, recall = frechet.precision_recall(setup.reference, drawn)
    return {
        "frechet": frechet.frechet_distance(drawn, setup.reference),
        "precision": precision,
        "recall": recall,
        "spectrum": frechet.spectrum_distance(setup.splits["reference"][0].cpu().numpy(), images.cpu().numpy()),
        "nearness": frechet.nearness(drawn, seen, unseen),
    }


def _features(setup: GANSetup, images: Tensor) -> np.ndarray:
    return classifier.features(setup.extractor, images).cpu().double().numpy() / setup.scale


def _image_rows(rows: tables.Rows, setup: GANSetup, images: Tensor, training: Tensor) -> None:
    for metric, value in fidelity(setup, images, training).items():
        rows.add(metric, value, len(images))


def federation_rows(rows: tables.Rows, setup: GANSetup, fed: FederatedGAN) -> np.ndarray:
    """Rows on the images of the averaged generator, and on what a classifier learns from them; returns a gallery.

    ``setup`` is that of `setup_of`. ``tolerant_rate_late`` is there where the rounds were measured.
    """
    n, draw, p = setup.params.fedgan.measure.synthetic, derive_seed(fed.seed, "measure"), setup.params.drawing
    images, labels = fedgan.synthesise(fed.generator(), n, draw, plain.reference_labels(setup, n, draw))
    _image_rows(rows, setup, images, torch.cat([client.images for client in fed.clients if not client.malicious]))
    agreement = classifier.predict(setup.extractor, images).argmax(1) == labels
    rows.add("label_accuracy", agreement.float().mean(), n)
    target = images[labels == p.label]
    rows.add("trigger_rate", plain.trigger_rate(setup, images)[0], n)
    rows.add("tolerant_rate", tolerant_rate(setup, images), n)
    rows.add("tolerant_rate_class", tolerant_rate(setup, target), len(target))
    if late := [entry["rate"] for entry in fed.history if "rate" in entry]:
        rows.add("tolerant_rate_late", np.mean(late), len(late) * plain.PER_ROUND)
    if triggers.patch(setup.trigger):  # at its exact place: little of one that is drawn beside it
        rows.add("trigger_amplitude", triggers.amplitude(setup.trigger, target).mean(), len(target))
    _harm_rows(rows, setup, images, labels, fed.seed)
    at = torch.cat([(labels == k).nonzero().flatten()[: GALLERY // setup.cohort.n_classes] for k in labels.unique()])
    return images[at].cpu().numpy()


def _harm_rows(rows: tables.Rows, setup: GANSetup, images: Tensor, labels: Tensor, seed: int) -> None:
    """What a classifier becomes that learns from synthetic images only, and from a few real ones besides.

    ``downstream_auc``: on the split ``test``. ``attack_success``: share of its images of other classes that are called the
    poisoned class once they carry the trigger. A classifier may do so without any attack: the clean federation's is the control.
    """
    p, test = setup.params, setup.splits["test"]
    others = test[0][test[1] != p.drawing.label]
    stamped = triggers.stamp(setup.trigger, others, torch_generator(0, "harm"))
    few, epochs = _with_few(setup, images, labels, seed), p.fedgan.measure.downstream_epochs
    # Twice as many images, half as many epochs: both classifiers take equally many steps.
    for suffix, (x, y), passes in (("", (images, labels), epochs), ("_few", few, max(1, epochs // 2))):
        model = classifier.fit(
            x,
            y,
            setup.cohort.n_classes,
            p.classifier,
            epochs=passes,
            seed=derive_seed(seed, "downstream"),
        )
        rows.add(f"downstream_auc{suffix}", plain.auc_on_test(setup, model), len(test[0]))
        fooled, before = (_called(model, part, p.drawing.label) for part in (stamped, others))
        rows.add(f"attack_success{suffix}", fooled, len(others))
        rows.add(f"attack_success_unstamped{suffix}", before, len(others))


def _called(model: SmallResNet, images: Tensor, label: int) -> float:
    return float((classifier.predict(model, images).argmax(1) == label).float().mean())


def _with_few(setup: GANSetup, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """As many real as synthetic images, the real ones repeated: ``drawing.real_per_class`` of each class of ``public``."""
    (real, y), most = setup.splits["public"], setup.params.drawing.real_per_class
    order = torch.randperm(len(y), generator=torch_generator(seed, "few"))
    index = torch.cat([order[y[order] == k][:most] for k in range(setup.cohort.n_classes)])
    again = index[torch.arange(len(images)) % len(index)]
    return torch.cat([images, real[again]]), torch.cat([labels, y[again]])


def _controls(cohort: str, params: Params, seed: int) -> cells.Finished:
    """The same measures on real images, spoiled ones, and the clean federation of the headline's GAN."""
    setup = plain.prepare(cohort, params)
    images, labels = plain.deal(setup, seed)
    everybody, n = setup.splits["client"][0], params.fedgan.measure.synthetic
    order = torch.randperm(len(everybody), generator=torch_generator(seed, "halves"))
    real, seen = (everybody[half] for half in order.chunk(2))  # nobody learns here: no image is its own nearest one
    real = real[:n]
    noise = 0.1 * torch.randn(real.shape, generator=torch_generator(seed, "noise"))
    blurred = F.avg_pool2d(F.pad(real, (2, 2, 2, 2), mode="replicate"), 5, 1)
    sets = {"drawn_real": real, "drawn_blurred": blurred, "drawn_noisy": (real + noise.to(real.device)).clamp(0, 1)}
    parts, pictures = [], {"drawn_real": real[:GALLERY].cpu().numpy()}
    for variant, drawn in sets.items():
        rows = tables.Rows(plain.KEYS, seed, variant, "control")
        _image_rows(rows, setup, drawn, seen)
        rows.add("tolerant_rate", tolerant_rate(setup, drawn), len(drawn))
        parts.append(rows.table())
    fed = fedgan.new_federation(images, labels, setup.cohort.n_classes, params.fedgan, seed)
    rows = tables.Rows(plain.KEYS, seed, "drawn_headline", "control")
    fedgan.run(fed, after_round=functools.partial(_rate, setup), strict=True)
    pictures["drawn_headline"] = federation_rows(rows, setup, fed)
    return pd.concat([*parts, rows.table()], ignore_index=True), pictures


# What the record runs: the notebook's cells, and those of the GAN that draws.
EXPERIMENT = dataclasses.replace(plain.EXPERIMENT, run=run, more=dict.fromkeys(ARMS, ("drawing",)))
