"""Fidelity of approximate arms: the arithmetic by hand and by brute force, whole runs on stand-ins whose distributions
are known, and one on real servers."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re

import ab_driver
import ab_runs
import fake_vllm
import numpy as np
import pytest
from ab_runs import Behaviour

from vllm_specplug.ab import fidelity, html, plan, plots, results, servers, summary, workloads
from vllm_specplug.ab.fidelity import compare, flipped, judge_arm, kl_from_below
from vllm_specplug.ab.results import Probe
from vllm_specplug.ab.verdict import judge
from vllm_specplug.cli import ab, main

#: KL of the stand-in's exact distribution from its approximate one where that is wrong; both give the rest 0.1 or less.
EXACT, WRONG = (0.7, 0.2, 0.05, 0.05), (0.3, 0.6, 0.05, 0.05)
KL_WRONG = sum(p * math.log(p / q) for p, q in zip(EXACT, WRONG, strict=True))


def logs(**chances):
    """Log-probabilities of tokens ``t1``, ``t2``, ..."""
    return {int(token[1:]): math.log(p) for token, p in chances.items()}


def probe(tokens, own, exact, index=0, task="a", arm="arm"):
    return Probe(arm, index, task, tokens, own, exact)


# Arithmetic


def test_kl_of_what_both_tell_and_the_rest_as_one():
    exact, own = logs(t1=0.5, t2=0.25, t3=0.05), logs(t1=0.25, t2=0.5, t4=0.1)
    by_hand = 0.5 * math.log(2) + 0.25 * math.log(0.5) + 0.25 * math.log(0.25 / 0.25)
    assert kl_from_below(exact, own) == pytest.approx(by_hand)
    assert kl_from_below(exact, exact) == 0.0
    assert kl_from_below(exact, logs(t8=0.9)) == 0.0, "nothing is known of it"


def test_kl_is_never_above_that_of_the_whole_distributions_and_near_it_where_heads_decide():
    rng = np.random.default_rng(0)
    shares = []
    for scale in (0.02, 0.1, 0.5, 2.0):
        for _ in range(50):
            logits = rng.normal(0, 4, 500)
            p, q = (x - np.log(np.exp(x).sum()) for x in (logits, logits + rng.normal(0, scale, 500)))
            whole = float((np.exp(p) * (p - q)).sum())
            tops = [{int(t): float(x[t]) for t in np.argsort(-x)[:8]} for x in (p, q)]
            found = kl_from_below(*tops)
            assert 0 <= found <= whole + 1e-6
            shares.append(found / whole)
    assert np.median(shares) > 0.6


def test_a_distribution_that_is_all_head_is_no_infinity():
    certain = {1: 0.0, 2: -40.0}
    assert kl_from_below(certain, certain) == 0.0
    assert kl_from_below(certain, logs(t1=0.5, t2=0.5)) == pytest.approx(math.log(2), rel=1e-3)


def test_a_flip_is_another_likeliest_token_and_a_tie_is_none():
    assert not flipped(logs(t1=0.6, t2=0.3), logs(t1=0.4, t2=0.39))
    assert flipped(logs(t1=0.6, t2=0.3), logs(t1=0.39, t2=0.4))
    assert not flipped(logs(t1=0.4, t2=0.4), logs(t1=0.3, t2=0.4))


def test_rows_leave_the_first_token_out():
    own = [logs(t1=0.9), logs(t2=0.5, t3=0.25), logs(t3=0.6, t4=0.2)]
    exact = [logs(t9=0.9, t1=0.01), logs(t2=0.5, t3=0.25), logs(t3=0.2, t4=0.6)]
    found = fidelity.rows(probe([1, 2, 3], own, exact))
    second = 0.2 * math.log(0.2 / 0.6) + 0.6 * math.log(0.6 / 0.2)
    by_hand = [[0, 0, -math.log(0.5), -math.log(0.5)], [1, second, -math.log(0.2), -math.log(0.6)]]
    assert found == pytest.approx(np.array(by_hand))
    with pytest.raises(ValueError, match="arm, request 0: token 1 has no log-probability"):
        fidelity.rows(probe([1, 2], own[:2], [exact[0], logs(t7=1.0)]))


def test_outputs_are_compared_place_by_place():
    pairs = [([1, 2, 3, 4], [1, 2, 9, 4]), ([1, 2], [1, 2]), ([5, 6, 7], [5, 6]), ([1], [2])]
    found = compare([(probe(a, [], []), probe(b, [], [])) for a, b in pairs])
    assert (found.requests, found.identical, found.tokens) == (4, 1, 10)
    assert (found.equal, found.before) == (7 / 10, 6 / 10)
    assert found.divergences == [0, 2, 2]
    assert (found.quantile(0.5), found.quantile(0.9)) == (2.0, 2.0)


def made_up(every, requests=40, tokens=33, arm="arm"):
    """What the stand-in's model says, with ``every`` as its ``approximate``."""
    found = []
    for index in range(requests):
        prompt = [index + 1, 7, 3 * index + 2]
        output = fake_vllm.generate(prompt, tokens, every)
        prefixes = [[*prompt, *output[:i]] for i in range(tokens)]
        own, exact = ([ab_logs(fake_vllm.distribution(x, n)) for x in prefixes] for n in (every, 0))
        found.append(probe(output, own, exact, index, "ab"[index % 2], arm))
    return found


