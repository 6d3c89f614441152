"""What notebook 04 measures: how classifiers fare under evasion, and three numbers that have all been called defence rate.

Scenarios: ``clean``; ``noise``, a control; attacks of the maximum norm ``fgsm``, ``bim``, ``pgd20`` (steps of eps/4),
``pgd20_eps10`` (the literature's eps/10), ``pgd_margin`` (another loss), ``pgd_detached`` (attention gates as constants),
``deepfool_capped``, ``square`` (no gradient), ``autoattack``; ``worst_case``, right under none of the white-box attacks;
``deepfool`` and ``cw_l2``, which have no eps: their ``median_norm`` counts. ``check``: the reviewer's questions, 1 if passed.

With f the arm, f₀ the undefended ``base`` of the same seed (of others: `transfer`):

* ``dr_whitebox``: of what f classifies rightly, the share that it still does when the attack knows f;
* ``dr_transfer``: the same when the examples were made for f₀;
* ``dr_recovered``: of what f₀ classifies rightly and the attack turns, the share that f classifies rightly.

Scenario ``attribution``: ``pointing_game``, does the highest point of a map lie in the lesion, on images with one?

Key columns: ``eps`` in [0, 1] units, ``norm``, ``prune`` (a share other than the headline's), ``map``, ``f0`` (`transfer`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from experiments.adversarial_pruning_defense import arms as evasion_arms
from experiments.adversarial_pruning_defense import transfer
from experiments.adversarial_pruning_defense.arms import Setup, prepare
from experiments.adversarial_pruning_defense.transfer import rates
from experiments.params import Params
from medsec.core.seeds import derive_seed
from medsec.evasion import libraries, maps, pruning, sanity
from medsec.evasion.attacks import deepfool
from medsec.evasion.sanity import SLOW
from medsec.evasion.scenarios import craft, eps_key
from medsec.evidence import cells, tables
from medsec.nets import fit as classifier

KEYS = ("eps", "norm", "prune", "map")
SWEPT = ("noise", "fgsm", "pgd20")
PRUNED = ("pgd20", "pgd_margin")  # at other shares of pruning
TRANSFERRED = ("fgsm", "pgd20", "deepfool_capped")


def attacks_for(variant: str, wanted: Sequence[str]) -> list[str]:
    """Those of the wanted attacks that make sense for an arm: only one with attention has gates to detach."""
    return [s for s in wanted if s != "pgd_detached" or evasion_arms.ARMS[variant].cbam]


# Measures -------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One arm of one run, and the rows that were measured of it so far."""

    setup: Setup
    variant: str
    model: nn.Module
    seed: int
    rows: list[dict] = field(default_factory=list)

    def add(self, scenario: str, metric: str, value: float, n_items: int, **keys: str) -> None:
        self.rows.append(tables.run_row(KEYS, self.seed, self.variant, scenario, metric, value, n_items, **keys))

    def answers(self, scenario: str, found: Tensor, y: Tensor, **keys: str) -> np.ndarray:
        """Add accuracy, balanced accuracy and AUC of class probabilities (N, K); returns which answers are right."""
        right = (found.argmax(1) == y).numpy()
        self.add(scenario, "accuracy", right.mean(), len(y), **keys)
        self.add(scenario, "balanced_accuracy", classifier.balanced_accuracy(found, y), len(y), **keys)
        self.add(scenario, "auc", classifier.auc(found, y), len(y), **keys)
        return right

    def whitebox(self, scenario: str, clean: np.ndarray, right: np.ndarray, eps: float) -> None:
        """Add the rate of what the attack leaves right."""
        for rate, value in rates({"clean": clean, "own": right}).items():
            self.add(scenario, rate, value, int(clean.sum()), eps=eps_key(eps))

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)


# One arm --------------------------------------------------------------------------------------------------------------


def arm_cell(cohort: str, params: Params, variant: str, seed: int, *, retrained: bool = False) -> pd.DataFrame:
    """One arm of one run under every attack, and the reviewer's checks.

    Args:
        retrained: train it in any case, and leave the network for the notebook where it attacks it (for records).
    """
    torch.set_num_threads(1)
    setup, p = prepare(cohort, params), params.evasion
    if retrained:
        model = evasion_arms.train(setup, variant, seed)
        if variant in evasion_arms.QUICK and seed in p.checkpoint_seeds:
            evasion_arms.save(model, setup, variant, seed)
    else:
        model = evasion_arms.network(setup, variant, seed)
    base = model if variant == "base" else evasion_arms.network(setup, "base", seed)
    run = Run(setup, variant, model, seed)
    outcomes = attack(run, base, p.attacks.scenarios, p.sweep)
    measure_distances(run, outcomes["clean", 0.0])
    review(run, outcomes)
    measure_attribution(run)
    return run.table()


