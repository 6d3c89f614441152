"""What notebook 05 measures: every defence of the three papers against every attack, on one federation of one classifier.

`rows_of` is one seed of one row: a federation without an attack, one for each way to plant a backdoor; gradient inversion in the
middle of the one without an attack, and evasion on the network that comes out of it. So one network answers to all papers.

Scenarios: ``no_attack``; ``backdoor``, a client that poisons a little and leaves out the defence that clients are to run;
``boost_liar``, which poisons all it can, scales its update and reports the loss that honest clients have; ``compliant``, which is
like ``backdoor`` and runs the clients' defence, as where the software is not the client's to change; ``naive`` and ``adaptive``,
gradient inversion by an attacker who does not know the defence, and by one who does; ``prior_only``, its floor: no gradient at
all; ``midway``: the network whose gradients these are; ``pgd20``, evasion; ``noise``, its control; ``constant``, what a network
has that always gives the same answer.

Metrics that are new here: ``attack_success``, of the test images of other classes that are called rightly, the share that the
trigger turns into the target class (without an attack: the control); ``called_target``, of the same images without a trigger
the share that is called the target class; ``<metric>_minus_none``, paired on the same seed and scenario;
``<metric>_minus_matched``, to the undefended network of the same seed after the number of rounds at which its AUC is nearest (a
network that has learnt less may give more away, whatever keeps it from learning); ``<metric>_minus_part``, of a stack to the
part of it that is made for that threat (`PARTS`). Differences of the PSNR count what lies below ``prior_only``, the floor, as
the floor.

Key column: ``round``, of gradient inversion: empty for gradients in the middle of the training (``matrix.leak_after``), a number
for those after so many rounds (of ``none`` only), ``network`` for those of plain images on a network that is trained on
adversarial ones.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from experiments.adversarial_pruning_defense import arms as evasion_arms
from experiments.adversarial_pruning_defense import cells as evasion_eval
from experiments.gia_defense import adaptive as attackers
from experiments.gia_defense import cells as inversion_eval
from experiments.gia_defense import clients as inversion_clients
from experiments.gia_defense.adaptive import Case
from experiments.gia_defense.clients import Client, Setup
from experiments.params import Params
from experiments.threat_matrix import arms as matrix_arms
from experiments.threat_matrix import federation as matrix_federation
from experiments.threat_matrix.arms import ROWS, Row
from experiments.threat_matrix.federation import ATTACKER, ATTACKS, Federation
from medsec.backdoor import triggers
from medsec.core.seeds import derive_seed, torch_generator
from medsec.evasion import pruning
from medsec.evidence import tables
from medsec.evidence.cells import Cell, Experiment, Finished
from medsec.inversion import defences as gradient_defences
from medsec.inversion.adaptive import known_entries
from medsec.inversion.attacks import Reconstructions
from medsec.nets import fit as classifier

KEYS = ("round",)
NETWORK = "network"
VICTIM = 1  # the client whose images are attacked; number 0 is the one that may be malicious
LIKENESS = ("psnr", "ssim", "retrieval", "retrieval_projected")
UNITS = {
    "auc": "AUC",
    "balanced_accuracy": "share",
    "attack_success": "share",
    "called_target": "share",
    "weight": "share",
    "weight_lost": "share",
    "sparsity": "share",
    "psnr": "dB",
    "ssim": "similarity",
    "retrieval": "share",
    "retrieval_projected": "share",
    "failed": "share",
    "accuracy": "share",
    "dr_whitebox": "share",
}


@dataclass(frozen=True)
class Column:
    """A column of the matrix.

    Attributes:
        threat: the group that it belongs to.
        name: what it shows, in a few words.
        scenario, metric: where it stands in the table; the key column is empty.
        scale: the value that is drawn lightest (best for whoever defends; of the PSNR it is the floor) and the one that is drawn
            darkest.
        beats_constant: it counts as better than no defence only above what a network has that always gives the same answer
            (scenario ``constant`` of ``none``).
    """

    threat: str
    name: str
    scenario: str
    metric: str
    scale: tuple[float, float]
    beats_constant: bool = False

    @property
    def high_is_bad(self) -> bool:
        return self.scale[1] > self.scale[0]


COLUMNS = (
    Column("nobody attacks", "AUC", "no_attack", "auc", (1.0, 0.5)),
    Column("nobody attacks", "balanced accuracy", "no_attack", "balanced_accuracy", (1.0, 0.5)),
    Column("backdoored client: success", "poisons a little", "backdoor", "attack_success", (0.0, 1.0)),
    Column("backdoored client: success", "much, boosts, lies", "boost_liar", "attack_success", (0.0, 1.0)),
    Column("backdoored client: success", "a little, complies", "compliant", "attack_success", (0.0, 1.0)),
    Column("gradient inversion", "PSNR (dB)", "adaptive", "psnr", (10.0, 25.0)),
    Column("gradient inversion", "identified", "adaptive", "retrieval", (0.0, 1.0)),
    Column("evasion", "balanced accuracy", "pgd20", "balanced_accuracy", (1.0, 0.5), beats_constant=True),
)
PARTS = {  # stack -> scenario -> the part of it that is made for that threat
    "feddetect+shadow": {"boost_liar": "feddetect_hardened", "adaptive": "shadow_hardened"},
    "shadow+at": {"adaptive": "shadow_hardened", "pgd20": "at"},
    "feddetect+shadow+at": {"boost_liar": "feddetect_hardened", "adaptive": "shadow_hardened", "pgd20": "at"},
}
NOTHING_TO_RUN = "clients have no defence to run or to leave out: the same as the malicious client that does not comply"


def missing(variant: str, scenario: str) -> str | None:
    """Why a row has no such cell; None if it has one.

    Raises:
        InputError: no such row.
    """
    row = matrix_arms.row(variant)
    if scenario == "compliant" and row == matrix_arms.undefended(row):
        return NOTHING_TO_RUN
    return None


# One row -------------------------------------------------------------------------------------------------------------


def rows_of(cohort: str, params: Params, variants: str | Sequence[str], seed: int) -> pd.DataFrame:
    """One seed of one row of the matrix under every attack; or of several rows, one after the other.

    Returns:
        Rows with the key column `KEYS`.

    Raises:
        InputError: no such row, or a cohort that cannot be loaded or has too few images.
    """
    torch.set_num_threads(1)
    names = (variants,) if isinstance(variants, str) else variants
    for name in names:
        matrix_arms.row(name)  # a wrong name is told before anything is trained
    setup = matrix_arms.prepare(cohort, params)
    return pd.concat([_row(setup, name, seed) for name in names], ignore_index=True)


def _row(setup: Setup, variant: str, seed: int) -> pd.DataFrame:
    row, params = matrix_arms.row(variant), setup.params
    done = {
        scenario: matrix_federation.train(setup, row, scenario, params.matrix, seed)
        for scenario in ATTACKS
        if missing(variant, scenario) is None
    }
    parts = [_federation_rows(setup, variant, scenario, found, seed) for scenario, found in done.items()]
    clean = done["no_attack"]
    parts += [_inversion_rows(setup, variant, row, clean, seed), _evasion_rows(setup, variant, clean, seed)]
    return pd.concat(parts, ignore_index=True)


def _federation_rows(setup: Setup, variant: str, scenario: str, done: Federation, seed: int) -> pd.DataFrame:
    """What came out of one federation: how good its classifier is, what the trigger does, and who counted how much."""
    x, y = setup.splits["test"]
    rows = tables.Rows(KEYS, UNITS, seed, variant, scenario)
    found = classifier.predict(done.model, x)
    rows.add("auc", classifier.auc(found, y), len(y))
    rows.add("balanced_accuracy", classifier.balanced_accuracy(found, y), len(y))
    rows.add("sparsity", pruning.sparsity(done.model), 1)
    for metric, (value, n) in backdoor(setup, done.model).items():
        rows.add(metric, value, n)
    m, warm_up = len(done.perturbations), matrix_arms.first_round(setup.params.matrix.warm_up, len(done.diagnostics))
    weights = pd.DataFrame([d.get("weights", {}) for d in done.diagnostics[warm_up:]]).reindex(columns=range(m))
    weights = weights.fillna(0.0).to_numpy()
    honest = weights if scenario == "no_attack" else np.delete(weights, ATTACKER, axis=1)
    rows.add("weight_lost", (1 - m * honest).clip(min=0).mean(), honest.size)
    if scenario != "no_attack":
        rows.add("weight", weights[:, ATTACKER].mean(), len(weights))
    return rows.table()


def backdoor(setup: Setup, model: nn.Module) -> dict[str, tuple[float, int]]:
    """``attack_success`` and ``called_target`` on the test images of other classes, each with its number of images.

    Without an image that is called rightly there is nothing to turn, and no ``attack_success``.
    """
    (x, y), target = setup.splits["test"], setup.params.matrix.target
    x, y = x[y != target], y[y != target]
    stamped = triggers.stamp(matrix_federation.new_trigger(setup), x, torch_generator(0, "trigger places"))
    plain, turned = (classifier.predict(model, images).argmax(1) for images in (x, stamped))
    right, found = plain == y, {"called_target": (float((plain == target).float().mean()), len(y))}
    if right.any():
        found["attack_success"] = (float((turned[right] == target).float().mean()), int(right.sum()))
    return found


# Gradient inversion --------------------------------------------------------------------------------------------------


def _inversion_rows(setup: Setup, variant: str, row: Row, clean: Federation, seed: int) -> pd.DataFrame:
    """The victims' gradients in the middle of the training; where the module says, also in other conditions."""
    middle = matrix_arms.first_round(setup.params.matrix.leak_after, len(clean.diagnostics))
    perturb = clean.perturbations[VICTIM]
    plan = [("", middle, row, perturb)]
    if row == ROWS["none"]:  # what a network gives away that has learnt less
        plan += [(str(round), round, row, perturb) for round in range(middle)]
    if row.trained_against and row.images == "none":
        plain = dataclasses.replace(row, trained_against=False)
        plan.append((NETWORK, middle, plain, _perturbation(setup, plain, seed)))
    model, (x, y), parts = matrix_arms.network(setup, row, seed), setup.splits["test"], []
    for key, round, used, change in plan:
        model.load_state_dict(clean.states[round])
        answers = {("midway", "auc"): (classifier.auc(classifier.predict(model, x), y), len(y))}
        answers |= _inverted(setup, used, model, change, clean.keep, round, seed)
        for (scenario, metric), (value, n) in answers.items():
            rows = tables.Rows(KEYS, UNITS, seed, variant, scenario)
            rows.add(metric, value, n, round=key)
            parts.append(rows.table())
    return pd.concat(parts, ignore_index=True)


