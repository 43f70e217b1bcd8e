"""Options: every mistake ends in a message with the path, the value, what is allowed and the nearest name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import pytest

from vllm_specplug import options, registry


@dataclasses.dataclass(frozen=True)
class Sample:
    share: float = options.option(0.25, "a share", low=0.0, high=1.0, env="SPECPLUG_SAMPLE_SHARE")
    count: int = options.option(3, "a count", low=1)
    mode: str = options.option("auto", "a mode", choices=("auto", "fixed"))
    fast: bool = options.option(False, "a switch", env="SPECPLUG_SAMPLE_FAST")
    path: str | None = options.option(None, "a path")
    names: Sequence[str] | None = options.option(None, "names", kind=list)
    shares: Mapping[str, float] | None = options.option(None, "shares", kind=dict)


def test_defaults_and_values():
    assert options.parse(Sample, {}, "specplug.sample") == Sample()
    got = options.parse(Sample, {"share": 1, "count": 7, "mode": "fixed", "fast": True, "path": "x"}, "specplug.sample")
    assert got == Sample(share=1.0, count=7, mode="fixed", fast=True, path="x")
    assert isinstance(got.share, float)
    got = options.parse(Sample, {"names": ["a"], "shares": {"a": 1, "b": 0.5}}, "specplug.sample")
    assert (got.names, got.shares) == (["a"], {"a": 1, "b": 0.5})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"share": 1.5}, ["specplug.sample.share = 1.5", "from 0.0 to 1.0"]),
        ({"share": float("nan")}, ["specplug.sample.share = nan"]),
        ({"share": "0.5"}, ["specplug.sample.share = '0.5'", "a number"]),
        ({"share": True}, ["specplug.sample.share = True"]),
        ({"count": 0}, ["specplug.sample.count = 0", "at least 1"]),
        ({"count": 2.0}, ["specplug.sample.count = 2.0", "whole number"]),
        ({"mode": "fixd"}, ["one of auto, fixed", "Did you mean 'fixed'?"]),
        ({"fast": 1}, ["specplug.sample.fast = 1", "true or false"]),
        ({"shar": 0.1}, ["unknown option specplug.sample.shar", "Did you mean 'share'?", "count, fast, mode"]),
        ({"path": 3}, ["specplug.sample.path = 3", "a string"]),
        ({"names": "a"}, ["specplug.sample.names = 'a'", "a list of names"]),
        ({"names": ["a", 1]}, ["specplug.sample.names = ['a', 1]", "a list of names"]),
        ({"shares": [0.5]}, ["specplug.sample.shares = [0.5]", "a JSON object of numbers by name"]),
        ({"shares": {"a": True}}, ["specplug.sample.shares = {'a': True}", "a JSON object of numbers by name"]),
        ([1], ["specplug.sample = [1]", "JSON object"]),
        (None, ["specplug.sample = None", "JSON object"]),
    ],
)
def test_mistakes_are_named(data, words):
    with pytest.raises(options.OptionError) as caught:
        options.parse(Sample, data, "specplug.sample")
    for word in words:
        assert word in str(caught.value)


def test_environment_overrides_the_default_only(monkeypatch):
    monkeypatch.setenv("SPECPLUG_SAMPLE_SHARE", "0.75")
    monkeypatch.setenv("SPECPLUG_SAMPLE_FAST", "1")
    assert options.parse(Sample, {}, "s") == Sample(share=0.75, fast=True)
    assert options.parse(Sample, {"share": 0.5, "fast": False}, "s") == Sample(share=0.5)


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("SPECPLUG_SAMPLE_SHARE", "2", "from 0.0 to 1.0"),
        ("SPECPLUG_SAMPLE_SHARE", "many", "a number"),
        ("SPECPLUG_SAMPLE_FAST", "maybe", "1, 0, true or false"),
    ],
)
def test_environment_mistakes_are_named(monkeypatch, name, value, word):
    monkeypatch.setenv(name, value)
    with pytest.raises(options.OptionError, match=f"environment variable {name}") as caught:
        options.parse(Sample, {}, "s")
    assert word in str(caught.value)


def test_unknown_environment_variable(monkeypatch):
    monkeypatch.setenv("SPECPLUG_SAMPLE_SHARES", "1")
    with pytest.raises(options.OptionError, match="Did you mean 'SPECPLUG_SAMPLE_SHARE'"):
        options.check_environment(["SPECPLUG_SAMPLE_SHARE", None])


def test_describe_covers_every_option():
    rows = options.describe(Sample, "specplug.sample")
    assert [r.path for r in rows] == [f"specplug.sample.{f.name}" for f in dataclasses.fields(Sample)]
    assert rows[0].allowed == "a number from 0.0 to 1.0"
    assert rows[0].env == "SPECPLUG_SAMPLE_SHARE"
    assert rows[4].default is None


def test_every_shipped_option_has_a_meaning_and_a_legal_default():
    rows = registry.option_tree()
    assert {"specplug.enabled", "specplug.retrieval.min_prob", "specplug.retrieval.store_bytes"} <= {
        r.path for r in rows
    }
    assert all(r.meaning for r in rows)
    for entry in registry.proposers().values():
        section = entry.load().Options
        assert options.parse(section, dataclasses.asdict(section()), entry.section) == section()
