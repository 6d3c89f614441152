"""The dishonest server of notebook 03, and what a client can notice (`medsec.inversion.imprint`).

Scenario ``imprint``: one client's gradients on the network that such a server sends. ``secagg``: the server sees only the sum
of all clients' gradients. A defence works as it is. Images are recovered by quotients of neighbouring rows; the bins in which
most was received count, as many as images were sent, so that a server could do it. ``identified_top1``: it names as many
candidates as images, of all clients' images: those that the recovered ones are most like, under noise on the gradient
(`NOISY`) those of which most is in their own bin. It is tuned to no other defence: what it does not get, another attack may.

Key ``attack``: empty for the imprint. Without a defence there are also ``trap``, rows that are not parallel; ``drawn``, the
same layer with weights as they are usually drawn, which an honest federation may have agreed on; and ``agreed``, the network
without it. Of ``trap`` and ``drawn`` every row is tried, and the best for each image counts: no server could choose better.
``round``: those that are honest, after training. In ``secagg``, ``fingerprint``: gradients compared on the agreed network,
what an honest architecture gives away; for stand-ins and drawings with the images' own gradients.

Metrics: ``recovered`` (share of the images with 30 dB or more), ``psnr_median``, ``identified_top1``, ``candidates``. Of the
largest batch ``alarm``, the share of batches of which the client finds an image in the gradient that it is about to send
(`echoes` beyond ``bound``), and ``alarm_false``, the share found of other images, which are not in the batch. ``rows_alarm``,
whether the look at the network finds parallel rows where the layer itself was agreed on, so that no shape is odd;
``rows_parallel``, how parallel they are.
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from experiments.gia_defense import clients as instruments
from experiments.gia_defense import fingerprint as fingerprints
from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed
from medsec.evidence import cells, tables
from medsec.federated import classifier as fedcls
from medsec.inversion import fingerprint, imprint
from medsec.inversion import scores as reconstruction
from medsec.inversion.imprint import Imprint
from medsec.nets.convnet import ConvNet

Run = fingerprints.Run

SCENARIO, SUMMED = "imprint", "secagg"  # the first also the arm of both
ENOUGH = 30.0  # dB, from which on an image counts as recovered
NOISY = ("gradient_noise", "dp_sgd")
OTHERS = ("trap", "drawn", "agreed")
HELD, HALF = 0.05, 0.5  # shares recovered below which a defence holds, and above which the batch does not protect


def cell(run: Run, cell: cells.Cell) -> pd.DataFrame:
    """One seed of one defence; ``cell.given``: section ``imprint`` of the parameters."""
    given, public = cell.given, run.setup.splits["public"][0]
    agreed, found = instruments.network(run.setup, run.seed), fingerprints.candidates(run, given["gallery"])
    layer = imprint.brightness(public, given["bins"])
    sent = imprint.in_front(agreed, *layer, given["gain"] / given["bins"])
    keys = {key: f"{value:g}" for key, value in cell.keys.items()}
    rows, summed = run.rows(SCENARIO), run.rows(SUMMED)
    _check_model(rows, sent, given, keys)
    largest = max(given["batches"])
    for batch in given["batches"]:
        where = keys | _batch(batch)
        bound = given["bound"] if batch == largest else None
        _attack(rows, run, sent, found, [_members(run, given, batch, 0)], bound, where)
    members = [_members(run, given, largest, client) for client in range(len(run.images))]
    _attack(summed, run, sent, found, members, None, keys | _batch(largest))
    _compare(summed, run, agreed, found, members, keys | _batch(largest))
    if run.variant == "none" and not keys:
        _others(rows, run, agreed, found, given)
    return pd.concat([rows.table(), summed.table()], ignore_index=True)


def _batch(batch: int) -> dict[str, str]:
    return {"batch": str(batch)} if batch > 1 else {}


def _members(run: Run, given: dict, batch: int, client: int) -> Tensor:
    """(V, B) places among the candidates of a client's images, of all clients the same number."""
    most = max(1, given["gallery"] // len(run.images))  # as `candidates` has them
    sizes = [min(len(part), most) for part in run.images]
    n = min(given["victims"], *sizes) // batch
    if n < 1:
        raise InputError(f"a batch of {batch} images, but a client has {min(sizes)}; lower imprint.batches")
    return sum(sizes[:client]) + torch.arange(n * batch).view(n, batch)


def _attack(rows, run: Run, sent: ConvNet, found, members: list[Tensor], bound: float | None, where: dict) -> None:
    """What the server recovers of each batch, or of the sum of one batch of each client; ``members`` one (V, B) a client.

    ``bound``: where the client looks at its gradients.
    """
    own, layer, shape = run.clients(), sent.body[0], tuple(found.images.shape[1:])
    together = torch.cat(members, 1)
    psnr, hits, alarms = [], [], []
    for v, all_of_them in enumerate(together):
        total = None
        for client, part in zip(own, members, strict=False):
            x, y = found.images[part[v]], found.labels[part[v]]
            gradient = client.defend(sent, x, y, 0)
            if bound is not None:
                alarms.append(alarm(sent, gradient, found, part[v], bound))
            weight_bias = gradient[:2]
            total = weight_bias if total is None else [a + b for a, b in zip(total, weight_bias, strict=True)]
        parts, shares = imprint.bins(*total)
        top = imprint.strongest(parts, len(all_of_them))
        recovered = imprint.images(parts[top], shares[top], shape).numpy()
        truth = found.images[all_of_them].numpy()
        psnr.append(reconstruction.psnr(reconstruction.match(recovered, truth), truth))
        if run.variant in NOISY:
            names = imprint.expected(parts, layer, found.images, len(top))
        else:
            names = imprint.named(parts[top], found.images)
        hits.append(torch.isin(all_of_them, names).numpy())
    _add(rows, np.concatenate(psnr), where)
    rows.add("identified_top1", float(np.concatenate(hits).mean()), together.numel(), **where)
    rows.add("candidates", len(found.images), together.numel(), **where)
    _add_alarms(rows, alarms, where)


def alarm(network: ConvNet, gradient: list[Tensor], found, at: Tensor, bound: float) -> tuple[float, float]:
    """Whether the first client finds an image of its batch ``at`` (B,) in its gradient; the share of as many others found."""
    absent = (at + len(at)) % int(found.own.sum())
    absent = absent[~torch.isin(absent, at)]
    echoes = imprint.echoes(network, gradient, found.images[torch.cat([at, absent])]) > bound
    return float(echoes[: len(at)].any()), float(echoes[len(at) :].float().mean()) if len(absent) else 0.0


def _add_alarms(rows, alarms: list[tuple[float, float]], where: dict) -> None:
    if alarms:
        rows.add("alarm", float(np.mean([raised for raised, _ in alarms])), len(alarms), **where)
        rows.add("alarm_false", float(np.mean([wrong for _, wrong in alarms])), len(alarms), **where)


def _add(rows, psnr: np.ndarray, where: dict) -> None:
    rows.add("recovered", float((psnr >= ENOUGH).mean()), len(psnr), **where)
    rows.add("psnr_median", float(np.median(psnr)), len(psnr), **where)


def _compare(rows, run: Run, agreed: ConvNet, found, members: list[Tensor], where: dict) -> None:
    """The fingerprint of the clients' sum on the agreed network: candidates are all images whose class is in the sum."""
    own, together = run.clients(), torch.cat(members, 1)
    sums = []
    for v in range(len(together)):
        parts = [c.defend(agreed, found.images[m[v]], found.labels[m[v]], 0) for c, m in zip(own, members, strict=True)]
        sums.append([torch.stack(each).mean(0) for each in zip(*parts, strict=True)])
    seen = fingerprint.received(agreed, [torch.stack(each) for each in zip(*sums, strict=True)])
    gallery = fingerprints._gallery(run, agreed, found, shared=True)
    if hidden := fingerprints.DISTORTED.get(run.variant):
        kept = torch.cat([torch.full((p.numel(),), name != hidden) for name, p in agreed.named_parameters()])
        gallery, seen = fingerprint.Gallery(gallery.rows[:, kept]), seen[:, kept]
    scores = gallery.joint(seen, together.shape[1], sent_only=run.variant == "topk")
    possible = found.possible(found.labels[together])
    value = fingerprint.identified(scores, together, possible, 1).mean()
    rows.add("identified_top1", float(value), together.numel(), **where, attack="fingerprint")
    rows.add("candidates", float(possible.sum(1).double().mean()), together.numel(), **where, attack="fingerprint")


# Without a defence: another attacker, and networks that are honest ----------------------------------------------------


def _others(rows, run: Run, agreed: ConvNet, found, given: dict) -> None:
    public, gain, n = run.setup.splits["public"][0], given["gain"] / given["bins"], given["bins"]
    trap = imprint.traps(public, n, 1 / max(given["batches"]), derive_seed(run.seed, "traps"))
    drawn = torch.nn.Linear(public[0].numel(), n)  # as the library draws it ...
    with torch.no_grad():  # ... from a stream of its own
        for p in drawn.parameters():
            reach = public[0].numel() ** -0.5
            p.uniform_(-reach, reach, generator=torch.Generator().manual_seed(derive_seed(run.seed, "drawn")))
    networks = {
        "trap": imprint.in_front(agreed, *trap, gain),
        "drawn": imprint.in_front(agreed, drawn.weight.detach(), drawn.bias.detach(), gain),
        "agreed": agreed,
    }
    p = run.setup.params.inversion.federation.model_copy(update={"rounds": given["rounds"]})
    for name, network in networks.items():
        _look(rows, run, network, found, given, {"attack": name})
        if name == "trap":
            continue
        states = fedcls.train(network, run.images, run.labels, [c.defend for c in run.clients()], p, run.seed)
        network.load_state_dict(states[-1])
        _look(rows, run, network, found, given, {"attack": name, "round": "1"})


def _look(rows, run: Run, network: ConvNet, found, given: dict, where: dict) -> None:
    """What the client sees of a network and its own gradients, and what there is to see: every row as an image."""
    _check_model(rows, network, given, where)
    (own, *_), shape = run.clients(), tuple(found.images.shape[1:])
    batch, psnr, alarms = max(given["batches"]), [], []
    members = _members(run, given, batch, 0)
    for at in members:
        x, y = found.images[at], found.labels[at]
        gradient = own.defend(network, x, y, 0)
        alarms.append(alarm(network, gradient, found, at, given["bound"]))
        psnr.append(best(network, gradient, x, shape))
    _add(rows, np.concatenate(psnr), where | _batch(batch))
    _add_alarms(rows, alarms, where | _batch(batch))


def best(network: ConvNet, gradient: list[Tensor], x: Tensor, shape: tuple[int, int, int]) -> np.ndarray:
    """(B,) PSNR of the best row or difference of neighbours for every image; grey where the network has no such layer."""
    if isinstance(network.body[0], Imprint):
        parts, shares = imprint.bins(*gradient[:2])
        parts, shares = torch.cat([parts, gradient[0].double()]), torch.cat([shares, gradient[1].double()])
    else:
        parts, shares = torch.zeros(1, x[0].numel(), dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    made = imprint.images(parts, shares, shape).flatten(1)
    errors = torch.stack([(made - image.flatten()).square().mean(1).min() for image in x])
    return (-10 * torch.log10(errors.clamp_min(1e-10))).numpy().astype(float)


def _check_model(rows, network: ConvNet, given: dict, where: dict) -> None:
    value = max(imprint.parallel(network).values())
    rows.add("rows_parallel", value, 1, **where)
    rows.add("rows_alarm", float(bool(imprint.oddities(network, network, given["bound"]))), 1, **where)


def plan(variant: str, seed: int, given: dict, *, change: dict | None = None, keys: dict | None = None) -> cells.Cell:
    """One cell; what it is given stands in its identity, and in that of no other cell of notebook 03."""
    return cells.Cell(SCENARIO, seed, change or {}, keys or {}, variants=(variant,), group=variant, given=given)


def lines(summary: pd.DataFrame, variants: tuple[str, ...]) -> pd.DataFrame:
    """One line a defence: what a dishonest server recovers and names, of one client and of the sum of all; empty without rows."""
    rows = summary[summary["scenario"] == SCENARIO]
    most = max(rows["batch"], key=lambda batch: int(batch or 0), default="")
    sizes = {batch: f"batch of {batch or 1}" for batch in dict.fromkeys(["", most])}
    columns = {
        f"recovered, {text}": (2, {"scenario": SCENARIO, "metric": "recovered", "batch": batch})
        for batch, text in sizes.items()
    }
    last = {"batch": most}
    columns |= {
        "named": (2, {"scenario": SCENARIO, "metric": "identified_top1", **last}),
        "of the clients' sum: recovered": (2, {"scenario": SUMMED, "metric": "recovered", **last}),
        "named ": (2, {"scenario": SUMMED, "metric": "identified_top1", **last}),
        "named, honest network": (
            2,
            {"scenario": SUMMED, "metric": "identified_top1", "attack": "fingerprint", **last},
        ),
        "client's alarm": (2, {"scenario": SCENARIO, "metric": "alarm", **last}),
    }
    present = [variant for variant in variants if variant in set(rows["variant"])]
    return tables.wide(summary, "defence", "variant", present, columns)


def told(summary: pd.DataFrame, variants: tuple[str, ...]) -> str:
    """What `lines` says, in words that follow from its rows; needs those of ``none``."""
    rows = summary[summary["scenario"] == SCENARIO]
    most = max(rows["batch"], key=lambda batch: int(batch or 0))

    def cell(**where: str) -> str:
        usual = {"variant": "none", "scenario": SCENARIO, "metric": "recovered", "batch": most}
        return tables.cell(summary, 2, **usual | where)

    held, lost = [], []
    for variant in variants:
        at = {"variant": variant, "scenario": SCENARIO, "metric": "recovered", "batch": most}
        for row in tables.select(summary, at).to_dict("records"):
            (held if row["high"] < HELD else lost).append(f"`{variant}`")
    plain = tables.row(summary, variant="none", scenario=SCENARIO, metric="recovered", batch=most)
    protects = "does not protect" if plain["low"] > HALF else "protects in part"
    return (
        f"Of a batch of {most} a dishonest server recovers **{cell()}** of the images, of the sum of all clients' gradients "
        f"{cell(scenario=SUMMED)}: against it **the batch size {protects}**, and secure aggregation alone is no answer "
        "either (without any such layer comparing gradients names "
        f"{cell(scenario=SUMMED, attack='fingerprint', metric='identified_top1')} from that sum). Recovered are less than "
        f"{100 * HELD:.0f} % under {', '.join(held) or 'none'}; not so under {', '.join(lost) or 'none'}. What helps besides: "
        "compare the network that came with the agreed one, and one's own gradient with one's own images. The latter is "
        f"alarmed in {cell(metric='alarm')} of the batches, by rows that are not parallel (trap weights) in "
        f"{cell(metric='alarm', attack='trap')}, by the agreed network in {cell(metric='alarm', attack='agreed')}. A first "
        "layer that sees the whole image is no good choice at all: with weights as drawn, of an honest server, "
        f"{cell(attack='drawn')} come back. The check sees copies only, not an image that was scrambled before."
    )
