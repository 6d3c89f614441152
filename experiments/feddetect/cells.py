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
from experiments.backdoor_fedgan.cells import Setup
from experiments.params import Params
from medsec.backdoor import feddetect, triggers
from medsec.backdoor import gan as fedgan
from medsec.backdoor.attackers import SCENARIOS, Attack, Aware, special_trigger
from medsec.backdoor.feddetect import uniform_mean
from medsec.core.errors import InputError
from medsec.core.seeds import derive_seed, torch_generator
from medsec.evidence import cells, tables
from medsec.federated import aggregators, rounds
from medsec.federated.rounds import State, Update
from medsec.nets import fit as classifier

KEYS = ("m", "partition", "trigger", "evade", "source", "real", "round", "client")
VARIANTS = (
    "none",
    "feddetect_released",
    "feddetect_described",
    "feddetect_hardened",
    "median",
    "trimmed_mean",
    "krum",
    "multi_krum",
    "norm_clip",
)
ORACLE = "oracle"  # a control, no defence: the server is told who attacks, and leaves them out
READS_LOSSES = ("feddetect_released", "feddetect_described", "feddetect_hardened")
# To a defence that does not read losses, a liar is the attacker who sends the same and tells the truth.
SAME_BUT_FOR_LOSSES = {"liar": "honest", "framer": "boost", "boost_liar": "boost"}
# Of four values, the mean without the largest and the smallest is the median: one variant is the other's twin there.
TWIN = ("trimmed_mean", "median")
QUICK = {  # what the notebook itself runs; the rest is in the record
    "no_attack": ("none", "feddetect_released", "feddetect_hardened"),
    "boost_liar": ("none", "feddetect_hardened"),
}
BLOCKED = 0.01  # a weight below this share of the equal weight 1/m counts as blocked
UNITS = {
    "tpr": "share",
    "fpr": "share",
    "fpr_acted": "share",
    "voided": "share",
    "penalised": "share",
    "weight_lost": "share",
    "attacker_evidence": "ratio",
    "youden_j": "share",
    "any_flag": "share",
    "acts": "share",
    "blocked_tpr": "share",
    "false_exclusion": "share",
    "rounds_to_detect": "rounds",
    "benign_weight_min": "share",
    "weight": "share",
    "evidence": "z",
    "trigger_rate": "share",
    "trigger_ncc": "correlation",
    "frechet": "distance",
    "label_accuracy": "share",
    "downstream_auc": "AUC",
    "frechet_minus_clean": "distance",
    "downstream_auc_minus_clean": "AUC",
    "augmented_auc": "AUC",
    "augmented_auc_gain": "AUC",
    "augmented_auc_minus_attacked": "AUC",
    "server_ms": "ms",
}
DRAWN_EACH_ROUND = 100  # images for the trigger rate after every round


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


