"""What `bench_kernels.py` times: cases of each Triton kernel, with their checks, their least work and their peers.

Shapes are large and of a GPU; ``dry`` ones are tiny, float32 and for Triton's interpreter on the CPU, where they only
show that the cases are right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Bench:
    """What the cases are made for.

    Attributes:
        dry: tiny shapes on the CPU.
        quick: one shape of the large ones.
        peers: names of those to run.
    """

    dry: bool = False
    quick: bool = False
    peers: tuple[str, ...] = ("sdpa", "flex", "xformers")
    seed: int = 0

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16

    def shapes(self, tiny: Any, *large: Any) -> tuple[Any, ...]:
        """The shapes to run."""
        return (tiny,) if self.dry else large[:1] if self.quick else large


@dataclass
class Case:
    """One thing to time.

    Attributes:
        kernel, task, provider: for the result's row; ``provider`` "own" is this plugin's.
        run: launches it.
        work: least bytes and operations; None: no roofline is given.
        error: how far the result is from its definition, after a run; None: a peer that was checked elsewhere.
        allowed: largest such error.
    """

    kernel: str
    task: str
    provider: str
    run: Callable[[], Any]
    work: Any = None
    error: Callable[[], float] | None = None
    allowed: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.kernel} {self.task} [{self.provider}]"


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """``|found - wanted| / |wanted|``; infinite where something is not a number."""
    difference = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    return float(difference.nan_to_num(torch.inf))


def unequal(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Share of entries that differ."""
    return float((found.cpu() != wanted.cpu()).float().mean())


