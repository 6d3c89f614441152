"""Notebook 02, record only: every rule where hospitals differ, against attackers who know that very rule.

Clients whose images differ by nature are what robust rules fear most: honest updates lie far apart, and an attacker hides
between them. The server may own clean images here, the split ``public``: FLTrust measures updates by what it learns from
them, `feddetect.ClipThenTrain` trains the average on them. The control for both is `ONLY`, a server that never hears a client.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch

from experiments.backdoor_fedgan import cells as fedgan_eval
from experiments.backdoor_fedgan.cells import GANSetup
from experiments.feddetect import cells as plain
from experiments.feddetect.cells import KEYS
from experiments.params import Params
from medsec import data
from medsec.backdoor import attackers, feddetect
from medsec.backdoor import gan as fedgan
from medsec.backdoor.attackers import SCENARIOS, BackdoorAttack
from medsec.backdoor.gan import FederatedGAN, GANClient, part_of
from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed, torch_generator
from medsec.evidence import cells, tables
from medsec.federated.aggregators import RootSet, uniform_mean, vector
from medsec.federated.rounds import Aggregator, State, Update

# Arm -> the scenario of its rows. ``aware_rule`` optimises against the rule that it meets; of the hardened defence and its
# undefended twin that is ``aware``, whose cells are older.
ARMS = {
    "hospitals_no_attack": "no_attack",
    "hospitals_boost_liar": "boost_liar",
    "hospitals_aware": "aware_rule",
    "hospitals_only": "no_attack",
}
BEHAVES = {"no_attack": "no_attack", "boost_liar": "boost_liar", "aware_rule": "aware"}  # as `SCENARIOS` calls it
RULES = ("median", "krum", "multi_krum", "norm_clip")  # of four, the trimmed mean is the median
ONCE = "clip_then_train_once"  # with a single pass: can the attacker who knows the rule get through at all?
SERVED = ("root_set", "clip_then_train")  # rules with images of the server's own
ONLY = "server_only"  # a control, no defence
Train = Callable[[State, int], State]


def plan(arm: str) -> dict[str, tuple[str, ...]]:
    """The cells of an arm, by the name of their group, and their rules: what no older cell has run in the same federation."""
    return {
        "hospitals_no_attack": {"": RULES, "served": SERVED},
        "hospitals_boost_liar": {"": RULES, "served": SERVED},
        "hospitals_aware": {"": ("none", *RULES), "served": (*SERVED, ONCE)},
        "hospitals_only": {"": (ONLY,)},
    }[arm]


def passes(variant: str, p: Params) -> int:
    """How often the server goes over its images in a round. FLTrust's does as a client does."""
    return p.hospitals.passes if variant in ("clip_then_train", ONLY) else 1


def server_of(setup: GANSetup, seed: int) -> GANClient:
    """The server as one more client, whose images are the first ``hospitals.public`` of the shuffled split ``public``.

    Raises:
        InputError: the split has fewer than two images.
    """
    p, (images, labels) = setup.params, setup.splits["public"]
    if len(images) < 2:
        raise InputError(
            f"hospitals.public: split 'public' has {len(images)} images; a server that trains needs 2 or more"
        )
    some = torch.randperm(len(images), generator=torch_generator(seed, "root set"))[: p.hospitals.public]
    classes, index = setup.cohort.n_classes, p.fedgan.n_clients
    return fedgan.new_federation([images[some]], [labels[some]], classes, p.fedgan, seed, indices=[index]).clients[0]


def trains(server: GANClient, federation: FederatedGAN, passes: int) -> Train:
    """The server's own passes over its images, at the clients' learning rate; each with random numbers of its own."""
    streams = [federation.seed, *(derive_seed(federation.seed, "pass", k) for k in range(1, passes))]

    def train(state: State, round: int) -> State:
        for seed in streams:
            state = fedgan_eval.train_client(server, state, dataclasses.replace(federation, seed=seed), round).state
        return state

    return train


def defence(variant: str, params: Params, federation: FederatedGAN, server: GANClient | None) -> Aggregator:
    """A fresh rule for the rounds after the warm-up."""
    train = trains(server, federation, passes(variant, params))
    if variant == "root_set":
        return RootSet(federation.state, train)
    if variant in ("clip_then_train", ONCE):
        return feddetect.ClipThenTrain(federation.state, train)
    return plain.defence(variant, params, federation, None)


def knowing(variant: str, setup: GANSetup, federation: FederatedGAN, server: GANClient, rule: Aggregator) -> Callable:
    """What the attacker sends who knows the rule, the others' updates of the round, and all that the server has.

    The server's images and random numbers included, which is more than a real attacker could know.
    """
    p, attacker = setup.params, setup.params.fedgan.malicious[0]

    def aware(own: State, others: Sequence[State], round: int) -> State:
        held, peers = part_of(federation.state, "generator"), [part_of(state, "generator") for state in others]

        def whole(state: State) -> State:
            return {f"generator.{name}": value for name, value in state.items()}

        def after(state: State) -> State:
            ahead = trains(copy.deepcopy(server), federation, passes(variant, p))
            return part_of(ahead(whole(state), round), "generator")

        def accepts(state: State) -> bool:
            sent = [Update(attacker, whole(state), 1), *(Update(-1 - i, s, 1) for i, s in enumerate(others))]
            return rule(sent, round)[1]["weights"][attacker] > 0

        root = vector(after(held)) - vector(held) if variant == "root_set" else None
        settings = p.hospitals.aware
        sent = attackers.planted(
            federation.generator(),
            setup.trigger,
            attackers.known("clip_then_train" if variant == ONCE else variant, 1 + len(others), root),
            peers,
            held,
            torch_generator(federation.seed, "aware", round),
            **settings.model_dump(),
            **({"accepts": accepts} if variant in ("krum", "multi_krum") else {}),
            after=after if variant in ("clip_then_train", ONCE) else None,
        )
        return own | whole(sent)

    return aware


