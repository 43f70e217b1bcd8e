"""Verification without an engine: vLLM's own sampler and batch over a made-up target, so that thousands of random trees
are decoded in seconds and compared, token by token, with decoding one token at a time.

The target is a table: logits that depend on the whole context. The requests of a batch differ in every sampling
parameter that vLLM has.
"""

from __future__ import annotations

import inspect
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm_specplug.kernels import tree_walk

from vllm_specplug.host import compat, eligibility, sampling_params, verification

VOCAB = 12
STOP = 7


def target(context: list[int]) -> torch.Tensor:
    """``float32[VOCAB]`` the next token's logits."""
    draw = np.random.default_rng(zlib.crc32(np.array(context, np.int32).tobytes()))
    return torch.from_numpy(draw.normal(0.0, 2.0, VOCAB).astype(np.float32))


# Batches.


def params_of(kind: str) -> list:
    """Sampling parameters of a batch's requests."""
    from vllm import SamplingParams

    def greedy(**kw):
        return SamplingParams(temperature=0.0, max_tokens=1000, **kw)

    def sampled(seed, **kw):
        return SamplingParams(**({"temperature": 0.8, "max_tokens": 1000} | kw), seed=seed)

    def banned(params, words):
        params._bad_words_token_ids = words
        return params

    batches = {
        "argmax": [greedy() for _ in range(5)],
        "greedy": [
            greedy(),
            greedy(repetition_penalty=1.4),
            greedy(presence_penalty=0.7, frequency_penalty=0.6),
            banned(greedy(), [[3], [1, 2], [5, 5, 6]]),
            greedy(logit_bias={2: 2.5, 4: -3.0}),
            greedy(allowed_token_ids=[0, 2, 3, 5, 8]),
            greedy(min_tokens=25, stop_token_ids=[STOP, 1]),
            greedy(min_tokens=3, stop_token_ids=[STOP]),
        ],
        "seeded": [
            sampled(1),
            sampled(2, top_p=0.7),
            sampled(3, top_k=4),
            sampled(4, min_p=0.15),
            sampled(5, top_p=0.9, top_k=6, min_p=0.02, temperature=1.3),
            sampled(6, repetition_penalty=1.3, min_tokens=20, stop_token_ids=[STOP]),
            sampled(7, logit_bias={1: 3.0, STOP: -50.0}),
            banned(sampled(8, frequency_penalty=0.9), [[2, 3], [4]]),
            sampled(9, allowed_token_ids=[1, 2, 9, 10]),
        ],
        "seeded without processors": [sampled(1), sampled(2, top_k=5), sampled(3, temperature=1.5)],
        "logprobs": [greedy(logprobs=3), greedy(), greedy(logprobs=1, presence_penalty=0.5), sampled(4, logprobs=5)],
        "named logprobs": [greedy(logprob_token_ids=[1, 5]), greedy(), greedy(logprob_token_ids=[2, 3, 9])],
    }
    # One parameter at a time: what only it needs.
    batches |= {f"greedy {i}": [p, greedy()] for i, p in enumerate(batches["greedy"])}
    batches["greedy logprobs"] = [greedy(logprobs=2), greedy()]
    batches["all"] = batches["greedy"] + batches["seeded"] + batches["logprobs"]
    return batches[kind]