def attack_cell(cohort: str, params: Params, variant: str, seed: int, scenario: str) -> pd.DataFrame:
    """One arm of one run under one more attack (``own.attacks``) at the headline's eps; ``worst_case`` is without it."""
    torch.set_num_threads(1)
    setup = prepare(cohort, params)
    p, (x, y) = params.evasion, setup.splits["test"]
    run, eps = Run(setup, variant, evasion_arms.network(setup, variant, seed), seed), p.eps / 255
    clean = (classifier.predict(run.model, x).argmax(1) == y).numpy()
    x_adv = craft(scenario, run.model, x, y, eps, p.attacks, seed)
    right = run.answers(scenario, classifier.predict(run.model, x_adv), y, eps=eps_key(eps))
    run.whitebox(scenario, clean, right, eps)
    return run.table()


def prune_cell(cohort: str, params: Params, variant: str, seed: int, ratio: float) -> pd.DataFrame:
    """One arm pruned to another share: clean, PGD at the headline's eps, and examples made for the undefended model."""
    torch.set_num_threads(1)
    setup = prepare(cohort, params)
    run = Run(setup, variant, evasion_arms.train(setup, variant, seed, prune=ratio), seed)
    attack(run, evasion_arms.train(setup, "base", seed), PRUNED, [])
    return run.table().assign(prune=f"{ratio:g}")


def costs_cell(cohort: str, params: Params, variants: Sequence[str], seed: int) -> pd.DataFrame:
    """Arms of one run without an attack: on more seeds than are attacked, or for an arm that is a control of costs only."""
    torch.set_num_threads(1)
    setup = prepare(cohort, params)
    x, y = setup.splits["test"]
    found = []
    for variant in variants:
        run = Run(setup, variant, evasion_arms.train(setup, variant, seed), seed)
        run.answers("clean", classifier.predict(run.model, x), y)
        found.append(run.table())
    return pd.concat(found, ignore_index=True)


def attack(run: Run, base: nn.Module, scenarios: Sequence[str], sweep: Sequence[float]) -> dict:
    """Measure an arm under attacks of the maximum norm; those of `SLOW` on the first ``evasion.attacks.slow_images``.

    Args:
        base: the undefended network of the same seed; the same object as the arm's where that is the arm.
        scenarios: attacks at the headline's eps.
        sweep: other eps, in 255ths, for `SWEPT`.

    Returns:
        By (scenario, eps) which examples stay right, (N,) bool.
    """
    p, (x, y) = run.setup.params.evasion, run.setup.splits["test"]
    headline = p.eps / 255
    clean = run.answers("clean", classifier.predict(run.model, x), y)
    run.add("clean", "sparsity", pruning.sparsity(run.model), 1)
    outcomes = {("clean", 0.0): clean}
    plan = [(scenario, headline) for scenario in ("noise", *attacks_for(run.variant, scenarios))]
    plan += [(s, e / 255) for e in sweep if e != p.eps for s in SWEPT]
    plan += [("autoattack", e / 255) for e in p.attacks.autoattack_more if "autoattack" in scenarios]
    for scenario, eps in plan:
        some = slice(p.attacks.slow_images if scenario in SLOW else None)
        x_adv = craft(scenario, run.model, x[some], y[some], eps, p.attacks, run.seed)
        answers = classifier.predict(run.model, x_adv)
        right = outcomes[scenario, eps] = run.answers(scenario, answers, y[some], eps=eps_key(eps))
        run.whitebox(scenario, clean[some], right, eps)
    # Per example the worst of all attacks that know the model, on the images that all of them were run on.
    each = [right for (s, e), right in outcomes.items() if s == "clean" or (e == headline and s != "noise")]
    each = [right[: min(map(len, each))] for right in each]
    withstood = np.logical_and.reduce(each)
    run.add("worst_case", "accuracy", withstood.mean(), len(withstood), eps=eps_key(headline))
    run.whitebox("worst_case", each[0], withstood, headline)
    if run.model is not base:
        outcomes["transfer", headline] = _transfer(run, base, clean)
    return outcomes


