"""Whether an architecture computes what transformers' own modules put out, at every site of every layer."""

from __future__ import annotations

import torch
from oracles import tracing as oracle
from oracles.model import hooked, precision, sites
from torch import Tensor
from transformers import PreTrainedModel

import causalcone as cc
from causalcone.engine.models import read_architecture
from helpers.compare import assert_same, restored_share
from helpers.models import FACTS, tokenizer
from helpers.plain_blocks import TOKENS, Values, assert_same_values, run_blocks

LIFTED, UNMODIFIED, SINGLE = 1e-9, 5e-6, 1e-5


def assert_exact_at_sites(model: PreTrainedModel) -> None:
    """A float64 model is met to 1e-9 once transformers computes in float64 throughout, and to 5e-6 as it is; the same
    model in float32 to 1e-5."""
    assert_same_at_sites(model, lift=True, tolerance=LIFTED)
    assert_same_at_sites(model, lift=False, tolerance=UNMODIFIED)
    assert_same_at_sites(model.float(), lift=False, tolerance=SINGLE)


def assert_same_at_sites(model: PreTrainedModel, lift: bool, tolerance: float) -> None:
    found = run_blocks(read_architecture(model), TOKENS, model.dtype)
    right = values_at_sites(model, lift)
    assert {values.dtype for values in vars(found).values()} == {model.dtype}
    assert right.log_p.std() > 0.5
    assert_same_values(found, right, tolerance)


@torch.no_grad()
def values_at_sites(model: PreTrainedModel, lift: bool) -> Values:
    """What the modules of the model put out where the oracle restores and zeroes."""
    seen: dict[str, list[Tensor]] = {"attn": [], "mlp": [], "hidden": []}
    hooks = [
        (layer[name], lambda values, kept=kept: kept.append(values[0].clone()))
        for layer in sites(model)
        for name, kept in seen.items()
    ]
    with hooked(hooks, batch=1), precision(model, lift):
        logits = model(torch.tensor([TOKENS]), use_cache=False).logits[0]
    embeddings = model.get_input_embeddings()(torch.tensor(TOKENS))
    stacks = {name: torch.stack(kept) for name, kept in seen.items()}
    return Values(embeddings=embeddings, **stacks, log_p=logits.log_softmax(-1))


def assert_traced(model: PreTrainedModel) -> None:
    """Tracing a float64 model gives the numbers of the plain computation."""
    options = {"states": (("hidden", 1), ("mlp", 2), ("attn", 3), ("head.0", 1)), "samples": 2, "sigma": 0.5}
    table = cc.Tracer(model, tokenizer()).trace(FACTS[1:4], **options)
    rows = oracle.trace(model, tokenizer(), FACTS[1:4], **options)
    assert restored_share(rows) > 0.1
    assert_same(table, rows)
