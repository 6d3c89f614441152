"""What a federation over several machines keeps on disk: it can be read again, or is refused at once."""

import functools
import inspect
import io
import pickle
from collections import deque
from pathlib import Path
from typing import Any

import torch

from medsec.core.errors import InputError
from medsec.federated.rounds import Aggregator, in_a_line

__all__: list[str] = []  # for the other modules of the package

PLAIN = (int, float, str, bool, type(None))
KINDS = "tensors, numbers, texts, and lists, sets or dictionaries of them"


def packed(content: dict) -> bytes:
    """A dictionary as bytes, for `read`.

    Raises:
        InputError: it holds what could not be read again.
    """
    try:
        torch.save(content, stream := io.BytesIO())
        torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
    except (pickle.PickleError, TypeError, AttributeError) as error:
        raise InputError(f"the memory of a client or rule may hold {KINDS}; not this: {in_a_line(error)}") from None
    return stream.getvalue()


def read(file: Path) -> dict:
    """What `packed` wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        return torch.load(file, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{file.name} is missing") from None
    except (pickle.PickleError, EOFError, RuntimeError) as error:
        raise InputError(f"{file.name} is damaged ({in_a_line(error)})") from None


def memory(rule: Aggregator) -> dict[str, Any]:
    """What a server's rule remembers: the attributes of an object that are no functions; of a function, nothing.

    Functions among the attributes, such as what draws images, are trusted to remember nothing from round to round.

    Raises:
        InputError: a rule that may remember elsewhere: after a fault it would go on as if nothing had been.
    """
    inner = rule.func if isinstance(rule, functools.partial) else rule
    if inspect.isfunction(inner) and all(_harmless(cell.cell_contents) for cell in inner.__closure__ or ()):
        return {}
    slots = any("__slots__" in vars(each) for each in type(rule).__mro__[:-1])
    if inner is rule and hasattr(rule, "__dict__") and not slots and not inspect.isroutine(rule):
        kept = {name: value for name, value in vars(rule).items() if not callable(value)}
        within = [name for name, value in vars(rule).items() if _may_remember(value)]
        if within:
            raise InputError(
                f"a rule must keep what it remembers in its own attributes, not inside {', '.join(within)}"
            )
        return {name: list(value) if isinstance(value, deque) else value for name, value in kept.items()}
    raise InputError("a rule must be a plain function, or an object that keeps what it remembers in its attributes")


def _harmless(value: object) -> bool:
    """Whether a function can close over it without remembering anything."""
    return isinstance(value, PLAIN) or inspect.isfunction(value)


def _may_remember(value: object) -> bool:
    """Whether an attribute that is called is an object with attributes of its own, which nobody would save."""
    plain = isinstance(value, type | functools.partial) or inspect.isroutine(value)
    return callable(value) and not plain and bool(getattr(value, "__dict__", None))


def recall(rule: Aggregator, remembered: dict[str, Any]) -> None:
    """Give a fresh rule back what `memory` took from it."""
    for name, value in remembered.items():
        now = getattr(rule, name, None)
        object.__setattr__(rule, name, deque(value, now.maxlen) if isinstance(now, deque) else value)


def kind(rule: Aggregator) -> str:
    """The name of a rule's function or class, to notice another one."""
    inner = rule.func if isinstance(rule, functools.partial) else rule
    return inner.__qualname__ if inspect.isfunction(inner) else type(inner).__qualname__
