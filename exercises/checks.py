"""Two helpers for the checking cells of the exercises: run a check and say what is wrong, in one line."""

import traceback
from collections.abc import Callable
from numbers import Real

import numpy as np
import torch

UNDONE = "not done yet: put your code in place of `raise NotImplementedError`, run that cell, then this one"
LONGEST = 200  # characters of an error message that are shown


def report(number: int, check: Callable[[], str | None]) -> bool:
    """Run a check and print "ok", or what it found wrong.

    Args:
        number: of the exercise.
        check: returns a sentence that says what is wrong, or None.

    Returns:
        Whether nothing is wrong.
    """
    try:
        problem = check()
    except Exception as error:  # whatever a student's code may do, one line says it
        problem = UNDONE if isinstance(error, NotImplementedError) and not str(error) else _stopped(error)
    print(f"Exercise {number}: {problem or 'ok'}")
    return not problem


def _stopped(error: Exception) -> str:
    """Where the student's function stopped, and why; library code further down is left out."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST]}"
    calls = traceback.extract_tb(error.__traceback__)[2:]  # report and check come first
    if not calls:
        return f"the check stops with {text} (have you run the cells above, and what does your function return?)"
    return f"your function `{calls[0].name}` stops in line {calls[0].lineno} of its cell with {text}"


def kind(answer, like) -> str | None:
    """What is wrong with the kind of an answer, before its values are looked at: type, shape, numbers that are none.

    Args:
        answer: what the student's function returned.
        like: a right answer: a tensor, an array, a number, or anything else of the right type.
    """
    if answer is None:
        return "your function returns None: does it end with `return ...`?"
    if isinstance(like, Real) and not isinstance(like, bool):
        if not isinstance(answer, Real):
            return f"your function returns {_name(answer)}, asked for is one number: try float(...) or int(...)"
        return None if np.isfinite(answer) else f"your function returns {answer}, which is no finite number"
    wanted = next((t for t in (torch.Tensor, np.ndarray) if isinstance(like, t)), type(like))
    if not isinstance(answer, wanted):
        return f"your function returns {_name(answer)}, asked for is {_name(like)}"
    if wanted not in (torch.Tensor, np.ndarray):
        return None
    if answer.shape != like.shape:
        return f"your answer has the shape {tuple(answer.shape)}, asked for is {tuple(like.shape)}"
    found = answer.detach().cpu().numpy() if wanted is torch.Tensor else answer
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        return "your answer holds NaN or infinite numbers: is something divided by 0?"
    return None


def _name(value) -> str:
    """A value's type in words, with its shape if it has one."""
    names = {torch.Tensor: "a tensor", np.ndarray: "an array"}
    name = next((text for t, text in names.items() if isinstance(value, t)), f"a {type(value).__name__}")
    return f"{name} of shape {tuple(value.shape)}" if hasattr(value, "shape") and value.shape != () else name
