"""`judge_server_rule`: what a server's rule of your own does in a small federated GAN, attacked and not.

Every attacker of `medsec.backdoor.attackers` is run, and one who knows the rule, each beside two controls: the plain mean,
and the mean of the honest clients alone. The images are those of the phantom, nobody's patients.
"""

import dataclasses
import functools
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from medsec import data
from medsec.backdoor import epochs, gan, triggers
from medsec.backdoor.attackers import SCENARIOS, Aware, BackdoorAttack, Scenario, falsified
from medsec.backdoor.feddetect import flag_threshold
from medsec.backdoor.gan import FederatedGAN, GANClient
from medsec.backdoor.triggers import Trigger
from medsec.core import params
from medsec.core.errors import InputError
from medsec.core.params import rounds_until
from medsec.core.seeds import derive_seed
from medsec.core.settings import Cohorts, FedGANParams
from medsec.evidence.intervals import bootstrap_interval
from medsec.federated.aggregators import fedavg, flatten, uniform_mean
from medsec.federated.rounds import State, Update, scale_update, screen
from medsec.judge import COLUMNS, Report, Rule, called, dots, fresh, odd_input, one_thread, row, share, shown

__all__ = ["judge_server_rule"]

BOOST = 4.0  # on the update of a scaling attacker: in ten short rounds three would not do
FOUR = {"n_clients": 4, "malicious": [0]}
DRAWN, TRIED = 200, 48  # images of which a trigger rate is the share; and what an attacker draws to try an update
WORKS, STOPPED = 0.5, 0.1  # undefended, an attack works above the one; it is stopped below the other
SHUT_OUT = 0.01  # a weight below this share of the equal one
LABELS = {"mean": "the plain mean", "oracle": "without the attacker", "rule": "the rule"}
LEAST_RUNS = 3  # for an interval over runs
SAME = 1e-4  # a distance to the mean, in units of how far clients lie apart, that is rounding
FACTORS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # what the attacker who knows the rule tries
AWARE = {"steps": 10, "draws": 64, "lr": 2e-3, "measure": 128}  # fewer than in notebook 02, which has minutes for each
KNOWS = "knows_the_rule"
SILENT = " It flags nobody, whoever attacks."
TEXT = "Tries its update at several lengths on a copy of the rule, and sends what plants most; lies about its loss."


def judge_server_rule(
    rule: Rule | type,
    *,
    attackers: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    rounds: int = 10,
    images: int = 128,
    name: str = "",
    progress: bool = False,
) -> Report:
    """Run a server's rule when nobody attacks and against every attacker, beside the plain mean and an oracle.

    Args:
        rule: ``rule(updates, round) -> (state, diagnostics)``, as those of `medsec.federated.aggregators`. ``diagnostics`` may be
            empty; ``weights`` in it, client -> share, says whom it leaves out, ``flagged``, client -> bool, whom it suspects.
            A function is called as it is. An object with this call, which may remember clients, is copied for every run. A
            class is called for every run: with the server's first state if its ``__init__`` needs an argument, else without.
        attackers: some of `medsec.backdoor.attackers.SCENARIOS`, and ``knows_the_rule``; default: all.
        seeds: one run of everything each. With one, intervals are over images and not over runs.
        rounds, images: of the federation, and of each client, four (of the colluders' federation eight).
        name: of the rule, for the title.
        progress: show on stderr how far it is.

    Returns:
        A report; ``examples`` has a row a run: trigger rates of the rule, of the mean and of the oracle.

    Raises:
        InputError: the rule raises, or returns something else than is said above. One line.

    >>> report = judge_server_rule(fedavg, attackers=["honest"], rounds=1, images=4)
    >>> report.verdict[:47]
    'It does what the plain mean does, in every roun'
    """
    known = [*(each for each, scenario in SCENARIOS.items() if scenario.attacks), KNOWS]
    chosen = list(attackers or known)
    if odd := [each for each in chosen if each not in known]:
        raise InputError(f"no attacker {odd[0]!r}; choose from {', '.join(known)}")
    if not seeds:
        raise InputError("seeds is empty: give at least one, like (0,)")
    setting = _Setting.load(rounds, images)
    oddities = odd_input(rule, setting.federation(SCENARIOS["no_attack"], 0).state)
    plan = [(seed, *step) for seed in seeds for step in (("no_attack", "rule"), *itertools.product(chosen, LABELS))]
    unlike = {_alike(attacker, defence, seed): (seed, attacker, defence) for seed, attacker, defence in reversed(plan)}
    bar = tqdm(sorted(unlike.items(), key=lambda run: _order(*run[1])), desc="judge", unit="run", disable=not progress)
    finished: dict[tuple, _Finished] = {}
    with torch.random.fork_rng(), one_thread():
        torch.manual_seed(derive_seed(0, "judge"))  # for a rule that draws
        train = functools.partial(epochs.train_client, kept=OrderedDict())
        for key, (seed, attacker, defence) in bar:
            bar.set_postfix_str(f"{attacker}, {defence}")
            finished[key] = _Run(setting, rule, attacker, defence, seed, train).finish()
    runs = [(seed, attacker, defence, finished[_alike(attacker, defence, seed)]) for seed, attacker, defence in plan]
    return _report(setting, runs, oddities, chosen, name)


