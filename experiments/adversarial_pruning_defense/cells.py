"""What notebook 04 measures: how classifiers fare under evasion, and three numbers that have all been called defence rate.

Scenarios: ``clean``; ``noise``, a control; attacks of the maximum norm ``fgsm``, ``bim``, ``pgd20`` (steps of eps/4),
``pgd20_eps10`` (the literature's eps/10), ``pgd_margin`` (another loss), ``pgd_detached`` (attention gates as constants),
``deepfool_capped``, ``square`` (no gradient), ``autoattack``; ``worst_case``, right under none of the white-box attacks;
``deepfool`` and ``cw_l2``, which have no eps: their ``median_norm`` counts. ``check``: the reviewer's questions, 1 if passed.

With f the arm, f₀ the undefended ``base`` of the same seed:

* ``dr_whitebox``: of what f classifies rightly, the share that it still does when the attack knows f;
* ``dr_transfer``: the same when the examples were made for f₀;
* ``dr_recovered``: of what f₀ classifies rightly and the attack turns, the share that f classifies rightly.

Scenario ``attribution``: ``pointing_game``, does the highest point of a map lie in the lesion, on images with one?

Key columns: ``eps`` in [0, 1] units, ``norm``, ``prune`` (a share other than the headline's), ``map``.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from experiments.adversarial_pruning_defense import arms as evasion_arms
from experiments.adversarial_pruning_defense.arms import Setup, prepare
from experiments.adversarial_pruning_defense.params import EvasionAttacks
from experiments.params import Params
from medsec.core.seeds import derive_seed
from medsec.evasion import attacks as adversarial
from medsec.evasion import libraries as evasion_library
from medsec.evasion import maps as evasion_maps
from medsec.evasion import pruning
from medsec.evasion import sanity as evasion_checks
from medsec.evasion.sanity import SLOW
from medsec.evidence import cells, tables
from medsec.nets import cbam as attention
from medsec.nets import fit as classifier

KEYS = ("eps", "norm", "prune", "map")
UNITS = {
    "accuracy": "share",
    "balanced_accuracy": "share",
    "auc": "AUC",
    "dr_whitebox": "share",
    "dr_transfer": "share",
    "dr_recovered": "share",
    "median_norm": "intensity",
    "sparsity": "share",
    "pointing_game": "share",
    "planted_found": "share",
    "planted_by_chance": "share",
}
SWEPT = ("noise", "fgsm", "pgd20")
PRUNED = ("pgd20", "pgd_margin")  # at other shares of pruning
TRANSFERRED = ("fgsm", "pgd20", "deepfool_capped")


def eps_key(eps: float) -> str:
    """How an eps in [0, 1] stands in a table: 4/255 is 0.0156863."""
    return f"{eps:.6g}"


def craft(
    scenario: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    p: EvasionAttacks,
    seed: int,
    *,
    stop: bool = True,
) -> Tensor:
    """The examples of one attack of the maximum norm.

    Args:
        scenario: ``noise`` or one of ``evasion.attacks.scenarios``.
        stop: end at the first success (`medsec.evasion.attacks.ascend`); not for examples that shall transfer.
    """
    rng = torch.Generator().manual_seed(derive_seed(seed, scenario, eps_key(eps)))
    usual = {"steps": p.steps, "stop": stop}
    if scenario == "noise":
        return adversarial.noise(model, x, y, eps, rng)
    if scenario == "fgsm":
        return adversarial.fgsm(model, x, y, eps)
    if scenario == "bim":
        return adversarial.bim(model, x, y, eps, steps=p.steps, step=p.bim_step)
    if scenario == "deepfool_capped":
        found = adversarial.deepfool(model, x, y, norm="linf", steps=p.deepfool_steps, overshoot=p.overshoot)
        return adversarial.capped(x, found, eps)
    if scenario == "square":
        return evasion_library.square(model, x, y, eps, seed=seed, queries=p.square_queries)
    if scenario == "autoattack":
        return evasion_library.autoattack(
            model, x, y, eps, seed=seed, iterations=p.apgd_iterations, queries=p.square_queries, restarts=p.restarts
        )
    if scenario == "pgd20_eps10":
        return adversarial.pgd(model, x, y, eps, rng, step=p.small_step, **usual)
    if scenario == "pgd_margin":
        return adversarial.pgd(model, x, y, eps, rng, step=p.step, loss=adversarial.margin, **usual)
    if scenario == "pgd_detached":
        with attention.gates_detached(model):
            return adversarial.pgd(model, x, y, eps, rng, step=p.step, **usual)
    if scenario == "pgd20":
        return adversarial.pgd(model, x, y, eps, rng, step=p.step, **usual)
    raise ValueError(f"no attack {scenario!r}")


def attacks_for(variant: str, wanted: Sequence[str]) -> list[str]:
    """Those of the wanted attacks that make sense for an arm: only one with attention has gates to detach."""
    return [s for s in wanted if s != "pgd_detached" or evasion_arms.ARMS[variant].cbam]


# Measures -------------------------------------------------------------------------------------------------------------


def rates(f: Mapping[str, np.ndarray], f0: Mapping[str, np.ndarray] | None = None) -> dict[str, float]:
    """The three defence rates from outcomes (N,) bool, right or wrong.

    Args:
        f: of the arm: ``clean``, ``own`` (examples made for it), ``transfer`` (made for f₀); what is missing is left out.
        f0: of the undefended model: ``clean`` and ``own``, on the same examples.

    Returns:
        Without a rate whose denominator is 0.
    """
    found = {}
    for rate, key in (("dr_whitebox", "own"), ("dr_transfer", "transfer")):
        if key in f and f["clean"].any():
            found[rate] = float(f[key][f["clean"]].mean())
    if f0 is not None and "transfer" in f:
        turned = f0["clean"] & ~f0["own"]
        if turned.any():
            found["dr_recovered"] = float(f["transfer"][turned].mean())
    return found


class _Rows(tables.Rows):
    """Rows of one scenario of one arm, from the class probabilities that it gives."""

    def answers(self, found: Tensor, y: Tensor, **cells: str) -> np.ndarray:
        """Add accuracy, balanced accuracy and AUC; returns which answers are right."""
        right = (found.argmax(1) == y).numpy()
        self.add("accuracy", right.mean(), len(y), **cells)
        self.add("balanced_accuracy", classifier.balanced_accuracy(found, y), len(y), **cells)
        self.add("auc", classifier.auc(found, y), len(y), **cells)
        return right


# One arm --------------------------------------------------------------------------------------------------------------


def arm_cell(cohort: str, params: Params, variant: str, seed: int, *, retrained: bool = False) -> pd.DataFrame:
    """One arm of one run under every attack, and the reviewer's checks.

    Args:
        retrained: train it in any case, and leave the network for the notebook where it attacks it (for records).
    """
    torch.set_num_threads(1)
    setup = prepare(cohort, params)
    if retrained:
        model = evasion_arms.train(setup, variant, seed)
        if variant in evasion_arms.QUICK and seed in params.evasion.checkpoint_seeds:
            evasion_arms.save(model, setup, variant, seed)
    else:
        model = evasion_arms.network(setup, variant, seed)
    base = model if variant == "base" else evasion_arms.network(setup, "base", seed)
    p = params.evasion
    rows, outcomes = attacked(setup, variant, model, base, seed, p.attacks.scenarios, p.sweep)
    parts = [rows, _norm_rows(setup, variant, model, outcomes["clean", 0.0], seed)]
    parts += [_check_rows(setup, variant, model, outcomes, seed), _attribution_rows(setup, variant, model, seed)]
    return pd.concat(parts, ignore_index=True)


def attacked(
    setup: Setup,
    variant: str,
    model: nn.Module,
    base: nn.Module,
    seed: int,
    scenarios: Sequence[str],
    sweep: Sequence[float],
) -> tuple[pd.DataFrame, dict[tuple[str, float], np.ndarray]]:
    """Rows of an arm under attacks of the maximum norm, and by (scenario, eps) which examples stay right.

    Args:
        base: the undefended network of the same seed; the same object as ``model`` where that is the arm.
        scenarios: attacks at the headline's eps.
        sweep: other eps, in 255ths, for `SWEPT`.

    `SLOW` attacks are run on the first ``evasion.attacks.slow_images``.
    """
    p, (x, y) = setup.params.evasion, setup.splits["test"]
    headline = p.eps / 255
    rows = _Rows(KEYS, UNITS, seed, variant, "clean")
    clean = rows.answers(classifier.predict(model, x), y)
    rows.add("sparsity", pruning.sparsity(model), 1)
    parts, outcomes = [rows.table()], {("clean", 0.0): clean}
    plan = [(scenario, headline) for scenario in ("noise", *attacks_for(variant, scenarios))]
    plan += [(s, e / 255) for e in sweep if e != p.eps for s in SWEPT]
    plan += [("autoattack", e / 255) for e in p.attacks.autoattack_more if "autoattack" in scenarios]
    for scenario, eps in plan:
        rows = _Rows(KEYS, UNITS, seed, variant, scenario)
        some = slice(p.attacks.slow_images if scenario in SLOW else None)
        found = craft(scenario, model, x[some], y[some], eps, p.attacks, seed)
        right = outcomes[scenario, eps] = rows.answers(classifier.predict(model, found), y[some], eps=eps_key(eps))
        for rate, value in rates({"clean": clean[some], "own": right}).items():
            rows.add(rate, value, int(clean[some].sum()), eps=eps_key(eps))
        parts.append(rows.table())
    parts.append(_worst_rows(variant, outcomes, headline, seed))
    if model is not base:
        found, outcomes["transfer", headline] = _transfer_rows(setup, variant, model, base, clean, seed)
        parts.append(found)
    return pd.concat(parts, ignore_index=True), outcomes


def _worst_rows(variant: str, outcomes, eps: float, seed: int) -> pd.DataFrame:
    """Per example the worst of all attacks that know the model, on the images that all of them were run on."""
    those = [outcomes["clean", 0.0], *(right for (s, e), right in outcomes.items() if e == eps and s != "noise")]
    clean, *others = (right[: min(map(len, those))] for right in those)
    withstood = np.logical_and.reduce([clean, *others])
    rows = tables.Rows(KEYS, UNITS, seed, variant, "worst_case")
    rows.add("accuracy", withstood.mean(), len(withstood), eps=eps_key(eps))
    for rate, value in rates({"clean": clean, "own": withstood}).items():
        rows.add(rate, value, int(clean.sum()), eps=eps_key(eps))
    return rows.table()


def _transfer_rows(
    setup: Setup, variant: str, model: nn.Module, base: nn.Module, clean: np.ndarray, seed: int
) -> tuple[pd.DataFrame, np.ndarray]:
    """What examples do that were made for the undefended model, at the headline's eps; and the outcomes of PGD's."""
    p, (x, y) = setup.params.evasion, setup.splits["test"]
    parts, eps, of_pgd = [], p.eps / 255, clean
    own_clean = (classifier.predict(base, x).argmax(1) == y).numpy()
    for scenario in TRANSFERRED:
        found = craft(scenario, base, x, y, eps, p.attacks, seed, stop=False)
        here, there = ((classifier.predict(m, found).argmax(1) == y).numpy() for m in (model, base))
        values = rates({"clean": clean, "transfer": here}, {"clean": own_clean, "own": there})
        rows = tables.Rows(KEYS, UNITS, seed, variant, scenario)
        for rate, value in values.items():
            n = int((clean if rate == "dr_transfer" else own_clean & ~there).sum())
            rows.add(rate, value, n, eps=eps_key(eps))
        parts.append(rows.table())
        of_pgd = here if scenario == "pgd20" else of_pgd
    return pd.concat(parts, ignore_index=True), of_pgd


def _norm_rows(setup: Setup, variant: str, model: nn.Module, clean: np.ndarray, seed: int) -> pd.DataFrame:
    """Median length of the change that turns a right answer, of attacks that have no eps."""
    p, (x, y) = setup.params.evasion.attacks, setup.splits["test"]
    right = torch.from_numpy(clean)
    parts = []
    for norm in p.deepfool_norms:
        found = adversarial.deepfool(
            model, x[right], y[right], norm=norm, steps=p.deepfool_steps, overshoot=p.overshoot
        )
        parts.append(_median_norm("deepfool", variant, model, x[right], y[right], found, norm, seed))
    if variant in p.cw.variants:
        few = right.nonzero()[: p.cw.images, 0]
        found = evasion_library.cw_l2(
            model, x[few], y[few], iterations=p.cw.iterations, searches=p.cw.searches, lr=p.cw.lr
        )
        parts.append(_median_norm("cw_l2", variant, model, x[few], y[few], found, "l2", seed))
    return pd.concat(parts, ignore_index=True)


def _median_norm(scenario: str, variant: str, model, x: Tensor, y: Tensor, found: Tensor, norm: str, seed: int):
    """Examples that were not turned count as infinitely far, so that a failing attack cannot look like a short way."""
    change = (found - x).flatten(1)
    length = change.norm(dim=1) if norm == "l2" else change.abs().amax(1)
    left = classifier.predict(model, found).argmax(1) == y
    median = float(length.masked_fill(left, torch.inf).median())
    rows = tables.Rows(KEYS, UNITS, seed, variant, scenario)
    rows.add("accuracy", float(left.float().mean()), len(x), norm=norm)
    if np.isfinite(median):
        rows.add("median_norm", median, len(x), norm=norm)
    return rows.table()


def _check_rows(setup: Setup, variant: str, model: nn.Module, outcomes, seed: int) -> pd.DataFrame:
    rows = tables.Rows(KEYS, dict(UNITS), seed, variant, "check")
    result, checks = reviewed(setup, variant, model, outcomes, seed)
    n = len(outcomes["clean", 0.0])
    for check in checks:
        rows.units[check.name] = "passes"
        rows.add(check.name, float(check.passes), n)
    rows.add("planted_found", result.found, result.n)
    rows.add("planted_by_chance", result.by_chance, result.n)
    return rows.table()


def reviewed(
    setup: Setup, variant: str, model: nn.Module, outcomes, seed: int
) -> tuple[evasion_checks.Planted, list[evasion_checks.Check]]:
    """The reviewer's checks of one arm, from the outcomes of its attacks and a few more runs on fewer images."""
    p, attacks = setup.params.evasion, setup.params.evasion.attacks
    images, labels = (part[: p.checks.images] for part in setup.splits["test"])
    eps, seed = p.eps / 255, derive_seed(seed, "checks")
    usual = {"steps": attacks.steps, "step": attacks.step, "seed": seed}
    result = evasion_checks.planted(model, images[: p.checks.planted], eps, inner=p.checks.inner, **usual)
    checks = [
        *evasion_checks.of_outcomes(outcomes, eps),
        evasion_checks.of_gradients(model, images, labels),
        *evasion_checks.of_steps(model, images, labels, eps, more=p.checks.more_steps, **usual),
        evasion_checks.of_large_eps(
            model, images, labels, p.checks.large_eps / 255, **usual | {"steps": p.checks.more_steps}
        ),
        evasion_checks.of_planted(result),
    ]
    if variant == "base":
        checks.append(evasion_checks.of_undefended(outcomes, eps))
    return result, checks


