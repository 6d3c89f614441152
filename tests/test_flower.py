"""Flower in one process: the same bits as the loop, and faults that end no run and change no result."""

import functools
import io
import math
import re
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import ndarray_to_bytes
from test_fedgan import BASE
from test_hostile_updates import KINDS, SERVERS, START, _small_forests, honest  # noqa: F401

from experiments import flower as app
from experiments import params as parameters
from medsec.core import paths
from medsec.core.errors import InputError
from medsec.federated import flower, secagg
from medsec.federated.aggregators import fedavg, uniform_mean
from medsec.federated.in_process import InProcessGrid
from medsec.federated.rounds import NoQuorum, Update, run_round

CLIENTS, ROUNDS = 5, 4


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDSEC_FEDERATION", str(tmp_path))
    return tmp_path


# ------------------------------------------------------------------------------------------- a toy client with a memory


class Walker:
    """What it sends depends on all that it did before: a lost or doubled round shows in every later bit."""

    def __init__(self, index, change=None):
        self.index, self.steps, self.change = index, 0.0, change

    def train(self, state, round):
        self.steps = 0.5 * self.steps + round + self.index + 1
        sent = honest(self.index, state)
        moved = {k: v + 1e-3 * self.steps if v.is_floating_point() else v for k, v in sent.state.items()}
        update = Update(self.index, moved, sent.n_samples, sent.metrics)
        return update if self.change is None else self.change(update, state)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def toy_app(changes=None):
    return flower.client_app(
        lambda _, node: Walker(node["client"], (changes or {}).get(node["client"])), paths.federation
    )


def nodes(n=CLIENTS):
    return [{"client": i} for i in range(n)]


def serve(grid, aggregate=fedavg, name="run", rounds=ROUNDS, n_clients=CLIENTS, **more):
    more = {"settings": {"seed": 0}, "timeout": 0.1, "wait": 0} | more
    folder = paths.federation() / name
    return flower.serve(grid, START, aggregate, rounds=rounds, n_clients=n_clients, folder=folder, **more)


def undisturbed(aggregate=fedavg, away=(), rounds=ROUNDS):
    """The plain loop; ``away``: pairs of client and round from 0, in which it takes no part."""
    state, walkers = START, [Walker(i) for i in range(CLIENTS)]

    def train(client, state, round):
        if (client, round) in away:
            raise InputError("away")
        return walkers[client].train(state, round)

    for t in range(rounds):
        state, _, _ = run_round(state, range(CLIENTS), train, aggregate, t)
    return state


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


class Disturbed(InProcessGrid):
    """``answered(round, message, answer) -> answers``: what becomes of each answer on its way."""

    def __init__(self, answered, app=None, configs=None):
        super().__init__(app or toy_app(), configs or nodes())
        self.answered = answered

    def push_messages(self, messages):
        messages = list(messages)
        ids = super().push_messages(messages)
        for each, message in zip(ids, messages, strict=True):
            (answer,) = self.answers[each]
            self.answers[each] = self.answered(message.content["order"]["round"], message, answer)
        return ids


def client_of(message):
    return message.metadata.dst_node_id - 100


# ------------------------------------------------------------------------------------------------------------ same bits


@pytest.mark.parametrize("name", SERVERS)
def test_every_rule_gives_the_bits_of_the_loop(name):
    state, history = serve(InProcessGrid(toy_app(), nodes()), SERVERS[name]())
    assert same(state, undisturbed(SERVERS[name]()))
    assert [line["round"] for line in history] == list(range(1, ROUNDS + 1))
    assert not any(line["rejected"] or line["absent"] for line in history)


def small(kind="gan", **config):
    """A real federation small enough for a test."""
    images = {"client": 96, "public": 48, "reference": 96, "val": 24, "test": 24}
    change = {
        "cohorts": {"fundus": {"size": 28, "images": images}},
        "fedgan": BASE | {"images_per_client": 24},
        "inversion": {
            "federation": {"n_clients": 3, "images_per_client": 24, "rounds": 3},
            "autoencoder": {"epochs": 1},
        },
        "feddetect": {"hardened": {"draws": 32}},
    }
    params = parameters.validate(parameters.merge(parameters.load().model_dump(), change))
    plain = {"cohort": "fundus", "seed": 3, "rule": "none", "defence": "none", "attack": False}
    shape = {"size": 28, "channels": 3, "classes": 2}
    return app.Federation(kind=kind, **plain | shape | config, params=params.model_dump(mode="json"))


