"""Attackers of a federated GAN who know that somebody is looking.

The attacker of the released code poisons its images and otherwise follows the protocol. Those here also lie about
their losses, bide their time, or optimise what they send against the defence itself. All of them move last and see what
the others sent in this round: stronger than a real attacker, so that a defence that stands here stands there.

A `Scenario` says what an attacker does; a `BackdoorAttack` is what stands between clients and server in one run.
"""

import copy
import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from medsec.backdoor import triggers
from medsec.backdoor.feddetect import map_evidence, peculiarity
from medsec.backdoor.gan import part_of
from medsec.backdoor.triggers import Trigger
from medsec.core.errors import InputError
from medsec.core.seeds import torch_generator
from medsec.federated.aggregators import uniform_mean, vector
from medsec.federated.rounds import State, Update
from medsec.nets.models import Generator

__all__ = ["SCENARIOS", "Aware"]


@dataclass(frozen=True)
class Scenario:
    """What the attacker does.

    Attributes:
        text: in a sentence, for the reader.
        attacks: False for the control.
        trigger: its kind; None for the one of the parameters.
        stealthy: poisons only the share ``stealth_ratio`` of its images instead of ``poison.ratio``.
        boosted: scales its update after the warm-up.
        report: ``true`` losses; ``median`` of the honest ones; ``closest``: between the two honest losses that lie
            closest together, so that another honest one stands out.
        intermittent: behaves during the warm-up; then strikes every few rounds, the last among them, ignoring the fading
            learning rate, and sends the mean of the others in between.
        colluders: several attackers in a larger federation (``feddetect.scenario.colluders``).
        aware: optimises its update against the hardened defence (`Aware`), from the end of the warm-up on ...
        late: ... and goes further in the last rounds, as far as the defence's memory lets it.
    """

    text: str
    attacks: bool = True
    trigger: str | None = None
    stealthy: bool = False
    boosted: bool = False
    report: str = "true"
    intermittent: bool = False
    colluders: bool = False
    aware: bool = False
    late: bool = False


SCENARIOS = {
    "no_attack": Scenario("Nobody attacks: the control for false alarms.", attacks=False),
    "honest": Scenario("Poisons its images, as released, and reports its true losses."),
    "boost": Scenario("Scales its update after the warm-up and reports its true losses.", boosted=True),
    "liar": Scenario("Poisons its images and reports the median of the honest losses.", report="median"),
    "framer": Scenario(
        "Scales its update and reports a loss that makes an honest one stand out.", boosted=True, report="closest"
    ),
    "colluders": Scenario(
        "Two of eight: both scale their updates and report a loss that makes honest ones stand out.",
        boosted=True,
        report="closest",
        colluders=True,
    ),
    "stealth": Scenario(
        "Poisons only a quarter of its images, scales its update all the more, and lies about its loss.",
        stealthy=True,
        boosted=True,
        report="median",
    ),
    "waitout": Scenario(
        "Sends the mean of the others, and a scaled poisoned update every few rounds, the last among them.",
        boosted=True,
        report="median",
        intermittent=True,
    ),
    "boost_liar": Scenario("Scales its update and lies about its loss.", boosted=True, report="median"),
    "moving_trigger": Scenario(
        "boost_liar with a trigger that moves.", trigger="moving", boosted=True, report="median"
    ),
    "blended_trigger": Scenario(
        "boost_liar with a faint pattern over the whole image.", trigger="blended", boosted=True, report="median"
    ),
    "stripes_trigger": Scenario(
        "boost_liar with a sinusoidal signal (Barni et al. 2019), never looked at while the defence was built.",
        trigger="stripes",
        boosted=True,
        report="median",
    ),
    "aware": Scenario(
        "Optimises its update against the hardened defence and stays where that never punishes it; lies.",
        report="median",
        aware=True,
    ),
    "aware_late": Scenario(
        "The same, and in the last rounds it goes as far as the defence's memory lets it.",
        report="median",
        aware=True,
        late=True,
    ),
}


def falsified(honest: Sequence[float], rule: str) -> float:
    """The loss that a liar reports, from the honest losses of the round (see `Scenario.report`)."""
    ranked = np.sort(np.asarray(honest, dtype=np.float64))
    if rule == "median" or len(ranked) < 2:
        return float(np.median(ranked))
    k = int(np.diff(ranked).argmin())
    return float(ranked[k : k + 2].mean())


