"""What notebook 02 measures: every defence against every attacker, each pair resumed from the same warm-up.

`run_cell` is one seed of one scenario: the warm-up is run once, then every defence continues from its copy, so that
defences are compared on the same networks and images. `run_null` simulates the released detector on honest losses,
`run_downstream` trains classifiers with and without synthetic images.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from experiments import params as parameters
from experiments.backdoor_fedgan import cells as fedgan_eval
from experiments.backdoor_fedgan.cells import PER_ROUND, GANSetup
from experiments.params import Params
from medsec import data
from medsec.backdoor import feddetect, triggers
from medsec.backdoor import gan as fedgan
from medsec.backdoor.attackers import SCENARIOS, Aware, BackdoorAttack
from medsec.backdoor.gan import FederatedGAN, GANClient
from medsec.core.errors import InputError
from medsec.core.params import rounds_until
from medsec.core.seeds import derive_seed, torch_generator
from medsec.evidence import cells, tables
from medsec.federated import aggregators
from medsec.federated.aggregators import RULES, uniform_mean
from medsec.federated.rounds import Aggregator, State, Update, screen
from medsec.nets import fit as classifier

KEYS = ("m", "partition", "trigger", "evade", "source", "real", "round", "client")
READS_LOSSES = ("feddetect_released", "feddetect_described", "feddetect_hardened")
# In the order of the tables; a rule that joins `RULES` comes last.
VARIANTS = tuple(
    dict.fromkeys(("none", *READS_LOSSES, "median", "trimmed_mean", "krum", "multi_krum", "norm_clip", *RULES))
)
ORACLE = "oracle"  # a control, no defence: the server is told who attacks, and leaves them out
QUICK = {  # what the notebook itself runs; the rest is in the record
    "no_attack": ("none", "feddetect_released", "feddetect_hardened"),
    "boost_liar": ("none", "feddetect_hardened"),
}
BLOCKED = 0.01  # a weight below this share of the equal weight 1/m counts as blocked


# One run -------------------------------------------------------------------------------------------------------------


def settings(params: Params, scenario: str, keys: dict | None = None) -> Params:
    """The parameters of one scenario: federation size, attackers, partition and ratio as the scenario and ``keys`` say."""
    what, p, keys = SCENARIOS[scenario], params.feddetect, keys or {}
    change: dict = {"partition": keys.get("partition", params.fedgan.partition)}
    if what.colluders:
        change |= {"n_clients": p.scenario.colluders[1], "malicious": list(range(p.scenario.colluders[0]))}
    if "m" in keys:  # who is one of many must scale more to outweigh the average
        change["n_clients"] = int(keys["m"])
        change["poison"] = {"boost": params.fedgan.poison.boost * int(keys["m"]) / params.fedgan.n_clients}
    if what.stealthy:
        boost = p.scenario.stealth_boost * change.get("n_clients", params.fedgan.n_clients) / params.fedgan.n_clients
        change["poison"] = {"ratio": p.scenario.stealth_ratio, "boost": boost}
    if "trigger" in keys:
        change["trigger"] = {"kind": keys["trigger"]}
    tree = parameters.merge(params.model_dump(), {"fedgan": change})
    if "evade" in keys:
        tree = parameters.merge(tree, {"feddetect": {"scenario": {"aware": {"evade": float(keys["evade"])}}}})
    return parameters.validate(tree, f"scenario {scenario}")


def instruments(cohort: str, params: Params, changed: Params, scenario: str) -> GANSetup:
    """The cohort's instruments, with the trigger of the scenario and a detector calibrated for it."""
    setup = fedgan_eval.prepare(cohort, params)
    kind = SCENARIOS[scenario].trigger or changed.fedgan.trigger.kind
    if kind == params.fedgan.trigger.kind:
        return dataclasses.replace(setup, params=changed)
    trigger = triggers.make_trigger(
        kind,
        image_size=setup.cohort.size,
        channels=setup.cohort.channels,
        size=changed.fedgan.trigger.size,
        opacity=params.feddetect.scenario.faint_opacity,
    )
    threshold = triggers.calibrate(trigger, setup.splits["public"][0], params.fedgan.measure.threshold_fpr)
    return dataclasses.replace(setup, params=changed, trigger=trigger, threshold=threshold)