# The small federation --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Setting:
    """The phantom's images and the settings of the federation: those of params.yaml, made small."""

    cohort: data.Cohort
    fedgan: FedGANParams
    feddetect: dict  # the section of params.yaml

    @classmethod
    def load(cls, rounds: int, images: int) -> "_Setting":
        tree, file = params.read()
        cohorts = params.validated(Cohorts, tree.get("cohorts"), f"{file}, section cohorts")
        change = {"rounds": rounds, "images_per_client": images, "poison": {"boost": BOOST}} | FOUR
        fedgan = params.validated(FedGANParams, params.merge(tree["fedgan"], change), f"{file}, section fedgan")
        return cls(data.load("phantom", cohorts), fedgan, tree["feddetect"])

    def of(self, scenario: Scenario) -> FedGANParams:
        """The federation that an attacker needs."""
        change: dict = {}
        if scenario.colluders:
            n, of = self.feddetect["scenario"]["colluders"]
            change = {"n_clients": of, "malicious": list(range(n))}
        if scenario.stealthy:
            rarely = {"ratio": self.feddetect["scenario"]["stealth_ratio"]}
            change["poison"] = self.fedgan.poison.model_copy(update=rarely)
        return self.fedgan.model_copy(update=change)

    def trigger(self, scenario: Scenario) -> tuple[Trigger, float]:
        """What an attacker plants, and the threshold of its detector."""
        p, kind = self.fedgan.trigger, scenario.trigger or self.fedgan.trigger.kind
        opacity = self.feddetect["scenario"]["faint_opacity"]
        size, channels = self.cohort.size, self.cohort.channels
        trigger = triggers.make_trigger(kind, image_size=size, channels=channels, size=p.size, opacity=opacity)
        clean = torch.from_numpy(self.cohort["public"].float())
        return trigger, triggers.calibrate(trigger, clean, self.fedgan.measure.threshold_fpr)

    def federation(self, scenario: Scenario, seed: int) -> FederatedGAN:
        """Clients with disjoint images; the attackers' carry the trigger."""
        p, split = self.of(scenario), self.cohort["client"]
        parts = data.partition(
            split.labels, p.n_clients, "iid", seed=derive_seed(seed, "partition"), per_client=p.images_per_client
        )
        images = [torch.from_numpy(split.take(part).float()) for part in parts]
        labels = [torch.from_numpy(split.labels[part]) for part in parts]
        stamped = self.trigger(scenario)[0] if scenario.attacks and not scenario.aware else None
        start = gan.new_federation(images, labels, self.cohort.n_classes, p, seed, stamped)
        return gan.branch(start, p.poison.boost if scenario.boosted else None, self.begin)

    @property
    def begin(self) -> int:
        """Round from which attackers do more than to poison their images."""
        return rounds_until(self.fedgan.poison.boost_after, self.fedgan.rounds)


def _scenario(attacker: str) -> Scenario:
    return Scenario(TEXT, report="median") if attacker == KNOWS else SCENARIOS[attacker]