REAL = {
    "hardened rule, attacked": {"rule": "feddetect_hardened", "attack": True},
    "released rule": {"rule": "feddetect_released"},
    "norm clipping": {"rule": "norm_clip"},
    "multi-Krum": {"rule": "multi_krum"},
    "classifier": {"kind": "classifier"},
    "classifier, private": {"kind": "classifier", "defence": "dp_sgd"},
    "classifier, shadow": {"kind": "classifier", "defence": "shadow_described"},
}


@pytest.mark.parametrize("name", REAL)
def test_the_notebooks_federations_give_the_bits_of_the_loop(name, folder):
    it = small(**REAL[name])
    state, rule = app.server_side(it)
    grid = InProcessGrid(app.client_app, [{"partition-id": i} for i in range(3)])
    found, _ = serve_app(grid, it, state, rule)
    assert same(found, app.loop(it))


def serve_app(grid, it, state, rule, rounds=3):
    options = {"rounds": rounds, "n_clients": 3, "settings": it.model_dump(), "timeout": 0.1, "wait": 0}
    return flower.serve(grid, state, rule, folder=paths.federation() / "run", **options)


def test_a_hospitals_own_file_gives_the_bits_of_the_dealt_images_and_is_never_poisoned(folder):
    it = small()
    app.deal(it, folder / "hospitals")
    own = [{"client": i, "images": str(folder / "hospitals" / f"client-{i}.npz")} for i in range(3)]
    attacked = it.model_copy(update={"attack": True})  # the server may say what it likes
    found, _ = serve_app(InProcessGrid(app.client_app, own), attacked, *app.server_side(it))
    assert same(found, app.loop(it))
    assert not same(found, app.loop(attacked))
    with pytest.raises(InputError, match=r"client-0.npz.* exist in hospitals"):
        app.deal(it, folder / "hospitals")


# --------------------------------------------------------------------------------------------------------------- faults


def test_an_answer_that_is_lost_leaves_the_client_where_it_was():
    """It trained, and the server does not know: the next round starts from what the server knows."""
    lost = {(2, 1), (2, 2), (4, 0)}
    grid = Disturbed(lambda t, message, answer: [] if (client_of(message), t) in lost else [answer])
    state, history = serve(grid)
    assert same(state, undisturbed(away=lost))
    assert [sorted(map(int, line["absent"])) for line in history] == [[4], [2], [2], []]
    assert history[1]["absent"] == {"2": "no answer within 0.1 s"}


def test_a_client_that_dies_in_mid_round_comes_back_as_it_was(folder):
    died = (3, 1)
    plain = toy_app()

    def dying(message, context):
        round = message.content["order"]["round"]
        answer = plain(message, context)
        if (context.node_config["client"], round) == died:
            raise MemoryError("killed")
        return answer

    state, history = serve(InProcessGrid(dying, nodes()))
    assert same(state, undisturbed(away={died}))
    assert history[1]["absent"] == {"3": "its node failed: MemoryError: killed"}


def order_of(round, since, run="run-01234567"):
    since = [since] * CLIENTS
    content = {"run": run, "round": round, "since": since, "settings": "{}"}
    return RecordDict({"state": ArrayRecord(START), "order": ConfigRecord(content)})


def asked(content):
    grid = InProcessGrid(toy_app(), nodes(1))
    (answer,) = grid.send_and_receive([Message(content, 100, flower.PLAIN)])
    return answer


def test_a_message_that_comes_late_takes_nothing_away():
    """It may be too late to train on (nobody waits for that answer), but what came after it goes on."""
    for round, since in ((0, -1), (1, 0), (2, 1)):
        assert not asked(order_of(round, since)).has_error()
    assert not asked(order_of(0, -1)).has_error()
    asked(order_of(1, 0))
    assert not asked(order_of(3, 2)).has_error()