class Paged:
    """A step of verify rows over a paged KV cache, with random trees.

    Attributes:
        visible: ``bool[n, rows, rows]`` which rows of its request each row sees.
    """

    def __init__(self, bench: Bench, requests: int, rows: int, context: int, heads: int, kv_heads: int, size: int):
        from vllm_specplug.kernels.tree_attention_triton import bits_of_parents

        torch.manual_seed(bench.seed)
        draw = np.random.default_rng(bench.seed)
        self.shape = (requests, rows, context, heads, kv_heads, size)
        self.block, device = 16, bench.device
        per_request = -(-(context + rows) // self.block)
        blocks = torch.randperm(requests * per_request, device=device, dtype=torch.int32)
        self.table = blocks.reshape(requests, per_request)
        cache = torch.randn(len(blocks), 2, self.block, kv_heads, size, device=device, dtype=bench.dtype)
        self.keys, self.values = cache.unbind(1)
        self.query = torch.randn(requests * rows, heads, size, device=device, dtype=bench.dtype)
        self.starts = torch.arange(requests + 1, device=device, dtype=torch.int32) * rows
        self.lengths = torch.full((requests,), context + rows, device=device, dtype=torch.int32)
        parents = [[-1, *(int(draw.integers(0, m)) for m in range(1, rows))] for _ in range(requests)]
        flat = np.concatenate([np.array(p, np.int32) for p in parents])
        self.bits = torch.from_numpy(bits_of_parents(np.full(requests, rows, np.int32), flat)).to(device)
        sees = np.zeros((requests, rows, rows), np.bool_)
        for i, of_request in enumerate(parents):
            for m, parent in enumerate(of_request):
                if parent >= 0:
                    sees[i, m] = sees[i, parent]
                sees[i, m, m] = True
        self.visible = torch.from_numpy(sees).to(device)
        self.out = torch.empty_like(self.query)
        self.scale = size**-0.5

    def dense(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What peers take: query ``[n, heads, rows, size]``, keys and values ``[n, kv_heads, slots, size]``."""
        requests, rows, context, heads, kv_heads, size = self.shape
        slots = context + rows
        query = self.query.reshape(requests, rows, heads, size).transpose(1, 2).contiguous()
        found = []
        for cache in (self.keys, self.values):
            gathered = cache[self.table.long()].reshape(requests, -1, kv_heads, size)[:, :slots]
            found.append(gathered.transpose(1, 2).contiguous())
        return query, *found

    def wanted(self, request: int) -> torch.Tensor:
        """``float64[rows, heads, size]``: the definition, for one request."""
        _, rows, context, heads, kv_heads, size = self.shape
        slots = context + rows
        table = self.table[request].long()
        keys, values = (c[table].reshape(-1, kv_heads, size)[:slots].double() for c in (self.keys, self.values))
        keys, values = (x.repeat_interleave(heads // kv_heads, 1) for x in (keys, values))
        query = self.query[request * rows : (request + 1) * rows].double()
        scores = torch.einsum("rhd,khd->hrk", query, keys) * self.scale
        scores[:, :, context:] = scores[:, :, context:].masked_fill(~self.visible[request], -torch.inf)
        return torch.einsum("hrk,khd->rhd", scores.softmax(-1), values)

    def error(self) -> float:
        rows = self.shape[1]
        picked = sorted({0, len(self.lengths) // 2, len(self.lengths) - 1})
        return max(relative(self.out[i * rows : (i + 1) * rows], self.wanted(i)) for i in picked)


def tree_attention_cases(bench: Bench) -> Iterator[Case]:
    """64 requests of 16 rows (a root and 15 nodes), and of 17, over long contexts; PyTorch's attention over contiguous
    keys with a mask."""
    from vllm_specplug.kernels import tree_attention_triton as own
    from vllm_specplug.kernels.attention_triton import AttentionPlan, plan_splits

    large = [(64, 16, c, 32, 8, 128) for c in (2048, 8192, 32768)] + [
        (64, 17, 8192, 32, 8, 128),
        (1, 16, 32768, 32, 8, 128),
        (64, 16, 2048, 9, 3, 64),
    ]
    for requests, rows, context, heads, kv_heads, size in bench.shapes((3, 5, 70, 4, 2, 32), *large):
        step = Paged(bench, requests, rows, context, heads, kv_heads, size)
        of_model = (heads, kv_heads, size, bench.dtype, bench.device)
        plan = AttentionPlan(requests * rows, requests, rows, *of_model, *plan_splits(requests, kv_heads, context))
        task = f"{requests}x{rows} context {context} heads {heads}/{kv_heads}x{size}"
        work = own.work([context] * requests, [rows] * requests, heads, kv_heads, size, bench.dtype)

        def run(step: Paged = step, plan: Any = plan) -> None:
            own.tree_attention(
                *(plan, step.query, step.keys, step.values, step.table, step.starts, step.lengths, step.bits),
                *(step.out, step.scale),
            )

        yield Case("tree_attention", task, "own", run, work, step.error, 1e-2)
        yield from _attention_peers(bench, step, task, work)
        del step, plan, run


def _attention_peers(bench: Bench, step: Paged, task: str, work: Any) -> Iterator[Case]:
    requests, rows, context, heads, kv_heads, _ = step.shape
    query, keys, values = step.dense()
    results: dict[str, torch.Tensor] = {}

    def error(name: str) -> float:
        found = results[name].transpose(1, 2).reshape(step.query.shape)
        return max(relative(found[i * rows : (i + 1) * rows], step.wanted(i)) for i in (0, requests - 1))

    if "sdpa" in bench.peers:
        mask = torch.ones(requests, 1, rows, context + rows, dtype=torch.bool, device=bench.device)
        mask[:, 0, :, context:] = step.visible
        attend = torch.nn.functional.scaled_dot_product_attention

        def sdpa() -> None:
            results["sdpa"] = attend(query, keys, values, attn_mask=mask, scale=step.scale, enable_gqa=True)

        yield Case("tree_attention", task, "torch.sdpa", sdpa, work, lambda: error("sdpa"), 1e-2)
    if "flex" in bench.peers:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        visible = step.visible

        def sees(b: Any, h: Any, q: Any, k: Any) -> Any:
            own_row = torch.clamp(k - context, min=0)
            return (k < context) | visible[b, q, own_row]

        blocks = create_block_mask(sees, requests, None, rows, context + rows, device=bench.device)
        compiled = torch.compile(flex_attention, dynamic=False)

        def flex() -> None:
            results["flex"] = compiled(query, keys, values, block_mask=blocks, scale=step.scale, enable_gqa=True)

        yield Case("tree_attention", task, "torch.flex_attention", flex, work, lambda: error("flex"), 1e-2)
    if "xformers" in bench.peers:
        try:
            from xformers.ops import memory_efficient_attention
        except ImportError:
            return
        group = heads // kv_heads
        bias = torch.zeros(requests, 1, rows, -(-(context + rows) // 8) * 8, device=bench.device, dtype=bench.dtype)
        bias[:, 0, :, context : context + rows].masked_fill_(~step.visible, -torch.inf)
        bias = bias[..., : context + rows].expand(-1, heads, -1, -1)
        q = query.transpose(1, 2)
        k, v = (x.repeat_interleave(group, 1).transpose(1, 2) for x in (keys, values))

        def xformers() -> None:
            results["xformers"] = memory_efficient_attention(q, k, v, attn_bias=bias, scale=step.scale).transpose(1, 2)

        yield Case("tree_attention", task, "xformers", xformers, work, lambda: error("xformers"), 1e-2)


def sparse_attention_cases(bench: Bench) -> Iterator[Case]:
    """A tenth of a long context's units, against the whole of it by the kernel above."""
    from vllm_specplug.kernels import sparse_attention_triton as own
    from vllm_specplug.kernels import tree_attention_triton as dense
    from vllm_specplug.kernels.attention_triton import AttentionPlan, plan_splits

    unit = 16  # a block
    large = [(n, 16, c, 32, 8, 128) for n, c in ((64, 32768), (1, 32768), (64, 8192))]
    for requests, rows, context, heads, kv_heads, size in bench.shapes((2, 5, 700, 4, 2, 32), *large):
        step = Paged(bench, requests, rows, context, heads, kv_heads, size)
        tail = (context - 64) // step.block * step.block // unit * unit
        units, taken = tail // unit, tail // unit // 10
        score = torch.rand(requests, kv_heads, units, device=bench.device)
        chosen = score.topk(taken, -1).indices.sort(-1).values.int().contiguous()
        counts = torch.full((requests, kv_heads), taken, dtype=torch.int32, device=bench.device)
        tails = torch.full((requests,), tail, dtype=torch.int32, device=bench.device)
        of_model = (heads, kv_heads, size, bench.dtype, bench.device)
        plan = AttentionPlan(requests * rows, requests, rows, *of_model, *plan_splits(requests, kv_heads, context))
        task = f"{requests}x{rows} context {context} heads {heads}/{kv_heads}x{size} 10% of units"
        attended = taken * unit + context + rows - tail
        inputs = (plan, step.query, step.keys, step.values, step.table, step.starts, step.lengths, step.bits, step.out)

        def error(step: Paged = step, chosen: torch.Tensor = chosen, tail: int = tail) -> float:
            _, rows, context, heads, kv_heads, size = step.shape
            keys, values = (
                c[step.table[0].long()].reshape(-1, kv_heads, size).double() for c in (step.keys, step.values)
            )
            group, slots = heads // kv_heads, context + rows
            seen = torch.zeros(kv_heads, rows, slots, dtype=torch.bool, device=step.query.device)
            seen[:, :, tail:] = True
            seen[:, :, context:] = step.visible[0]
            for head in range(kv_heads):
                at = (chosen[0, head].long()[:, None] * unit + torch.arange(unit, device=step.query.device)).flatten()
                seen[head, :, at] = True
            query = step.query[:rows].double().reshape(rows, kv_heads, group, size)
            scores = torch.einsum("rkgd,skd->kgrs", query, keys[:slots]) * step.scale
            weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
            wanted = torch.einsum("kgrs,skd->rkgd", weights, values[:slots]).reshape(rows, heads, size)
            return relative(step.out[:rows], wanted)

        work = own.work([attended] * requests, [rows] * requests, heads, kv_heads, size, bench.dtype)
        choice = (chosen, counts, tails)

        def run(inputs: Any = inputs, step: Paged = step, choice: Any = choice) -> None:
            own.sparse_attention(*inputs, step.scale, unit, *choice)

        yield Case("sparse_attention", task, "own", run, work, error, 1e-2)
        whole = dense.work([context] * requests, [rows] * requests, heads, kv_heads, size, bench.dtype)

        def all_of_it(inputs: Any = inputs, step: Paged = step) -> None:
            dense.tree_attention(*inputs, step.scale)

        yield Case("sparse_attention", task, "own, dense", all_of_it, whole, step.error, 1e-2)
        del step, plan, inputs, run, all_of_it, error


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
    "recycling_matrix": recycling_cases,
    "block_select": block_select_cases,
    "suffix_match": suffix_match_cases,
    "expert_vote": expert_vote_cases,
    "ffn_union": ffn_union_cases,
}