def ab_logs(chances):
    return {token: math.log(p) for token, p in chances.items()}


def test_figures_of_known_distributions():
    arm, control = made_up(4), made_up(0, arm="control")
    found = judge_arm("arm", True, arm, control, ["a", "b", "none such"], (1.5, 1.0))
    total = found.total
    # Prompts of 3 tokens and 33 of output: the prefixes of tokens 2 to 33 have 4 to 35 tokens, of which 8 are wrong.
    assert total.forced.tokens == 40 * 32
    assert total.forced.flips.value == 8 / 32
    assert total.forced.kl.value == pytest.approx(8 / 32 * KL_WRONG)
    assert total.forced.perplexity.value == pytest.approx(math.exp(-(24 * math.log(0.7) + 8 * math.log(0.2)) / 32))
    assert total.forced.excess.value == pytest.approx((0.6 / 0.2) ** (8 / 32) - 1)
    assert (total.noise.flips.value, total.noise.kl.value, total.noise.excess.value) == (0, 0, 0)
    assert total.noise.perplexity.value == pytest.approx(1 / 0.7)
    change = total.forced.perplexity.value * 0.7 - 1
    assert total.perplexity_change.value == pytest.approx(change)
    assert total.perplexity_change.low == pytest.approx(change), "every request is wrong as often"
    assert total.free.divergences == [1] * 40 and total.free.identical == 0
    assert list(found.tasks) == ["a", "b"] and found.tasks["a"].forced.requests == 20
    assert (found.mat, found.control_mat) == (1.5, 1.0)
    assert found.sentence.startswith(
        "approximate: 25% (95% interval 25.0% to 25.0%) of tokens are not the exact model's choice "
        "(noise of the control: 0.0%); perplexity of its text +31.6% over what the arm gave it (control: 0.0%) and +36"
    )
    assert found.sentence.endswith(
        "0 of 40 outputs are identical, the others part after 1 tokens (median); 1.50 tokens per step"
    )


def test_an_arm_that_is_the_control_has_none_of_it():
    found = judge_arm("arm", False, made_up(0), made_up(0, arm="control"), ["a"]).total
    assert (found.forced.flips.value, found.forced.kl.value, found.perplexity_change.value) == (0, 0, 0)
    # No flip among 1,280 tokens would be seen in 1 of 40 such runs if 0.29% of tokens were flips.
    assert (1 - found.forced.flips.high) ** 1280 == pytest.approx(0.025)
    assert (found.free.identical, found.free.equal, found.free.divergences) == (40, 1, [])


def test_an_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        # Requests differ in how often they are wrong, 10% on average.
        chances = rng.beta(2, 18, 32)
        sums = np.array([[64, rng.binomial(64, c), 0, 0, 0] for c in chances], float)
        found = fidelity._estimate(sums, lambda s: s[:, 1] / s[:, 0], 0)
        held += found.low <= 0.1 <= found.high
    assert 0.88 <= held / 200 <= 0.99


def test_few_requests_have_no_interval_and_no_output_no_figures():
    few = judge_arm("arm", True, made_up(4, 4), [], ["a"])
    assert few.total.forced.flips.low is None and few.total.noise is None and few.total.free is None
    assert "the control's own noise is not known" in few.sentence
    none = judge_arm("arm", True, made_up(4, 4, tokens=1), [], ["a"])
    assert none.total is None and "was not measured" in none.sentence


# Which arms


def settings(*arms, **given):
    return plan.build({"arms": list(arms), "model": "m", **given})[0]


def test_approximate_arms_are_known_by_their_flags():
    found = settings("none", "sparse", "s=--spec-model vllm_specplug.SparseVerify", "auto")
    assert found.approximate == found_names(found) == ["sparse", "s"]
    inner = json.dumps({"specplug": {"ab": {"arms": ["sparse_verify"]}}})
    assert settings("none", f"x=auto --additional-config='{inner}'").approximate == ["x"]


