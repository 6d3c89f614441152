"""What the records consist of: the cells of each notebook, and how one is run (`medsec.evidence.record` does the rest)."""

from collections.abc import Callable

import pandas as pd

from experiments.adversarial_pruning_defense import arms as evasion_arms
from experiments.adversarial_pruning_defense import cells as evasion_eval
from experiments.backdoor_fedgan import cells as fedgan_eval
from experiments.data_and_threats import cells as cohort_eval
from experiments.feddetect import cells as feddetect_eval
from experiments.feddetect import tables as feddetect_tables
from experiments.gia_defense import cells as inversion_eval
from experiments.gia_defense import clients as inversion_clients
from medsec import data
from medsec.backdoor.attackers import SCENARIOS
from medsec.core import params
from medsec.core.params import Params
from medsec.evidence import tables
from medsec.evidence.cells import Cell, Experiment
from medsec.evidence.record import Design

SWEPT = ("phantom", "pneumoniamnist")


def headline_only(cohort: str) -> bool:
    """Whether a record has the headline on every evaluation seed and no sweeps, in notebooks 03 and 04 with fewer attacks.

    So it is for all images but the chest radiographs that the companion is about: a second modality, and the reader's own.
    """
    return cohort not in SWEPT


def _partitions(cohort: str, p: Params, schemes: list[str]) -> list[str]:
    """Those of ``schemes`` that the cohort allows."""
    allowed = cohort_eval.schemes(data.load(cohort, p.cohorts))
    return [scheme for scheme in schemes if scheme in allowed]


def _other_modality(p: Params, section: str) -> dict:
    """What a cell changes there in one section of the parameters."""
    return {section: p.record.other_modality.change[section]}


# Notebook 01 ---------------------------------------------------------------------------------------------------------

# The published trigger, a grid in colour: it needs 57 pixels a side.
COLOUR_GRID = ({"fedgan": {"trigger": {"kind": "grid"}}}, {"trigger": "grid", "size": 64}, 64)


def cells_01(cohort: str, p: Params) -> list[Cell]:
    """The headline on every evaluation seed, then one factor at a time on the first few of them.

    A new trigger has a new detector and a new federation a new course: both need their own clean run as a control.
    Other changes of the attack share the headline's.
    """
    found = [Cell(arm, seed) for seed in p.seeds.evaluation for arm in ("attack", "clean", "controls")]
    sweep = p.record.fedgan
    few = p.seeds.evaluation[: sweep.seeds]
    if cohort == "fundus":  # can be drawn at another size
        return found + [Cell(arm, seed, *COLOUR_GRID) for seed in few for arm in ("attack", "clean", "controls")]
    if headline_only(cohort):
        return found
    if cohort == "phantom":  # can be drawn at another size
        arms = ("attack", "clean", "controls")
        found += [
            Cell(arm, seed, {}, {"size": size}, size) for size in sweep.image_size for seed in few for arm in arms
        ]
    factors = [({"trigger": {"kind": kind}}, {"trigger": kind}, ("attack", "clean")) for kind in sweep.trigger]
    factors += [
        ({"trigger": {"size": k}}, {"area": _area(k, cohort, p)}, ("attack", "clean")) for k in sweep.trigger_size
    ]
    factors += [({"poison": {"ratio": ratio}}, {"ratio": ratio}, ("attack",)) for ratio in sweep.ratio]
    factors += [({"malicious": list(range(n))}, {"attackers": n}, ("attack",)) for n in sweep.attackers]
    factors += [({"n_clients": m}, {"m": m}, ("attack", "clean")) for m in sweep.n_clients]
    dealt = _partitions(cohort, p, sweep.partition)
    factors += [({"partition": scheme}, {"partition": scheme}, ("attack", "clean")) for scheme in dealt]
    for seed in few:  # seed by seed: a record that is cut short has every factor, on fewer seeds
        found += [Cell(arm, seed, {"fedgan": change}, keys) for change, keys, arms in factors for arm in arms]
    return found


