"""A real ``vllm serve`` process with the plugin, driven as its users drive it: over HTTP by the openai client.

One server for the whole file, in float32, where greedy output must not depend on what was drafted. Many tests send
the same request twice: the first time mostly the model's own pace, the second time drafted from the first output.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json

import jsonschema
import openai
import pytest
from server import MODEL, Server, serve_flags
from vllm_specplug.proposers import saved_state

from vllm_specplug.cli import main

pytestmark = pytest.mark.engine

PER_REQUEST = "--per-request-spec-decode-metrics"

SPEC_TOKENS = 8
MAX_MODEL_LEN = 2048

STORY = "Write a short story about a lighthouse keeper and a lost ship."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    args = [
        "--spec-model=vllm_specplug.Retrieval",
        f"--spec-tokens={SPEC_TOKENS}",
        "--enforce-eager",
        "--dtype=float32",
        f"--max-model-len={MAX_MODEL_LEN}",
    ]
    if PER_REQUEST in serve_flags():
        args.append(f"{PER_REQUEST}=summary")
    folder = tmp_path_factory.mktemp("server")
    config = {
        "specplug": {
            "retrieval": {"min_prob": 0.1, "store_bytes": 4 << 20},
            "state_file": str(folder / "learned.npz"),
            "save_every_s": 0.0,
        }
    }
    with Server(MODEL, folder / "vllm.log", args, config) as running:
        running.state_file = folder / "learned.npz"
        yield running


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


@contextlib.contextmanager
def drafting(server):
    """Checks that draft tokens were both verified and accepted meanwhile."""
    drafted, accepted = server.drafted(), server.accepted()
    yield
    assert server.drafted() > drafted, "no draft was verified"
    assert server.accepted() > accepted, "no draft was accepted"


def chat(client, content, **settings):
    defaults = {"model": "model", "temperature": 0, "max_tokens": 48}
    return client.chat.completions.create(messages=[{"role": "user", "content": content}], **(defaults | settings))


def complete(client, prompt, **settings):
    return client.completions.create(
        **({"model": "model", "prompt": prompt, "temperature": 0, "max_tokens": 48} | settings)
    )


def test_chat(client):
    answer = chat(client, "What is the capital of France? Answer in one short sentence.")
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert 0 < answer.usage.completion_tokens < 48


def test_completion(client, server):
    prompt = "one two three four five. one two three four five. one two three"
    with drafting(server):
        answer = complete(client, prompt, max_tokens=20, extra_body={"ignore_eos": True})
    assert answer.choices[0].text.startswith(" four five.")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 20


def test_streamed_chat_says_the_same(client, server):
    whole = chat(client, STORY)
    with drafting(server):
        chunks = list(chat(client, STORY, stream=True, stream_options={"include_usage": True}))
    deltas = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(deltas) == whole.choices[0].message.content
    assert sum(map(bool, deltas)) > 1, "nothing was streamed"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 48


def test_streamed_completion_says_the_same(client, server):
    prompt = "The three laws of motion are"
    whole = complete(client, prompt)
    with drafting(server):
        chunks = list(complete(client, prompt, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_two_samples(client):
    answer = chat(client, STORY, n=2, temperature=0.9, seed=11)
    assert sorted(c.index for c in answer.choices) == [0, 1]
    texts = [c.message.content for c in answer.choices]
    assert all(texts) and texts[0] != texts[1]
    assert answer.usage.completion_tokens == 96


@pytest.mark.parametrize("include", [False, True], ids=["cut", "included"])
def test_stop_string_inside_a_draft(client, server, include):
    whole = chat(client, STORY).choices[0].message.content
    stop = whole[60:66]  # six characters of running text: seldom whole tokens
    end = whole.index(stop) + (len(stop) if include else 0)
    with drafting(server):
        answer = chat(client, STORY, stop=[stop, "\x00 never"], extra_body={"include_stop_str_in_output": include})
    assert answer.choices[0].message.content == whole[:end]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == stop


def test_completion_logprobs(client, server):
    """Rows of a verified draft report the same log-probabilities as rows decoded one by one."""
    prompt = "Water boils at a temperature of"
    first = complete(client, prompt, logprobs=5)
    with drafting(server):
        second = complete(client, prompt, logprobs=5)
    for answer in (first, second):
        got = answer.choices[0].logprobs
        assert len(got.tokens) == len(got.token_logprobs) == len(got.top_logprobs) == 48
        assert "".join(got.tokens) == answer.choices[0].text
        for token, logprob, top in zip(got.tokens, got.token_logprobs, got.top_logprobs, strict=True):
            assert logprob <= 0
            assert top[token] == logprob == max(top.values())
    assert second.choices[0].logprobs.tokens == first.choices[0].logprobs.tokens
    assert second.choices[0].logprobs.token_logprobs == pytest.approx(
        first.choices[0].logprobs.token_logprobs, abs=1e-3
    )


def test_chat_logprobs(client, server):
    chat(client, STORY)
    with drafting(server):
        got = chat(client, STORY, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(got) == 48
    for place in got:
        assert place.top_logprobs[0].token == place.token
        assert place.logprob == max(t.logprob for t in place.top_logprobs)


def test_json_schema(client, server):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Za-z]{1,12}$"},
            "species": {"enum": ["dog", "cat", "parrot"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 20},
        },
        "required": ["name", "species", "age"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema, "strict": True}}
    question = "Describe a pet as JSON with its name, species and age."
    texts = []
    for _ in range(2):
        answer = chat(client, question, response_format=wanted, max_tokens=80)
        assert answer.choices[0].finish_reason == "stop"
        texts.append(answer.choices[0].message.content)
        jsonschema.validate(json.loads(texts[-1]), schema)
    with drafting(server):
        texts.append(chat(client, question, response_format=wanted, max_tokens=80).choices[0].message.content)
    assert len(set(texts)) == 1


def test_penalties(client, server):
    plain = chat(client, STORY).choices[0].message.content
    penal = {"presence_penalty": 1.2, "frequency_penalty": 0.8, "extra_body": {"repetition_penalty": 1.1}}
    first = chat(client, STORY, **penal).choices[0].message.content
    with drafting(server):
        second = chat(client, STORY, **penal).choices[0].message.content
    assert first != plain, "the penalties changed nothing"
    assert second == first


def test_sampling_that_vllm_refuses_under_speculation(client, server):
    """min_p and logit_bias: vLLM answers 400 where any speculation is on; here they act, on drafted tokens too."""
    plain = chat(client, STORY).choices[0].message.content
    with drafting(server):
        sampled = chat(client, STORY, temperature=1.5, extra_body={"min_p": 1.0})
    assert sampled.choices[0].message.content == plain  # nothing but the likeliest token is left
    comma = 28
    with drafting(server):
        biased = chat(client, STORY, logit_bias={str(comma): 100.0})
    assert biased.choices[0].message.content == "," * 48


def test_client_that_goes_away(client, server):
    server.wait_idle()
    generated = server.metric("vllm:generation_tokens_total")
    stream = complete(client, STORY, max_tokens=1900, stream=True, temperature=1.0, extra_body={"ignore_eos": True})
    for _ in range(4):
        next(stream)
    stream.close()
    server.wait_idle()
    # Not because it was through already.
    assert 0 < server.metric("vllm:generation_tokens_total") - generated < 1000
    assert chat(client, "Say hello.").choices[0].message.content


def test_32_requests_at_once(client, server):
    questions = [f"Tell me {'one fact' * (1 + i % 3)} about the number {i}." for i in range(32)]
    # Greedy and sampled, short and long, in one batch.
    settings = [{"temperature": 0.0 if i % 2 else 0.9, "seed": i, "max_tokens": 8 + i % 25} for i in range(32)]
    with drafting(server), concurrent.futures.ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda q, s: chat(client, q, **s), questions, settings))
    for answer, wanted in zip(answers, settings, strict=True):
        assert answer.choices[0].message.content
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert 0 < answer.usage.completion_tokens <= wanted["max_tokens"]
    server.wait_idle()
    # In float32 a greedy answer is the same in company and alone.
    for i in (1, 15, 31):
        assert (
            chat(client, questions[i], **settings[i]).choices[0].message.content
            == answers[i].choices[0].message.content
        )


def test_metrics(client, server):
    names = {
        "drafts": "vllm:spec_decode_num_drafts_total",
        "drafted": "vllm:spec_decode_num_draft_tokens_total",
        "accepted": "vllm:spec_decode_num_accepted_tokens_total",
        "per_position": "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    }
    before = {key: server.metric(name) for key, name in names.items()}
    answer = complete(client, "a b c d e f g h a b c d e f g h a b c d e f g h a b c", max_tokens=32)
    moved = {key: server.metric(name) - before[key] for key, name in names.items()}
    assert 0 < moved["drafts"] <= 31
    assert moved["drafts"] < moved["drafted"] <= SPEC_TOKENS * moved["drafts"]
    assert 0 < moved["accepted"] <= moved["drafted"]
    assert moved["per_position"] == moved["accepted"]
    if PER_REQUEST in serve_flags():
        own = answer.model_dump()["metrics"]["speculative_decoding"]
        assert own["num_draft_tokens"] == moved["drafted"]
        assert own["num_accepted_draft_tokens"] == moved["accepted"]


def test_own_metrics_beside_the_servers(client, server, capsys):
    with drafting(server):
        chat(client, "Count from one to thirty in words.")
        chat(client, "Count from one to thirty in words.")
    server.wait_idle()  # a snapshot is written when the last request has ended
    assert main.main(["stats", "--json", "--requests", "--url", server.url]) == 0
    document = json.loads(capsys.readouterr().out)
    [engine] = document["engines"]
    assert engine["labels"]["proposer"] == "retrieval"
    depths = [counts for source in engine["sources"].values() for counts in source.values()]
    counted = {name: sum(counts[name] for counts in depths) for name in ("verified", "accepted")}
    # vLLM does not count the step in which a request was aborted.
    assert 0 <= counted["verified"] - server.drafted() <= 4 * SPEC_TOKENS
    # vLLM cuts the tokens of a step that ends a request before it counts.
    assert 0 <= counted["accepted"] - server.accepted() < counted["accepted"] / 2
    assert any(request["accepted"] > 5 for request in document["requests"])


def test_a_request_without_drafts(client, server, capsys):
    """The per-request switch needs no option of the server's."""
    prompt = "Monday, Tuesday, Wednesday, Thursday, Friday. Monday, Tuesday, Wednesday,"
    with drafting(server):
        whole = complete(client, prompt, extra_body={"vllm_xargs": {"specplug": "default"}})
    server.wait_idle()
    drafted = server.drafted()
    plain = complete(client, prompt, extra_body={"vllm_xargs": {"specplug": "off"}})
    assert plain.choices[0].text == whole.choices[0].text
    server.wait_idle()
    assert server.drafted() == drafted
    assert main.main(["stats", "--json", "--url", server.url]) == 0
    [engine] = json.loads(capsys.readouterr().out)["engines"]
    off, own = engine["arms"]["off"], engine["arms"]["retrieval"]
    assert (off["requests"], off["emitted_tokens"], off["drafted_tokens"]) == (1, plain.usage.completion_tokens, 0)
    assert own["requests"] > 1 and own["decode_tokens"] > own["decode_steps"] > 0


