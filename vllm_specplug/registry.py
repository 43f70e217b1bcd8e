"""Which proposers exist: the built-in ones and those other packages add by entry point.

A package adds one with::

    [project.entry-points."vllm_specplug.proposers"]
    MyProposer = "my_package.my_module:MyProposer"

and users select it as ``--spec-model vllm_specplug.MyProposer``. Its options live in the section that is the
entry point's name in snake case. Import-light: a proposer's module is imported only when it is selected or
one of its options is set.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
import re
from dataclasses import dataclass
from typing import Any

from vllm_specplug import options

GROUP = "vllm_specplug.proposers"
PACKAGE = "vllm_specplug"

# Also in this package's own entry points; kept here so that a checkout on PYTHONPATH works uninstalled.
_BUILTIN = {
    "Auto": "vllm_specplug.proposers.auto:Auto",
    "AdaptiveLength": "vllm_specplug.proposers.adaptive_length:AdaptiveLength",
    "Retrieval": "vllm_specplug.proposers.retrieval:Retrieval",
    "TokenRecycling": "vllm_specplug.proposers.token_recycling:TokenRecycling",
}
# vLLM's own, which only draft inside another proposer: the user has them without this plugin.
_INNER = {
    "vllm:ngram": "vllm_specplug.host.vllm_drafts:VllmNgram",
    "vllm:suffix": "vllm_specplug.host.vllm_drafts:VllmSuffix",
}


@dataclass(frozen=True, slots=True)
class GeneralOptions:
    """Options of the plugin as a whole, directly under ``specplug``."""

    enabled: bool = options.option(
        True,
        "false: the server starts with the plugin loaded but drafts nothing (to compare, or to rule the plugin out)",
        env="SPECPLUG_ENABLED",
    )
    state_file: str | None = options.option(
        None, "keep what is learned, earlier outputs included, in this file, and go on from it after a restart"
    )
    save_every_s: float = options.option(300.0, "seconds between saves of the state file; 0: only at the end", low=0.0)


@dataclass(frozen=True, slots=True)
class Entry:
    """One registered proposer.

    Attributes:
        name: class name users select, as in ``vllm_specplug.<name>``.
        target: ``module:attribute``.
        origin: distribution that registered it.
    """

    name: str
    target: str
    origin: str

    @property
    def section(self) -> str:
        """Name of its section of options."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.name).lower().replace(":", "_")

    def load(self) -> Any:
        """Import the class.

        Raises:
            options.OptionError: it cannot be imported, naming the distribution at fault.
        """
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise options.OptionError(
                f"proposer {PACKAGE}.{self.name}, registered by {self.origin}, cannot be loaded from "
                f"{self.target}: {error}"
            ) from error


@functools.cache
def proposers() -> dict[str, Entry]:
    """Registered proposers by name. A built-in name cannot be taken over by another package."""
    found = {name: Entry(name, target, "vllm-specplug") for name, target in _BUILTIN.items()}
    for point in importlib.metadata.entry_points(group=GROUP):
        origin = point.dist.name if point.dist else "an unknown distribution"
        found.setdefault(point.name, Entry(point.name, point.value, origin))
    return found


def find(name: str) -> Entry:
    """The entry called ``name``.

    Raises:
        options.OptionError: there is none; names the nearest.
    """
    known = proposers()
    if name not in known:
        raise options.OptionError(
            f"unknown proposer {PACKAGE}.{name}.{options.nearest(name, known)} Available: "
            + ", ".join(f"{PACKAGE}.{k}" for k in sorted(known))
            + "."
        )
    return known[name]


def find_inner(name: str, path: str) -> Entry:
    """The entry called ``name`` that another proposer may wrap; ``path``: the option that names it.

    Raises:
        options.OptionError: there is none, or it wraps or budgets itself.
    """
    known = {k: e for k, e in (proposers() | _inner()).items() if k not in ("AdaptiveLength", "Auto")}
    if name not in known:
        raise options.OptionError(
            f"{path} = {name!r} is not allowed: expected one of {', '.join(sorted(known))}."
            + options.nearest(name, known)
        )
    return known[name]


def _inner() -> dict[str, Entry]:
    return {name: Entry(name, target, "vllm-specplug") for name, target in _INNER.items()}


@dataclass(frozen=True, slots=True)
class PluginOptions:
    """Everything the user set under ``additional_config["specplug"]``, checked."""

    general: GeneralOptions
    sections: dict[str, Any]

    def section(self, entry: Entry, inner: bool = False) -> Any:
        """The options of ``entry``, its defaults if the user set none: those for an ``inner`` one, if it is wrapped."""
        if entry.section in self.sections:
            return self.sections[entry.section]
        cls = entry.load()
        return options.parse(cls.Options, cls.under_budget if inner else {}, f"{options.ROOT}.{entry.section}")

    def check(self, entry: Entry) -> None:
        """Check the options of ``entry`` and of what it wraps, without building them.

        Raises:
            options.OptionError: saying what is wrong.
        """
        section = self.section(entry)
        if getattr(entry.load(), "wraps", False):
            inner = self._inner_of(entry, section)
            self.section(inner)
            entry = inner
        entry.load().check_installed()

    def _inner_of(self, entry: Entry, section: Any) -> Entry:
        return find_inner(section.inner, f"{options.ROOT}.{entry.section}.inner")

    def build(self, entry: Entry) -> Any:
        """The proposer of ``entry``, with the user's options.

        Raises:
            options.OptionError: it cannot be imported, or what it wraps is wrong.
        """
        cls, section = entry.load(), self.section(entry)
        if not getattr(cls, "wraps", False):
            return cls(section)
        inner = self._inner_of(entry, section)
        return cls(section, inner.load()(self.section(inner, inner=True)))


def parse_options(additional_config: Any) -> PluginOptions:
    """Check vLLM's ``additional_config`` and the ``SPECPLUG_*`` environment.

    Raises:
        options.OptionError: on the first option that is unknown, of the wrong type or out of range.
    """
    data = additional_config.get(options.ROOT, {}) if isinstance(additional_config, dict) else {}
    if not isinstance(data, dict):
        raise options.OptionError(f"{options.ROOT} = {data!r} is not allowed: expected a JSON object of options.")
    by_section = {entry.section: entry for entry in (proposers() | _inner()).values()}
    general_names = GeneralOptions.__dataclass_fields__
    sections = {}
    for key, value in data.items():
        if key in by_section:
            sections[key] = options.parse(by_section[key].load().Options, value, f"{options.ROOT}.{key}")
        elif key not in general_names:
            known = [*general_names, *by_section]
            raise options.OptionError(
                f"unknown option {options.ROOT}.{key}.{options.nearest(key, known)} Allowed under "
                f"{options.ROOT}: {', '.join(sorted(known))}."
            )
    general = options.parse(GeneralOptions, {k: v for k, v in data.items() if k in general_names}, options.ROOT)
    if any(name.startswith(options.ENV_PREFIX) for name in os.environ):  # it imports every proposer
        options.check_environment(info.env for info in option_tree())
    return PluginOptions(general, sections)


def option_tree() -> list[options.OptionInfo]:
    """Every option of the plugin and of each registered proposer that can be imported.

    One that cannot (another package's, broken) must not stop a server that does not use it; ``specplug doctor``
    names it.
    """
    rows = options.describe(GeneralOptions, options.ROOT)
    for entry in (proposers() | _inner()).values():
        with contextlib.suppress(options.OptionError):
            rows += options.describe(entry.load().Options, f"{options.ROOT}.{entry.section}")
    return rows
