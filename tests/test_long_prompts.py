"""The long prompts of benchmarks: their size, kinds, and that they are the same every time."""

from __future__ import annotations

import json
import sys

import pytest
from engines import MODEL, REPOSITORY

from vllm_specplug.ab import workloads

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import long_prompts

pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="needs the embedded model's tokenizer (make models)")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return long_prompts.long_prompts(tokenizer, 12, 2048)


def test_prompts_have_their_size_and_kinds_by_turns(prompts, tokenizer):
    assert [len(p["prompt_token_ids"]) for p in prompts] == [2048] * 12
    assert [p["task"] for p in prompts] == ["summarise", "qa", "code"] * 4
    for prompt in prompts:
        text = tokenizer.decode(prompt["prompt_token_ids"])
        assert text.startswith("<|im_start|>system") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert text.count("<|im_start|>") == 3, "nothing in the text is taken for a turn"
        assert "Here is a long text." in text and "This is the end of the text." in text


def test_every_kind_goes_through_all_its_sources(prompts):
    sources = {kind: {p["source"] for p in prompts if p["task"] == kind} for kind in long_prompts.KINDS}
    assert "python-reference" in sources["summarise"] & sources["qa"]
    assert {"python-library", "torch"} <= sources["code"]


def test_the_same_seed_gives_the_same_prompts_and_another_one_others(prompts, tokenizer):
    again, other = (long_prompts.long_prompts(tokenizer, 12, 2048, seed) for seed in (0, 1))
    assert again == prompts
    assert not any(p in prompts for p in other)


def test_no_two_prompts_share_a_part_of_a_text(prompts):
    spans = [set(zip(*(p["prompt_token_ids"][i + 100 : 1900 + i] for i in range(48)), strict=True)) for p in prompts]
    for place, span in enumerate(spans):
        for other in spans[:place]:
            # Licences at the top of files, and rows of dashes, are in many texts.
            assert len(span & other) < 0.1 * len(span)


def test_a_question_is_about_its_text(prompts, tokenizer):
    asked = 0
    for prompt in (p for p in prompts if p["task"] == "qa"):
        text, _, task = tokenizer.decode(prompt["prompt_token_ids"]).partition("This is the end of the text.")
        quoted = task.split('"')[1]
        assert quoted in " ".join(text.split())
        asked += 1
    assert asked == 4


def test_what_cannot_be_had_is_said(tokenizer):
    with pytest.raises(ValueError, match="tokens = 60 is not allowed"):
        long_prompts.long_prompts(tokenizer, 1, 60)
    with pytest.raises(ValueError, match="count = 100000: this machine has text for"):
        long_prompts.long_prompts(tokenizer, 100000, 60000)


def test_the_command_writes_a_workload(tmp_path, monkeypatch, capsys):
    bench = tmp_path / "question.jsonl"
    row = {"question_id": 1, "category": "rag", "turns": ["A passage of some words.\n\n" * 2000]}
    bench.write_text(json.dumps(row) + "\n")
    out = tmp_path / "long.jsonl"
    arguments = ["--model", str(MODEL), "--tokens", "1024", "--count", "12", "--spec-bench", str(bench)]
    monkeypatch.setattr(sys, "argv", ["long_prompts.py", *arguments, "--out", str(out)])
    long_prompts.main()
    assert "12 prompts of 1024 tokens" in capsys.readouterr().out
    found = workloads.read(out)
    assert [len(r.prompt) for r in found] == [1024] * 12 and {r.task for r in found} == set(long_prompts.KINDS)
    assert any(json.loads(line)["source"] == "spec-bench" for line in out.read_text().splitlines())
