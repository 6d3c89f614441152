"""What notebook 05 measures: every defence of the three papers against every attack, on one federation of one classifier.

Each row of the matrix is a federation without an attack, and one for each way to plant a backdoor. Gradient inversion takes the
network in the middle of the training without an attack, evasion the one at its end. So one network answers to all papers.

Scenarios: ``no_attack``; ``backdoor``, a client poisons a little and leaves out the defence that clients are to run;
``boost_liar``, it poisons all it can, scales its update and reports the honest clients' loss; ``compliant``, like ``backdoor``,
but it runs the defence, as where it cannot change the software. Gradient inversion: ``naive``, the attacker does not know the
defence; ``adaptive``, it does; ``prior_only``, the floor without any gradient; ``midway``, the network that is attacked.
Evasion: ``pgd20``; ``noise``, its control; ``constant``, a network that always gives the same answer.

New metrics, of which a PSNR under ``prior_only`` counts as ``prior_only`` in all differences:

* ``attack_success``: of the test images of other classes that are classified correctly, the share that the trigger turns into
  the target class. ``called_target``: the share of the same images that is called the target class without a trigger.
* ``<metric>_minus_none``: difference to no defence, same seed and scenario.
* ``<metric>_minus_matched``: difference to the undefended network of the same seed after the number of rounds at which its AUC
  is nearest to the row's. A network that has learnt less may reveal more, whatever keeps it from learning.
* ``<metric>_minus_part``: difference of a stack to the part of it that is made for the threat (`PARTS`).

Key column ``round``, of gradient inversion: empty for gradients in the middle of the training (``matrix.leak_after``), a number
after so many rounds (``none`` only), ``network`` for unchanged images on an adversarially trained network.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from experiments.adversarial_pruning_defense.arms import test_order
from experiments.gia_defense import adaptive as attackers
from experiments.gia_defense import cells as inversion_eval
from experiments.gia_defense import clients as inversion_clients
from experiments.gia_defense.adaptive import Case
from experiments.gia_defense.clients import Client, Setup
from experiments.params import Params
from experiments.threat_matrix import arms, federation
from experiments.threat_matrix.arms import ROWS, Row
from experiments.threat_matrix.federation import ATTACKER, ATTACKS, Federation
from medsec import data
from medsec.backdoor import triggers
from medsec.core.params import rounds_until
from medsec.core.seeds import torch_generator
from medsec.evasion import pruning
from medsec.evasion.scenarios import craft
from medsec.evidence import tables
from medsec.evidence.cells import Cell, Experiment, Finished
from medsec.inversion import defences as gradient_defences
from medsec.inversion.adaptive import known_entries
from medsec.inversion.attacks import Reconstructions
from medsec.nets import fit as classifier

Answers = dict[tuple[str, str], tuple[float, int]]  # (scenario, metric) -> value, and on how many items it rests
KEYS = ("round",)
NETWORK = "network"
MOSTLY = 0.5  # share of zeros in a gradient from which on its entries count as left out
VICTIM = 1  # the client whose images are attacked; client 0 is the one that may be malicious
LIKENESS = ("psnr", "ssim", "retrieval", "retrieval_projected")
COMPARED = ("auc", "balanced_accuracy", "attack_success", "psnr", "retrieval")  # metrics with differences
SHARES = (
    "balanced_accuracy",
    "attack_success",
    "called_target",
    "weight",
    "weight_lost",
    "sparsity",
    "failed",
    "accuracy",
)


@dataclass(frozen=True)
class Column:
    """A column of the matrix.

    Attributes:
        threat: the group of columns.
        name: in a few words.
        scenario, metric: its place in the table; the key column is empty.
        scale: the best value for the defender (drawn lightest; for PSNR it is replaced by the floor) and the worst (darkest).
        beats_constant: a cell counts as better than no defence only above scenario ``constant`` of ``none``.
        decides: it is what somebody who chooses a defence asks, and is in the figure.
        works: scenario and metric of ``none`` that show whether there is anything to stop; None where nobody attacks.
    """

    threat: str
    name: str
    scenario: str
    metric: str
    scale: tuple[float, float]
    beats_constant: bool = False
    decides: bool = False
    works: tuple[str, str] | None = None

    @property
    def high_is_bad(self) -> bool:
        return self.scale[1] > self.scale[0]

    @property
    def label(self) -> str:
        return f"{self.threat.split(':')[0]}: {self.name}"


LITTLE, MUCH = (("backdoor", "attack_success_minus_control"), ("boost_liar", "attack_success_minus_control"))
COLUMNS = (
    Column("nobody attacks", "AUC", "no_attack", "auc", (1.0, 0.5), decides=True),
    Column("nobody attacks", "balanced accuracy", "no_attack", "balanced_accuracy", (1.0, 0.5)),
    Column("backdoored client: success", "poisons a little", "backdoor", "attack_success", (0.0, 1.0), works=LITTLE),
    Column(
        "backdoored client: success",
        "much, boosts, lies",
        "boost_liar",
        "attack_success",
        (0.0, 1.0),
        decides=True,
        works=MUCH,
    ),
    Column("backdoored client: success", "a little, complies", "compliant", "attack_success", (0.0, 1.0), works=LITTLE),
    Column("gradient inversion", "PSNR (dB)", "adaptive", "psnr", (10.0, 25.0)),
    Column(
        "gradient inversion",
        "identified in a picture",
        "adaptive",
        "retrieval",
        (0.0, 1.0),
        decides=True,
        works=("adaptive", "retrieval"),
    ),
    Column(
        "evasion",
        "balanced accuracy",
        "pgd20",
        "balanced_accuracy",
        (1.0, 0.5),
        beats_constant=True,
        decides=True,
        works=("pgd20", "balanced_accuracy_minus_noise"),
    ),
)
PARTS = {  # stack -> scenario -> the part of it that is made for that threat
    "feddetect+shadow": {"boost_liar": "feddetect_hardened", "adaptive": "shadow_hardened"},
    "shadow+at": {"adaptive": "shadow_hardened", "pgd20": "at"},
    "feddetect+shadow+at": {"boost_liar": "feddetect_hardened", "adaptive": "shadow_hardened", "pgd20": "at"},
    "multi_krum+public+at": {"boost_liar": "multi_krum", "adaptive": "public_only", "pgd20": "at"},
}
NOTHING_TO_RUN = "clients have no defence to run or to leave out: the same as the malicious client that does not comply"


def missing(variant: str, scenario: str) -> str | None:
    """Why a row has no such cell; None if it has one.

    Raises:
        InputError: no such row.
    """
    row = arms.row(variant)
    return NOTHING_TO_RUN if scenario == "compliant" and row == arms.undefended(row) else None


# One row -------------------------------------------------------------------------------------------------------------


def rows_of(cohort: str, params: Params, variants: str | tuple[str, ...], seed: int) -> pd.DataFrame:
    """One seed of one or several rows of the matrix under every attack, with the key column `KEYS`.

    Raises:
        InputError: no such row, or a cohort that cannot be loaded or has too few images.
    """
    torch.set_num_threads(1)
    names = (variants,) if isinstance(variants, str) else variants
    rows = {name: arms.row(name) for name in names}  # a wrong name is reported before any training
    setup, memo, lines = arms.prepare(cohort, params), {}, []
    for name, row in rows.items():
        done = {
            scenario: federation.train(setup, row, scenario, setup.params.matrix, seed, memo)
            for scenario in ATTACKS
            if missing(name, scenario) is None
        }
        answers = [("", _federation(setup, scenario, trained)) for scenario, trained in done.items()]
        answers += _inversion(setup, row, done["no_attack"], seed)
        answers.append(("", _evasion(setup, row, done["no_attack"].model, seed)))
        lines += [
            tables.run_row(KEYS, seed, name, scenario, metric, value, n, round=key)
            for key, part in answers
            for (scenario, metric), (value, n) in part.items()
        ]
    return pd.DataFrame(lines)


def _federation(setup: Setup, scenario: str, done: Federation) -> Answers:
    """How good the classifier of a federation is, what the trigger does to it, and how much each client counted."""
    x, y = setup.splits["test"]
    predicted = classifier.predict(done.model, x)
    answers = {
        "auc": (classifier.auc(predicted, y), len(y)),
        "balanced_accuracy": (classifier.balanced_accuracy(predicted, y), len(y)),
        "sparsity": (pruning.sparsity(done.model), 1),
        **backdoor(setup, done.model),
        **_weights(setup, scenario, done),
    }
    return {(scenario, metric): answer for metric, answer in answers.items()}


def _weights(setup: Setup, scenario: str, done: Federation) -> dict[str, tuple[float, int]]:
    """What clients counted after the warm-up; nothing for a server that weighs no clients, such as a median."""
    m, warm_up = len(done.perturbations), rounds_until(setup.params.matrix.warm_up, len(done.diagnostics))
    named = [d["weights"] for d in done.diagnostics[warm_up:] if "weights" in d]
    if not named:
        return {}
    weights = pd.DataFrame(named).reindex(columns=range(m)).fillna(0.0).to_numpy()
    honest = weights if scenario == "no_attack" else np.delete(weights, ATTACKER, axis=1)
    lost = {"weight_lost": ((1 - m * honest).clip(min=0).mean(), honest.size)}
    return lost if scenario == "no_attack" else lost | {"weight": (weights[:, ATTACKER].mean(), len(weights))}


def backdoor(setup: Setup, model: nn.Module) -> dict[str, tuple[float, int]]:
    """``attack_success`` and ``called_target`` on the test images of other classes, each with its number of images.

    There is no ``attack_success`` if no image is classified correctly.
    """
    (x, y), target = setup.splits["test"], setup.params.matrix.target
    x, y = x[y != target], y[y != target]
    stamped = triggers.stamp(federation.new_trigger(setup), x, torch_generator(0, "trigger places"))
    plain, turned = (classifier.predict(model, images).argmax(1) for images in (x, stamped))
    right, rates = plain == y, {"called_target": (float((plain == target).float().mean()), len(y))}
    if right.any():
        rates["attack_success"] = (float((turned[right] == target).float().mean()), int(right.sum()))
    return rates


# Gradient inversion --------------------------------------------------------------------------------------------------


def _inversion(setup: Setup, row: Row, clean: Federation, seed: int) -> list[tuple[str, Answers]]:
    """By key: the victims' gradients in the middle of the training, and in the other conditions of the key column."""
    middle = rounds_until(setup.params.matrix.leak_after, len(clean.diagnostics))
    perturb, defend = clean.perturbations[VICTIM], clean.defences[VICTIM]
    plan = [("", middle, row, perturb)]
    if row == ROWS["none"]:  # what a network reveals that has learnt less
        plan += [(str(round_idx), round_idx, row, perturb) for round_idx in range(middle)]
    if row.trained_against and row.images == "none":
        plan.append((NETWORK, middle, dataclasses.replace(row, trained_against=False), None))
    model, (x, y), answers = arms.network(setup, row, seed), setup.splits["test"], []
    for key, round_idx, used, change in plan:
        model.load_state_dict(clean.states[round_idx])
        learnt: Answers = {("midway", "auc"): (classifier.auc(classifier.predict(model, x), y), len(y))}
        answers.append((key, learnt | _inverted(setup, used, model, change, clean.keep, round_idx, seed, defend)))
    return answers


