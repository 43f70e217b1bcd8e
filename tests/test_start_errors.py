"""What a user gets wrong on the command line ends at once, with one clear message and no traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time

import pytest
from server import MODEL, environment, vllm_command

#: Fails if an engine is built: every case must be over before that.
DRIVER = textwrap.dedent(
    """
    import contextlib, io, json, os, sys, traceback

    cases = json.load(sys.stdin)
    import vllm.v1.engine.core_client, vllm.v1.engine.async_llm
    from vllm.entrypoints.cli.main import main

    def engine_started(*args, **kwargs):
        raise AssertionError("an engine was started")

    vllm.v1.engine.core_client.MPClient.__init__ = engine_started
    vllm.v1.engine.async_llm.AsyncLLM.__init__ = engine_started
    results = []
    for arguments, variables in cases:
        os.environ.update(variables)
        sys.argv = ["vllm", "serve", *arguments]
        errors, code = io.StringIO(), 0
        with contextlib.redirect_stderr(errors):
            try:
                main()
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
                code = "raised"
        results.append([code, errors.getvalue()])
        for name in variables:
            del os.environ[name]
    print("RESULTS " + json.dumps(results))
    """
)

RETRIEVAL = ["--spec-model", "vllm_specplug.Retrieval"]
SELECTED = [*RETRIEVAL, "--spec-tokens", "8"]
SPARSE = ["--spec-model", "vllm_specplug.SparseVerify", "--spec-tokens", "8"]


def options(section):
    return ["--additional-config", json.dumps({"specplug": section})]


#: Passes every check, so it must get as far as starting an engine: shows that DRIVER would notice.
CONTROL = [*SELECTED, *options({"enabled": True, "retrieval": {"min_prob": 0.5}})]

#: name: (arguments, environment variables, parts of the message)
CASES = {
    "unknown proposer": (
        ["--spec-model", "vllm_specplug.Retreival", "--spec-tokens", "8"],
        {},
        ["vllm_specplug.Retreival", "Did you mean 'Retrieval'?"],
    ),
    "unknown proposer in JSON": (
        ["--speculative-config", '{"model": "vllm_specplug.retrieval", "num_speculative_tokens": 8}'],
        {},
        ["vllm_specplug.retrieval", "Did you mean 'Retrieval'?"],
    ),
    "unit that does not fit the blocks": (
        [*SPARSE, "--block-size", "128", *options({"sparse_verify": {"unit": 48}})],
        {},
        ["specplug.sparse_verify.unit = 48", "multiple of 16 that divides the KV block size, 128"],
    ),
    "calibration that is not there": (
        [*SPARSE, *options({"sparse_verify": {"calibration": "nowhere.json"}})],
        {},
        ["specplug.sparse_verify.calibration", "nowhere.json", "specplug sparse calibrate MODEL"],
    ),
    "calibration that is none": (
        [*SPARSE, *options({"sparse_verify": {"calibration": __file__}})],
        {},
        ["specplug.sparse_verify.calibration", "expected a file written by"],
    ),
    "refresh beside another scheduler": (
        [*SPARSE, "--scheduler-cls", "other.Scheduler", *options({"sparse_verify": {"refresh": 8}})],
        {},
        ["specplug.sparse_verify.refresh", "--scheduler-cls other.Scheduler"],
    ),
    "scorer that is none": (
        [*SPARSE, *options({"sparse_verify": {"scorer": "halfwya"}})],
        {},
        ["specplug.sparse_verify.scorer", "Did you mean 'halfway'?"],
    ),
    "no proposer named": (
        ["--spec-model", "vllm_specplug", "--spec-tokens", "8"],
        {},
        ["unknown proposer", "Available:", "vllm_specplug.Retrieval"],
    ),
    "unknown section": (
        [*SELECTED, *options({"retreival": {}})],
        {},
        ["unknown option specplug.retreival", "Did you mean 'retrieval'?"],
    ),
    "unknown option": (
        [*SELECTED, *options({"retrieval": {"store_byte": 5}})],
        {},
        ["unknown option specplug.retrieval.store_byte", "Did you mean 'store_bytes'?"],
    ),
    "wrong type": (
        [*SELECTED, *options({"retrieval": {"store_bytes": "many"}})],
        {},
        ["specplug.retrieval.store_bytes = 'many' is not allowed", "a whole number of at least"],
    ),
    "wrong type of a general option": (
        [*SELECTED, *options({"enabled": "yes"})],
        {},
        ["specplug.enabled = 'yes' is not allowed", "true or false"],
    ),
    "out of range": (
        [*SELECTED, *options({"retrieval": {"min_prob": 1.5}})],
        {},
        ["specplug.retrieval.min_prob = 1.5 is not allowed", "a number from 0.0 to 1.0"],
    ),
    "section is a list": (
        [*SELECTED, *options([1, 2])],
        {},
        ["specplug = [1, 2] is not allowed", "a JSON object"],
    ),
    "inner section is a list": (
        [*SELECTED, *options({"retrieval": [1]})],
        {},
        ["specplug.retrieval = [1] is not allowed", "a JSON object"],
    ),
    "option although nothing is selected": (
        options({"retrieval": {"min_prob": -1}}),
        {},
        ["specplug.retrieval.min_prob = -1"],
    ),
    "no draft length": (RETRIEVAL, {}, ["--spec-tokens", "is required", "1 to 128"]),
    "draft length 0": ([*RETRIEVAL, "--spec-tokens", "0"], {}, ["--spec-tokens", "= 0 is not allowed", "1 to 128"]),
    "draft length 500": ([*RETRIEVAL, "--spec-tokens", "500"], {}, ["--spec-tokens", "= 500 is not allowed"]),
    "draft length in JSON is no number": (
        ["--speculative-config", '{"model": "vllm_specplug.Retrieval", "num_speculative_tokens": "8"}'],
        {},
        ["= '8' is not allowed", "1 to 128"],
    ),
    "older flag, draft length 0": (
        ["--speculative-model", "vllm_specplug.Retrieval", "--num-speculative-tokens", "0"],
        {},
        ["= 0 is not allowed", "1 to 128"],
    ),
    "acceptance made up": (
        [
            "--speculative-config",
            '{"model": "vllm_specplug.Retrieval", "num_speculative_tokens": 8, "rejection_sample_method": "synthetic", '
            '"synthetic_acceptance_length": 3}',
        ],
        {},
        ["rejection_sample_method = 'synthetic' is not allowed"],
    ),
    "unknown arm": (
        [*SELECTED, *options({"ab": {"arms": ["token_recylcing"]}})],
        {},
        ["specplug.ab.arms = ['token_recylcing'] is not allowed", "Did you mean 'token_recycling'?"],
    ),
    "split that does not add up": (
        [*SELECTED, *options({"ab": {"split": {"retrieval": 0.9, "off": 0.2}}})],
        {},
        ["specplug.ab.split", "add up to 1, these make 1.1"],
    ),
    "split to an arm that is not held": (
        [*SELECTED, *options({"ab": {"split": {"auto": 0.9, "off": 0.1}}})],
        {},
        ["specplug.ab.split", "expected names out of default, off, retrieval", "specplug.ab.arms says"],
    ),
    "split where ranks name requests differently": (
        [
            *[*SELECTED, "--distributed-executor-backend", "external_launcher"],
            *options({"ab": {"split": {"retrieval": 0.9, "off": 0.1}}}),
        ],
        {},
        ["specplug.ab.split is not allowed", "external_launcher"],
    ),
    "unknown variable": (SELECTED, {"SPECPLUG_ENABLE": "1"}, ["SPECPLUG_ENABLE", "Did you mean 'SPECPLUG_ENABLED'?"]),
    "variable of the wrong type": (SELECTED, {"SPECPLUG_ENABLED": "maybe"}, ["SPECPLUG_ENABLED = 'maybe'"]),
}


@pytest.fixture(scope="module")
def outcomes():
    """Every case through vLLM's own ``main``, in one process that has paid for the imports once."""
    cases = [[args, variables] for args, variables, _ in CASES.values()] + [[CONTROL, {}]]
    cases = [[[str(MODEL), "--enforce-eager", *args], variables] for args, variables in cases]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    found = re.search(r"RESULTS (\[.*\])$", done.stdout, re.MULTILINE)
    assert found, f"{done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return dict(zip([*CASES, "control"], json.loads(found[1]), strict=True))


