"""Times causal tracing on every architecture beside the naive ways, on the CPU: ``python bench/architectures.py``.

The first 20 CounterFact prompts (generated ones of the same lengths where the file is missing), models of one size with
random weights: what differs is what the architecture lays down. The naive ways, batched and as
published, are timed on a part that is spread evenly, and scaled. Results are written after each architecture.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import command
import torch
from measure import EFFICIENCY
from naive import BATCHED, PUBLISHED
from report import Growing, environment
from studies import Tracing
from transformers import AutoConfig, PretrainedConfig
from workload import describe_prompts, prompts, random_model

from causalcone import Tracer
from causalcone.engine.models import read_architecture
from causalcone.engine.models.base import Sizes

VOCABULARY = 50257
GOAL = 5.5
NOTE = (
    "The MLP is as wide as is usual in the family, the vocabulary is GPT-2's, the rest is as transformers has it by "
    "default"
)


@dataclass(frozen=True)
class Size:
    depth: int
    hidden: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SMALL, TOY = Size(12, 768, 12, 4), Size(2, 16, 2, 1)


@dataclass(frozen=True)
class Family:
    """An architecture as its models usually are.

    kind: transformers' name of it. inner: how many times wider than the residual stream the MLP is; inner_name: the
    config's name for its width. grouped: whether several query heads share keys and values. headed: whether the config
    holds the width of a head. rotary_share: rotated part of a head, where the config counts it in dimensions. options:
    further ones of the config.
    """

    kind: str
    inner: float = 4
    inner_name: str = "intermediate_size"
    grouped: bool = False
    headed: bool = False
    rotary_share: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def config(self, size: Size) -> PretrainedConfig:
        shape: dict[str, Any] = {
            "num_hidden_layers": size.depth,
            "hidden_size": size.hidden,
            "num_attention_heads": size.heads,
            "vocab_size": VOCABULARY,
            self.inner_name: int(self.inner * size.hidden),
        }
        if self.grouped:
            shape["num_key_value_heads"] = size.kv_heads
        if self.headed:
            shape["head_dim"] = size.head_dim
        if self.rotary_share:
            shape["rotary_dim"] = int(self.rotary_share * size.head_dim)
        return AutoConfig.for_model(self.kind, **shape, **self.options)


FAMILIES = {
    "gpt2": Family("gpt2", inner_name="n_inner"),
    "gptj": Family("gptj", inner_name="n_inner", rotary_share=0.25),
    "gpt_neox": Family("gpt_neox"),
    "llama": Family("llama", inner=3.5, grouped=True),
    "mistral": Family("mistral", inner=3.5, grouped=True, headed=True),
    "qwen2": Family("qwen2", inner=5.25, grouped=True),
    "qwen3": Family("qwen3", inner=3, grouped=True, headed=True),
    "gemma2": Family("gemma2", grouped=True, headed=True, options={"attn_implementation": "eager"}),
    "gemma3": Family("gemma3_text", grouped=True, headed=True),
    "opt": Family("opt", inner_name="ffn_dim"),
    "phi": Family("phi"),
}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    cpu = torch.device("cpu")
    size = TOY if options.toy else SMALL
    facts, tokenizer, source = prompts(options.data, options.prompts, VOCABULARY)

    def measure(name: str) -> dict[str, Any]:
        config = FAMILIES[name].config(size)
        model = random_model(config, torch.float32, cpu)
        sigma = Tracer(model, tokenizer).noise_level(facts)
        study = Tracing(facts, sigma, samples=options.samples)
        result = command.measure(model, tokenizer, study, options)
        return {"sigma": sigma, "detail": described(config, read_architecture(model).sizes), "goal": GOAL, **result}

    report = {
        "title": f"Causal tracing of {len(facts)} prompts by architecture, {size.depth} layers of width {size.hidden}",
        **environment(cpu),
        "compared": "architecture",
        "detail": "shape",
        "shape": vars(size),
        "prompts": describe_prompts(facts, tokenizer, source),
        "states": Tracing.states,
        "samples": options.samples,
        "memory": options.memory,
        "naive": BATCHED,
        "published": PUBLISHED,
        "efficiency": EFFICIENCY,
        "note": NOTE,
    }
    file, section = f"architectures{'-toy' * options.toy}", "architectures" if options.record else None
    growing = Growing(report, list(FAMILIES), options.out, file, section)
    command.run_each({name: partial(measure, name) for name in options.only}, growing)


def described(config: PretrainedConfig, sizes: Sizes) -> str:
    heads = f"{sizes.heads} heads of {sizes.head_dim}, {sizes.kv_heads} of keys and values"
    weights = sizes.depth * sizes.layer_weights
    return f"{heads}, {weights / 1e6:.1f}M weights in the layers, {config._attn_implementation} attention"


def parse() -> argparse.Namespace:
    parser = command.parser(__doc__, naive_fraction=0.01, least=40)
    command.add_names(parser, "--only", FAMILIES)
    return command.parse(parser)


if __name__ == "__main__":
    main()
