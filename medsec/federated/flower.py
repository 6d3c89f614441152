"""The loop of rounds on Flower (extra ``medsec[flower]``): the same clients, rules and screening, on one machine or many.

Nothing here trains or aggregates: a client is a `Participant`, the server's side of a round `run_round`. Flower starts a new
process for every message, so what either side must remember lies on disk, written whole or not at all.
"""

import copy
import functools
import io
import json
import pickle
import re
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from medsec.core import files
from medsec.core.errors import InputError
from medsec.federated.rounds import Aggregator, State, Update, in_a_line, run_round

__all__ = ["InProcessGrid", "Participant", "client_app", "serve"]

PLAIN = "train.plain"  # type of a message that asks for an update without masks
RUN = re.compile(r"[a-z0-9][a-z0-9-]{0,59}")  # a client makes a folder of this name, and the server chooses it
NOBODY = NEVER = -1  # client of a node that has not answered yet; round of a client's last answer, before there is one
POLL = 0.5  # seconds


class Participant(Protocol):
    """One client: built anew for every message from its own data and what it remembers."""

    index: int

    def train(self, state: State, round: int) -> Update:
        """One round's training from the server's state; rounds count from 0."""

    def state_dict(self) -> dict[str, Any]:
        """What it needs in the next round and never sends (discriminator, optimisers): tensors and plain containers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""


Build = Callable[[dict, Mapping], Participant]  # from the server's settings and the node's own configuration


# A client's side -----------------------------------------------------------------------------------------------------


def client_app(build: Build, folder: Callable[[], Path]) -> ClientApp:
    """The Flower app of a client.

    A client keeps two memories: after the last round whose answer the server has, and after the latest that it trained.
    Every message says from which to start. So an answer that was lost, a message that comes twice and a server that went
    back to its last checkpoint all lead to the same update.

    Args:
        build: ``(settings, node_config) -> participant``; where a hospital's data lies may only be read from the latter.
        folder: where memories are kept, below the name of the run.
    """
    app = ClientApp()

    @app.train(PLAIN.split(".")[1])
    def train(message: Message, context: Context) -> Message:
        if context.node_config.get("masked"):
            raise InputError("this hospital sends its updates under masks only; the server asked for a plain one")
        state, order = message.content["state"].to_torch_state_dict(), message.content["order"]
        return Message(_packed(trained(build, folder, state, order, context.node_config)), reply_to=message)

    return app


def trained(build: Build, folder: Callable[[], Path], state: State, order: Mapping, node: Mapping) -> Update:
    """What a client does with the server's state and order: the update that it sends. Its memory is on disk before."""
    torch.set_num_threads(1)  # one and two threads give different bits
    run, round = order["run"], order["round"]
    if type(run) is not str or not RUN.fullmatch(run) or type(round) is not int:
        raise InputError("the server's message names no run or no round")
    participant = build(json.loads(order["settings"]), node)
    place, since = folder() / run / f"client-{participant.index}", order["since"][participant.index]
    if since != NEVER:
        participant.load_state_dict(_remembered(place / f"{since}.pt"))
    update = participant.train(state, round)
    files.write(place / f"{round}.pt", _bytes(participant.state_dict()))
    for old in place.glob("*.pt"):
        if old.stem not in (str(since), str(round)):
            old.unlink()
    return update


def _remembered(file: Path) -> dict:
    try:
        return _read(file)
    except FileNotFoundError:
        lost = f"what this client knew after round {int(file.stem) + 1} is lost ({file.name} is missing)"
        raise InputError(
            f"{lost}: restore its folder; without it this client can take no further part in the run"
        ) from None


def _bytes(content: dict) -> bytes:
    """For `_read`; what that could not read is told now, not after a fault."""
    torch.save(content, stream := io.BytesIO())
    _read(io.BytesIO(stream.getvalue()))
    return stream.getvalue()


def _read(file: Path | io.BytesIO) -> dict:
    try:
        return torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        kept = "a client's or rule's memory may hold tensors, numbers, texts, and lists, sets or dictionaries of them"
        raise InputError(f"{kept}; not this: {in_a_line(error)}") from None