def _transfer(run: Run, base: nn.Module, clean: np.ndarray) -> np.ndarray:
    """Measure what examples do that were made for the undefended model, at the headline's eps; the outcomes of PGD's."""
    p, (x, y) = run.setup.params.evasion, run.setup.splits["test"]
    eps, of_pgd = p.eps / 255, clean
    own_clean = (classifier.predict(base, x).argmax(1) == y).numpy()
    for scenario in TRANSFERRED:
        x_adv = craft(scenario, base, x, y, eps, p.attacks, run.seed, stop=False)
        here, there = ((classifier.predict(m, x_adv).argmax(1) == y).numpy() for m in (run.model, base))
        values = rates({"clean": clean, "transfer": here}, {"clean": own_clean, "own": there})
        for rate, value in values.items():
            n = int((clean if rate == "dr_transfer" else own_clean & ~there).sum())
            run.add(scenario, rate, value, n, eps=eps_key(eps))
        of_pgd = here if scenario == "pgd20" else of_pgd
    return of_pgd


def measure_distances(run: Run, clean: np.ndarray) -> None:
    """Median length of the change that turns a right answer, of attacks that have no eps."""
    p, right = run.setup.params.evasion.attacks, torch.from_numpy(clean)
    if not right.any():  # nothing to turn
        return
    x, y = (part[right] for part in run.setup.splits["test"])
    for norm in p.deepfool_norms:
        x_adv = deepfool(run.model, x, y, norm=norm, steps=p.deepfool_steps, overshoot=p.overshoot)
        median_norm(run, "deepfool", x, y, x_adv, norm)
    if run.variant in p.cw.variants:
        x, y = x[: p.cw.images], y[: p.cw.images]
        x_adv = libraries.cw_l2(run.model, x, y, iterations=p.cw.iterations, searches=p.cw.searches, lr=p.cw.lr)
        median_norm(run, "cw_l2", x, y, x_adv, "l2")


def median_norm(run: Run, scenario: str, x: Tensor, y: Tensor, x_adv: Tensor, norm: str) -> None:
    """Examples that were not turned count as infinitely far, so that a failing attack cannot look like a short way."""
    change = (x_adv - x).flatten(1)
    length = change.norm(dim=1) if norm == "l2" else change.abs().amax(1)
    left = classifier.predict(run.model, x_adv).argmax(1) == y
    median = float(length.masked_fill(left, torch.inf).median())
    run.add(scenario, "accuracy", float(left.float().mean()), len(x), norm=norm)
    if np.isfinite(median):
        run.add(scenario, "median_norm", median, len(x), norm=norm)


def review(run: Run, outcomes: dict) -> None:
    """The reviewer's checks, from the outcomes of the attacks and a few more runs on fewer images."""
    p = run.setup.params.evasion
    checks, unit = sanity.reviewed(
        run.model,
        *(part[: p.checks.images] for part in run.setup.splits["test"]),
        p.eps / 255,
        outcomes,
        steps=p.attacks.steps,
        more=p.checks.more_steps,
        step=p.attacks.step,
        grey=p.checks.large_eps / 255,
        images=p.checks.planted,
        inner=p.checks.inner,
        seed=derive_seed(run.seed, "checks"),
        undefended=run.variant == "base",
    )
    for check in checks:
        run.add("check", check.name, float(check.passes), len(outcomes["clean", 0.0]))
    if unit.n:
        run.add("check", "planted_found", unit.found, unit.n)
        run.add("check", "planted_by_chance", unit.by_chance, unit.n)


def measure_attribution(run: Run) -> None:
    """Where an arm looks, on the test images with a lesion, clean and under PGD; no row for a cohort without masks."""
    p, (x, y), masks = run.setup.params.evasion, run.setup.splits["test"], evasion_arms.test_lesions(run.setup)
    ill = np.flatnonzero(masks.any((1, 2)))[: p.checks.images] if masks is not None else []
    if not len(ill):
        return
    x, y, masks = x[ill], y[ill], masks[ill]
    for kind, value in maps.controls(masks, run.setup.cohort["client"].lesion.astype(bool)).items():
        run.add("attribution", "pointing_game", value, len(ill), map=kind)
    x_adv = craft("pgd20", run.model, x, y, p.eps / 255, p.attacks, run.seed)
    for keys, images in (({}, x), ({"eps": eps_key(p.eps / 255)}, x_adv)):
        for kind, shown in maps.attributions(run.model, images, y).items():
            hits = maps.pointing(shown, masks).mean()
            run.add("attribution", "pointing_game", hits, len(ill), **keys, map=kind)


# Tables ---------------------------------------------------------------------------------------------------------------