def _inverted(
    setup: Setup,
    row: Row,
    model: nn.Module,
    perturb: Callable | None,
    keep: pruning.Masks | None,
    round_idx: int,
    seed: int,
    defend: Callable | None = None,
) -> Answers:
    """Means over the victims, each under the attack that is strongest for it."""
    images, labels = (
        [part[VICTIM], *part[:VICTIM], *part[VICTIM + 1 :]] for part in inversion_clients.deal(setup, seed)
    )
    index = attackers.victims(setup, images[0], setup.params.matrix.victims, 1, seed)
    x, y = images[0][index], labels[0][index]
    case = sent(row, model, perturb, keep, x, y, round_idx, defend)
    plain = attackers.naive(setup, case, ["ig"], seed)
    everything = plain | known(setup, row, case, seed)
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
    round_idx: int,
    defend: Callable | None = None,
) -> Case:
    """What the server has of some victims: the gradient at the images that the client uses, 0 at pruned weights.

    ``changed`` of the case is set only if a defence of paper 2 changes images, because that is what its attackers undo.
    """
    send = defend or (gradient_defences.none if perturb is None else gradient_defences.send(perturb))
    case = attackers.case(Client(send, perturb), model, x, y, round_idx)
    if row.images == "none":
        case = dataclasses.replace(case, changed=None)
    if keep is None:
        return case
    named = zip((name for name, _ in model.named_parameters()), case.view.gradients, strict=True)
    gradients = [g * keep[name] if name in keep else g for name, g in named]
    return dataclasses.replace(case, view=dataclasses.replace(case.view, gradients=gradients))


