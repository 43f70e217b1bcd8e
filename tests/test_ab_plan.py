"""What ``specplug ab`` is asked: arms, options, YAML files and workloads, and what is said of wrong ones."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest

from vllm_specplug.ab import plan, workloads
from vllm_specplug.ab.plan import UsageError
from vllm_specplug.ab.results import Load
from vllm_specplug.cli import main


def test_a_preset_is_an_arm_by_its_name():
    arm = plan.parse_arm("auto")
    assert (arm.name, arm.url) == ("auto", "")
    assert arm.flags == ["--spec-model=vllm_specplug.Auto", "--spec-tokens=16"]


def test_every_registered_proposer_is_a_preset():
    assert {"none", "ngram", "suffix", "retrieval", "token-recycling", "adaptive-length", "auto"} <= set(plan.presets())
    inner = plan.presets()["adaptive-ngram"][-1].removeprefix("--additional-config=")
    assert json.loads(inner) == {"specplug": {"adaptive_length": {"inner": "vllm:ngram"}}}


def test_flags_are_split_as_a_shell_does():
    arm = plan.parse_arm('mine=--speculative-config \'{"method": "ngram"}\' --max-num-seqs 4')
    assert arm.name == "mine"
    assert arm.flags == ["--speculative-config", '{"method": "ngram"}', "--max-num-seqs", "4"]


def test_further_flags_follow_a_preset():
    arm = plan.parse_arm("auto8=auto --spec-tokens 8")
    assert arm.flags == [*plan.presets()["auto"], "--spec-tokens", "8"]


def test_a_server_that_runs_is_an_arm_by_its_url():
    arm = plan.parse_arm("there=http://10.0.0.1:8000/v1/")
    assert (arm.url, arm.flags) == ("http://10.0.0.1:8000", [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("autoo", "Did you mean 'auto'"),
        ("x=autoo --a", "no preset autoo"),
        ("--spec-tokens=4", "NAME=FLAGS"),
        ("bad name=--a", "NAME is up to 40"),
        ("x=--port 1", "--port is not allowed"),
        ("x=--host=::", "--host is not allowed"),
        ("x='--a", "cannot be split"),
        ("x=http://h:1 --a", "nothing else"),
    ],
)
def test_what_is_no_arm_is_refused_in_one_line(text, said):
    with pytest.raises(UsageError) as error:
        plan.parse_arm(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_suffix_is_left_out_of_the_default_without_its_package(monkeypatch):
    monkeypatch.setattr(plan.environment, "has_module", lambda name: False)
    arms, notes = plan.default_arms()
    assert [arm.name for arm in arms] == ["none", "ngram", "auto"]
    assert "arctic-inference" in notes[0]
    monkeypatch.setattr(plan.environment, "has_module", lambda name: True)
    arms, notes = plan.default_arms()
    assert [arm.name for arm in arms] == ["none", "ngram", "suffix", "auto"]
    assert notes == []


def test_defaults():
    settings, _ = plan.build({})
    assert settings.loads == (Load(concurrency=1), Load(concurrency=8))
    assert settings.arms[0].name == "none"
    assert settings.starts_servers


def test_rates_replace_concurrency():
    settings, _ = plan.build({"rate": "0.5,2"})
    assert settings.loads == (Load(rate=0.5), Load(rate=2.0))
    with pytest.raises(UsageError, match="exclude each other"):
        plan.build({"rate": "1", "concurrency": "1"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"concurrency": "0"}, "--concurrency = 0 is not allowed: expected a whole number from 1 to 4096."),
        ({"concurrency": "1,1"}, "different numbers"),
        ({"concurrency": "1.5"}, "a whole number"),
        ({"concurrency": ""}, "--concurrency"),
        ({"rate": "nan"}, "--rate = nan is not allowed"),
        ({"rate": "-1"}, "--rate = -1"),
        ({"requests": "many"}, "--requests = many is not allowed"),
        ({"temperature": "3"}, "from 0 to 2"),
        ({"output_tokens": "0"}, "--output-tokens = 0"),
        ({"api": "grpc"}, "expected one of chat, completions"),
        ({"port": "80"}, "--port = 80"),
        ({"port": "65535"}, "ports from there"),
        ({"serve_args": "eager"}, "begin with a dash"),
        ({"serve_args": "--port=1"}, "--port is not allowed"),
        ({"arms": ["none", "NONE=--a"]}, "two arms are called none"),
        ({"keep_servers": True, "together": False}, "exclude"),
    ],
)
def test_wrong_options_are_refused_in_one_line(given, said):
    with pytest.raises(UsageError) as error:
        plan.build(given)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_file_has_arms_and_options_and_the_command_line_wins(tmp_path):
    config = tmp_path / "ab.yaml"
    config.write_text(
        "model: m\n"
        "arms:\n"
        "  none:\n"
        "  big: auto --spec-tokens 32\n"
        "  list: [--max-num-seqs, 4]\n"
        "  there: http://127.0.0.1:9\n"
        "concurrency: [1, 4]\n"
        "output-tokens: 20\n"
        "temperature: 0.5\n"
        "together: false\n"
    )
    settings, _ = plan.build({"output_tokens": "30", "seed": None}, config)
    assert [arm.name for arm in settings.arms] == ["none", "big", "list", "there"]
    assert settings.arms[0].flags == []
    assert settings.arms[2].flags == ["--max-num-seqs", "4"]
    assert settings.arms[3].url == "http://127.0.0.1:9"
    assert settings.loads == (Load(concurrency=1), Load(concurrency=4))
    assert (settings.output_tokens, settings.temperature, settings.together) == (30, 0.5, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("repeat: 3\n", "unknown key repeat. Did you mean 'repeats'?"),
        ("repeats: yes\n", "ab.yaml: repeats = True is not allowed"),
        ("arms: {x: {}}\n", "ab.yaml: arms.x"),
        ("arms: {mine: }\n", "for no flags write none"),
        ("arms: 3\n", "expected a mapping"),
        ("- a\n", "expected a mapping"),
        ("a: [\n", "line 2: not YAML"),
        ("ignore-eos: 1\n", "expected true or false"),
    ],
)
def test_a_wrong_config_file_is_refused_in_one_line(tmp_path, text, said):
    config = tmp_path / "ab.yaml"
    config.write_text(text)
    with pytest.raises(UsageError) as error:
        plan.build({}, config)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none\.yaml cannot be read: No such file"):
        plan.build({}, tmp_path / "none.yaml")


# Workloads


def test_the_bundled_workload():
    requests = workloads.read(None)
    assert [r.index for r in requests] == list(range(len(requests)))
    assert {"chat", "summarise", "code", "maths", "retrieval"} == {r.task for r in requests}


def test_spec_bench(tmp_path):
    file = tmp_path / "question.jsonl"
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["first", "second"]},
        {"question_id": 300, "category": "translation", "turns": ["translate"]},
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert [(r.task, r.prompt) for r in workloads.read(file)] == [
        ("conversation", "first"),
        ("translation", "translate"),
    ]


def test_sharegpt(tmp_path):
    file = tmp_path / "share.json"
    said = [{"from": "system", "value": "be kind"}, {"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    empty = {"conversations": [{"from": "gpt", "value": "hi"}]}
    file.write_text(json.dumps([{"id": "a", "conversations": said}, empty]))
    assert [(r.task, r.prompt) for r in workloads.read(file)] == [("all", "hello")]


def test_json_lines_and_traces(tmp_path):
    plain = tmp_path / "plain.jsonl"
    # A line separator inside a string ends no line of the file.
    plain.write_text('{"prompt": "a\u2028b"}\n{"prompt": "c", "task": "qa"}\n', encoding="utf-8")
    assert [(r.task, r.prompt) for r in workloads.read(plain)] == [("all", "a\u2028b"), ("qa", "c")]
    trace = tmp_path / "trace.jsonl.gz"
    with gzip.open(trace, "wt") as file:
        file.write(json.dumps({"cat": "rag", "prompt": [1, 2, 3], "out": [4]}) + "\n")
    assert [(r.task, r.prompt) for r in workloads.read(trace)] == [("rag", [1, 2, 3])]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"{}\n", "line 1: no request"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2: not JSON"),
        ("a.jsonl", b'{"prompt": [1, true]}\n', "line 1: no request"),
        ("a.jsonl", b'{"prompt": [-1]}\n', "line 1: no request"),
        ("a.jsonl", b"\xff\xfe", "cannot be read"),
        ("a.jsonl", b"", "no request in it"),
        ("a.json", b"[1]", "entry 1: no request"),
        ("a.json", b"[", "not JSON"),
        ("a.jsonl.gz", b"plain", "cannot be read"),
    ],
)
def test_a_wrong_workload_is_refused_in_one_line(tmp_path, name, content, said):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UsageError) as error:
        workloads.read(file)
    assert said in str(error.value) and name in str(error.value)
    assert "\n" not in str(error.value)


def some(counts):
    tasks = [task for task, count in counts.items() for _ in range(count)]
    return [workloads.Request(i, task, f"prompt {i}") for i, task in enumerate(tasks)]


def test_a_sample_has_each_task_in_proportion_and_is_repeatable():
    requests = some({"a": 60, "b": 30, "c": 1})
    chosen = workloads.sample(requests, 10, seed=3)
    assert Counter(r.task for r in chosen) == {"a": 6, "b": 3, "c": 1}
    assert chosen == workloads.sample(requests, 10, seed=3)
    assert chosen != workloads.sample(requests, 10, seed=4)
    assert len({r.index for r in chosen}) == 10


def test_a_sample_spreads_each_task_over_the_whole():
    chosen = workloads.sample(some({"a": 40, "b": 20}), 60, seed=0)
    for begin in range(0, 60, 12):
        assert Counter(r.task for r in chosen[begin : begin + 12]) == {"a": 8, "b": 4}


def test_all_of_a_small_workload_are_taken_and_a_part_of_a_large_one():
    assert len(workloads.sample(some({"a": 5}), 0, seed=0)) == 5
    assert len(workloads.sample(some({"a": 500}), 0, seed=0)) == plan.MOST_REQUESTS
    with pytest.raises(UsageError, match="the workload has 5"):
        workloads.sample(some({"a": 5}), 6, seed=0)


@pytest.mark.parametrize("count", range(1, 12))
def test_shares_add_up(count):
    sizes = [5, 1, 1, 4]
    shares = workloads._shares(sizes, min(count, sum(sizes)))
    assert sum(shares) == min(count, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    assert count < len(sizes) or min(shares) >= 1


def test_blocks_hold_everything_once_and_are_not_too_small():
    requests = some({"a": 17})
    assert [len(block) for block in workloads.cut(requests, 8, 1)] == [2, 2, 2, 2, 2, 2, 2, 3]
    assert [len(block) for block in workloads.cut(requests, 8, 8)] == [8, 9]
    assert [len(block) for block in workloads.cut(requests, 8, 100)] == [17]
    assert [r for block in workloads.cut(requests, 5, 1) for r in block] == requests


# The command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arm", "autoo"], "there is no preset"),
        (["--requests", "18"], "the workload has 17"),
        (["--workload", "absent.jsonl"], "absent.jsonl cannot be read"),
        (["./absent", "--arm", "none"], "MODEL = ./absent: there is no such file or folder"),
        (["model", "another"], "one MODEL is expected"),
        (["report"], "name the folder"),
        (["report", "absent"], "no plan of a comparison"),
    ],
)
def test_the_command_refuses_in_one_line(monkeypatch, tmp_path, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main.main(["ab", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("all my work")
    assert main.main(["ab", "--arm", "none", "--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
