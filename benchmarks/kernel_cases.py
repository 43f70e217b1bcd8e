"""What `bench_kernels.py` times: cases of each Triton kernel, with their checks, their least work and their peers.

Shapes are large and of a GPU; ``dry`` ones are tiny, float32 and for Triton's interpreter on the CPU, where they only
show that the cases are right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from attention_cases import Paged, sparse_attention_cases, tree_attention_cases
from kernel_case import Bench, Case, relative, unequal


def kv_move_cases(bench: Bench) -> Iterator[Case]:
    """Eight moves per request in every layer."""
    from vllm_specplug.kernels import kv_move_triton as own
    from vllm_specplug.kernels.kv_move import kv_move_reference

    block, kv_heads, size, moves = 16, 8, 128, 8
    for requests, layers in bench.shapes((3, 2), (64, 32), (512, 32)):
        caches = [
            torch.randn(requests * 4, kv_heads, block, 2 * size, device=bench.device, dtype=bench.dtype)
            for _ in range(layers)
        ]
        table = torch.randperm(requests * 4, device=bench.device, dtype=torch.int32).reshape(requests, 4)
        targets = (
            (torch.arange(moves, device=bench.device, dtype=torch.int32) + 20).expand(requests, moves).contiguous()
        )
        sources = (
            (torch.arange(moves, device=bench.device, dtype=torch.int32) * 2 + 21).expand(requests, moves).contiguous()
        )
        mover = own.KVMover(caches, block)
        kept = [caches[0].clone(), caches[-1].clone()]
        for copy in kept:
            kv_move_reference([copy], block, table, sources, targets)

        def run(mover: Any = mover, table: Any = table, sources: Any = sources, targets: Any = targets) -> None:
            own.kv_move(mover, table, sources, targets)

        def error(caches: Any = caches, kept: Any = kept) -> float:
            return max(unequal(caches[0], kept[0]), unequal(caches[-1], kept[1]))

        task = f"{requests} requests, {moves} moves, {layers} layers of {kv_heads}x{size}"
        yield Case("kv_move", task, "own", run, own.work(mover, requests * moves), error)


def tree_walk_cases(bench: Bench) -> Iterator[Case]:
    """64 requests of 17, and of 129 rows."""
    from vllm_specplug.kernels import tree_walk_triton as own
    from vllm_specplug.kernels.tree_walk import walk

    draw = np.random.default_rng(bench.seed)
    for requests, rows, depth in bench.shapes((3, 9, 9), (64, 17, 17), (64, 129, 33)):
        total = requests * rows
        parents = np.concatenate([[-1, *(int(draw.integers(0, m)) for m in range(1, rows))] for _ in range(requests)])
        drafts, drawn = draw.integers(0, 4, total), draw.integers(0, 4, total)
        on = {"device": bench.device, "dtype": torch.int32}
        inputs = [
            torch.arange(requests + 1, **on) * rows,
            *(torch.tensor(x, **on) for x in (parents, drafts, drawn)),
            torch.full((requests,), 100, **on),
        ]
        outputs = [torch.full((requests, depth), -2, **on) for _ in range(2)]
        outputs += [torch.full((requests,), -2, **on) for _ in range(2)]
        outputs += [torch.full((requests, depth), -2, **on) for _ in range(2)]
        tokens, paths = np.full((2, requests, rows), -1, np.int32)
        lengths = np.zeros(requests, np.int32)
        heads = np.zeros(total, np.bool_)
        heads[::rows] = True
        walk(
            np.full(requests, rows - 1, np.int32), parents.astype(np.int32), drafts[~heads].astype(np.int32),
            drawn.astype(np.int64), tokens, paths, lengths,
        )  # fmt: skip
        if lengths.max() > depth:
            raise SystemExit("the drawn trees are deeper than the benchmark's depth: choose another seed")
        wanted = torch.from_numpy(np.concatenate([tokens[:, :depth].ravel(), paths[:, :depth].ravel(), lengths]))

        def run(inputs: Any = inputs, outputs: Any = outputs, rows: int = rows) -> None:
            own.tree_walk(*inputs, *outputs, max_rows=rows)

        def error(outputs: Any = outputs, wanted: Any = wanted) -> float:
            return unequal(torch.cat([outputs[0].flatten(), outputs[1].flatten(), outputs[2]]), wanted)

        yield Case("tree_walk", f"{requests}x{rows}", "own", run, own.work(total, requests, depth, 4), error)


def recycling_cases(bench: Bench) -> Iterator[Case]:
    """The matrix of a vocabulary of 128,000, updated by a step's rows, and 80-node trees grown from it."""
    from vllm_specplug.kernels import recycling_matrix as reference
    from vllm_specplug.kernels import recycling_matrix_triton as own

    vocab, k = 500 if bench.dry else 128_000, 8
    draw = np.random.default_rng(bench.seed)
    matrix = torch.randint(0, vocab, (vocab, k), device=bench.device, dtype=torch.int32)
    claims = own.RecycleClaims(vocab, bench.device)
    for rows in bench.shapes(50, 64 * 17, 64 * 129):
        tokens = torch.from_numpy(draw.integers(0, vocab, rows).astype(np.int32)).to(bench.device)
        ids = torch.randint(0, vocab, (rows, k), device=bench.device)
        wanted = matrix.cpu().clone()
        reference.recycle_update_reference(wanted, tokens.cpu(), ids.cpu())
        work = own.update_work(rows, len(tokens.unique()), k, 8)

        def update(tokens: Any = tokens, ids: Any = ids) -> None:
            own.recycle_update(matrix, tokens, ids, claims)

        yield Case("recycle_update", f"{rows} rows", "own", update, work, lambda w=wanted: unequal(matrix, w))
    parents = [-1, *(int(draw.integers(-1, m)) for m in range(1, 80))]
    ranks = [int(draw.integers(0, k)) for _ in parents]
    template = own.RecycleTemplate(parents, ranks, bench.device)
    last = torch.randint(0, vocab, (64,), device=bench.device, dtype=torch.int32)
    grown = torch.empty(64, len(parents), dtype=torch.int32, device=bench.device)

    def error() -> float:
        return unequal(grown, reference.recycle_draft_reference(matrix.cpu(), last.cpu(), parents, ranks))

    yield Case(
        "recycle_draft", "64 trees of 80", "own", lambda: own.recycle_draft(matrix, last, template, grown), None, error
    )
    yield shaped_case(bench, matrix, last)