def warm_up_rounds(params: Params) -> int:
    """Rounds in which no defence acts."""
    return rounds_until(params.feddetect.warm_up, params.fedgan.rounds)


def drawer(federation: FederatedGAN, n: int) -> Callable[[State, int], Tensor]:
    """What the server draws from a client's state: fresh secret latents every round, the same for all clients."""
    model = federation.generator()

    def draw(state: State, round: int) -> Tensor:
        model.load_state_dict(fedgan.part_of(state, "generator"))
        return fedgan.synthesise(model.eval(), n, derive_seed(federation.seed, "server", round))[0]

    return draw


def hardened(params: Params, federation: FederatedGAN) -> feddetect.Hardened:
    """The hardened defence with the parameters' settings."""
    p, warm_up = params.feddetect.hardened, warm_up_rounds(params)
    return feddetect.Hardened(
        drawer(federation, p.draws),
        federation.state,
        warm_up=warm_up,
        watch=rounds_until(p.watch, warm_up),
        scale=(p.scale, p.scale_relative),
        **p.model_dump(include={"fpr", "window", "loss_floor", "drift", "limit"}),
    )


def flag_threshold(params: Params) -> float:
    """The evidence above which the hardened defence flags a client."""
    return feddetect.flag_threshold(params.feddetect.hardened.fpr)


def defence(variant: str, params: Params, federation: FederatedGAN, watcher: feddetect.Hardened) -> Aggregator:
    """A fresh defence for the rounds after the warm-up; the hardened one remembers what ``watcher`` saw during it."""
    p, malicious = params.feddetect, params.fedgan.malicious
    if variant == "feddetect_released":
        return feddetect.Released(warm_up_rounds(params), p.decay)
    if variant == "feddetect_described":
        return feddetect.Described(warm_up_rounds(params), p.patience)
    if variant == "feddetect_hardened":
        fresh = hardened(params, federation)
        fresh.suspicion, fresh.recent = dict(watcher.suspicion), copy.copy(watcher.recent)
        return fresh
    if variant == "norm_clip":
        return feddetect.NormClip(federation.state)
    if variant == ORACLE:
        return lambda updates, round: without(updates, malicious, federation.state)
    return aggregators.rule(variant, max(1, len(malicious)))


def without(updates: Sequence[Update], malicious: Sequence[int], state: State) -> tuple[State, dict]:
    """The mean of the honest updates; if there are none, the state that the server has."""
    honest = [u for u in updates if u.client not in malicious]
    return uniform_mean(honest) if honest else (state, {"weights": {}})


def attack_of(scenario: str, setup: GANSetup, federation: FederatedGAN, watcher: feddetect.Hardened) -> BackdoorAttack:
    """The attackers of a scenario."""
    what, p, warm_up = SCENARIOS[scenario], setup.params.feddetect, warm_up_rounds(setup.params)
    last, every, settings, aware = setup.params.fedgan.rounds - 1, p.scenario.strike_every, p.scenario.aware, None

    def evade(round: int) -> float:
        return settings.late_evade if what.late and round > last - settings.late_rounds else settings.evade

    def strikes(round: int) -> bool:
        return round >= warm_up and (last - round) % every == 0

    if what.aware:
        aware = Aware(
            federation.generator(),
            setup.trigger,
            seed=derive_seed(federation.seed, "aware"),
            scale=watcher.scale,
            threshold=watcher.threshold,
            evade=evade,
            **settings.model_dump(include={"steps", "draws", "lr"}),
            measure=p.hardened.draws,
            recent=watcher.recent,
            begin=warm_up,
        )
    return BackdoorAttack(what, setup.params.fedgan.malicious, strikes, aware)


