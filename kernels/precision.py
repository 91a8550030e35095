"""How exactly float32 products are computed, whatever the rest of the process has set."""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")

_PRODUCTS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


@contextmanager
def float32_products(tf32: bool = False) -> Iterator[None]:
    """Float32 products in full, or with ``tf32`` in TF32, where the device has it; then as they were before.

    TF32 rounds what is multiplied to 10 bits of mantissa. Triton kernels compute in full float32 all the same.
    """
    before = tuple(products.fp32_precision for products in _PRODUCTS)
    if not tf32 and set(before) == {"none"}:  # as torch comes
        yield
        return
    legacy: str | None = None
    with suppress(RuntimeError):  # where the older interface cannot be read
        legacy = torch.get_float32_matmul_precision()
    try:
        # torch has two interfaces, and refuses to read the one where only the other was set; this sets both
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for products, precision in zip(_PRODUCTS, before, strict=True):
            if products.fp32_precision != precision:
                products.fp32_precision = precision


def each_within(context: Callable[[], AbstractContextManager[object]], items: Iterator[Item]) -> Iterator[Item]:
    """The items, each of them computed within a context of its own, which whoever takes them never sees."""
    taken: list[Item] = []
    try:
        while True:
            with context():
                try:
                    taken.append(next(items))
                except StopIteration:
                    return
            yield taken.pop()  # held no longer than it is needed
    finally:
        if isinstance(items, Generator):
            items.close()
