"""One sequence through an architecture's blocks, layer by layer, as a reader would write it; and what the model itself
computes at the same places, recorded by forward hooks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from causalcone.engine.models import read_architecture
from causalcone.engine.models.base import Architecture, Block
from causalcone.kernels.attention import attend
from helpers.lifting import lifted

TOKENS = (5, 7, 300, 12, 45, 45, 9, 100, 33, 34, 2)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}

MIDS = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral", "qwen2", "qwen3", "seed_oss", "cwm", "smollm3", "granite", "phi3"),
            *("starcoder2", "gemma"),
        ),
        "post_attention_layernorm",
    ),
    **dict.fromkeys(("gemma2", "gemma3_text"), "pre_feedforward_layernorm"),
    **dict.fromkeys(("olmo2", "olmo3"), "mlp"),
}
"""By family with layers like Llama's: the module of a layer that takes in the residual stream after attention."""


@dataclass(frozen=True)
class Values:
    """Of a sequence: the token embeddings (T, hidden); for every layer what attention and MLP add to the residual
    stream and what the layer puts out, each (layers, T, hidden); and log-probabilities (T, vocabulary)."""

    embeddings: Tensor
    attn: Tensor
    mlp: Tensor
    hidden: Tensor
    log_p: Tensor


@torch.no_grad()
def run_blocks(architecture: Architecture, tokens: Sequence[int], dtype: torch.dtype) -> Values:
    """Everything an architecture computes of a prompt, in ``dtype``."""
    device = architecture.unembedding()[0].device
    positions = torch.arange(len(tokens), device=device)
    embeddings = architecture.embed(torch.tensor(tokens)).to(dtype)
    attns, mlps, hiddens = [], [], []

    rows = architecture.enter(embeddings, positions)
    for layer in range(architecture.sizes.depth):
        block = architecture.block(layer, dtype, device)
        attn = attention(block, rows, positions)
        mlp = block.mlp(rows if architecture.parallel else rows + attn)
        rows = rows + attn + mlp
        attns.append(attn)
        mlps.append(mlp)
        hiddens.append(rows)

    weight, bias = architecture.unembedding()
    logits = architecture.final_norm(rows) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    if architecture.logit_softcap is not None:
        logits = architecture.logit_softcap * torch.tanh(logits / architecture.logit_softcap)
    return Values(embeddings, torch.stack(attns), torch.stack(mlps), torch.stack(hiddens), logits.log_softmax(-1))


def attention(block: Block, rows: Tensor, positions: Tensor) -> Tensor:
    """What attention adds to the residual stream (T, hidden) of a sequence whose layer input is rows (T, hidden)."""
    queries = block.queries(rows, positions).view(1, len(rows), -1, block.head_dim)
    keys, values = block.keys_values(rows, positions).view(1, len(rows), 2, -1, block.head_dim).unbind(2)
    visible = positions[None] <= positions[:, None]
    if block.window is not None:
        visible &= positions[None] > positions[:, None] - block.window
    heads = attend(queries, keys, values, visible, block.scale, block.softcap)
    return block.attention_output(heads.flatten(2)[0])


@torch.no_grad()
def run_model(model: nn.Module, tokens: Sequence[int], blocks: str, mid: str, lift: bool = True) -> Values:
    """Everything the model itself computes of a prompt; a float64 model in float64 throughout, unless not to ``lift``.

    ``blocks`` names the list of layers, ``mid`` the module of a layer that takes in the residual stream after
    attention. What attention and MLP add to it are then differences, whatever norms or factors lie in between.
    """
    entered: list[Tensor] = []
    mids: list[Tensor] = []
    left: list[Tensor] = []
    embeddings: list[Tensor] = []

    def record(values: list[Tensor], value: Any) -> None:
        values.append((value[0] if isinstance(value, tuple) else value)[0])

    embedding = model.get_input_embeddings()
    handles = [embedding.register_forward_hook(lambda module, args, out: record(embeddings, out))]
    for block in model.get_submodule(blocks):
        handles += [
            block.register_forward_pre_hook(lambda module, args: record(entered, args)),
            block.get_submodule(mid).register_forward_pre_hook(lambda module, args: record(mids, args)),
            block.register_forward_hook(lambda module, args, out: record(left, out)),
        ]
    with lifted() if lift and model.dtype == torch.float64 else nullcontext():
        logits = model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()

    inputs, middle, hidden = torch.stack(entered), torch.stack(mids), torch.stack(left)
    return Values(embeddings[0], middle - inputs, hidden - middle, hidden, logits.log_softmax(-1))


def assert_same_values(found: Values, right: Values, tolerance: float) -> None:
    """The largest difference at every place is within the tolerance, relative to the largest value there."""
    for name, expected in vars(right).items():
        values = getattr(found, name)
        assert values.shape == expected.shape, name
        difference = (values - expected).abs().max() / max(1.0, expected.abs().max())
        assert difference <= tolerance, f"{name}: {difference:.2g}"


def assert_exact(model: nn.Module, mid: str, blocks: str = "model.layers", tokens: Sequence[int] = TOKENS) -> None:
    """The architecture that reads the model computes what the model computes, in the model's dtype."""
    found = run_blocks(read_architecture(model), tokens, model.dtype)
    assert_same_values(found, run_model(model, tokens, blocks, mid), TOLERANCE[model.dtype])
