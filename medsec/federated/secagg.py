"""Secure aggregation on Flower: the server learns the mean of the clients' states and no single one.

The protocol is Flower's SecAgg+ (Bell et al. 2020, CCS, pages 1253 to 1269): clients add masks that cancel in the sum.
Every client counts alike. Only floating-point entries are summed, as integers of `LEVELS` steps between ±``clip``; they are
rounded at random, so that no two runs have the same bits. Integer buffers (BatchNorm's counters) stay as the server has
them. What a client *reports* (its losses) and that it takes part are not hidden. It holds against a server that is curious;
one that lies about who takes part, or hands out keys of its own, is outside what Flower's protocol claims.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from flwr.app import Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import Code, FitIns, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common import recorddict_compat as compat
from flwr.server import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from torch import Tensor

from medsec.core.errors import InputError
from medsec.federated.flower import Build, trained
from medsec.federated.rounds import State, Update, in_a_line, screen

__all__ = ["answer_masked", "masked_round"]

LEVELS = 2**22  # steps of a summed number
CLIP = 8.0  # largest number that can be summed
STAY = 2 / 3  # share of the clients that must stay to the end of a round, so that masks can be opened
LEAST = 3  # clients: of two, each knows the other's update from the mean


def answer_masked(app: ClientApp, build: Build, folder: Callable[[], Path]) -> None:
    """Let an app (`medsec.federated.flower.client_app`, with the same arguments) also take part in a `masked_round`.

    Which of the two is asked is the server's choice: ``masked=true`` in a node's configuration refuses the other.
    """

    @app.train(mods=[secaggplus_mod])
    def train(message: Message, context: Context) -> Message:
        asked = compat.recorddict_to_fitins(message.content, keep_input=True)
        order = json.loads(asked.config["order"])
        values = map(torch.from_numpy, parameters_to_ndarrays(asked.parameters))
        update = trained(build, folder, dict(zip(order["names"], values, strict=True)), order, context.node_config)
        sent = _summed(update.state)
        if beyond := [name for name, value in sent.items() if not (value.abs() <= CLIP).all()]:
            raise InputError(
                f"{beyond[0]} holds a number that is not within ±{CLIP:g}: it cannot be summed under masks"
            )
        parameters = ndarrays_to_parameters([value.numpy() for value in sent.values()])
        reported = {**update.metrics, "client": update.client}
        return Message(
            compat.fitres_to_recorddict(FitRes(Status(Code.OK, ""), parameters, 1, reported), False), reply_to=message
        )


def masked_round(
    grid, nodes: Sequence[int], state: State, order: dict, timeout: float
) -> tuple[State, dict[int, dict]]:
    """One round of SecAgg+: for ``masked`` of `medsec.federated.flower.serve`.

    Returns:
        The mean of the states, and what each client in it reported.

    Raises:
        InputError: fewer than three nodes; too many went away; or one sent what cannot be summed. Any client can so stop a
            round, and the masks hide which.
    """
    if len(nodes) < LEAST:
        raise InputError(f"{len(nodes)} nodes are online: a masked mean needs {LEAST} clients")
    asked = _Asked(nodes, state, order)
    context = LegacyContext(Context(0, 0, {}, RecordDict(), {}), strategy=asked)
    context.state[MAIN_CONFIGS_RECORD] = compat.ConfigRecord({Key.CURRENT_ROUND: order["round"]})
    context.state[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(asked.parameters, keep_input=True)
    options = {"clipping_range": CLIP, "quantization_range": LEVELS, "max_weight": 1.0, "timeout": timeout}
    why = "fewer than two thirds of the clients stayed to the end"
    try:
        SecAggPlusWorkflow(1.0, max(LEAST, round(len(nodes) * STAY)), **options)(grid, context)
    except Exception as error:  # of whatever a client sent: behind masks nobody can tell who
        why = in_a_line(error)
    if asked.mean is None:
        raise InputError(f"round {order['round']}: no masked mean: {why}; the same call tries it again")
    mean = {**state, **asked.mean}
    flaw = screen([Update(0, mean, 1)], state)[1].get(0)
    if flaw or any((mean[name].abs() > CLIP).any() for name in asked.mean):
        raise InputError(
            f"round {order['round']}: somebody spoilt the sum: it {flaw or 'is too large'}; the same call tries it again"
        )
    return mean, asked.reported


class _Asked:
    """What Flower's workflow wants from a strategy: whom to ask what, and a place for the result."""

    def __init__(self, nodes: Sequence[int], state: State, order: dict):
        self.nodes, self.state, self.order = nodes, state, {**order, "names": list(state)}
        self.parameters = ndarrays_to_parameters([value.numpy() for value in state.values()])
        self.mean: State | None = None
        self.reported: dict[int, dict] = {}

    def configure_fit(self, round: int, parameters, clients) -> list:
        return [(_Node(node), FitIns(self.parameters, {"order": json.dumps(self.order)})) for node in self.nodes]

    def aggregate_fit(self, round: int, results: list, failures: list) -> tuple[None, dict]:
        values = parameters_to_ndarrays(results[0][1].parameters)  # the mean, in every result
        like = _summed(self.state)
        self.mean = {n: torch.from_numpy(v).to(like[n].dtype) for n, v in zip(like, values, strict=True)}
        for _, result in results:
            metrics = {name: value for name, value in result.metrics.items() if type(value) in (int, float)}
            client = metrics.pop("client", None)
            if type(client) is not int or not 0 <= client < len(self.order["since"]) or client in self.reported:
                self.mean = None
                raise InputError(f"one calls itself client {client}")
            self.reported[client] = metrics
        return None, {}


class _Node:
    def __init__(self, node_id: int):
        self.node_id = node_id


def _summed(state: State) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if value.is_floating_point()}