@pytest.mark.parametrize("named", ["auto", "", 7, ["off"]])
def test_an_arm_that_is_not_held_is_refused(client, named):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, STORY, extra_body={"vllm_xargs": {"specplug": named}})
    assert "expected one of default, off, retrieval" in str(caught.value)


def test_tenants_share_no_text(client, server):
    """The second time a tenant sends a prompt, the first output is drafted; another tenant gets nothing of it."""
    prompt = "The minutes of our village council, as taken down on the fourth of May:"

    def accepted(tenant):
        before = server.accepted()
        answer = complete(client, prompt, max_tokens=32, extra_body={"vllm_xargs": {"specplug_tenant": tenant}})
        return server.accepted() - before, answer.choices[0].text

    first, text = accepted("a")
    again, same = accepted("a")
    other, too = accepted("b")
    print(f"accepted: {first}, again {again}, other tenant {other}")
    assert text == same == too
    assert again >= first + 10, "tenant a did not profit from its own earlier output"
    # Not exactly equal: how far to trust a match is learned from all requests.
    assert abs(other - first) <= 3, "tenant b profited from tenant a's output"


def test_context_filled_to_the_brim(client, server):
    """Drafts near the end of the context must not run over it."""
    prompt = [100 + i % 50 for i in range(MAX_MODEL_LEN - 128)]
    with drafting(server):
        answer = complete(client, prompt, max_tokens=128, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == MAX_MODEL_LEN


def test_no_limit_given(client, server):
    with drafting(server):
        answer = chat(client, "word " * 1900, max_tokens=None, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == MAX_MODEL_LEN


def test_shutdown(server):
    """Last in the file: ends the server. All requests above are behind it, and none may have left an error."""
    server.wait_idle()
    assert server.trouble() == []
    before = len(server.text())
    code, left = server.terminate()
    assert code == 0, f"exit code {code}\n{server.tail()}"
    assert left == [], "processes outlived the server"
    # Not "no error": vLLM 0.28 itself logs one when its engine process ends before its front process.
    assert "specplug" not in server.text()[before:]
    about, state = saved_state.read(server.state_file)
    assert about["identity"]["proposer"] == "retrieval"
    assert sum(array.size for array in state.values()) > 1000
    assert server.state_file.stat().st_mode & 0o077 == 0
