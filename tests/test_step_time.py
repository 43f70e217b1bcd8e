"""The step-time model: right within some hundred noisy steps, monotone, hard to mislead, and never forgetful."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_specplug.proposers.base import StepLoad
from vllm_specplug.proposers.step_time import KNOTS, StepTimeModel

Server = Callable[[StepLoad], float]


def _steps(rows: int, points: dict[int, float]) -> float:
    """Milliseconds between measured points, on from the last two as between them."""
    x, y = np.array(list(points)), np.array(list(points.values()))
    more = max(rows - x[-1], 0) * (y[-1] - y[-2]) / (x[-1] - x[-2])
    return float(np.interp(rows, x, y)) + more


def irregular(load: StepLoad) -> float:
    """A CPU in bfloat16: cheap rows, small steps in the curve."""
    rows = _steps(load.rows, {1: 16.5, 2: 17.6, 3: 18.4, 4: 18.7, 6: 19.9, 7: 21.6, 8: 21.0, 11: 22.4, 17: 26.6})
    return (rows + 0.1 * load.requests + 2e-4 * load.row_context + 0.9 * load.prefill) / 1e3


def attentive(load: StepLoad) -> float:
    """A CPU where attention costs rows x context."""
    rows = _steps(load.rows, {1: 31, 2: 34, 4: 34, 8: 37, 16: 46, 32: 77, 64: 131})
    prefill = 1.5 * load.prefill + 5e-4 * load.prefill_context
    return (rows + 0.3 * load.requests + 1e-3 * load.row_context + 2.5e-3 * load.context + prefill) / 1e3


def ridge(load: StepLoad) -> float:
    """A GPU: rows are free up to 200."""
    rows = load.rows + load.prefill
    return (10 + 0.05 * max(0, rows - 200) + 2e-3 * load.rows + 0.02 * load.requests + 2e-5 * load.context) / 1e3


def linear(load: StepLoad) -> float:
    """A slow CPU with a small model: the rows are the step."""
    return (3 + 2 * load.rows + 0.1 * load.requests + 4e-4 * load.row_context + 2 * load.prefill) / 1e3


SERVERS = [irregular, attentive, ridge, linear]


def traffic(
    rng: np.random.Generator,
    steps: int,
    requests: tuple[int, ...] = (1, 4, 16, 2),
    most: int = 16,
    prefill: float = 0.03,
) -> Iterator[StepLoad]:
    """Loads of random draft lengths up to ``most``; the number of requests changes every 50 steps."""
    for i in range(steps):
        n = requests[i // 50 % len(requests)]
        drafted = rng.integers(0, most + 1, n) if rng.random() < 0.8 else np.zeros(n, np.int64)
        context = 400 + rng.integers(0, 400, n)
        new = int(rng.integers(20, 300)) if rng.random() < prefill else 0
        yield StepLoad(
            n,
            n + int(drafted.sum()),
            int(context.sum()),
            int((context * (drafted + 1)).sum()),
            new,
            new * new // 2,
        )


def teach(
    model: StepTimeModel, server: Server, loads: Iterator[StepLoad], rng: np.random.Generator, speed: float = 1.0
) -> list[float]:
    """Show the model noisy times, one in a hundred of them 10 to 100 times too long; the predictions' errors."""
    errors = []
    for load in loads:
        seconds = speed * server(load) * rng.lognormal(0, 0.08)
        errors.append(abs(model.predict(load) / seconds - 1))
        model.observe(load, seconds * rng.uniform(10, 100) if rng.random() < 0.01 else seconds)
    return errors


def taught(server: Server, steps: int = 400, seed: int = 0) -> tuple[StepTimeModel, np.random.Generator]:
    model, rng = StepTimeModel(), np.random.default_rng(seed)
    teach(model, server, traffic(rng, steps), rng)
    return model, rng


def cost(curve: np.ndarray) -> float:
    """What the last point costs over the first, in steps."""
    return float(curve[-1] / curve[0] - 1)