def _area(size: int, cohort: str, p: Params) -> str:
    return f"{(size / data.load(cohort, p.cohorts).size) ** 2:.4f}"


def keep_01(rows: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """Single clients' rounds are a mechanism that the quick tables show; here they would be most of the file."""
    seats = rows["client"].isin(["", "attacker", "others", "server"])
    return rows[seats & ((rows["round"] == "") | (not cell.keys))]


def summarise_01(runs: pd.DataFrame, p: Params) -> pd.DataFrame:
    return tables.summarise(runs, fedgan_eval.KEYS, paired_with="clean")


def rounds_01(p: Params, cell: Cell) -> float:
    return {"attack": 2 - p.fedgan.poison.boost_after, "clean": 1, "controls": 0.1}[cell.arm]


# Notebook 02 ---------------------------------------------------------------------------------------------------------


CONTENDERS = ("feddetect_released", "feddetect_hardened")
BASELINES = tuple(v for v in feddetect_eval.VARIANTS if v != "none" and v not in CONTENDERS)


def cells_02(cohort: str, p: Params) -> list[Cell]:
    """FedDetect, released and hardened, against every attacker; the other defences and what differs on fewer seeds.

    Seed by seed: a record that is cut short has every scenario, on fewer seeds.
    """
    sweep = p.record.feddetect
    few = p.seeds.evaluation[: sweep.seeds]
    if headline_only(cohort):
        wanted = p.record.other_modality.feddetect
        return [Cell(s, seed, variants=("none", *CONTENDERS)) for seed in p.seeds.evaluation for s in wanted]
    colluders_control = {"m": p.feddetect.scenario.colluders[1]}
    federations = [{"m": m} for m in sweep.n_clients]
    federations += [{"partition": scheme} for scheme in _partitions(cohort, p, sweep.partition)]
    found = []
    for seed in p.seeds.evaluation:
        for scenario in SCENARIOS:
            variants = CONTENDERS if scenario in feddetect_tables.SAME_BUT_FOR_LOSSES else ("none", *CONTENDERS)
            if scenario == "boost_liar":  # a run that is the same for every attacker of this warm-up
                variants = (*variants, feddetect_eval.ORACLE)
            found.append(Cell(scenario, seed, variants=variants))
        found.append(Cell("no_attack", seed, keys=colluders_control, variants=tuple(sweep.variants)))
        found += [Cell("null", seed, keys={"m": m}) for m in p.feddetect.null_test.clients]
        if seed in few:
            found.append(Cell("downstream", seed))
            found += [
                Cell("aware", seed, keys={"evade": e}, variants=("none", "feddetect_hardened")) for e in sweep.evade
            ]
        if seed in p.seeds.evaluation[: sweep.baseline_seeds]:
            found += [Cell(s, seed, variants=_baselines(s, p), group="baselines") for s in SCENARIOS]
    found += [
        Cell("no_attack", seed, variants=CONTENDERS)
        for seed in sweep.false_alarm_seeds
        if seed not in p.seeds.evaluation
    ]
    for seed in few:
        found += [
            Cell(scenario, seed, keys=keys, variants=tuple(sweep.variants))
            for keys in federations
            for scenario in sweep.scenarios
            if not (scenario == "no_attack" and keys == colluders_control)
        ]
        found += [
            Cell(scenario, seed, keys={"trigger": kind}, variants=tuple(sweep.variants))
            for kind in sweep.trigger
            for scenario in ("honest", "boost_liar")
        ]
    return found


def _baselines(scenario: str, p: Params) -> tuple[str, ...]:
    """Those that `experiments.feddetect.tables.complete` cannot copy from another."""
    copied = set()
    if feddetect_tables.has_twin(p) and not SCENARIOS[scenario].colluders:
        copied.add(feddetect_tables.TWIN[0])
    if scenario in feddetect_tables.SAME_BUT_FOR_LOSSES:
        copied |= set(BASELINES) - set(feddetect_eval.READS_LOSSES)
    return tuple(variant for variant in BASELINES if variant not in copied)


def keep_02(rows: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """No single client's rows; of a sweep no single round's."""
    if cell.arm in ("null", "downstream"):
        return rows
    return rows[(rows["client"] == "") & ((rows["round"] == "") | (not cell.keys))]


def rounds_02(p: Params, cell: Cell) -> float:
    """An aware attacker's optimisation costs about as much as the training itself, and twice that."""
    each = (1 - p.feddetect.warm_up) * (3 if cell.arm.startswith("aware") else 1)
    return {"null": 0.05, "downstream": 3}.get(cell.arm, p.feddetect.warm_up + len(cell.variants) * each)


# Notebook 03 ---------------------------------------------------------------------------------------------------------

DIVERGES = {"may_diverge": True}  # a federation that finds no classifier is a result
SINGLE_ATTACK = ("failed", "psnr", "ssim", "retrieval")  # what the record keeps of one attack by itself


def cells_03(cohort: str, p: Params) -> list[Cell]:
    """Every defence under every attack and its cost, on every evaluation seed; then one thing changed at a time.

    Seed by seed: a record that is cut short has every defence, on fewer seeds. ``variants`` holds the one of a cell. What a
    defence costs to train is paired and moves little: those that decide no bar have fewer seeds. Other strengths and
    conditions have the fewest. The described defence's controls, the dearest to attack, are there for privacy: they are not
    trained, and have fewer seeds too.
    """
    if headline_only(cohort):
        change = _other_modality(p, "inversion")
        return [
            Cell(arm, seed, change, group=variant, variants=(variant,), given=given)
            for seed in p.seeds.evaluation
            for variant in p.record.other_modality.inversion
            for arm, given in (("attack", {}), ("federation", DIVERGES))
        ]
    sweep, found = p.record.inversion, []
    rounds = {"shares": sweep.shares, **DIVERGES}
    counts = (sweep.seeds, sweep.condition_seeds, sweep.control_seeds)
    few, fewest, attacked = (p.seeds.evaluation[:n] for n in counts)
    trained = p.seeds.evaluation[: sweep.other_utility_seeds + sweep.spare_seeds.get(cohort, 0)]
    conditions: list[dict] = [{"steps": steps} for steps in sweep.steps]
    conditions += [{"labels": "inferred", "batch": batch} for batch in sweep.inferred]
    for seed in p.seeds.evaluation:
        for variant in inversion_clients.VARIANTS:
            control = variant in inversion_clients.CONTROLS
            if not control or seed in attacked:
                found.append(Cell("attack", seed, group=variant, variants=(variant,)))
            if variant in sweep.utility_variants or (seed in trained and not control):
                found.append(Cell("federation", seed, group=variant, variants=(variant,), given=DIVERGES))
        if seed in few:
            for variant in sweep.variants:
                found += [
                    Cell("attack", seed, keys={"batch": batch}, group=variant, variants=(variant,))
                    for batch in sweep.batch
                ]
                found.append(Cell("rounds", seed, group=variant, variants=(variant,), given=rounds))
        if seed in fewest:
            found += [
                Cell("attack", seed, keys=keys, group=variant, variants=(variant,))
                for variant in sweep.variants
                for keys in conditions
            ]
            keys, released = {"batch": sweep.released_batch}, "shadow_released"
            found.append(Cell("attack", seed, keys=keys, group=released, variants=(released,)))
            found += [
                Cell("strength", seed, change, {"strength": value}, group=variant, variants=(variant,), given=DIVERGES)
                for variant, value, change in _strengths(p)
            ]
    found += [
        Cell("federation", seed, group=variant, variants=(variant,), given=DIVERGES)
        for seed in sweep.utility_seeds
        if seed not in p.seeds.evaluation
        for variant in sweep.utility_variants
    ]
    return found


def _strengths(p: Params) -> list[tuple[str, float, dict]]:
    """Defence, strength, and the change of the parameters that sets it."""
    found = [
        (variant, value, {"inversion": {"defences": {variant: {name: value}}}})
        for variant, names in p.record.inversion.strengths.items()
        for name, values in names.items()
        for value in values
    ]
    for _, _, change in found:
        params.validate(params.merge(p.model_dump(), change), "record.inversion.strengths")
    return found


def keep_03(rows: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    return _worth_keeping(rows) if cell.arm == "attack" and not cell.keys else rows


def _worth_keeping(table: pd.DataFrame) -> pd.DataFrame:
    """Of a single attack four metrics; among the adaptive ones no naive attack again, but for the one they are compared with."""
    single = table["attack"] != ""
    naive = set(table["attack"][table["scenario"] == "naive"]) - {"ig"}
    again = single & (table["scenario"] == "adaptive") & table["attack"].isin(naive)
    return table[~again & (~single | table["metric"].isin(SINGLE_ATTACK))]


def rounds_03(p: Params, cell: Cell) -> float:
    """As a multiple of a federation of GANs, measured: an attack costs about as much as training."""
    return {"attack": 3 if not cell.keys else 1, "federation": 0.6, "rounds": 2, "strength": 1}[cell.arm]


# Notebook 04 ---------------------------------------------------------------------------------------------------------


def cells_04(cohort: str, p: Params) -> list[Cell]:
    """Every arm under every attack, seed by seed; then other shares of pruning."""
    sweep = p.record.evasion
    arms = p.record.other_modality.evasion if headline_only(cohort) else evasion_arms.VARIANTS
    change = _other_modality(p, "evasion") if headline_only(cohort) else {}
    found = [
        Cell("arm", seed, change, group=variant, variants=(variant,), given={"retrained": True})
        for seed in p.seeds.evaluation
        for variant in arms
    ]
    if headline_only(cohort):
        return found
    found += [
        Cell("prune", seed, keys={"prune": ratio}, group=variant, variants=(variant,))
        for seed in p.seeds.evaluation[: sweep.seeds]
        for variant in sweep.variants
        for ratio in sweep.prune
    ]
    return found


def summarise_04(runs: pd.DataFrame, p: Params) -> pd.DataFrame:
    """With ``dr_whitebox_minus_plain``: `hardened` less the same recipe without pruning and attention, on the same seed."""
    rates = runs[(runs["metric"] == "dr_whitebox") & (runs["prune"] == "")]
    own, plain = (rates[rates["variant"] == variant] for variant in ("hardened", "hardened_plain"))
    paired = tables.minus(own, plain, ["scenario", "eps", "norm"], "plain")
    return evasion_eval.summarise(pd.concat([runs, paired], ignore_index=True), p)


def rounds_04(p: Params, cell: Cell) -> float:
    """As a multiple of a federation of GANs, measured on two cores."""
    if cell.arm == "prune":
        return 1.0
    return 8.0 if cell.variants[0].startswith("hardened") else 6.0


GUESS = 25.0  # seconds of a federation of GANs, of which the `rounds_` are multiples


def _design(experiment: Experiment, cells: Callable, keep: Callable, summarise: Callable, rounds: Callable) -> Design:
    return Design(experiment, cells, keep, summarise, lambda p, cell: GUESS * rounds(p, cell))


DESIGNS = {
    design.experiment.name: design
    for design in (
        _design(fedgan_eval.EXPERIMENT, cells_01, keep_01, summarise_01, rounds_01),
        _design(feddetect_eval.EXPERIMENT, cells_02, keep_02, feddetect_tables.summarise, rounds_02),
        _design(inversion_eval.EXPERIMENT, cells_03, keep_03, inversion_eval.summarise, rounds_03),
        _design(evasion_eval.EXPERIMENT, cells_04, lambda rows, cell: rows, summarise_04, rounds_04),
    )
}
