"""An unmodified model of transformers under forward hooks: where each family keeps the values that experiments change.

What a module adds to the residual stream is what counts as its value: where a family norms the output of attention or
MLP once more, that is the norm's output. (Granite then multiplies it by a constant; overwriting it, zeroing it and
integrating its gradients give the same numbers before and after that.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from helpers.lifting import lifted
from torch import Tensor, nn

from oracles.facts import Case

Edit = Callable[[Tensor], None]


@dataclass(frozen=True)
class Layout:
    """Names of modules: the list of blocks in the model, and in a block those whose outputs enter the residual stream,
    and the projection that takes in all heads' outputs."""

    blocks: str
    attn: str
    mlp: str
    projection: str


LIKE_LLAMA = (
    "llama",
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "seed_oss",
    "cwm",
    "smollm3",
    "granite",
    "phi3",
    "gemma",
    "starcoder2",
)
WITH_OUTPUT_NORMS = ("gemma2", "gemma3_text", "olmo2", "olmo3")
LAYOUTS = {
    "gpt2": Layout("transformer.h", "attn", "mlp", "attn.c_proj"),
    "gptj": Layout("transformer.h", "attn", "mlp", "attn.out_proj"),
    "gpt_neo": Layout("transformer.h", "attn", "mlp", "attn.attention.out_proj"),
    "gpt_neox": Layout("gpt_neox.layers", "attention", "mlp", "attention.dense"),
    "opt": Layout("model.decoder.layers", "self_attn", "fc2", "self_attn.out_proj"),
    "phi": Layout("model.layers", "self_attn", "mlp", "self_attn.dense"),
    **dict.fromkeys(LIKE_LLAMA, Layout("model.layers", "self_attn", "mlp", "self_attn.o_proj")),
    **dict.fromkeys(
        WITH_OUTPUT_NORMS,
        Layout("model.layers", "post_attention_layernorm", "post_feedforward_layernorm", "self_attn.o_proj"),
    ),
}


@dataclass(frozen=True)
class Site:
    """A place in a model: what a module puts out, or the part of what enters it that is one head's."""

    module: nn.Module
    head: int | None = None
    heads: int = 1

    def of(self, values: Tensor) -> Tensor:
        """A view of the values (B, T, width) that belong to the site."""
        return values if self.head is None else values.unflatten(2, (self.heads, -1))[:, :, self.head]

    def hook(self, edit: Edit, batch: int) -> torch.utils.hooks.RemovableHandle:
        """Let ``edit`` change, in place, a copy of the site's values (B, T, width) whenever the module runs."""

        def edited(values: Tensor) -> Tensor:
            copy = values.clone(memory_format=torch.contiguous_format)
            edit(self.of(copy.view(batch, -1, values.shape[-1])))  # fc2 of OPT sees all tokens of the batch in a row
            return copy

        def edit_first(values: Any) -> Any:
            return (edited(values[0]), *values[1:]) if isinstance(values, tuple) else edited(values)

        if self.head is not None:
            return self.module.register_forward_pre_hook(lambda module, inputs: edit_first(inputs))
        return self.module.register_forward_hook(lambda module, inputs, output: edit_first(output))


Hook = tuple[Site, Edit]


@dataclass(frozen=True)
class Block:
    """A layer, which knows the site of each kind of value: hidden, attn, mlp and head.N."""

    module: nn.Module
    layout: Layout
    heads: int

    def __getitem__(self, kind: str) -> Site:
        if kind == "hidden":
            return Site(self.module)
        if kind in ("attn", "mlp"):
            return Site(self.module.get_submodule(getattr(self.layout, kind)))
        head = int(kind.removeprefix("head."))
        return Site(self.module.get_submodule(self.layout.projection), head, self.heads)


def sites(model: nn.Module) -> list[Block]:
    """For each layer the sites of its kinds of value."""
    layout = LAYOUTS[model.config.model_type]
    heads = model.config.num_attention_heads
    return [Block(block, layout, heads) for block in model.get_submodule(layout.blocks)]


def predict(model: nn.Module, case: Case, inputs: Sequence[list[int]], hooks: Iterable[Hook] = ()) -> Tensor:
    """The target's probability (B,) after each of several prompts with the target's tokens, under hooks."""
    return log_predict(model, case, inputs, hooks).exp()


def log_predict(model: nn.Module, case: Case, inputs: Sequence[list[int]], hooks: Iterable[Hook] = ()) -> Tensor:
    """The logarithm of what ``predict`` gives."""
    with hooked(hooks, len(inputs)):
        logits = model(torch.tensor(inputs, device=model.device), use_cache=False).logits
    predicting = range(len(case.prompt) - 1, len(case.inputs))
    log_p = logits[:, predicting].double().log_softmax(dim=-1)[:, range(len(case.target)), case.target]
    return log_p.sum(dim=1)


@contextmanager
def hooked(hooks: Iterable[Hook], batch: int) -> Iterator[None]:
    """While inside, the values of each site go through its function."""
    with ExitStack() as stack:
        for site, edit in hooks:
            stack.callback(site.hook(edit, batch).remove)
        yield


def precision(model: nn.Module, lift: bool) -> AbstractContextManager[Any]:
    """While inside, a float64 model computes everything in float64, unless it is to run as transformers has it."""
    return lifted() if lift and model.dtype == torch.float64 else nullcontext()
