"""The one error that a user can mend."""


class InputError(ValueError):
    """Something the user gave is wrong: a parameter, a file, an image.

    The message is one line that names the file, key or shape and says how to mend it. Commands print that line and
    exit with status 2 before any training starts and before anything is written.
    """
