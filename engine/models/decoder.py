"""Decoders by the names of their modules: what families share, and what each of them may change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from causalcone.engine.errors import ModelError
from causalcone.engine.models.base import Architecture, Block, Rows, Sizes
from causalcone.kernels.linear import Linear
from causalcone.kernels.norms import LayerNorm, Norm, RMSNorm, unchanged
from causalcone.kernels.rotary import Rotary, RotaryFrequencies
from causalcone.kernels.transfer import on_device

_FUSED_ACTIVATIONS = {
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "GELUActivation": "gelu",
    "ReLU": "relu",
    "SiLUActivation": "silu",
    "SiLU": "silu",
}


class Decoder(Architecture):
    """A decoder whose modules play the usual roles; a family says what they are called, and changes methods where it
    computes otherwise. Names that are not given are Llama's.

    ``layers`` is the list of layers; ``projections`` (to queries, keys, values, and from heads; or one to the first
    three, in this order, and the last) are names within ``attention``, which like ``mlp`` (gate, up and down; or up and
    down; one name twice where its module holds gate and up), ``activation`` and the norms is a name within a layer. A
    name that ends in '?' is a module that not every model of the family has, None one that none has. ``classes`` are
    the classes of modules by name that are not as usual: types, or what follows ``family`` in their names in the file
    ``code`` (arguments of the class statement).
    """

    classes: ClassVar[dict[str, str | type]] = {}
    embedding: ClassVar[str] = "model.embed_tokens"
    position_embedding: ClassVar[str | None] = None
    rotary_module: ClassVar[str | None] = None
    rotary_table: ClassVar[bool] = False
    """Whether angles are looked up in a table of all positions, which is faster where the longest prompt is short."""
    layers: ClassVar[str] = "model.layers"
    last_norm: ClassVar[str] = "model.norm"
    attention: ClassVar[str] = "self_attn"
    projections: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj")
    mlp: ClassVar[tuple[str, ...]] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    activation: ClassVar[str] = "mlp.act_fn"
    attn_in: ClassVar[str | None] = "input_layernorm"
    attn_out: ClassVar[str | None] = None
    mlp_in: ClassVar[str | None] = "post_attention_layernorm"
    mlp_out: ClassVar[str | None] = None
    query_norm: ClassVar[str | None] = None
    key_norm: ClassVar[str | None] = None
    norm_class: ClassVar[str | type] = nn.LayerNorm
    linear_class: ClassVar[type] = nn.Linear

    def __init_subclass__(cls, code: ModuleType | None = None, family: str = "") -> None:
        """``modules`` and the names of projections follow from the names, where the family's ``code`` is given."""
        if code is None:
            return
        norms = (cls.attn_in, cls.attn_out, cls.mlp_in, cls.mlp_out, cls.query_norm, cls.key_norm)
        linears = (*(f"{cls.attention}.{name}" for name in cls.projections), *cls.mlp)
        classes: dict[str, str | type] = {
            "": "ForCausalLM",
            cls.layers.partition(".")[0]: "Model",
            **({cls.rotary_module: "RotaryEmbedding"} if cls.rotary_module else {}),
            f"{cls.layers}.*": "DecoderLayer",
            f"{cls.layers}.*.{cls.attention}": "Attention",
            **({f"{cls.layers}.*.mlp": "MLP"} if "mlp" in cls.mlp[-1] else {}),
            cls.embedding: nn.Embedding,
            **({cls.position_embedding: nn.Embedding} if cls.position_embedding else {}),
            cls.last_norm: cls.norm_class,
            **{f"{cls.layers}.*.{name}": cls.norm_class for name in norms if name is not None},
            **{f"{cls.layers}.*.{name}": cls.linear_class for name in linears},
            "lm_head": nn.Linear,
            **cls.classes,
        }
        cls.modules = {
            name: kind if isinstance(kind, type) else getattr(code, family + kind) for name, kind in classes.items()
        }
        *inner, down = cls.mlp
        cls.down_projection = f"{cls.layers}.{{}}.{down}"
        cls.mlp_projections = {
            name: (f"{cls.layers}.{{}}.{path}", inner[:before].count(path), inner.count(path))
            for before, (name, path) in enumerate(zip(("gate", "up")[-len(inner) :], inner, strict=True))
        }

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if self.rotary_module is not None:
            refuse_length_dependent(model.get_submodule(self.rotary_module))
        attention, down = part_of(self.layer(0), self.attention), part_of(self.layer(0), self.mlp[-1])
        self.sizes = Sizes.of(
            model.config,
            sharing=getattr(attention, "num_key_value_groups", 1),
            head_dim=self.head_dim(attention),
            inner=down.nx if isinstance(down, Conv1D) else down.in_features,
            matrices=3 if self.gated else 2,
        )
        self.windows = [self.window(layer) for layer in range(self.sizes.depth)]
        self.attention_softcap = self.softcap()

    def embed(self, tokens: Tensor) -> Tensor:
        embedding = self.model.get_submodule(self.embedding)
        return embedding(on_device(tokens, embedding.weight.device))

    def enter(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        if self.position_embedding is None:
            return embeddings
        table = self.model.get_submodule(self.position_embedding)
        places = positions + table.offset if hasattr(table, "offset") else positions
        return embeddings + table.weight[on_device(places, table.weight.device)].to(embeddings)

    def block(self, layer: int, dtype: torch.dtype, device: torch.device) -> Block:
        module, read = self.layer(layer), Reader(device, dtype)
        attention = part_of(module, self.attention)
        query, key_value = self.read_projections(attention, read)

        def norm(name: str | None) -> Norm:
            norm_module = part_of(module, name)
            return unchanged if norm_module is None else self.norm(norm_module, read)

        attn_in = norm(self.attn_in)
        return Block(
            scale=self.scale(attention),
            head_dim=self.sizes.head_dim,
            query=query,
            key_value=key_value,
            output=read.linear(part_of(attention, self.projections[-1])),
            inner=self.inner(module, read),
            gate=self.gate(module, read),
            down=read.linear(part_of(module, self.mlp[-1])),
            attn_in=attn_in,
            attn_out=norm(self.attn_out),
            mlp_in=attn_in if self.mlp_in == self.attn_in else norm(self.mlp_in),
            mlp_out=norm(self.mlp_out),
            query_norm=norm(self.query_norm),
            key_norm=norm(self.key_norm),
            rotary=self.rotary(layer, read),
            softcap=self.attention_softcap,
            window=self.windows[layer],
        )

    def final_norm(self, rows: Tensor) -> Tensor:
        module = part_of(self.model, self.last_norm)
        return rows if module is None else self.norm(module, Reader(rows.device, rows.dtype))(rows)

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        return self.model.lm_head.weight, self.model.lm_head.bias

    def layer(self, layer: int) -> Any:
        """The module of a layer."""
        return self.model.get_submodule(self.layers)[layer]

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two projections of its input."""
        return len(self.mlp) == 3

    def head_dim(self, attention: Any) -> int:
        return attention.head_dim

    def scale(self, attention: Any) -> float:
        """The factor of attention scores."""
        return attention.scaling

    def softcap(self) -> float | None:
        """The bound of attention scores."""
        return None

    def window(self, layer: int) -> int | None:
        """How many tokens a query of the layer sees, itself included; None for all before it."""
        return None

    def norm(self, module: Any, read: Reader) -> Norm:
        return read.norm(module)

    def read_projections(self, attention: Any, read: Reader) -> tuple[Linear, Linear]:
        """To queries, and to keys and values side by side."""
        modules = [part_of(attention, name) for name in self.projections[:-1]]
        if len(modules) == 3:
            return read.linear(modules[0]), read.linear(*modules[1:])
        queries, weight, bias = self.sizes.query_width, matrix(modules[0]), modules[0].bias
        biases = (None, None) if bias is None else (bias[:queries], bias[queries:])
        return read.product(weight[:queries], biases[0]), read.product(weight[queries:], biases[1])

    def rotary(self, layer: int, read: Reader) -> Rotary | RotaryFrequencies | None:
        """What turns the heads of queries and keys by their positions; None in layers without."""
        if self.rotary_module is None:
            return None
        module = self.model.get_submodule(self.rotary_module)
        if self.rotary_table:
            frequencies = module.inv_freq.to(read.device)
            return Rotary.of(frequencies, self.sizes.positions, read.dtype, module.attention_scaling)
        return RotaryFrequencies(wide(module.inv_freq, read), module.attention_scaling)

    def inner(self, layer: Any, read: Reader) -> Rows:
        """The MLP up to its last projection, and to its gate."""
        return self._activated(layer, read) if not self.gated else read.linear(part_of(layer, self.mlp[1]))

    def gate(self, layer: Any, read: Reader) -> Linear | None:
        """What multiplies it, from the same rows."""
        return self._activated(layer, read) if self.gated else None

    def _activated(self, layer: Any, read: Reader) -> Linear:
        return read.linear(part_of(layer, self.mlp[0]), activation=activation_of(part_of(layer, self.activation)))


@dataclass(frozen=True)
class Reader:
    """Takes a model's modules onto the device and into the dtype of the pass."""

    device: torch.device
    dtype: torch.dtype

    def linear(self, *modules: Any, activation: str | Callable[[Tensor], Tensor] | None = None) -> Linear:
        """One product that puts the outputs of all modules side by side."""
        if len(modules) == 1:  # no copy
            return self.product(matrix(modules[0]), modules[0].bias, activation)
        weights = [matrix(module) for module in modules]
        biases = [module.bias for module in modules if module.bias is not None]
        return self.product(torch.cat(weights), torch.cat(biases) if biases else None, activation)

    def product(
        self, weight: Tensor, bias: Tensor | None, activation: str | Callable[[Tensor], Tensor] | None = None
    ) -> Linear:
        """The product with a weight (out, in) and a bias (out,)."""
        return Linear(self.tensor(weight), None if bias is None else self.tensor(bias), activation)

    def norm(self, module: Any) -> LayerNorm | RMSNorm:
        if not isinstance(module, nn.LayerNorm):
            return RMSNorm(wide(module.weight, self), module.variance_epsilon)
        bias = None if module.bias is None else self.tensor(module.bias)
        return LayerNorm(None if module.weight is None else self.tensor(module.weight), bias, module.eps)

    def tensor(self, parameter: Tensor) -> Tensor:
        return free(parameter).to(self.device, self.dtype)


def part_of(module: Any, name: str | None) -> Any:
    """The module of a name within another; None where there is none, and need not be."""
    if name is None:
        return None
    try:
        return attrgetter(name.rstrip("?"))(module)
    except AttributeError:
        if not name.endswith("?"):
            raise
        return None


def refuse_length_dependent(module: Any) -> None:
    """Raise ``ModelError`` where a rotary module's angles depend on the length of the prompt."""
    types = module.rope_type.values() if isinstance(module.rope_type, dict) else [module.rope_type]
    for kind in types:
        if kind == "longrope" or "dynamic" in kind:
            raise ModelError(f"rotary positions of type {kind!r} depend on the prompt's length: not supported")


def matrix(module: Any) -> Tensor:
    """The weight (out, in) of a Linear or Conv1D."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def activation_of(module: Any) -> str | Callable[[Tensor], Tensor]:
    """A name that ``Linear`` can apply in its product, or the model's own function."""
    return _FUSED_ACTIVATIONS.get(type(module).__name__, module)


def free(parameter: Tensor) -> Tensor:
    """A parameter's values, which no gradient flows to, and which may be saved for the way back."""
    if parameter.is_inference() and not torch.is_inference_mode_enabled():
        return parameter.clone()
    return parameter.detach()


def wide(parameter: Tensor, read: Reader) -> Tensor:
    """A parameter on the reader's device, in float32 or better."""
    return free(parameter).to(read.device, torch.promote_types(read.dtype, torch.float32))
