"""Registry: built-in and third-party proposers, option sections, unknown names."""

from __future__ import annotations

import sys
import textwrap

import pytest

import vllm_specplug
from vllm_specplug import options, registry


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """A distribution on the path that registers one proposer, one broken one and one that takes a built-in's name."""
    (tmp_path / "acme_drafts.py").write_text(
        textwrap.dedent(
            """
            import dataclasses
            from vllm_specplug.options import option

            @dataclasses.dataclass(frozen=True)
            class Options:
                width: int = option(2, "a width", low=1, high=9)

            class AcmeDrafts:
                Options = Options
            """
        )
    )
    info = tmp_path / "acme_drafts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-drafts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vllm_specplug.proposers]\nAcmeDrafts = acme_drafts:AcmeDrafts\n"
        "Broken = acme_missing:Broken\nRetrieval = acme_drafts:AcmeDrafts\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.proposers.cache_clear()
    yield
    registry.proposers.cache_clear()
    sys.modules.pop("acme_drafts", None)


def test_builtin_names_and_sections():
    entry = registry.find("Retrieval")
    assert entry.section == "retrieval"
    assert entry.load().name == "retrieval"
    assert registry.Entry("TokenRecycling", "m:C", "d").section == "token_recycling"


def test_unknown_proposer_names_the_nearest():
    with pytest.raises(options.OptionError, match=r"vllm_specplug\.Retreival\. Did you mean 'Retrieval'"):
        registry.find("Retreival")


def test_unknown_attribute_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError):
        _ = vllm_specplug.NoSuchProposer
    assert not hasattr(vllm_specplug, "no_such_module")


def test_third_party_proposer_is_found_with_its_options(third_party):
    entry = registry.find("AcmeDrafts")
    assert (entry.origin, entry.section) == ("acme-drafts", "acme_drafts")
    user = registry.parse_options({"specplug": {"acme_drafts": {"width": 5}}})
    assert user.section(entry).width == 5
    assert "specplug.acme_drafts.width" in {r.path for r in registry.option_tree()}


def test_third_party_cannot_replace_a_builtin(third_party):
    assert registry.find("Retrieval").target == "vllm_specplug.proposers.retrieval:Retrieval"


def test_broken_third_party_matters_only_when_selected(third_party):
    assert registry.parse_options({"specplug": {"retrieval": {}}}).sections["retrieval"] is not None
    with pytest.raises(options.OptionError, match=r"registered by acme-drafts, cannot be loaded from acme_missing"):
        registry.find("Broken").load()


def test_parse_options_ignores_other_plugins_sections():
    assert registry.parse_options({"someone_else": {"a": 1}}).sections == {}
    assert registry.parse_options(None).general.enabled is True


def test_enabled_switch_from_environment(monkeypatch):
    monkeypatch.setenv("SPECPLUG_ENABLED", "0")
    assert registry.parse_options({}).general.enabled is False


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"specplug": {"retreival": {}}}, ["unknown option specplug.retreival", "Did you mean 'retrieval'"]),
        ({"specplug": []}, ["specplug = []", "JSON object"]),
        ({"specplug": {"enabled": "yes"}}, ["specplug.enabled = 'yes'", "true or false"]),
        ({"specplug": {"retrieval": {"min_prob": 7}}}, ["specplug.retrieval.min_prob = 7"]),
    ],
)
def test_mistakes_in_the_tree_are_named(data, words):
    with pytest.raises(options.OptionError) as caught:
        registry.parse_options(data)
    for word in words:
        assert word in str(caught.value)
