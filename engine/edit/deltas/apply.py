"""Deltas written into a model's own parameters, and taken out again bit for bit.

The parameters' values before a delta are kept until it is reverted. Deltas may lie on each other: on one parameter the
last comes off first; those of different layers come off in any order.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from causalcone.engine.atomic import replacing_folder
from causalcone.engine.edit.deltas.delta import Delta, Dense, LowRank, layer_and_projection
from causalcone.engine.edit.deltas.peft import adapted, write_adapter
from causalcone.engine.errors import ExperimentError, ModelError, one_of
from causalcone.engine.models import read_architecture

Model = TypeVar("Model")

WORTH_A_WARNING = 0.01
"""The part of a delta's norm that may be lost to rounding without a warning. A change a hundredth as large as the
weights loses 3e-6 of its norm in float32, 2 % in float16 and 17 % in bfloat16; a smaller one loses more."""

_BLOCK = 2**20  # elements of a weight that are added to at a time: their float32 copies stay in a processor's cache

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


class RoundedAway(UserWarning):
    """A delta of norm ``asked``, of which rounding to the weights' dtypes lost a part of norm ``lost``."""

    def __init__(self, asked: float, lost: float, dtypes: Sequence[str]) -> None:
        super().__init__(asked, lost, dtypes)
        self.asked, self.lost, self.dtypes = asked, lost, tuple(dtypes)

    def __str__(self) -> str:
        return (
            f"weights in {' and '.join(self.dtypes)} round away {self.lost / self.asked:.0%} of this delta (norm "
            f"{self.lost:.3g} of {self.asked:.3g}); apply it to the model in a wider dtype, such as float32"
        )


class Handle:
    """A delta that is applied to a model."""

    def __init__(self, model: Any, parameters: Sequence[_Parameter]) -> None:
        self._model, self._parameters, self._reverted = model, parameters, False

    def revert(self) -> None:
        """Give the weights back the bits they had before the delta; where this is refused, nothing is written.

        Raises:
            ExperimentError: if the delta is reverted already, or a later one lies on it.
            ModelError: if something else changed the weights in the meantime.
        """
        if self._reverted:
            raise ExperimentError("this delta is reverted already; call revert once for every apply")
        for parameter in self._parameters:
            _check_last(self, parameter)
        for parameter in self._parameters:
            parameter.check_unchanged(self._model)
        _restore(self._parameters)
        for module in {parameter.module for parameter in self._parameters}:
            _APPLIED[module].pop()
        self._reverted, self._parameters, self._model = True, (), None


_APPLIED: weakref.WeakKeyDictionary[torch.nn.Module, list[weakref.ref[Handle]]] = weakref.WeakKeyDictionary()
"""By projection, the handles of the deltas on it, the last one last. Nothing here keeps a model alive."""


def apply(model: Any, delta: Delta) -> Handle:
    """Add a delta to a transformers model's own parameters, in place.

    The sum is taken in float32, or in float64 for weights of float64, and rounded to the weights' dtype; the warning
    ``RoundedAway`` says where that loses more than 1 % of the delta's norm.

    Args:
        model: A transformers model.
        delta: The change of its weights.

    Returns:
        A handle, which keeps the previous values; its ``revert`` restores them.

    Raises:
        ExperimentError: for a delta that does not fit the model or is not finite; the weights are then unchanged.
        ModelError: for a model that cannot be edited.
    """
    return _apply(model, delta, stacklevel=3)


@contextmanager
def applied(model: Model, delta: Delta) -> Iterator[Model]:
    """A block, ``with applied(model, delta) as model:``, that runs on the edited model; then, also after an exception,
    the weights have the bits they had before.

    Args:
        model: A transformers model.
        delta: The change of its weights.

    Raises:
        ExperimentError, ModelError: as ``apply`` and ``Handle.revert``.
    """
    handle = _apply(model, delta, stacklevel=4)
    try:
        yield model
    finally:
        handle.revert()