def known(setup: Setup, row: Row, case: Case, seed: int) -> dict[str, Reconstructions]:
    """The additional attacks of somebody who knows the defence: those of notebook 03, and one that ignores pruned weights."""
    if row.gradient != "none":
        more = attackers.adaptive(row.gradient, setup, case, [], ["known", "smoother"], seed)
        zeros = torch.cat([(g == 0).flatten() for g in case.view.gradients]).float().mean()
        if zeros > MOSTLY and "known" not in more:
            view = dataclasses.replace(case.view, weights=known_entries(case.view))
            more["known"] = attackers.invert(setup, view, case, "ig", seed)
        return more
    wanted = ["purified", "unmasked", *(["generator"] if row.images in inversion_clients.STAND_INS else [])]
    more = attackers.adaptive(row.images, setup, case, [], wanted, seed)
    if row.prune != "no":
        view = dataclasses.replace(case.view, weights=known_entries(case.view))
        more["known"] = attackers.invert(setup, view, case, "ig", seed)
    return more


# Evasion -------------------------------------------------------------------------------------------------------------


def _evasion(setup: Setup, row: Row, model: nn.Module, seed: int) -> Answers:
    """The final network without an attack on the federation, under white-box PGD, and under noise as strong (control)."""
    p = setup.params.evasion
    fewer = p.model_copy(update={"test_images": setup.params.matrix.test_images})
    x, y = setup.splits["test"]
    order = test_order(setup.params.model_copy(update={"evasion": fewer}), y)
    x, y = x[order], y[order]
    right = classifier.predict(model, x).argmax(1) == y
    answers: Answers = {}
    for scenario in ("noise", "pgd20"):
        made = craft(scenario, model, x, y, p.eps / 255, p.attacks, seed)
        predicted = classifier.predict(model, made)
        still = (predicted.argmax(1) == y).float()
        answers[scenario, "accuracy"] = float(still.mean()), len(y)
        answers[scenario, "balanced_accuracy"] = classifier.balanced_accuracy(predicted, y), len(y)
        if right.any():
            answers[scenario, "dr_whitebox"] = float(still[right].mean()), int(right.sum())
    if row == ROWS["none"]:
        answers["constant", "balanced_accuracy"] = 1 / len(set(y.tolist())), len(y)
    return answers


