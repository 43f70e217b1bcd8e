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
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_specplug import options
from vllm_specplug.trace.options import SECTION as TRACE
from vllm_specplug.trace.options import TraceOptions

GROUP = "vllm_specplug.proposers"
PACKAGE = "vllm_specplug"
#: Origin of the built-in ones.
OWN = "vllm-specplug"
#: The arm of requests that get no drafts, and another name of the server's own proposer.
OFF, DEFAULT = "off", "default"
# Section of AbOptions.
_AB = "ab"

# Also in this package's own entry points; kept here so that a checkout on PYTHONPATH works uninstalled.
_BUILTIN = {
    "Auto": "vllm_specplug.proposers.auto:Auto",
    "AdaptiveLength": "vllm_specplug.proposers.adaptive_length:AdaptiveLength",
    "Retrieval": "vllm_specplug.proposers.retrieval:Retrieval",
    "SparseVerify": "vllm_specplug.proposers.sparse_verify:SparseVerify",
    "TokenRecycling": "vllm_specplug.proposers.token_recycling:TokenRecycling",
}
# vLLM's own, which only draft inside another proposer or as an arm: the user has them without this plugin.
_INNER = {
    "vllm:ngram": "vllm_specplug.host.vllm_drafts:VllmNgram",
    "vllm:suffix": "vllm_specplug.host.vllm_drafts:VllmSuffix",
}
# They draft under a budget themselves.
_WRAPPING = ("AdaptiveLength", "Auto", "SparseVerify")
_FUSED = "vllm_specplug.proposers.auto:Fused"


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
    attention: str = options.option(
        "auto",
        "whose kernel attends long contexts on CPUs: this plugin's where it was faster when the server started (auto) "
        "or always (own), or vLLM's, but for trees (vllm)",
        choices=("auto", "own", "vllm"),
    )
    gpu_trees: bool = options.option(
        False, "draft trees on CUDA too, with attention by this plugin; not yet run on a GPU by its authors"
    )
    on_device: bool = options.option(
        False,
        "draft on the CUDA device, in vLLM's Model Runner V2 with asynchronous scheduling (Auto, Retrieval and "
        "TokenRecycling); not yet run on a GPU by its authors",
    )


@dataclass(frozen=True, slots=True)
class AbOptions:
    """Several proposers in one server, under ``specplug.ab``; see :mod:`vllm_specplug.host.arms_in_one`."""

    arms: Sequence[str] | None = options.option(
        None,
        "proposers held beside the server's own, for requests that name one and for the split; each takes its memory",
        kind=list,
    )
    split: Mapping[str, float] | None = options.option(
        None,
        "share of the requests that each arm gets, by its name: a proposer that is held, off (no drafts), or default",
        kind=dict,
    )
    by: str = options.option(
        "request",
        "tenant: the split gives all requests of a tenant to one arm; those without one are split by request",
        choices=("request", "tenant"),
    )
    seed: int = options.option(0, "of the hash by which the split assigns arms", low=0, high=2**63 - 1)


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
    found = {name: Entry(name, target, OWN) for name, target in _BUILTIN.items()}
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
    """The entry called ``name`` that another proposer may wrap; ``path``: the option that names it. ``Auto`` is what it
    drafts from, without its budget.

    Raises:
        options.OptionError: there is none, or it wraps or budgets itself.
    """
    known = {k: e for k, e in (proposers() | _inner()).items() if k not in _WRAPPING}
    known["Auto"] = Entry("Auto", _FUSED, OWN)
    if name not in known:
        raise options.OptionError(
            f"{path} = {name!r} is not allowed: expected one of {', '.join(sorted(known))}."
            + options.nearest(name, known)
        )
    return known[name]


def _inner() -> dict[str, Entry]:
    return {name: Entry(name, target, OWN) for name, target in _INNER.items()}