def true_cost(server: Server, requests: int, context: int, rows: int) -> float:
    more = StepLoad(requests, requests + rows, context, context + rows * context // requests)
    return server(more) / server(StepLoad(requests, requests, context, context)) - 1


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("requests", [(1,), (1, 4, 16, 2), (1, 32)])
def test_is_right_after_200_steps(server, requests):
    model, rng = StepTimeModel(), np.random.default_rng(1)
    errors = teach(model, server, traffic(rng, 400, requests), rng)
    assert np.median(errors[200:]) <= 0.08  # the noise alone makes 0.054
    assert np.median(errors[50:200]) <= 0.1
    for n in requests:
        for rows in (4, 8, 16):
            # A tenth of a step per 16 rows where they are cheap, a tenth of their cost where they are dear.
            true = true_cost(server, n, 600 * n, rows)
            assert cost(model.curve(n, 600 * n, rows)) == pytest.approx(true, rel=0.15, abs=0.1)


@pytest.mark.parametrize("server", SERVERS)
def test_first_steps_that_are_slow_do_not_matter(server):
    model, rng = StepTimeModel(), np.random.default_rng(2)
    loads = list(traffic(rng, 60, (1,), prefill=0))
    for i, load in enumerate(loads):
        model.observe(load, server(load) * (40 if i < 3 else 1))
    assert model.predict(loads[-1]) == pytest.approx(server(loads[-1]), rel=0.1)
    assert cost(model.curve(1, 600, 16)) == pytest.approx(true_cost(server, 1, 600, 16), rel=0.15, abs=0.1)


def test_one_outlier_hardly_matters():
    model, _ = taught(attentive)
    load = StepLoad(1, 5, 600, 3000)
    before, curve = model.predict(load), cost(model.curve(1, 600, 16))
    model.observe(load, 100 * before)
    assert model.predict(load) == pytest.approx(before, rel=0.05)
    assert cost(model.curve(1, 600, 16)) == pytest.approx(curve, rel=0.05)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("speed", [2.0, 0.5])
def test_follows_a_machine_that_changes_speed_without_unlearning_its_shape(server, speed):
    model, rng = taught(server)
    before = cost(model.curve(1, 600, 16))
    errors = teach(model, server, traffic(rng, 40, (1,), prefill=0), rng, speed)
    assert min(errors[:3]) > 0.25
    assert np.median(errors[10:20]) < 0.12 and np.median(errors[20:]) < 0.1
    assert cost(model.curve(1, 600, 16)) == pytest.approx(before, rel=0.1, abs=0.02)


@pytest.mark.parametrize("server", SERVERS)
def test_remembers_what_rows_cost_through_1000_steps_without_drafts(server):
    model, rng = taught(server)
    before = cost(model.curve(1, 600, 16))
    teach(model, server, traffic(rng, 1000, (1,), most=0, prefill=0), rng)
    assert cost(model.curve(1, 600, 16)) == pytest.approx(before, rel=0.05, abs=0.02)


def test_unseen_row_counts_cost_what_their_neighbours_do():
    model, rng = StepTimeModel(), np.random.default_rng(3)
    teach(model, linear, traffic(rng, 200, (1,), most=8, prefill=0), rng)
    curve = model.curve(1, 600, 64)
    seen, beyond, far = curve[8] - curve[2], curve[22] - curve[16], curve[64] - curve[58]
    assert 0.7 * seen < beyond < 1.3 * seen
    assert 0.3 * seen < far < 1.3 * seen


def test_before_anything_is_known_a_row_costs_a_few_percent():
    curve = StepTimeModel().curve(1, 100, 1024)
    assert not StepTimeModel().ready
    assert np.all((np.diff(curve) > 0.01 * curve[0]) & (np.diff(curve) < 0.1 * curve[0]))


def test_the_level_is_known_from_the_first_step():
    model = StepTimeModel()
    load = StepLoad(1, 3, 100, 300)
    model.observe(load, 0.5)
    assert model.predict(load) == pytest.approx(0.5, rel=0.01)


def test_is_ready_after_some_steps():
    model, rng = StepTimeModel(), np.random.default_rng(0)
    teach(model, linear, traffic(rng, 5), rng)
    assert not model.ready
    teach(model, linear, traffic(rng, 40), rng)
    assert model.ready


def test_a_probe_gives_the_shape_and_the_first_steps_the_level():
    model = StepTimeModel()
    rows = (1, 2, 3, 5, 9, 17, 33)
    model.prime([StepLoad(1, n, 0, 0) for n in rows], [0.003 + 0.0006 * n for n in rows])
    assert model.ready
    primed = cost(model.curve(1, 0, 16))
    assert primed == pytest.approx(16 * 0.0006 / 0.0036, rel=0.1)
    for _ in range(4):
        model.observe(StepLoad(1, 1, 0, 0), 3 * 0.0036)
    assert model.predict(StepLoad(1, 1, 0, 0)) == pytest.approx(3 * 0.0036, rel=0.05)
    assert cost(model.curve(1, 0, 16)) == pytest.approx(primed, rel=0.1)


def test_a_probe_of_nothing_changes_nothing():
    model = StepTimeModel()
    model.prime([StepLoad(0, 0, 0, 0), StepLoad(1, 1, 1, 1)], [1.0, math.nan])
    assert not model.ready
    assert np.array_equal(model.curve(1, 10, 4), StepTimeModel().curve(1, 10, 4))
    with pytest.raises(ValueError, match="1 loads with 2 times"):
        model.prime([StepLoad(1, 1, 1, 1)], [1.0, 2.0])


_counts = st.integers(0, 5000)


@st.composite
def any_load(draw) -> StepLoad:
    requests = draw(st.integers(0, 300))
    rows = requests + draw(st.integers(0, 4000)) if requests else 0
    context = draw(st.integers(0, 10_000_000))
    row_context = context + draw(st.integers(0, 10**10))
    prefill = draw(_counts)
    return StepLoad(requests, rows, context, row_context, prefill, prefill * draw(_counts))


@given(
    st.lists(st.tuples(any_load(), st.floats(allow_nan=True, allow_infinity=True)), max_size=60),
    any_load(),
    st.sampled_from(["requests", "rows", "context", "row_context", "prefill", "prefill_context"]),
    st.integers(1, 10_000),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_is_monotone_and_finite_whatever_it_was_shown(shown, load, field, more):
    model = StepTimeModel()
    for each, seconds in shown:
        model.observe(each, seconds)
    values = {name: getattr(load, name) for name in StepLoad.__slots__}
    before, after = model.predict(load), model.predict(StepLoad(**{**values, field: values[field] + more}))
    assert min(before, after) > 0 and max(before, after) < math.inf
    assert before <= after or load.rows + load.prefill in (1, 2)
    curve = model.curve(max(load.requests, 1), load.context, 300)
    assert np.isfinite(curve).all() and (np.diff(curve)[max(3 - load.requests, 0) :] >= 0).all()
    assert np.isfinite(list(model.stats().values())).all()
    restored = StepTimeModel()
    restored.restore(model.state())
    assert 0 < restored.predict(load) < math.inf


def test_learns_that_one_and_two_rows_cost_extra():
    """As a processor's matrix kernels may; from a probe, and from steps."""
    seconds = {1: 0.028, 2: 0.032, 3: 0.025, 4: 0.025, 6: 0.025, 8: 0.031, 12: 0.034, 16: 0.039}
    probed, seen, rng = StepTimeModel(), StepTimeModel(), np.random.default_rng(5)
    probed.prime([StepLoad(1, rows, 0, 0) for rows in seconds], list(seconds.values()))
    for _ in range(400):
        rows = int(rng.choice(list(seconds)))
        seen.observe(StepLoad(1, rows, 100, 100 * rows), seconds[rows] * rng.lognormal(0, 0.05))
    for model, within in ((probed, 0.06), (seen, 0.05)):
        curve = model.curve(1, 100, 15)
        for rows, truth in seconds.items():
            assert curve[rows - 1] / curve[3] == pytest.approx(truth / 0.025, rel=within), rows
        assert model.curve(2, 200, 1)[1] < model.curve(2, 200, 1)[0]


def test_stays_sound_over_many_steps():
    model, rng = StepTimeModel(), np.random.default_rng(4)
    teach(model, ridge, traffic(rng, 20_000), rng)
    covariance = model.state()["covariance"]
    assert np.allclose(covariance, covariance.T, atol=1e-12) and np.linalg.eigvalsh(covariance)[0] > 0
    assert model.stats()["step_time_error"] < 0.08


@pytest.mark.parametrize("requests, context, most", [(1, 50, 40), (4, 4000, 100), (16, 0, 2500), (300, 10**6, 5)])
def test_the_curve_is_what_is_predicted(requests, context, most):
    model, _ = taught(attentive)
    curve = model.curve(requests, context, most)
    assert curve.dtype == np.float64 and len(curve) == most + 1
    for rows in {0, 1, most // 2, most} | {int(k) - requests for k in KNOTS if 0 <= k - requests <= most}:
        load = StepLoad(requests, requests + rows, context, context + rows * context // requests)
        assert curve[rows] == pytest.approx(model.predict(load), rel=1e-4)


@pytest.mark.parametrize("bad", [(0, 10, 4), (1, -1, 4), (1, 10, -1)])
def test_a_curve_of_nothing_is_refused(bad):
    with pytest.raises(ValueError, match="requests >= 1"):
        StepTimeModel().curve(*bad)


def test_what_says_nothing_is_ignored():
    model, _ = taught(irregular, 50)
    before = model.state()
    load = StepLoad(1, 3, 100, 300)
    for seconds in (math.nan, 0.0, -1.0, math.inf):
        model.observe(load, seconds)
    model.observe(StepLoad(0, 0, 0, 0, 100, 5000), 0.1)
    assert all(np.array_equal(before[name], array) for name, array in model.state().items())
    assert model.stats()["step_time_steps"] == 50


def test_restored_shape_is_trusted_and_its_scale_learned_anew():
    learned, rng = taught(attentive)
    fresh = StepTimeModel()
    fresh.restore(learned.state())
    assert fresh.ready
    before, after = learned.curve(2, 1000, 16), fresh.curve(2, 1000, 16)
    assert np.allclose(before, after, rtol=1e-3)
    errors = teach(fresh, attentive, traffic(rng, 30, (1,), prefill=0), rng, speed=5.0)
    assert np.median(errors[1:]) < 0.12  # from the second step on
    assert cost(fresh.curve(2, 1000, 16)) == pytest.approx(cost(before), rel=0.1)


def _broken(name: str) -> dict[str, np.ndarray]:
    state = taught(linear, 20)[0].state()
    covariance = state["covariance"]
    if name == "missing":
        del state["mean"]
    elif name == "shape":
        state["mean"] = state["mean"][:-1]
    elif name == "dtype":
        state["mean"] = state["mean"].astype(np.float32)
    elif name == "nan":
        state["mean"][3] = np.nan
    elif name == "huge":
        state["mean"][3] = -1e9
    elif name == "asymmetric":
        covariance[1, 2] += 1e-3
    elif name == "indefinite":
        covariance[0, 0] = -1.0
    else:
        state["noise"][0] = 0.0
    return state


@pytest.mark.parametrize("name", ["missing", "shape", "dtype", "nan", "huge", "asymmetric", "indefinite", "noise"])
def test_state_that_does_not_fit_is_refused_and_changes_nothing(name):
    model = StepTimeModel()
    before = model.state()
    with pytest.raises(ValueError, match="saved"):
        model.restore(_broken(name))
    assert not model.ready
    assert all(np.array_equal(before[key], array) for key, array in model.state().items())


def test_stats_tell_the_last_step_and_the_error():
    model = StepTimeModel()
    assert set(model.stats().values()) >= {0.0}
    rng = np.random.default_rng(5)
    teach(model, linear, traffic(rng, 300, (2,), prefill=0), rng)
    load = StepLoad(2, 6, 1200, 3600)
    expected = model.predict(load)
    model.observe(load, 0.0171)
    stats = model.stats()
    assert stats["step_time_steps"] == 301
    assert stats["step_time_predicted_seconds"] == expected and stats["step_time_measured_seconds"] == 0.0171
    assert stats["step_time_row_seconds"] == pytest.approx(0.002 + 600 * 4e-7, rel=0.3)
    assert 0.03 < stats["step_time_error"] < 0.08


def test_a_curve_with_rows_given_is_the_rest_of_the_whole_curve() -> None:
    model = StepTimeModel()
    rng = np.random.default_rng(0)
    for _ in range(60):
        rows = 4 + int(rng.integers(0, 40))
        model.observe(StepLoad(4, rows, 400, 100 * rows), 0.02 + 0.001 * rows + (0.002 * max(rows - 16, 0)))
    whole = model.curve(4, 400, 30)
    assert model.curve(4, 400, 20, given=10) == pytest.approx(whole[10:], rel=1e-9)
    assert np.array_equal(model.curve(4, 400, 30, given=0), whole)
    with pytest.raises(ValueError, match="given >= 0 expected, got 4, 400, 30 and -1"):
        model.curve(4, 400, 30, given=-1)
