"""Files that are read back: one reader of text, YAML and JSON, and one writer, whole or not at all.

Whatever is wrong with a file ends in an `InputError` of one line, which names the file and says how to get it back.
"""

import contextlib
import gzip
import io
import json
import os
import re
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import yaml

from medsec.core import paths
from medsec.core.errors import InputError

__all__: list[str] = []  # for the other modules of the package

MOST_BYTES = 2**28  # of an unpacked text: the largest table has a hundredth
MOST_NODES = 100_000  # of a YAML file, aliases written out: params.yaml has some hundred
ABANDONED = 24 * 3600  # seconds after which nobody writes to a temporary file any more
AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9_]+(:[0-9]+)+(\.[0-9_]*)?")  # YAML 1.1: to base 8, to base 60
LONGEST_NUMBER = 60


def shown(file: Path) -> str:
    """A file as messages name it: below the repository's root where it lies there."""
    return file.relative_to(paths.ROOT).as_posix() if file.is_relative_to(paths.ROOT) else file.name


def restore(file: Path) -> str:
    """How to get a file back."""
    return (
        f"restore it with: git checkout {shown(file)}"
        if file.is_relative_to(paths.ROOT)
        else "check its name and content"
    )


def read_text(file: Path, remedy: str = "") -> str:
    """The text of a file in UTF-8, with or without a byte order mark; unpacked if the name ends in .gz.

    Args:
        file: which one.
        remedy: how to get it back; default `restore`.

    Raises:
        InputError: it is missing, no file, damaged, too large, a pointer of git-lfs, or no text in UTF-8.
    """
    name, remedy = shown(file), remedy or restore(file)
    if file.exists() and not file.is_file():
        raise InputError(f"{name} is a folder or a device and should be a file; move it away, then {remedy}")
    try:
        with file.open("rb") as opened:
            stream = gzip.GzipFile(fileobj=opened) if file.suffix == ".gz" else opened
            content = stream.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{name} is missing; {remedy}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name} cannot be read ({getattr(error, 'strerror', None) or error}); {remedy}") from None
    if len(content) > MOST_BYTES:
        raise InputError(f"{name} has more than {MOST_BYTES >> 20} MiB; {remedy}")
    if content.startswith(b"version https://git-lfs"):
        raise InputError(f"{name} is only a pointer of git-lfs; fetch the file with: git lfs pull")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{name} is no text in UTF-8; save it as UTF-8, or {remedy}")
    return text


def read_yaml(file: Path) -> Any:
    """What a YAML file holds.

    Raises:
        InputError: besides those of `read_text`: no YAML, a key twice, a number that YAML reads as another one (020 is 16,
            1:20 is 80), or aliases that unfold to more than `MOST_NODES` values.
    """
    name, loader = shown(file), yaml.SafeLoader("")
    try:
        loader = yaml.SafeLoader(read_text(file))
        root = loader.get_single_node()
        if root is None:
            return None
        _check(root, name)
        return loader.construct_document(root)
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{name} is nested too deeply; {restore(file)}") from None
    except Exception as error:  # of a wrong tag PyYAML raises many kinds
        mark = getattr(error, "problem_mark", None)
        raise InputError(f"{name} is not valid YAML{f' at line {mark.line + 1}' if mark else ''}") from None


def _check(root: yaml.Node, name: str) -> None:
    """Raises InputError for what YAML would take without a word; it names file and line."""
    todo, seen = [root], 1
    while todo:
        node = todo.pop()
        line = f"{name} line {node.start_mark.line + 1}:"
        if isinstance(node, yaml.ScalarNode):
            number = node.style is None and node.tag.endswith((":int", ":float"))
            if number and (AMBIGUOUS.fullmatch(node.value) or len(node.value) > LONGEST_NUMBER):
                raise InputError(
                    f"{line} {node.value[:20]} may mean another number; write it plainly, or in quotes if text"
                )
            if any(sign == "\0" or "\ud800" <= sign <= "\udfff" for sign in node.value):
                raise InputError(f"{line} a text has a sign that is none; remove it")
            continue
        children = node.value
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
                raise InputError(f"{line} the key {twice} stands twice in this section; remove one of them")
            children = [each for pair in node.value for each in pair]
        seen += len(children)
        if seen > MOST_NODES:
            raise InputError(f"{line} with its aliases the file has more than {MOST_NODES} values; write fewer")
        todo += children


def read_json(file: Path, remedy: str = "") -> Any:
    """What a JSON file holds; see `read_text`.

    Raises:
        InputError: besides those of `read_text`: no JSON, or a key twice.
    """
    try:
        return json.loads(read_text(file, remedy), object_pairs_hook=_unique)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown(file)} is no JSON ({error}); {remedy or restore(file)}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def write(file: Path, content: bytes | str) -> None:
    """Write a file, text in UTF-8: complete or not at all, also where several processes write it at once.

    It is written under a temporary name beside, which `cells` and tables never have. Those that an ended process left
    behind in this folder are removed after a day.

    Raises:
        OSError: the disk is full, the folder cannot be written to, ...; it names ``file``, which stays as it was.
    """
    partial = file.with_name(f"{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in file.parent.glob("*.partial"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if old.stat().st_mtime < time.time() - ABANDONED:
                    old.unlink()
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


def packed(text: str, name: str) -> bytes:
    """A text packed by gzip, without the time: the same bytes again for the same text and name."""
    buffer = io.BytesIO()
    with gzip.GzipFile(name, "wb", fileobj=buffer, mtime=1) as stream:
        stream.write(text.encode())
    return buffer.getvalue()


def check_writable(folder: Path) -> None:
    """Raises OSError unless a file can be written to ``folder``, which is made: to be asked before any training."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"\0")
