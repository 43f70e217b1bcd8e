"""Learned state in a file: it comes back whole or is refused, and whatever happens to the file, nothing else breaks."""

from __future__ import annotations

import json
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from learned import assert_equal, make, teach
from proposer_steps import draft, guesses, ints, step
from vllm_specplug.proposers import saved_state
from vllm_specplug.proposers.auto import Auto, Fused
from vllm_specplug.proposers.base import Proposer, Request
from vllm_specplug.proposers.output_store import SMALLEST_SHARE, OutputStores
from vllm_specplug.proposers.recycling_table import ROW_BYTES, WIDTH, RecyclingTable, recycle
from vllm_specplug.proposers.saved_state import StateFileError, whole

IDENTITY = {"proposer": "fused", "model": "m", "vocab_size": 50, "machine": {"threads": 2}}


def write(path: Path, state: dict[str, np.ndarray], about: dict[str, Any] | None = None, **limits: int) -> int:
    return saved_state.write(path, {name: [array] for name, array in state.items()}, about or {}, **limits)


@pytest.mark.parametrize("cls", [Fused, Auto])
def test_restored_proposer_drafts_what_the_saved_one_would(cls: type[Proposer], tmp_path: Path) -> None:
    saved, restored = make(cls), make(cls)
    prompt = teach(saved)
    write(tmp_path / "state", whole(saved.state()))
    restored.restore(saved_state.read(tmp_path / "state")[1])
    assert_equal(whole(saved.state()), whole(restored.state()))
    # What a budget cuts depends on step times, which are measured anew.
    drafters = [getattr(p, "inner", p) for p in (saved, restored, make(cls))]
    for proposer in drafters:
        for slot, namespace in enumerate("abc"):
            proposer.add_request(Request(slot, namespace, ints(*prompt), namespace=namespace))
    differs = False
    for slot in range(3):
        forests = [draft(p, slot, 30) for p in drafters]
        for field in ("tokens", "parents", "probs", "sources"):
            np.testing.assert_array_equal(getattr(forests[0], field), getattr(forests[1], field))
        differs |= len(forests[2].tokens) != len(forests[0].tokens)
    assert differs  # or nothing was learned that could be lost


def test_restored_proposer_goes_on_learning_alike() -> None:
    saved, restored = make(), make()
    prompt = teach(saved)
    restored.restore(whole(saved.state()))
    steps = [step(0, [t, t + 1], [(t - 1, -1, guesses(t)), (t, 0, guesses(t + 1))]) for t in range(20, 40, 2)]
    for proposer in (saved, restored):
        proposer.add_request(Request(0, "r", ints(*prompt, 19), namespace="a"))
        for taken in steps:
            proposer.observe(taken)
        proposer.remove_request(0)
        proposer._outputs._stores["a"].primary.check_integrity()
    assert_equal(whole(saved.state()), whole(restored.state()))


def test_state_is_a_copy_and_has_no_addresses() -> None:
    proposer = make()
    teach(proposer)
    state = whole(proposer.state())
    kept = {name: array.copy() for name, array in state.items()}
    teach(proposer, seed=3)
    assert_equal(state, kept)
    assert not any(np.shares_memory(array, field) for array in state.values() for field in proposer._mix)
    assert {"mixture/weights", "table/rows", "outputs/text"} <= state.keys()
    assert not {"text", "block", "store"} & {name.split("/")[0] for name in state}


def test_options_decide_what_is_taken_over() -> None:
    saved = make()
    prompt = teach(saved)
    state = whole(saved.state())
    without = make(store=False, recycling=False)
    without.restore(state)
    assert not {name.split("/")[0] for name in whole(without.state())} & {"table", "outputs"}
    assert without.stats()["store_tokens"] == 0
    without.add_request(Request(0, "r", ints(*prompt)))
    draft(without, 0, 8)
    later = make()
    later.restore(whole(without.state()))
    np.testing.assert_array_equal(later._mix.weights, saved._mix.weights)