def instruments(cohort: str, params: Params, changed: Params, scenario: str) -> Setup:
    """The cohort's instruments, with the trigger of the scenario and a detector calibrated for it."""
    setup = fedgan_eval.prepare(cohort, params)
    kind = SCENARIOS[scenario].trigger or changed.fedgan.trigger.kind
    if kind == params.fedgan.trigger.kind:
        return dataclasses.replace(setup, params=changed)
    trigger = special_trigger(
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
    return fedgan.rounds_until(params.feddetect.warm_up, params.fedgan.rounds)


def drawer(federation: fedgan.Federation, n: int) -> Callable[[State, int], Tensor]:
    """What the server draws from a client's state: fresh secret latents every round, the same for all clients."""
    model = federation.generator()

    def draw(state: State, round: int) -> Tensor:
        model.load_state_dict({k.removeprefix("generator."): v for k, v in state.items() if k.startswith("generator.")})
        return fedgan.synthesise(model.eval(), n, derive_seed(federation.seed, "server", round))[0]

    return draw


def hardened(params: Params, federation: fedgan.Federation) -> feddetect.Hardened:
    """The hardened defence with the parameters' settings."""
    p, warm_up = params.feddetect.hardened, warm_up_rounds(params)
    return feddetect.Hardened(
        drawer(federation, p.draws),
        federation.state,
        warm_up=warm_up,
        watch=fedgan.rounds_until(p.watch, warm_up),
        fpr=p.fpr,
        scale=(p.scale, p.scale_relative),
        window=p.window,
        loss_floor=p.loss_floor,
        drift=p.drift,
        limit=p.limit,
    )


def flag_threshold(params: Params) -> float:
    """The evidence above which the hardened defence flags a client."""
    return feddetect.flag_threshold(params.feddetect.hardened.fpr)


def nearest_krum(updates: Sequence[Update], *, n_malicious: int, keep: int) -> tuple[State, dict]:
    """Krum (``keep`` = 1) or Multi-Krum, told how many attack, also where n < 2 f + 3.

    Blanchard et al. ask for n ≥ 2 f + 3, which four clients with one attacker miss by one: without the guarantee, the
    rule itself (sum of squared distances to the n − f − 2 nearest, at least one) can still be computed.
    """
    scores = aggregators._krum_scores(updates, max(1, len(updates) - n_malicious - 2))
    kept = [updates[i] for i in sorted(np.argsort(scores, kind="stable")[:keep])]
    state, _ = uniform_mean(kept)
    chosen = {u.client for u in kept}
    return state, {"weights": {u.client: (u.client in chosen) / keep for u in updates}}


def without(updates: Sequence[Update], malicious: Sequence[int], state: State) -> tuple[State, dict]:
    """The mean of the honest updates; if there are none, the state that the server has."""
    honest = [u for u in updates if u.client not in malicious]
    return uniform_mean(honest) if honest else (state, {"weights": {}})


def defence(variant: str, params: Params, federation: fedgan.Federation, watcher: feddetect.Hardened):
    """A fresh defence for the rounds after the warm-up; the hardened one remembers what ``watcher`` saw during it."""
    p, f = params.feddetect, max(1, len(params.fedgan.malicious))
    if variant == "feddetect_hardened":
        fresh = hardened(params, federation)
        fresh.suspicion, fresh.recent = dict(watcher.suspicion), copy.copy(watcher.recent)
        return fresh
    return {
        "none": lambda: uniform_mean,
        ORACLE: lambda: lambda updates, round: without(updates, params.fedgan.malicious, federation.state),
        "feddetect_released": lambda: feddetect.Released(warm_up_rounds(params), p.decay),
        "feddetect_described": lambda: feddetect.Described(warm_up_rounds(params), p.patience),
        "median": lambda: aggregators.median,
        "trimmed_mean": lambda: lambda updates, round: aggregators.trimmed_mean(updates, trim=f),
        "krum": lambda: lambda updates, round: nearest_krum(updates, n_malicious=f, keep=1),
        "multi_krum": lambda: lambda updates, round: nearest_krum(updates, n_malicious=f, keep=len(updates) - f),
        "norm_clip": lambda: feddetect.NormClip(federation.state),
    }[variant]()


def attack_of(scenario: str, setup: Setup, federation: fedgan.Federation, watcher: feddetect.Hardened) -> Attack:
    """The attackers of a scenario."""
    what, p, warm_up = SCENARIOS[scenario], setup.params.feddetect, warm_up_rounds(setup.params)
    last, every, aware = setup.params.fedgan.rounds - 1, p.scenario.strike_every, None

    def evade(round: int) -> float:
        settings = p.scenario.aware
        return settings.late_evade if what.late and round > last - settings.late_rounds else settings.evade

    def strikes(round: int) -> bool:
        return round >= warm_up and (last - round) % every == 0

    if what.aware:
        settings = p.scenario.aware
        aware = Aware(
            federation.generator(),
            setup.trigger,
            seed=derive_seed(federation.seed, "aware"),
            scale=watcher.scale,
            threshold=watcher.threshold,
            evade=evade,
            steps=settings.steps,
            draws=settings.draws,
            lr=settings.lr,
            measure=p.hardened.draws,
            recent=watcher.recent,
            begin=warm_up,
        )
    return Attack(what, setup.params.fedgan.malicious, strikes, aware)


def warm_up(setup: Setup, seed: int, scenario: str) -> tuple[fedgan.Federation, feddetect.Hardened]:
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

    fedgan.run(federation, warm_up_rounds(p), aggregate=look_on)
    return federation, watcher


def run_variant(
    setup: Setup, start: fedgan.Federation, watcher: feddetect.Hardened, scenario: str, variant: str
) -> tuple[fedgan.Federation, list[dict]]:
    """Continue a copy of a warm-up with one defence to the end.

    Returns:
        The finished federation, and a log: for every round ``diagnostics``, ``server_s`` (time of the defence) and
        ``trigger_rate`` of the new average.
    """
    p, log = setup.params, []
    boost = p.fedgan.poison.boost if SCENARIOS[scenario].boosted else None
    federation = fedgan.branch(start, boost, warm_up_rounds(p))
    rule = defence(variant, p, federation, watcher)
    attack = attack_of(scenario, setup, federation, watcher)

    def aggregate(updates: Sequence[Update], round: int) -> tuple[State, dict]:
        arrived, _ = rounds.screen(attack(updates, round), federation.state)
        begin = time.perf_counter()
        state, diagnostics = rule(arrived, round)
        log.append({"round": round + 1, "diagnostics": diagnostics, "server_s": time.perf_counter() - begin})
        return state, diagnostics

    def look(federation: fedgan.Federation) -> None:
        if not log or log[-1]["round"] != federation.round:
            return  # nobody sent anything usable, and no rule was asked
        seed = derive_seed(federation.seed, "per round")
        labels = fedgan_eval.reference_labels(setup, DRAWN_EACH_ROUND, seed)
        images, _ = fedgan.synthesise(federation.generator(), DRAWN_EACH_ROUND, seed, labels)
        log[-1]["trigger_rate"] = fedgan_eval.trigger_rate(setup, images)[0]

    # An intermittent attacker has few rounds and does not let the learning rate fade in them.
    constant = dataclasses.replace(federation, gan=federation.gan.model_copy(update={"decay_after": 1.0}))

    def train(client: fedgan.Client, state: State, federation: fedgan.Federation, round: int) -> Update:
        faithless = SCENARIOS[scenario].intermittent and client.index in p.fedgan.malicious
        return fedgan.train_client(client, state, constant if faithless else federation, round)

    fedgan.run(federation, train=train, aggregate=aggregate, after_round=look)
    return federation, log


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
        rows = tables.Rows(KEYS, UNITS, seed, variant, scenario)
        _detection_rows(rows, log, changed)
        if timed:
            rows.add("server_ms", 1000 * np.median([entry["server_s"] for entry in log]), len(log))
        galleries[variant] = _image_rows(rows, setup, federation, seed)
        parts.append(rows.table().assign(**{k: str(v) for k, v in (keys or {}).items()}))
    return pd.concat(parts, ignore_index=True), galleries


def _image_rows(rows: tables.Rows, setup: Setup, federation: fedgan.Federation, seed: int) -> np.ndarray:
    n, draw = setup.params.fedgan.measure.synthetic, derive_seed(seed, "measure")
    labels = fedgan_eval.reference_labels(setup, n, draw)
    images, _ = fedgan.synthesise(federation.generator(), n, draw, labels)
    for metric, value in fedgan_eval.describe(setup, images, labels, seed).items():
        rows.add(metric, value, n if metric != "downstream_auc" else len(setup.splits["test"][0]))
    return images[: fedgan_eval.GALLERY].cpu().numpy()


def _detection_rows(rows: tables.Rows, log: list[dict], params: Params) -> None:
    """Rows on flags, weights and evidence; only those that the defence gives.

    An update that was turned away because it is broken (`rounds.screen`) counts as flagged and as weighing nothing.
    """
    m, attackers = params.fedgan.n_clients, set(params.fedgan.malicious) if SCENARIOS[rows.fixed[2]].attacks else set()
    for entry in log:
        rows.add("trigger_rate", entry["trigger_rate"], DRAWN_EACH_ROUND, round=entry["round"])
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
    rows, n = tables.Rows(KEYS, UNITS, seed, "feddetect_released", "null"), params.feddetect.null_test.rounds
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
    for source, (scenario, variant) in SOURCES.items():
        setup = instruments(cohort, params, settings(params, scenario), scenario)
        federation, _ = run_variant(setup, *warm_up(setup, seed, scenario), scenario, variant)
        draw = derive_seed(seed, "augment")
        classes = torch.arange(p.synthetic) % setup.cohort.n_classes
        synthetic[source] = fedgan.synthesise(federation.generator(), p.synthetic, draw, classes)
    rows, n = tables.Rows(KEYS, UNITS, seed, "augmentation", "downstream"), len(setup.splits["test"][0])
    for real in p.real_per_class:
        few = _few(setup, real, seed)
        control = _augmented_auc(setup, few, None, seed)
        found = {source: _augmented_auc(setup, few, drawn, seed) for source, drawn in synthetic.items()}
        rows.add("augmented_auc", control, n, source="real", real=real)
        for source, value in found.items():
            rows.add("augmented_auc", value, n, source=source, real=real)
            rows.add("augmented_auc_gain", value - control, n, source=source, real=real)
        difference = found["defended"] - found["attacked"]
        rows.add("augmented_auc_minus_attacked", difference, n, source="defended", real=real)
    return rows.table()


def _few(setup: Setup, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
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


def _augmented_auc(setup: Setup, few: tuple[Tensor, Tensor], drawn: tuple[Tensor, Tensor] | None, seed: int) -> float:
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
    test, truth = setup.splits["test"]
    return classifier.auc(classifier.predict(model, test), truth)


# Tables --------------------------------------------------------------------------------------------------------------


def summarise(runs: pd.DataFrame, params: Params) -> pd.DataFrame:
    """The summary of a runs table, after `complete`."""
    return tables.summarise(complete(runs, params), KEYS)


def complete(runs: pd.DataFrame, params: Params) -> pd.DataFrame:
    """A runs table with the rows that follow from others.

    (1) With four clients and one attacker the trimmed mean is the median (`TWIN`). (2) Where a defence does not read
    losses, a liar's rows are those of the attacker who sends the same and tells the truth (`SAME_BUT_FOR_LOSSES`).
    (3) For all others ``<metric>_minus_clean``: the difference to the undefended federation without
    attack, on the same seed and the same size and partition of the federation.
    """
    if has_twin(params):
        like = runs[(runs["variant"] == TWIN[1]) & (runs["scenario"] != "colluders") & (runs["m"] == "")]
        runs = _with(runs, like.assign(variant=TWIN[0]))
    for liar, truthful in SAME_BUT_FOR_LOSSES.items():
        like = runs[(runs["scenario"] == truthful) & ~runs["variant"].isin(READS_LOSSES)]
        runs = _with(runs, like.assign(scenario=liar))
    return pd.concat([runs, _minus_clean(runs, params)], ignore_index=True)


def has_twin(params: Params) -> bool:
    """Whether the two variants of `TWIN` are the same rule in the headline's federation."""
    return params.fedgan.n_clients == 4 and len(params.fedgan.malicious) == 1


def _with(runs: pd.DataFrame, copied: pd.DataFrame) -> pd.DataFrame:
    """The runs and those copied rows that are not among them."""
    address = [c for c in runs.columns if c not in ("value", "n_items", "unit")]
    there = pd.MultiIndex.from_frame(runs[address].astype(str))
    copied = copied[copied["metric"] != "server_ms"]  # a time is measured or not there
    fresh = copied[~pd.MultiIndex.from_frame(copied[address].astype(str)).isin(there)]
    return pd.concat([runs, fresh], ignore_index=True)


def evade_curve(summary: pd.DataFrame, params: Params) -> pd.DataFrame:
    """The aware attacker's final trigger rate and how often it is blocked, by the evidence that it allows itself.

    Returns:
        Rows of the summary with ``name`` (defence) and ``x`` (share of the threshold), the headline's included.
    """
    metric = summary["metric"].isin(["trigger_rate", "blocked_tpr"])
    rows = summary[metric & (summary["scenario"] == "aware") & summary["variant"].isin(["none", "feddetect_hardened"])]
    rows = rows[(rows[["m", "partition", "trigger", "round", "client"]] == "").all(axis=1)]
    share = rows["evade"].where(rows["evade"] != "", str(params.feddetect.scenario.aware.evade)).astype(float)
    return rows.assign(name=rows["variant"], x=share).sort_values(["name", "x"], ascending=[False, True])


def _minus_clean(runs: pd.DataFrame, params: Params) -> pd.DataFrame:
    compared = ("frechet", "downstream_auc")
    rows = runs[runs["metric"].isin(compared) & (runs["round"] == "") & (runs["client"] == "")].copy()
    many = str(params.feddetect.scenario.colluders[1])
    rows["size"] = rows["m"].where(~((rows["scenario"] == "colluders") & (rows["m"] == "")), many)
    checker = (rows["variant"] == "none") & (rows["scenario"] == "no_attack") & (rows["trigger"] == "")
    by = ["seed", "metric", "size", "partition"]
    clean = rows[checker].set_index(by)["value"]
    joined = rows[~checker].join(clean.rename("clean"), on=by).dropna(subset="clean")
    joined["value"] -= joined["clean"]
    joined["metric"] += "_minus_clean"
    return joined[runs.columns]


# What the notebook and its record run ---------------------------------------------------------------------------------


def run(cohort: str, p: Params, cell: cells.Cell) -> cells.Finished:
    """One cell: a scenario with some defences, the detector's null, or downstream classifiers."""
    if cell.arm == "null":
        return run_null(p, cell.seed, cell.keys["m"]), {}
    if cell.arm == "downstream":
        return run_downstream(cohort, p, cell.seed), {}
    return run_cell(cohort, p, cell.seed, cell.arm, cell.variants, cell.keys, timed=True)


EXPERIMENT = cells.Experiment("02_feddetect", 1, ("fedgan", "classifier", "feddetect"), run)


def quick(p: Params) -> list[cells.Cell]:
    """What the notebook itself runs."""
    seeds = p.seeds.evaluation
    found = [cells.Cell(scenario, seed, variants=variants) for scenario, variants in QUICK.items() for seed in seeds]
    return found + [
        cells.Cell("null", seed, keys={"m": m}) for m in p.feddetect.null_test.clients for seed in seeds[::-1]
    ]
