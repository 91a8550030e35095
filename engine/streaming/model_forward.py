"""The model's own forward with weights that are in memory only while their module computes."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from causalcone.engine.models.reference import model_logits
from causalcone.engine.streaming.prefetch import StreamedMatrix

if TYPE_CHECKING:
    from causalcone.engine.streaming.architecture import Streamed

_SLICE = 1024


def streamed_logits(streamed: Streamed, ids: Tensor) -> Tensor:
    """Logits (1, T, V) of token ids (1, T), by the model's own modules: hooks put a layer's weights in and take them
    out. Raises ``ModelError`` naming the first tensor that holds NaN or infinity."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        _lend_embedding(streamed, stack)
        _lend_layers(streamed, stack)
        _lend_unembedding(streamed, stack)
        return model_logits(streamed.model, ids)


def _lend_embedding(streamed: Streamed, stack: ExitStack) -> None:
    module = streamed.model.get_input_embeddings()
    lent = stack.enter_context(ExitStack())

    def before(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (lent.enter_context(streamed.embedding_of(arguments[0])), *arguments[1:])

    def after(*_: Any) -> None:
        lent.close()

    _hook(stack, module, before, after)


def _lend_layers(streamed: Streamed, stack: ExitStack) -> None:
    from causalcone.engine.streaming.architecture import check_finite

    layers = stack.enter_context(closing(streamed.layers()))
    prefix = streamed.down_projection.partition("{}")[0]
    lent = stack.enter_context(ExitStack())

    def lend(layer: int) -> None:
        def before(*_: Any) -> None:
            tensors = next(layers)
            for name, tensor in zip(streamed.names[layer], tensors, strict=True):
                check_finite(streamed.entries[name], tensor)
            lent.enter_context(streamed.layer_of(layer, tensors))

        def after(*_: Any) -> None:
            lent.close()

        _hook(stack, streamed.model.get_submodule(f"{prefix}{layer}"), before, after)

    for layer in range(streamed.sizes.depth):
        lend(layer)


def _lend_unembedding(streamed: Streamed, stack: ExitStack) -> None:
    """The module computes with no rows at all, and what it gives is replaced by its product slice by slice."""
    from causalcone.engine.streaming.architecture import check_finite

    module = streamed.model.get_output_embeddings()
    matrix, bias = streamed.unembedding()
    assert isinstance(matrix, StreamedMatrix)
    kept = module.weight, module.bias
    inputs: list[Tensor] = []

    def before(_: Any, arguments: tuple[Tensor, ...]) -> None:
        inputs.append(arguments[0])
        module.weight = torch.nn.Parameter(matrix.new_empty(0, matrix.shape[1]), requires_grad=False)
        module.bias = None

    def after(*_: Any) -> Tensor:
        module.weight, module.bias = kept
        parts = []
        for first in range(0, len(matrix), _SLICE):
            own = slice(first, first + _SLICE)
            weight = matrix[own]
            check_finite(matrix.entry, weight)
            parts.append(F.linear(inputs[0], weight, None if bias is None else bias[own]))
        return torch.cat(parts, dim=-1)

    _hook(stack, module, before, after)


def _hook(stack: ExitStack, module: Any, before: Any, after: Any) -> None:
    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after).remove)
