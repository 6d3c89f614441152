"""Transferred examples, told apart by f₀, the undefended network that they were made for: key column ``f0``.

Examples that a network resists may only have been made for one that is not its kin. With f₀ of the same seed (the same initial
weights, ``f0`` empty or ``same_seed``) they tell how much of an arm's weights is still f₀'s. With an f₀ that was trained from
another seed (``other_seeds``, the mean over several), or has another architecture (``other_architecture``), any network resists
many of them, the undefended ``base`` too. That one is therefore in every table: it is the control that has no method.

``pgd20`` and ``deepfool_capped`` were not made to transfer; ``mi_di_fgsm`` is (`medsec.evasion.attacks.mi_fgsm`), and most of all
where it raises the mean loss of several networks of other seeds (``ensemble``). Rows of the variant ``surrogate`` say what the
examples leave of f₀'s own right answers: an attack must break what it was made for.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from experiments.adversarial_pruning_defense import arms as evasion_arms
from experiments.adversarial_pruning_defense.arms import Setup
from experiments.params import Params
from medsec.core.seeds import derive_seed
from medsec.evasion.attacks import mi_fgsm
from medsec.evasion.scenarios import craft, eps_key
from medsec.evidence import tables
from medsec.evidence.cells import Cell
from medsec.nets import fit as classifier

KEYS = ("eps", "norm", "prune", "map", "f0")
MADE = "mi_di_fgsm"  # made to transfer
UNMADE = ("pgd20", "deepfool_capped")
INDEPENDENT = "other_seeds"
F0 = {  # what the key column says, in words
    "same_seed": "same seed",
    "other_seeds": "other seeds",
    "other_architecture": "other architecture",
    "ensemble": "several of other seeds",
}


def rates(f: Mapping[str, np.ndarray], f0: Mapping[str, np.ndarray] | None = None) -> dict[str, float]:
    """The three defence rates from outcomes (N,) bool, right or wrong.

    Args:
        f: of the arm: ``clean``, ``own`` (examples made for it), ``transfer`` (made for f₀); what is missing is left out.
        f0: of the undefended model: ``clean`` and ``own``, on the same examples.

    Returns:
        Without a rate whose denominator is 0.
    """
    shares = {}
    for rate, key in (("dr_whitebox", "own"), ("dr_transfer", "transfer")):
        if key in f and f["clean"].any():
            shares[rate] = float(f[key][f["clean"]].mean())
    if f0 is not None and "transfer" in f:
        turned = f0["clean"] & ~f0["own"]
        if turned.any():
            shares["dr_recovered"] = float(f["transfer"][turned].mean())
    return shares


def plan(p: Params, variants: Sequence[str], dear: Sequence[str] = ()) -> list[Cell]:
    """One cell a seed, for all arms together: the examples are made once.

    Args:
        variants: the arms.
        dear: further arms, of those seeds only of which the repository holds the networks (``evasion.checkpoint_seeds``).
    """
    chosen, found = p.transfer.model_dump(), []
    for seed in p.seeds.evaluation:
        arms = (*variants, *(dear if seed in p.evasion.checkpoint_seeds else ()))
        given = {"transfer": chosen, "others": others(p, seed)} | evasion_arms.section_of(p, arms)
        found.append(Cell("transfer", seed, variants=arms, given=given))
    return found


def others(p: Params, seed: int) -> list[int]:
    """Seeds of the independent f₀ for the arms of a seed: the evaluation seeds that follow, cyclic; then the tuning seeds."""
    listed = p.seeds.evaluation
    at = listed.index(seed)
    return [*listed[at + 1 :], *listed[:at], *p.seeds.tuning][: p.transfer.networks]


def transfer_cell(cohort: str, params: Params, cell: Cell) -> pd.DataFrame:
    """All arms of one seed on examples made for other networks, at the headline's eps."""
    torch.set_num_threads(1)
    setup, own = evasion_arms.prepare(cohort, params), cell.given["transfer"]
    x, y = setup.splits["test"]
    arms = {variant: evasion_arms.network(setup, variant, cell.seed) for variant in cell.variants}
    clean = {variant: right(model, x, y) for variant, model in arms.items()}
    found: dict[tuple, list[float]] = {}  # (variant, scenario, metric, f0) -> by surrogate
    for f0, surrogates in networks(setup, cell):
        before = [right(network, x, y) for network in surrogates]
        for scenario, x_adv in examples(setup, f0, surrogates, own, cell.seed):
            after = [right(network, x_adv, y) for network in surrogates]
            kept = [rates({"clean": b, "own": a})["dr_whitebox"] for b, a in zip(before, after, strict=True)]
            found.setdefault(("surrogate", scenario, "dr_whitebox", f0), []).append(float(np.mean(kept)))
            only = {"clean": before[0], "own": after[0]} if len(surrogates) == 1 else None
            for variant, model in arms.items():
                values = rates({"clean": clean[variant], "transfer": right(model, x_adv, y)}, only)
                for metric, value in values.items():
                    found.setdefault((variant, scenario, metric, f0), []).append(value)
    rows = [
        tables.run_row(KEYS, cell.seed, variant, scenario, metric, np.mean(values), len(y), eps=told(params), f0=f0)
        for (variant, scenario, metric, f0), values in found.items()
    ]
    return pd.DataFrame(rows)


