"""Views of notebook 04's summary table: what its figures and tables show. All read a table, none attacks a model."""

import pandas as pd

from experiments.adversarial_pruning_defense.arms import ARMS
from experiments.adversarial_pruning_defense.cells import UNITS, eps_key
from experiments.adversarial_pruning_defense.params import EvasionParams
from medsec.evidence import tables

RATES = ("dr_whitebox", "dr_transfer", "dr_recovered")


def rates(summary: pd.DataFrame, p: EvasionParams, whitebox: str = "pgd20") -> pd.DataFrame:
    """The three defence rates of every arm at the headline's eps; ``whitebox``: the attack that knows the arm."""
    rows = summary[(summary["eps"] == eps_key(p.eps / 255)) & (summary[["norm", "prune", "map"]] == "").all(axis=1)]
    white = rows[(rows["metric"] == "dr_whitebox") & (rows["scenario"] == whitebox)]
    others = rows[rows["metric"].isin(RATES[1:]) & (rows["scenario"] == "pgd20")]
    found = pd.concat([white, others])
    order = {variant: place for place, variant in enumerate(ARMS)}
    return found.sort_values("variant", key=lambda column: column.map(order), kind="stable")


def headline(summary: pd.DataFrame, p: EvasionParams) -> pd.DataFrame:
    """One line an arm: what it costs on clean images, and what is left when several attacks that know it are tried.

    Rates have the arm's own right answers as their denominator; ``worst case, of all images`` has every image, so that arms can
    be ranked by it: a network that is less often right without an attack has fewer answers to lose.
    """
    at, lines = eps_key(p.eps / 255), []
    for variant in _arms(summary):
        clean = {"variant": variant, "scenario": "clean"}
        worst = {"variant": variant, "scenario": "worst_case", "eps": at}
        transfer = {"variant": variant, "scenario": "pgd20", "metric": "dr_transfer", "eps": at}
        lines.append(
            {
                "arm": variant,
                "balanced accuracy": tables.cell(summary, 3, **clean, metric="balanced_accuracy"),
                "minus base": tables.cell(summary, 3, **clean, metric="balanced_accuracy_minus_base"),
                "AUC": tables.cell(summary, 3, **clean, metric="auc"),
                "worst case, rate": tables.cell(summary, 2, **worst, metric="dr_whitebox"),
                "worst case, of all images": tables.cell(summary, 2, **worst, metric="accuracy"),
                "transfer": tables.cell(summary, 2, **transfer),
                "n": tables.row(summary, **clean, metric="accuracy")["n"],
            }
        )
    return pd.DataFrame(lines)


def whitebox(summary: pd.DataFrame, p: EvasionParams) -> pd.DataFrame:
    """One line an attack that knows the network, one column an arm: the defence rate at the headline's eps."""
    at = eps_key(p.eps / 255)
    rows = summary[(summary["metric"] == "dr_whitebox") & (summary["eps"] == at) & (summary["prune"] == "")]
    return pd.DataFrame(
        {"attack": scenario.replace("_", " ")}
        | {
            variant: tables.cell(summary, 2, variant=variant, scenario=scenario, metric="dr_whitebox", eps=at)
            for variant in _arms(summary)
        }
        for scenario in dict.fromkeys(rows["scenario"])
    )


def _arms(summary: pd.DataFrame) -> list[str]:
    """The arms that a table has, other shares of pruning aside."""
    there = summary[(summary["scenario"] == "clean") & (summary["prune"] == "")]["variant"]
    return [variant for variant in ARMS if variant in set(there)]


def recipes(p: EvasionParams) -> pd.DataFrame:
    """How the arms are trained: one line a recipe."""
    named = {
        "base, finetune, prune, cbam, prune_cbam, retrain": (p.clean, p.prune),
        "at, at_prune, at_cbam": (p.robust, p.prune),
        "hardened, hardened_plain": (p.hardened, p.prune_hardened),
    }
    return pd.DataFrame(
        {
            "arms": arms,
            "examples within": f"{recipe.eps:g}/255" if recipe.eps else "(plain training)",
            "epochs": recipe.epochs,
            "share pruned, where it is": pruned,
            "mean of the weights": f"running, {recipe.ema:g}" if recipe.ema else "no",
        }
        for arms, (recipe, pruned) in named.items()
    )


