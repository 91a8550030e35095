"""The interface of an architecture: how a layer turns rows into keys, values, queries and outputs.

All row tensors are (R, width) in the compute dtype; every method treats each row by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from causalcone.engine.errors import ModelError
from causalcone.engine.models.reference import model_logits, refuse_unfinite, refuse_unreadable
from causalcone.kernels.backends import TORCH, Backends
from causalcone.kernels.linear import Linear
from causalcone.kernels.norms import Norm, unchanged
from causalcone.kernels.rotary import Rotary, RotaryFrequencies, Turned

Rows = Callable[[Tensor], Tensor]
"""A function of rows (R, width) that treats each by itself."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """depth layers of width ``hidden``; ``heads`` query heads and ``kv_heads`` key heads of ``head_dim`` each;
    ``inner`` is the widest row inside the MLP; ``positions`` the longest prompt; ``mlp_weights`` the number of
    weights in the MLP's matrices."""

    depth: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    mlp_weights: int
    vocabulary: int
    positions: int

    @classmethod
    def of(cls, config: Any, *, sharing: int, head_dim: int, inner: int, matrices: int) -> Sizes:
        """The sizes of a config with the usual names; ``sharing`` query heads have one key head, and the MLP has
        this number of ``matrices``."""
        heads, hidden = config.num_attention_heads, config.hidden_size
        return cls(
            depth=config.num_hidden_layers,
            hidden=hidden,
            heads=heads,
            kv_heads=heads // sharing,
            head_dim=head_dim,
            inner=inner,
            mlp_weights=matrices * hidden * inner,
            vocabulary=config.vocab_size,
            positions=config.max_position_embeddings,
        )

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Of keys and values side by side."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def key_value_weights(self) -> int:
        """Weights of the projection to keys and values."""
        return self.hidden * self.key_value_width

    @property
    def query_weights(self) -> int:
        """Weights of the projection to queries, and of the heads' output projection."""
        return self.hidden * self.query_width

    @property
    def layer_weights(self) -> int:
        """Weights of all projections of a layer."""
        return self.key_value_weights + 2 * self.query_weights + self.mlp_weights


