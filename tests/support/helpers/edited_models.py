"""What tests of edited models share: random changes of weights, and what is to be seen of a model."""

import re

import torch

from causalcone.engine.edit.deltas.delta import Dense, LowRank

IDS = torch.tensor([[5, 17, 230, 41, 8, 99]])
DOWN = r".*\.{}\.(mlp\.(c_proj|fc_out|dense_4h_to_h|down_proj|fc2)|fc2)"


def down(model, layer):
    """The MLP's last projection, found without asking the engine."""
    (found,) = (module for name, module in model.named_modules() if re.fullmatch(DOWN.format(layer), name))
    return found


def sizes(model):
    """(hidden, inner) of the down-projections."""
    shape = down(model, 0).weight.shape
    return model.config.hidden_size, next(size for size in shape if size != model.config.hidden_size)


def seen(model, layer):
    """The down-projection's weight as (out, in)."""
    module = down(model, layer)
    return module.weight.detach() if isinstance(module, torch.nn.Linear) else module.weight.detach().T


def normal(*shape, seed=0, size=0.1, dtype=torch.float64):
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def low_rank(model, rank=2, seed=0, **options):
    hidden, inner = sizes(model)
    return LowRank(normal(hidden, rank, seed=seed, **options), normal(inner, rank, seed=seed + 1, **options))


def dense(model, seed=0, bias=True, **options):
    hidden, inner = sizes(model)
    return Dense(
        normal(hidden, inner, seed=seed, **options), normal(hidden, seed=seed + 1, **options) if bias else None
    )


def bits(model):
    """Every parameter's bytes by name."""
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {name: p.contiguous().view(torch.uint8).numpy().tobytes() for name, p in parameters.items()}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits[0]
