"""Whatever a client sends or does, the round goes on, the state stays finite, and the reason is named."""

import functools
import math
from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.ensemble
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medsec.backdoor.feddetect import ClipThenTrain, Described, Hardened, NormClip, Released
from medsec.core.errors import InputError
from medsec.federated.aggregators import RULES, RootSet, fedavg, rule
from medsec.federated.rounds import LARGEST_COUNT, LARGEST_VALUE, NoQuorum, Update, run_round, screen

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about nested and quantised tensors
CLIENTS = range(5)
COUNTER = "1.num_batches_tracked"


@pytest.fixture(autouse=True, scope="module")
def _small_forests():
    """FedDetect's forests have 3 trees instead of 100: nothing here depends on whom they flag."""
    with pytest.MonkeyPatch.context() as patch:
        forest = functools.partial(sklearn.ensemble.IsolationForest, n_estimators=3)
        patch.setattr(sklearn.ensemble, "IsolationForest", forest)
        yield


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Sigmoid()).eval()


START = network().state_dict()
WEIGHTS = [name for name in START if name != COUNTER]


@torch.no_grad()
def draw(state, round):
    model = network()
    model.load_state_dict(state)
    return model(torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(round)))


def hardened():
    memory = {"window": 3, "loss_floor": 0.3, "drift": 0.5, "limit": 1.0}
    return Hardened(draw, START, warm_up=1, watch=0, fpr=0.01, scale=(0.3, 0.4), **memory)


def learns(state, round):
    """The server's own training, in the direction of honest clients."""
    return {k: v + 0.005 if k in WEIGHTS else v + 1 for k, v in state.items()}


SERVERS = {
    "fedavg": lambda: fedavg,
    **{name: lambda name=name: rule(name, 1) for name in RULES},
    "released": lambda: Released(1),
    "described": lambda: Described(1, 1),
    "hardened": hardened,
    "norm_clip": lambda: NormClip(START),
    "root_set": lambda: RootSet(START, learns),
    "clip_then_train": lambda: ClipThenTrain(START, learns),
}


def honest(client, received):
    rng = torch.Generator().manual_seed(client)
    state = {k: v + 0.01 * torch.rand(v.shape, generator=rng) if k in WEIGHTS else v + 1 for k, v in received.items()}
    return Update(client, state, 8 + client, {"loss_g": 1.0 + 0.1 * client, "last_loss_g": 1.0 - 0.1 * client})


# ---------------------------------------------------------------------------------------------------- hostile objects


class Denies(dict):
    """Raises when it is read."""

    def items(self):
        raise RuntimeError("no")

    __iter__ = keys = __getitem__ = get = items


class Turncoat(dict):
    """Harmless when it is looked through, and NaN later."""

    def get(self, name, default=None):
        return math.nan


class Pretender(Update):
    """Its fields could be anything when they are read again."""


