"""Llama and families that differ from it in biases, sliding windows, norms of queries and keys, or layers without
positions: RMSNorm before attention and MLP, key heads that serve several query heads, rotary positions, a gated MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.cwm import modeling_cwm
from transformers.models.llama import modeling_llama
from transformers.models.ministral import modeling_ministral
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.seed_oss import modeling_seed_oss
from transformers.models.smollm3 import modeling_smollm3

from causalcone.engine.errors import ModelError
from causalcone.engine.models.base import Architecture, Block, Sizes
from causalcone.engine.models.parts import RotaryFrequencies, activation_of, refuse_length_dependent
from causalcone.engine.models.plain import Reader, free
from causalcone.kernels.linear import Linear
from causalcone.kernels.norms import Norm, RMSNorm, unchanged
from causalcone.kernels.transfer import on_device

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Norms:
    """What a layer does to rows (R, hidden) as they enter and leave attention and MLP."""

    attn_in: Rows = unchanged
    attn_out: Rows = unchanged
    mlp_in: Rows = unchanged
    mlp_out: Rows = unchanged


@dataclass(frozen=True)
class Projections:
    """To queries, and to keys and values side by side. The norms are those of queries and of keys."""

    query: Linear
    kv: Linear
    query_norm: Rows = unchanged
    key_norm: Rows = unchanged


@dataclass(frozen=True)
class Gated:
    """The inside of an MLP: rows (R, hidden) to (R, inner). ``gate`` ends in the activation."""

    gate: Linear
    up: Linear

    def __call__(self, rows: Tensor) -> Tensor:
        up, gate = self.up(rows), self.gate(rows)
        if up.requires_grad:
            return up * gate
        return up.mul_(gate)  # a third row of this width would cost 5 % of the time


@dataclass(frozen=True)
class LlamaLayer(Block):
    scale: float
    head_dim: int
    norms: Norms
    projections: Projections
    rotary: RotaryFrequencies | None
    output: Linear
    inner: Rows
    down: Linear
    softcap: float | None = None
    window: int | None = None

    @property
    def attn_in(self) -> Norm:
        return self.norms.attn_in

    @property
    def mlp_in(self) -> Norm:
        return self.norms.mlp_in

    def keys_values_of(self, normed: Tensor, positions: Tensor) -> Tensor:
        keys, values = self.projections.kv(normed).chunk(2, dim=1)
        return torch.cat([self._placed(self.projections.key_norm(keys), positions), values], dim=1)

    def queries_of(self, normed: Tensor, positions: Tensor) -> Tensor:
        return self._placed(self.projections.query_norm(self.projections.query(normed)), positions)

    def attention_output(self, rows: Tensor) -> Tensor:
        return self.norms.attn_out(self.output(rows))

    def mlp_keys_of(self, normed: Tensor) -> Tensor:
        return self.inner(normed)

    def mlp_output(self, values: Tensor) -> Tensor:
        return self.norms.mlp_out(values)

    def _placed(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys (R, heads * head_dim), turned to their positions."""
        if self.rotary is None:
            return heads
        return self.rotary(heads.unflatten(1, (-1, self.head_dim)), positions).flatten(1)


PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def modules_of(
    code: ModuleType,
    family: str,
    norms: tuple[str, ...] = PRE_NORMS,
    linears: tuple[str, ...] = LINEARS,
    norm: type | None = None,
) -> dict[str, type]:
    """The class of every module that is read, in models whose modules are named as Llama's are.

    ``norms`` and ``linears`` are those of a layer; the class of norms is ``norm``, or the family's own RMSNorm.
    """

    def named(name: str) -> type:
        return getattr(code, family + name)

    norm = norm or named("RMSNorm")
    return {
        "": named("ForCausalLM"),
        "model": named("Model"),
        "model.embed_tokens": torch.nn.Embedding,
        "model.rotary_emb": named("RotaryEmbedding"),
        "model.norm": norm,
        "model.layers.*": named("DecoderLayer"),
        "model.layers.*.self_attn": named("Attention"),
        "model.layers.*.mlp": named("MLP"),
        **{f"model.layers.*.{name}": norm for name in norms},
        **{f"model.layers.*.{name}": torch.nn.Linear for name in linears},
        "lm_head": torch.nn.Linear,
    }