def told(p: Params) -> str:
    """The headline's eps as it stands in a table."""
    return eps_key(p.evasion.eps / 255)


def right(model: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    """(N,) bool, which images a model classifies rightly."""
    return (classifier.predict(model, x).argmax(1) == y).numpy()


def networks(setup: Setup, cell: Cell) -> Iterator[tuple[str, list[nn.Module]]]:
    """Every f₀: its kind, and the networks whose mean loss is raised."""
    independent = [evasion_arms.network(setup, "base", seed) for seed in cell.given["others"]]
    yield "same_seed", [evasion_arms.network(setup, "base", cell.seed)]
    for network in independent:
        yield INDEPENDENT, [network]
    if width := cell.given["transfer"]["other_width"]:
        yield "other_architecture", [evasion_arms.convnet_of(setup, cell.seed, width)]
    if len(independent) > 1:
        yield "ensemble", independent


def examples(
    setup: Setup, f0: str, surrogates: Sequence[nn.Module], own: dict, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Scenario and examples (N, C, S, S); PGD's and DeepFool's for f₀ of the same seed are in every arm's own cell."""
    p, (x, y) = setup.params.evasion, setup.splits["test"]
    eps = p.eps / 255
    if f0 in (INDEPENDENT, "other_architecture"):
        for scenario in UNMADE:
            yield scenario, craft(scenario, surrogates[0], x, y, eps, p.attacks, seed, stop=False)
    rng = torch.Generator().manual_seed(derive_seed(seed, MADE, f0))
    attack = partial(mi_fgsm, steps=own["steps"], decay=own["decay"], diverse=own["diverse"], smallest=own["smallest"])
    yield MADE, attack(nn.ModuleList(surrogates), x, y, eps, rng)


# Tables ---------------------------------------------------------------------------------------------------------------


def keyed(runs: pd.DataFrame) -> pd.DataFrame:
    """A runs table with all key columns: rows of cells that do not tell networks apart have no ``f0``."""
    return runs.assign(f0=runs["f0"].fillna("") if "f0" in runs else "")


def paired(runs: pd.DataFrame) -> pd.DataFrame:
    """``dr_transfer_minus_base``: an arm less the undefended network of its seed, on the same examples."""
    rows = runs[(runs["f0"] != "") & (runs["metric"] == "dr_transfer")]
    is_base = rows["variant"] == "base"
    return tables.minus(rows[~is_base], rows[is_base], ["scenario", "eps", "f0"], "base")
