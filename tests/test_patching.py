"""Patches: replaced once, undone exactly, missing symbols named."""

from __future__ import annotations

import inspect

import pytest

from vllm_specplug.host import patching


class Host:
    def method(self, x):
        """Host's own."""
        return x + 1

    @classmethod
    def build(cls, x):
        return (cls.__name__, x)

    @staticmethod
    def add(x):
        return x + 10


def doubling(original):
    def replacement(*args):
        return (original(*args), "patched")

    return replacement


@pytest.mark.parametrize(
    ("name", "call", "before"),
    [
        ("method", lambda: Host().method(1), 2),
        ("build", lambda: Host.build(1), ("Host", 1)),
        ("add", lambda: Host.add(1), 11),
    ],
)
def test_wrap_is_idempotent_and_undone_exactly(name, call, before):
    raw = vars(Host)[name]
    assert patching.wrap(Host, name, doubling) is True
    try:
        assert patching.wrap(Host, name, doubling) is False
        assert patching.is_wrapped(Host, name)
        assert call() == (before, "patched")
        assert type(vars(Host)[name]) is type(raw)
    finally:
        assert patching.unwrap(Host, name) is True
    assert vars(Host)[name] is raw
    assert call() == before
    assert patching.unwrap(Host, name) is False


def test_wrap_keeps_name_and_signature():
    patching.wrap(Host, "method", doubling)
    try:
        assert Host.method.__doc__ == "Host's own."
        assert list(inspect.signature(Host.method).parameters) == ["self", "x"]
    finally:
        patching.unwrap(Host, "method")


def test_missing_symbol_is_named():
    with pytest.raises(patching.HostSymbolMissing, match=r"test_patching\.Host\.gone does not exist"):
        patching.wrap(Host, "gone", doubling)


def test_inherited_attribute_is_not_patched_on_the_child():
    class Child(Host):
        pass

    with pytest.raises(patching.HostSymbolMissing):
        patching.wrap(Child, "method", doubling)