def test_a_message_or_an_answer_that_comes_twice_changes_nothing():
    plain, answers = toy_app(), []

    def twice(message, context):
        answers.append([plain(message, context), plain(message, context)])
        return answers[-1][1]

    state, _ = serve(Disturbed(lambda t, message, answer: [answer, answer], twice))
    assert same(state, undisturbed())
    for first, second in answers:
        assert same(first.content["state"].to_torch_state_dict(), second.content["state"].to_torch_state_dict())


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize("point", ["before an answer", "after all answers", "in the rule"])
def test_a_server_that_is_killed_goes_on_from_its_last_round(name, point, folder, monkeypatch):
    def killed(t, message, answer):
        if t == 2 and client_of(message) == (0 if point == "before an answer" else CLIENTS - 1):
            raise KeyboardInterrupt
        return [answer]

    rule, grid = SERVERS[name](), Disturbed(killed)
    if point == "in the rule":
        grid = InProcessGrid(toy_app(), nodes())

        def dying(state, clients, train, aggregate, round, **more):
            found = run_round(state, clients, train, aggregate, round, **more)
            if round == 2:
                raise KeyboardInterrupt
            return found

        monkeypatch.setattr(flower, "run_round", dying)
    with pytest.raises(KeyboardInterrupt):
        serve(grid, rule)
    monkeypatch.setattr(flower, "run_round", run_round)
    before = (folder / "run" / "server.pt").read_bytes()
    state, history = serve(InProcessGrid(toy_app(), nodes()), SERVERS[name]())
    assert same(state, undisturbed(SERVERS[name]()))
    assert len(history) == ROUNDS
    assert (folder / "run" / "server.pt").read_bytes() != before


def test_a_finished_run_is_not_run_again():
    first, _ = serve(InProcessGrid(toy_app(), nodes()))

    def nobody(message, context):
        raise AssertionError("asked")

    again, history = serve(InProcessGrid(nobody, nodes()))
    assert same(first, again)
    assert len(history) == ROUNDS


def test_without_a_quorum_it_stops_and_goes_on_when_that_is_mended():
    grid = Disturbed(lambda t, message, answer: [] if t == 1 and client_of(message) > 1 else [answer])
    with pytest.raises(NoQuorum, match=r"round 1: 2 of 5 updates usable, need 3; client 2: no answer within 0\.1 s"):
        serve(grid)
    state, _ = serve(InProcessGrid(toy_app(), nodes()))
    assert same(state, undisturbed())


def test_a_client_whose_memory_is_lost_says_so_and_the_others_go_on(folder):
    def forgets(t, message, answer):
        if t == 1:
            for file in folder.glob("run-*/client-3/*.pt"):
                file.unlink()
        return [answer]

    _, history = serve(Disturbed(forgets))
    assert "what this client knew after round 2 is lost (1.pt is missing)" in history[2]["absent"]["3"]
    assert history[3]["weights"].keys() == {"0", "1", "2", "4"}


def test_what_lies_on_disk_does_not_grow(folder):
    sizes = []

    def look(t, message, answer):
        kept = list(folder.rglob("*.pt"))
        assert len(kept) <= 1 + 2 * CLIENTS
        if t and client_of(message) == 0:
            sizes.append((folder / "run" / "server.pt").stat().st_size)
        return [answer]

    _, history = serve(Disturbed(look), rounds=8)
    assert max(sizes) - min(sizes) < 8 * (2 + len(str(history[0])))  # the lines of the history


# ---------------------------------------------------------------------------------------------------------------- masks


def masked_app(changes=None):
    def build(_, node):
        return Walker(node["client"], (changes or {}).get(node["client"]))

    both = flower.client_app(build, paths.federation)
    secagg.answer_masked(both, build, paths.federation)
    return both


def masked(grid, **more):
    return serve(grid, masked=secagg.masked_round, **more)


def differ(a, b):
    return max(float((a[k] - b[k]).abs().max()) for k in a if a[k].is_floating_point())


def test_under_masks_the_server_gets_the_mean_and_no_update():
    seen = []

    def answered(answer):
        for record in answer.content.config_records.values():
            seen.extend((answer.metadata.src_node_id - 100, value) for value in record.get("masked_params", []))
        assert not any(len(array.data) for record in answer.content.array_records.values() for array in record.values())
        return answer

    class Seen(InProcessGrid):
        def answer(self, message):
            return answered(super().answer(message))

    state, history = masked(Seen(masked_app(), nodes()), rounds=1)
    expected = undisturbed(uniform_mean, rounds=1)
    assert 0 < differ(state, expected) < 2 * secagg.CLIP / secagg.LEVELS * 2
    assert state["1.num_batches_tracked"] == START["1.num_batches_tracked"]
    assert history[0]["metrics"]["3"]["loss_g"] == pytest.approx(1.3)  # what is reported stays in the clear
    weights = [(c, np.load(io.BytesIO(v))) for c, v in seen if np.load(io.BytesIO(v)).shape == (2, 1, 3, 3)]
    assert len(weights) == CLIENTS
    for client, hidden in weights:  # uniform over the whole range, and unrelated to what was sent
        sent = Walker(client).train(START, 0).state["0.weight"].numpy()
        assert 0.25 < hidden.mean() / 2**32 < 0.75
        assert hidden.std() / 2**32 > 0.15
        assert not np.allclose(hidden, (sent + secagg.CLIP) * secagg.LEVELS / (2 * secagg.CLIP), rtol=0.01)