def shaped_case(bench: Bench, matrix: torch.Tensor, last: torch.Tensor) -> Case:
    """64 trees of 16 nodes, copied tokens and guesses, as the device drafts them."""
    from vllm_specplug.kernels import recycling_matrix as reference
    from vllm_specplug.kernels import recycling_matrix_triton as own
    from vllm_specplug.proposers.device_shapes import shape

    nodes, kinds = 16, [shape(matched, 16) for matched in range(9)]
    shapes = own.RecycleShapes(kinds, bench.device)
    which = torch.arange(64, device=bench.device, dtype=torch.int32) % len(kinds)
    copied = torch.randint(0, len(matrix), (64, nodes), device=bench.device, dtype=torch.int32)
    copied[which == 0] = -1
    tokens, trees = torch.empty(2, 64, nodes, device=bench.device, dtype=torch.int32)
    slots = torch.arange(64, device=bench.device)

    def error() -> float:
        chosen = [kinds[w] for w in which.tolist()]
        return unequal(
            tokens, reference.shaped_draft_reference(matrix.cpu(), last.cpu(), copied.cpu(), chosen)
        ) + unequal(trees, torch.tensor([reference.shape_parents(c) for c in chosen]))

    return Case(
        "shaped_draft", "64 trees of 16", "own",
        lambda: own.shaped_draft(matrix, last, copied, shapes, which, tokens, slots, trees), None, error,
    )  # fmt: skip


