"""A mixture-of-experts model from a dense one: each feed-forward layer's channels split into experts, with a router.

No mixture of experts is small enough to be carried by a package, and one of random weights routes at random, so what
sparse routing costs could not be seen on it. After MoEfication (arXiv 2110.01786): channels that are active together
become an expert, and the router is fitted to the experts' activity. Differences: the channels that are always busy
form a shared expert, and the router is linear.

Saved as Qwen2-MoE, whose routing weights are shares of a softmax over all experts. An expert's part of a dense layer
has the weight 1, so the logits are kept nearly equal, all weights nearly ``1 / experts``, and the experts' outputs are
scaled by ``experts``. The sum is then right for any number of experts per token, and with all of them it is the dense
layer's but for :data:`SPREAD`. What the router's weights tell is an order, not a share of the output.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

EXPERTS = 24
#: Channels of an expert: what vLLM's CPU kernel computes at once.
EXPERT_SIZE = 32
EXPERTS_PER_TOKEN = 12
#: First layers that stay dense. Splitting a third of the layers costs most there.
DENSE_LAYERS = 10
#: Standard deviation of a token's router logits. It orders the experts; more would scale their outputs apart.
SPREAD = 0.02
#: Calibration: texts by the model itself, and pages of Python's language reference; tokens of each.
OWN_TEXTS, PAGES, TEXT_TOKENS = 32, 8, 128

_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
_ROUNDS = 8
_RIDGE = 1e-3


def split(source: Path, target: Path, seed: int = 0) -> None:
    """Write a mixture of experts made from the Llama checkpoint at ``source`` to ``target``; takes 2 minutes of a core.

    The result depends on the checkpoint, ``seed`` and the installed Python and PyTorch, whose text and random numbers
    it is calibrated with.

    Raises:
        ValueError: the layers have too few channels for the experts.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    channels = int(model.config.intermediate_size)
    if channels <= EXPERTS * EXPERT_SIZE:
        raise ValueError(
            f"{source}: {channels} channels cannot hold {EXPERTS} experts of {EXPERT_SIZE} and a shared one"
        )
    tokenizer = AutoTokenizer.from_pretrained(source)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        texts = calibration_texts(model, tokenizer)
        inputs, activity = _observe(model.float(), texts)
        weights = dict(model.to(torch.float32).state_dict())
        for layer, (x, channel) in enumerate(zip(inputs, activity, strict=True), start=DENSE_LAYERS):
            _split_layer(weights, layer, x, channel)
    _save(model.config, weights, source, target)


def calibration_texts(model: Any, tokenizer: Any) -> torch.Tensor:
    """Token ids ``[OWN_TEXTS + PAGES, TEXT_TOKENS]``: chats that ``model`` writes, drawn from PyTorch's random
    numbers, and parts of Python's language reference, which every Python carries."""
    from pydoc_data import topics

    start = tokenizer(_SYSTEM + "<|im_start|>user\n", add_special_tokens=False)["input_ids"]
    prompt = torch.tensor([start] * OWN_TEXTS)
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        temperature=0.8,
        top_k=0,
        max_new_tokens=TEXT_TOKENS,
        min_new_tokens=TEXT_TOKENS,
        pad_token_id=0,
    )[:, -TEXT_TOKENS:]
    reference = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    part = len(reference) // PAGES
    # A token is at least one character, and 8 characters hold one in any text.
    pages = [
        tokenizer(reference[i * part : i * part + 8 * TEXT_TOKENS], add_special_tokens=False)["input_ids"][:TEXT_TOKENS]
        for i in range(PAGES)
    ]
    return torch.cat([written, torch.tensor(pages)])


