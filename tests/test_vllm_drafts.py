"""vLLM's own ngram and suffix behind the proposers' interface: the same drafts, and errors that say what is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from proposer_steps import draft, ints, step
from vllm_specplug.proposers.base import DraftForest, Proposer, Request, StepResult

from vllm_specplug.host import vllm_drafts
from vllm_specplug.host.vllm_drafts import VllmNgram, VllmNgramOptions, VllmSuffix, VllmSuffixOptions
from vllm_specplug.options import OptionError, parse

MODEL_LEN = 4096
K = 8


def texts(n: int, size: int, vocabulary: int = 500, seed: int = 0) -> np.ndarray:
    """``int32[n, size]`` random texts in which passages occur again."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, vocabulary, (n, size)).astype(np.int32)
    for text in found:
        for _ in range(size // 25):
            start, end = rng.integers(0, size - 40, 2)
            length = rng.integers(3, 30)
            text[end : end + length] = text[start : start + length].copy()
    return found


def vllm_config(**speculative: object) -> SimpleNamespace:
    """What vLLM's proposers read of it."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=K, **speculative),
        model_config=SimpleNamespace(max_model_len=MODEL_LEN),
        scheduler_config=SimpleNamespace(max_num_seqs=1024),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )


def lists(forest: DraftForest) -> list[list[int]]:
    return [forest.tokens[a:b].tolist() for a, b in zip(forest.offsets[:-1], forest.offsets[1:], strict=True)]


def batch(slots: np.ndarray, emitted: list[list[int]]) -> StepResult:
    offsets = np.concatenate([[0], np.cumsum([len(e) for e in emitted])]).astype(np.int32)
    return StepResult(slots, ints(*itertools.chain(*emitted)), offsets, slots * 0, slots * 0)


@pytest.fixture(params=["ngram", "suffix"])
def proposer(request) -> Proposer:
    if request.param == "suffix":
        pytest.importorskip("arctic_inference.suffix_decoding")
        return VllmSuffix(VllmSuffixOptions(max_spec_factor=4.0))
    return VllmNgram(VllmNgramOptions(1, 4))


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (2, 4), (5, 5), (1, 9)])
def test_ngram_drafts_what_vllm_drafts(shortest: int, longest: int) -> None:
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    theirs = NgramProposer(vllm_config(prompt_lookup_min=shortest, prompt_lookup_max=longest))
    ours = VllmNgram(VllmNgramOptions(shortest, longest))
    n, rng, drafted = 70, np.random.default_rng(1), 0  # more than the first room, in slots and tokens
    text = np.zeros((n, MODEL_LEN), np.int32)
    text[:, :600] = texts(n, 600, vocabulary=60)
    sizes = rng.integers(1, 300, n)
    for slot, size in enumerate(sizes):
        ours.add_request(Request(slot, str(slot), text[slot, :size], max_tokens=MODEL_LEN))
    for _ in range(30):
        slots = rng.permutation(n)[: rng.integers(1, n)].astype(np.int32)
        emitted = [text[s, sizes[s] : sizes[s] + rng.integers(1, 10)].tolist() for s in slots]
        sizes[slots] += [len(e) for e in emitted]
        ours.observe(batch(slots, emitted))
        limits = np.full(len(slots), K, np.int32)
        forest = ours.propose(slots, limits)
        forest.check_integrity(limits)
        every = theirs.propose(K, [[1]] * n, sizes.astype(np.int32), text)
        assert lists(forest) == [every[s] for s in slots]
        assert (forest.probs == 1).all()
        drafted += len(forest.tokens)
    assert drafted > 100


def test_suffix_drafts_what_vllm_drafts() -> None:
    pytest.importorskip("arctic_inference.suffix_decoding")
    from vllm.v1.spec_decode.suffix_decoding import SuffixDecodingProposer

    config = vllm_config(
        suffix_decoding_max_tree_depth=16,
        suffix_decoding_max_spec_factor=2.0,
        suffix_decoding_min_token_prob=0.2,
        suffix_decoding_max_cached_requests=3,
    )
    theirs, ours = SuffixDecodingProposer(config), vllm_drafts.make("suffix", config)
    text, slot, drafted = texts(8, 260, vocabulary=40), ints(0), 0
    for number, tokens in enumerate(text):  # one after another, for in a batch vLLM's caches depend on the order
        at = 61
        while at < 250:
            if at == 61:
                ours.add_request(Request(0, str(number), tokens[:at], num_output=1))
                emitted = tokens[60:61].tolist()
            else:
                ours.observe(batch(slot, [emitted]))
            held = SimpleNamespace(
                req_ids=[str(number)],
                req_id_to_index={str(number): 0},
                num_tokens_no_spec=[at],
                num_prompt_tokens=[60],
                token_ids_cpu=tokens[None],
            )
            forest = ours.propose(slot, ints(K))
            forest.check_integrity(ints(K))
            assert lists(forest) == theirs.propose(K, held, [emitted])
            drafted += len(forest.tokens)
            emitted = tokens[at : at + 1 + at % 5].tolist()
            at += len(emitted)
        ours.remove_request(0)
    assert drafted > 100
    assert ours.stats()["cached_requests"] == 3


@pytest.mark.parametrize(("length", "found"), [(1, 0), (2, 2), (3, 3), (7, 7), (90, 64)])
def test_match_lengths_go_beyond_the_ngram(length: int, found: int) -> None:
    ngram = VllmNgram(VllmNgramOptions(2, 3))
    passage = np.arange(100, 100 + length, dtype=np.int32)
    ngram.add_request(Request(0, "a", np.concatenate([ints(1), passage, ints(2, 3), passage])))
    forest = draft(ngram, 0, 4)
    assert forest.matched.tolist() == [found]
    assert forest.tokens[:2].tolist() == ([2, 3] if found else [])


def test_suffix_says_how_much_matched_and_how_sure_it_is() -> None:
    pytest.importorskip("arctic_inference.suffix_decoding")
    suffix = VllmSuffix(VllmSuffixOptions(max_spec_factor=4.0))
    suffix.add_request(Request(0, "a", ints(1, 2, 3, 4, 9, 2, 3, 5, 8, 2, 3, 4, 7, 2, 3)))
    forest = draft(suffix, 0, 4)
    assert forest.matched.tolist() == [2]
    assert forest.tokens[0] == 4
    assert forest.probs[0] == 0.5  # after two of four occurrences, the present one included


def test_a_slot_is_another_request_s_after_removal(proposer: Proposer) -> None:
    proposer.add_request(Request(3, "a", ints(1, 2, 3, 4, 5, 1, 2)))
    assert draft(proposer, 3, 2).tokens.tolist() == [3, 4]
    proposer.remove_request(3)
    proposer.add_request(Request(3, "b", ints(1, 2, 7, 8, 5, 1, 2)))
    assert draft(proposer, 3, 2).tokens.tolist() == [7, 8]
    proposer.observe(step(3, [8]))
    assert draft(proposer, 3, 2).tokens.tolist() == [5, 1]


def test_limits_and_the_end_of_the_request_hold(proposer: Proposer) -> None:
    text = ints(*range(50), *range(40))
    for slot, max_tokens in enumerate((1 << 30, 1 << 30, len(text) + 4, len(text) + 1)):
        proposer.add_request(Request(slot, str(slot), text, max_tokens=max_tokens))
    limits = ints(0, 5, 5, 5)
    forest = proposer.propose(ints(0, 1, 2, 3), limits)
    forest.check_integrity(limits)
    assert np.diff(forest.offsets).tolist() == [0, 5, 3, 0]  # a step emits one more than it accepts
    proposer.observe(step(2, [40, 41]))
    assert draft(proposer, 2, 5).tokens.tolist() == [42]
    assert proposer.propose(ints(), ints()).offsets.tolist() == [0]


def test_placeholders_are_not_drafted(proposer: Proposer) -> None:
    proposer.add_request(Request(0, "a", ints(1, 2, 3, -1, -1, 5, 1, 2)))
    assert draft(proposer, 0, 6).tokens.tolist() == [3]
    proposer.observe(step(0, [3]))
    forest = draft(proposer, 0, 6)
    assert len(forest.tokens) == 0
    assert forest.matched.tolist() == [0]


def test_bad_input_is_named(proposer: Proposer) -> None:
    one = Request(0, "a", ints(1, 2, 1))
    proposer.add_request(one)
    with pytest.raises(ValueError, match="slot 0 is taken"):
        proposer.add_request(one)
    with pytest.raises(ValueError, match="slot -1 is negative"):
        proposer.add_request(Request(-1, "b", ints(1)))
    with pytest.raises(ValueError, match="4 outputs in 1 tokens"):
        proposer.add_request(Request(1, "b", ints(1), num_output=4))
    for slot in (-1, 1, 500):
        for call in (
            lambda slot=slot: proposer.propose(ints(0, slot), ints(1, 1)),
            lambda slot=slot: proposer.observe(step(slot, [1])),
            lambda slot=slot: proposer.remove_request(slot),
        ):
            with pytest.raises(ValueError, match=rf"slot.*{slot}\]? ha(s|ve) no request"):
                call()
    with pytest.raises(ValueError, match="limits must not be negative"):
        proposer.propose(ints(0), ints(-1))
    with pytest.raises(ValueError, match="limits has 2 entries, expected 1"):
        proposer.propose(ints(0), ints(1, 1))
    with pytest.raises(ValueError, match=r"offsets .* do not cut 1 tokens"):
        proposer.observe(StepResult(ints(0), ints(1), ints(0, 2), ints(0), ints(0)))
    assert draft(proposer, 0, 1).tokens.tolist() == [2]  # as if none of it had happened


def test_namespaces_do_not_see_each_other_s_outputs() -> None:
    pytest.importorskip("arctic_inference.suffix_decoding")
    suffix = VllmSuffix()
    suffix.add_request(Request(0, "a", ints(1), namespace="x"))
    suffix.observe(step(0, [10, 11, 12, 13]))
    suffix.remove_request(0)
    for slot, namespace, found in ((0, "x", [12, 13]), (1, "y", [])):
        suffix.add_request(Request(slot, namespace, ints(2, 10, 11), num_output=2, namespace=namespace))
        assert draft(suffix, slot, 4).tokens.tolist() == found
        suffix.remove_request(slot)
    for number in range(vllm_drafts._IDLE_NAMESPACES + 5):
        suffix.add_request(Request(0, str(number), ints(1), namespace=str(number)))
        suffix.remove_request(0)
    assert suffix.stats()["namespaces"] == vllm_drafts._IDLE_NAMESPACES + 1  # and the one just used


def test_options_are_vllm_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_drafts, "_ngram_search", lambda: None)
    for given, bounds in (((0, 0), (5, 5)), ((0, 3), (3, 3)), ((2, 0), (2, 2)), ((2, 4), (2, 4))):
        ngram = VllmNgram(VllmNgramOptions(*given))
        assert (ngram._shortest, ngram._longest) == bounds
    with pytest.raises(OptionError, match=r"prompt_lookup_min = 4 .* at most prompt_lookup_max, 3"):
        VllmNgram(VllmNgramOptions(4, 3))
    with pytest.raises(OptionError, match=r"min_token_prob = 2.* expected a number from 0.0 to 1.0"):
        parse(VllmSuffixOptions, {"min_token_prob": 2}, "specplug.vllm_suffix")
    with pytest.raises(ValueError, match="'eagle' cannot draft here; expected one of ngram, suffix"):
        vllm_drafts.make("eagle", vllm_config())
    made = vllm_drafts.make("ngram", vllm_config(prompt_lookup_min=2, prompt_lookup_max=None))
    assert made.options == VllmNgramOptions(2, 0)
    assert vllm_drafts.make("ngram", None, VllmNgramOptions(3, 3)).options == VllmNgramOptions(3, 3)


def test_defaults_are_vllm_s() -> None:
    from vllm.config import SpeculativeConfig

    theirs = {f.name: f.default for f in dataclasses.fields(SpeculativeConfig)}
    for name, value in dataclasses.asdict(VllmSuffixOptions()).items():
        assert theirs[f"suffix_decoding_{name}"] == value


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arctic_inference.suffix_decoding", None)
    with pytest.raises(OptionError, match="pip install arctic-inference"):
        VllmSuffix()
    assert VllmSuffix.Options is VllmSuffixOptions  # selecting and describing it needs no package


def test_warm_up_compiles_and_leaves_nothing(proposer: Proposer) -> None:
    proposer.warm_up()
    assert proposer.stats()["live_requests"] == 0
    proposer.close()