# Tables --------------------------------------------------------------------------------------------------------------


def with_differences(runs: pd.DataFrame) -> pd.DataFrame:
    """A runs table followed by the paired differences that the module describes, and by those to controls of the same row.

    ``attack_success_minus_control``: to the row without an attack, where the trigger meets a network that nobody poisoned.
    ``balanced_accuracy_minus_noise``: PGD less noise as strong.
    """
    compared = runs[runs["metric"].isin(COMPARED)]
    compared = _not_below_floor(compared[compared["scenario"] != "prior_only"], runs)
    defended = compared[compared["variant"] != "none"]
    base = compared[(compared["variant"] == "none") & (compared["round"] != NETWORK)]
    network = base[base["round"] == ""].assign(round=NETWORK)  # robust and plain network, both on unchanged images
    parts = [
        tables.minus(defended, pd.concat([base, network]), ["scenario", "round"], "none"),
        _minus_matched(compared),
    ]
    success = compared[compared["metric"] == "attack_success"]
    quiet = success["scenario"] == "no_attack"
    parts.append(tables.minus(success[~quiet], success[quiet], ["variant"], "control"))
    noise, hit = (compared[compared["scenario"] == name] for name in ("noise", "pgd20"))
    parts.append(tables.minus(hit, noise, ["variant"], "noise"))
    # Without a defence of clients, a compliant attacker is the plain one.
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
    """A PSNR below ``prior_only`` of the same seed counts as that: an attacker who has less can submit the mean image."""
    guess = runs[(runs["scenario"] == "prior_only") & (runs["metric"] == "psnr")]
    least = compared["seed"].map(guess.groupby("seed")["value"].first()).where(compared["metric"] == "psnr", -np.inf)
    return compared.assign(value=compared["value"].clip(lower=least))


