"""The loop of rounds on Flower (extra ``medsec[flower]``): the same clients, rules and screening, on one machine or many.

Nothing here trains or aggregates: a client is a `Participant`, the server's side of a round `run_round`. Flower starts a new
process for every message, so what either side must remember lies on disk, written whole or not at all.
"""

import json
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from medsec.core import files, parallel
from medsec.core.errors import InputError
from medsec.federated import checkpoints
from medsec.federated.in_process import InProcessGrid
from medsec.federated.rounds import Aggregator, NoQuorum, State, Update, in_a_line, run_round

__all__ = ["Participant", "client_app", "serve"]

PLAIN = "train.plain"  # type of a message that asks for an update without masks
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")  # of a run; a client makes a folder of it and a token
TOKEN = re.compile(NAME.pattern + "-[0-9a-f]{8}")
NEVER = -1  # round of a client's last answer, before there is one
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
    Every message says from which to start. So an answer that was lost, a message that comes twice or late and a server that
    went back to its last checkpoint all lead to the same update.

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
    participant = build(json.loads(order["settings"]), node)
    run, round, since = order["run"], order["round"], order["since"][participant.index]
    rounds = type(round) is type(since) is int and NEVER <= since < round
    if type(run) is not str or not TOKEN.fullmatch(run) or not rounds:
        raise InputError("the server's message names no run or no round")
    place = folder() / run / f"client-{participant.index}"
    if since != NEVER:
        try:
            participant.load_state_dict(checkpoints.read(place / f"{since}.pt"))
        except InputError as error:
            lost = f"what this client knew after round {since + 1} is lost ({error})"
            raise InputError(
                f"{lost}: without it, it can take no further part in the run; restore its folder"
            ) from None
    update = participant.train(state, round)
    files.write(place / f"{round}.pt", checkpoints.packed(participant.state_dict()))
    for old in place.glob("*.pt"):
        if int(old.stem) != since and int(old.stem) < round:  # newer ones are of messages that overtook this one
            old.unlink()
    return update


def _packed(update: Update) -> RecordDict:
    def plain(value: Any) -> Any:
        return value.item() if isinstance(value, np.generic) else value  # Flower takes no numbers of numpy

    metrics = {name: plain(value) for name, value in update.metrics.items()}
    sender = {"client": plain(update.client), "n_samples": plain(update.n_samples)}
    records = {"metrics": MetricRecord(metrics), "sender": ConfigRecord(sender)}
    return RecordDict({"state": ArrayRecord(update.state), **records})


# The server's side ---------------------------------------------------------------------------------------------------


