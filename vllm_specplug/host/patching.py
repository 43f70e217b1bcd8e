"""Patches to vLLM, one function each: existence-checked, marked, undoable.

Used only where vLLM has no extension point. A patch states in its replacement's docstring why that binding
reaches every caller and what it leaves alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

_MARK = "__specplug_original__"


class HostSymbolMissing(RuntimeError):
    """vLLM lacks something the plugin relies on; the message names it."""


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
    """Replace ``owner.name`` by ``make(original)``.

    Static and class methods stay what they were; ``make`` gets and returns the plain function.

    Returns:
        False if it is already wrapped by this plugin, in which case nothing changes.
    Raises:
        HostSymbolMissing: ``owner`` has no such attribute of its own.
    """
    raw = vars(owner).get(name)
    if raw is None:
        raise HostSymbolMissing(f"vLLM symbol {_path(owner)}.{name} does not exist")
    kind = type(raw) if isinstance(raw, staticmethod | classmethod) else None
    original = raw.__func__ if kind else raw
    if hasattr(original, _MARK):
        return False
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, _MARK, raw)
    setattr(owner, name, kind(replacement) if kind else replacement)
    return True


def unwrap(owner: Any, name: str) -> bool:
    """Undo :func:`wrap`. Returns False if the attribute is not wrapped by this plugin."""
    current = vars(owner).get(name)
    function = current.__func__ if isinstance(current, staticmethod | classmethod) else current
    if not hasattr(function, _MARK):
        return False
    setattr(owner, name, getattr(function, _MARK))
    return True


def is_wrapped(owner: Any, name: str) -> bool:
    """Whether ``owner.name`` is wrapped by this plugin."""
    current = vars(owner).get(name)
    function = current.__func__ if isinstance(current, staticmethod | classmethod) else current
    return hasattr(function, _MARK)


def _path(owner: Any) -> str:
    if inspect.ismodule(owner):
        return owner.__name__
    return f"{owner.__module__}.{owner.__qualname__}"