def _minus_matched(compared: pd.DataFrame) -> pd.DataFrame:
    """Gradient inversion of every row less that of the undefended network that has learnt as much; see the module."""
    auc = compared[compared["scenario"] == "midway"]
    undefended = auc[auc["variant"] == "none"].set_index(["seed", "round"])["value"]
    own = auc[auc["round"] == ""].set_index(["seed", "variant"])["value"]
    nearest = {pair: (undefended[pair[0]] - value).abs().idxmin() for pair, value in own.items()}
    inverted = compared[compared["scenario"].isin(["naive", "adaptive"]) & (compared["round"] == "")]
    inverted = inverted[inverted["variant"] != "none"]
    matched = [nearest[pair] for pair in zip(inverted["seed"], inverted["variant"], strict=True)]
    none = compared[compared["variant"] == "none"]
    return tables.minus(inverted.assign(round=matched), none, ["scenario", "round"], "matched").assign(round="")


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """The summary of a runs table, `with_differences`."""
    return tables.summarise(with_differences(runs), KEYS)


def run(cohort: str, p: Params, cell: Cell) -> Finished:
    """One cell: one or several rows of the matrix."""
    return rows_of(cohort, p, cell.variants, cell.seed), {}


def lacks(cohort: data.Cohort, p: Params, cell: Cell) -> list[str]:
    """What the cohort is too small for in one cell (`medsec.evidence.cells.Experiment`)."""
    images = [arms.row(name).images for name in cell.variants]
    return inversion_clients.lacks(cohort, arms.settings(p), images, cell.seed, p.matrix.victims)


EXPERIMENT = Experiment(
    "05_threat_matrix",
    1,
    ("fedgan", "feddetect", "inversion", "evasion", "matrix"),
    run,
    own=("inversion.defences",),
    shared=tuple({row.images: None for row in ROWS.values()}),
    lacks=lacks,
)


def quick(p: Params) -> list[Cell]:
    """Every cell of the matrix, the most expensive first, and a row each of what is named in ``own``.

    Rows that begin alike are in one cell, so that they share local epochs (`federation.trainer`).
    """
    alike: dict[tuple, list[str]] = {}
    for name, row in ROWS.items():
        alike.setdefault((row.images, row.trained_against, row.cbam, row.again), []).append(name)
    dear = sorted(alike.values(), key=lambda names: -sum(map(cost, names)))
    own = [[name] for name in dict.fromkeys((*p.own.rules, *p.own.defences)) if name not in ROWS]
    return [
        Cell("rows", seed, group=names[0], variants=tuple(names)) for names in dear + own for seed in p.seeds.evaluation
    ]


def cost(variant: str) -> int:
    """What a row costs, as a multiple of the cheapest."""
    row = arms.row(variant)
    described = row.images in ("shadow_released", "shadow_described")
    return 1 + 4 * described + 2 * row.cbam + row.trained_against + (row.images != "none")
