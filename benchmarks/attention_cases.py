"""Cases of `bench_kernels.py`: attention of trees over a paged cache, whole and in part, and PyTorch's in its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from kernel_case import Bench, Case, relative


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