def test_a_client_that_goes_away_under_masks_is_left_out_and_starts_where_it_was():
    class Lossy(InProcessGrid):
        def send_and_receive(self, messages, *, timeout=None):
            found = super().send_and_receive(messages, timeout=timeout)
            stage = {m.content["secaggplus_configs"].get("stage") for m in messages}
            gone = self.round == 1 and stage == {"collect_masked_vectors"}
            self.round += stage == {"unmask"}
            return [m for m in found if not (gone and m.metadata.src_node_id == 104)]

    grid = Lossy(masked_app(), nodes())
    grid.round = 0
    state, history = masked(grid)
    assert history[1]["absent"] == {"4": "not in the sum"}
    assert differ(state, undisturbed(uniform_mean, away={(4, 1)})) < 1e-4


def test_what_masks_cannot_do_is_told():
    with pytest.raises(InputError, match="2 nodes are online: a masked mean needs 3"):
        masked(InProcessGrid(masked_app(), nodes(2)), n_clients=2)
    large = {2: lambda u, _: Update(2, {k: v + 9 if v.is_floating_point() else v for k, v in u.state.items()}, 8)}
    _, history = masked(InProcessGrid(masked_app(large), nodes()), name="large", rounds=1)
    assert history[0]["absent"] == {"2": "not in the sum"}
    with pytest.raises(InputError, match="needs each client's update, which masks hide"):
        app.federation(app.run_config(["masked=true"]))


def no_array(values):
    return [b"not an array"]


def moved(weight, by):
    def change(values):
        first, second, *rest = [np.load(io.BytesIO(value)) for value in values]  # the weight, then the tensors
        return [ndarray_to_bytes(array) for array in (first + weight, second + by, *rest)]

    return change