def own_message(stderr):
    """The plugin's one line; asserts that it is one."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if "vllm-specplug: error:" in line]
    assert len(lines) == 1, stderr
    return lines[0]


@pytest.mark.engine
@pytest.mark.parametrize("case", CASES)
def test_message(outcomes, case):
    code, stderr = outcomes[case]
    assert code == 2
    message = own_message(stderr)
    for part in CASES[case][2]:
        assert part in message


@pytest.mark.engine
def test_good_arguments_get_past_the_checks(outcomes):
    code, stderr = outcomes["control"]
    assert code == "raised"
    assert "AssertionError: an engine was started" in stderr
    assert "vllm-specplug: error:" not in stderr


@pytest.mark.engine
def test_the_real_command():
    """One case through the command itself: exit code, nothing but the message after vLLM's banner, no engine."""
    started = time.monotonic()
    done = subprocess.run(
        [*vllm_command(), str(MODEL), "--spec-model=vllm_specplug.Retreival", "--spec-tokens=8"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=240,
    )
    seconds = time.monotonic() - started
    assert done.returncode == 2
    assert "Did you mean 'Retrieval'?" in own_message(done.stderr)
    assert "Traceback" not in done.stdout
    assert "EngineCore" not in done.stdout + done.stderr, "an engine process was started"
    print(f"{seconds:.1f} s")


def parsed(*arguments):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args([f"--model={MODEL}", "--enforce-eager", *arguments]))