def _perturbation(setup: Setup, row: Row, seed: int) -> Callable | None:
    """A fresh client's, the one whose images are attacked."""
    images, labels = inversion_clients.deal(setup, seed)
    return matrix_arms.perturbation(setup, row, images[VICTIM], labels[VICTIM], derive_seed(seed, "client", VICTIM))


def _inverted(
    setup: Setup,
    row: Row,
    model: nn.Module,
    perturb: Callable | None,
    keep: pruning.Masks | None,
    round: int,
    seed: int,
) -> dict[tuple[str, str], tuple[float, int]]:
    """(scenario, metric) -> mean over the victims and their number, of the strongest attack for every victim."""
    images, labels = (
        [part[VICTIM], *part[:VICTIM], *part[VICTIM + 1 :]] for part in inversion_clients.deal(setup, seed)
    )
    index = attackers.victims(setup, images[0], setup.params.matrix.victims, 1, seed)
    x, y = images[0][index], labels[0][index]
    found = sent(row, model, perturb, keep, x, y, round)
    plain = attackers.naive(setup, found, ["ig"], seed)
    everything = plain | known(setup, row, found, seed)
    measure = inversion_eval.measures(setup, images, labels, index)
    scores, answers = inversion_eval.scored(everything, measure, x.numpy()), {}
    for scenario, names in (("naive", list(plain)), ("adaptive", list(everything))):
        best = inversion_eval.strongest({name: scores[name] for name in names})
        values = {m: inversion_eval.chosen(best, [scores[name][m] for name in names]) for m in LIKENESS}
        there = ~np.isnan(values["psnr"])
        answers[scenario, "failed"] = float(1 - there.mean()), len(there)
        for metric in LIKENESS if there.any() else ():
            answers[scenario, metric] = float(values[metric][there].mean()), int(there.sum())
    floor = measure(attackers.floor(setup, y).numpy(), x.numpy())
    return answers | {("prior_only", m): (float(floor[m].mean()), len(x)) for m in LIKENESS}