def export(
    model: Any,
    delta: Delta,
    folder: str | Path,
    tokenizer: Any = None,
    format: Format = "model",
    max_rank: int | None = None,
) -> None:
    """Write the edited model to a new folder, whole or not at all: all of it, which ``from_pretrained`` takes, or a
    low-rank change as an adapter (LoRA), which ``peft.PeftModel.from_pretrained`` puts on the unedited model.

    Args:
        model: A transformers model, which is left unchanged.
        delta: The change of its weights.
        folder: A folder that does not exist, or is empty.
        tokenizer: A tokenizer to write too.
        format: ``"model"`` or ``"peft"``; both are in the weights' dtype.
        max_rank: The largest rank of an adapter, such as a server allows. The nearest change of this rank is written
            where the delta's is larger, and the warning ``RankCut`` says how near it is.

    Raises:
        ExperimentError, ModelError: as ``apply``; also for a folder that is not empty or cannot be written, and for an
            adapter of a dense change.
    """
    folder = Path(folder)
    one_of("format", format, get_args(Format))
    if max_rank is not None and format != "peft":
        raise ExperimentError('a whole model has no rank; leave out max_rank, or give format="peft"')
    refuse_taken(folder)
    writing = nullcontext(_adapter_of(model, delta, max_rank)) if format == "peft" else _model_with(model, delta)
    try:
        with writing as write, replacing_folder(folder) as partial:
            write(partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
    except OSError as error:
        raise ExperimentError(f"no edited model can be written to {folder}: {error}") from error


Format = Literal["model", "peft"]


def refuse_taken(folder: Path) -> None:
    """Raise ``ExperimentError`` for a folder that ``export`` cannot write to, since something is there."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ExperimentError(f"{folder} exists already; give a new folder for the edited model")


@contextmanager
def _model_with(model: Any, delta: Delta) -> Iterator[Callable[[Path], object]]:
    """Writes the model with a delta, within the block."""
    handle = _apply(model, delta, stacklevel=5)
    config = dict(vars(model.config))  # save_pretrained notes dtype and class in it
    try:
        yield model.save_pretrained
    finally:
        vars(model.config).update(config)
        handle.revert()


def _adapter_of(model: Any, delta: Delta, max_rank: int | None) -> Callable[[Path], object]:
    """Writes the adapter of a delta."""
    parameters = [parameter for parameter, _ in _parameters(model, delta)]
    for parameter in parameters:
        if parameter.parts > 1:
            raise ExperimentError(
                f"{parameter.path} holds {parameter.parts} projections, of which an adapter cannot change one; export "
                "the whole model (format 'model')"
            )
    changes, error = adapted(delta, parameters[0].before.dtype if parameters else torch.float32, max_rank)
    named = {parameter.path: change for parameter, change in zip(parameters, changes.values(), strict=True)}
    base, transposed = getattr(model.config, "_name_or_path", "") or None, isinstance(parameters[0].module, Conv1D)
    return lambda folder: write_adapter(folder, named, error, base, transposed)


@dataclass(eq=False)
class _Parameter:
    """A weight or bias of a projection in a layer's MLP, or its rows of a fused one: part ``part`` of ``parts``; looked
    up anew whenever it is asked for; its values before a delta, and the fingerprint of those with it."""

    layer: int
    path: str
    module: torch.nn.Module
    attribute: str
    part: int = 0
    parts: int = 1
    before: Tensor = field(init=False)
    fingerprint: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        self.before = self.tensor.clone()

    @property
    def name(self) -> str:
        return f"{self.path}.{self.attribute}"

    @property
    def tensor(self) -> Tensor:
        """The parameter, without gradient; ``AttributeError`` where the module has none."""
        whole = self.module.get_parameter(self.attribute).detach()
        return whole.chunk(self.parts)[self.part]

    def as_rows(self, tensor: Tensor) -> Tensor:
        """The parameter, or a copy of it, seen as (out, in); a bias as (out, 1)."""
        if tensor.ndim == 1:
            return tensor[:, None]
        return tensor.t() if isinstance(self.module, Conv1D) else tensor

    def add(self, change: LowRank | Dense) -> tuple[float, float]:
        """Add a change; the norm of the change, and of the part that rounding lost."""
        tensor = self.tensor
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        norm = lost = 0.0
        with _writing(tensor):
            change = change.to(tensor.device, wide)
            before, now = self.as_rows(self.before), self.as_rows(tensor)
            step = max(1, _BLOCK // now.shape[1])
            for start in range(0, len(now), step):
                rows = slice(start, start + step)
                old, wanted = before[rows].to(wide), change.rows(rows)
                now[rows] = old + wanted
                missing = wanted - (now[rows].to(wide) - old)
                sizes = (torch.linalg.vector_norm(matrix, dtype=torch.float64).item() for matrix in (wanted, missing))
                norm, lost = map(math.hypot, (norm, lost), sizes)
            self.fingerprint = _fingerprint(tensor)
        if not math.isfinite(norm):
            raise ExperimentError(f"the delta's change of layer {self.layer} holds NaN or infinity; make it anew")
        if not math.isfinite(lost):
            raise ExperimentError(
                f"with the delta, {self.name} would hold NaN or infinity in {tensor.dtype}; "
                "apply it to finite weights in a wider dtype"
            )
        return norm, lost

    def check_unchanged(self, model: Any) -> None:
        """Raise ``ModelError`` unless the parameter holds what the delta wrote there."""
        module = dict(model.named_modules()).get(self.path)
        try:
            now = self.tensor
        except AttributeError:
            now = None
        if now is None or module is not self.module:
            difference = "is another parameter now"
        elif now.is_meta or now.dtype != self.before.dtype or now.shape != self.before.shape:
            difference = f"is now {tuple(now.shape)} in {now.dtype} on {now.device}"
        elif not all(map(torch.equal, _fingerprint(now), self.fingerprint)):
            difference = "holds other values"
        else:
            return
        raise ModelError(
            f"something else changed {self.name} after the delta was applied (it {difference}); undo that change and "
            "revert again, or load the model again"
        )


def _apply(model: Any, delta: Delta, stacklevel: int) -> Handle:
    changes = _parameters(model, delta)
    parameters = [parameter for parameter, _ in changes]
    norms = [0.0, 0.0]
    try:
        for parameter, change in changes:
            norms = list(map(math.hypot, norms, parameter.add(change)))
        norm, lost = norms
        if lost > WORTH_A_WARNING * norm:
            dtypes = sorted({str(parameter.before.dtype).removeprefix("torch.") for parameter in parameters})
            warnings.warn(RoundedAway(norm, lost, dtypes), stacklevel=stacklevel)
    except BaseException:
        _restore(parameters)
        raise
    handle = Handle(model, parameters)
    for module in {parameter.module for parameter in parameters}:
        _APPLIED.setdefault(module, []).append(weakref.ref(handle))
    return handle


def _parameters(model: Any, delta: Delta) -> list[tuple[_Parameter, LowRank | Dense]]:
    """The parameters that a delta changes, each with what is added to it seen as (out, in); refuses a misfit."""
    if not isinstance(delta, Delta):
        raise ExperimentError(f"a {type(delta).__name__} is not a delta; give a Delta, such as an edit's .delta")
    architecture = read_architecture(model)
    depth = architecture.sizes.depth
    parameters: list[tuple[_Parameter, LowRank | Dense]] = []
    for place, change in delta.changes.items():
        layer, name = layer_and_projection(place)
        if layer >= depth:
            raise ExperimentError(
                f"the delta changes layer {layer}, but the model's layers are 0 to {depth - 1}; "
                "apply it to the model that it was made for"
            )
        path, part, parts = architecture.projection(name)
        path = path.format(layer)
        module = model.get_submodule(path)
        weight = _Parameter(layer, path, module, "weight", part, parts)
        shape = tuple(weight.as_rows(weight.tensor).shape)
        if change.shape != shape:
            raise ExperimentError(
                f"the delta's change of layer {layer} is for a weight of {change.shape}, but {path} has {shape} "
                "(out, in); apply it to the model that it was made for"
            )
        parameters.append((weight, change))
        if isinstance(change, Dense) and change.bias is not None:
            if module.bias is None:
                raise ExperimentError(f"the delta changes the bias of layer {layer}, but {path} has none; leave it out")
            parameters.append((_Parameter(layer, path, module, "bias", part, parts), Dense(change.bias[:, None])))
    for parameter, _ in parameters:
        _refuse_shared(model, parameter)
    return parameters


def _refuse_shared(model: Any, parameter: _Parameter) -> None:
    """Raise ``ModelError`` where another parameter lives in the same memory: changing one would change both."""
    device, (first, last) = parameter.tensor.device, _extent(parameter.tensor)
    for name, other in model.named_parameters(remove_duplicate=False):
        if name != parameter.name and other.device == device:
            begin, end = _extent(other)
            if begin < last and first < end:
                raise ModelError(
                    f"{parameter.name} shares its memory with {name}, which would change with it; "
                    "give the module a weight of its own before editing it"
                )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First and last address of a tensor's elements, the last exclusive."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _restore(parameters: Sequence[_Parameter]) -> None:
    for parameter in reversed(parameters):
        tensor = parameter.tensor
        with _writing(tensor):
            tensor.copy_(parameter.before)


def _check_last(handle: Handle, parameter: _Parameter) -> None:
    """Raise ``ExperimentError`` unless the handle's delta is the last one on a layer."""
    last = _APPLIED[parameter.module][-1]()
    if last is None:
        raise ExperimentError(
            f"layer {parameter.layer} holds a later delta that can no longer be reverted, its handle being gone; "
            "load the model again, and keep the handles of deltas that come off"
        )
    if last is not handle:
        raise ExperimentError(
            f"layer {parameter.layer} holds a later delta; revert that one first, deltas on one layer come off in "
            "reverse order"
        )


@contextmanager
def _writing(tensor: Tensor) -> Iterator[None]:
    """Allows writing to a parameter so that its version counts it, and products in the dtype of their factors."""
    inference, device = torch.inference_mode(tensor.is_inference()), tensor.device.type
    with inference, torch.no_grad(), torch.autocast(device, enabled=False):
        yield


def _fingerprint(tensor: Tensor) -> tuple[Tensor, ...]:
    """Sums of a tensor's bits as integers along each dimension: other bits go unseen only if they cancel out in all."""
    try:
        words = tensor.view(torch.int64)  # several elements at once, where rows are that long
    except RuntimeError:
        words = tensor.view(_INTEGERS[tensor.element_size()])
    if words.ndim == 1:
        words = words[:, None]
    return tuple(words.sum(dim, dtype=torch.int64).cpu() for dim in range(words.ndim))
