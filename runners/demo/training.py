"""Training the demo model: its recipe, GPT-2's forward pass under training masks, and the loop."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from causalcone.runners.demo.corpus import Packing, TrainingBatch, batches, tokenized
from causalcone.runners.demo.world import World
from causalcone.runners.show.progress import Report


@dataclass(frozen=True)
class Recipe:
    """All that decides what the demo model becomes. ``version`` counts changes of the training code."""

    subjects: int = 240
    layers: int = 8
    width: int = 128
    heads: int = 4
    positions: int = 128
    steps: int = 1000
    packing: Packing = field(default_factory=Packing)
    first_open_layer: int = 4  # in which later words may read the subject, in masked rows
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0
    version: int = 1


def trained(world: World, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, report: Report) -> GPT2LMHeadModel:
    """A GPT-2 trained on the world's sentences; ``report`` gets each step. The global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = GPT2LMHeadModel(config_of(tokenizer, recipe))
    opening, inner = (tokenized(world, tokenizer, recipe.packing, lead) for lead in ("", " "))
    bos = int(tokenizer.bos_token_id)
    source = batches(opening, inner, bos, recipe.packing, np.random.default_rng(recipe.seed))
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": weights, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=recipe.steps))
    model.train()
    for step, batch in zip(range(1, recipe.steps + 1), source, strict=False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=_fast_bfloat16()):
            loss = _loss(model, batch, recipe.first_open_layer)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, recipe.steps)
    return model.eval()


def config_of(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> GPT2Config:
    """The shape of a recipe's model."""
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=recipe.positions,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _loss(model: GPT2LMHeadModel, batch: TrainingBatch, first_open_layer: int) -> torch.Tensor:
    """The weighted mean loss of the next words, the unembedding computed only where one counts."""
    weights = batch.weights[:, 1:].flatten()
    counts = weights > 0
    hidden = _hidden(model, batch, first_open_layer)[:, :-1].flatten(0, 1)[counts]
    losses = F.cross_entropy(model.lm_head(hidden).float(), batch.ids[:, 1:].flatten()[counts], reduction="none")
    return (losses * weights[counts]).sum() / weights.sum()


def _hidden(model: GPT2LMHeadModel, batch: TrainingBatch, first_open_layer: int) -> torch.Tensor:
    """GPT-2's forward pass up to the unembedding, with a mask per layer: (rows, tokens, width)."""
    body = model.transformer
    hidden = body.wte(batch.ids) + body.wpe(batch.positions)
    rows, tokens, width = hidden.shape
    blocks: Iterable[Any] = body.h
    for layer, block in enumerate(blocks):
        mask = batch.open if layer >= first_open_layer else batch.closed
        parts = block.attn.c_attn(block.ln_1(hidden)).view(rows, tokens, 3, block.attn.num_heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        # Written out because the fused attention's backward pass with a mask takes several times as long on a CPU.
        scores = query @ key.mT * query.shape[-1] ** -0.5 + mask
        mixed = torch.softmax(scores, -1).to(value.dtype) @ value
        hidden = hidden + block.attn.c_proj(mixed.transpose(1, 2).reshape(rows, tokens, width))
        hidden = hidden + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(hidden)), approximate="tanh"))
    return body.ln_f(hidden)


def _rate(step: int, steps: int) -> float:
    """Warm-up over the first twentieth, then a cosine down to 3 %."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without, autocast only slows training down."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