def found_names(found):
    return list(found.fidelity)


def test_another_packages_approximate_proposer_is_known_by_its_class(monkeypatch):
    class Loose:
        lossless = False

    entry = plan.registry.Entry("Loose", "elsewhere:Loose", "another-package")
    monkeypatch.setattr(type(entry), "load", lambda self: Loose)
    monkeypatch.setattr(plan.registry, "proposers", lambda: {"Loose": entry})
    assert settings("none", "x=--spec-model vllm_specplug.Loose").approximate == ["x"]
    assert settings("none", "x=--spec-model vllm_specplug.Looser").approximate == []


def test_fidelity_is_measured_of_the_arms_asked_for():
    assert settings("none", "auto", "sparse", fidelity="all").fidelity == ("auto", "sparse")
    assert settings("none", "auto", "sparse", fidelity="auto").fidelity == ("auto",)
    assert settings("none", "sparse", fidelity_requests="0").fidelity_requests == 0
    for asked, said in (("none", "none is not allowed: one of auto"), ("auto,x", "--fidelity = x is not allowed")):
        with pytest.raises(plan.UsageError, match=said):
            settings("none", "auto", fidelity=asked)


# The verdict and its reports


@pytest.mark.parametrize("change", [None, ab_runs.one_wrong])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_verdict_never_calls_an_approximate_arms_output_the_same(change, temperature):
    made, cells = ab_runs.make(
        {"none": Behaviour(), "sparse": Behaviour(change=change), "exact": Behaviour()}, temperature=temperature
    )
    for loose in ("sparse", "none"):
        found = judge(dataclasses.replace(made, facts={**made.facts, "approximate": [loose]}), cells)
        for result in (r for r in found.results if not r.control):
            if loose == "none" or result.arm == loose:
                assert result.output.kind == "approximate"
                assert "same" not in result.sentence.replace("no difference", "")
                assert "approximate" in result.sentence
            else:
                assert result.output.kind == "same"


@pytest.fixture
def judged():
    made, cells = ab_runs.make({"none": Behaviour(), "sparse": Behaviour(), "late": Behaviour()})
    told = {"skipped": {"late": "the control none: no"}, "mat": {"sparse": 1.75, "none": 1.0}}
    made = dataclasses.replace(
        made, tasks=["a", "b"], facts={**made.facts, "approximate": ["sparse"], "fidelity": told}
    )
    return made, cells, judge(made, cells, [*made_up(4, arm="sparse"), *made_up(0, arm="none")])


def test_the_verdict_has_the_fidelity_of_every_arm(judged):
    sparse, late = judged[2].fidelity
    assert (sparse.arm, sparse.approximate, sparse.mat, sparse.total.forced.flips.value) == ("sparse", True, 1.75, 0.25)
    assert late.sentence == "fidelity was not measured: the control none: no"
    json.dumps(dataclasses.asdict(judged[2]))


def test_reports_say_it(judged, tmp_path, monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(plots, "available", lambda: False)
    made, cells, verdict = judged
    text = io.StringIO()
    summary.print_summary(verdict, Console(file=text, width=2000))
    assert "sparse, fidelity: approximate: 25% (95%" in text.getvalue()
    assert "late, fidelity: fidelity was not measured: the control none: no" in text.getvalue()
    summary.write_csv(verdict, tmp_path / "summary.csv")
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    found = {(r["task"], r["metric"]): r["value"] for r in rows if r["arm"] == "sparse" and not r["load"]}
    assert float(found["", "top1_flips"]) == float(found["a", "top1_flips"]) == 0.25
    assert float(found["", "control_top1_flips"]) == 0 and float(found["", "fidelity_mat"]) == 1.75
    assert float(found["", "kl_from_below"]) == pytest.approx(KL_WRONG / 4, rel=1e-4)
    html.write(verdict, made, cells, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Approximate: 25% (95% interval" in page and "<h2>Fidelity</h2>" in page
    table = re.search(r"<caption>sparse</caption>.*?</table>", page, re.DOTALL)[0]
    assert [re.sub("<[^>]*>", "", row) for row in re.findall(r'<th scope="row">.*?</th>', table)] == [
        "all",
        "a",
        "b",
        "noise: none itself",
    ]
    assert "0.0% (0.0%–0.3%)" in table and "25.0% (25.0%–25.0%)" in table  # noqa: RUF001


def test_results_without_fidelity_are_as_before(tmp_path):
    made, cells = ab_runs.make({"none": Behaviour(), "auto": Behaviour()})
    results.write_plan(tmp_path, made)
    assert results.read_probes(tmp_path) == []
    assert judge(made, cells).fidelity == []


def test_probes_are_read_as_they_were_written(tmp_path):
    written = made_up(4, 3)
    for one in written:
        results.add_probe(tmp_path, one)
    with (tmp_path / results.FIDELITY).open("a") as file:
        file.write('{"arm": "cut sh')
    assert results.read_probes(tmp_path) == written
    (tmp_path / results.FIDELITY).write_text('{"arm": "x"}\n')
    with pytest.raises(ValueError, match=r"fidelity.jsonl, line 1: no probe of a comparison"):
        results.read_probes(tmp_path)


# Runs on stand-ins


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "vllm_command", servers.vllm_command)  # put back afterwards
    ab_driver.fake_vllm()
    return tmp_path / "out"


def workload(tmp_path, prompts):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"task": "ab"[i % 2], "prompt": p}) + "\n" for i, p in enumerate(prompts)))
    return file


