"""Views of notebook 04's summary table: what its figures and tables show. All read a table, none attacks a model."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from experiments.adversarial_pruning_defense.arms import ARMS, VARIANTS
from experiments.adversarial_pruning_defense.transfer import F0, MADE
from experiments.params.adversarial_pruning_defense import EvasionParams, Review, RisingRecipe
from medsec.core.settings import Recipe
from medsec.evasion.sanity import QUESTIONS, ceiling
from medsec.evasion.scenarios import eps_key
from medsec.evidence import tables


def rates(summary: pd.DataFrame, p: EvasionParams) -> pd.DataFrame:
    """What every arm keeps at the headline's eps, by what the attacker has (`READINGS`, column ``group``): `figures.rates`."""
    parts = []
    for reading, (_, where) in READINGS.items():
        rows = summary[(summary["eps"] == eps_key(p.eps / 255)) & (summary[["norm", "prune", "map"]] == "").all(axis=1)]
        for column, value in ({"scenario": "pgd20", "f0": ""} | where).items():
            rows = rows[rows[column] == value]
        kin = [variant for variant in VARIANTS if not (reading == RELATED and ARMS[variant].other_seed)]
        parts.append(rows[rows["variant"].isin(kin)].assign(group=reading))
    return _in_order(pd.concat(parts))


def _in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """The arms in the order of notebook 04."""
    return rows.sort_values("variant", key=lambda column: column.map(VARIANTS.index), kind="stable")


def by_arm(summary: pd.DataFrame, columns: Mapping[str, tuple[int, dict]], arms: Sequence[str]) -> pd.DataFrame:
    """One line an arm, one column a quantity: value and interval as text, empty where there is none.

    Args:
        columns: heading -> digits and the row that is shown, without its arm (`medsec.evidence.tables.cell`).
    """
    return pd.DataFrame(
        {"arm": arm} | {name: tables.cell(summary, d, variant=arm, **where) for name, (d, where) in columns.items()}
        for arm in arms
    )


TRANSFERRED = {"pgd20": "PGD", "deepfool_capped": "DeepFool, cut to eps", MADE: "MI-DI-FGSM"}  # by scenario, in words
CLEAN = {  # what a defence costs
    "balanced accuracy": (3, {"scenario": "clean", "metric": "balanced_accuracy"}),
    "minus base": (3, {"scenario": "clean", "metric": "balanced_accuracy_minus_base"}),
    "AUC": (3, {"scenario": "clean", "metric": "auc"}),
}


def headline(summary: pd.DataFrame, p: EvasionParams) -> pd.DataFrame:
    """One line an arm: what it costs on clean images, and what is left when several attacks that know it are tried.

    Rates have the arm's own right answers as their denominator; ``worst case, of all images`` has every image, so that arms can
    be ranked by it: a network that is less often right without an attack has fewer answers to lose.
    """
    at, arms = eps_key(p.eps / 255), _arms(summary)
    worst = {"scenario": "worst_case", "eps": at}
    columns = CLEAN | {
        "worst case, rate": (2, worst | {"metric": "dr_whitebox"}),
        "worst case, of all images": (2, worst | {"metric": "accuracy"}),
    }
    seeds = {"n, clean": {"scenario": "clean"}, "n, attacked": worst}
    n = {
        name: [_runs(summary, where | {"variant": arm, "metric": "accuracy"}) for arm in arms]
        for name, where in seeds.items()
    }
    return by_arm(summary, columns, arms).assign(**n)


def _runs(summary: pd.DataFrame, where: dict) -> int | str:
    """How many seeds a row rests on; empty if there is none."""
    rows = tables.select(summary, where)
    return "" if rows.empty else int(rows.iloc[0]["n"])


def whitebox(summary: pd.DataFrame, p: EvasionParams) -> pd.DataFrame:
    """One line an attack that knows the network, one column an arm: the defence rate at the headline's eps."""
    at = {"metric": "dr_whitebox", "eps": eps_key(p.eps / 255)}
    rows = summary[(summary["metric"] == at["metric"]) & (summary["eps"] == at["eps"])]
    rows = rows[(rows[["prune", "f0"]] == "").all(axis=1)]
    columns = {s.replace("_", " "): (2, at | {"scenario": s}) for s in dict.fromkeys(rows["scenario"])}
    return by_arm(summary, columns, _arms(rows, "pgd20")).set_index("arm").T.rename_axis("attack").reset_index()