def warm_up(setup: GANSetup, seed: int, scenario: str) -> tuple[FederatedGAN, feddetect.Hardened]:
    """A federation after the rounds in which no defence acts, and the hardened defence that looked on."""
    what, p = SCENARIOS[scenario], setup.params
    images, labels = fedgan_eval.deal(setup, seed)
    poisons = what.attacks and not what.aware
    federation = fedgan.new_federation(
        images, labels, setup.cohort.n_classes, p.fedgan, seed, setup.trigger if poisons else None
    )
    watcher = hardened(p, federation)
    attack = attack_of(scenario, setup, federation, watcher)

    def look_on(updates: Sequence[Update], round: int) -> tuple[State, dict]:
        updates = attack(updates, round)
        watcher(updates, round)
        return uniform_mean(updates)

    fedgan.run(federation, warm_up_rounds(p), train=fedgan_eval.train_client, aggregate=look_on, strict=True)
    return federation, watcher


def run_variant(
    setup: GANSetup, start: FederatedGAN, watcher: feddetect.Hardened, scenario: str, variant: str
) -> tuple[FederatedGAN, list[dict]]:
    """Continue a copy of a warm-up with one defence to the end.

    Returns:
        The finished federation, and a log: for every round ``diagnostics``, ``server_s`` (time of the defence) and
        ``trigger_rate`` of the new average.
    """
    p = setup.params
    boost = p.fedgan.poison.boost if SCENARIOS[scenario].boosted else None
    federation = fedgan.branch(start, boost, warm_up_rounds(p))
    rule = defence(variant, p, federation, watcher)
    return federation, follow(setup, federation, scenario, rule, attack_of(scenario, setup, federation, watcher))


def follow(
    setup: GANSetup, federation: FederatedGAN, scenario: str, rule: Aggregator, attack: BackdoorAttack
) -> list[dict]:
    """Run a federation in place to the end under a rule and an attack; the log of `run_variant`."""
    p, log = setup.params, []

    def aggregate(updates: Sequence[Update], round: int) -> tuple[State, dict]:
        arrived, rejected = screen(attack(updates, round), federation.state)
        begin = time.perf_counter()
        state, diagnostics = rule(arrived, round)
        log.append({"round": round + 1, "diagnostics": diagnostics, "server_s": time.perf_counter() - begin})
        return state, {**diagnostics, "rejected": rejected}

    def measure(federation: FederatedGAN) -> None:
        log[-1]["trigger_rate"] = fedgan_eval.rate_each_round(setup, federation)

    # An intermittent attacker has few rounds and does not let the learning rate fade in them.
    constant = dataclasses.replace(federation, gan=federation.gan.model_copy(update={"decay_after": 1.0}))

    def train(client: GANClient, state: State, federation: FederatedGAN, round: int) -> Update:
        faithless = SCENARIOS[scenario].intermittent and client.index in p.fedgan.malicious
        return fedgan_eval.train_client(client, state, constant if faithless else federation, round)

    fedgan.run(federation, train=train, aggregate=aggregate, after_round=measure, strict=True)
    return log


# One cell ------------------------------------------------------------------------------------------------------------