def sent(
    row: Row,
    model: nn.Module,
    perturb: Callable | None,
    keep: pruning.Masks | None,
    x: Tensor,
    y: Tensor,
    round: int,
) -> Case:
    """What the server has of some victims: the gradient at the images that the client uses, 0 at weights that are pruned.

    ``changed`` of the case is only set where a defence of paper 2 changes images: that is what its attackers undo.
    """
    send = gradient_defences.none if perturb is None else gradient_defences.send(perturb)
    found = attackers.case(Client(send, perturb), model, x, y, round)
    if row.images == "none":
        found = dataclasses.replace(found, changed=None)
    if keep is None:
        return found
    named = zip((name for name, _ in model.named_parameters()), found.view.gradients, strict=True)
    gradients = [g * keep[name] if name in keep else g for name, g in named]
    return dataclasses.replace(found, view=dataclasses.replace(found.view, gradients=gradients))


def known(setup: Setup, row: Row, found: Case, seed: int) -> dict[str, Reconstructions]:
    """What an attacker who knows the defence does besides: notebook 03's attackers, and leaving out weights that are pruned."""
    wanted = ["purified", "unmasked", *(["generator"] if row.images in inversion_clients.STAND_INS else [])]
    more = attackers.adaptive(row.images, setup, found, [], wanted, seed)
    if row.prune != "no":
        view = dataclasses.replace(found.view, weights=known_entries(found.view))
        more["known"] = attackers.invert(setup, view, found, "ig", seed)
    return more