SPOILT = {
    "no array": (no_array, {}),
    "a weight that cancels the others'": (moved(-CLIENTS * secagg.LEVELS, 0), {}),
    "far beyond the range": (moved(0, 2**28), {}),
    "no such client": (None, {"client": 99}),
    "a negative client": (None, {"client": -1}),
    "another's name": (None, {"client": 1}),
    "no name": (None, {"client": "none"}),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_client_can_stop_a_masked_round_but_spoils_nothing_for_good(name):
    change, reported = SPOILT[name]

    class Spoilt(InProcessGrid):
        def answer(self, message):
            answer = super().answer(message)
            record = answer.content["secaggplus_configs"]
            if message.metadata.dst_node_id == 103 and "masked_params" in record:
                if change:
                    record["masked_params"] = change(record["masked_params"])
                answer.content["fitres.metrics"].update(reported)
            return answer

    stopped = r"round 0: (no masked mean|somebody spoilt the sum): .*; the same call tries it again"
    with pytest.raises(InputError, match=stopped):
        masked(Spoilt(masked_app(), nodes()))
    state, history = masked(InProcessGrid(masked_app(), nodes()))
    assert differ(state, undisturbed(uniform_mean)) < 1e-4
    assert not any(line["absent"] for line in history)


def test_a_text_that_is_reported_under_masks_is_not_kept():
    long = {2: lambda u, _: replace(u, metrics={"text": "x" * 10**6, "loss_g": 1.0})}
    _, history = masked(InProcessGrid(masked_app(long), nodes()), rounds=1)
    assert history[0]["metrics"]["2"] == {"loss_g": 1.0}


def test_no_mean_of_two_leaves_the_masks():
    class Lossy(InProcessGrid):
        def send_and_receive(self, messages, *, timeout=None):
            stage = {m.content["secaggplus_configs"].get("stage") for m in messages}
            found = super().send_and_receive(messages, timeout=timeout)
            return [m for m in found if not (stage == {"collect_masked_vectors"} and m.metadata.src_node_id == 102)]

    with pytest.raises(InputError, match="round 0: no masked mean"):
        masked(Lossy(masked_app(), nodes(3)), n_clients=3)


def test_a_masked_round_needs_its_quorum():
    with pytest.raises(NoQuorum, match="round 0: 5 clients in the masked sum, need 6"):
        masked(InProcessGrid(masked_app(), nodes()), quorum=6)


def test_a_hospital_that_insists_on_masks_refuses_a_plain_question():
    careful = [{"client": i, "masked": True} for i in range(CLIENTS)]
    with pytest.raises(NoQuorum, match="under masks only"):
        serve(InProcessGrid(masked_app(), careful))
    state, _ = masked(InProcessGrid(masked_app(), careful), name="masked")
    assert differ(state, undisturbed(uniform_mean)) < 1e-4


# -------------------------------------------------------------------------------------------------------------- hostile


DEADLY = "without memory"  # only to the client's own process, which reads it in order to send it
# What Flower's messages do not carry: these arrive as plain tensors, dictionaries and updates.
DROPPED = ("with a gradient", "parameter", "state 7", "metrics 5", "subclass of Update")
SEATS = "another's name"  # below


@pytest.mark.parametrize("kind", KINDS)
def test_no_hostile_update_ends_a_run(kind):
    """Those of `test_hostile_updates`; what cannot even be sent is an error of its client."""
    for i, (name, change) in enumerate(KINDS[kind].items()):
        if name.startswith((DEADLY, SEATS)):
            continue
        grid = InProcessGrid(toy_app({2: change}), nodes())
        state, (line,) = serve(grid, name=f"run-{i}", rounds=1)
        taken = kind == "taken" or name.startswith(DROPPED)
        assert list({**line["rejected"], **line["absent"]}) == ([] if taken else ["2"]), name
        assert line["weights"].keys() == {"0", "1", "3", "4"} | ({"2"} if taken else set())
        assert all(torch.isfinite(value).all() for value in state.values())


def damaged(name, **parts):
    """An answer of which some records are replaced."""

    def change(content):
        for key, part in parts.items():
            del content[key]
            if part is not None:
                content[key] = part

    return pytest.param(change, id=name)


def array(shape=(2,), header=None, data=None):
    stream = io.BytesIO()
    np.save(stream, np.ones(shape, np.float32))
    raw = stream.getvalue() if data is None else data
    if header:
        raw = raw.replace(str(shape).encode(), header.encode().ljust(len(str(shape)))[: len(str(shape))])
    return ArrayRecord({name: Array("float32", shape, "numpy.ndarray", raw) for name in START})


@pytest.mark.parametrize(
    "change",
    [
        damaged("no state", state=None),
        damaged("no metrics", metrics=None),
        damaged("no sender", sender=None),
        damaged("empty state", state=ArrayRecord()),
        damaged("no numpy file", state=array(data=b"\x00" * 50)),
        damaged("empty bytes", state=array(data=b"")),
        damaged("pickle", state=array(data=b"\x80\x04K\x01.")),
        damaged("a size that is not there", state=array((10**6,), header="(10**9,)")),
        damaged("another shape", state=array((3, 3))),
        damaged("lists for numbers", metrics=MetricRecord({"loss_g": [1.0, 2.0]})),
        damaged("NaN reported", metrics=MetricRecord({"loss_g": math.nan})),
        damaged("no samples", sender=ConfigRecord({"client": 2})),
        damaged("text for samples", sender=ConfigRecord({"client": 2, "n_samples": "8"})),
        damaged("negative samples", sender=ConfigRecord({"client": 2, "n_samples": -8})),
        damaged("text for the client", sender=ConfigRecord({"client": "2", "n_samples": 8})),
        damaged("no such client", sender=ConfigRecord({"client": 99, "n_samples": 8})),
        damaged("list for the client", sender=ConfigRecord({"client": [2], "n_samples": 8})),
        damaged("record of another kind", sender=MetricRecord({"client": 2})),
    ],
)
def test_no_damaged_answer_ends_a_run(change):
    def answered(t, message, answer):
        if client_of(message) == 2:
            change(answer.content)
        return [answer]

    state, history = serve(Disturbed(answered))
    assert all({**line["rejected"], **line["absent"]}.keys() == {"2"} for line in history)
    assert same(state, undisturbed(away={(2, t) for t in range(ROUNDS)}))


def stranger():
    """An app in which the node with ``"stranger": True`` sends something else under the name of its client."""
    plain = toy_app()

    def answering(message, context):
        answer = plain(message, context)
        if context.node_config.get("stranger"):
            forged = {k: v + 1 for k, v in answer.content["state"].to_torch_state_dict().items()}
            answer.content["state"] = ArrayRecord(forged)
        return answer

    return answering


def test_nobody_takes_the_seat_of_one_who_is_online():
    """Not even in the rounds that its holder misses; the stranger is there from the second round on."""
    configs = [*nodes(), {"client": 1, "stranger": True}]

    def answered(t, message, answer):
        late = t == 0 and client_of(message) == 5
        return [] if late or (t == 2 and client_of(message) == 1) else [answer]

    state, history = serve(Disturbed(answered, stranger(), configs))
    assert same(state, undisturbed(away={(1, 2)}))
    assert [list(line["absent"]) for line in history] == [[], [], ["1"], []]


def test_what_an_answer_says_of_its_sender_is_not_believed():
    """Its node uploads it, and can forge that: here node 101's number, whose seat is client 1's."""
    configs = [*nodes(), {"client": 1, "stranger": True}]

    def answered(t, message, answer):
        if client_of(message) == 5:
            answer.metadata.__dict__["_src_node_id"] = 101
        return [answer] if t or client_of(message) != 5 else []

    state, _ = serve(Disturbed(answered, stranger(), configs))
    assert same(state, undisturbed())


def test_bytes_that_are_no_message_are_their_nodes_failure():
    class Undecodable(InProcessGrid):
        def pull_messages(self, ids):
            found = super().pull_messages(ids)
            if any(message.content["sender"]["client"] == 3 for message in found):
                raise ValueError("Error parsing message")
            return found

    state, history = serve(Undecodable(toy_app(), nodes()))
    assert same(state, undisturbed(away={(3, t) for t in range(ROUNDS)}))
    assert history[0]["unseated"] == ["its node failed: ValueError: Error parsing message"]


def test_of_two_newcomers_on_one_seat_neither_is_believed():
    _, history = serve(InProcessGrid(toy_app(), [*nodes(), {"client": 1}]), rounds=1)
    assert history[0]["absent"] == {"1": "2 nodes call themselves client 1"}


def test_a_node_that_changes_its_client_is_not_heard():
    def answered(t, message, answer):
        if t == 2 and client_of(message) == 4:
            answer.content["sender"] = ConfigRecord({"client": 0, "n_samples": 8})
        return [answer]

    state, history = serve(Disturbed(answered))
    assert history[2]["absent"].keys() == {"4"}
    assert same(state, undisturbed(away={(4, 2)}))


def test_a_restarted_node_takes_its_seat_again():
    """Without a key Flower gives it another number."""
    grid = InProcessGrid(toy_app(), nodes())
    with pytest.raises(KeyboardInterrupt):
        serve(Disturbed(lambda t, m, a: (_ for _ in ()).throw(KeyboardInterrupt) if t == 2 else [a]))
    grid.contexts[777] = grid.contexts.pop(103)
    grid.contexts[777].node_id = 777
    state, history = serve(grid)
    assert same(state, undisturbed())
    assert not history[2]["absent"]


RUNS = ("../elsewhere", "/elsewhere-01234567", "", "A-01234567", "a" * 70, "run", "a/b-01234567", 3)


@pytest.mark.parametrize(
    ("run", "round", "since"),
    [
        *((run, 0, -1) for run in RUNS),
        *(("run-01234567", 1, since) for since in ("secret", 1, 5, -2, 0.0)),
        *(("run-01234567", round, -1) for round in ("1", 1.0, -1)),
    ],
)
def test_a_server_cannot_choose_where_a_client_reads_and_writes(run, round, since, folder):
    torch.save({"steps": 9.0}, folder / "secret.pt")
    answer = asked(order_of(round, since, run))
    assert "names no run or no round" in answer.error.reason
    assert [file.name for file in folder.rglob("*")] == ["secret.pt"]


# ---------------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_run_is_told_before_anybody_is_asked(folder):
    grid = InProcessGrid(toy_app(), nodes())
    serve(grid, rounds=1)
    with pytest.raises(InputError, match="run holds a run with other settings"):
        serve(grid, settings={"seed": 1})
    with pytest.raises(InputError, match="a run cannot be called 'My run'"):
        serve(grid, name="My run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (['rule="fedavgg"'], "server rule 'fedavgg': choose one of none, "),
        (['kind="classifier"', 'rule="feddetect_hardened"'], "looks at generators; use one of none"),
        (['kind="classifier"', 'rule="none"', 'defence="magic"'], "defence 'magic': choose one of"),
        (["clients=0"], "n_clients"),
        (["rounds=-1"], "rounds"),
        (['kind="segmentation"'], "kind"),
        (["round=3"], "unknown setting round: choose from name"),
        (["rule=median"], "write each as in TOML"),
        (['profile="fast"'], "unknown profile 'fast'"),
    ],
)
def test_a_wrong_setting_is_told_in_one_line(changes, message, capsys):
    assert app.main(["loop", "--set", *changes]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "own.npz is missing"),
        ({"images": np.zeros((4, 28, 28), np.uint8)}, "holds no images and labels"),
        ({"images": np.zeros((4, 28, 28)), "labels": np.zeros(4, int)}, "images must be uint8"),
        ({"images": np.zeros((4, 28, 28), np.uint8), "labels": np.zeros(3, int)}, "labels n whole numbers"),
        ({"images": np.zeros((0, 28, 28), np.uint8), "labels": np.zeros(0, int)}, "labels n whole numbers"),
        ({"images": np.zeros((4, 28, 28), np.uint8), "labels": np.array([0, 1, -1, 0])}, "whole numbers from 0"),
        (
            {"images": np.zeros((4, 32, 32), np.uint8), "labels": np.zeros(4, int)},
            r"\(1, 32, 32\) .*the run has \(3, 28",
        ),
        ({"images": np.zeros((4, 28, 28), np.uint8), "labels": np.full(4, 7)}, "classes to 7; .*with 2 classes"),
        ({"images": np.array([{}] * 4), "labels": np.zeros(4, int)}, r"holds no images and labels \(ValueError\)"),
    ],
)
def test_a_hospitals_wrong_file_is_told(arrays, message, folder):
    file = folder / "own.npz"
    if arrays is not None:
        np.savez(file, **arrays)
    with pytest.raises(InputError, match=message):
        app.build(small().model_dump(), {"client": 0, "images": str(file)})


