"""Flower's messages without its processes: for notebooks and tests."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from medsec.federated.rounds import in_a_line

__all__ = ["InProcessGrid"]


class InProcessGrid:
    """What a server app needs of Flower's ``Grid``, with all nodes in this process, one after another.

    It sets the identity that Flower's messages carry for the whole process, so keep it out of a process of Flower's own.

    Args:
        app: what a node does with a message; an error that it raises becomes an error reply, as in a deployment.
        nodes: the configuration of every node.
    """

    def __init__(self, app: Callable[[Message, Context], Message], nodes: Sequence[Mapping]):
        for name in ("run_id", "node_id", "task_id"):
            setattr(TaskIdentity, name, 1)
        self.app, self.answers = app, {}
        self.contexts = {100 + i: Context(1, 100 + i, dict(node), RecordDict(), {}) for i, node in enumerate(nodes)}

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        first = len(self.answers)
        for message in messages:
            self.answers[str(len(self.answers))] = [self.answer(message)]
        return [str(i) for i in range(first, len(self.answers))]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = []
        for each in message_ids:
            found += self.answers[each]
            self.answers[each] = []
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def answer(self, message: Message) -> Message:
        """What a node answers."""
        try:
            return self.app(copy.deepcopy(message), self.contexts[message.metadata.dst_node_id])
        except (Exception, SystemExit) as error:
            return Message(Error(code=0, reason=in_a_line(error)), reply_to=message)