def transferred(summary: pd.DataFrame, p: EvasionParams) -> pd.DataFrame:
    """One line an f₀ and attack, one column an arm: what the arm keeps of its right answers on examples made for that f₀.

    The column ``f₀ itself`` says what is left of those that the examples were made for: an attack must break them.
    """
    eps, lines = eps_key(p.eps / 255), []
    there = summary[(summary["metric"] == "dr_transfer") & (summary["eps"] == eps)]
    arms = [variant for variant in VARIANTS if variant in set(there.loc[there["f0"] != "", "variant"])]
    for f0, told in F0.items():
        for scenario, attack in TRANSFERRED.items():
            kin = f0 == "same_seed" and scenario != MADE  # the arms' own cells have these
            where = {"scenario": scenario, "eps": eps} | ({} if kin else {"f0": f0})
            rate = where | {"metric": "dr_transfer"}
            own = (
                {"metric": "dr_whitebox", "variant": "base"}
                if kin
                else {"metric": "dr_whitebox", "variant": "surrogate"}
            )
            line = {variant: tables.cell(summary, 2, variant=variant, **rate) for variant in arms}
            if any(line.values()):
                of_f0 = tables.cell(summary, 2, **(where | own))
                lines.append({"f₀": told, "attack": attack, "f₀ itself": of_f0} | line)
    return pd.DataFrame(lines, columns=["f₀", "attack", "f₀ itself", *arms])


def gaps(summary: pd.DataFrame) -> pd.DataFrame:
    """One line an arm, one column an eps: which share of all images FGSM leaves right, and PGD does not."""
    rows = summary[(summary["scenario"] == "check") & (summary["metric"] == "accuracy_minus_pgd20")]
    where = {"scenario": "check", "metric": "accuracy_minus_pgd20"}
    columns = {f"{255 * float(eps):.3g}/255": (2, where | {"eps": eps}) for eps in sorted(set(rows["eps"]), key=float)}
    return by_arm(summary, columns, _arms(rows, "check"))


def _arms(summary: pd.DataFrame, scenario: str = "clean") -> list[str]:
    """The arms of which a table has rows of a scenario, other shares of pruning aside."""
    there = summary[(summary["scenario"] == scenario) & (summary["prune"] == "")]["variant"]
    return [variant for variant in VARIANTS if variant in set(there)]


def recipes(p: EvasionParams, at_ramp: RisingRecipe) -> pd.DataFrame:
    """How the arms are trained: one line a recipe."""
    named = {
        "base, finetune, prune, cbam, prune_cbam, retrain": (p.clean, p.prune),
        "at, at_prune, at_cbam": (p.robust, p.prune),
        "hardened, hardened_plain": (p.hardened, p.prune_hardened),
        "at_ramp (longer: without an attack)": (at_ramp, 0.0),
    }
    return pd.DataFrame(
        {
            "arms": arms,
            "examples within": _within(recipe),
            "steps of the attack": recipe.steps if recipe.eps else "",
            "epochs": recipe.epochs,
            "share pruned, where it is": pruned or "",
            "mean of the weights": f"running, {recipe.ema:g}" if recipe.ema else "no",
        }
        for arms, (recipe, pruned) in named.items()
    )


def _within(recipe: Recipe) -> str:
    """The eps of training in words."""
    if not recipe.eps:
        return "(plain training)"
    return f"{recipe.eps:g}/255" if not isinstance(recipe, RisingRecipe) else f"0 to {recipe.eps:g}/255, rising"


def size(summary: pd.DataFrame) -> str:
    """``5 seeds of 621 images (Square and AutoAttack: 256)``: on how much a table rests, besides its sweeps."""

    def images(row: pd.Series) -> int:
        return round(row["n_items"] / row["n"])

    attacked = (summary["variant"] == "base") & (summary["scenario"] == "fgsm") & (summary["metric"] == "accuracy")
    clean = summary[attacked].iloc[0]  # more seeds may have been trained than were attacked
    slow = summary[summary["scenario"].isin(["square", "autoattack"]) & (summary["metric"] == "accuracy")]
    fewer = {images(row) for _, row in slow.iterrows()} - {images(clean)}
    aside = f" (Square and AutoAttack: {', '.join(map(str, sorted(fewer)))})" if fewer else ""
    return f"{clean['n']} seeds of {images(clean)} images{aside}"


