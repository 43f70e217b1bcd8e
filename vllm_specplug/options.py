"""Typed options: one dataclass per section, every field with a default, a range and a one-line meaning.

Import-light on purpose: it is loaded in every vLLM process. A section is a frozen dataclass whose fields
are made with :func:`option`; :func:`parse` turns the user's JSON into it or raises :class:`OptionError`
with the option's path, the value, what is allowed, and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Section = TypeVar("Section")

ROOT = "specplug"
ENV_PREFIX = "SPECPLUG_"


class OptionError(ValueError):
    """A user's option is unknown, of the wrong type or out of range. The message is for the user."""


@dataclasses.dataclass(frozen=True, slots=True)
class OptionInfo:
    """One row of ``specplug options``."""

    path: str
    type: str
    default: Any
    allowed: str
    meaning: str
    env: str | None


def option(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Iterable[str] | None = None,
    env: str | None = None,
    kind: type | None = None,
) -> Any:
    """A dataclass field holding one option.

    ``low`` and ``high`` are inclusive. ``kind``: of a value where the default, None, does not tell: ``list`` (of
    strings) or ``dict`` (of numbers by name). ``env`` names an environment variable that overrides the default
    (not an explicit setting): only for knobs that do not change what is compiled, since
    ``additional_config`` is part of vLLM's compile-cache key and the environment is not.
    """
    metadata = {
        "meaning": meaning,
        "low": low,
        "high": high,
        "choices": tuple(choices) if choices is not None else None,
        "env": env,
        "kind": kind,
    }
    return dataclasses.field(default=default, metadata=metadata)


def nearest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest known name, or an empty string."""
    known = list(known)
    folded = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.5)
    return f" Did you mean '{folded[found[0]]}'?" if found else ""


def _kind(field: dataclasses.Field[Any]) -> type:
    """The type an option holds, taken from its default unless said (annotations are strings here)."""
    if field.metadata["kind"] is not None:
        return field.metadata["kind"]  # type: ignore[no-any-return]
    return str if field.default is None else type(field.default)


#: What is allowed of values that are not scalar.
_CONTAINERS: dict[type, str] = {list: "a list of names", dict: "a JSON object of numbers by name"}


def _allowed(field: dataclasses.Field[Any]) -> str:
    meta, kind = field.metadata, _kind(field)
    if meta["choices"]:
        return "one of " + ", ".join(meta["choices"])
    if kind in _CONTAINERS:
        return _CONTAINERS[kind]
    if kind is bool:
        return "true or false"
    low, high = meta["low"], meta["high"]
    noun = {int: "a whole number", float: "a number", str: "a string"}[kind]
    if low is not None and high is not None:
        return f"{noun} from {low} to {high}"
    if low is not None:
        return f"{noun} of at least {low}"
    if high is not None:
        return f"{noun} of at most {high}"
    return noun


def _check(field: dataclasses.Field[Any], value: Any, where: str) -> Any:
    kind = _kind(field)
    if value is None and field.default is None:
        return None
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value, good = float(value), True
    if good and kind is list:
        good = all(isinstance(item, str) for item in value)
    if good and kind is dict:
        good = all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in value.values())
    meta = field.metadata
    if good and meta["choices"]:
        good = value in meta["choices"]
    if good and kind in (int, float):
        low, high = meta["low"], meta["high"]
        # `not (>=)` also catches NaN.
        good = not (low is not None and not value >= low) and not (high is not None and not value <= high)
    if not good:
        hint = nearest(value, meta["choices"]) if meta["choices"] and isinstance(value, str) else ""
        raise OptionError(f"{where} = {value!r} is not allowed: expected {_allowed(field)}.{hint}")
    return value


def _from_env(field: dataclasses.Field[Any]) -> Any:
    """The default, or the environment's value for it."""
    name = field.metadata["env"]
    text = os.environ.get(name) if name else None
    if text is None:
        return field.default
    kind = _kind(field)
    value: Any = text
    try:
        if kind is bool:
            value = {"1": True, "true": True, "0": False, "false": False}[text.strip().lower()]
        elif kind in (int, float):
            value = kind(text)
    except (KeyError, ValueError):
        allowed = "1, 0, true or false" if kind is bool else _allowed(field)
        raise OptionError(f"environment variable {name} = {text!r} is not allowed: expected {allowed}.") from None
    return _check(field, value, f"environment variable {name}")


def parse(section: type[Section], data: Any, path: str) -> Section:
    """Build ``section`` from the user's ``data``.

    Raises:
        OptionError: naming the option by its full path under ``path``.
    """
    if not isinstance(data, Mapping):
        raise OptionError(f"{path} = {data!r} is not allowed: expected a JSON object of options.")
    fields = {f.name: f for f in dataclasses.fields(section)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise OptionError(
                f"unknown option {path}.{key}.{nearest(str(key), fields)} Allowed under {path}: "
                + (", ".join(sorted(fields)) or "nothing")
                + "."
            )
    values = {
        name: _check(f, data[name], f"{path}.{name}") if name in data else _from_env(f) for name, f in fields.items()
    }
    return section(**values)


def check_environment(known: Iterable[str | None]) -> None:
    """Refuse a ``SPECPLUG_*`` variable that no option reads: a misspelt one would silently do nothing.

    Raises:
        OptionError: naming the variable and the nearest known one.
    """
    names = sorted({name for name in known if name})
    for name in os.environ:
        if name.startswith(ENV_PREFIX) and name not in names:
            raise OptionError(
                f"unknown environment variable {name}.{nearest(name, names)} Allowed: {', '.join(names)}."
            )


def describe(section: type[Any], path: str) -> list[OptionInfo]:
    """The rows ``specplug options`` prints for one section."""
    return [
        OptionInfo(
            path=f"{path}.{f.name}",
            type=_kind(f).__name__,
            default=f.default,
            allowed=_allowed(f),
            meaning=f.metadata["meaning"],
            env=f.metadata["env"],
        )
        for f in dataclasses.fields(section)
    ]