@pytest.mark.parametrize("cohort", paths.OWN)
def test_a_server_cannot_choose_what_a_client_reads(cohort, write_npz, folder):
    """Else it could ask for the update on any folder of the hospital, as its public images."""
    file = write_npz(folder)
    it = small("classifier", cohort=cohort, defence="public_only")
    it.params["cohorts"][cohort]["path"] = str(file if cohort == "npz" else folder)
    for node in ({"partition-id": 0}, {"client": 0, "images": str(file)}):
        with pytest.raises(InputError, match="a node takes images from its own configuration only"):
            app.build(it.model_dump(), node)


class Counts:
    """A rule that remembers from its first call on."""

    def __call__(self, updates, round):
        self.calls = getattr(self, "calls", 0) + 1
        state, said = fedavg(updates)
        return {k: v + self.calls if v.is_floating_point() else v for k, v in state.items()}, said

    def bound(self, updates, round):
        return self(updates, round)


class Slotted(Counts):
    __slots__ = ("more",)


class Arrays(Counts):
    def __init__(self):
        self.seen = np.zeros(3)


class Locked(Counts):
    def __init__(self):
        self.lock = threading.Lock()


class Wraps(Counts):
    def __init__(self):
        self.inner = Counts()
        self.inner.held = START  # what it remembers lies in an attribute that is itself a rule


