"""The one error that a user can mend, and how commands report it."""

import errno
import functools
import sys
from collections.abc import Callable

__all__ = ["InputError"]


class InputError(ValueError):
    """Something the user gave is wrong: a parameter, a file, an image.

    The message is one line that names the file, key or shape and says how to mend it. Commands print that line and
    exit with status 2 before any training starts and before anything is written.
    """


DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}  # of these the system does not always say the file


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Decorator of a command's ``main``: an `InputError` becomes one line on stderr and exit status 2.

    So does a file or folder that the system refuses to read or write: a full disk, no permission, too long a name.
    """

    @functools.wraps(main)
    def reported(*args, **options) -> int:
        try:
            return main(*args, **options)
        except InputError as error:
            said = str(error)
        except OSError as error:
            if error.filename is None and error.errno not in DISK:
                raise
            said = f"{error.filename or 'a file'}: {error.strerror}; what was finished before is kept"
        print("error:", " ".join(said.split("\n")), file=sys.stderr)
        return 2

    return reported
