"""Version gate against the installed vLLM, and against versions it is told of."""

from __future__ import annotations

import pytest

from vllm_specplug.host import compat, patching, runner


def test_every_symbol_is_in_the_installed_vllm():
    probes = compat.probe()
    assert len(probes) == len(compat.SYMBOLS)
    assert [p.name for p in probes if not p.found] == []


def test_every_patched_method_is_probed():
    probed = {s.name for s in compat.SYMBOLS}
    assert {f"GPUModelRunner.{name}" for name in runner._PATCHES} <= probed


def test_installed_version_is_supported():
    level, message = compat.support_status()
    assert level == "supported"
    assert compat.vllm_version() in message
    assert compat.require() is None


@pytest.mark.parametrize("version", ["0.27.9", "0.33.0", "1.0.0", "dev"])
def test_other_version_with_everything_present_runs_under_a_warning(monkeypatch, version):
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    assert compat.support_status()[0] == "untested"
    warning = compat.require()
    assert version in warning
    assert "0.28 to 0.32" in warning
    assert "\n" not in warning


@pytest.mark.parametrize("version", ["0.28.0", "0.30.2+cpu", "0.32.0"])
def test_supported_range(monkeypatch, version):
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    assert compat.support_status()[0] == "supported"


@pytest.mark.parametrize(
    ("symbol", "words"),
    [
        (compat.Symbol("vllm.v1.gone", "Thing", (), "drafting"), ["vllm.v1.gone.Thing", "not found", "drafting"]),
        (compat.Symbol("vllm.config", "Gone.method", (), "x"), ["vllm.config.Gone.method", "not found"]),
        (
            compat.Symbol("vllm.engine.arg_utils", "EngineArgs", ("no_such_field",), "x"),
            ["vllm.engine.arg_utils.EngineArgs", "lacks no_such_field"],
        ),
    ],
)
def test_missing_symbol_refuses_and_is_named(monkeypatch, symbol, words):
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.40.0")
    monkeypatch.setattr(compat, "SYMBOLS", (*compat.SYMBOLS, symbol))
    with pytest.raises(patching.HostSymbolMissing) as caught:
        compat.require()
    for word in ["0.40.0", *words]:
        assert word in str(caught.value)


def test_a_missing_symbol_of_trees_costs_trees_only(monkeypatch):
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.40.0")
    assert compat.missing_for_trees() == []
    gone = compat.Symbol("vllm.v1.gone", "Thing", (), "draft trees", required=False)
    monkeypatch.setattr(compat, "SYMBOLS", (*compat.SYMBOLS, gone))
    assert compat.support_status()[0] == "untested"
    assert compat.missing_for_trees() == ["vllm.v1.gone.Thing"]


def test_no_vllm_at_all(monkeypatch):
    monkeypatch.setattr(compat, "vllm_version", lambda: None)
    assert compat.support_status() == ("unsupported", "vLLM is not installed: no module named vllm")
