"""A model whose weights stay in their files: each pass reads one layer after another."""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from causalcone.engine.errors import ModelError
from causalcone.engine.models.base import Architecture, Block
from causalcone.engine.models.reference import is_finite, model_logits, refuse_changed, refuse_unfinite
from causalcone.engine.streaming.prefetch import StreamedMatrix, WeightLayout, read_layers
from causalcone.engine.streaming.tensor_files import Entry, read_rows, read_tensor

_SLICE = 1024
"""Rows of the unembedding in memory at a time, where the model's own forward is run."""


class Streamed(Architecture):
    """Computes what ``inner`` does, an architecture whose model has its weights on the meta device.

    Layers' parameters are in their modules while their block is made, and gone afterwards; of the embedding the rows
    asked for are read, and the unembedding is read in slices. Everything else (norms after the layers, biases,
    learned positions, buffers) is kept on ``device`` in ``dtype``. Raises ``ModelError`` for files that do not fit.
    """

    def __init__(
        self, inner: Architecture, entries: Mapping[str, Entry], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(inner.model)
        self.inner, self.dtype, self.device = inner, dtype, device
        self.modules, self.down_projection = inner.modules, inner.down_projection  # type: ignore[misc]
        self.mlp_projections = inner.mlp_projections  # type: ignore[misc]
        self.sizes, self.parallel, self.logit_softcap = inner.sizes, inner.parallel, inner.logit_softcap
        self.entries = entries

        model = self.model
        modules = {id(module): name for name, module in model.named_modules()}
        embedding, unembedding = (
            f"{modules[id(module)]}.weight" for module in (model.get_input_embeddings(), model.get_output_embeddings())
        )
        self._embedding, self._unembedding = entries[embedding], entries[unembedding]
        prefix = inner.down_projection.partition("{}")[0]
        self.names = [
            [name for name in entries if name.startswith(f"{prefix}{layer}.")] for layer in range(self.sizes.depth)
        ]
        self._layouts = [WeightLayout.of([entries[name] for name in names], dtype) for names in self.names]

        elsewhere = {embedding, unembedding}.union(*self.names)
        for name, entry in entries.items():
            if name not in elsewhere:
                put(model, name, _parameter(read_tensor(entry, dtype).to(device)))
        for name, buffer in model.named_buffers():
            put(model, name, buffer.to(device))

    @property
    def held_bytes(self) -> int:
        """Bytes that a pass holds on its device for the weights: two layers, and what is always kept."""
        resident = sum(p.nbytes for p in self.model.parameters() if not p.is_meta)
        resident += sum(buffer.nbytes for buffer in self.model.buffers())
        return resident + 2 * max(layout.elements for layout in self._layouts) * self.dtype.itemsize

    @property
    def read_bytes(self) -> int:
        """Bytes of all layers and of the unembedding; the rows of the embedding are few."""
        layers = (entry.bytes for layout in self._layouts for entry in layout.entries)
        return sum(layers) + self._unembedding.bytes

    def read_rate(self) -> float:
        """Bytes per second at which a layer is read, in the middle of the model and just once."""
        layout = self._layouts[self.sizes.depth // 2]
        buffer = torch.zeros(layout.elements, dtype=self.dtype)
        began = time.perf_counter()
        layout.read(buffer)
        return sum(entry.bytes for entry in layout.entries) / (time.perf_counter() - began)

    def versions(self) -> tuple[tuple[int, int | None], ...]:
        """What changes whenever a file does."""
        states = [path.stat() for path in sorted({entry.path for entry in self.entries.values()}) if path.exists()]
        return tuple((state.st_size, state.st_mtime_ns) for state in states)

    def refuse_unreadable(self) -> None:
        refuse_changed(self.model, self.modules)

    def embed(self, tokens: Tensor) -> Tensor:
        with self.embedding_of(tokens) as local:
            return self.inner.embed(local)

    def enter(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        return self.inner.enter(embeddings, positions)

    def blocks(self, dtype: torch.dtype, device: torch.device) -> Generator[Block]:
        with closing(self.layers()) as layers:
            for layer, tensors in enumerate(layers):
                yield self._made(layer, tensors, dtype, device)

    def block(self, layer: int, dtype: torch.dtype, device: torch.device) -> Block:
        tensors = [read_tensor(entry, self.dtype).to(self.device) for entry in self._layouts[layer].entries]
        return self._made(layer, tensors, dtype, device)

    def final_norm(self, rows: Tensor) -> Tensor:
        return self.inner.final_norm(rows)

    def unembedding(self) -> tuple[Tensor, Tensor | None]:
        matrix = StreamedMatrix(self._unembedding, self.dtype, self.device)
        return matrix, self.inner.unembedding()[1]  # type: ignore[return-value]

    def forward(self, ids: Tensor) -> Tensor:
        """The logits of the model's own forward, whose modules get their weights one after the other."""
        refuse_unfinite(self.model)
        return streamed_logits(self, ids)

    @contextmanager
    def embedding_of(self, tokens: Tensor) -> Iterator[Tensor]:
        """While it lasts, the embedding holds the rows of ``tokens``, whose places among them are given."""
        module = self.model.get_input_embeddings()
        distinct, local = tokens.cpu().unique(return_inverse=True)
        rows = read_rows(self._embedding, distinct.tolist(), self.dtype)
        check_finite(self._embedding, rows)
        before = module.weight, module.padding_idx
        module.weight, module.padding_idx = _parameter(rows.to(self.device)), None
        try:
            yield local.to(self.device)
        finally:
            module.weight, module.padding_idx = before

    @contextmanager
    def layer_of(self, layer: int, tensors: Sequence[Tensor]) -> Iterator[None]:
        """While it lasts, the layer's parameters are these tensors."""
        before = {name: self.model.get_parameter(name) for name in self.names[layer]}
        try:
            for name, tensor in zip(before, tensors, strict=True):
                put(self.model, name, _parameter(tensor))
            yield
        finally:
            for name, parameter in before.items():
                put(self.model, name, parameter)

    def layers(self) -> Generator[list[Tensor]]:
        """The tensors of each layer in turn, as ``read_layers`` gives them."""
        return read_layers(self._layouts, self.dtype, self.device)

    def _made(self, layer: int, tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> Block:
        with self.layer_of(layer, tensors):
            return self.inner.block(layer, dtype, device)


def put(model: Any, name: str, tensor: Tensor) -> None:
    """Make a tensor the parameter or buffer of this name."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, tensor)


def check_finite(entry: Entry, values: Tensor) -> None:
    """Raise ``ModelError`` naming the tensor if it holds NaN or infinity."""
    if not is_finite(values):
        raise ModelError(f"the tensor {entry.name!r} of {entry.path} holds NaN or infinity; the weights are damaged")


def _parameter(tensor: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


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

    _hook(stack, module, before, lambda *_: lent.close())


def _lend_layers(streamed: Streamed, stack: ExitStack) -> None:
    layers = stack.enter_context(closing(streamed.layers()))
    prefix = streamed.down_projection.partition("{}")[0]
    lent = stack.enter_context(ExitStack())

    def before(layer: int, *_: Any) -> None:
        tensors = next(layers)
        for name, tensor in zip(streamed.names[layer], tensors, strict=True):
            check_finite(streamed.entries[name], tensor)
        lent.enter_context(streamed.layer_of(layer, tensors))

    for layer in range(streamed.sizes.depth):
        module = streamed.model.get_submodule(f"{prefix}{layer}")
        _hook(stack, module, partial(before, layer), lambda *_: lent.close())


def _lend_unembedding(streamed: Streamed, stack: ExitStack) -> None:
    """The module computes with no rows at all, and what it gives is replaced by its product slice by slice."""
    module = streamed.model.get_output_embeddings()
    matrix, bias = streamed.unembedding()
    assert isinstance(matrix, StreamedMatrix)
    saved = module.weight, module.bias
    inputs: list[Tensor] = []

    def before(_: Any, arguments: tuple[Tensor, ...]) -> None:
        inputs.append(arguments[0])
        module.weight, module.bias = _parameter(matrix.new_empty(0, matrix.shape[1])), None

    def after(*_: Any) -> Tensor:
        module.weight, module.bias = saved
        products = []
        for first in range(0, len(matrix), _SLICE):
            rows = slice(first, first + _SLICE)
            weight = matrix[rows]
            check_finite(matrix.entry, weight)
            products.append(F.linear(inputs[0], weight, None if bias is None else bias[rows]))
        return torch.cat(products, dim=-1)

    _hook(stack, module, before, after)


def _hook(stack: ExitStack, module: Any, before: Any, after: Any) -> None:
    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after).remove)