@dataclass(frozen=True, slots=True)
class PluginOptions:
    """Everything the user set under ``additional_config["specplug"]``, checked."""

    general: GeneralOptions
    sections: dict[str, Any]
    trace: TraceOptions = TraceOptions()  # noqa: RUF009 - it is frozen
    ab: AbOptions = AbOptions()

    def section(self, entry: Entry, inner: bool = False) -> Any:
        """The options of ``entry``, its defaults if the user set none: those for an ``inner`` one, if it is wrapped."""
        if entry.section in self.sections:
            return self.sections[entry.section]
        cls = entry.load()
        return options.parse(cls.Options, cls.under_budget if inner else {}, f"{options.ROOT}.{entry.section}")

    def check(self, entry: Entry) -> None:
        """Check the options of ``entry``, of what it wraps, and of all arms beside it, without building them.

        Raises:
            options.OptionError: saying what is wrong.
        """
        for arm in self.arms(entry).values():
            self._check_one(arm)
        self.split(entry)

    def arms(self, entry: Entry) -> dict[str, Entry]:
        """The proposers held by a server of ``entry``, by section name, its own first.

        Raises:
            options.OptionError: one is unknown.
        """
        known = {e.section: e for e in (proposers() | _inner()).values()}
        held = {entry.section: entry}
        for name in self.ab.arms or ():
            if name in known:
                held[name] = known[name]
            elif name not in (OFF, DEFAULT):  # those are there anyway
                raise options.OptionError(
                    f"{options.ROOT}.ab.arms = {self.ab.arms!r} is not allowed: expected a list of names out of "
                    f"{', '.join(sorted(known))}; {name!r} is none.{options.nearest(name, known)}"
                )
        return held

    def arm_names(self, entry: Entry) -> dict[str, str]:
        """What a request or the split may call an arm, and what that arm is called in metrics."""
        return {OFF: OFF, DEFAULT: entry.section, **{name: name for name in self.arms(entry)}}

    def split(self, entry: Entry) -> dict[str, float]:
        """Share of the requests of each arm, by its name in metrics; empty if there is no split.

        Raises:
            options.OptionError: an arm is not held, a share not above 0, or they do not add up to 1.
        """
        if self.ab.split is None:
            return {}
        names, shares = self.arm_names(entry), dict[str, float]()
        where = f"{options.ROOT}.ab.split = {dict(self.ab.split)!r} is not allowed: "
        for name, share in self.ab.split.items():
            if name not in names:
                raise options.OptionError(
                    f"{where}expected names out of {', '.join(sorted(names))}; {name!r} is none."
                    f"{options.nearest(name, names)} {options.ROOT}.ab.arms says which proposers are held."
                )
            if names[name] in shares:
                raise options.OptionError(f"{where}it names the arm {names[name]} twice.")
            if not 0.0 < share <= 1.0:
                raise options.OptionError(f"{where}expected shares above 0 and up to 1, {name!r} has {share!r}.")
            shares[names[name]] = float(share)
        if not abs(math.fsum(shares.values()) - 1.0) <= 1e-6:
            raise options.OptionError(
                f"{where}expected shares that add up to 1, these make {math.fsum(shares.values()):g}."
            )
        return shares

    def _check_one(self, entry: Entry) -> None:
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
    trace = options.parse(TraceOptions, data.get(TRACE, {}), f"{options.ROOT}.{TRACE}")
    ab = options.parse(AbOptions, data.get(_AB, {}), f"{options.ROOT}.{_AB}")
    for key, value in data.items():
        if key in (TRACE, _AB):
            continue
        if key in by_section:
            sections[key] = options.parse(by_section[key].load().Options, value, f"{options.ROOT}.{key}")
        elif key not in general_names:
            known = [*general_names, TRACE, _AB, *by_section]
            raise options.OptionError(
                f"unknown option {options.ROOT}.{key}.{options.nearest(key, known)} Allowed under "
                f"{options.ROOT}: {', '.join(sorted(known))}."
            )
    general = options.parse(GeneralOptions, {k: v for k, v in data.items() if k in general_names}, options.ROOT)
    if any(name.startswith(options.ENV_PREFIX) for name in os.environ):  # it imports every proposer
        options.check_environment(info.env for info in option_tree())
    return PluginOptions(general, sections, trace, ab)


def option_tree() -> list[options.OptionInfo]:
    """Every option of the plugin and of each registered proposer that can be imported.

    One that cannot (another package's, broken) must not stop a server that does not use it; ``specplug doctor``
    names it.
    """
    rows = options.describe(GeneralOptions, options.ROOT)
    rows += options.describe(TraceOptions, f"{options.ROOT}.{TRACE}")
    rows += options.describe(AbOptions, f"{options.ROOT}.{_AB}")
    for entry in (proposers() | _inner()).values():
        with contextlib.suppress(options.OptionError):
            rows += options.describe(entry.load().Options, f"{options.ROOT}.{entry.section}")
    return rows
