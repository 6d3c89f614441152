"""What is surprising in notebook 05's matrix, and what we make of it.

A cell is surprising where a defence does something that it was not made for, or does not do what it was made for
(`side_effects`). What we make of it is written here, by the kind of cell, because which cells turn out surprising differs
from cohort to cohort; `paragraphs` shows what applies, and says where we have no explanation.
"""

from dataclasses import dataclass

import pandas as pd

from experiments.threat_matrix.arms import ROWS
from experiments.threat_matrix.cells import COLUMNS, Column
from experiments.threat_matrix.params import MatrixParams
from experiments.threat_matrix.tables import ALIKE, BETTER, WORSE, grid
from medsec.evidence import tables

OWN = {  # the threats that a defence is made for; a difference in any other column is a side effect
    "server": {"boost_liar", "backdoor"},
    "images": {"adaptive"},
    "network": {"pgd20"},
}


@dataclass(frozen=True)
class Reading:
    """What we make of surprising cells of one kind.

    Attributes:
        rows: that it is about.
        cells: (scenario, metric) of their columns.
        judged: what the cells are beside no defence: `BETTER`, `WORSE` or `ALIKE`.
        text: sentences, with what they rest on; "may" where it is a guess.
    """

    rows: tuple[str, ...]
    cells: tuple[tuple[str, str], ...]
    judged: str
    text: str


USE = (("no_attack", "auc"), ("no_attack", "balanced_accuracy"))
FEW, MANY, COMPLIES = (((scenario, "attack_success"),) for scenario in ("backdoor", "boost_liar", "compliant"))
PSNR, IDENTIFIED = ((("adaptive", metric),) for metric in ("psnr", "retrieval"))
EVADED = (("pgd20", "balanced_accuracy"),)
ROBUST = ("at", "hardened", "shadow+at", "feddetect+shadow+at")
PRUNED = ("prune", "prune_cbam", "prune_random")
STAND_INS = ("shadow_hardened", "public_only", "feddetect+shadow", "shadow+at", "feddetect+shadow+at")
PIXELS = (
    "PSNR counts pixels, and a stand-in of the same class is about as near to the private image as what an attacker "
    "gets from a network in the middle of its training. Whose image it is (*identified*) is what stand-ins hide."
)
READINGS = (
    Reading(
        ROBUST,
        USE,
        WORSE,
        "Trained on adversarial examples, the network has learnt less in the same rounds. Robust training needs more "
        "images than plain training (Schmidt et al. 2018), and here it has few. Notebook 04 trains longer, on more, and "
        "loses little.",
    ),
    Reading(
        PRUNED,
        USE,
        WORSE,
        "Most weights go early, out of a network that has few, and what is left has to go on learning. Notebook 04 prunes "
        "a larger network after its training, and pays less.",
    ),
    Reading(
        ("shadow_released",),
        USE,
        WORSE,
        "The released mask is scrambled, so its noise lies everywhere, strong, in every round: the network learns from "
        "noisy images. The described defence, with less noise at aligned places, does not show this cost.",
    ),
    Reading(
        ("shadow_hardened", "public_only", "feddetect+shadow"),
        USE,
        WORSE,
        "The network learns from public images instead of the client's own, and from fewer different ones: several "
        "private images share a stand-in.",
    ),
    Reading(
        (*ROBUST, *PRUNED),
        FEW,
        BETTER,
        "A trigger that few images carry may sit in small weights, which pruning takes; where the row has lost AUC as "
        "well, it may just have learnt less of everything. It is no cure: where the attacker poisons more and boosts (the "
        "next column) the trigger is mostly planted as it is without a defence, unless the server finds it.",
    ),
    Reading(
        ("cbam",),
        FEW,
        WORSE,
        "Attention is a gate that opens at places, and a trigger is a pattern at one place: such a network may learn it "
        "from fewer images. It was not tested further, and the seeds are few.",
    ),
    Reading(
        ("shadow_released", "shadow_described", "shadow_hardened", "public_only", "feddetect+shadow"),
        FEW,
        BETTER,
        "The attacker, who leaves the defence out, stamps its images as before; what changes is what the others send "
        "against it. `public_only` shows whether the choice of the stand-ins has to do with it.",
    ),
    Reading(
        (*STAND_INS, "shadow_released", "hardened", "at"),
        COMPLIES,
        BETTER,
        "A client that runs the defence does not train on its stamped images as they are. Stand-ins replace them, so that "
        "only their wrong labels are left; adversarial examples and noise change them. That it complies is a strong "
        "assumption.",
    ),
    Reading(
        ("norm_clip",),
        FEW,
        BETTER,
        "A control that compares lengths only. The malicious client trains on stamped copies besides all its own images: it "
        "takes more steps, and its update may be the longest, so that the shortening is for it. What FedDetect wins beyond "
        "this row is not due to lengths.",
    ),
    Reading(
        ("feddetect_released", "feddetect_described"),
        MANY,
        ALIKE,
        "The check reads losses that the clients report, and this client reports what the honest ones do. As in notebook "
        "02.",
    ),
    Reading(
        ("feddetect_released",),
        FEW,
        ALIKE,
        "The released check weighs a client down each time that it flags it, and it flags honest ones too "
        "(notebook 02). Where another check of this column does stop the client, it can be told apart.",
    ),
    Reading(
        ("feddetect_described", "feddetect_hardened", "feddetect+shadow", "feddetect+shadow+at"),
        FEW,
        ALIKE,
        "A client that poisons a little and boosts nothing does little that is peculiar; and where the undefended attack "
        "itself succeeds now and then only, a few pairs do not make a clear difference.",
    ),
    Reading(
        ("feddetect_hardened", "feddetect+shadow", "feddetect+shadow+at"),
        MANY,
        ALIKE,
        "In at least one run the attacker was left out too late: what it had planted before the check acted, the honest "
        "rounds did not wash out.",
    ),
    Reading(
        ("shadow_released", "shadow_described"),
        (*PSNR, *IDENTIFIED),
        ALIKE,
        "The noise is added to the image, so the gradient is that of the noisy image, and that is what comes back: still "
        "the image of the same patient. As in notebook 03.",
    ),
    Reading(
        ("shadow_hardened", "feddetect+shadow", "shadow+at", "feddetect+shadow+at"),
        PSNR,
        ALIKE,
        PIXELS,
    ),
    Reading(("shadow_hardened", "feddetect+shadow", "shadow+at", "feddetect+shadow+at"), PSNR, WORSE, PIXELS),
    Reading(
        ("prune_random",),
        (*PSNR, *IDENTIFIED),
        WORSE,
        "The attacker leaves out the entries that are pruned. What is left comes from a network that has hardly learnt (it "
        "gives one answer: balanced accuracy 0.5), and such a gradient shows most (section 3).",
    ),
    Reading(
        ("prune_random",),
        EVADED,
        WORSE,
        "It always gives the same answer: a balanced accuracy of one half, attacked or not.",
    ),
    Reading(
        ("at", "hardened"),
        PSNR,
        WORSE,
        "A robust network's gradient shows more of the image; but so does that of any network that has learnt little. "
        "*Minus matched* in section 3 tells the two apart, as far as so few seeds can.",
    ),
    Reading(
        PRUNED,
        (*PSNR, *IDENTIFIED),
        BETTER,
        "A gradient with few entries says less. Where the random mask hides more than the one by magnitude, what hides is "
        "a network that answers nothing, not pruning.",
    ),
    Reading(
        ("public_only",),
        (*PSNR, *IDENTIFIED),
        BETTER,
        "A control, made for nothing: any public image hides the private one, since nothing of it is used. What a choice "
        "of stand-ins buys has to show in the use of the network (*nobody attacks*).",
    ),
    Reading(
        ("cbam",),
        (*PSNR, *IDENTIFIED),
        BETTER,
        "The two gates of attention make the gradient a rougher function of the image, which a search "
        "follows less well. An attacker with more restarts was not tried.",
    ),
    Reading(
        ("prune", "cbam", "prune_cbam"),
        EVADED,
        ALIKE,
        "Pruning and attention do not hinder somebody who computes the gradient through them. As in notebook 04.",
    ),
    Reading(
        ROBUST,
        EVADED,
        ALIKE,
        "What adversarial training wins under attack is not clear in these rows: the gain, or what lies above the one half "
        "of a constant answer, reaches into what does not matter. Short trainings scatter; notebook 04 trains longer, "
        "and its gain is clear.",
    ),
    Reading(
        ("prune", "cbam", "prune_cbam"),
        EVADED,
        WORSE,
        "Pruning and attention do not hinder somebody who computes the gradient through them; this network may fall "
        "sooner because it has learnt less, or other things.",
    ),
)
UNEXPLAINED = "We have no explanation; `none_again` shows what chance alone does."


