"""The one error that a user can mend, and how commands report it."""

import functools
import sys
from collections.abc import Callable

__all__ = ["InputError"]


class InputError(ValueError):
    """Something the user gave is wrong: a parameter, a file, an image.

    The message is one line that names the file, key or shape and says how to mend it. Commands print that line and
    exit with status 2 before any training starts and before anything is written.
    """


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Decorator of a command's ``main``: an `InputError` becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def reported(*args, **options) -> int:
        try:
            return main(*args, **options)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return reported