def contributions(summary: pd.DataFrame) -> pd.DataFrame:
    """What the robust arms cost and keep: one line an arm, AutoAttack at every eps of the table.

    A rate has the arm's own right answers as its denominator, the accuracy has all images.
    """
    columns = dict(CLEAN)
    rows = summary[(summary["scenario"] == "autoattack") & (summary["metric"] == "dr_whitebox")]
    for eps in sorted(set(rows["eps"]), key=float):
        name, attacked = f"AutoAttack, {255 * float(eps):.3g}/255", {"scenario": "autoattack", "eps": eps}
        columns[f"{name}: rate"] = (3, attacked | {"metric": "dr_whitebox"})
        columns[f"{name}: accuracy"] = (3, attacked | {"metric": "accuracy"})
    return by_arm(summary, columns, ["base", "longer", "at", "hardened", "hardened_plain", "at_ramp"])


def added(summary: pd.DataFrame, p: EvasionParams) -> pd.DataFrame:
    """What an arm has more than its control (`record.CONTROLS`): paired differences, one line a measure."""
    at = eps_key(p.eps / 255)
    measures = {
        "AUC, clean": ("clean", "auc", ""),
        "balanced accuracy, clean": ("clean", "balanced_accuracy", ""),
        f"rate, PGD {p.eps:g}/255": ("pgd20", "dr_whitebox", at),
        f"rate, AutoAttack {p.eps:g}/255": ("autoattack", "dr_whitebox", at),
    }
    contrasts = {  # heading -> arm and ``<metric>_minus_``…
        "prune − finetune": ("prune", "finetune"),
        "prune_cbam − finetune": ("prune_cbam", "finetune"),
        "hardened − hardened_plain": ("hardened", "plain"),
        "at_ramp − hardened_plain": ("at_ramp", "plain"),
        "at_ramp − longer": ("at_ramp", "finetune"),
    }
    lines = []
    for measure, (scenario, metric, eps) in measures.items():
        line = {"measure": measure}
        for heading, (arm, control) in contrasts.items():
            where = {"variant": arm, "scenario": scenario, "metric": f"{metric}_minus_{control}", "eps": eps}
            line[heading] = tables.cell(summary, 3, **where)
        lines.append(line)
    return pd.DataFrame(lines)


def distances(summary: pd.DataFrame) -> pd.DataFrame:
    """Median length of the change that turns an answer, by attacks without a cap: one line an arm."""
    attacks = {
        "DeepFool, L2": ("deepfool", "l2", 1),
        "DeepFool, largest change (255ths)": ("deepfool", "linf", 255),
        "Carlini–Wagner, L2": ("cw_l2", "l2", 1),
    }

    def told(variant: str, scenario: str, norm: str, unit: float) -> str:
        where = {"variant": variant, "scenario": scenario, "norm": norm}
        median = tables.select(summary, {**where, "metric": "median_norm"})
        if median.empty:
            return ""
        scaled = median.iloc[0].copy()
        scaled[["value", "low", "high"]] *= unit
        left = tables.cell(summary, 2, **where, metric="accuracy")
        aside = "" if left.startswith("0.00 ") else f"; {left} not turned"
        return f"{tables.interval(scaled)} (n = {scaled['n']}){aside}"

    lines = pd.DataFrame(
        {"arm": variant} | {name: told(variant, *attack) for name, attack in attacks.items()} for variant in VARIANTS
    )
    return lines[(lines.drop(columns="arm") != "").any(axis=1)]


BOUND = "upper bound, any network"
RELATED = "transfer, related f₀"
READINGS = {  # of a "defence rate": what the attacker must know, and what addresses the row
    "white-box": ("the defended network", {"metric": "dr_whitebox"}),
    RELATED: ("a plain network with the same initial weights", {"metric": "dr_transfer"}),
    "transfer, independent f₀": ("a plain network of another seed", {"metric": "dr_transfer", "f0": "other_seeds"}),
    "recovered, independent f₀": ("the same", {"metric": "dr_recovered", "f0": "other_seeds"}),
}
PUBLISHED = {"pgd20": "PGD", "deepfool_capped": "DeepFool"}