class Odd(torch.Tensor):
    """Says yes to every question."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return torch.tensor(True)


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError

    __bool__ = __str__


def without_memory(value):
    value.untyped_storage().resize_(0)  # to read it ends the process
    return value


# ``mutate(update, received) -> what is sent``, by its name ------------------------------------------------------------


def tensor(name, new):
    """A tensor is replaced by ``new(tensor)``."""
    return lambda u, _: replace(u, state=u.state | {name: new(u.state[name])})


def element(name, number):
    """The last number of a tensor is replaced."""

    def new(value):
        flat = value.clone().flatten()
        flat[-1] = number
        return flat.reshape(value.shape)

    return tensor(name, new)


def fields(**new):
    return lambda u, _: replace(u, **new)


def reports(number):
    return lambda u, _: replace(u, metrics=u.metrics | {"loss_g": number})


def raises(error):
    """It overwrites what it received, then fails."""

    def mutate(update, received):
        for value in received.values():
            value.fill_(-1)
        raise error

    return mutate


TENSORS = {
    "float64": lambda v: v.double(),
    "float16": lambda v: v.half(),
    "bool": lambda v: v > 0,
    "complex": lambda v: v.to(torch.complex64),
    "scalar": lambda v: v.sum(),
    "longer": lambda v: torch.cat([v, v]),
    "empty": lambda v: v[:0],
    "sparse": lambda v: v.to_sparse(),
    "nested": lambda v: torch.nested.nested_tensor([v, v]),
    "quantised": lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
    "meta": lambda v: v.to("meta"),
    "with a gradient": lambda v: v.clone().requires_grad_(),
    "parameter": lambda v: nn.Parameter(v, requires_grad=False),
    "subclass": lambda v: v.as_subclass(Odd),
    "without memory": without_memory,
    "array": lambda v: v.numpy(),
    "list": lambda v: v.tolist(),
    "number": lambda v: 1.0,
    "text": lambda v: "1.0",
    "none": lambda v: None,
}
VALUES = [math.nan, math.inf, -math.inf, 3e38, -1e30, 9 * LARGEST_VALUE]
COUNTS = [-1, -(2**63), 9 * LARGEST_COUNT, 2**63 - 1]
STATES = [None, [], "state", 7, {}, START.keys(), Denies(START), Turncoat(START), nn.Linear(1, 1), np.zeros(3)]
SAMPLES = [0, -1, 2 * LARGEST_COUNT, 10**5000, math.nan, math.inf, 1e308, 8.0, True, None, "24", [24], np.bool_(True)]
SAMPLES += [np.float64(3), np.int64(-3), torch.tensor(3), 1j]
METRICS = [None, [], "loss", 1.0, Denies(), Turncoat(), {1: 1.0}, {None: 1.0}, {("a",): 1.0}]
REPORTS = [math.nan, math.inf, 10**400, -(10**5000), True, "0.7", None, [1.0], 1j, np.float32("nan"), np.float32("inf")]
REPORTS += [np.bool_(1), torch.tensor(1.0), np.ones(2), np.complex64(1), b"1", {}]
NAMES = [9, -1, 10**5000, True, None, "2", 2.0, math.nan, [2], np.float64(2), np.bool_(1)]
MESSAGES = ["weights", b"", 3, [], (), {}, math.nan, object, Update, SimpleNamespace(client=2, state={}), START]
ERRORS = [RuntimeError("out\nof memory"), InputError("lower its lr"), KeyError("w"), SystemExit(0), Unspeakable()]
ERRORS += [AssertionError(), StopIteration(), RecursionError("deep"), MemoryError(), SyntaxError("a\nb")]
ERRORS += [ExceptionGroup("several", [OSError()]), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")]
REJECTED = {
    **{f"{name} {w}": tensor(w, new) for w in WEIGHTS for name, new in TENSORS.items()},
    **{f"{name} counter": tensor(COUNTER, TENSORS[name]) for name in ("float64", "meta", "list", "none")},
    **{f"{x} in {w}": element(w, x) for w in WEIGHTS for x in VALUES},
    **{f"{x} in running_var": element("1.running_var", x) for x in (-100.0, -1e-6)},
    **{f"{x} in counter": element(COUNTER, x) for x in COUNTS},
    **{f"no {w}": lambda u, _, w=w: replace(u, state={k: v for k, v in u.state.items() if k != w}) for w in START},
    **{f"also {key!r}": lambda u, _, key=key: replace(u, state={**u.state, key: None}) for key in ("x", 1, None, b"w")},
    **{f"state {i}": fields(state=x) for i, x in enumerate(STATES)},
    **{f"samples {i}": fields(n_samples=x) for i, x in enumerate(SAMPLES)},
    **{f"metrics {i}": fields(metrics=x) for i, x in enumerate(METRICS)},
    **{f"report {i}": reports(x) for i, x in enumerate(REPORTS)},
    **{f"name {i}": fields(client=x) for i, x in enumerate(NAMES)},
    **{f"message {i}": lambda u, _, x=x: x for i, x in enumerate(MESSAGES)},
    "another's name": lambda u, _: replace(u, client=(u.client + 1) % len(CLIENTS)),
    "subclass of Update": lambda u, _: Pretender(**vars(u)),
}
ABSENT = {f"error {i}": raises(x) for i, x in enumerate(ERRORS)} | {"nothing": lambda u, _: None}
TAKEN = {  # odd, but of the right form: no rule may break
    "largest": lambda u, _: replace(u, state={k: torch.full_like(v, LARGEST_VALUE) for k, v in u.state.items()}),
    "zero": lambda u, _: replace(u, state={k: torch.zeros_like(v) for k, v in u.state.items()}),
    "smallest": tensor("0.weight", lambda v: torch.full_like(v, -LARGEST_VALUE)),
    "expanded": tensor("0.weight", lambda v: v.mean().expand(v.shape)),
    "channels last": tensor("0.weight", lambda v: v.to(memory_format=torch.channels_last)),
    "other order": lambda u, _: replace(u, state=OrderedDict(reversed(u.state.items()))),
    "received": lambda u, received: replace(u, state=received),
    "counter": element(COUNTER, LARGEST_COUNT),
    "samples": fields(n_samples=LARGEST_COUNT),
    "samples of numpy": fields(n_samples=np.int64(3)),
    "no metrics": fields(metrics={}),
    "metrics of the history": fields(metrics={"round": 1e300, "client": -5, "loss_g": np.float32(2)}),
    **{f"reports {x}": reports(x) for x in (1e308, -1e308, 0, 1e-320)},
}
KINDS = {"rejected": REJECTED, "absent": ABSENT, "taken": TAKEN}
CHANGES = st.one_of(*(st.tuples(st.just(kind), st.sampled_from(list(names))) for kind, names in KINDS.items()))
ROUNDS = st.lists(st.dictionaries(st.sampled_from(CLIENTS), CHANGES, min_size=1), min_size=1, max_size=3)


def clients(changes):
    """``train`` of a round in which some clients change what they would send."""

    def train(client, received, round):
        kind, name = changes.get(client, ("", ""))
        sent = honest(client, received)
        return KINDS[kind][name](sent, received) if kind else sent

    return train


def check(server, rounds):
    """Run rounds, each with its changes by client: all goes on, and everybody is where it belongs."""
    state = START
    for t, changes in enumerate(rounds):
        before = {k: v.clone() for k, v in state.items()}
        new, taken, said = run_round(state, CLIENTS, clients(changes), server, t, quorum=0)
        assert all(torch.equal(before[k], v) for k, v in state.items()), "a client changed what the server holds"
        for kind in ("rejected", "absent"):
            assert sorted(said[kind]) == sorted(c for c, (k, _) in changes.items() if k == kind), said
            assert all(4 < len(reason) <= 200 and "\n" not in reason for reason in said[kind].values())
        assert all(type(u.client) is type(u.n_samples) is int for u in taken)
        assert len(taken) + len(said["rejected"]) + len(said["absent"]) == len(CLIENTS)
        assert list(new) == list(START)
        for name, value in new.items():
            assert (value.dtype, value.shape) == (START[name].dtype, START[name].shape)
            assert torch.isfinite(value).all()
        assert (new["1.running_var"] >= 0).all()
        assert all(math.isfinite(w) and w >= 0 for w in said.get("weights", {}).values())
        state = new


@pytest.mark.fuzz
@pytest.mark.parametrize("name", SERVERS)
@settings(deadline=None)
@given(ROUNDS)
def test_no_rule_breaks_whatever_the_clients_do(name, rounds):
    check(SERVERS[name](), rounds)


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_be_odd_is_told(kind):
    for name in KINDS[kind]:
        check(fedavg, [{2: (kind, name)}])


# ------------------------------------------------------------------------------------------------------ reasons, quorum


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        ("rejected", "-100.0 in running_var", "1.running_var holds negative values"),
        ("rejected", "sparse 0.weight", "0.weight is torch.sparse_coo, expected torch.strided"),
        ("rejected", "meta 0.weight", "0.weight is meta, expected cpu"),
        ("rejected", "list 0.bias", "0.bias is of type list, expected Tensor"),
        ("rejected", "3e+38 in 0.bias", "0.bias holds values that are too large"),
        ("rejected", "without memory 0.bias", "0.bias has no memory of its size"),
        ("rejected", "samples 4", "its n_samples is no whole number from 1 to 1000000000"),
        ("rejected", "report 0", "metric loss_g is no finite number"),
        ("rejected", "report 2", "metric loss_g is no finite number"),
        ("rejected", "metrics 4", "its metrics is of type Denies, expected a dict"),
        ("rejected", "also 1", "parameter names differ: 1"),
        ("rejected", "another's name", "it calls itself client 3"),
        ("rejected", "message 0", "it sent str, not an Update"),
        ("absent", "error 0", "RuntimeError: out of memory"),
        ("absent", "error 1", "lower its lr"),
        ("absent", "error 3", "SystemExit: 0"),
        ("absent", "nothing", "it sent nothing"),
    ],
)
def test_the_reason_says_what_is_wrong(kind, name, reason):
    _, _, said = run_round(START, CLIENTS, clients({2: (kind, name)}), fedavg, 0)
    assert said[kind] == {2: reason}


def test_nobody_locks_the_others_out_at_a_bound():
    """A server whose values an attacker drove to the largest that pass still takes what is trained from there."""
    state = TAKEN["largest"](honest(0, START), START).state
    state[COUNTER] = torch.tensor(LARGEST_COUNT)
    _, taken, _ = run_round(START, [0], lambda c, s, r: Update(c, state, 8), fedavg, 0)
    assert len(taken) == 1
    assert len(run_round(state, CLIENTS, clients({}), fedavg, 1)[1]) == len(CLIENTS)


def test_of_a_client_that_sends_twice_nothing_is_taken():
    """Unless the server knows who sent what: then nobody is silenced by an impostor."""
    updates = [honest(0, START), honest(1, START), honest(1, START), None, replace(honest(2, START), client=[2])]
    accepted, rejected = screen(updates, START)
    assert [u.client for u in accepted] == [0]
    assert rejected == {
        1: "2 updates came from it",
        "update 3": "it sent NoneType, not an Update",
        "update 4": "it calls itself client [2]",
    }
    accepted, rejected = screen(updates[:3], START, [0, 1, 2])
    assert [u.client for u in accepted] == [0, 1]
    assert rejected == {2: "it calls itself client 1"}


def test_what_is_accepted_is_in_the_servers_order_and_cannot_change():
    sent = TAKEN["other order"](honest(0, START), START)
    ((accepted,), _) = screen([sent], START)
    assert list(accepted.state) == list(START)
    assert type(accepted.state) is type(accepted.metrics) is dict
    assert accepted.metrics is not sent.metrics


@pytest.mark.parametrize("bad", [1, 2])
def test_one_of_three_does_not_become_everybodys_model(bad):
    train = clients(dict.fromkeys(range(bad), ("rejected", "no 0.bias")))
    if bad == 1:
        assert len(run_round(START, range(3), train, fedavg, 7)[1]) == 2
        return
    with pytest.raises(NoQuorum, match="round 7: 1 of 3 updates usable, need 2; client 0: parameter names") as raised:
        run_round(START, range(3), train, fedavg, 7)
    assert raised.value.state is START
    assert isinstance(raised.value, InputError)
    assert len(run_round(START, range(3), train, fedavg, 7, quorum=1)[1]) == 1


def test_an_error_of_all_clients_is_told_and_chained():
    error = ZeroDivisionError("by us")
    with pytest.raises(NoQuorum, match=r"0 of 3 .* client 0: ZeroDivisionError: by us; client 1") as raised:
        run_round(START, range(3), lambda c, s, r: raises(error)(None, s), fedavg, 0)
    assert raised.value.__cause__ is error


def test_strictly_a_client_that_fails_ends_the_run_and_a_broken_update_does_not():
    for name, error in (("error 2", KeyError), ("nothing", InputError)):
        with pytest.raises(error):
            run_round(START, CLIENTS, clients({2: ("absent", name)}), fedavg, 0, strict=True)
    _, taken, _ = run_round(START, CLIENTS, clients({2: ("rejected", "state 0")}), fedavg, 0, strict=True)
    assert len(taken) == 4


def test_the_reader_can_always_stop_it():
    with pytest.raises(KeyboardInterrupt):
        run_round(START, CLIENTS, lambda c, s, r: raises(KeyboardInterrupt())(None, s), fedavg, 0)


def test_a_rule_that_screens_adds_its_reasons():
    def server(updates, round):
        state, said = fedavg(updates[1:])
        return state, {**said, "rejected": {updates[0].client: "forged"}}

    _, _, said = run_round(START, CLIENTS, clients({3: ("rejected", "message 0")}), server, 0)
    assert said["rejected"] == {0: "forged", 3: "it sent str, not an Update"}
