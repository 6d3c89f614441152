"""Reading and checking parameters: ``params.yaml``, overlaid with a profile.

Every key is checked for spelling, type and possible value before anything runs. What can be set is said by sections
(`Section`): those of cohorts and methods are in `medsec.core.settings`, those of an experiment beside it.
"""

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medsec.core import files, paths
from medsec.core.errors import InputError

__all__ = ["Section"]

# The upper bounds are far above what can be computed here: they stop a slip of the pen before any training.
MOST = 100_000
Count = Annotated[int, Field(ge=1, le=MOST)]
Size = Annotated[int, Field(ge=1, le=1024)]  # of networks, federations, patches
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Rate = Annotated[float, Field(gt=0, le=1)]
Eps255 = Annotated[float, Field(ge=0, le=255)]  # in 255ths of the range of an image
Positive = Annotated[float, Field(gt=0, le=1e6)]
NotNegative = Annotated[float, Field(ge=0, le=1e6)]
Factor = Annotated[float, Field(ge=1, le=1e6)]


class Section(BaseModel):
    """A section of params.yaml: unknown keys, wrong types, infinite numbers and later changes are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Seeds(Section):
    tuning: list[Seed] = Field(min_length=1)
    evaluation: list[Seed] = Field(min_length=1)

    @model_validator(mode="after")
    def _disjoint(self):
        for name in ("tuning", "evaluation"):
            seeds = getattr(self, name)
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"{name} seeds repeat; every seed is one run")
        if both := sorted(set(self.tuning) & set(self.evaluation)):
            raise ValueError(f"seeds {both} are both tuning and evaluation seeds; the two lists must not overlap")
        return self


def rounds_until(share: float, rounds: int) -> int:
    """Number of whole rounds in the first ``share`` of them; also the index, from 0, of the round that follows."""
    return math.floor(round(share * rounds, 9))  # 0.29 * 100 is a little less than 29 to a computer


AnySection = TypeVar("AnySection", bound=Section)


def read(profile: str = "quick", file: Path | None = None) -> tuple[dict[str, Any], str]:
    """The parameters of a profile as they stand in the files, and the name of the file to blame for a mistake.

    Raises:
        InputError: a file is missing or is no YAML.
    """
    file = file or paths.PARAMS
    tree = _read(file)
    if profile == "quick":
        return tree, file.name
    overlay = Path(profile) if profile.endswith(".yaml") else paths.PROFILES / f"{profile}.yaml"
    if not overlay.is_file():
        known = ["quick", *sorted(p.stem for p in paths.PROFILES.glob("*.yaml"))]
        raise InputError(f"unknown profile {profile!r}: choose one of {', '.join(known)}")
    return merge(tree, _read(overlay)), overlay.name


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``base`` with the keys of ``change`` replaced, section by section."""
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def validated(model: type[AnySection], tree: Any, name: str) -> AnySection:
    """A section from nested dictionaries.

    Raises:
        InputError: it names the first wrong key of the file ``name``.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a misspelling explains the rest
        raise InputError(f"{name}: {_explain(model, first)}") from None


def registered(names: list[str], known: Any, what: str) -> list[str]:
    """``names``, if all of them are in a registry; for the validators of sections.

    Raises:
        ValueError: one is not; the nearest name is suggested.
    """
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
            raise ValueError(f"no {what} {name!r}; {hint}")
    return names


def _read(file: Path) -> dict[str, Any]:
    tree = files.read_yaml(file)
    if not isinstance(tree, dict):
        raise InputError(f"{file.name} must be a mapping of sections, found {type(tree).__name__}")
    return tree


def _explain(root: type[Section], error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden":
        known = _keys(root, error["loc"][:-1])
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        return f"unknown key {where}; " + (f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}")
    if error["type"] == "missing":
        return f"{where} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}" if error["loc"] else message
    hint = " (YAML reads 1e-3 as text; write 1.0e-3)" if error["type"] == "float_type" else ""
    value = repr(error["input"])
    return f"{where} = {value if len(value) < 80 else value[:77] + '...'}: {message[0].lower() + message[1:]}{hint}"


def _keys(root: type[Section], loc: tuple) -> list[str]:
    model: Any = root
    for part in loc:
        model = model.model_fields[part].annotation if hasattr(model, "model_fields") else get_args(model)[-1]
    return list(model.model_fields)