def _packed(update: Update) -> RecordDict:
    def plain(value: Any) -> Any:
        return value.item() if isinstance(value, np.generic) else value  # Flower takes no numbers of numpy

    metrics = {name: plain(value) for name, value in update.metrics.items()}
    sender = {"client": plain(update.client), "n_samples": plain(update.n_samples)}
    records = {"metrics": MetricRecord(metrics), "sender": ConfigRecord(sender)}
    return RecordDict({"state": ArrayRecord(update.state), **records})


def _collected(
    arrived: dict[int, RecordDict], reasons: dict[int, str], timeout: float, client: int, state: State, round: int
) -> Update:
    """What a client sent. `screen` looks at it next, so that nothing is checked here but that it can be read."""
    if client not in arrived:
        raise InputError(reasons.get(client) or reasons.get(NOBODY) or f"no answer within {timeout:g} s")
    content = arrived[client]
    metrics, n_samples = dict(content["metrics"]), content["sender"]["n_samples"]
    return Update(client, content["state"].to_torch_state_dict(), n_samples, metrics)


# The server's side ---------------------------------------------------------------------------------------------------


def serve(
    grid: "Grid | InProcessGrid",
    state: State,
    aggregate: Aggregator,
    *,
    rounds: int,
    n_clients: int,
    settings: dict,
    folder: Path,
    timeout: float,
    wait: float = 60.0,
    quorum: int | None = None,
    masked: Callable[..., tuple[State, dict[int, dict]]] | None = None,
) -> tuple[State, list[dict]]:
    """Run a federation to its end, from its last finished round if it was interrupted.

    Args:
        grid: Flower's, or `InProcessGrid`.
        state: the server's before the first round.
        aggregate: the rule. Its memory is what its attributes hold besides functions; it is kept with the checkpoint.
        settings: sent to every client; plain values only.
        folder: of this run: its last name is the run's. ``server.pt`` in it is the checkpoint, replaced every round.
        timeout: seconds to wait for a round's answers. It decides who takes part: too short a time changes the result.
        wait: seconds to wait for ``n_clients`` nodes at the start, and for a quorum of them in any later round.
        quorum: of `run_round`.
        masked: `medsec.federated.secagg.masked_round`, so that the server sees the mean alone and asks no ``aggregate``.

    Returns:
        The last state, and a dictionary a round: what the rule said, who was rejected or absent and why, what they reported.

    Raises:
        InputError: the folder holds a run with other settings.
        NoQuorum: too few usable answers; after the fault is mended, the same call goes on from the round before.
    """
    at = _resumed(folder, state, aggregate, settings, n_clients)
    least, everybody = n_clients, range(n_clients)
    while at["round"] < rounds:
        t, began = at["round"], time.monotonic()
        order = {"run": at["run"], "round": t, "since": at["since"], "settings": json.dumps(settings)}
        nodes = _online(grid, least, wait)
        if masked:
            at["state"], metrics = masked(grid, nodes, at["state"], order, timeout)
            said = {"rejected": {}, "absent": {c: "not in the sum" for c in everybody if c not in metrics}}
        else:
            arrived, reasons = _answers(grid, nodes, at["state"], order, timeout, n_clients, at["seats"])
            train = functools.partial(_collected, arrived, reasons, timeout)
            at["state"], updates, said = run_round(at["state"], everybody, train, aggregate, t, quorum=quorum)
            metrics = {u.client: u.metrics for u in updates}
        for client in metrics if masked else arrived:
            at["since"][client] = t
        at["round"], least = t + 1, n_clients // 2 + 1 if quorum is None else quorum
        line = {"round": t + 1, "seconds": round(time.monotonic() - began, 3), **said, "metrics": metrics}
        at["history"].append(json.dumps(line, default=float))
        files.write(folder / "server.pt", _bytes({**at, "memory": _memory(aggregate)}))
        print(at["history"][-1], flush=True)  # what `flwr log` shows
    return at["state"], [json.loads(line) for line in at["history"]]