def _alike(attacker: str, defence: str, seed: int) -> tuple:
    """Runs with the same key are the same: the mean reads no losses, and the oracle sees no attacker."""
    if defence == "rule" or (attacker == KNOWS and defence == "mean"):
        return attacker, defence, seed
    scenario = dataclasses.replace(_scenario(attacker), text="", report="true")
    if defence == "oracle":  # (the trigger decides what is measured)
        scenario = Scenario("", colluders=scenario.colluders, trigger=scenario.trigger)
    return scenario, defence, seed


def _order(seed: int, attacker: str, defence: str) -> tuple:
    """Runs that begin alike follow one another, so that what they have in common is trained once (`epochs`)."""
    what = _scenario(attacker)
    return seed, defence, what.colluders, what.stealthy, what.aware, what.trigger or "", what.intermittent


# One run --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Finished:
    """What a run gave: images with the trigger at its end, and of every round ..."""

    hits: int = 0
    seconds: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # of the rule, of the mean
    gaps: list[float] = dataclasses.field(default_factory=list)  # distance of the aggregate to the mean
    shares: list[float] = dataclasses.field(default_factory=list)  # each client's weight, 1 for an equal one
    flags: list[bool] = dataclasses.field(default_factory=list)  # each client's


class _Run:
    """One attacker and one defence: ``rule``, ``mean`` or ``oracle``."""

    def __init__(self, setting: _Setting, rule: Rule | type, attacker: str, defence: str, seed: int, train: Callable):
        self.setting, self.attacker, self.defence, self.scenario = setting, attacker, defence, _scenario(attacker)
        self.train = train  # a client's epoch
        self.federation = setting.federation(self.scenario, seed)
        self.malicious = setting.of(self.scenario).malicious if self.scenario.attacks else []
        self.trigger, self.threshold = setting.trigger(self.scenario)
        self.rule = fresh(rule if defence == "rule" else uniform_mean, self.federation.state)
        self.attack = BackdoorAttack(self.scenario, self.malicious, self._strikes, self._aware())
        self.found = _Finished()

    def finish(self) -> _Finished:
        # Who strikes seldom does not let its learning rate fade.
        constant = dataclasses.replace(self.federation, gan=self.federation.gan.model_copy(update={"decay_after": 1.0}))

        def train(client: GANClient, state: State, federation: FederatedGAN, round: int) -> Update:
            faithless = self.scenario.intermittent and client.index in self.malicious
            return self.train(client, state, constant if faithless else federation, round)

        gan.run(self.federation, train=train, aggregate=self._aggregate, strict=True)
        drawn = self._draw(self.federation.state, DRAWN)
        self.found.hits = int((triggers.score(self.trigger, drawn) > self.threshold).sum())
        return self.found

    def _strikes(self, round: int) -> bool:
        every, last = self.setting.feddetect["scenario"]["strike_every"], self.setting.fedgan.rounds - 1
        return round >= self.setting.begin and (last - round) % every == 0

    def _aware(self) -> Callable | None:
        """The attacker who optimises against the hardened FedDetect."""
        if not self.scenario.aware:
            return None
        p, late, last = self.setting.feddetect, self.scenario.late, self.setting.fedgan.rounds - 1
        settings, hardened = p["scenario"]["aware"], p["hardened"]

        def evade(round: int) -> float:
            return settings["late_evade"] if late and round > last - settings["late_rounds"] else settings["evade"]

        return Aware(
            self.federation.generator(),
            self.trigger,
            seed=derive_seed(self.federation.seed, "aware"),
            scale=(hardened["scale"], hardened["scale_relative"]),
            threshold=flag_threshold(hardened["fpr"]),
            evade=evade,
            recent=deque(maxlen=hardened["window"] - 1),
            begin=self.setting.begin,
            **AWARE,
        )

    def _draw(self, state: State, n: int) -> Tensor:
        model = self.federation.generator()
        model.load_state_dict(gan.part_of(state, "generator"))
        return gan.synthesise(model.eval(), n, derive_seed(self.federation.seed, "drawn"))[0]

    def _adapted(self, updates: Sequence[Update], round: int) -> list[Update]:
        """The update of one who tries several on a copy of the rule; it sees the others' of this round."""
        own = next(u for u in updates if u.client in self.malicious)
        others = [u for u in updates if u.client != own.client]
        lies = {key: falsified([u.metrics[key] for u in others], "median") for key in own.metrics}
        mean, best, most = uniform_mean(others)[0], own, -math.inf
        for factor in FACTORS:
            tried = dataclasses.replace(own, state=scale_update(own.state, mean, factor), metrics=lies)
            state = called(fresh(self.rule, self.federation.state), [tried, *others], round)[0]
            planted = float(triggers.score(self.trigger, self._draw(state, TRIED)).mean())
            if planted > most:
                best, most = tried, planted
        return [best if u.client == own.client else u for u in updates]

    def _aggregate(self, updates: Sequence[Update], round: int) -> tuple[State, dict]:
        adapts = self.attacker == KNOWS and self.defence != "oracle" and round >= self.setting.begin
        sent = self._adapted(updates, round) if adapts else self.attack(updates, round)
        arrived, rejected = screen(sent, self.federation.state)
        if self.defence == "oracle":
            arrived = [u for u in arrived if u.client not in self.malicious]
        mean, _, of_mean = called(uniform_mean, arrived, round)
        state, diagnostics, of_rule = called(self.rule, arrived, round)
        self.found.seconds.append((of_rule, of_mean))
        self.found.gaps.append(min(_gap(state, arrived, mean), _gap(state, arrived, fedavg(arrived)[0])))
        if (weights := diagnostics.get("weights")) is not None:  # who is not named weighs nothing
            each = np.array([float(weights.get(u.client, 0)) for u in arrived])
            self.found.shares += (len(each) * each / max(each.sum(), 1e-12)).tolist()
        self.found.flags += map(bool, dict(diagnostics.get("flagged") or {}).values())
        return state, {"rejected": rejected}