def closure(rule):
    return lambda updates, round: rule(updates, round)


def test_a_rule_that_remembers_from_its_first_call_goes_on():
    def killed(t, message, answer):
        if t == 2:
            raise KeyboardInterrupt
        return [answer]

    with pytest.raises(KeyboardInterrupt):
        serve(Disturbed(killed), Counts())
    state, _ = serve(InProcessGrid(toy_app(), nodes()), Counts())
    assert same(state, undisturbed(Counts()))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Counts().bound, "a rule must be a plain function, or an object"),
        (functools.partial(Counts()), "a rule must be a plain function, or an object"),
        (Slotted(), "a rule must be a plain function, or an object"),
        (closure(Counts()), "a rule must be a plain function, or an object"),
        (Wraps(), "a rule must keep what it remembers in its own attributes, not inside inner"),
        (Arrays(), r"may hold tensors, numbers, texts, .*; not this: "),
        (Locked(), r"may hold tensors, numbers, texts, .*; not this: TypeError: cannot pickle"),
    ],
)
def test_a_rule_whose_memory_cannot_be_kept_is_told_before_the_first_round(rule, message):
    def nobody(message, context):
        raise AssertionError("asked")

    with pytest.raises(InputError, match=message):
        serve(InProcessGrid(nobody, nodes()), rule)