@dataclass(eq=False)
class BackdoorAttack:
    """The attackers of one run, between the clients and the server.

    Attributes:
        scenario: what they do.
        malicious: their indices.
        strikes: ``strikes(round)``, whether an intermittent attacker strikes.
        aware: what an aware attacker does with its update, ``aware(own, others, round) -> state``.
    """

    scenario: Scenario
    malicious: Sequence[int]
    strikes: Callable[[int], bool] = lambda round: True
    aware: Callable[[State, Sequence[State], int], State] | None = None

    def __call__(self, updates: Sequence[Update], round: int) -> list[Update]:
        """What arrives at the server, from what the clients' training gave."""
        others = [u for u in updates if u.client not in self.malicious]
        if not self.scenario.attacks or not others:
            return list(updates)
        return [self._send(u, others, round) if u.client in self.malicious else u for u in updates]

    def _send(self, own: Update, others: list[Update], round: int) -> Update:
        state, metrics = own.state, own.metrics
        if self.scenario.intermittent and not self.strikes(round):
            state, _ = uniform_mean(others)
        elif self.aware is not None:
            state = self.aware(own.state, [u.state for u in others], round)
        if self.scenario.report != "true":
            metrics = {k: falsified([u.metrics[k] for u in others], self.scenario.report) for k in metrics}
        return Update(own.client, state, own.n_samples, metrics)


