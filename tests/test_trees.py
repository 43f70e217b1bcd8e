"""Draft trees in the real engine in float32: the same tokens as without speculation, whatever is drafted, and in every
odd situation. Shapes are random, and the right path wanders over the branches (see tree_proposers.py)."""

from __future__ import annotations

import pytest
import tree_proposers
from engines import MODEL, encode, engine, lifecycle_of, make_tiny_llama, metric, runner_of
from prompts import chat_prompts
from tree_proposers import generate

from vllm_specplug.host import chain_attention

pytestmark = pytest.mark.engine

VOCAB = 3000


@pytest.fixture(scope="module", autouse=True)
def _registered():
    tree_proposers.register()


def trees_of(llm):
    return runner_of(llm).drafter.trees


def assert_sound(llm):
    """Nothing failed, and every request's state is gone or accounted for."""
    counters = lifecycle_of(llm).counters
    assert (counters.errors, counters.requests_without_drafts, counters.resynchronised) == (0, 0, 0)
    assert trees_of(llm).reason == ""


# The real model.


@pytest.fixture(scope="module")
def outputs(prompts):
    with engine(MODEL) as llm:
        return generate(llm, prompts[:16], 48)


@pytest.mark.parametrize("nodes", [4, 16, 60])
def test_real_model(prompts, outputs, nodes):
    """Budgets, at 8 requests and at one."""
    with engine(MODEL, tree_proposers.speculative(nodes)) as llm:
        assert generate(llm, prompts[:16], 48, outputs) == outputs
        assert generate(llm, prompts[:3], 48, outputs, concurrency=1) == outputs[:3]
        assert generate(llm, prompts[:8], 24) == [o[:24] for o in outputs[:8]]  # nothing right in the trees
        assert_sound(llm)
        counters = trees_of(llm).counters
        assert counters.tree_steps > 30
        assert counters.tree_nodes_accepted > 100
        assert counters.rows_moved > 20
        assert counters.tree_nodes_verified <= lifecycle_of(llm).counters.drafted_in_trees


# A tiny model, for the odd situations.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "model", VOCAB)


def words(seed, count):
    import random

    draw = random.Random(seed)
    return {"prompt_token_ids": [draw.randrange(VOCAB) for _ in range(count)]}


#: Lengths around the block size of 128, so that trees cross block boundaries, and long ones for chunked prefill.
LENGTHS = (20, 100, 110, 118, 122, 125, 126, 127, 128, 240, 250, 300)


