"""The figures of notebook 99, in the style of `medsec.show.plots`."""

import matplotlib.pyplot as plt
import pandas as pd

from medsec.evidence.claims import HOLDS, UNTESTED
from medsec.evidence.ledger import CODES
from medsec.show.plots import WIDTH

LOOKS = {  # of a verdict: colour, marker, how it is filled, what the legend says
    1: ("#0072B2", "o", "full", "holds"),
    0: ("#666666", "_", "full", "undecided"),
    -1: ("#D55E00", "x", "full", "does not hold"),
    2: ("#666666", "o", "none", "untested"),
}
ANSWERS = {1: "yes", 0: "not decided", -1: "no", 2: "untested: nothing to stop, or nothing learnt"}

# Three threats, their defences, and three questions: the claim that answers each, and whether it is good news where it holds.
# (A transfer rate alone proves nothing: asked is what it is beside that of a network without a defence.)
QUESTIONS = ("Does it stop the attack?", "And one who knows it?", "Harmless without attack?")
HERO = {
    "Backdoor in a federated GAN": {
        "FedDetect, as released": (
            ("1-fedgan-defence", "released-blocks", True),
            ("1-fedgan-defence", "released-liar", False),
            ("1-fedgan-defence", "released-false-alarms", False),
        ),
        "FedDetect, repaired": (
            ("1-fedgan-defence", "hardened-stops-boost_liar", True),
            ("1-fedgan-defence", "hardened-stops-aware", True),
            ("1-fedgan-defence", "hardened-false-alarms", True),
        ),
        "Multi-Krum (no detector)": (("1-fedgan-defence", "multi-krum-stops-boost_liar", True), None, None),
    },
    "Images out of gradients": {
        "shadow noise, as released": (
            ("2-shadow", "released-psnr", True),
            ("2-shadow", "released-private", True),
            ("2-shadow", "released-f1", True),
        ),
        "public stand-ins (repaired)": (
            ("2-shadow", "hardened-psnr", True),
            ("2-shadow", "hardened-fingerprint", True),
            ("2-shadow", "hardened-utility", True),
        ),
    },
    "Adversarial examples": {
        "pruning and attention": (
            ("3-pruning", "undefended-transfer", False),
            ("3-pruning", "pgd-whitebox", True),
            None,
        ),
        "trained against the attack": (
            None,
            ("3-pruning", "hardened-autoattack", True),
            ("3-pruning", "hardened-cost", True),
        ),
    },
}


COHORTS = {"phantom": "drawn X-rays", "pneumoniamnist": "real X-rays", "fundus": "drawn eyes"}


def hero(rows: pd.DataFrame):
    """Three threats × defences × questions: a sign for each cohort, yes, no, not decided or untested; empty where nobody asked.

    Args:
        rows: of `medsec.evidence.ledger.rows`.
    """
    values = rows.set_index(["variant", "claim", "scenario"])["value"]
    lines = sum(len(named) for named in HERO.values()) + len(HERO)
    fig, ax = plt.subplots(figsize=(WIDTH, 0.3 * lines + 1.4), layout="constrained")
    y, ticks, aware = 0, {}, []
    for threat, named in HERO.items():
        ax.text(-0.42, y, threat, transform=ax.get_yaxis_transform(), weight="bold", va="center", fontsize=9)
        for name, asked in named.items():
            y += 1
            ticks[y] = name
            codes = [_codes(values, cell) for cell in asked]
            aware.append(set(codes[1].values()) - {CODES[UNTESTED]})
            for column, of_cohort in enumerate(codes):
                for cohort, code in of_cohort.items():
                    colour, marker, fill, _ = LOOKS[code]
                    style = {"markersize": 7, "markeredgewidth": 2, "fillstyle": fill, "linestyle": "none"}
                    ax.plot(_place(column, cohort), y, marker, color=colour, label=ANSWERS[code], **style)
        y += 1
    for column in range(len(QUESTIONS)):
        ax.axvspan(column - 0.46, column + 0.46, color="0.96", zorder=0)
        for cohort, text in COHORTS.items():
            ax.text(_place(column, cohort), y - 0.5, text.replace(" ", "\n"), ha="center", va="top", fontsize=7)
    ax.set(xticks=range(len(QUESTIONS)), xticklabels=QUESTIONS, yticks=list(ticks), yticklabels=list(ticks.values()))
    ax.set(xlim=(-0.5, len(QUESTIONS) - 0.5), ylim=(y + 0.6, -0.6))
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.grid(visible=False)
    aware = [signs for signs in aware if signs]
    held = sum(signs == {CODES[HOLDS]} for signs in aware)
    title = f"{held} of {len(aware)} defences: so many hold, on all images, against somebody who knows them"
    fig.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=10)
    handles = {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    return fig, ax


def _place(column: int, cohort: str) -> float:
    return column + 0.25 * (list(COHORTS).index(cohort) - 1)


def _codes(values: pd.Series, cell: tuple[str, str, bool] | None) -> dict[str, int]:
    """By cohort the verdict's code, turned where the claim is bad news; nothing where nobody asked."""
    if cell is None:
        return {}
    ledger, claim, good = cell
    there = {
        cohort: int(values[ledger, claim, cohort]) for cohort in COHORTS if (ledger, claim, cohort) in values.index
    }
    return {cohort: code if good or code == CODES[UNTESTED] else -code for cohort, code in there.items()}


def grid(rows: pd.DataFrame, title: str):
    """Verdicts: claims down, under the names of their ledgers, cohorts across; empty where a cohort cannot test a claim.

    Args:
        rows: of `medsec.evidence.ledger.rows`, in the order of the figure.
        title: of the figure.
    """
    assert set(LOOKS) == set(CODES.values())
    rows = rows.assign(name=rows["variant"] + ": " + rows["claim"])
    names, cohorts = (list(dict.fromkeys(rows[column])) for column in ("name", "scenario"))
    fig, ax = plt.subplots(figsize=(WIDTH, 0.2 * len(names) + 1.3), layout="constrained")
    for code, (colour, marker, fill, label) in LOOKS.items():
        mine = rows[rows["value"] == code]
        x, y = ([order.index(v) for v in mine[column]] for order, column in ((cohorts, "scenario"), (names, "name")))
        size = {"markersize": 6, "markeredgewidth": 1.8, "fillstyle": fill}
        ax.plot(x, y, marker, color=colour, linestyle="none", label=label, **size)
    ledgers = [name.partition(":")[0] for name in names]
    for k in range(1, len(names)):
        if ledgers[k] != ledgers[k - 1]:
            ax.axhline(k - 0.5, color="0.8", linewidth=0.8)
    ax.set(xticks=range(len(cohorts)), xticklabels=cohorts, yticks=range(len(names)), yticklabels=names)
    ax.set(xlim=(-0.5, len(cohorts) - 0.5), ylim=(len(names) - 0.5, -0.5))
    ax.tick_params(axis="y", labelsize=7)
    fig.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=10)
    fig.legend(loc="outside lower center", ncols=4)
    return fig, ax