class Server:
    """The part of vLLM's model runner that samples, for a batch of requests."""

    def __init__(self, params: list, logprobs_mode: str = "raw_logprobs", reasoning=None) -> None:
        from vllm.v1.sample import logits_processor
        from vllm.v1.sample.sampler import Sampler
        from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

        config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=32))
        settings = {
            "max_num_reqs": 32,
            "max_model_len": 512,
            "max_num_batched_tokens": 64,
            "device": torch.device("cpu"),
            "vocab_size": VOCAB,
            "block_sizes": [16],
            "kernel_block_sizes": [16],
            "max_num_blocks_per_req": [32],
            "num_spec_tokens": 16,
            "reasoning_config": reasoning,
            "logitsprocs": logits_processor.LogitsProcessors(
                make(config, torch.device("cpu"), False) for make in logits_processor.BUILTIN_LOGITS_PROCESSORS
            ),
        }
        known = inspect.signature(InputBatch).parameters
        self.input_batch = InputBatch(**{k: v for k, v in settings.items() if k in known})
        self.sampler = Sampler(logprobs_mode)
        self.requests = [
            CachedRequestState(
                req_id=str(i),
                prompt_token_ids=[(3 * i + j) % VOCAB for j in range(4)],
                mm_features=[],
                sampling_params=p,
                generator=None if p.seed is None else torch.Generator().manual_seed(p.seed),
                block_ids=([0],),
                num_computed_tokens=0,
                output_token_ids=[],
            )
            for i, p in enumerate(params)
        ]
        for request in self.requests:
            self.input_batch.add_request(request)
        self.logprobs: list[list[tuple]] = [[] for _ in params]

    def text(self, i: int) -> list[int]:
        return self.requests[i].prompt_token_ids + self.requests[i].output_token_ids

    def outputs(self, length: int) -> list[list[int]]:
        return [r.output_token_ids[:length] for r in self.requests]

    def take(self, tokens: list[list[int]], logprobs) -> None:
        """What the runner's bookkeeping does."""
        for i, (request, emitted) in enumerate(zip(self.requests, tokens, strict=True)):
            request.output_token_ids += emitted
            if logprobs is not None:
                ids, values, ranks, _ = logprobs.slice_request(i, len(emitted))
                self.logprobs[i] += zip(ids.tolist(), values.tolist(), ranks.tolist(), strict=True)

    def step(self) -> None:
        """One token for every request."""
        self.input_batch.refresh_metadata()
        logits = torch.stack([target(self.text(i)) for i in range(len(self.requests))])
        output = self.sampler(logits=logits, sampling_metadata=self.input_batch.sampling_metadata)
        logprobs = None if output.logprobs_tensors is None else output.logprobs_tensors.tolists()
        self.take(output.sampled_token_ids.tolist(), logprobs)

    def speculate(self, trees: list[tuple[list[int], list[int]]], parents: bool = True) -> verification.Verified:
        """Verify a draft ``(tokens, parents)`` of every request; with ``parents`` False they are said to be chains."""
        from vllm.v1.sample.rejection_sampler import RejectionSampler
        from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

        self.input_batch.refresh_metadata()
        logits, rows = [], []
        for i, (tokens, above) in enumerate(trees):
            texts = [self.text(i)]
            for token, parent in zip(tokens, above, strict=True):
                texts.append([*texts[parent + 1], token])
            logits += [target(t) for t in texts]
            rows += [-1] + [p + 1 for p in above]
        metadata = SpecDecodeMetadata.make_dummy([tokens for tokens, _ in trees], torch.device("cpu"))
        verification.sample_plainly(self.input_batch.sampling_metadata)
        verified = verification.verify(
            self, torch.stack(logits), metadata, np.array(rows, np.int32) if parents else None
        )
        tokens, logprobs = RejectionSampler.parse_output(
            verified.output.sampled_token_ids, VOCAB, logprobs_tensors=verified.output.logprobs_tensors
        )
        assert [len(t) for t in tokens] == verified.lengths.tolist()
        self.check_paths(verified, trees, tokens)
        self.take(tokens, logprobs)
        return verified

    @staticmethod
    def check_paths(verified, trees, emitted) -> None:
        """Each path starts at row 0 and goes down the tree by the emitted tokens."""
        for i, (tokens, parents) in enumerate(trees):
            path = verified.paths[i, : len(emitted[i])].tolist()
            assert path[0] == 0
            assert (verified.paths[i, len(emitted[i]) :] == -1).all()
            for k in range(1, len(path)):
                assert tokens[path[k] - 1] == emitted[i][k - 1]
                assert parents[path[k] - 1] + 1 == path[k - 1]


def random_tree(draw, size: int, branching: float) -> tuple[list[int], list[int]]:
    """Tokens and parents of a tree of up to ``size`` nodes whose siblings differ."""
    tokens: list[int] = []
    parents: list[int] = []
    seen = set()
    for j in range(size):
        parent = int(draw.integers(-1, j)) if j and draw.random() < branching else j - 1
        token = int(draw.integers(VOCAB))
        if (parent, token) in seen:
            break
        seen.add((parent, token))
        tokens.append(token)
        parents.append(parent)
    return tokens, parents


def plainly(kind: str, length: int, **settings) -> Server:
    server = Server(params_of(kind), **settings)
    for _ in range(length):
        server.step()
    return server