def _gap(state: State, updates: Sequence[Update], mean: State) -> float:
    """How far a state lies from a mean, in units of how far the updates do, on average."""
    centre = flatten(mean)
    spread = float(np.mean([np.linalg.norm(flatten(u.state) - centre) for u in updates]))
    return float(np.linalg.norm(flatten(state) - centre) / max(spread, 1e-12))


# What it means ---------------------------------------------------------------------------------------------------------


class _Rate(NamedTuple):
    """A trigger rate over all seeds, with its interval: over images, or over three runs or more."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, runs: Sequence[_Finished]) -> "_Rate":
        rate = cls(*share(sum(run.hits for run in runs), DRAWN * len(runs)))
        if len(runs) < LEAST_RUNS:
            return rate
        low, high = bootstrap_interval([run.hits / DRAWN for run in runs])
        return rate._replace(low=low, high=high)


def _outcome(rates: dict[str, _Rate]) -> str:
    if rates["rule"].low > max(STOPPED, rates["mean"].high):
        return "made worse"
    if not rates["mean"].low > WORKS:
        return "no test"
    if rates["rule"].high <= STOPPED:
        return "stopped"
    return "gets through" if rates["rule"].low > STOPPED else "open"


def _report(setting: _Setting, runs: list[tuple], odd: list[dict], attackers: Sequence[str], name: str) -> Report:
    grouped: dict[tuple[str, str], list[_Finished]] = {}
    for _, attacker, defence, finished in runs:
        grouped.setdefault((attacker, defence), []).append(finished)
    rates = {a: {d: _Rate.of(grouped[a, d]) for d in LABELS} for a in attackers}
    judged = {attacker: _outcome(each) for attacker, each in rates.items()}
    honest = grouped["no_attack", "rule"]
    alarms, rows = _alarms(honest), []
    for attacker, each in rates.items():
        controls = f"the mean: {shown(each['mean'].value)}, without the attacker: {shown(each['oracle'].value)}"
        note = f"{judged[attacker]}; {controls}. {_scenario(attacker).text}"
        rows.append(row("trigger rate", attacker, *each["rule"], note=note))
    of_rule, of_mean = (1000 * np.median([s[i] for run in honest for s in run.seconds]) for i in (0, 1))
    note = f"the mean: {of_mean:.2f} ms, so that it takes {shown(of_rule / of_mean)} times as long"
    rows.append(row("cost", "time a round", of_rule, unit="ms", n=sum(len(run.seconds) for run in honest), note=note))
    table = pd.DataFrame([*alarms, *rows, *odd], columns=COLUMNS)
    own = [run for _, _, defence, run in runs if defence == "rule"]
    gaps, flags = ([each for run in own for each in getattr(run, name)] for name in ("gaps", "flags"))
    each_run = [
        (seed, attacker, defence, run.hits / DRAWN) for seed, attacker, defence, run in runs if attacker in rates
    ]
    examples = pd.DataFrame(each_run, columns=["seed", "attacker", "defence", "trigger_rate"])
    not_tested = list(NOT_TESTED)
    if untested := [attacker for attacker, what in judged.items() if what == "no test"]:
        why = "in so small a federation they do not work undefended"
        not_tested.insert(0, f"Whether it stops {', '.join(untested)}: {why}.")
    drawn = dots({a: {LABELS[d]: rate[:3] for d, rate in each.items()} for a, each in rates.items()}, "trigger rate")
    return Report(
        f"A server's rule on trial: {name}".removesuffix(": "),
        _verdict(judged, rates, alarms, idle=max(gaps) < SAME) + SILENT * (bool(flags) and not any(flags)),
        table,
        _remarks(setting, len(honest)),
        not_tested,
        [("Share of synthetic images with the trigger at the end; bars: 95 %.", drawn)],
        examples,
    )


def _alarms(runs: Sequence[_Finished]) -> list[dict]:
    """Rows on what the rule does to honest clients, over all clients and rounds."""
    found = ([v for run in runs for v in getattr(run, name)] for name in ("gaps", "shares", "flags"))
    gaps, shares, flags = map(np.array, found)
    part, of = "no attack", "of all clients and rounds"
    note = "1: as far as a client, on average"
    rows = [row(part, "distance of its aggregate to the mean", gaps.mean(), n=len(gaps), note=note)]
    if len(shares):
        rows.append(row(part, "honest clients shut out", (shares < SHUT_OUT).mean(), n=len(shares), note=of))
        lost = (1 - shares).clip(0).mean()
        rows.append(
            row(part, "weight taken from honest clients", lost, n=len(shares), note="share of the equal weight")
        )
    if len(flags):
        rows.append(row(part, "honest clients flagged", flags.mean(), n=len(flags), note=of))
    return rows


def _verdict(judged: dict[str, str], rates: dict, alarms: list[dict], *, idle: bool) -> str:
    if idle:
        return "It does what the plain mean does, in every round and whoever attacks: it is no defence."
    alarmed = "; ".join(f"{at['measure']} {shown(at['value'])}" for at in alarms)
    tested = [attacker for attacker in judged if rates[attacker]["mean"].low > WORKS]
    stopped = list(judged.values()).count("stopped")
    text = f"It stops {stopped} of the {len(tested)} attackers whose attack works against the plain mean"
    if not tested:
        text = "No attacker here works even against the plain mean, so that nothing is known of its use"
    for what in ("gets through", "made worse", "open"):
        if names := [f"{a} ({shown(rates[a]['rule'].value)})" for a in judged if judged[a] == what]:
            text += f"; {what}: {', '.join(names)}"
    return f"{text}. When nobody attacks: {alarmed}."


def _remarks(setting: _Setting, seeds: int) -> list[str]:
    p = setting.fedgan
    of = "runs" if seeds >= LEAST_RUNS else f"the {DRAWN} images of a run: another run may differ by more"
    return [
        f"{p.n_clients} hospitals (colluders: 2 of 8), {p.rounds} rounds, {p.images_per_client} images each. From round "
        f"{setting.begin + 1} on, attackers do more than to poison their images.",
        f"Runs for each attacker: {seeds}. Intervals are over {of}.",
        f"“stopped”: the whole interval is at most {STOPPED}; “gets through”: it lies above. “made worse”: and above that "
        f"of the plain mean. “no test”: with the plain mean the rate is not clearly above {WORKS}.",
        "All attackers see what the others send in the same round, which is more than a real one sees.",
    ]


NOT_TESTED = (
    "Other federations: more hospitals, more rounds, hospitals that differ, other images, a classifier instead of a GAN.",
    "An attacker who optimises more than the length of its update against this rule: what is stopped here may fall to one.",
    "What its diagnostics say: weights and flags are taken as they are told. Privacy: it sees every update in the clear.",
    "The quality of the synthetic images.",
)
