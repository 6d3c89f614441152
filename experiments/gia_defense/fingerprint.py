"""The attack `fingerprint` of notebook 03: whose gradient is it, of all clients' images (`medsec.inversion.fingerprint`).

Every defence meets the comparison that is made for it, chosen on the tuning seeds:

* the gradients of the candidates as they are; of one image each by itself, of a batch all together;
* Soteria: without the layer that it distorts; top-k: at the entries that were sent;
* stand-ins and drawings: the server knows the defence, the public images and *all images of the client* (not who is in the
  batch), and runs copies of the defence on them: candidates are the client's images only;
* ``public_only``, where a copy tells nothing: which public image it is, then the candidates that are most like it.

Rows have the scenario ``fingerprint``; ``attack``: empty for that comparison, ``match`` for the plain one (each candidate's
own gradient, by itself), ``like`` for stand-ins to an attacker who does not know the client's images. ``labels``: empty where
the server knows which labels are in the batch, else ``unknown``. The candidates' own labels are always known.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from experiments.gia_defense import adaptive as attackers
from experiments.gia_defense import clients as instruments
from experiments.gia_defense.clients import DRAWINGS, STAND_INS, Client
from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed, torch_generator
from medsec.core.seeds import fingerprint as content
from medsec.evidence import cells
from medsec.federated import classifier as fedcls
from medsec.inversion import fingerprint
from medsec.inversion.fingerprint import Gallery
from medsec.nets import convnet

Run = Any  # `experiments.gia_defense.cells.Run`, which cannot be imported here: that module imports this one

SCENARIO, LATER = "fingerprint", "fingerprint_later"  # arms, the first also the scenario of both
COPIED = (*STAND_INS, *DRAWINGS)
DISTORTED = {"soteria": "head.weight"}
SPECIAL = (
    *COPIED,
    *DISTORTED,
    "topk",
    "public_only",
)  # what `Server.made_for_it` does not meet with the plain comparison
FPR = 0.01  # of the membership test


@dataclass(frozen=True)
class Candidates:
    """All clients' images (or the first of each): ``images`` (N, …), ``labels`` (N,), ``own`` (N,) whether the client's."""

    images: Tensor
    labels: Tensor
    own: Tensor

    def possible(self, labels: Tensor) -> Tensor:
        """(V, N) the candidates whose class is in the batch; labels (V, B)."""
        return (self.labels[None, None] == labels[:, :, None]).any(1)


def candidates(run: Run, n: int | None) -> Candidates:
    """At most ``n`` in all, as many of each client; of the first client in the order in which `victims` are drawn."""
    each = [len(x) if n is None else min(len(x), max(1, n // len(run.images))) for x in run.images]
    chosen = [
        torch.randperm(len(x), generator=torch_generator(run.seed, "victims"))[:most]
        for x, most in zip(run.images, each, strict=True)
    ]
    images, labels = (
        torch.cat([part[at] for part, at in zip(parts, chosen, strict=True)]) for parts in (run.images, run.labels)
    )
    own = torch.arange(len(images)) < each[0]
    return Candidates(images, labels, own)


def cell(run: Run, cell: cells.Cell) -> pd.DataFrame:
    """One seed of one defence; ``cell.given``: section ``fingerprint`` of the parameters, and ``shares`` of the rounds.

    Without ``shares`` the untrained network; with them the network after so many of the rounds, trained with the defence.
    """
    given, model = cell.given, instruments.network(run.setup, run.seed)
    keys = {key: f"{value:g}" for key, value in cell.keys.items()}
    if "shares" not in given:
        return _measured(run, model, None, 0, given, keys)
    p, own = run.setup.params.inversion.federation, run.clients()
    states = fedcls.train(model, run.images, run.labels, [c.defend for c in own], p, run.seed)
    parts = []
    for share in given["shares"]:
        round = int(share * p.rounds + 0.5)
        model.load_state_dict(states[round])
        parts.append(_measured(run, model, own[0], round, given, keys | {"round": f"{share:g}"}))
    return pd.concat(parts, ignore_index=True)


def _measured(run: Run, model: nn.Module, own: Client | None, round: int, given: dict, keys: dict) -> pd.DataFrame:
    """``own``: the client as it is in that round; None: a fresh one for every batch size."""
    rows, found = run.rows(SCENARIO), candidates(run, given["gallery"])
    server = Server(run, model, found, _gallery(run, model, found, shared=round == 0), given["copies"])
    for batch in given["batches"]:
        n = min(given["victims"], int(found.own.sum())) // batch
        if n < 1:
            raise InputError(
                f"a batch of {batch} images, but a client has {int(found.own.sum())}; lower fingerprint.batches"
            )
        index = attackers.victims(run.setup, run.images[0], n, batch, run.seed)
        case = dataclasses.replace(run, index=index).case(model, round, own)
        seen, members = fingerprint.received(model, case.view.gradients), torch.arange(n * batch).view(n, batch)
        where, possible = keys | ({"batch": str(batch)} if batch > 1 else {}), found.possible(case.y)
        scores, among = server.made_for_it(seen, case.y)
        among = among.expand_as(scores)
        _add(rows, scores, members, among & possible, where)
        if batch == 1 and round == 0:
            _add(rows, scores, members, among, where | {"labels": "unknown"})
        if run.variant in SPECIAL or batch > 1:
            _add(rows, server.plain.match(seen), members, possible, where | {"attack": "match"})
        if run.variant in STAND_INS:
            _add(rows, server.like(seen, case.y), members, possible, where | {"attack": "like"})
    return rows.table()


def _add(rows, scores: Tensor, members: Tensor, possible: Tensor, where: dict) -> None:
    n = members.numel()
    rows.add("candidates", float(possible.sum(1).double().mean()), n, **where)
    for most in (1, 10):
        value = fingerprint.identified(scores, members, possible, most).mean()
        rows.add(f"identified_top{most}", value, n, **where)
    if "attack" in where or "labels" in where:
        return
    area, rate = fingerprint.membership(scores, members, possible, FPR)
    rows.add("membership_auc", area.mean(), n, **where)
    rows.add("membership_tpr", rate.mean(), n, **where)


# The comparisons -----------------------------------------------------------------------------------------------------


def _gallery(run: Run, model: nn.Module, found: Candidates, shared: bool) -> Gallery:
    """The candidates' gradients; on the untrained network the same for all defences of a seed."""
    key = f"fingerprint {content(convnet.flat(list(model.parameters())))} {content(found.images)}"
    if shared and key in cells.SHARED:
        return cells.SHARED[key]
    made = Gallery(fingerprint.each_gradient(model, found.images, found.labels))
    if shared:
        cells.SHARED[key] = made
    return made