IDS = [[i + 1, 7, 3 * i + 2] for i in range(8)]


def run(tmp_path, out, *arms, prompts=IDS, code=0):
    pytest.importorskip("vllm", reason="the client of vLLM's own benchmark sends the timed requests")
    given = [*arms] if any("--output-tokens" in word for word in arms) else ["--output-tokens=33", *arms]
    command = ["ab", "fake-model", f"--workload={workload(tmp_path, prompts)}", "--concurrency=2", "--repeats=1"]
    assert main.main([*command, f"--out={out}", "--timeout-s=20", *given]) == code
    made, cells = results.read(out)
    return made, results.read_probes(out), judge(made, cells, results.read_probes(out))


def test_a_run_measures_an_approximate_arm(tmp_path, out, capsys):
    made, probes, verdict = run(tmp_path, out, "--arm=none", "--arm=sparse=sparse --fake approximate=4")
    expected = {(p.arm, p.index): p for p in [*made_up(4, 8, arm="sparse"), *made_up(0, 8, arm="none")]}
    assert len(probes) == 16
    for found in probes:
        assert found.tokens == expected[found.arm, found.index].tokens
        assert len(found.exact) == len(found.own) == 33
    (sparse,) = verdict.fidelity
    assert sparse.approximate and sparse.total.forced.flips.value == 0.25
    assert sparse.total.forced.kl.value == pytest.approx(KL_WRONG / 4)
    assert sparse.total.noise.flips.value == 0 and sparse.total.free.divergences == [1] * 8
    # 32 decoded tokens in 16 steps, by the stand-in's counters.
    assert sparse.mat == sparse.control_mat == 2.0
    assert made.facts["fidelity"]["requests"] == 8 and made.facts["complete"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "Fidelity of sparse: 8 requests, read by none." in printed
    assert "sparse, fidelity: approximate: 25%" in printed and "the same output" not in printed
    assert "Approximate: 25%" in (out / ab.REPORT).read_text()
    assert json.loads((out / ab.SUMMARY_JSON).read_text())["fidelity"][0]["arm"] == "sparse"


@pytest.mark.parametrize("where", ["--together", "--in-turn"])
def test_an_arm_that_is_the_control_and_text_prompts(tmp_path, out, where):
    prompts = [f"{'word ' * (i + 1)}and so on" for i in range(6)]
    arms = ("--arm=none", "--arm=b=none", "--fidelity=all", "--fidelity-requests=4", where)
    _, probes, verdict = run(tmp_path, out, *arms, prompts=prompts)
    (same,) = verdict.fidelity
    assert {(p.arm, len(p.tokens)) for p in probes} == {("none", 33), ("b", 33)} and len(probes) == 8
    assert not same.approximate and same.total.forced.flips.value == 0 == same.total.forced.kl.value
    assert same.total.perplexity_change.value == 0 and same.total.free.identical == 4
    assert not same.sentence.startswith("approximate")


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        (["none=--fake no-prompt-logprobs", "sparse"], "sparse: fidelity was not measured: the control none: 400 Bad"),
        (["none", "sparse=sparse --fake no-logprobs"], "does not tell token ids and their log-probabilities"),
        (["a=sparse", "sparse"], "Fidelity was not measured: a is approximate itself; name an exact arm first."),
    ],
)
def test_where_it_cannot_be_measured_a_line_says_so(tmp_path, out, capsys, arms, said):
    _, probes, verdict = run(tmp_path, out, *(f"--arm={arm}" for arm in arms))
    assert probes == []
    assert said in " ".join(capsys.readouterr().out.split())
    assert all("not measured" in found.sentence for found in verdict.fidelity)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        # It may answer the request before that no more; of the first, that one was timed.
        (11, r"sparse: fidelity was not measured: ended \(did not answer: |sparse.* did not answer"),
        (15, "sparse: [45] of 8 requests for fidelity failed, the first: did not answer: "),
    ],
)
def test_a_server_that_dies_meanwhile_is_said_and_the_run_is_kept(tmp_path, out, capsys, request_, said):
    # 2 requests to warm up and 8 timed ones come before.
    _, probes, _ = run(tmp_path, out, "--arm=none", f"--arm=sparse=sparse --fake die={request_}", "--keep-servers")
    assert re.search(said, " ".join(capsys.readouterr().out.split()))
    assert len(probes) in ([0, 8] if request_ == 11 else [8 + 3, 8 + 4])


