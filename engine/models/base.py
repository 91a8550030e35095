"""What an architecture has to provide for the pass: how a layer turns rows into keys, values, queries and outputs.

All row tensors are (R, width) in the compute dtype; every method treats each row by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from causalcone.engine.models.forward import model_logits
from causalcone.engine.models.refusal import refuse_unfinite, refuse_unreadable
from causalcone.kernels.linear import Linear
from causalcone.kernels.norms import Norm


@dataclass(frozen=True)
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

    @property
    def key_value_weights(self) -> int:
        """Weights of the projection to keys and values."""
        return self.hidden * 2 * self.kv_heads * self.head_dim

    @property
    def query_weights(self) -> int:
        """Weights of the projection to queries, and of the heads' output projection."""
        return self.hidden * self.heads * self.head_dim


class Block(ABC):
    """One layer's weights, on the device and in the dtype of the pass.

    ``scale`` multiplies the attention scores; ``softcap`` bounds them by ``softcap * tanh(score / softcap)``, where it
    is a number; ``window`` is how many tokens a query sees, its own included, None for all before it.
    """

    scale: float
    head_dim: int
    down: Linear
    """The MLP's last projection, from its keys (R, inner) to its values (R, hidden): what editing changes."""
    softcap: float | None = None
    window: int | None = None

    @property
    @abstractmethod
    def attn_in(self) -> Norm:
        """The norm of input rows before keys and values, and before queries."""

    @property
    @abstractmethod
    def mlp_in(self) -> Norm:
        """The norm of the rows that the MLP reads."""

    @abstractmethod
    def keys_values_of(self, normed: Tensor, positions: Tensor) -> Tensor:
        """``keys_values`` of rows that are normed already."""

    @abstractmethod
    def queries_of(self, normed: Tensor, positions: Tensor) -> Tensor:
        """``queries`` of rows that are normed already."""

    @abstractmethod
    def attention_output(self, rows: Tensor) -> Tensor:
        """What attention adds to the residual stream (R, hidden), from the heads' outputs (R, heads * head_dim)."""

    @abstractmethod
    def mlp_keys_of(self, normed: Tensor) -> Tensor:
        """``keys_of_mlp`` of rows that are normed already."""

    def keys_values(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Keys and values side by side (R, 2 * kv_heads * head_dim) of input rows (R, hidden) at ``positions`` (R,)."""
        return self.keys_values_of(self.attn_in(rows), positions)

    def queries(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Queries (R, heads * head_dim) of input rows (R, hidden) at ``positions`` (R,)."""
        return self.queries_of(self.attn_in(rows), positions)

    def keys_of_mlp(self, rows: Tensor) -> Tensor:
        """What enters ``down`` (R, inner), from the residual after attention (R, hidden), or from the layer's input
        where attention and MLP are parallel."""
        return self.mlp_keys_of(self.mlp_in(rows))

    def mlp_output(self, values: Tensor) -> Tensor:
        """What the MLP adds to the residual stream (R, hidden), from the output of ``down`` (R, hidden)."""
        return values

    def mlp_of(self, normed: Tensor) -> Tensor:
        """``mlp`` of rows that are normed already."""
        return self.mlp_output(self.down(self.mlp_keys_of(normed)))

    def mlp(self, rows: Tensor) -> Tensor:
        """What the MLP adds to the residual stream (R, hidden), from the rows that it reads (R, hidden)."""
        return self.mlp_of(self.mlp_in(rows))


class Architecture(ABC):
    """A transformers model seen as embeddings, blocks and a readout. Parameters are read anew for every pass, so an
    edited model is seen as it is."""

    modules: ClassVar[dict[str, type]]
    """The class that every module of a name must have, for the parameters to mean what this file takes them for."""

    down_projection: ClassVar[str]
    """The name of the MLP's last projection in the model, with ``{}`` for the layer: a ``Linear`` or ``Conv1D``."""

    sizes: Sizes
    parallel: bool = False
    """Whether the MLP reads the layer's input, as attention does, and not the residual after attention."""

    logit_softcap: float | None = None
    """Bounds the logits by ``softcap * tanh(logit / softcap)``, where it is a number."""

    def __init__(self, model: Any) -> None:
        self.model = model

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
        """Bytes of a budget that the weights take where every pass reads them from files; None where they are there
        anyway."""
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