def test_smaller_budgets_keep_the_newest() -> None:
    rng = np.random.default_rng(4)
    stores = OutputStores(8 << 20)
    outputs = [rng.integers(0, 5000, size=300).astype(np.int32) for _ in range(100)]
    for number, output in enumerate(outputs):
        stores.add("ab"[number % 2], output)
    small = OutputStores(1 << 20)
    small.restore(stores.state())
    assert small.nbytes <= 1 << 20 and small.evictions > 0 and 0 < small.num_tokens < stores.num_tokens
    state = 0
    for token in outputs[-1][:50]:
        state = small._stores["b"].primary.edges(state)[int(token)][0]
    assert small._stores["b"].text[-300:].tolist() == outputs[-1].tolist()
    tiny = OutputStores(SMALLEST_SHARE)
    tiny.restore(stores.state())
    assert list(tiny._stores) == ["b"] and tiny.nbytes <= SMALLEST_SHARE


def test_stored_text_is_what_the_automaton_was_made_of() -> None:
    """Through evictions, outputs too long for the budget, and repeated ones that make no automaton grow."""
    rng = np.random.default_rng(5)
    stores = OutputStores(1 << 20)
    for number in range(400):
        length = int(rng.integers(1, 400)) if number % 40 else 30_000
        output = np.full(length, 7) if number % 3 else rng.integers(0, 3000, size=length)
        stores.add("a", output.astype(np.int32))
        assert stores.nbytes <= 1 << 20
    store = stores._stores["a"]
    text = np.array(store.text, np.int32)
    assert store.epoch > 1 and (text >= 0).sum() == store.primary.num_tokens > 1000
    again = OutputStores(1 << 30)  # nothing is evicted
    again.restore(stores.state())
    twin = again._stores["a"].primary
    assert twin.num_tokens == store.primary.num_tokens
    for state in range(0, int(twin._header(0)), 97):
        assert twin.edges(state) == store.primary.edges(state)


def _row(table: RecyclingTable, space: int, token: int, first: int) -> None:
    ids = np.arange(first, first + WIDTH, dtype=np.int32)[None]
    logprobs = np.log(0.5 ** np.arange(1, WIDTH + 1, dtype=np.float32))[None]
    recycle(table.view, space, 1, WIDTH, token, -1, -1, ids, logprobs, 0, True)


def test_table_moves_to_other_sizes_and_keeps_namespaces_apart() -> None:
    table = RecyclingTable(1 << 16)
    spaces = {name: table.space(name) for name in ("x", "y", "gone")}
    for token in range(200):
        _row(table, spaces["xy"[token % 2]], token, 1000 + token)
    del table._spaces["gone"]  # forgotten; its number must not go to another namespace
    state = whole(table.state())
    assert state["rows"].shape[1] * 4 == ROW_BYTES and len(state["rows"]) < 220
    for budget in (1 << 20, 1 << 16):
        other = RecyclingTable(budget)
        other.restore(state)
        assert other.space("y") == spaces["y"] and other.space("new") > spaces["gone"]
        for token in range(200):
            space = spaces["xy"[token % 2]]
            assert other.row(space, [token]) == table.row(space, [token])
            assert other.row(spaces["xy"[1 - token % 2]], [token]) == {}
        assert other.row(spaces["x"], []) == table.row(spaces["x"], [])
    small = RecyclingTable(1 << 12)  # 64 rows
    small.restore(state)
    assert sum(bool(small.row(spaces["xy"[t % 2]], [t])) for t in range(150, 200)) > 35
    assert not any(small.row(spaces["xy"[t % 2]], [t]) for t in range(20))
    RecyclingTable(0).restore(state)