@pytest.fixture(scope="module")
def short():
    return [words(i, n) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def plain(tiny, short):
    """Outputs without speculation: of the short prompts, 160 tokens each (past two block boundaries)."""
    with engine(tiny, skip_tokenizer_init=True) as llm:
        return generate(llm, short, 160)


SETTINGS = {"skip_tokenizer_init": True}


@pytest.fixture(scope="module")
def shared(tiny, plain):
    """The engine of the tests that need nothing particular."""
    with engine(tiny, tree_proposers.speculative(24), **SETTINGS) as llm:
        yield llm


@pytest.mark.parametrize("concurrency", [8, 1])
def test_block_boundaries(shared, short, plain, concurrency):
    before = trees_of(shared).counters.rows_moved
    assert generate(shared, short, 160, plain, concurrency) == plain
    assert_sound(shared)
    assert trees_of(shared).counters.rows_moved > before + 200


def test_prefix_cache_hits_on_blocks_that_held_trees(shared, short, plain):
    """A prompt that is an earlier request's prompt and output: its whole blocks come from the cache, with K/V that was
    written by trees, and moved."""
    generate(shared, short, 160, plain)
    before = metric(shared, "vllm:prefix_cache_hits")
    cut = 140
    longer = [{"prompt_token_ids": p["prompt_token_ids"] + o[:cut]} for p, o in zip(short, plain, strict=True)]
    rest = [o[cut:] for o in plain]
    assert generate(shared, longer, 160 - cut, rest) == rest
    assert metric(shared, "vllm:prefix_cache_hits") >= before + 128 * len(short)
    assert_sound(shared)


def test_chains_plain_and_trees_in_one_batch(shared, short, plain):
    """Requests that may draft nothing, only chains (penalties), and trees side by side."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=2 if i % 4 == 3 else 100,
            ignore_eos=True,
            extra_args={"seed": i, "truth": plain[i]},
        )
        for i in range(len(short))
    ]
    got = [list(o.outputs[0].token_ids) for o in shared.generate(short, params, use_tqdm=False)]
    assert got == [o[: p.max_tokens] for o, p in zip(plain, params, strict=True)]
    assert_sound(shared)


@pytest.mark.parametrize("how", tree_proposers.BROKEN)
def test_broken_trees_cost_drafts_only(shared, short, plain, how):
    counters = lifecycle_of(shared).counters
    errors, off = counters.errors, counters.requests_without_drafts
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=60,
            ignore_eos=True,
            extra_args={"seed": i, "truth": plain[i], "broken": how if i % 2 else ""},
        )
        for i in range(8)
    ]
    got = [list(o.outputs[0].token_ids) for o in shared.generate(short[:8], params, use_tqdm=False)]
    assert got == [o[:60] for o in plain[:8]]
    assert counters.errors > errors
    assert off < counters.requests_without_drafts <= off + 4
    counters.errors = counters.requests_without_drafts = 0  # the engine is shared


def test_tight_engine(tiny, short, plain):
    """Prefill in chunks among trees, drafts cut by the token budget, few KV blocks: preemption between draft and
    verification."""
    settings = {"max_num_batched_tokens": 48, "max_num_seqs": 6, "num_gpu_blocks_override": 9, "max_model_len": 512}
    with engine(tiny, tree_proposers.speculative(24), **SETTINGS, **settings) as llm:
        assert generate(llm, short, 160, plain) == plain
        assert metric(llm, "vllm:num_preemptions") > 0
        assert_sound(llm)
        counters = trees_of(llm).counters
        assert 0 < counters.tree_nodes_verified < lifecycle_of(llm).counters.drafted_in_trees  # some were cut
        assert counters.rows_moved > 100


def test_long_contexts_through_the_own_kernel(tiny, short, plain, monkeypatch):
    """Chains, trees, rows without drafts and chunks of prompts side by side, some short, some long."""
    monkeypatch.setattr(chain_attention, "LONG", 125)
    own = {"additional_config": {"specplug": {"attention": "own"}}, "max_num_batched_tokens": 64}
    with engine(tiny, tree_proposers.speculative(6), **SETTINGS, **own) as llm:
        counters = trees_of(llm).counters
        assert generate(llm, short, 160, plain) == plain
        taken = counters.long_contexts_attended
        assert taken > counters.trees_verified
        assert generate(llm, short, 160) == plain  # nothing right is drafted
        assert counters.long_contexts_attended > taken
        assert_sound(llm)


def test_end_of_the_context(tiny, short, plain):
    """Requests run into max_model_len with trees in hand."""
    bound = 256
    with engine(tiny, tree_proposers.speculative(60), **SETTINGS, max_model_len=bound) as llm:
        fits = [i for i, n in enumerate(LENGTHS) if n < bound]
        got = generate(llm, [short[i] for i in fits], 160, [plain[i] for i in fits])
        assert got == [plain[i][: min(160, bound - LENGTHS[i])] for i in fits]
        assert_sound(llm)


def make_other_model(path, kind):
    """Tiny models with random weights whose attention is not the plain one."""
    import torch
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        MistralConfig,
        MistralForCausalLM,
    )

    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "sliding_window": 40,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    mixed = ["sliding_attention", "full_attention", "sliding_attention"]
    model = {
        "window": lambda: MistralForCausalLM(MistralConfig(**sizes)),
        "window and full": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**sizes, layer_types=mixed)),
        "soft cap": lambda: Gemma2ForCausalLM(Gemma2Config(**sizes, layer_types=mixed)),
    }[kind]()
    if kind == "window":
        with torch.no_grad():
            model.lm_head.weight.normal_(0.0, 0.3)  # Gemma's is its embedding, which would repeat the input then
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["window", "window and full", "soft cap"])
def test_other_attention(tmp_path, short, kind):
    """Sliding windows shorter than the text, alone and beside layers without (two KV cache groups); a soft cap, which
    the tree kernel does not know: chains, and the reason is told."""
    model = make_other_model(tmp_path / "model", kind)
    with engine(model, **SETTINGS) as llm:
        want = generate(llm, short, 100)
    assert len({tuple(w) for w in want}) == len(short) and sum(len(set(w)) for w in want) > 5 * len(short)
    with engine(model, tree_proposers.speculative(24), **SETTINGS) as llm:
        assert generate(llm, short, 100, want) == want
        counters = lifecycle_of(llm).counters
        assert counters.accepted > 200
        if kind == "soft cap":
            assert trees_of(llm).reason.endswith("uses a soft cap")
            assert counters.requests_with_chains_only == counters.requests == len(short)
            assert (counters.errors, trees_of(llm).counters.tree_steps) == (0, 0)
        else:
            assert_sound(llm)
            assert trees_of(llm).counters.rows_moved > 100


def test_compiled(tiny, short, plain):
    with engine(tiny, tree_proposers.speculative(16), **SETTINGS, enforce_eager=False) as llm:
        assert generate(llm, short, 100, plain) == [o[:100] for o in plain]
        assert_sound(llm)
        assert trees_of(llm).counters.rows_moved > 50


def test_engines_without_the_plugin_keep_vllms_attention(tiny, shared, short, plain):
    from vllm.v1.attention.backends import cpu_attn

    with engine(tiny, **SETTINGS) as llm:
        layers = runner_of(llm).compilation_config.static_forward_context.values()
        assert {type(layer.impl) for layer in layers} == {cpu_attn.CPUAttentionBackendImpl}
        assert generate(llm, short[:2], 8) == [o[:8] for o in plain[:2]]


@pytest.fixture(scope="module")
def many():
    """200 prompts and their outputs without speculation, 96 tokens each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    class Holder:
        def get_tokenizer(self):
            return tokenizer

    texts = chat_prompts(96)
    texts += [f"{text} Answer briefly." for text in texts] + [f"Well: {text}" for text in texts[:8]]
    prompts = encode(Holder(), texts)
    with engine(MODEL, max_num_seqs=16) as llm:
        return prompts, generate(llm, prompts, 96)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [4, 16, 60])
@pytest.mark.parametrize("concurrency", [16, 8, 1])
def test_real_model_in_full(many, nodes, concurrency):
    prompts, want = many
    with engine(MODEL, tree_proposers.speculative(nodes), max_num_seqs=concurrency) as llm:
        got = generate(llm, prompts, 96, want)
        assert [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b] == []
        assert_sound(llm)
        counters = trees_of(llm).counters
        assert counters.rows_moved > 1000
        assert counters.tree_nodes_accepted > 3000
