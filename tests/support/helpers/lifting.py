"""Lets an unmodified float64 model of transformers compute in float64 throughout.

Its code takes norms, rotary angles and softmax to float32 and back. Under ``lifted()`` those casts leave float64 as it
is, and positions, which are integers, become float64 instead of float32. It is for float64 models only: in others, the
positions would be too precise for what they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CASTS = (Tensor.to, Tensor.type)
_WITH_DTYPE = (F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax)
_LIKE = (Tensor.type_as, Tensor.to)


class _Lifting(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        source = args[0] if args else None
        if not isinstance(source, Tensor) or not _rises(source):
            return func(*args, **kwargs)
        if func is Tensor.float:
            return source.double()
        if func in _LIKE and len(args) > 1 and isinstance(args[1], Tensor) and args[1].dtype == torch.float32:
            return source.to(args[1].device, torch.float64)
        if func in _CASTS or func in _WITH_DTYPE:
            args = tuple(_doubled(value) for value in args)
            kwargs = {name: _doubled(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _rises(tensor: Tensor) -> bool:
    """Whether a cast of the tensor to float32 is to give float64."""
    return tensor.dtype == torch.float64 or not (tensor.is_floating_point() or tensor.is_complex())


def _doubled(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value == torch.float32 else value


@contextmanager
def lifted() -> Iterator[None]:
    """While inside, casts of float64 tensors and of integers to float32 give float64."""
    with _Lifting():
        yield