@dataclass(eq=False)
class Aware:
    """An attacker who knows the hardened defence and optimises its update against it.

    It starts from the mean of the others' updates, the least suspicious thing to send. Gradient steps (Adam) change that
    generator so that the *average* that the server will form shows the trigger, while its own evidence, computed by the
    defence's own code on the others' real updates, stays below ``evade`` times the flag's threshold. In the end it measures
    its evidence on as many fresh latents as the server draws. Where that is too high, it moves back towards the mean by
    bisection, if need be all the way. It knows everything but the server's secret latents. With ``evade`` at most the
    CUSUM's drift it never gathers suspicion.

    Args:
        generator: any generator of the federation, for its architecture.
        trigger: what it plants.
        seed: of its latents.
        scale: `map_evidence`'s scale.
        threshold: the flag's threshold.
        evade: share of the threshold that it allows itself, by round.
        steps, draws, lr: gradient steps a round, latents for them, Adam's learning rate.
        measure: latents of the last measurement, as many as the server draws: few would understate the evidence.
        recent: what the server remembers of the rounds before (`feddetect.Hardened.recent`); kept up by the attacker.
        begin: round of its first attack; before it the attacker sends the mean of the others.
    """

    generator: InitVar[Generator]
    trigger: Trigger
    _: KW_ONLY
    seed: int
    scale: tuple[float, float]
    threshold: float
    evade: Callable[[int], float]
    steps: int
    draws: int
    lr: float
    measure: int
    recent: deque[Tensor]
    begin: int
    queries: int = 0

    def __post_init__(self, generator: Generator):
        self.model = copy.deepcopy(generator).eval().requires_grad_(False)
        self.recent = copy.copy(self.recent)

    def __call__(self, own: State, others: Sequence[State], round: int) -> State:
        peers = [part_of(state, "generator") for state in others]
        clean = {k: torch.stack([peer[k] for peer in peers]).double().mean(0).to(v.dtype) for k, v in peers[0].items()}
        rng = torch_generator(self.seed, "aware", round)
        sent = clean if round < self.begin else self._optimised(clean, peers, rng, self.evade(round) * self.threshold)
        z, y, theirs = self._look(peers, rng, self.measure)
        with torch.no_grad():
            self.recent.append(self._peculiarity(sent, theirs, z, y))
        return own | {f"generator.{k}": v for k, v in sent.items()}

    def _optimised(self, clean: State, peers: list[State], rng: torch.Generator, allowed: float) -> State:
        free = {k: clean[k].clone().requires_grad_() for k, _ in self.model.named_parameters()}
        optimizer = torch.optim.Adam(free.values(), lr=self.lr)
        z, y, theirs = self._look(peers, rng, self.draws)
        for _ in range(self.steps):
            mine = clean | free
            mean = {k: sum([state[k] for state in peers], mine[k]) / (1 + len(peers)) for k in mine}
            planted = (0.9 - triggers.score(self.trigger, self._draw(mean, z, y))).clamp_min(0).mean()
            excess = (self._evidence(mine, theirs, z, y) - 0.9 * allowed).clamp_min(0)
            optimizer.zero_grad()
            (planted + excess).backward()
            optimizer.step()
        return self._retreat(clean, free, peers, rng, allowed)

    @torch.no_grad()
    def _retreat(self, clean: State, free: State, peers: list[State], rng: torch.Generator, allowed: float) -> State:
        """The point on the way from the mean of the others to the optimised update that just passes."""
        z, y, theirs = self._look(peers, rng, self.measure)

        def at(share: float) -> State:
            return clean | {k: clean[k] + share * (v - clean[k]) for k, v in free.items()}

        if self._evidence(at(1.0), theirs, z, y) <= allowed:
            return at(1.0)
        low, high = 0.0, 1.0
        for _ in range(8):
            middle = (low + high) / 2
            low, high = (middle, high) if self._evidence(at(middle), theirs, z, y) <= allowed else (low, middle)
        return at(low)

    def _evidence(self, mine: State, theirs: Tensor, z: Tensor, y: Tensor) -> Tensor:
        self.queries += 1
        return map_evidence(self._peculiarity(mine, theirs, z, y), self.scale, self.recent)[0]

    def _peculiarity(self, mine: State, theirs: Tensor, z: Tensor, y: Tensor) -> Tensor:
        return peculiarity(torch.cat([self._draw(mine, z, y)[None], theirs])).log()

    @torch.no_grad()
    def _look(self, peers: list[State], rng: torch.Generator, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Fresh latents and labels, and what the others' generators draw from them."""
        device = next(self.model.parameters()).device
        z = torch.randn(n, self.model.z_dim, generator=rng).to(device)
        y = (torch.arange(n) % self.model.n_classes).to(device)
        return z, y, torch.stack([self._draw(state, z, y) for state in peers])

    def _draw(self, state: State, z: Tensor, y: Tensor) -> Tensor:
        return functional_call(self.model, state, (z, y))


# Against any rule -----------------------------------------------------------------------------------------------------
# What a rule makes of the attacker's ``mine`` (d,), the ``others`` (k, d) and what the server ``held`` (d,): its next state
# (d,), as the rule itself computes it, but differentiable. The vectors hold all floating-point entries of the generators.


def formed_mean(mine: Tensor, others: Tensor, held: Tensor) -> Tensor:
    return torch.cat([mine[None], others]).mean(0)


def formed_median(mine: Tensor, others: Tensor, held: Tensor) -> Tensor:
    return _middle(torch.cat([mine[None], others]))


def _middle(values: Tensor) -> Tensor:
    """Median over the first axis; the mean of the middle two for an even number."""
    ranked = values.sort(0).values
    return (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2


def formed_krum(mine: Tensor, others: Tensor, held: Tensor) -> Tensor:
    return mine


def formed_multi_krum(mine: Tensor, others: Tensor, held: Tensor) -> Tensor:
    """With one attacker, who is kept: the other left out is the one that lies furthest from the rest."""
    scores = _scores(torch.cat([mine[None], others]).detach(), 1)[1:]
    kept = others[scores.argsort(stable=True)[: len(others) - 1]]
    return torch.cat([mine[None], kept]).mean(0)


def formed_clipped(mine: Tensor, others: Tensor, held: Tensor) -> Tensor:
    sent = torch.cat([mine[None], others]) - held
    lengths = sent.norm(dim=1)
    return held + (sent * (_middle(lengths) / lengths.clamp_min(1e-12)).clamp_max(1)[:, None]).mean(0)


def formed_trusted(mine: Tensor, others: Tensor, held: Tensor, *, own: Tensor) -> Tensor:
    """``own`` (d,): the server's own update of this round."""
    sent = torch.cat([mine[None], others]) - held
    lengths = sent.norm(dim=1).clamp_min(1e-12)
    trust = (sent @ own / (lengths * own.norm())).clamp_min(0)
    return held + (trust * own.norm() / lengths) @ sent / trust.sum().clamp_min(1e-12)


def _scores(points: Tensor, n_malicious: int) -> Tensor:
    """(n,) `krum_scores` of the rows of ``points``, differentiable."""
    apart = (points[:, None] - points[None]).square().sum(2) + torch.diag(torch.full((len(points),), torch.inf))
    return apart.sort(1).values[:, : max(1, len(points) - n_malicious - 2)].sum(1)


def beyond(mine: Tensor, others: Tensor, *, keep: int) -> Tensor:
    """By what share the attacker's Krum score exceeds the ``keep``-th smallest that the others have among themselves."""
    return _scores(torch.cat([mine[None], others]), 1)[0] / _scores(others, 0).sort().values[keep - 1] - 1


class Known(NamedTuple):
    """What an attacker knows of a rule.

    Attributes:
        formed: the rule's next state, see above.
        beyond: ``beyond(mine, others)``, above 0 where the rule would leave its update out; None if it leaves out nobody.
        inside: whether it keeps every entry within the others' range, beyond which the rule does not follow it.
        own: (d,) the server's own update of the round, from which it then starts; None: from the mean of the others'.
    """

    formed: Callable[[Tensor, Tensor, Tensor], Tensor]
    beyond: Callable[[Tensor, Tensor], Tensor] | None = None
    inside: bool = False
    own: Tensor | None = None


def known(rule: str, clients: int, own: Tensor | None = None) -> Known:
    """What the only attacker among ``clients`` knows of ``rule``; ``own``: the server's own update, for ``root_set``.

    Raises:
        InputError: no attacker is built against that rule.
    """
    kept = {"krum": 1, "multi_krum": clients - 1}
    formed = {
        "none": formed_mean,
        "median": formed_median,
        "krum": formed_krum,
        "multi_krum": formed_multi_krum,
        "norm_clip": formed_clipped,
        "clip_then_train": formed_clipped,
        "root_set": functools.partial(formed_trusted, own=own),
    }
    if rule not in formed:
        raise InputError(f"no attacker knows the rule {rule!r}: choose one of {', '.join(formed)}")
    outside = functools.partial(beyond, keep=min(kept[rule], clients - 1)) if rule in kept else None
    return Known(formed[rule], outside, rule == "median", own)


def planted(
    generator: Generator,
    trigger: Trigger,
    rule: Known,
    others: Sequence[State],
    held: State,
    rng: torch.Generator,
    *,
    steps: int,
    draws: int,
    lr: float,
    accepts: Callable[[State], bool] = lambda state: True,
    after: Callable[[State], State] | None = None,
    looks: int = 1,
) -> State:
    """The update of an attacker who optimises against a rule that it knows, with all that its round consists of.

    As `Aware` it starts from the mean of the others' updates (or from the server's own, see `Known`), and gradient steps
    (Adam) change that generator until what the server will hold shows the trigger. Here the steps go through the rule
    itself. Where the rule may leave the update out, they also keep it near enough (to 95 % of what is allowed), and in the
    end it moves back to where it began, by bisection, until the rule takes it. Only the generator's weights are changed;
    its running statistics stay. It is written for federations that average the generator alone.

    Args:
        generator: any generator of the federation, for its architecture.
        trigger: what it plants.
        rule: what it knows of the rule.
        others: the others' updates of this round, states of generators under their names in that network.
        held: what the server holds, likewise.
        rng: of its latents.
        steps, draws, lr: gradient steps, latents for them, Adam's learning rate.
        accepts: the rule's own code, whether it keeps an update.
        after: what the server does to the new state. The attacker runs it itself ``looks`` times during its search, on the
            server's own images and random numbers, and between takes the change that it made for constant.

    Returns:
        A state like those of the others; where it began if the rule takes nothing else.
    """
    model = copy.deepcopy(generator).eval().requires_grad_(False)
    names = dict(model.named_parameters())
    crowd, received = torch.stack([vector(state) for state in others]), vector(held)
    learnt = torch.cat([torch.full((v.numel(),), k in names) for k, v in held.items() if v.is_floating_point()])
    start = crowd.mean(0) if rule.own is None else received + rule.own
    moved = torch.zeros_like(received)
    free, lowest, highest = start.clone().requires_grad_(), crowd.amin(0), crowd.amax(0)
    optimizer = torch.optim.Adam([free], lr=lr)
    z = torch.randn(draws, model.z_dim, generator=rng).to(received.device)
    y = (torch.arange(draws) % model.n_classes).to(received.device)
    learnt = learnt.to(received.device)
    for step in range(steps):
        mine = torch.where(learnt, free, start)
        new = rule.formed(mine, crowd, received)
        if after is not None and step % max(1, steps // looks) == 0:
            moved = vector(after(shaped(new.detach(), held))) - new.detach()
        state = {k: v if k in names else v.detach() for k, v in shaped(new + moved, held).items()}
        missing = (0.9 - triggers.score(trigger, functional_call(model, state, (z, y)))).clamp_min(0).mean()
        excess = (rule.beyond(mine, crowd) + 0.05).clamp_min(0) if rule.beyond else 0.0
        optimizer.zero_grad()
        (missing + 10 * excess).backward()
        optimizer.step()
        if rule.inside:
            with torch.no_grad():
                free.clamp_(lowest, highest)

    def at(share: float) -> State:
        return shaped(start + share * (torch.where(learnt, free.detach(), start) - start), others[0])

    if accepts(at(1.0)):
        return at(1.0)
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if accepts(at(middle)) else (low, middle)
    return at(low)


def shaped(values: Tensor, like: State) -> State:
    """The state whose floating-point entries are ``values`` (d,), with the integers of ``like``; no variance is negative."""
    state, at = {}, 0
    for name, tensor in like.items():
        state[name] = tensor.clone()
        if tensor.is_floating_point():
            part = values[at : at + tensor.numel()].view_as(tensor)
            state[name] = part.clamp_min(0) if name.endswith("running_var") else part
            at += tensor.numel()
    return state