# Evasion -------------------------------------------------------------------------------------------------------------


def _evasion_rows(setup: Setup, variant: str, clean: Federation, seed: int) -> pd.DataFrame:
    """The network that came out without an attack, under PGD that knows it, and under noise as strong as that: the control."""
    everything = setup.params.model_copy(
        update={"evasion": setup.params.evasion.model_copy(update={"test_images": None})}
    )
    order = evasion_arms.test_order(everything, len(setup.splits["test"][0]))[: setup.params.matrix.test_images]
    x, y = (part[order] for part in setup.splits["test"])
    right = classifier.predict(clean.model, x).argmax(1) == y
    parts = []
    for scenario in ("noise", "pgd20"):
        made = evasion_eval.craft(
            scenario, clean.model, x, y, setup.params.evasion.eps / 255, setup.params.evasion.attacks, seed
        )
        found = classifier.predict(clean.model, made)
        rows = tables.Rows(KEYS, UNITS, seed, variant, scenario)
        rows.add("accuracy", float((found.argmax(1) == y).float().mean()), len(y))
        rows.add("balanced_accuracy", classifier.balanced_accuracy(found, y), len(y))
        if right.any():
            rows.add("dr_whitebox", float((found.argmax(1) == y)[right].float().mean()), int(right.sum()))
        parts.append(rows.table())
    if variant == "none":
        rows = tables.Rows(KEYS, UNITS, seed, variant, "constant")
        rows.add("balanced_accuracy", 1 / len(set(y.tolist())), len(y))
        parts.append(rows.table())
    return pd.concat(parts, ignore_index=True)


# Tables --------------------------------------------------------------------------------------------------------------