def test_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    saved = make()
    teach(saved)
    state = whole(saved.state())
    rows = state["table/rows"]
    index = state["table/index"].tobytes()

    def but(name: str, array: np.ndarray | None) -> dict[str, np.ndarray]:
        return {k: v for k, v in (state | {name: array}).items() if v is not None}

    def row(field: int, value: int) -> np.ndarray:
        changed = rows.copy()
        changed[3, field] = value
        return changed

    def packed(text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    bad = [
        but("mixture/weights", None),
        but("mixture/more", np.zeros(3)),
        but("mixture/weights", state["mixture/weights"][1:]),
        but("mixture/prob", state["mixture/prob"].astype(np.float64)),
        but("mixture/prob", state["mixture/prob"] + 1),
        but("mixture/seen", state["mixture/seen"] - 1000),
        but("mixture/stretch", state["mixture/stretch"] * np.float32("nan")),
        but("table/rows", rows[:, 1:]),
        but("table/rows", row(13, WIDTH + 1)),  # more tokens than a row has
        but("table/rows", row(13, 0)),
        but("table/rows", row(2, -5)),
        but("table/rows", row(2, int(rows[3, 3]))),  # a token twice
        but("table/rows", row(0, -1)),
        but("table/index", None),
        but("table/index", packed(b"{")),
        but("table/index", packed(b"[1]")),
        but("table/index", packed(index.replace(b'"next": 2', b'"next": 1'))),
        but("table/index", packed(index.replace(b'"next": 2', b'"next": 2.5'))),
        but("outputs/sizes", state["outputs/sizes"] + 1),
        but("outputs/sizes", state["outputs/sizes"] * [-1, 1]),
        but("outputs/names", packed(b'["a", "a"]')),
        but("outputs/names", packed(b'["a", 1]')),
        but("outputs/names", packed(b"\xff")),
        but("outputs/habits", state["outputs/habits"][:1]),
        but("outputs/habits", state["outputs/habits"] + np.float32("inf")),
        but("outputs/text", state["outputs/text"].astype(np.int64)),
    ]
    proposer = make()
    before = whole(proposer.state())
    for number, changed in enumerate(bad):
        with pytest.raises(ValueError):
            proposer.restore(changed)
            pytest.fail(f"case {number} was accepted")
        assert_equal(before, whole(proposer.state()))
    proposer.add_request(Request(0, "live", ints(1, 2)))
    with pytest.raises(ValueError, match="before the first request"):
        proposer.restore(state)


# The file


def _file(folder: Path) -> tuple[Path, dict[str, np.ndarray], bytes]:
    rng = np.random.default_rng(0)
    state = {
        "a/floats": rng.normal(size=(7, 3)).astype(np.float32),
        "a/empty": np.zeros((0, 16), np.int32),
        "b": rng.integers(0, 255, size=900).astype(np.uint8),
    }
    path = folder / "state"
    write(path, state, {"identity": {"model": "m"}})
    return path, state, path.read_bytes()


def test_file_is_private_and_an_ordinary_npz(tmp_path: Path) -> None:
    path, state, content = _file(tmp_path)
    old = os.umask(0)
    try:
        assert write(path, state, {"identity": {"model": "m"}}) == len(content) and path.read_bytes() == content
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    with path.open("rb") as file, np.load(file, allow_pickle=False) as loaded:
        assert set(loaded) == {*state, "header"}
        np.testing.assert_array_equal(loaded["a/floats"], state["a/floats"])


def test_pieces_make_one_array(tmp_path: Path) -> None:
    def pieces():
        yield from (np.arange(3), np.arange(0), np.arange(5))

    taken: dict[str, list[np.ndarray]] = {}
    assert sum(1 for _ in saved_state.take({"x": pieces(), "y": np.eye(2)}, taken)) == 4
    saved_state.write(tmp_path / "state", taken, {})
    _, state = saved_state.read(tmp_path / "state")
    np.testing.assert_array_equal(state["x"], [0, 1, 2, 0, 1, 2, 3, 4])
    assert_equal(state, whole({"x": pieces(), "y": np.eye(2)}))


def test_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "volume" / "state")
    write(tmp_path / "link", {"x": np.arange(3)})
    assert (tmp_path / "link").is_symlink() and (tmp_path / "volume" / "state").is_file()


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path, _, content = _file(tmp_path)
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(StateFileError):
            saved_state.read(path)


