"""The record of notebook 03: which cells it has, what it keeps of them, and what they cost."""

import pandas as pd

from experiments import params, record_plans
from experiments.gia_defense import cells
from experiments.gia_defense import clients as inversion_clients
from experiments.gia_defense import fingerprint as fingerprints
from experiments.gia_defense import imprint as imprints
from experiments.params import Params
from medsec.core.errors import InputError
from medsec.evidence.cells import Cell
from medsec.evidence.record import Design

DIVERGES = {"may_diverge": True}  # a federation that finds no classifier is a result
SINGLE_ATTACK = ("failed", "psnr", "ssim", "retrieval")  # what the record keeps of one attack by itself


def plan(cohort: str, p: Params) -> list[Cell]:
    """Every defence under every attack and its cost, on every evaluation seed; then one thing changed at a time.

    Seed by seed: a record that is cut short has every defence, on fewer seeds. ``variants`` holds the one of a cell. What a
    defence costs to train is paired and moves little: those that decide no bar have fewer seeds. Other strengths and
    conditions have the fewest. The described defence's controls, the dearest to attack, are there for privacy: they are not
    trained, and have fewer seeds too.
    """
    for where, names in (
        ("inversion.variants", p.record.inversion.variants),
        ("inversion.utility_variants", p.record.inversion.utility_variants),
        ("other_modality.inversion", p.record.other_modality.inversion),
    ):
        record_plans.check_names(names, inversion_clients.VARIANTS, f"record.{where}")
    if record_plans.headline_only(cohort):
        change = record_plans.other_modality(p, "inversion")
        return [
            Cell(arm, seed, change, group=variant, variants=(variant,), given=given)
            for seed in p.seeds.evaluation
            for variant in p.record.other_modality.inversion
            for arm, given in (("attack", {}), ("federation", DIVERGES))
        ] + [
            fingerprints.plan(variant, seed, p.fingerprint.model_dump(), change=change)
            for seed in p.seeds.evaluation
            for variant in p.record.other_modality.inversion
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
            found += [
                Cell("longer", seed, _longer(p), {"batch": batch}, group="none", variants=("none",))
                for batch in sweep.longer.batches
            ]
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
    return found + _fingerprints(p) + _imprints(p)


def _longer(p: Params) -> dict:
    return {"inversion": {"attack": {"iterations": p.record.inversion.longer.iterations}}}


def _fingerprints(p: Params) -> list[Cell]:
    """Whose gradient is it: every defence on every seed; other strengths, and networks that have learnt, on fewer."""
    given, more = p.fingerprint.model_dump(), p.record.inversion.fingerprint
    record_plans.check_names(more.later, inversion_clients.VARIANTS, "record.inversion.fingerprint.later")
    scale = more.released_scale
    others = [*_strengths(p), ("shadow_released", scale, {"inversion": {"shadow": {"scale": scale}}})]
    first, found = given | {"batches": given["batches"][:1]}, []
    for seed in p.seeds.evaluation:
        found += [
            fingerprints.plan(variant, seed, given)
            for variant in inversion_clients.VARIANTS
            if variant not in inversion_clients.CONTROLS
        ]
        if seed not in p.seeds.evaluation[: more.seeds]:
            continue
        found += [fingerprints.plan(variant, seed, first) for variant in inversion_clients.CONTROLS]
        found += [
            fingerprints.plan(variant, seed, first, change=change, keys={"strength": value})
            for variant, value, change in others
        ]
    later = given | {"batches": more.batches, "shares": more.shares} | DIVERGES
    return found + [
        fingerprints.plan(variant, seed, later) for seed in p.seeds.evaluation[: more.seeds] for variant in more.later
    ]


def _imprints(p: Params) -> list[Cell]:
    """A dishonest server against every defence but the controls of equal norm, which leave as much as what they control for."""
    return [
        imprints.plan(variant, seed, p.imprint.model_dump())
        for seed in p.seeds.evaluation
        for variant in inversion_clients.VARIANTS
        if variant not in inversion_clients.CONTROLS
    ]


def _strengths(p: Params) -> list[tuple[str, float, dict]]:
    """Defence, strength, and the change of the parameters that sets it."""
    for variant, names in p.record.inversion.strengths.items():
        if unknown := set(names) - set(p.inversion.defences.get(variant, {})):
            raise InputError(f"record.inversion.strengths.{variant}: there is no {sorted(unknown)[0]!r} to change")
    found = [
        (variant, value, {"inversion": {"defences": {variant: {name: value}}}})
        for variant, names in p.record.inversion.strengths.items()
        for name, values in names.items()
        for value in values
    ]
    for _, _, change in found:
        params.validate(params.merge(p.model_dump(), change), "record.inversion.strengths")
    return found


def keep(rows: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    return _worth_keeping(rows) if cell.arm == "attack" and not cell.keys else rows


def _worth_keeping(table: pd.DataFrame) -> pd.DataFrame:
    """Of a single attack four metrics; among the adaptive ones no naive attack again, but for the one they are compared with."""
    single = table["attack"] != ""
    naive = set(table["attack"][table["scenario"] == "naive"]) - {"ig"}
    again = single & (table["scenario"] == "adaptive") & table["attack"].isin(naive)
    return table[~again & (~single | table["metric"].isin(SINGLE_ATTACK))]


def multiple(p: Params, cell: Cell) -> float:
    """As a multiple of a federation of GANs, measured: an attack costs about as much as training."""
    others = {"federation": 0.6, "rounds": 2, "strength": 1, "fingerprint": 0.3, "fingerprint_later": 1, "imprint": 0.5}
    others["longer"] = 0.01 * p.record.inversion.longer.iterations
    return (1 if cell.keys else 3) if cell.arm == "attack" else others[cell.arm]


DESIGN = Design(cells.EXPERIMENT, plan, keep, cells.summarise, record_plans.cost(multiple))