def _alike(gallery: Gallery, seen: Tensor, batch: int, sent_only: bool = False) -> Tensor:
    return gallery.match(seen, sent_only) if batch == 1 else gallery.joint(seen, batch, sent_only)


@dataclass(frozen=True, eq=False)
class Server:
    """What the attacker has: the candidates, their gradients ``plain``, and some ``copies`` of the defence."""

    run: Run
    model: nn.Module
    found: Candidates
    plain: Gallery
    copies: int

    def made_for_it(self, seen: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(V, N) scores by the comparison that is made for the defence, and (N,) the candidates that come into question."""
        variant, batch, everybody = self.run.variant, y.shape[1], torch.ones_like(self.found.own)
        if variant in DISTORTED:
            sizes = {name: p.numel() for name, p in self.model.named_parameters()}
            kept = torch.cat([torch.full((n,), name != DISTORTED[variant]) for name, n in sizes.items()])
            return _alike(Gallery(self.plain.rows[:, kept]), seen[:, kept], batch), everybody
        if variant in COPIED:
            return self.copied(seen, batch), self.found.own
        if variant == "public_only":
            return self.like(seen, y), everybody
        return _alike(self.plain, seen, batch, sent_only=variant == "topk"), everybody

    def copied(self, seen: Tensor, batch: int) -> Tensor:
        """(V, N): the best over the copies of the defence; 0 for candidates that are not the client's."""
        scores = torch.zeros(len(seen), len(self.found.images))
        scores[:, self.found.own] = torch.stack([_alike(each, seen, batch) for each in self.galleries]).amax(0)
        return scores

    @functools.cached_property
    def galleries(self) -> list[Gallery]:
        """The gradients of what copies with other seeds make of the client's candidates."""
        run, own, made = self.run, self.found.own, []
        x, y = self.found.images[own], self.found.labels[own]
        for number in range(1 if run.variant in DRAWINGS else self.copies):  # (drawings are all alike)
            seed = derive_seed(run.seed, "attacker's copy", number)
            perturb = instruments.client(run.variant, run.setup, run.images[0], run.labels[0], seed).perturb
            made.append(Gallery(fingerprint.each_gradient(self.model, perturb(self.model, x, y, 0), y)))
        return made

    def like(self, seen: Tensor, y: Tensor) -> Tensor:
        """(V, N): how near a candidate is, in the generator's latent space, to the public images whose gradient was sent."""
        setup, batch = self.run.setup, y.shape[1]
        images, labels = setup.splits["public"]
        alike = _alike(self.public, seen, batch)
        alike = alike.masked_fill(~(labels[None, None] == y[:, :, None]).any(1), -torch.inf)
        used = alike.topk(min(batch, len(images)), 1).indices
        z, public = instruments.latents(setup, self.found.images), instruments.latents(setup, images)
        return torch.stack([-torch.cdist(z, public[at]).amin(1) for at in used])

    @functools.cached_property
    def public(self) -> Gallery:
        return Gallery(fingerprint.each_gradient(self.model, *self.run.setup.splits["public"]))


def plan(variant: str, seed: int, given: dict, *, change: dict | None = None, keys: dict | None = None) -> cells.Cell:
    """One cell; what it is given stands in its identity, and in that of no other cell of notebook 03."""
    arm = LATER if "shares" in given else SCENARIO
    return cells.Cell(arm, seed, change or {}, keys or {}, variants=(variant,), group=variant, given=given)


def family(cell: cells.Cell) -> str:
    """Defences of a seed share the candidates' gradients, with a dishonest server's sums too."""
    return f"{SCENARIO} {cell.seed}" if cell.arm in (SCENARIO, "imprint") else ""