def close(ours: list[tuple], theirs: list[tuple]) -> bool:
    """Equal logprob rows; what is beyond a row's own entries is not looked at."""
    for (ids, values, rank), (want_ids, want_values, want_rank) in zip(ours, theirs, strict=False):
        n = min(len(values), len(want_values))
        kept = np.isfinite(want_values[:n])
        if rank != want_rank or not np.array_equal(np.array(ids[:n])[kept], np.array(want_ids[:n])[kept]):
            return False
        if not np.allclose(np.array(values[:n])[kept], np.array(want_values[:n])[kept], atol=1e-5):
            return False
    return True


def mixes(kind: str) -> bool:
    """vLLM 0.28's CPU sampler ignores seeds where not every request of the batch has one."""
    return kind in ("all", "logprobs") and str(compat.vllm_version()).startswith("0.28")


LENGTH = 30


@pytest.mark.parametrize("branching", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(
    "kind",
    ["argmax", "greedy", "seeded", "seeded without processors", "logprobs", "named logprobs", "all"]
    + [f"greedy {i}" for i in range(8)]
    + ["greedy logprobs"],
)
def test_decoding_with_trees_equals_decoding_without(kind, branching):
    if mixes(kind):
        pytest.skip("vLLM's own CPU sampler does not honour seeds here")
    want = plainly(kind, LENGTH + 16)
    accepted = 0
    for seed in range(4):
        draw = np.random.default_rng(seed)
        server = Server(params_of(kind))
        while min(len(o) for o in server.outputs(LENGTH)) < LENGTH:
            trees = [random_tree(draw, int(draw.integers(0, 17)), branching) for _ in server.requests]
            for i, (tokens, parents) in enumerate(trees):
                # Random tokens are rarely right: put a right path in, that wanders over the branches.
                truth = want.outputs(LENGTH + 16)[i][len(server.requests[i].output_token_ids) :]
                row, depth = -1, 0
                while depth < len(truth) and draw.random() < 0.8:
                    children = [j for j, p in enumerate(parents) if p == row]
                    if not children:
                        break
                    right = [j for j in children if tokens[j] == truth[depth]]
                    row = right[0] if right else int(draw.choice(children))
                    tokens[row] = truth[depth]
                    depth += 1
            if not any(tokens for tokens, _ in trees):
                continue
            accepted += int((server.speculate(trees).lengths - 1).sum())
        assert server.outputs(LENGTH) == want.outputs(LENGTH)
        for ours, theirs, p in zip(server.logprobs, want.logprobs, params_of(kind), strict=True):
            if p.num_logprobs is not None:
                assert len(ours) >= LENGTH
                assert close(ours[:LENGTH], theirs[:LENGTH])
    assert accepted > 20 * len(want.requests)


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logprobs", "processed_logits"])
def test_logprobs_modes(mode):
    if mixes("logprobs"):
        pytest.skip("vLLM's own CPU sampler does not honour seeds here")
    want = plainly("logprobs", LENGTH, logprobs_mode=mode)
    server = Server(params_of("logprobs"), logprobs_mode=mode)
    truths = want.outputs(LENGTH)
    while min(len(o) for o in server.outputs(LENGTH)) < LENGTH - 8:
        starts = [len(r.output_token_ids) for r in server.requests]
        server.speculate([(truths[i][n : n + 5], list(range(-1, len(truths[i][n : n + 5]) - 1)))
                          for i, n in enumerate(starts)])  # fmt: skip
    assert server.outputs(LENGTH - 8) == want.outputs(LENGTH - 8)
    for i in (0, 2, 3):
        assert close(server.logprobs[i][: LENGTH - 8], want.logprobs[i][: LENGTH - 8])


@pytest.mark.parametrize("kind", ["argmax", "greedy"])
def test_chains_need_no_parents(kind):
    draw = np.random.default_rng(0)
    one, other = Server(params_of(kind)), Server(params_of(kind))
    truths = plainly(kind, 60).outputs(60)
    for _ in range(8):
        trees = []
        for i, request in enumerate(one.requests):
            tokens = truths[i][len(request.output_token_ids) :][: int(draw.integers(1, 6))]
            tokens[-1] = int(draw.integers(VOCAB))
            trees.append((tokens, list(range(-1, len(tokens) - 1))))
        one.speculate(trees, parents=True)
        other.speculate(trees, parents=False)
    assert one.outputs(100) == other.outputs(100)
    assert min(map(len, one.outputs(100))) > 10


def test_half_precision_logits_are_the_samplers_argmax():
    """The first of several likeliest tokens, as float32's argmax takes it; more rows than are converted at once."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(100, 500, generator=draw).to(torch.bfloat16)
    logits[:, [40, 90, 333]] = 9.0
    server = Server(params_of("argmax")[:1])
    server.input_batch.refresh_metadata()
    metadata = SimpleNamespace(num_draft_tokens=[99], draft_token_ids=torch.full((99,), 40, dtype=torch.int32))
    verified = verification.verify(server, logits, metadata, None)
    assert verified.output.sampled_token_ids.tolist() == [[40] * 100]
    assert verified.output.sampled_token_ids.dtype == torch.int32


def test_unseeded_samples_follow_the_targets_distribution():
    """Two tokens at once, from trees that hold the likely ones: 16,000 pairs against their exact probabilities."""
    from vllm import SamplingParams

    requests, rounds = 32, 500
    server = Server([SamplingParams(temperature=0.9, top_k=8, max_tokens=5) for _ in range(requests)])
    for request in server.requests:
        request.prompt_token_ids = [1, 2, 3]

    def distribution(text: list[int]) -> np.ndarray:
        logits = target(text).double() / 0.9
        logits[logits < logits.topk(8).values[-1]] = -np.inf
        return torch.softmax(logits, -1).numpy()

    first = distribution([1, 2, 3])
    likely = np.argsort(-first)[:4].tolist()
    tree = ([*likely, *(int(np.argmax(distribution([1, 2, 3, t]))) for t in likely)], [-1] * 4 + [0, 1, 2, 3])
    torch.manual_seed(0)
    counts = np.zeros((VOCAB, VOCAB))
    alone = np.zeros(VOCAB)
    for _ in range(rounds):
        verified = server.speculate([tree] * requests)
        for request, length in zip(server.requests, verified.lengths.tolist(), strict=True):
            alone[request.output_token_ids[0]] += 1
            if length > 1:
                counts[tuple(request.output_token_ids[:2])] += 1
            request.output_token_ids.clear()
    total = alone.sum()

    def score(hits, p):
        return abs(hits - total * p) / np.sqrt(total * p * (1 - p))

    assert max(score(alone[t], first[t]) for t in range(VOCAB) if first[t] > 0) < 4.5
    assert alone[first == 0].sum() == 0
    # A biased verification would be seen: one that takes a drafted token in 2 of 100 draws it should not.
    assert score(alone[likely].sum() + 0.02 * total, first[likely].sum()) > 4.5
    for t in likely:
        second = distribution([1, 2, 3, t])
        for u in range(VOCAB):
            if second[u] > 0:
                assert score(counts[t, u], first[t] * second[u]) < 4.5


def test_walk_equals_the_simple_walk():
    draw = np.random.default_rng(0)
    for _ in range(300):
        trees = [random_tree(draw, int(draw.integers(0, 30)), draw.random()) for _ in range(int(draw.integers(1, 6)))]
        sizes = np.array([len(t) for t, _ in trees], np.int32)
        parents = np.array([p for _, above in trees for p in [-1, *(a + 1 for a in above)]], np.int32)
        drafts = np.array([t for tokens, _ in trees for t in tokens], np.int32)
        drawn = draw.integers(0, VOCAB, len(parents))
        shape = (len(trees), int(sizes.max()) + 1)
        tokens, paths, lengths = np.empty(shape, np.int32), np.empty(shape, np.int32), np.empty(len(trees), np.int32)
        tree_walk.walk(sizes, parents, drafts, drawn, tokens, paths, lengths)
        first = 0
        for i, (own, above) in enumerate(trees):
            row, emitted, path = 0, [], []
            while True:
                emitted.append(int(drawn[first + row]))
                path.append(row)
                found = [
                    j + 1 for j, (t, p) in enumerate(zip(own, above, strict=True)) if (p + 1, t) == (row, emitted[-1])
                ]
                if not found:
                    break
                (row,) = found
            rest = [-1] * (shape[1] - len(emitted))
            assert (lengths[i], tokens[i].tolist(), paths[i].tolist()) == (len(emitted), emitted + rest, path + rest)
            first += len(own) + 1


# What is not verified on trees.


def test_an_unknown_logits_processor_gets_one_token_per_step():
    """Where vLLM holds a processor that the plugin knows nothing of, only the step's first token is sure."""

    class Foreign:
        def is_argmax_invariant(self):
            return False

        def update_state(self, update):
            pass

        def apply(self, logits):
            return logits

    server = Server(params_of("argmax"))
    server.input_batch.logitsprocs.non_argmax_invariant.append(Foreign())
    want = plainly("argmax", 3).outputs(3)
    verified = server.speculate([(w[:2], [-1, 0]) for w in want])
    assert verified.lengths.tolist() == [1] * len(want)
    assert server.outputs(5) == [w[:1] for w in want]


def test_a_thinking_budget_holds_beside_requests_with_drafts():
    from vllm import SamplingParams

    reasoning = SimpleNamespace(reasoning_start_token_ids=[0], reasoning_end_token_ids=[10, 11])

    def params():
        plain = [SamplingParams(temperature=0.0, presence_penalty=0.1, max_tokens=99) for _ in range(4)]
        plain[2] = SamplingParams(temperature=0.0, thinking_token_budget=6, max_tokens=99)
        return plain

    want = Server(params(), reasoning=reasoning)
    server = Server(params(), reasoning=reasoning)
    for s in (want, server):
        s.requests[2].prompt_token_ids[-1] = 0  # it thinks
        s.input_batch.thinking_budget_state_holder._state.clear()
        s.input_batch.refresh_metadata()
        from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

        assert isinstance(s.input_batch.thinking_budget_state_holder, ThinkingBudgetStateHolder)
        s.input_batch.thinking_budget_state_holder._state[2] = (
            s.input_batch.thinking_budget_state_holder._init_state_entry(s.requests[2].prompt_token_ids, 6)
        )
    want.input_batch.thinking_budget_state_holder.in_spec_mode = False
    for _ in range(20):
        want.step()
    assert 10 in want.outputs(8)[2], "the budget was not enforced"
    truths = want.outputs(20)
    accepted = 0
    while min(len(o) for o in server.outputs(20)) < 12:
        trees = []
        for i, request in enumerate(server.requests):
            n = len(request.output_token_ids)
            tokens = [] if i == 2 else truths[i][n : n + 2]
            trees.append((tokens, list(range(-1, len(tokens) - 1))))
        if not any(t for t, _ in trees):
            break
        accepted += int((server.speculate(trees).lengths - 1).sum())
    assert accepted > 10
    got = server.outputs(20)
    assert len(got[2]) >= 7
    assert [g == w[: len(g)] for g, w in zip(got, truths, strict=True)] == [True] * 4


def test_limits():
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    assert eligibility.limits_for(SamplingParams(min_p=0.2, logit_bias={1: 2.0}, min_tokens=3, logprobs=2)) == (
        "tree",
        "",
    )
    schema = StructuredOutputsParams(json={"type": "object"})
    assert eligibility.limits_for(SamplingParams(structured_outputs=schema)) == ("chain", "structured_outputs")
    budget = SamplingParams(thinking_token_budget=5, structured_outputs=schema)
    assert eligibility.limits_for(budget) == ("none", "thinking_token_budget")


def test_every_field_of_the_sampling_metadata_is_known():
    """A field that a later vLLM adds must be looked at: is it per request, and does it depend on earlier tokens?"""
    from vllm.v1.sample.metadata import SamplingMetadata

    fields = set(SamplingMetadata.__dataclass_fields__)
    assert fields == {
        *("temperature", "all_greedy", "all_random", "top_p", "top_k", "generators", "max_num_logprobs"),
        *("no_penalties", "prompt_token_ids", "frequency_penalties", "presence_penalties", "repetition_penalties"),
        *("output_token_ids", "allowed_token_ids_mask", "bad_words_token_ids", "logitsprocs", "logprob_token_ids"),
        *("spec_token_ids", "thinking_budget_state_holder"),
    }


# min_p and logit_bias.


def test_min_p_and_logit_bias_pass_for_our_proposers_only():
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    ours = SimpleNamespace(model="vllm_specplug.Retrieval", enable_adaptive_verification=False)
    ngram = SimpleNamespace(model="ngram", enable_adaptive_verification=False)
    asked = SamplingParams(min_p=0.1, logit_bias={1: 1.0})
    try:
        sampling_params.install_front()
        asked._validate_spec_decode(ours)
        assert (asked.min_p, asked.logit_bias) == (0.1, {1: 1.0})
        with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
            asked._validate_spec_decode(ngram)
    finally:
        sampling_params.uninstall()
    with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
        asked._validate_spec_decode(ours)