SPELLINGS = {
    "current": ["--spec-model=vllm_specplug.Retrieval", "--spec-tokens=7"],
    "older": ["--speculative-model=vllm_specplug.Retrieval", "--num-speculative-tokens=7"],
    "older, apart": ["--speculative-model", "vllm_specplug.Retrieval", "--num-speculative-tokens", "7"],
    "mixed": ["--speculative-model=vllm_specplug.Retrieval", "--spec-tokens=7"],
    "underscores": ["--speculative_model=vllm_specplug.Retrieval", "--num_speculative_tokens=7"],
    "JSON": ['--speculative-config={"model": "vllm_specplug.Retrieval", "num_speculative_tokens": 7}'],
    "JSON with method": [
        '--speculative-config={"method": "custom_class", "model": "vllm_specplug.Retrieval", '
        '"num_speculative_tokens": 7}'
    ],
    "dotted JSON": [
        "--speculative-config.model=vllm_specplug.Retrieval",
        "--speculative-config.num_speculative_tokens=7",
    ],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_start_the_same_thing(spelling, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = parsed(*SPELLINGS[spelling]).create_engine_config().speculative_config
    assert config.method == "custom_class"
    assert config.num_speculative_tokens == 7
    # Where vLLM keeps the class's name once it has read the configuration differs between versions.
    assert "vllm_specplug.Retrieval" in [value for value in vars(config).values() if isinstance(value, str)]


def test_both_spellings_of_one_flag_last_wins():
    args = parsed("--spec-model=other.Class", "--speculative-model=vllm_specplug.Retrieval", "--spec-tokens=7")
    assert args.spec_model == "vllm_specplug.Retrieval"


def test_flags_are_vllm_s_own_defaults_when_absent():
    args = parsed()
    assert (args.spec_model, args.spec_tokens, args.speculative_config) == (None, None, None)


@pytest.mark.engine
def test_a_server_that_selects_nothing_runs_vllm_s_own_code():
    """In a process of its own, since this one may have built a proposer in another test."""
    code = textwrap.dedent(
        """
        import sys
        from vllm.engine.arg_utils import EngineArgs
        from vllm.plugins import load_general_plugins
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        load_general_plugins()
        from vllm_specplug.host import patching

        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        EngineArgs.from_cli_args(parser.parse_args(["--model", sys.argv[1]])).create_engine_config()
        assert patching.is_wrapped(EngineArgs, "create_engine_config"), "the plugin was not loaded"
        wrapped = [name for name in vars(GPUModelRunner) if patching.is_wrapped(GPUModelRunner, name)]
        assert not wrapped, wrapped
        loaded = [name for name in sys.modules if name.startswith("vllm_specplug.proposers.")]
        assert not loaded, loaded
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(MODEL)], capture_output=True, text=True, env=environment(), timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_driver_environment_is_clean():
    """A SPECPLUG_ variable of whoever runs the tests must not decide them."""
    os.environ["SPECPLUG_TEST_ONLY"] = "1"
    try:
        assert "SPECPLUG_TEST_ONLY" not in environment()
    finally:
        del os.environ["SPECPLUG_TEST_ONLY"]