def _attribution_rows(setup: Setup, variant: str, model: nn.Module, seed: int) -> pd.DataFrame:
    """Where an arm looks, on the test images with a lesion, clean and under PGD; no row for a cohort without masks."""
    p, (x, y) = setup.params.evasion, setup.splits["test"]
    rows = tables.Rows(KEYS, UNITS, seed, variant, "attribution")
    masks = evasion_arms.test_lesions(setup)
    ill = np.flatnonzero(masks.any((1, 2)))[: p.checks.images] if masks is not None else []
    if not len(ill):
        return rows.table()
    x, y, masks = x[ill], y[ill], masks[ill]
    for kind, value in evasion_maps.controls(masks, setup.cohort["client"].lesion.astype(bool)).items():
        rows.add("pointing_game", value, len(ill), map=kind)
    found = craft("pgd20", model, x, y, p.eps / 255, p.attacks, seed)
    for keys, images in (({}, x), ({"eps": eps_key(p.eps / 255)}, found)):
        for kind, maps in evasion_maps.of(model, images, y).items():
            rows.add("pointing_game", evasion_maps.pointing(maps, masks).mean(), len(ill), **keys, map=kind)
    return rows.table()


def prune_cell(cohort: str, params: Params, variant: str, seed: int, ratio: float) -> pd.DataFrame:
    """One arm pruned to another share: clean, PGD at the headline's eps, and examples made for the undefended model."""
    torch.set_num_threads(1)
    setup = prepare(cohort, params)
    model, base = evasion_arms.train(setup, variant, seed, prune=ratio), evasion_arms.train(setup, "base", seed)
    rows, _ = attacked(setup, variant, model, base, seed, PRUNED, [])
    return rows.assign(prune=f"{ratio:g}")