def test_a_short_context_leaves_room_for_reading_and_is_noted(tmp_path, out, capsys):
    arms = ("--arm=none=--fake context=20", "--arm=sparse=sparse --fake context=20", "--output-tokens=33")
    made, probes, _ = run(tmp_path, out, *arms, prompts=[*IDS[:2], list(range(1, 20))])
    # Prompt, output and one token more make 20.
    assert {len(p.tokens) for p in probes} == {16} and len(probes) == 4
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 of 3 requests do not fit in a context of 20 tokens: prompts of up to 19 and 33 of output" in printed
    assert "--max-model-len=53" in printed
    assert "sparse: 1 of 3 requests for fidelity failed, the first: a prompt of 19 tokens leaves no room" in printed
    assert sum("do not fit" in note for note in made.facts["notes"]) == 1, "said once"


def test_none_is_measured_where_none_is_asked_for(tmp_path, out):
    made, probes, verdict = run(tmp_path, out, "--arm=none", "--arm=sparse", "--fidelity-requests=0")
    assert probes == [] and "fidelity" not in made.facts and verdict.fidelity == []


# Long prompts


def test_requests_that_are_too_long_are_counted():
    requests = [workloads.Request(i, "a", [1] * size) for i, size in enumerate((10, 90, 91))]
    assert workloads.too_long(requests, 9, 100).startswith("1 of 3 requests do not fit in a context of 100 tokens")
    assert workloads.too_long(requests, 9, 101) == workloads.too_long(requests, 9, 0) == ""
    assert workloads.too_long([workloads.Request(0, "a", "text " * 500)], 9, 100) == ""


def test_the_embedded_models_context_holds_long_prompts():
    def length(prompt):
        return ab.embedded_args([workloads.Request(0, "a", prompt)], 96)[-1]

    assert length([1] * 100) == length([1] * 3999) == length("some text") == "--max-model-len=4096"
    assert length([1] * 4000) == length([1] * 7800) == length("x" * 20000) == "--max-model-len=8192"
    assert length([1] * 9000) == "--max-model-len=8192", "all its positions; what does not fit is said"


# Real servers


@pytest.mark.engine
@pytest.mark.slow
def test_real_servers_tell_an_exact_arm_from_one_of_another_precision(tmp_path):
    from engines import MODEL
    from prompts import chat_prompts

    file = tmp_path / "prompts.jsonl"
    rows = [{"task": "ab"[i % 2], "prompt": prompt} for i, prompt in enumerate(chat_prompts(8))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["ab", str(MODEL), f"--workload={file}", "--arm=none", "--arm=auto", "--arm=half=--dtype bfloat16"]
    command += ["--serve-args=--enforce-eager --dtype=float32 --max-model-len=1024", "--fidelity=all", "--repeats=1"]
    arguments = ["--output-tokens=48", "--concurrency=1", "--in-turn", f"--out={tmp_path / 'out'}"]
    assert main.main([*command, *arguments]) == 0
    made, cells = results.read(tmp_path / "out")
    auto, half = judge(made, cells, results.read_probes(tmp_path / "out")).fidelity
    assert auto.total.forced.tokens > 200 and auto.total.free.identical == 8
    assert auto.total.forced.flips.value == auto.total.noise.flips.value == 0
    # What float32 leaves of a sum over 49,152 logits, and of chunks against single tokens.
    assert auto.total.forced.kl.value < 1e-5 and auto.total.noise.kl.value < 1e-5
    assert auto.mat > 1.2 and auto.control_mat == 1.0, "trees were verified while log-probabilities were told"
    # bfloat16 rounds logits to about 0.4%, so that near ties fall the other way.
    assert half.total.forced.flips.value < 0.05
    assert abs(auto.total.forced.excess.value) < 1e-4 and abs(half.total.forced.excess.value) < 0.02
    assert 10 * auto.total.forced.kl.value < half.total.forced.kl.value < 0.01