def side_effects(summary: pd.DataFrame, p: MatrixParams) -> pd.DataFrame:
    """The surprising cells: a clear difference to no defence where a defence was not made to make one, or none where it was.

    Columns ``row, column, value, minus none, what, reading`` (what we make of it).
    """
    cells, lines = grid(summary, p), []
    for cell in cells[cells["value"].notna()].to_dict("records"):
        variant, column = cell["variant"], COLUMNS[cell["column"]]
        if variant == "none":
            continue
        own = column.scenario in made_for(variant)
        if (own and cell["judged"] == BETTER) or (not own and cell["judged"] == ALIKE):
            continue
        where = {"variant": variant, "scenario": column.scenario}
        lines.append(
            {
                "row": f"`{variant}`",
                "column": f"{column.threat.split(':')[0]}: {column.name}",
                "value": tables.cell(summary, 2, **where, metric=column.metric),
                "minus none": tables.cell(summary, 2, **where, metric=f"{column.metric}_minus_none"),
                "what": f"made for it, and {'worse' if cell['judged'] == WORSE else 'not clearly better'}"
                if own
                else f"not made for it, and {cell['judged']}",
                "reading": reading(variant, column, cell["judged"]),
            }
        )
    return pd.DataFrame(lines, columns=["row", "column", "value", "minus none", "what", "reading"])


def made_for(variant: str) -> set[str]:
    """The scenarios that a row's parts are made for; none for a control."""
    row = ROWS[variant]
    if "control" in row.title:
        return set()
    network = row.trained_against or row.prune != "no" or row.cbam
    parts = {"server": row.server != "mean", "images": row.images != "none", "network": network}
    return set().union(*(OWN[part] for part, there in parts.items() if there))


def reading(variant: str, column: Column, judged: str) -> str:
    """What we make of a surprising cell: the first of `READINGS` that is about it."""
    for each in READINGS:
        if variant in each.rows and (column.scenario, column.metric) in each.cells and judged == each.judged:
            return each.text
    return UNEXPLAINED


def paragraphs(odd: pd.DataFrame) -> str:
    """Markdown: a paragraph for the cells of `side_effects` that we read alike, which it names with their values."""
    found = []
    for text, cells in odd.groupby("reading", sort=False):
        named = "; ".join(
            f"{c['row']}, {c['column']}: {c['value']} (minus none {c['minus none']}; {c['what']})"
            for c in cells.to_dict("records")
        )
        found.append(f"**{named}.** {text}")
    return "\n\n".join(found) or "None."