def _observe(model: Any, texts: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of each layer to be split: inputs of its feed-forward part ``[tokens, hidden]``, and what each channel adds to
    the output, ``[tokens, channels]`` squared lengths; both float16 to save memory."""
    layers = list(model.model.layers)[DENSE_LAYERS:]
    inputs: list[list[torch.Tensor]] = [[] for _ in layers]
    activity: list[list[torch.Tensor]] = [[] for _ in layers]
    hooks = []
    for i, layer in enumerate(layers):
        lengths = layer.mlp.down_proj.weight.norm(dim=0)
        hooks += [
            layer.mlp.register_forward_pre_hook(
                lambda module, args, kept=inputs[i]: kept.append(args[0].flatten(0, 1).half())
            ),
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda module, args, kept=activity[i], lengths=lengths: kept.append(
                    # Its root fits float16's range.
                    (args[0].flatten(0, 1).abs() * lengths).half()
                )
            ),
        ]
    for batch in texts.split(8):
        model(batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(x) for x in inputs], [torch.cat(a) for a in activity]


def _split_layer(weights: dict[str, torch.Tensor], layer: int, inputs: torch.Tensor, activity: torch.Tensor) -> None:
    """Replace a layer's dense weights in ``weights`` by a shared expert, experts and a router."""
    mlp = f"model.layers.{layer}.mlp"
    gate, up, down = (weights.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
    x, lengths = inputs.float(), activity.float()
    squares = lengths.square()
    busy = (squares / squares.sum(dim=1, keepdim=True)).mean(dim=0).argsort(descending=True)
    cut = len(busy) - EXPERTS * EXPERT_SIZE
    shared, routed = busy[:cut].sort().values, busy[cut:].sort().values
    members = [routed[group] for group in _groups(lengths[:, routed].T, EXPERTS)]

    weights[f"{mlp}.shared_expert.gate_proj.weight"] = gate[shared]
    weights[f"{mlp}.shared_expert.up_proj.weight"] = up[shared]
    # Its gate's sigmoid is a half at weights of zero.
    weights[f"{mlp}.shared_expert.down_proj.weight"] = down[:, shared] * 2
    weights[f"{mlp}.shared_expert_gate.weight"] = torch.zeros(1, gate.shape[1])
    for expert, own in enumerate(members):
        weights[f"{mlp}.experts.{expert}.gate_proj.weight"] = gate[own]
        weights[f"{mlp}.experts.{expert}.up_proj.weight"] = up[own]
        weights[f"{mlp}.experts.{expert}.down_proj.weight"] = down[:, own] * EXPERTS

    wanted = torch.stack([squares[:, own].sum(dim=1) for own in members], dim=1).sqrt()
    wanted -= wanted.mean(dim=1, keepdim=True)
    seen = x.T @ x
    seen += _RIDGE * seen.diagonal().mean() * torch.eye(len(seen))
    router = torch.linalg.solve(seen, x.T @ wanted)
    logits = x @ router
    weights[f"{mlp}.gate.weight"] = (router * (SPREAD / (logits - logits.mean(dim=1, keepdim=True)).std())).T


def _groups(features: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Indices of ``count`` equally large groups of rows of ``features`` that point alike."""
    unit = features / features.norm(dim=1, keepdim=True).clamp_min(1e-9)
    size = len(unit) // count
    # Start from rows that are far from each other, so that nothing is left to chance.
    starts = [0]
    distance = 1 - unit @ unit[0]
    while len(starts) < count:
        starts.append(int(distance.argmax()))
        distance = torch.minimum(distance, 1 - unit @ unit[starts[-1]])
    centres = unit[starts]
    groups: list[list[int]] = []
    for _ in range(_ROUNDS):
        likeness = unit @ centres.T
        best = likeness.topk(2, dim=1).values
        groups = [[] for _ in range(count)]
        wishes = likeness.argsort(dim=1, descending=True).tolist()
        # Who would lose most by a second choice chooses first.
        for row in (best[:, 0] - best[:, 1]).argsort(descending=True).tolist():
            groups[next(group for group in wishes[row] if len(groups[group]) < size)].append(row)
        centres = torch.stack([unit[group].mean(dim=0) for group in groups])
        centres /= centres.norm(dim=1, keepdim=True).clamp_min(1e-9)
    return [torch.tensor(sorted(group)) for group in groups]


def _save(config: Any, weights: dict[str, torch.Tensor], source: Path, target: Path) -> None:
    from safetensors.torch import save_file
    from transformers import Qwen2MoeConfig

    dtype = json.loads((source / "config.json").read_text())["dtype"]
    for layer in range(config.num_hidden_layers):
        for name in "qkv":
            projection = f"model.layers.{layer}.self_attn.{name}_proj"
            # Qwen2-MoE's have biases.
            weights[f"{projection}.bias"] = torch.zeros(len(weights[f"{projection}.weight"]))
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, target)
    save_file(
        {name: value.to(getattr(torch, dtype)).contiguous() for name, value in weights.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "hidden_act max_position_embeddings initializer_range rms_norm_eps rope_parameters tie_word_embeddings "
        "bos_token_id eos_token_id pad_token_id"
    )
    made = Qwen2MoeConfig(
        **{name: getattr(config, name) for name in same.split()},
        architectures=["Qwen2MoeForCausalLM"],
        dtype=dtype,
        decoder_sparse_step=1,
        mlp_only_layers=list(range(DENSE_LAYERS)),
        num_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        moe_intermediate_size=EXPERT_SIZE,
        shared_expert_intermediate_size=config.intermediate_size - EXPERTS * EXPERT_SIZE,
        norm_topk_prob=False,
        use_sliding_window=False,
    )
    made.save_pretrained(target)