@pytest.mark.parametrize("change", [{"n_clients": 4}, {"aggregate": uniform_mean}, {"settings": {"seed": 1}}])
def test_another_run_in_the_same_folder_is_told(change):
    grid = InProcessGrid(toy_app(), nodes())
    serve(grid, rounds=1)
    with pytest.raises(InputError, match="run holds a run with other settings"):
        serve(grid, **change)


def test_two_servers_do_not_share_a_folder(folder):
    program = "import sys, time; from pathlib import Path; from medsec.core import parallel\n"
    program += "with parallel.locked(Path(sys.argv[1])): print(flush=True), time.sleep(60)"
    command = [sys.executable, "-c", program, str(folder / "run" / "server.lock")]
    with subprocess.Popen(command, cwd=paths.ROOT, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        try:
            with pytest.raises(InputError, match=f"process {other.pid} is already running server"):
                serve(InProcessGrid(toy_app(), nodes()))
        finally:
            other.kill()


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04K\x01."])
def test_a_damaged_checkpoint_is_told(content, folder):
    serve(InProcessGrid(toy_app(), nodes()), rounds=1)
    (folder / "run" / "server.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"server\.pt is damaged"):
        serve(InProcessGrid(toy_app(), nodes()))


def test_a_server_that_is_killed_in_its_first_round_is_the_same_run_again(folder):
    grid = Disturbed(lambda t, message, answer: (_ for _ in ()).throw(KeyboardInterrupt))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            serve(grid)
    assert len(list(folder.glob("run-*"))) == 1


def test_a_client_cannot_fill_the_servers_disk_with_what_it_reports():
    many = {2: lambda u, _: replace(u, metrics={f"m{i}": 1.0 for i in range(100)})}
    long = {2: lambda u, _: replace(u, metrics={"m" * 1000: 1.0})}
    for i, change in enumerate((many, long)):
        _, history = serve(InProcessGrid(toy_app(change), nodes()), name=f"run-{i}", rounds=1)
        assert history[0]["rejected"].keys() == {"2"}


def test_a_hospital_decides_on_its_defence_and_on_public_images(folder):
    it = small("classifier", defence="gradient_noise")
    app.deal(it, folder / "hospitals")
    node = {"client": 0, "images": str(folder / "hospitals" / "client-0.npz")}
    app.build(it.model_dump(), node | {"defence": "gradient_noise"})
    with pytest.raises(InputError, match="this hospital sends gradients with defence dp_sgd only, not gradient_noise"):
        app.build(it.model_dump(), node | {"defence": "dp_sgd"})
    public = it.model_copy(update={"defence": "public_only"}).model_dump()
    with pytest.raises(InputError, match="reads public images of fundus and keeps networks of them"):
        app.build(public, node)
    app.build(public, node | {"cohort": "fundus"})
    with pytest.raises(InputError, match="a run cannot be called"):
        app.federation(app.run_config(['name="../elsewhere"']))


def test_a_node_that_is_no_client_is_told():
    with pytest.raises(InputError, match="client 3 in the node's configuration: the run has clients 0 to 2"):
        app.build(small().model_dump(), {"partition-id": 3})
    with pytest.raises(InputError, match="control of notebook 03"):
        app.build(small("classifier", defence="offset").model_dump(), {"partition-id": 0})


def test_nothing_else_imports_flower():
    """It is an extra."""
    importing = re.compile(
        r"^\s*(from|import) (flwr|medsec\.federated\.(flower|in_process)|experiments\.flower)|import .*\bflower\b", re.M
    )
    files = [file for package in ("medsec", "experiments") for file in (paths.ROOT / package).rglob("*.py")]
    found = {file.relative_to(paths.ROOT).as_posix() for file in files if importing.search(file.read_text("utf-8"))}
    own = {f"medsec/federated/{name}.py" for name in ("flower", "in_process", "secagg")}
    assert found == {*own, "experiments/flower.py"}
