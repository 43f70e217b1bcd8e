"""A proposer of another package in a real server: found by its entry point, and harmless when it fails.

The model is a small one with random weights: what is tested is the way from an HTTP request to the proposer's
exception and back, and the scheduling around it, not text.
"""

from __future__ import annotations

import concurrent.futures
import random

import pytest
from server import Server, save_tiny_model, third_party_path

pytestmark = pytest.mark.engine

#: How each fault shows in the log: the method that is named there. ``bad_forest`` is found in propose.
FAULTS = {
    "add_request": "add_request",
    "observe": "observe",
    "propose": "propose",
    "bad_forest": "propose",
    "remove_request": "remove_request",
}
#: KV cache blocks: too few for all requests of the preemption test at once.
BLOCKS = 24


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("third_party")
    model = save_tiny_model(folder / "model")
    args = [
        "--spec-model=vllm_specplug.Faulty",
        "--spec-tokens=4",
        "--enforce-eager",
        "--dtype=float32",
        "--max-model-len=1024",
        "--max-num-seqs=16",
        # Long prompts come in several chunks.
        "--max-num-batched-tokens=256",
        f"--num-gpu-blocks-override={BLOCKS}",
    ]
    config = {"specplug": {"faulty": {"match": 1}}}
    with Server(model, folder / "vllm.log", args, config, {"PYTHONPATH": third_party_path()}) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


def words(seed, count):
    """A prompt of random words that repeat themselves, so that there is something to draft from."""
    draw = random.Random(seed)
    return [draw.randrange(3, 40) for _ in range(count)]


def complete(client, prompt, fail_in=None, max_tokens=40):
    extra = {"return_token_ids": True}
    if fail_in:
        extra["vllm_xargs"] = {"fail_in": fail_in}
    answer = client.completions.create(
        model="model", prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body=extra
    )
    return answer.choices[0].model_dump()["token_ids"]


def together(client, jobs):
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda job: complete(client, **job), jobs))


def test_drafts_without_faults(server, client):
    accepted = server.accepted()
    assert len(complete(client, words(0, 60))) == 40
    assert server.accepted() > accepted
    assert server.trouble() == []


def test_no_fault_stops_or_changes_anything(server, client):
    """Faulty and sound requests in one batch; each is answered with the tokens it gets alone and undisturbed."""
    prompts = [words(seed, 30 + seed) for seed in range(16)]
    alone = [complete(client, prompt) for prompt in prompts]
    faults = list(FAULTS)
    jobs = [
        # Every other request is sound.
        {"prompt": prompt, "fail_in": faults[i // 2 % len(faults)] if i % 2 else None}
        for i, prompt in enumerate(prompts)
    ]
    for _ in range(2):
        drafted = server.drafted()
        assert together(client, jobs) == alone
        assert server.drafted() > drafted, "the sound requests lost their drafts"
    server.wait_idle()


@pytest.mark.parametrize("fault", [f for f in FAULTS if f != "remove_request"])
def test_a_failing_request_is_not_drafted_for(server, client, fault):
    """Once a method has failed on a request there are no drafts for it; in its first steps there may be some."""
    drafted = server.drafted()
    prompt = [7, 8, 9] * 20
    sound = complete(client, prompt)
    with_drafts = server.drafted() - drafted
    assert complete(client, prompt, fault) == sound
    failing = server.drafted() - drafted - with_drafts
    assert with_drafts > 8
    assert failing <= 4, "drafts of more than one step"


def test_each_failing_method_is_logged_once_with_its_traceback(server):
    text = server.text()
    for method in set(FAULTS.values()):
        assert text.count(f"failed in {method};") == 1
    for fault in ("add_request", "observe", "remove_request"):
        assert text.count(f"Deliberate: asked to fail in {fault}") == 1
    # Nothing else went wrong.
    assert text.count("Traceback (most recent call last)") == len(set(FAULTS.values()))


def test_preempted_requests_go_on_as_if_nothing_had_happened(server, client):
    """More requests than the KV cache holds: the engine preempts and resumes them, drafting all the while."""
    prompts = [words(100 + seed, 150 + 40 * (seed % 3)) for seed in range(12)]
    alone = [complete(client, prompt, max_tokens=600) for prompt in prompts]
    preempted, accepted = server.metric("vllm:num_preemptions_total"), server.accepted()
    # One HTTP request, so that all twelve really start together.
    answer = client.completions.create(
        model="model", prompt=prompts, max_tokens=600, temperature=0, extra_body={"return_token_ids": True}
    )
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    assert [choice.model_dump()["token_ids"] for choice in choices] == alone
    assert server.metric("vllm:num_preemptions_total") > preempted, "nothing was preempted"
    assert server.accepted() > accepted
    server.wait_idle()


def test_the_server_lives(server, client):
    """Last in the file: ends the server."""
    accepted = server.accepted()
    assert len(complete(client, words(0, 60))) == 40
    assert server.accepted() > accepted
    code, left = server.terminate()
    assert (code, left) == (0, [])