def summarise(runs: pd.DataFrame, params: Params) -> pd.DataFrame:
    """The summary of a runs table, with paired differences to ``base`` on the same seed, ``<metric>_minus_base``.

    For ``clean`` (what a defence costs), for the headline's eps (what it wins), and for examples made for other networks. And
    with the check that needs no run of its own (`one_step`).
    """
    runs = transfer.keyed(runs)
    headline = compared(runs, params)
    is_base = headline["variant"] == "base"
    base = headline[is_base & (headline["prune"] == "")]
    paired = tables.minus(headline[~is_base], base, ["scenario", "eps", "norm"], "base")
    parts = [runs, paired, transfer.paired(runs), *one_step(runs, params)]
    return tables.summarise(pd.concat(parts, ignore_index=True), transfer.KEYS)


def compared(runs: pd.DataFrame, params: Params) -> pd.DataFrame:
    """The rows that paired differences are made of: without an attack, and at the headline's eps."""
    rows = runs[
        runs["eps"].isin(["", eps_key(params.evasion.eps / 255)]) & (runs["scenario"] != "check") & (runs["f0"] == "")
    ]
    return rows[rows["metric"].isin(["accuracy", "balanced_accuracy", "auc", "dr_whitebox"])]


def one_step(runs: pd.DataFrame, params: Params) -> list[pd.DataFrame]:
    """How much more FGSM leaves right than PGD, at every eps; and whether an arm trained on one step resists only that step.

    Such an arm passes (``no_one_step_overfitting``) if the difference is at most ``review.one_step_gap`` of the images up to the
    first swept eps that is ``review.times_training`` times that of its training, or more.
    """
    rows = runs[(runs["metric"] == "accuracy") & (runs["prune"] == "") & (runs["f0"] == "")]
    fgsm, pgd = (rows[rows["scenario"] == scenario] for scenario in ("fgsm", "pgd20"))
    gaps = tables.minus(fgsm, pgd, ["variant", "eps"], "pgd20").assign(scenario="check")
    found = []
    for (variant, _), part in gaps.groupby(["variant", "seed"], sort=False):
        trained = evasion_arms.recipe_of(params, evasion_arms.ARMS[variant]).eps
        if not trained:
            continue
        eps = 255 * part["eps"].astype(float)
        beyond = eps[eps > params.review.times_training * trained - 1e-3]
        asked = part[eps <= beyond.min() + 1e-3] if len(beyond) else part
        passes = asked["value"].max() <= params.review.one_step_gap
        found.append(asked[:1].assign(metric="no_one_step_overfitting", value=float(passes), eps="", unit="passes"))
    return [gaps, *found]


# What the notebook and its record run ---------------------------------------------------------------------------------


def run(cohort: str, p: Params, cell: cells.Cell) -> cells.Finished:
    """One cell: an arm under attacks or without any, one pruned to another share, or all arms on examples made for others."""
    if cell.arm == "transfer":
        return transfer.transfer_cell(cohort, p, cell), {}
    if cell.arm == "costs":
        return costs_cell(cohort, p, cell.variants, cell.seed), {}
    (variant,) = cell.variants
    if cell.arm == "own":
        return attack_cell(cohort, p, variant, cell.seed, cell.given["attack"]), {}
    if cell.arm == "prune":
        return prune_cell(cohort, p, variant, cell.seed, cell.keys["prune"]), {}
    return arm_cell(cohort, p, variant, cell.seed, retrained=bool(cell.given.get("retrained"))), {}


RAMP = ("at_ramp",)  # the section of the parameters on which these kinds of cells depend besides
EXPERIMENT = cells.Experiment(
    "04_adversarial_pruning_defense", 1, ("evasion",), run, more={"ramp": RAMP, "costs": RAMP}
)


def arm_of(variant: str, seed: int, change: dict | None = None, **given) -> cells.Cell:
    """The cell of an arm under every attack; one that section ``at_ramp`` trains is of a kind of its own."""
    kind = "ramp" if variant == "at_ramp" else "arm"
    return cells.Cell(kind, seed, change or {}, group=variant, variants=(variant,), given=given)


def quick(p: Params, variants: Sequence[str]) -> list[cells.Cell]:
    """What the notebook itself runs: some arms, the dearest first, and the attacks of ``own.attacks`` besides."""
    arms = [(variant, seed) for variant in reversed(variants) for seed in p.seeds.evaluation]
    found = [arm_of(variant, seed) for variant, seed in arms]
    found += transfer.plan(p, variants)
    return found + [
        cells.Cell(
            "own",
            seed,
            group=f"{attack}-{variant}",
            variants=(variant,),
            given={"attack": attack} | evasion_arms.section_of(p, [variant]),
        )
        for attack in p.own.attacks
        for variant, seed in arms
        if attack in attacks_for(variant, set(p.own.attacks) - set(p.evasion.attacks.scenarios))
    ]