def _resumed(folder: Path, state: State, aggregate: Aggregator, settings: dict, n_clients: int) -> dict:
    """Where the run in a folder stands; its memory is given back to the rule."""
    if not RUN.fullmatch(folder.name):
        raise InputError(f"a run cannot be called {folder.name!r}: use up to 40 small letters, digits and dashes")
    given = json.dumps(settings, sort_keys=True)
    if not (folder / "server.pt").exists():
        files.check_writable(folder)
        # The token tells this run's memories at the clients from those of an earlier one with the same name.
        run = f"{folder.name[:40]}-{secrets.token_hex(4)}"
        fresh = {"run": run, "round": 0, "state": state, "since": [NEVER] * n_clients, "seats": {}, "history": []}
        return {**fresh, "settings": given}
    at = _read(folder / "server.pt")
    if at["settings"] != given:
        raise InputError(f"{folder.name} holds a run with other settings: choose another name, or remove that folder")
    for name, value in at.pop("memory").items():
        now = getattr(aggregate, name)
        setattr(aggregate, name, deque(value, now.maxlen) if isinstance(now, deque) else value)
    return at


def _memory(aggregate: Aggregator) -> dict[str, Any]:
    kept = [(name, value) for name, value in getattr(aggregate, "__dict__", {}).items() if not callable(value)]
    return {name: list(value) if isinstance(value, deque) else value for name, value in kept}


def _online(grid: Grid, least: int, wait: float) -> list[int]:
    end = time.monotonic() + wait
    while len(nodes := sorted(grid.get_node_ids())) < least and time.monotonic() < end:
        time.sleep(POLL)
    return nodes


def _answers(
    grid: Grid, nodes: Sequence[int], state: State, order: dict, timeout: float, n_clients: int, seats: dict[int, int]
) -> tuple[dict[int, RecordDict], dict[int, str]]:
    """One round's answers by client, and why others cannot be used.

    ``seats`` says as which client a node has answered before. It cannot change that seat, and a newcomer cannot take it while
    its holder answers. Of two newcomers on one seat neither is believed.
    """
    content = RecordDict({"state": ArrayRecord(state), "order": ConfigRecord(order)})
    messages = [Message(content, node, PLAIN, ttl=timeout, group_id=str(order["round"])) for node in nodes]
    arrived, reasons, claims, heard = {}, {}, defaultdict(list), set()
    for answer in grid.send_and_receive(messages, timeout=timeout):
        node = answer.metadata.src_node_id
        if answer.has_error():
            reasons[seats.get(node, NOBODY)] = f"its node failed: {answer.error.reason}"
            continue
        client = _claim(answer.content, n_clients)
        if client is None or seats.get(node, client) != client or node in heard:
            continue
        heard.add(node)
        claims[client].append((node, answer.content))
    for client, claim in claims.items():
        chosen = [each for each in claim if seats.get(each[0]) == client] or claim
        if len(chosen) > 1:
            reasons[client] = f"{len(chosen)} nodes call themselves client {client}"
            continue
        seats[chosen[0][0]], arrived[client] = client, chosen[0][1]
    return arrived, reasons


def _claim(content: RecordDict, n_clients: int) -> int | None:
    try:
        client = content["sender"]["client"]
    except Exception:  # whatever a hostile node sent
        return None
    return client if type(client) is int and 0 <= client < n_clients else None


class InProcessGrid:
    """What a server app needs of Flower's ``Grid``, with all nodes in this process: for notebooks and tests.

    ``nodes`` are their configurations. An error that ``app`` raises becomes an error reply, as in a deployment.
    """

    def __init__(self, app: Callable[[Message, Context], Message], nodes: Sequence[Mapping]):
        for name in ("run_id", "node_id", "task_id"):  # Flower's messages ask who sends them
            setattr(TaskIdentity, name, 1)
        self.app = app
        self.contexts = {100 + i: Context(1, 100 + i, dict(node), RecordDict(), {}) for i, node in enumerate(nodes)}

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        try:
            return self.app(copy.deepcopy(message), self.contexts[message.metadata.dst_node_id])
        except (Exception, SystemExit) as error:
            return Message(Error(code=0, reason=in_a_line(error)), reply_to=message)
