"""What an architecture has to provide for the pass: how a layer turns rows into keys, values, queries and outputs.

All row tensors are (R, width) in the compute dtype; every method treats each row by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


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


class Block(ABC):
    """One layer's weights, on the device and in the dtype of the pass."""

    scale: float
    head_dim: int

    @abstractmethod
    def keys_values(self, rows: Tensor) -> Tensor:
        """Keys and values side by side (R, 2 * kv_heads * head_dim) of input rows (R, hidden)."""

    @abstractmethod
    def queries(self, rows: Tensor) -> Tensor:
        """Queries (R, heads * head_dim) of input rows (R, hidden)."""

    @abstractmethod
    def attention_output(self, rows: Tensor) -> Tensor:
        """What attention adds to the residual stream (R, hidden), from the heads' outputs (R, heads * head_dim)."""

    @abstractmethod
    def mlp(self, rows: Tensor) -> Tensor:
        """What the MLP adds to the residual stream (R, hidden), from the residual after attention (R, hidden)."""


class Architecture(ABC):
    """A transformers model seen as embeddings, blocks and a readout. Parameters are read anew for every pass, so an
    edited model is seen as it is."""

    modules: ClassVar[dict[str, type]]
    """The class that every module of a name must have, for the parameters to mean what this file takes them for."""

    sizes: Sizes

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

    @abstractmethod
    def final_norm(self, rows: Tensor) -> Tensor: ...

    @abstractmethod
    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        """Weight (vocabulary, hidden) and bias (vocabulary,) or None of the output projection, the model's own."""
