"""What drafting on the device is worth, by recorded greedy outputs: tokens per step of its trees and of its chains.

    python benchmarks/bench_device_drafts.py --trace TRACE.jsonl.gz [--lengths 3 7 15 31] [--csv FILE] [--shapes]

A model of `proposers/device_drafts.py` in plain Python, without the device: a request drafts from its own text and from
what the target ranked highest after each token (a matrix that all requests share, learned from accepted rows alone,
which is all that a trace knows). Every second request is replayed; ``--shapes`` counts all of them instead, each place
of every output, and prints the table of `proposers/device_shapes.py`.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from replay import write_rows
from vllm_specplug.kernels.recycling_matrix import Node
from vllm_specplug.proposers import device_shapes
from vllm_specplug.proposers.device_drafts import GUESSES, LONGEST

# Tokens after a place that are looked at: as many nodes one below the other as a shape may have.
_AHEAD = 48
# Nodes of the table's shapes.
_NODES = 64


class Text:
    """A request's tokens, and where each of its suffixes ended last, as `suffix_match` finds it."""

    def __init__(self, prompt: list[int]) -> None:
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        for token in prompt:
            self.add(token)

    def add(self, token: int) -> None:
        self.tokens.append(token)
        end = len(self.tokens) - 1  # a token follows the one before
        for size in range(1, min(LONGEST, end) + 1):
            self._ends[tuple(self.tokens[end - size : end])] = end

    def match(self) -> tuple[int, list[int]]:
        """Length of the longest match, and what it would have copied."""
        for size in range(min(LONGEST, len(self.tokens) - 1), 0, -1):
            begin = self._ends.get(tuple(self.tokens[-size:]))
            if begin is not None:
                period = len(self.tokens) - begin
                return size, [self.tokens[begin + k % period] for k in range(_AHEAD + 1)]
        return 0, []


def true_path(text: Text, matrix: dict[int, list[int]], following: list[int]) -> tuple[int, list[Node]]:
    """Length of the match, and the nodes that hold the tokens that really follow, one below the other."""
    matched, copied = text.match()
    path: list[Node] = []
    token, copies, ranks = text.tokens[-1], 0, ()
    for level, wanted in enumerate(following):
        if not ranks and copies == level and copied[level : level + 1] == [wanted]:
            copies += 1
        else:
            guesses = list(matrix.get(token, ()))
            if not ranks and copied[copies : copies + 1] and copied[copies] in guesses:
                guesses.remove(copied[copies])
            if wanted not in guesses:
                break
            ranks = (*ranks, guesses.index(wanted))
        path.append(Node(copies, ranks))
        token = wanted
    return matched, path


def learn(text: Text, matrix: dict[int, list[int]], request: dict[str, Any], first: int, count: int) -> None:
    """Take over ``count`` tokens of the output from ``first`` on, and the target's guesses at each."""
    for place in range(first, first + count):
        matrix[text.tokens[-1]] = [token for token, _ in request["topk"][place][:GUESSES]]
        text.add(request["out"][place])


def count_shapes(trace: list[dict[str, Any]]) -> tuple[list[collections.Counter[Node]], list[int]]:
    """How often each node held the token that followed, and the places, by the length of the match."""
    found = [collections.Counter[Node]() for _ in range(LONGEST + 1)]
    places = [0] * (LONGEST + 1)
    matrix: dict[int, list[int]] = {}
    for request in trace:
        text, out = Text(request["prompt"] + request["out"][:1]), request["out"]
        for place in range(1, len(out)):
            matched, path = true_path(text, matrix, out[place : place + _AHEAD])
            places[matched] += 1
            found[matched].update(path)
            learn(text, matrix, request, place, 1)
    return found, places


def print_shapes(trace: list[dict[str, Any]]) -> None:
    """The table: per length of the match the likeliest nodes, likeliest first, parents before children."""
    for matched, counter in enumerate(count_shapes(trace)[0]):
        order = sorted(counter.items(), key=lambda item: (-item[1], item[0].copies + len(item[0].ranks), item[0]))
        names = [device_shapes.name_of(node) for node, _ in order[:_NODES]]
        print(f"    # {matched} tokens matched")
        line = ""
        for name in names:
            if len(line) + len(name) > 108:
                print(f'    "{line}"')
                line = ""
            line += name + " "
        print(f'    "{line.rstrip()}",')


def replay(trace: list[dict[str, Any]], length: int, trees: bool) -> dict[str, float]:
    """Tokens per step, by task and in all."""
    shapes = [set(device_shapes.shape(matched, length, trees)) for matched in range(LONGEST + 1)]
    steps, tokens = collections.Counter[str](), collections.Counter[str]()
    matrix: dict[int, list[int]] = {}
    for request in trace:
        text, out, place = Text(request["prompt"] + request["out"][:1]), request["out"], 1
        while place < len(out):
            matched, path = true_path(text, matrix, out[place : place + min(length, _AHEAD)])
            accepted = next((k for k, node in enumerate(path) if node not in shapes[matched]), len(path))
            emitted = min(accepted + 1, len(out) - place)
            learn(text, matrix, request, place, emitted)
            place += emitted
            for task in (request["cat"], "total"):
                steps[task] += 1
                tokens[task] += emitted
    return {task: tokens[task] / steps[task] for task in steps}


def rows_of(trace: list[dict[str, Any]], lengths: list[int], name: str) -> Iterator[dict[str, Any]]:
    for length in lengths:
        for trees in (False, True):
            provider = "device trees" if trees else "device chains"
            found = replay(trace, length, trees)
            print(f"{provider:<14} of {length:>3}: {found['total']:.3f} tokens per step")
            for task, value in found.items():
                config = json.dumps({"length": length, "trace": name, "every": 2})
                row = {"benchmark": "device_drafts", "provider": provider, "task": task, "metric": "mat"}
                yield row | {"unit": "tokens/step", "value": f"{value:.5g}", "config": config}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trace", type=Path, required=True, help="JSON lines with prompt, out, topk and cat; gzip")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 3, 7, 15, 31, 63])
    parser.add_argument("--shapes", action="store_true", help="print the table of shapes instead")
    parser.add_argument("--csv", type=Path, help="add the results to this file")
    args = parser.parse_args()
    with gzip.open(args.trace, "rt") as file:
        trace = [json.loads(line) for line in file]
    if args.shapes:
        print_shapes(trace)
        return
    rows = list(rows_of(trace[::2], args.lengths, args.trace.name))
    if args.csv:
        write_rows(args.csv, rows)


if __name__ == "__main__":
    main()