def complete(runs: pd.DataFrame) -> pd.DataFrame:
    """A runs table with paired differences on the same seed: ``_minus_none``, for stacks ``_minus_part``, and to controls.

    ``attack_success_minus_control``: to the same row without an attack, what the trigger does to a network nobody poisoned.
    ``balanced_accuracy_minus_noise``: of PGD to noise as strong, of the same row.
    """
    compared = runs[runs["metric"].isin(["auc", "balanced_accuracy", "attack_success", "psnr", "retrieval"])]
    compared = _not_below_floor(compared[compared["scenario"] != "prior_only"], runs)
    defended = compared[compared["variant"] != "none"]
    base = compared[(compared["variant"] == "none") & (compared["round"] != NETWORK)]
    network = base[base["round"] == ""].assign(round=NETWORK)  # robust and plain network, images as they are
    parts = [
        tables.minus(defended, pd.concat([base, network]), ["scenario", "round"], "none"),
        _minus_matched(compared),
    ]
    success = compared[compared["metric"] == "attack_success"]
    quiet = success["scenario"] == "no_attack"
    parts.append(tables.minus(success[~quiet], success[quiet], ["variant"], "control"))
    noise, hit = (compared[compared["scenario"] == name] for name in ("noise", "pgd20"))
    parts.append(tables.minus(hit, noise, ["variant"], "noise"))
    # A compliant attacker does what only rows with a clients' defence have: beside ``none``, it is the plain one.
    plain = base[base["scenario"] == "backdoor"].assign(scenario="compliant")
    parts.append(tables.minus(defended, plain, ["scenario", "round"], "none"))
    for stack, by_scenario in PARTS.items():
        for scenario, part in by_scenario.items():
            mine, other = (
                compared[(compared["variant"] == v) & (compared["scenario"] == scenario)] for v in (stack, part)
            )
            parts.append(tables.minus(mine, other, ["scenario", "round"], "part"))
    return pd.concat([runs, *parts], ignore_index=True)


def _not_below_floor(compared: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """PSNR below that of ``prior_only`` on the same seed counts as that: an attacker who has less can send the mean image in."""
    guess = runs[(runs["scenario"] == "prior_only") & (runs["metric"] == "psnr")]
    least = compared["seed"].map(guess.groupby("seed")["value"].first()).where(compared["metric"] == "psnr", -np.inf)
    return compared.assign(value=compared["value"].clip(lower=least))


def _minus_matched(compared: pd.DataFrame) -> pd.DataFrame:
    """Gradient inversion of every row less that of the undefended network that has learnt as much; see the module."""
    learnt = compared[compared["scenario"] == "midway"]
    undefended = learnt[learnt["variant"] == "none"].set_index(["seed", "round"])["value"]
    found = compared[compared["scenario"].isin(["naive", "adaptive"]) & (compared["round"] == "")]
    none = compared[compared["variant"] == "none"].set_index(["seed", "scenario", "metric", "round"])["value"]
    own = learnt[learnt["round"] == ""].set_index(["seed", "variant"])["value"]
    nearest = {pair: (undefended[pair[0]] - value).abs().idxmin() for pair, value in own.items()}
    found = found[found["variant"] != "none"].copy()
    found["value"] -= [
        none[seed, scenario, metric, nearest[seed, variant]]
        for seed, variant, scenario, metric in zip(
            found["seed"], found["variant"], found["scenario"], found["metric"], strict=True
        )
    ]
    return found.assign(metric=found["metric"] + "_minus_matched")


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """The summary of a runs table, after `complete`."""
    return tables.summarise(complete(runs), KEYS)


def run(cohort: str, p: Params, cell: Cell) -> Finished:
    """One cell: one or several rows of the matrix."""
    return rows_of(cohort, p, cell.variants, cell.seed), {}


SECTIONS = ("fedgan", "feddetect", "inversion", "evasion", "matrix")
EXPERIMENT = Experiment(
    "05_threat_matrix",
    1,
    SECTIONS,
    run,
    own=("inversion.defences",),
    shared=tuple({row.images: None for row in ROWS.values()}),
)


def quick(p: Params) -> list[Cell]:
    """Every cell of the matrix, the dearest first.

    Rows that begin alike are in one cell: local epochs that they have in common are then done once (`matrix_federation`).
    """
    alike: dict[tuple, list[str]] = {}
    for name, row in ROWS.items():
        alike.setdefault((row.images, row.trained_against, row.cbam, row.again), []).append(name)
    dear = sorted(alike.values(), key=lambda names: -sum(_cost(ROWS[name]) for name in names))
    return [Cell("rows", seed, group=names[0], variants=tuple(names)) for names in dear for seed in p.seeds.evaluation]


def _cost(row: Row) -> int:
    described = row.images in ("shadow_released", "shadow_described")
    return 1 + 4 * described + 2 * row.cbam + row.trained_against + (row.images != "none")