def test_flipped_bits_are_refused_or_change_nothing(tmp_path: Path) -> None:
    path, state, content = _file(tmp_path)
    refused = 0
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << (at % 8)
        path.write_bytes(damaged)
        try:
            about, found = saved_state.read(path)
        except StateFileError:
            refused += 1
        else:
            assert_equal(state, found)
            assert about["identity"] == {"model": "m"}
    assert refused > len(content) * 0.7


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400))
def test_any_other_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "state"
    path.write_bytes(content)
    with pytest.raises(StateFileError):
        saved_state.read(path)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


def foreign(path: Path, header: bytes, compression: int = zipfile.ZIP_STORED, **members: np.ndarray) -> None:
    """An archive that this plugin has not written."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in {"header": np.frombuffer(header, np.uint8), **members}.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.save(member, array, allow_pickle=True)


@settings(max_examples=60, deadline=None)
@given(header=_json, known=st.dictionaries(st.text(max_size=8), _json, max_size=4))
def test_headers(tmp_path_factory: pytest.TempPathFactory, header: Any, known: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("header") / "state"
    write(path, {"x": np.arange(4)}, {"identity": known})
    assert saved_state.read(path)[0]["identity"] == known
    foreign(path, json.dumps(header).encode())
    with pytest.raises(StateFileError):
        saved_state.read(path)


def test_foreign_archives_are_refused_with_the_reason(tmp_path: Path) -> None:
    path, good = tmp_path / "state", b'{"format": 1, "arrays": ["x"]}'
    foreign(path, good, x=np.arange(3))
    assert saved_state.read(path)[1]["x"].tolist() == [0, 1, 2]
    cases: list[tuple[str, bytes, dict[str, Any]]] = [
        ("format is 2", good.replace(b"1", b"2"), {"x": np.arange(3)}),
        ("not those its header lists", good, {}),
        ("not those its header lists", good, {"x": np.arange(3), "y": np.arange(3)}),
        ("one of its arrays is object", good, {"x": np.array([print, 1])}),
        ("one of its arrays is <U2", good, {"x": np.array(["ab"])}),
        ("one of its arrays is", good, {"x": np.asfortranarray(np.eye(3))}),
        ("compressed", good, {"x": np.arange(3), "compression": zipfile.ZIP_DEFLATED}),
    ]
    for reason, header, members in cases:
        foreign(path, header, **members)
        with pytest.raises(StateFileError, match=reason):
            saved_state.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "hello")
    with pytest.raises(StateFileError, match="no header"):
        saved_state.read(path)
    with pytest.raises(StateFileError, match="IsADirectory"):
        saved_state.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        saved_state.read(tmp_path / "other")


def test_size_is_bounded_both_ways(tmp_path: Path) -> None:
    path, state, content = _file(tmp_path)
    with pytest.raises(StateFileError, match="1000 that are allowed"):
        saved_state.read(path, max_bytes=1000)
    with pytest.raises(StateFileError, match="100 that are allowed"):
        write(path, state, max_bytes=100)
    assert path.read_bytes() == content


@pytest.mark.parametrize("fails", ["fsync", "replace", "write"])
def test_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path, state, content = _file(tmp_path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    if fails == "write":

        def pieces():
            yield np.arange(5)

        with pytest.raises(AttributeError):
            saved_state.write(path, {"first": [np.arange(500_000)], "second": [pieces()]}, {})  # type: ignore[list-item]
    else:
        monkeypatch.setattr(os, fails, full)
        with pytest.raises(OSError, match="No space"):
            write(path, state)
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ["state"]