class Llama(Architecture):
    """The methods from ``softcap`` on are what other families change."""

    modules: ClassVar[dict[str, type]] = modules_of(modeling_llama, "Llama")
    down_projection: ClassVar[str] = "model.layers.{}.mlp.down_proj"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.config
        refuse_length_dependent(model.model.rotary_emb)
        refuse_two_way(config)
        self.windows = [self.window(layer) for layer in range(config.num_hidden_layers)]
        self.attention_softcap = self.softcap()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.sizes = Sizes(
            depth=config.num_hidden_layers,
            hidden=hidden,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=model.model.layers[0].self_attn.head_dim,
            inner=inner,
            mlp_weights=3 * hidden * inner,
            vocabulary=config.vocab_size,
            positions=config.max_position_embeddings,
        )

    def embed(self, tokens: Tensor) -> Tensor:
        embedding = self.model.model.embed_tokens
        return embedding(on_device(tokens, embedding.weight.device))

    def enter(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        return embeddings

    def block(self, layer: int, dtype: torch.dtype, device: torch.device) -> Block:
        module, read = self.model.model.layers[layer], Reader(device, dtype)
        return LlamaLayer(
            scale=module.self_attn.scaling,
            head_dim=self.sizes.head_dim,
            norms=self.norms(module, read),
            projections=self.projections(module.self_attn, read),
            rotary=self.rotary(layer, read),
            output=read.linear(module.self_attn.o_proj),
            inner=self.inner(module.mlp, read),
            down=self.down(module.mlp, read),
            softcap=self.attention_softcap,
            window=self.windows[layer],
        )

    def final_norm(self, rows: Tensor) -> Tensor:
        return self.norm(self.model.model.norm, Reader(rows.device, rows.dtype))(rows)

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        return self.model.lm_head.weight, self.model.lm_head.bias

    def softcap(self) -> float | None:
        """The bound of attention scores."""
        return None

    def window(self, layer: int) -> int | None:
        return None

    def norm(self, module: Any, read: Reader) -> Rows:
        return RMSNorm(wide(module.weight, read), module.variance_epsilon)

    def norms(self, layer: Any, read: Reader) -> Norms:
        """The layer's norms; here those in front of attention and MLP, as they are named since Llama."""
        return Norms(
            attn_in=self.norm(layer.input_layernorm, read), mlp_in=self.norm(layer.post_attention_layernorm, read)
        )

    def projections(self, attn: Any, read: Reader) -> Projections:
        """Attention's projections, and the norms of queries and keys where the family has them."""
        query_norm, key_norm = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
        return Projections(
            query=read.linear(attn.q_proj),
            kv=read.linear(attn.k_proj, attn.v_proj),
            query_norm=self.norm(query_norm, read) if query_norm is not None else unchanged,
            key_norm=self.norm(key_norm, read) if key_norm is not None else unchanged,
        )

    def rotary(self, layer: int, read: Reader) -> RotaryFrequencies | None:
        """What turns queries and keys to their positions; None in layers without positions."""
        module = self.model.model.rotary_emb
        return RotaryFrequencies(wide(module.inv_freq, read), module.attention_scaling)

    def inner(self, mlp: Any, read: Reader) -> Rows:
        """The MLP up to its last projection."""
        return Gated(read.linear(mlp.gate_proj, activation=activation_of(mlp.act_fn)), read.linear(mlp.up_proj))

    def down(self, mlp: Any, read: Reader) -> Linear:
        return read.linear(mlp.down_proj)


class SeedOss(Llama):
    modules: ClassVar[dict[str, type]] = modules_of(modeling_seed_oss, "SeedOss")


class Mistral(Llama):
    """One sliding window for all layers."""

    modules: ClassVar[dict[str, type]] = modules_of(modeling_mistral, "Mistral")

    def window(self, layer: int) -> int | None:
        return self.model.config.sliding_window


class Qwen2(Llama):
    """A sliding window in some layers."""

    modules: ClassVar[dict[str, type]] = modules_of(modeling_qwen2, "Qwen2")

    def window(self, layer: int) -> int | None:
        return window_of(self.model.config, layer)


class Qwen3(Qwen2):
    modules: ClassVar[dict[str, type]] = modules_of(modeling_qwen3, "Qwen3", norms=PRE_NORMS + HEAD_NORMS)


class Ministral(Qwen2):
    modules: ClassVar[dict[str, type]] = modules_of(modeling_ministral, "Ministral")


class Cwm(Qwen2):
    modules: ClassVar[dict[str, type]] = modules_of(modeling_cwm, "Cwm")


class SmolLM3(Qwen2):
    """Some layers know no positions."""

    modules: ClassVar[dict[str, type]] = modules_of(modeling_smollm3, "SmolLM3")

    def rotary(self, layer: int, read: Reader) -> RotaryFrequencies | None:
        return super().rotary(layer, read) if self.model.model.layers[layer].self_attn.use_rope else None


def wide(parameter: Tensor, read: Reader) -> Tensor:
    """A parameter on the reader's device, in float32 or better."""
    return free(parameter).to(read.device, torch.promote_types(read.dtype, torch.float32))


def window_of(config: Any, layer: int) -> int | None:
    """How many tokens a query of the layer sees, where the config gives every layer its type."""
    kind = config.layer_types[layer]
    if kind not in ("full_attention", "sliding_attention"):
        raise ModelError(f"layer {layer} has {kind!r} (layer_types): only full and sliding attention are supported")
    return config.sliding_window if kind == "sliding_attention" else None


def rotary_of_type(module: Any, kind: str, read: Reader) -> RotaryFrequencies:
    """Rotary positions of the layers of one type, from a module that has some for each type."""
    inverse = wide(getattr(module, f"{kind}_inv_freq"), read)
    return RotaryFrequencies(inverse, getattr(module, f"{kind}_attention_scaling"))


def refuse_two_way(config: Any) -> None:
    """Raise ``ModelError`` where tokens see those that follow them."""
    for option, usual in (("is_causal", True), ("use_bidirectional_attention", False)):
        if getattr(config, option, None) not in (None, usual):
            raise ModelError(f"attention to later tokens ({option}={not usual}) is not supported")
