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


def arms(**ab):
    """A server of Auto, with these options under ``specplug.ab``: names and shares."""
    user, entry = registry.parse_options({"specplug": {"ab": ab}}), registry.find("Auto")
    return user.arm_names(entry), user.split(entry)


def test_arms_and_shares():
    assert arms() == ({"off": "off", "default": "auto", "auto": "auto"}, {})
    names, shares = arms(
        arms=["retrieval", "vllm_ngram", "auto", "off"], split={"default": 0.7, "off": 0.2, "retrieval": 0.1}
    )
    assert set(names) == {"off", "default", "auto", "retrieval", "vllm_ngram"}
    assert shares == {"auto": 0.7, "off": 0.2, "retrieval": 0.1}
    assert arms(split={"auto": 1})[1] == {"auto": 1.0}
    assert arms(split={"auto": 0.7000004, "off": 0.3})[1]["off"] == 0.3


def test_arms_of_other_packages(third_party):
    assert arms(arms=["acme_drafts"])[0]["acme_drafts"] == "acme_drafts"


@pytest.mark.parametrize(
    ("ab", "words"),
    [
        (
            {"arms": ["retreival"]},
            [
                "specplug.ab.arms",
                "names out of adaptive_length, auto, ",
                "'retreival' is none",
                "Did you mean 'retrieval'",
            ],
        ),
        ({"split": {"retrieval": 0.5, "off": 0.5}}, ["specplug.ab.split", "auto, default, off", "'retrieval' is none"]),
        ({"split": {"auto": 0.5, "off": 0.4}}, ["specplug.ab.split", "add up to 1, these make 0.9"]),
        ({"split": {}}, ["specplug.ab.split", "these make 0"]),
        ({"split": {"auto": 1.0, "off": 0}}, ["specplug.ab.split", "above 0", "'off' has 0"]),
        ({"split": {"auto": float("nan")}}, ["specplug.ab.split", "'auto' has nan"]),
        ({"split": {"auto": 0.5, "default": 0.5}}, ["specplug.ab.split", "names the arm auto twice"]),
        ({"split": {"auto": "0.5"}}, ["specplug.ab.split", "a JSON object of numbers by name"]),
        ({"split": 0.5}, ["specplug.ab.split = 0.5", "a JSON object"]),
        ({"by": "user"}, ["specplug.ab.by = 'user'", "one of request, tenant"]),
        ({"seed": -1}, ["specplug.ab.seed = -1", "from 0 to"]),
        ({"share": {}}, ["unknown option specplug.ab.share", "arms, by, seed, split"]),
        ([], ["specplug.ab = []", "JSON object"]),
    ],
)
def test_mistakes_in_arms_are_named(ab, words):
    with pytest.raises(options.OptionError) as caught:
        user = registry.parse_options({"specplug": {"ab": ab}})
        user.check(registry.find("Auto"))
    for word in words:
        assert word in str(caught.value)


def test_options_of_an_arm_are_checked(monkeypatch):
    user = registry.parse_options(
        {"specplug": {"ab": {"arms": ["adaptive_length"]}, "adaptive_length": {"inner": "SparseVerify"}}}
    )
    with pytest.raises(options.OptionError, match=r"specplug\.adaptive_length\.inner = 'SparseVerify'"):
        user.check(registry.find("Retrieval"))


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