def paper(summary: pd.DataFrame, p: EvasionParams, published: dict[str, float], variants: list[str]) -> pd.DataFrame:
    """The published numbers beside every reading of them: one line an attack, reading and eps, one column an arm.

    Args:
        published: by a name that begins with the attack's, such as ``PGD (77.18 %)``.
        variants: the paper's arm and its controls.
    """
    lines = []
    for scenario, attack in PUBLISHED.items():
        (name,) = (name for name in published if name.startswith(attack))
        for reading, (knows, row) in READINGS.items():
            rows = summary[(summary["scenario"] == scenario) & (summary["prune"] == "")]
            for column, value in ({"f0": ""} | row).items():
                rows = rows[rows[column] == value]
            for eps in sorted(set(rows.loc[rows["variant"].isin(variants), "eps"]), key=float):
                line = {
                    "published": f"{attack}, {published[name]:.4f}",
                    "read as": reading,
                    "the attacker knows": knows,
                }
                line["eps"] = f"{255 * float(eps):.3g}/255" + (", cut to it" if scenario == "deepfool_capped" else "")
                where = {"scenario": scenario, "eps": eps, **row}
                lines.append(line | {v: tables.cell(summary, 2, variant=v, **where) for v in variants})
    return pd.DataFrame(lines)


def over_eps(
    summary: pd.DataFrame, variants: list[str], twins: tuple[np.ndarray, np.ndarray] | None = None
) -> pd.DataFrame:
    """Accuracy under PGD over eps in 255ths, and at 0 without an attack (`medsec.show.plots.curves`).

    Args:
        twins: every patient drawn healthy and ill (`medsec.data.sources.twins`): adds what no network can exceed.
    """
    rows = summary[summary["variant"].isin(variants) & (summary["metric"] == "accuracy") & (summary["prune"] == "")]
    rows = rows[rows["scenario"].isin(["clean", "pgd20"])]
    x = (255 * pd.to_numeric(rows["eps"].where(rows["eps"] != "", "0"))).round(3)
    rows = rows.assign(name=rows["variant"], x=x)
    if twins is None:
        return rows
    bound = pd.DataFrame({"name": BOUND, "x": eps, "value": ceiling(*twins, eps)} for eps in sorted(set(x)))
    return pd.concat([rows, bound.assign(low=bound["value"], high=bound["value"])])


def over_pruning(summary: pd.DataFrame, p: EvasionParams, variants: list[str]) -> dict[str, pd.DataFrame]:
    """Accuracy on clean images and under PGD over the share of weights that is pruned; empty without such rows."""
    rows = summary[summary["variant"].isin(variants) & (summary["metric"] == "accuracy")]
    if (rows["prune"] == "").all():
        return {}
    rows = rows.assign(name=rows["variant"], x=pd.to_numeric(rows["prune"].where(rows["prune"] != "", f"{p.prune:g}")))
    attacked = rows["scenario"].eq("pgd20") & rows["eps"].eq(eps_key(p.eps / 255))
    return {"accuracy, clean": rows[rows["scenario"] == "clean"], f"accuracy, PGD {p.eps:g}/255": rows[attacked]}


ONE_STEP = (
    "trained against an attack: FGSM leaves at most {gap:g} of all images more right than PGD, up to the first eps that is "
    "{times:g} times that of training"
)


def checks(summary: pd.DataFrame, p: Review) -> pd.DataFrame:
    """One line a check: in how many runs of all arms it passed, and the arms in which it did not always."""
    asked = QUESTIONS | {"no_one_step_overfitting": ONE_STEP.format(gap=p.one_step_gap, times=p.times_training)}
    rows = summary[(summary["scenario"] == "check") & (summary["unit"] == "passes")]
    rows = rows.assign(passed=(rows["value"] * rows["n"]).round().astype(int))
    failed = [f"`{row.variant}`, {row.passed} of {row.n}" if row.passed < row.n else "" for row in rows.itertuples()]
    return pd.DataFrame(
        {
            "check": name.replace("_", " "),
            "it passes where": asked[name],
            "passed": f"{part['passed'].sum()} of {part['n'].sum()} runs",
            "arms in which it failed": "; ".join(filter(None, part["failed"])),
        }
        for name, part in rows.assign(failed=failed).groupby("metric", sort=False)
    )


def pointing(summary: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, float]]:
    """Pointing game on clean images, the arms in their order, and its controls (`figures.pointing`)."""
    rows = summary[(summary["scenario"] == "attribution") & (summary["eps"] == "")]
    names = {"area": "a point at random", "prior": "always where most lesions are"}
    controls = {names[row["map"]]: row["value"] for row in rows.to_dict("records") if row["map"] in names}
    return _in_order(rows[~rows["map"].isin(names)]), controls