def tree_rows_cases(bench: Bench) -> Iterator[Case]:
    """64 requests whose trees are described for the step that verifies them."""
    from vllm_specplug.kernels import tree_rows_triton as own
    from vllm_specplug.kernels.tree_rows import tree_rows_reference

    draw = np.random.default_rng(bench.seed)
    for requests, rows in bench.shapes((3, 7), (64, 17), (64, 129)):
        on = {"device": bench.device, "dtype": torch.int32}
        drawn = [[int(draw.integers(0, m + 1)) for m in range(rows - 1)] for _ in range(requests)]
        starts, total = torch.arange(requests + 1, **on) * rows, requests * rows
        lengths, slots = torch.full((requests,), 1000, **on), torch.arange(requests, device=bench.device)
        words = -(-rows // 32)
        outputs = [torch.empty(total, **on), torch.empty(total, **on), torch.empty(total, words, **on)]
        outputs.append(torch.empty(total, device=bench.device, dtype=torch.int64))
        inputs = (starts, starts, lengths, slots, torch.tensor(drawn, **on))

        def run(inputs: Any = inputs, outputs: Any = outputs, rows: int = rows) -> None:
            own.tree_rows(*inputs, *outputs, rows)

        def error(inputs: Any = inputs, outputs: Any = outputs, rows: int = rows) -> float:
            wanted = [torch.empty_like(o, device="cpu") for o in outputs]
            tree_rows_reference(*(i.cpu() for i in inputs), *wanted, rows)
            return max(unequal(o, w) for o, w in zip(outputs, wanted, strict=True))

        yield Case("tree_rows", f"{requests}x{rows}", "own", run, own.work(total, requests, words), error)


def block_select_cases(bench: Bench) -> Iterator[Case]:
    """Summaries of 64 requests of 32,768 tokens, and the choice of a tenth of their units."""
    from vllm_specplug.kernels import block_select_triton as select
    from vllm_specplug.kernels import block_summary_triton as own
    from vllm_specplug.kernels.block_select import choose_reference, summarise, votes_reference

    step = Paged(bench, *bench.shapes((2, 3, 400, 4, 2, 32), (64, 17, 32768, 32, 8, 128))[0])
    requests, _, context, heads, kv_heads, size = step.shape
    unit, parts = step.block, 2
    units = context // unit
    summaries = torch.empty(len(step.keys), 1, kv_heads, parts, size, device=bench.device, dtype=bench.dtype)
    on = {"device": bench.device, "dtype": torch.int32}
    begins, ends = torch.zeros(requests, **on), torch.full((requests,), units, **on)

    def summary_error() -> float:
        block = step.table[0, :units].long()
        return relative(summaries[block, 0], summarise(step.keys[block].transpose(1, 2), "halfway"))

    yield Case(
        "block_summary", f"{requests} x {units} units of {unit}, halfway", "own",
        lambda: own.block_summary(step.keys, summaries, step.table, begins, ends, "halfway", units),
        own.summary_work(requests * units, unit, kv_heads, size, "halfway", 2, 2), summary_error, 1e-2,
    )  # fmt: skip
    taken = units // 10
    counts, all_units = torch.full((requests, kv_heads), taken, **on), torch.full((requests,), units, **on)
    chosen = torch.empty(requests, kv_heads, taken, **on)
    space = select.Workspace(requests, heads, kv_heads, size, units, bench.device)

    def choice_error() -> float:
        of_first = summaries[step.table[0, :units].long(), 0].transpose(0, 1).float().cpu()
        votes = votes_reference(step.query[: step.shape[1]].cpu(), of_first, step.scale, True)
        wanted = choose_reference(votes, np.full(kv_heads, taken, np.int32), 1)
        missed = [len(set(w.tolist()) - set(chosen[0, h].tolist())) / taken for h, w in enumerate(wanted)]
        return max(missed)

    yield Case(
        "block_select", f"{requests} x {units} units, a tenth", "own",
        lambda: select.block_select(
            *(step.query, step.starts, summaries, step.table, all_units, counts, chosen, space),
            *(step.scale, 1, True, True),
        ),
        None, choice_error, 0.02,
    )  # fmt: skip


def suffix_match_cases(bench: Bench) -> Iterator[Case]:
    """64 histories of 32,768 tokens, all of which have to be read."""
    from vllm_specplug.kernels import suffix_match_triton as own
    from vllm_specplug.kernels.suffix_match import suffix_match_reference

    shortest, longest, drafts = 2, 8, 16
    for requests, length in bench.shapes((3, 60), (64, 32768), (1, 32768)):
        draw = np.random.default_rng(bench.seed)
        tokens = draw.integers(0, 1000, (requests, length)).astype(np.int32)
        lengths = np.full(requests, length, np.int32)
        found = torch.empty(requests, drafts, dtype=torch.int32, device=bench.device)
        matched = torch.empty(requests, dtype=torch.int32, device=bench.device)
        on_device = [torch.from_numpy(x).to(bench.device) for x in (tokens, lengths)]
        space = own.Workspace(requests, bench.device)

        def run(on_device: Any = on_device, found: Any = found, matched: Any = matched, space: Any = space) -> None:
            own.suffix_match(*on_device, found, matched, space, shortest, longest)

        def error(tokens: Any = tokens, lengths: Any = lengths, found: Any = found, matched: Any = matched) -> float:
            some = slice(0, 2)  # the definition tries every suffix at every place
            wanted = suffix_match_reference(tokens[some], lengths[some], shortest, longest, drafts)
            return max(unequal(f[some], torch.from_numpy(w)) for f, w in zip((found, matched), wanted, strict=True))

        task = f"{requests} histories of {length}"
        yield Case("suffix_match", task, "own", run, own.work([length] * requests, drafts), error)


def expert_vote_cases(bench: Bench) -> Iterator[Case]:
    """64 requests of 17 rows, 128 experts and 8 of them per token; each request votes for 32."""
    from vllm_specplug.kernels import expert_vote_triton as own
    from vllm_specplug.kernels.expert_vote import softmax_route, vote

    large = ((64, 17, 128, 8, 32), (64, 17, 512, 10, 64))
    for requests, rows, experts, k, budget in bench.shapes((3, 5, 16, 2, 6), *large):
        total = requests * rows
        logits = torch.randn(total, experts, device=bench.device, dtype=bench.dtype)
        pools = torch.arange(requests + 1, device=bench.device, dtype=torch.int32) * rows
        out = torch.empty_like(logits)
        allowed = torch.empty(requests, experts, dtype=torch.uint8, device=bench.device)
        inputs = (logits, pools, out, allowed, own.Workspace(total, experts, bench.device), k, budget, True)

        def error(inputs: Any = inputs) -> float:
            # Sums differ in their last bits, so experts whose votes tie may too.
            logits, pools, _, allowed, _, k, budget, _ = inputs
            weights, ids = softmax_route(logits.float().cpu(), k, True)
            wanted = vote(weights, ids, pools.cpu(), logits.shape[1], budget)
            return unequal(allowed, wanted.to(torch.uint8))

        def run(inputs: Any = inputs) -> None:
            own.expert_vote(*inputs)

        task = f"{requests}x{rows} rows, {k} of {experts} experts, {budget} by vote"
        work = own.work(total, requests, experts, k, logits.element_size())
        yield Case("expert_vote", task, "own", run, work, error, 1e-3)


def ffn_union_cases(bench: Bench) -> Iterator[Case]:
    """Channels open for some row, of 14,336."""
    from vllm_specplug.kernels import ffn_union_triton as own

    for requests, rows, width in bench.shapes((2, 3, 300), (64, 17, 14336), (1, 17, 14336)):
        act = torch.randn(requests * rows, width, device=bench.device, dtype=bench.dtype)
        on = {"device": bench.device, "dtype": torch.int32}
        pools = torch.arange(requests + 1, **on) * rows
        mask = torch.empty(requests, width, device=bench.device, dtype=torch.bool)
        channels, counts, tau = torch.empty(requests, width, **on), torch.empty(requests, **on), 1.5
        inputs = (act, pools, mask, channels, counts, own.Workspace(requests, width, bench.device), tau)

        def error(inputs: Any = inputs, shape: Any = (requests, rows, width)) -> float:
            act, _, mask, _, counts, _, tau = inputs
            wanted = ~(act.float().abs() < tau).reshape(shape).all(1)
            return max(unequal(mask, wanted.cpu()), unequal(counts, wanted.sum(1).cpu()))

        def run(inputs: Any = inputs) -> None:
            own.ffn_union(*inputs)

        work = own.work(requests * rows, requests, width, act.element_size())
        yield Case("ffn_union", f"{requests}x{rows} rows, {width} channels", "own", run, work, error)


CASES: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "tree_attention": tree_attention_cases,
    "sparse_attention": sparse_attention_cases,
    "kv_move": kv_move_cases,
    "tree_walk": tree_walk_cases,
    "tree_rows": tree_rows_cases,
    "recycling_matrix": recycling_cases,
    "block_select": block_select_cases,
    "suffix_match": suffix_match_cases,
    "expert_vote": expert_vote_cases,
    "ffn_union": ffn_union_cases,
}