@dataclass(frozen=True, kw_only=True)
class Block:
    """One layer: its weights, on the device and in the dtype of the pass, and what it computes.

    ``scale`` multiplies the attention scores; ``softcap`` bounds them by ``softcap * tanh(score / softcap)``, where it
    is a number; ``window`` is how many tokens a query sees, itself included, None for all before it. ``attn_in`` and
    ``mlp_in`` norm the rows that attention and the MLP read, ``attn_out`` and ``mlp_out`` what those put out;
    ``query_norm`` and ``key_norm`` the rows of all heads, before ``rotary`` turns each head by its position.
    ``backends`` compute what is between products, where it needs no gradient.

    ``out``, where a method takes it, is memory for its result, which may be used or not.
    """

    scale: float
    head_dim: int
    query: Linear
    key_value: Linear
    """To keys and values side by side."""
    output: Linear
    inner: Rows
    """The MLP up to its last projection, and to its gate."""
    down: Linear
    """The MLP's last projection, from its keys (R, inner) to its values (R, hidden): what editing changes."""
    gate: Linear | None = None
    """What multiplies ``inner``, from the same rows, where the MLP is gated; it ends in the activation."""
    attn_in: Norm = unchanged
    attn_out: Norm = unchanged
    mlp_in: Norm = unchanged
    mlp_out: Norm = unchanged
    query_norm: Norm = unchanged
    key_norm: Norm = unchanged
    rotary: Rotary | RotaryFrequencies | None = None
    softcap: float | None = None
    window: int | None = None
    backends: Backends = TORCH

    def projection(self, name: str) -> Linear:
        """The MLP's projection ``"down"``, ``"up"`` or ``"gate"``, with its activation."""
        found = {"down": self.down, "up": self.inner, "gate": self.gate}[name]
        if not isinstance(found, Linear):
            raise ModelError(f"the MLP has no {name}-projection of its own; change another one")
        return found

    def with_projections(self, projections: Mapping[str, Linear]) -> Block:
        """The block with other projections, by the names of ``projection``."""
        fields: dict[str, Any] = {"inner" if name == "up" else name: linear for name, linear in projections.items()}
        return replace(self, **fields)

    def keys_values_of(self, normed: Tensor, positions: Tensor, out: Tensor | None = None) -> Tensor:
        """``keys_values`` of rows that are normed already."""
        keys_values = self.key_value(normed, out)
        keys, values = keys_values.chunk(2, dim=1)
        turned = self._turned(self.key_norm(keys), positions)
        if turned is keys:
            return keys_values
        if keys_values.requires_grad:
            return torch.cat([turned, values], dim=1)
        keys.copy_(turned)
        return keys_values

    def queries_of(self, normed: Tensor, positions: Tensor, out: Tensor | None = None) -> Tensor:
        """``queries`` of rows that are normed already."""
        return self._turned(self.query_norm(self.query(normed, out)), positions)

    def attention_output(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """What attention adds to the residual stream (R, hidden), from the heads' outputs (R, heads * head_dim)."""
        return self.attn_out(self.output(rows, out))

    def keys_values(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Keys and values side by side (R, 2 * kv_heads * head_dim) of input rows (R, hidden) at ``positions`` (R,)."""
        return self.keys_values_of(self.attn_in(rows), positions)

    def queries(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Queries (R, heads * head_dim) of input rows (R, hidden) at ``positions`` (R,)."""
        return self.queries_of(self.attn_in(rows), positions)

    def keys_of_mlp(self, rows: Tensor) -> Tensor:
        """What enters ``down`` (R, inner), from the residual after attention (R, hidden), or from the layer's input
        where attention and MLP are parallel."""
        return self._gated(self.mlp_in(rows))

    def mlp_of(self, normed: Tensor, out: Tensor | None = None) -> Tensor:
        """``mlp`` of rows that are normed already."""
        return self.mlp_out(self.down(self._gated(normed), out))

    def mlp(self, rows: Tensor) -> Tensor:
        """What the MLP adds to the residual stream (R, hidden), from the rows that it reads (R, hidden)."""
        return self.mlp_of(self.mlp_in(rows))

    def _gated(self, normed: Tensor) -> Tensor:
        """The MLP up to its last projection, of rows that are normed already."""
        inner = self.inner(normed)
        if self.gate is None:
            return inner
        if inner.requires_grad:
            return inner * self.gate(normed)
        self.backends.gate(inner, self.gate, normed)
        return inner

    def _turned(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys (R, heads * head_dim) turned by their positions, in place but under autograd."""
        if self.rotary is None:
            return heads
        if heads.requires_grad:
            return Turned.apply(heads, positions, self.rotary, self.head_dim, self.backends.turn)
        self.backends.turn(heads, positions, self.rotary, self.head_dim)
        return heads


class Architecture(ABC):
    """A transformers model seen as embeddings, blocks and a readout. Parameters are read anew for every pass, so an
    edited model is seen as it is."""

    modules: ClassVar[dict[str, type]]
    """The exact class of every module whose parameters are read, by name ('*' is any number); a name that ends in '?'
    is a module that not every model has."""

    down_projection: ClassVar[str]
    """The name of the MLP's last projection in the model, with ``{}`` for the layer: a ``Linear`` or ``Conv1D``."""

    mlp_projections: ClassVar[Mapping[str, tuple[str, int, int]]] = {}
    """Of ``"up"`` and, in gated MLPs, ``"gate"``, if they can be edited: the name of the ``Linear`` or ``Conv1D``, with
    ``{}`` for the layer; which part of its rows (out, in) they are, and of how many equal ones."""

    sizes: Sizes
    parallel: bool = False
    """Whether the MLP reads the layer's input, as attention does, and not the residual after attention."""

    logit_softcap: float | None = None
    """Bounds the logits by ``softcap * tanh(logit / softcap)``, where it is a number."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def projection(self, name: str) -> tuple[str, int, int]:
        """Where the MLP's projection ``"down"``, ``"up"`` or ``"gate"`` is, as ``mlp_projections`` has it. Raises
        ``ModelError`` for one that the model does not have, or that cannot be edited."""
        known = {"down": (self.down_projection, 0, 1), **self.mlp_projections}
        if name not in known:
            raise ModelError(
                f"{type(self.model).__name__} has no {name}-projection that can be edited; it has {', '.join(known)}"
            )
        return known[name]

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Token-embedding output (R, hidden) of token ids (R,), in the model's own dtype and on its device."""

    @abstractmethod
    def enter(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """Input of the first layer (R, hidden) from embeddings (R, hidden) of tokens at ``positions`` (R,)."""

    @abstractmethod
    def block(self, layer: int, dtype: torch.dtype, device: torch.device) -> Block: ...

    def blocks(self, dtype: torch.dtype, device: torch.device) -> Generator[Block]:
        """The blocks of all layers in turn, to be closed when done; each is good until the next is asked for, and only
        where the weights are in memory for longer."""
        for layer in range(self.sizes.depth):
            yield self.block(layer, dtype, device)

    @abstractmethod
    def final_norm(self, rows: Tensor) -> Tensor: ...

    @abstractmethod
    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        """Weight (vocabulary, hidden) and bias (vocabulary,) or None of the output projection, the model's own."""

    @property
    def held_bytes(self) -> int | None:
        """Bytes of a budget that weights read from files in every pass take; None where they are in memory anyway."""
        return None

    @property
    def read_bytes(self) -> int:
        """Bytes of weights that every pass reads from files."""
        return 0

    def read_rate(self) -> float | None:
        """Bytes per second at which weights are read from files, measured now; None where none are."""
        return None

    def versions(self) -> tuple[tuple[int, int | None], ...]:
        """What changes whenever the weights do."""
        return tuple(
            (id(parameter), None if parameter.is_inference() else parameter._version)
            for parameter in self.model.parameters()
        )

    def refuse_unreadable(self) -> None:
        """Raise ``ModelError`` naming what keeps the parameters from being read directly."""
        refuse_unreadable(self.model, self.modules)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (1, T, V) of token ids (1, T) by the model's own forward. Raises ``ModelError`` naming a parameter
        that holds NaN or infinity."""
        refuse_unfinite(self.model)
        return model_logits(self.model, ids)