def size(summary: pd.DataFrame) -> str:
    """``5 seeds of 621 images (Square and AutoAttack: 256)``: on how much a table rests, besides its sweeps."""

    def images(row: pd.Series) -> int:
        return round(row["n_items"] / row["n"])

    clean = tables.row(summary, variant="base", scenario="clean", metric="accuracy", norm="", prune="", map="")
    slow = summary[summary["scenario"].isin(["square", "autoattack"]) & (summary["metric"] == "accuracy")]
    fewer = {images(row) for _, row in slow.iterrows()} - {images(clean)}
    aside = f" (Square and AutoAttack: {', '.join(map(str, sorted(fewer)))})" if fewer else ""
    return f"{clean['n']} seeds of {images(clean)} images{aside}"


def contributions(summary: pd.DataFrame) -> pd.DataFrame:
    """What the robust arms cost and keep: one line an arm, AutoAttack at every eps of the table.

    A rate has the arm's own right answers as its denominator, the accuracy has all images.
    """
    lines = []
    rates_ = summary[(summary["scenario"] == "autoattack") & (summary["metric"] == "dr_whitebox")]
    for variant in ("base", "at", "hardened_plain", "hardened"):
        clean = {"variant": variant, "scenario": "clean"}
        line = {
            "arm": variant,
            "balanced accuracy": tables.cell(summary, 3, **clean, metric="balanced_accuracy"),
            "minus base": tables.cell(summary, 3, **clean, metric="balanced_accuracy_minus_base"),
            "AUC": tables.cell(summary, 3, **clean, metric="auc"),
        }
        for eps in sorted(set(rates_["eps"]), key=float):
            where = {"variant": variant, "scenario": "autoattack", "metric": "dr_whitebox", "eps": eps}
            name = f"AutoAttack, {255 * float(eps):.3g}/255"
            line[f"{name}: rate"] = tables.cell(summary, 3, **where)
            line[f"{name}: accuracy"] = tables.cell(summary, 3, **{**where, "metric": "accuracy"})
        lines.append(line)
    return pd.DataFrame(lines)


def distances(summary: pd.DataFrame) -> pd.DataFrame:
    """Median length of the change that turns an answer, by attacks without a cap: one line an arm."""
    lines = []
    for variant in ARMS:
        line = {"arm": variant}
        for name, scenario, norm, unit in (
            ("DeepFool, L2", "deepfool", "l2", 1),
            ("DeepFool, largest change (255ths)", "deepfool", "linf", 255),
            ("Carlini–Wagner, L2", "cw_l2", "l2", 1),
        ):
            where = {"variant": variant, "scenario": scenario, "norm": norm}
            median = tables.select(summary, {**where, "metric": "median_norm"})
            line[name] = ""
            if len(median):
                scaled = median.iloc[0].copy()
                scaled[["value", "low", "high"]] *= unit
                line[name] = f"{tables.interval(scaled)} (n = {scaled['n']})"
                left = tables.cell(summary, 2, **where, metric="accuracy")
                line[name] += "" if left.startswith("0.00 ") else f"; {left} not turned"
        lines.append(line)
    found = pd.DataFrame(lines)
    return found[(found.drop(columns="arm") != "").any(axis=1)]