def serve(
    grid: Grid | InProcessGrid,
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
        aggregate: the rule; what it remembers (`checkpoints.memory`) is kept with the checkpoint.
        settings: sent to every client; plain values only.
        folder: of this run: its last name is the run's. ``server.pt`` in it is the checkpoint, replaced every round.
        timeout: seconds to wait for a round's answers. It decides who takes part: too short a time changes the result.
        wait: seconds to wait for ``n_clients`` nodes at the start, and for a quorum of them in any later round.
        quorum: of `run_round`.
        masked: `medsec.federated.secagg.masked_round`, so that the server sees the mean alone and asks no ``aggregate``.

    Returns:
        The last state, and a dictionary a round: what the rule said, who was rejected or absent and why, what they reported.

    Raises:
        InputError: the folder holds another run, or another process serves it; or what a rule remembers cannot be kept.
        NoQuorum: too few usable answers; after the fault is mended, the same call goes on from the round before.
    """
    if not NAME.fullmatch(folder.name):
        raise InputError(f"a run cannot be called {folder.name!r}: use up to 40 small letters, digits and dashes")
    checkpoint, needed = folder / "server.pt", n_clients // 2 + 1 if quorum is None else quorum
    with parallel.locked(folder / "server.lock"):
        at = _resumed(checkpoint, state, aggregate, settings, n_clients)
        least = n_clients
        while at["round"] < rounds:
            began = time.monotonic()
            order = {"run": at["run"], "round": at["round"], "since": at["since"], "settings": json.dumps(settings)}
            nodes, least = _online(grid, least, wait), max(1, needed)
            if masked:
                line = _masked_round(masked, grid, nodes, at, order, timeout, needed)
            else:
                line = _plain_round(grid, nodes, at, order, timeout, aggregate, needed)
            line = {"round": at["round"], "seconds": round(time.monotonic() - began, 3), **line}
            at["history"].append(json.dumps(line, default=float))
            files.write(checkpoint, checkpoints.packed({**at, "memory": checkpoints.memory(aggregate)}))
            print(at["history"][-1], flush=True)  # what `flwr log` shows
    return at["state"], [json.loads(line) for line in at["history"]]


def _resumed(checkpoint: Path, state: State, aggregate: Aggregator, settings: dict, n_clients: int) -> dict:
    """Where the run in a folder stands; its memory is given back to the rule."""
    given = json.dumps([settings, n_clients, checkpoints.kind(aggregate)], sort_keys=True)
    if not checkpoint.exists():
        # The token tells this run's memories at the clients from those of an earlier one with the same name.
        at = {"run": f"{checkpoint.parent.name}-{secrets.token_hex(4)}", "round": 0, "state": state, "settings": given}
        at |= {"since": [NEVER] * n_clients, "seats": {}, "history": []}
        files.write(checkpoint, checkpoints.packed({**at, "memory": checkpoints.memory(aggregate)}))
        return at
    at = checkpoints.read(checkpoint)
    if at["settings"] != given:
        name = checkpoint.parent.name
        raise InputError(f"{name} holds a run with other settings: choose another name, or remove that folder")
    checkpoints.recall(aggregate, at.pop("memory"))
    return at


def _online(grid: Grid | InProcessGrid, least: int, wait: float) -> list[int]:
    end = time.monotonic() + wait
    while len(nodes := sorted(grid.get_node_ids())) < least and time.monotonic() < end:
        time.sleep(POLL)
    return nodes


def _finished(at: dict, state: State, clients: Sequence[int]) -> None:
    for client in clients:
        at["since"][client] = at["round"]
    at["state"], at["round"] = state, at["round"] + 1


def _masked_round(masked: Callable, grid, nodes, at: dict, order: dict, timeout: float, needed: int) -> dict:
    state, metrics = masked(grid, nodes, at["state"], order, timeout)
    if len(metrics) < needed:
        raise NoQuorum(f"round {at['round']}: {len(metrics)} clients in the masked sum, need {needed}")
    _finished(at, state, list(metrics))
    absent = {client: "not in the sum" for client in range(len(at["since"])) if client not in metrics}
    return {"rejected": {}, "absent": absent, "metrics": metrics}


def _plain_round(grid, nodes, at: dict, order: dict, timeout: float, aggregate: Aggregator, needed: int) -> dict:
    arrived, reasons, unseated = _answers(grid, nodes, at["state"], order, timeout, at["seats"])

    def sent(client: int, state: State, round: int) -> Update:
        """What a client sent. `screen` looks at it next, so that nothing is checked here but that it can be read."""
        if client not in arrived:
            raise InputError(reasons.get(client, f"no answer within {timeout:g} s"))
        content = arrived[client]
        metrics, n_samples = dict(content["metrics"]), content["sender"]["n_samples"]
        return Update(client, content["state"].to_torch_state_dict(), n_samples, metrics)

    clients = range(len(at["since"]))
    try:
        state, updates, said = run_round(at["state"], clients, sent, aggregate, at["round"], quorum=needed)
    except NoQuorum as error:
        error.args = ("; ".join([str(error), *unseated[:1]]),)
        raise
    _finished(at, state, list(arrived))
    return {**said, "unseated": unseated, "metrics": {u.client: u.metrics for u in updates}}


def _answers(
    grid: Grid | InProcessGrid, nodes: Sequence[int], state: State, order: dict, timeout: float, seats: dict[int, int]
) -> tuple[dict[int, RecordDict], dict[int, str], list[str]]:
    """One round's answers by client, why others cannot be used, and what nodes without a seat complained of.

    ``seats`` says as which client a node has answered before. It cannot change that seat, and no other node can have it as
    long as its holder is online. Of two newcomers on one seat neither is believed.
    """
    content = RecordDict({"state": ArrayRecord(state), "order": ConfigRecord(order)})
    messages = [Message(content, node, PLAIN, ttl=timeout, group_id=str(order["round"])) for node in nodes]
    reasons, unseated, claims = {}, [], defaultdict(list)
    held = {seats[node] for node in nodes if node in seats}
    for node, answer in _replies(grid, messages, timeout):
        if answer.has_error():
            why = f"its node failed: {answer.error.reason}"[:200]
            if node in seats:
                reasons[seats[node]] = why
            else:
                unseated.append(why)
            continue
        client = _claim(answer.content, len(order["since"]))
        if client is not None and (seats[node] == client if node in seats else client not in held):
            claims[client].append((node, answer.content))
    reasons |= {c: f"{len(each)} nodes call themselves client {c}" for c, each in claims.items() if len(each) > 1}
    arrived = {client: each[0][1] for client, each in claims.items() if len(each) == 1}
    seats |= {claims[client][0][0]: client for client in arrived}
    return arrived, reasons, unseated


def _replies(grid: Grid | InProcessGrid, messages: list[Message], timeout: float) -> Iterator[tuple[int, Message]]:
    """Every node's first answer. Whose it is says the question: what an answer says of itself, its node can forge."""
    questions, end = dict(zip(grid.push_messages(messages), messages, strict=True)), time.monotonic() + timeout
    while questions:
        for question, message in list(questions.items()):
            try:
                found = list(grid.pull_messages([question]))[:1]
            except Exception as error:  # of bytes that are no message
                found = [Message(Error(code=0, reason=in_a_line(error)), reply_to=message)]
            for answer in found:
                del questions[question]
                yield message.metadata.dst_node_id, answer
        if time.monotonic() >= end:
            return
        time.sleep(POLL if questions else 0)


def _claim(content: RecordDict, n_clients: int) -> int | None:
    """As which client an answer comes."""
    try:
        client = content["sender"]["client"]
    except Exception:  # whatever a hostile node sent
        return None
    return client if type(client) is int and 0 <= client < n_clients else None