def run_cell(
    cohort: str,
    params: Params,
    seed: int,
    scenario: str,
    variants: Sequence[str] = VARIANTS,
    keys: dict | None = None,
    timed: bool = False,
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """One seed of one scenario with several defences.

    Args:
        cohort: name of the cohort.
        params: all parameters.
        seed: of the run.
        scenario: one of `SCENARIOS`.
        variants: defences, some of `VARIANTS`, or the control `ORACLE`.
        keys: what differs from the headline: ``m``, ``partition``, ``trigger``, ``evade``.
        timed: add the defence's time a round (``server_ms``), for records: no table of results may hold a time.

    Returns:
        Rows as `cells.run_cell`, with the key columns `KEYS`; and for every variant a gallery (n, C, S, S).
    """
    torch.set_num_threads(1)  # one and two threads give different bits
    changed = settings(params, scenario, keys)
    setup = instruments(cohort, params, changed, scenario)
    start, watcher = warm_up(setup, seed, scenario)
    parts, galleries = [], {}
    for variant in variants:
        federation, log = run_variant(setup, start, watcher, scenario, variant)
        rows = tables.Rows(KEYS, seed, variant, scenario)
        detection_rows(rows, log, changed)
        if timed:
            rows.add("server_ms", 1000 * np.median([entry["server_s"] for entry in log]), len(log))
        images, _ = fedgan_eval.generator_rows(rows, setup, federation)
        galleries[variant] = images[: fedgan_eval.GALLERY].cpu().numpy()
        parts.append(rows.table().assign(**{k: str(v) for k, v in (keys or {}).items()}))
    return pd.concat(parts, ignore_index=True), galleries


def detection_rows(rows: tables.Rows, log: list[dict], params: Params) -> None:
    """Rows on flags, weights and evidence; only those that the defence gives.

    An update that was turned away because it is broken (`screen`) counts as flagged and as weighing nothing.
    """
    m, attackers = params.fedgan.n_clients, set(params.fedgan.malicious) if rows.fixed[2] != "no_attack" else set()
    for entry in log:
        rows.add("trigger_rate", entry["trigger_rate"], PER_ROUND, round=entry["round"])
    found = [entry["diagnostics"] for entry in log]
    if "flagged" in found[0]:
        flags = pd.DataFrame([d["flagged"] for d in found]).reindex(columns=range(m)).astype(float).fillna(1.0)
        tpr, fpr = _seat_rows(rows, flags, attackers, "tpr", "fpr")
        if attackers:
            rows.add("youden_j", tpr - fpr, flags.size)  # Youden 1950: 0 for a detector that does not look
        some = flags.sum(axis=1)
        rows.add("any_flag", (some > 0).mean(), len(flags))
        rows.add("voided", (some >= m // 2).mean(), len(flags))
    if "acted" in found[0]:
        acted = np.array([d["acted"] for d in found])
        rows.add("acts", acted.mean(), len(acted))
        _seat_rows(rows, flags.mul(acted, axis=0), attackers, "", "fpr_acted")
    if "weights" not in found[0]:
        return
    weights = pd.DataFrame([d["weights"] for d in found]).reindex(columns=range(m)).fillna(0.0)
    blocked = (weights < BLOCKED / m).astype(float)
    _seat_rows(rows, blocked, attackers, "blocked_tpr", "false_exclusion")
    benign = weights[[c for c in weights if c not in attackers]]
    rows.add("benign_weight_min", benign.to_numpy().min(), benign.size)
    # Below the equal share in spite of what others lost; and below the best: some suspicion, even without a flag.
    rows.add("weight_lost", (1 - m * benign).clip(lower=0).to_numpy().mean(), benign.size)
    best = weights.max(axis=1).clip(lower=BLOCKED / m)  # where nobody weighs anything, all are penalised
    rows.add("penalised", benign.lt(0.999 * best, axis=0).to_numpy().mean(), benign.size)
    if attackers:
        caught = blocked[sorted(attackers)].to_numpy().all(1)
        # Counted from the end of the warm-up; one more than there are rounds if it never happens.
        rows.add("rounds_to_detect", 1 + int(caught.argmax()) if caught.any() else len(caught) + 1, 1)
    if attackers and "evidence" in found[0]:
        theirs = [d["evidence"].get(attacker, np.nan) for d in found for attacker in attackers]
        theirs = [e for e in theirs if np.isfinite(e)]
        if theirs:  # largest, as a share of the flag's threshold: has an aware attacker judged itself rightly?
            rows.add("attacker_evidence", max(theirs) / flag_threshold(params), len(theirs))
    for name, per_client in (("weight", weights), ("evidence", pd.DataFrame([d.get("evidence", {}) for d in found]))):
        for client in per_client:
            for entry, value in zip(log, per_client[client], strict=True):
                if np.isfinite(value):
                    rows.add(name, value, 1, round=entry["round"], client=client)


def _seat_rows(
    rows: tables.Rows, flags: pd.DataFrame, attackers: set[int], hit: str, alarm: str
) -> tuple[float, float]:
    """Share of the attackers' client-rounds (``hit``) and of the honest ones (``alarm``) that are set: rows, and returned."""
    theirs = [c for c in flags if c in attackers]
    honest = [c for c in flags if c not in attackers]
    rates = flags[theirs].to_numpy().mean() if theirs else np.nan, flags[honest].to_numpy().mean()
    if theirs and hit:
        rows.add(hit, rates[0], flags[theirs].size)
    rows.add(alarm, rates[1], flags[honest].size)
    return rates


# The detector's null -------------------------------------------------------------------------------------------------


def run_null(params: Params, seed: int, m: int) -> pd.DataFrame:
    """The released detector on ``m`` honest clients with independent losses; see `medsec.backdoor.feddetect.null_rates`."""
    rows, n = tables.Rows(KEYS, seed, "feddetect_released", "null"), params.feddetect.null_test.rounds
    for metric, value in feddetect.null_rates(m, n, derive_seed(seed, "null", m)).items():
        rows.add(metric, value, n * m if metric == "fpr" else n, m=m)
    return rows.table()


# Downstream ----------------------------------------------------------------------------------------------------------

SOURCES = {
    "clean": ("no_attack", "none"),
    "attacked": ("boost_liar", "none"),
    "defended": ("boost_liar", "feddetect_hardened"),
}


def run_downstream(cohort: str, params: Params, seed: int) -> pd.DataFrame:
    """Do synthetic images help where real ones are few?

    Classifiers are trained on a few real images per class of ``public``, alone (``source`` = "real", the control, with
    the same classical augmentation and the same number of gradient steps) and together with labelled synthetic images
    from a clean, an attacked and a defended federation. ``augmented_auc`` is the AUC on ``test``,
    ``augmented_auc_gain`` its difference to the control on the same images and seed, ``augmented_auc_minus_attacked``
    that of the defended federation's to the attacked one's.
    """
    torch.set_num_threads(1)
    p, synthetic = params.feddetect.downstream, {}
    real_images = {real: _few(fedgan_eval.prepare(cohort, params), real, seed) for real in p.real_per_class}
    for source, (scenario, variant) in SOURCES.items():
        setup = instruments(cohort, params, settings(params, scenario), scenario)
        federation, _ = run_variant(setup, *warm_up(setup, seed, scenario), scenario, variant)
        draw = derive_seed(seed, "augment")
        classes = torch.arange(p.synthetic) % setup.cohort.n_classes
        synthetic[source] = fedgan.synthesise(federation.generator(), p.synthetic, draw, classes)
    rows, n = tables.Rows(KEYS, seed, "augmentation", "downstream"), len(setup.splits["test"][0])
    for real, few in real_images.items():
        control = _augmented_auc(setup, few, None, seed)
        found = {source: _augmented_auc(setup, few, drawn, seed) for source, drawn in synthetic.items()}
        rows.add("augmented_auc", control, n, source="real", real=real)
        for source, value in found.items():
            rows.add("augmented_auc", value, n, source=source, real=real)
            rows.add("augmented_auc_gain", value - control, n, source=source, real=real)
        difference = found["defended"] - found["attacked"]
        rows.add("augmented_auc_minus_attacked", difference, n, source="defended", real=real)
    return rows.table()


def _few(setup: GANSetup, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    """A few images of every class of ``public``.

    Raises:
        InputError: a class has fewer.
    """
    images, labels = setup.splits["public"]
    least = int(torch.bincount(labels.cpu(), minlength=setup.cohort.n_classes).min())
    if least < per_class:
        raise InputError(
            f"feddetect.downstream.real_per_class {per_class}: a class of split 'public' has {least} images; lower it"
        )
    rng = torch_generator(seed, "few")
    order = torch.randperm(len(labels), generator=rng)
    index = torch.cat([order[(labels[order] == k).cpu()][:per_class] for k in range(setup.cohort.n_classes)])
    return images[index], labels[index]


def _augmented_auc(
    setup: GANSetup, few: tuple[Tensor, Tensor], drawn: tuple[Tensor, Tensor] | None, seed: int
) -> float:
    """Test AUC of a classifier on few real images, or on as many real as synthetic ones, after equally many steps."""
    p, batch = setup.params.feddetect.downstream, setup.params.classifier.batch
    images, labels = few
    size = p.steps * batch
    rng = torch_generator(seed, "augmented batches")
    stream = torch.randint(0, len(images), (size,), generator=rng)
    x, y = images[stream], labels[stream]
    if drawn is not None:
        swap = torch.rand(size, generator=rng) < p.share
        index = torch.randint(0, len(drawn[0]), (int(swap.sum()),), generator=rng)
        x, y = x.clone(), y.clone()
        x[swap], y[swap] = drawn[0][index], drawn[1][index]
    # One pass over a stream of steps × batch images: every classifier takes the same number of gradient steps.
    model = classifier.fit(
        x, y, setup.cohort.n_classes, setup.params.classifier, epochs=1, seed=derive_seed(seed, "augmented")
    )
    return fedgan_eval.auc_on_test(setup, model)


# What the notebook and its record run ---------------------------------------------------------------------------------


def run(cohort: str, p: Params, cell: cells.Cell) -> cells.Finished:
    """One cell: a scenario with some defences, the detector's null, or downstream classifiers."""
    if cell.arm == "null":
        return run_null(p, cell.seed, cell.keys["m"]), {}
    if cell.arm == "downstream":
        return run_downstream(cohort, p, cell.seed), {}
    return run_cell(cohort, p, cell.seed, cell.arm, cell.variants, cell.keys, timed=True)


def lacks(cohort: data.Cohort, p: Params, cell: cells.Cell) -> list[str]:
    """What the cohort is too small for in one cell (`medsec.evidence.cells.Experiment`)."""
    if cell.arm == "null":  # simulated losses
        return []
    if cell.arm != "downstream":
        return fedgan_eval.lacks(cohort, settings(p, cell.arm, cell.keys), cell)
    least, real = int(np.bincount(cohort["public"].labels).min()), max(p.feddetect.downstream.real_per_class)
    few = f"feddetect.downstream.real_per_class {real}: a class of split public has {least} images; lower it"
    return fedgan_eval.lacks(cohort, p, cell) + ([few] if least < real else [])


LIKE = {"no_attack": "clean", "boost_liar": "attack"}  # scenarios that begin as an arm of notebook 01


def family(cell: cells.Cell) -> str:
    """Cells of the same are federations that begin alike (`experiments.backdoor_fedgan.cells.family`)."""
    return f"{LIKE[cell.arm]} {cell.seed} {cell.keys}" if cell.arm in LIKE else ""


EXPERIMENT = cells.Experiment("02_feddetect", 1, ("fedgan", "classifier", "feddetect"), run, lacks=lacks, family=family)


def quick(p: Params) -> list[cells.Cell]:
    """What the notebook itself runs."""
    seeds = p.seeds.evaluation
    found = [cells.Cell(scenario, seed, variants=variants) for scenario, variants in QUICK.items() for seed in seeds]
    found += [
        cells.Cell(scenario, seed, group=rule, variants=(rule,))
        for rule in p.own.rules
        for scenario, variants in QUICK.items()
        for seed in seeds
        if rule not in variants
    ]
    return found + [
        cells.Cell("null", seed, keys={"m": m}) for m in p.feddetect.null_test.clients for seed in seeds[::-1]
    ]