# Tables ---------------------------------------------------------------------------------------------------------------


def complete(runs: pd.DataFrame, params: Params) -> pd.DataFrame:
    """A runs table with paired differences to ``base`` on the same seed, ``<metric>_minus_base``.

    For ``clean`` (what a defence costs) and for the headline's eps (what it wins).
    """
    headline = runs[runs["eps"].isin(["", eps_key(params.evasion.eps / 255)]) & (runs["scenario"] != "check")]
    headline = headline[headline["metric"].isin(["accuracy", "balanced_accuracy", "auc", "dr_whitebox"])]
    is_base = (headline["variant"] == "base") & (headline["prune"] == "")
    by = ["seed", "scenario", "metric", "eps", "norm"]
    base = headline[is_base].set_index(by)["value"].rename("base")
    joined = headline[headline["variant"] != "base"].join(base, on=by).dropna(subset="base")
    joined["value"] -= joined["base"]
    joined["metric"] += "_minus_base"
    return pd.concat([runs, joined[runs.columns]], ignore_index=True)


def summarise(runs: pd.DataFrame, params: Params) -> pd.DataFrame:
    """The summary of a runs table, after `complete`."""
    return tables.summarise(complete(runs, params), KEYS)


# What the notebook and its record run ---------------------------------------------------------------------------------


def run(cohort: str, p: Params, cell: cells.Cell) -> cells.Finished:
    """One cell: an arm under every attack, or an arm pruned to another share."""
    (variant,) = cell.variants
    if cell.arm == "prune":
        return prune_cell(cohort, p, variant, cell.seed, cell.keys["prune"]), {}
    return arm_cell(cohort, p, variant, cell.seed, retrained=bool(cell.given.get("retrained"))), {}


EXPERIMENT = cells.Experiment("04_adversarial_pruning_defense", 1, ("evasion",), run)


def quick(p: Params, variants: Sequence[str]) -> list[cells.Cell]:
    """What the notebook itself runs: some arms, the dearest first."""
    return [
        cells.Cell("arm", seed, group=variant, variants=(variant,))
        for variant in reversed(variants)
        for seed in p.seeds.evaluation
    ]