def warm_up(setup: GANSetup, seed: int, scenario: str, often: set[int]) -> tuple[FederatedGAN, dict[int, GANClient]]:
    """A federation after the rounds in which no defence acts.

    Besides, for every number in ``often``, a server whose discriminator learnt with it, in so many passes a round.
    """
    what, p = SCENARIOS[BEHAVES[scenario]], setup.params
    trigger = setup.trigger if what.attacks and not what.aware else None
    federation = fedgan.new_federation(*fedgan_eval.deal(setup, seed), setup.cohort.n_classes, p.fedgan, seed, trigger)
    servers = {n: server_of(setup, seed) for n in often}
    learn = [trains(server, federation, n) for n, server in servers.items()]

    def look_on(updates: Sequence[Update], round: int) -> tuple[State, dict]:
        for each in learn:
            each(federation.state, round)
        return uniform_mean(updates)

    fedgan.run(federation, plain.warm_up_rounds(p), train=fedgan_eval.train_client, aggregate=look_on, strict=True)
    return federation, servers


def run(cohort: str, params: Params, cell: cells.Cell) -> cells.Finished:
    """One cell of the record: of an arm of `ARMS` rows as of `experiments.feddetect.cells.run_cell`, without pictures."""
    if cell.arm not in ARMS:
        return plain.run(cohort, params, cell)
    torch.set_num_threads(1)
    if cell.arm == "hospitals_only":
        return _only_the_server(cohort, params, cell), {}
    scenario = ARMS[cell.arm]
    behaves = BEHAVES[scenario]
    changed = plain.settings(params, behaves, cell.keys)
    setup = plain.instruments(cohort, params, changed, behaves)
    often = {passes(variant, changed) for variant in cell.variants if variant in (*SERVED, ONCE)}
    start, servers = warm_up(setup, cell.seed, scenario, often)
    boost = changed.fedgan.poison.boost if SCENARIOS[behaves].boosted else None
    parts = []
    for variant in cell.variants:
        federation = fedgan.branch(start, boost, plain.warm_up_rounds(changed))
        own = copy.deepcopy(servers.get(passes(variant, changed)))
        rule = defence(variant, changed, federation, own)
        aware = knowing(variant, setup, federation, own, rule) if SCENARIOS[behaves].aware else None
        attack = BackdoorAttack(SCENARIOS[behaves], changed.fedgan.malicious, aware=aware)
        log = plain.follow(setup, federation, behaves, rule, attack)
        rows = tables.Rows(KEYS, cell.seed, variant, scenario)
        plain.detection_rows(rows, log, changed)
        _image_rows(rows, setup, federation)
        rows.add("server_ms", 1000 * np.median([entry["server_s"] for entry in log]), len(log))
        parts.append(rows.table().assign(**{k: str(v) for k, v in cell.keys.items()}))
    return pd.concat(parts, ignore_index=True), {}


def _only_the_server(cohort: str, params: Params, cell: cells.Cell) -> pd.DataFrame:
    """The server as a client of nobody: from its first round on it trains, as often as in the rules, on its own images."""
    setup = plain.instruments(cohort, params, plain.settings(params, "no_attack", cell.keys), "no_attack")
    p = setup.params
    federation = fedgan.new_federation(*fedgan_eval.deal(setup, cell.seed), setup.cohort.n_classes, p.fedgan, cell.seed)
    train = trains(server_of(setup, cell.seed), federation, passes(ONLY, p))
    for round in range(p.fedgan.rounds):
        federation.state = train(federation.state, round)
    rows = tables.Rows(KEYS, cell.seed, ONLY, ARMS[cell.arm])
    _image_rows(rows, setup, federation)
    return rows.table().assign(**{k: str(v) for k, v in cell.keys.items()})


def _image_rows(rows: tables.Rows, setup: GANSetup, federation: FederatedGAN) -> None:
    """The averaged generator's trigger rate and distance, on the same latents as `fedgan_eval.generator_rows`."""
    n, draw = setup.params.fedgan.measure.synthetic, derive_seed(federation.seed, "measure")
    images, _ = fedgan.synthesise(federation.generator(), n, draw, fedgan_eval.reference_labels(setup, n, draw))
    rows.add("trigger_rate", fedgan_eval.trigger_rate(setup, images)[0], n)
    rows.add("frechet", fedgan_eval.frechet(setup, images), n)


def lacks(cohort: data.Cohort, p: Params, cell: cells.Cell) -> list[str]:
    """What the cohort is too small for in one cell (`medsec.evidence.cells.Experiment`)."""
    if cell.arm not in ARMS:
        return plain.lacks(cohort, p, cell)
    return plain.lacks(cohort, p, dataclasses.replace(cell, arm=BEHAVES[ARMS[cell.arm]]))


def family(cell: cells.Cell) -> str:
    """As that of the notebook's cells; who knows the rule is honest at first, like everybody without an attack."""
    if cell.arm == "hospitals_only":
        return ""
    begins = {**ARMS, "hospitals_aware": "no_attack"}
    return plain.family(dataclasses.replace(cell, arm=begins.get(cell.arm, cell.arm)))


# The notebook's cells, and those of hospitals that differ.
EXPERIMENT = dataclasses.replace(
    plain.EXPERIMENT, run=run, lacks=lacks, family=family, more=dict.fromkeys(ARMS, ("hospitals",))
)
