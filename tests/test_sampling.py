"""Sampled output keeps the target's distribution: temperature 0.8, top-p 0.9, tens of thousands of verified drafts.

A tiny random-weight model makes many samples cheap, and its exact distributions are computed apart from vLLM (in
transformers). Where a draft d was verified after a prefix, the emitted token y must satisfy P(y = d) = p(d | prefix),
and when y is not d it must follow p without d. Both are summed over all verified positions into normal scores.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engines import RETRIEVAL, engine, lifecycle_of, make_tiny_llama

pytestmark = pytest.mark.engine

VOCAB, TEMPERATURE, TOP_P = 48, 0.8, 0.9
REQUESTS, TOKENS = 448, 64

#: Two-sided false-alarm rate of one score is 6e-6 (the seeds are fixed, so it passes always or never).
BOUND = 4.5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), VOCAB)


def target_distributions(model_path, texts: list[list[int]]) -> np.ndarray:
    """``[texts, length, vocab]`` the exact sampling distribution after every prefix."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor(texts[i : i + 64])).logits for i in range(0, len(texts), 64)])
    probs = torch.softmax(logits.double() / TEMPERATURE, dim=-1)
    ordered, index = probs.sort(dim=-1, descending=True)
    # The smallest set of most likely tokens whose mass reaches top_p.
    ordered[(ordered.cumsum(-1) - ordered) >= TOP_P] = 0.0
    kept = torch.zeros_like(probs).scatter(-1, index, ordered)
    return (kept / kept.sum(-1, keepdim=True)).numpy()


def verified_positions(llm, prompts):
    """Run the prompts; yields (request, position, draft) for every draft token whose path was accepted so far."""
    from vllm import SamplingParams

    lifecycle = lifecycle_of(llm)
    drafts: list[tuple[str, int, list[int]]] = []
    step = lifecycle.step

    def recording(batch, admit):
        found = step(batch, admit)
        drafts.extend(zip(batch.ids, batch.totals.tolist(), found, strict=True))
        return found

    lifecycle.step = recording
    params = [
        SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, max_tokens=TOKENS, seed=i, detokenize=False)
        for i in range(len(prompts))
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    texts = {int(o.request_id): [*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs}
    first = min(texts)
    positions = []
    for internal_id, start, draft in drafts:
        request = int(internal_id.split("-")[0])
        text = texts[request]
        for depth, token in enumerate(draft):
            at = start + depth
            if at >= len(text):
                break
            positions.append((request - first, at, token))
            if text[at] != token:
                break
    return [texts[r] for r in sorted(texts)], positions


def score(hits: np.ndarray, probs: np.ndarray) -> float:
    """How many standard deviations the number of hits is from its expectation."""
    return float((hits - probs).sum() / np.sqrt((probs * (1 - probs)).sum()))


@pytest.fixture(scope="module")
def sampled(tiny):
    rng = np.random.default_rng(0)
    # Few distinct prompts, so that earlier samples are worth drafting from.
    prompts = [rng.integers(0, VOCAB, 8).tolist() for _ in range(8)] * (REQUESTS // 8)
    with engine(
        tiny,
        RETRIEVAL | {"num_speculative_tokens": 4},
        additional_config={"specplug": {"retrieval": {"min_prob": 0.02}}},
        skip_tokenizer_init=True,
        max_num_seqs=128,
        max_model_len=256,
    ) as llm:
        texts, positions = verified_positions(llm, prompts)
        assert lifecycle_of(llm).counters.errors == 0
    request, at, draft = (np.array(c) for c in zip(*positions, strict=True))
    tokens = np.array(texts)
    p = target_distributions(tiny, texts)[request, at - 1]
    return {"y": tokens[request, at], "draft": draft, "p": p}


def draft_score(y, draft, p) -> float:
    return score(y == draft, p[np.arange(len(y)), draft])


def test_enough_was_verified_to_see_a_two_percent_bias(sampled):
    y, draft, p = sampled["y"], sampled["draft"], sampled["p"]
    assert len(y) > 20_000
    assert 0.1 < (y == draft).mean() < 0.9
    # The same data with the draft wrongly accepted 2 times in 100 must fail, or the test below says nothing.
    rng = np.random.default_rng(1)
    biased = np.where(rng.random(len(y)) < 0.02, draft, y)
    assert draft_score(biased, draft, p) > BOUND
    # And so must the same data with the draft wrongly rejected 2 times in 100.
    other = np.where(p.argmax(1) == draft, np.argsort(p, 1)[:, -2], p.argmax(1))
    rejected = (y == draft) & (rng.random(len(y)) < 0.02 / (y == draft).mean())
    assert draft_score(np.where(rejected, other, y), draft, p) < -BOUND


def test_drafts_are_accepted_with_the_targets_probability(sampled):
    assert abs(draft_score(sampled["y"], sampled["draft"], sampled["p"])) < BOUND


def test_nothing_outside_the_nucleus_is_emitted(sampled):
    chosen = sampled["p"][np.arange(len(sampled["y"])), sampled["y"]]
    # Float noise can move a token across the edge of the nucleus; a bias would move far more.
    assert (chosen == 0).mean() < 1e-3


@pytest.mark.parametrize("rank", range(4))
def test_rejected_drafts_are_replaced_by_the_rest_of_the_distribution(sampled, rank):
    """Given that the draft was rejected, the other tokens keep their relative probabilities."""
    y, draft, p = (sampled[k][sampled["y"] != sampled["draft"]] for k in ("y", "draft", "p"))
    rest = p.copy()
    rest[np.arange(len(y)), draft] = 0.0
    mass = rest.sum(1)
    keep = mass > 1e-9
    y, rest = y[keep], rest[keep] / mass[keep, None]
    token = np.argsort(-rest, axis=1)[:, rank]
    share = rest[np.arange(len(y)), token]
    assert abs(score(y == token, share)) < BOUND