READINGS = {  # of a "defence rate": the metric, and what the attacker must know
    "white-box": ("dr_whitebox", "the defended network"),
    "transfer": ("dr_transfer", "the plain network only"),
    "recovered": ("dr_recovered", "the plain network only"),
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
        for reading, (metric, knows) in READINGS.items():
            rows = summary[(summary["scenario"] == scenario) & (summary["metric"] == metric) & (summary["prune"] == "")]
            for eps in sorted(set(rows.loc[rows["variant"].isin(variants), "eps"]), key=float):
                line = {
                    "published": f"{attack}, {published[name]:.4f}",
                    "read as": reading,
                    "the attacker knows": knows,
                }
                line["eps"] = f"{255 * float(eps):.3g}/255" + (", cut to it" if scenario == "deepfool_capped" else "")
                where = {"scenario": scenario, "metric": metric, "eps": eps}
                lines.append(line | {v: tables.cell(summary, 2, variant=v, **where) for v in variants})
    return pd.DataFrame(lines)


def over_eps(summary: pd.DataFrame, variants: list[str]) -> pd.DataFrame:
    """Accuracy under PGD over eps in 255ths, and at 0 without an attack (`medsec.show.plots.curves`)."""
    rows = summary[summary["variant"].isin(variants) & (summary["metric"] == "accuracy") & (summary["prune"] == "")]
    rows = rows[rows["scenario"].isin(["clean", "pgd20"])]
    x = 255 * pd.to_numeric(rows["eps"].where(rows["eps"] != "", "0"))
    return rows.assign(name=rows["variant"], x=x)


def over_pruning(summary: pd.DataFrame, p: EvasionParams, variants: list[str]) -> dict[str, pd.DataFrame]:
    """Accuracy on clean images and under PGD over the share of weights that is pruned; empty without such rows."""
    rows = summary[summary["variant"].isin(variants) & (summary["metric"] == "accuracy")]
    if (rows["prune"] == "").all():
        return {}
    rows = rows.assign(name=rows["variant"], x=pd.to_numeric(rows["prune"].where(rows["prune"] != "", f"{p.prune:g}")))
    attacked = rows["scenario"].eq("pgd20") & rows["eps"].eq(eps_key(p.eps / 255))
    return {"accuracy, clean": rows[rows["scenario"] == "clean"], f"accuracy, PGD {p.eps:g}/255": rows[attacked]}


ASKED = {  # of a check: what is true where it passes
    "iterative_beats_single_step": "PGD leaves no more right than FGSM",
    "noise_weaker_than_fgsm": "noise of the same size leaves more right than FGSM",
    "larger_eps_never_weaker": "a larger eps leaves no more right",
    "whitebox_beats_transfer": "what withstands PGD does not fall to examples made for the plain network",
    "gradient_free_weaker": "nor to Square, which uses no gradient",
    "no_zero_gradients": "the gradient is nowhere exactly 0",
    "more_steps_never_weaker": "many more steps leave no more right",
    "converged": "nor many fewer: the steps are enough",
    "large_eps_breaks_all": "where any image may become grey, nothing is left",
    "undefended_breaks": "the same attack breaks the plain network",
    "attack_unit_test": "an adversarial example that is there is found",
}


def checks(summary: pd.DataFrame) -> pd.DataFrame:
    """One line a check: in how many runs of all arms it passed, and the arms in which it did not always."""
    rows = summary[(summary["scenario"] == "check") & ~summary["metric"].isin(UNITS)]
    lines = []
    for name, part in rows.groupby("metric", sort=False):
        passed = (part["value"] * part["n"]).round().astype(int)
        failing = [
            f"`{variant}`, {k} of {n}"
            for variant, k, n in zip(part["variant"], passed, part["n"], strict=True)
            if k < n
        ]
        lines.append(
            {
                "check": name.replace("_", " "),
                "it passes where": ASKED[name],
                "passed": f"{passed.sum()} of {part['n'].sum()} runs",
                "arms in which it failed": "; ".join(failing),
            }
        )
    return pd.DataFrame(lines)


def pointing(summary: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, float]]:
    """Pointing game on clean images, the arms in their order, and its controls (`figures.pointing`)."""
    rows = summary[(summary["scenario"] == "attribution") & (summary["eps"] == "")]
    names = {"area": "a point at random", "prior": "always where most lesions are"}
    controls = {names[row["map"]]: row["value"] for row in rows.to_dict("records") if row["map"] in names}
    order = {variant: place for place, variant in enumerate(ARMS)}
    found = rows[~rows["map"].isin(names)]
    return found.sort_values("variant", key=lambda column: column.map(order), kind="stable"), controls
