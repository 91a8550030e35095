"""How many requests and edits go through the model together: as many as the memory budget holds."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from causalcone.engine.edit.methods.value_search import FoundValue, ValueOptimizer
from causalcone.engine.edit.requests.prompts import EditTask
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.runs.layers import Layers
from causalcone.engine.errors import MemoryBudgetError
from causalcone.engine.memory import fitting, halving
from causalcone.engine.models.base import Sizes
from causalcone.engine.plan.cost import weight_bytes
from causalcone.engine.run.scheduler import Budget
from causalcone.engine.run.session import Session

_SHARE_OF_WEIGHTS = 0.25
_WAITING = 0.125

Item = TypeVar("Item")
Result = TypeVar("Result")


def edit_name(request: Request) -> str:
    return f"the edit of fact {request.fact.id!r}"


@dataclass(frozen=True)
class Batching:
    """Splits work so that it fits a budget of memory, in a dtype."""

    sizes: Sizes
    budget: Budget
    dtype: torch.dtype

    def of_items(
        self, items: Iterable[Item], weigh: Callable[[Item], int], name: Callable[[Item], str], share: float = 1.0
    ) -> list[list[Item]]:
        """Consecutive items whose bytes fit a share of the budget, at least one; refuses one larger than the budget."""

        def weight(item: Item) -> int:
            weight = weigh(item)
            if weight > self.budget.for_rows:
                raise MemoryBudgetError(
                    f"{name(item)} alone needs about {(weight + self.budget.fixed) / 2**20:.1f} MiB, the budget is "
                    f"{self.budget.total / 2**20:.1f} MiB; give more memory"
                )
            return weight

        return list(fitting(items, weight, share * self.budget.for_rows))

    def of_tasks(self, tasks: Iterable[EditTask], at: Collection[int]) -> list[list[EditTask]]:
        """Requests whose contexts, passed through the unedited model, take less than half of the budget."""
        return self.of_items(
            tasks, lambda task: self._unedited_bytes(task, at), lambda task: edit_name(task.request), 0.5 - _WAITING
        )

    def waiting(self, items: Iterable[Item], weigh: Callable[[Item], int]) -> list[list[Item]]:
        """Consecutive items that wait together, beside one that is worked on."""
        return list(fitting(items, weigh, _WAITING * self.budget.for_rows))

    def of_vectors(
        self, edits: Sequence[tuple[int, int]], search: ValueOptimizer
    ) -> Iterator[tuple[tuple[int, int], FoundValue]]:
        """Each edit (a goal and a layer) with its vector, in order; the search takes the other half of the budget."""

        def name(edit: tuple[int, int]) -> str:
            return f"an edit of layer {edit[1]}"

        for group in self.of_items(edits, lambda edit: self._cone_bytes(search, *edit), name, 0.5):
            yield from zip(group, self.run(group, search.find), strict=True)

    def run(self, items: list[Item], function: Callable[[list[Item]], list[Result]]) -> list[Result]:
        """``function`` of the items; of halves of them, where memory runs out after all."""
        return halving(items, function, lambda _: "a single edit")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row that goes through a layer without gradient."""
        sizes = self.sizes
        queries, kv = sizes.heads * sizes.head_dim, 2 * sizes.kv_heads * sizes.head_dim
        return self.dtype.itemsize * (4 * sizes.hidden + 2 * queries + kv)

    def _unedited_bytes(self, task: EditTask, at: Collection[int]) -> int:
        """Stored keys and values, what is kept at the layers, and the pass itself."""
        sizes, prompts = self.sizes, task.prompts
        kv, rows = 2 * sizes.kv_heads * sizes.head_dim, sum(len(prompted.text) for prompted in prompts)
        tails = rows - sum(prompted.lookup for prompted in prompts)
        stored = rows * kv * (sizes.depth - min(at) - 1)
        kept = len(at) * (tails * sizes.hidden + len(prompts) * (2 * sizes.hidden + sizes.inner))
        return self.dtype.itemsize * (stored + kept) + rows * self.row_bytes + 12 * sizes.vocabulary

    def _cone_bytes(self, search: ValueOptimizer, number: int, layer: int) -> int:
        """Bytes that autograd keeps of an edit's rows at the layers after the edited one, and uses at one of them."""
        sizes, goal, prompts = self.sizes, search.objective.goals[number], search.objective.prompts
        texts = np.array([*goal.contexts, goal.essence])
        rows, seen = prompts.tail_rows[texts], np.array([len(prompts.texts[text]) for text in texts])
        attention = seen * 2 * sizes.kv_heads * sizes.head_dim + 3 * sizes.heads * rows * seen
        saved = int(rows.sum()) * self.saved_row_bytes + self.dtype.itemsize * int(attention.sum())
        return (sizes.depth - 1 - layer) * saved + 3 * int(rows.sum()) * self.saved_row_bytes

    @property
    def saved_row_bytes(self) -> int:
        """Bytes that autograd keeps of a row that goes through a layer."""
        sizes = self.sizes
        queries, kv = sizes.heads * sizes.head_dim, 2 * sizes.kv_heads * sizes.head_dim
        return self.dtype.itemsize * (8 * sizes.hidden + 3 * queries + 2 * kv + sizes.mlp_weights // sizes.hidden)


def layers_and_batching(session: Session) -> tuple[Layers, Batching]:
    """The layers that edited runs pass through, and how much passes together. Weights made ready stay from step to step
    if they take little of the budget."""
    budget = session.budget(gradient=True)
    ready = 2 * weight_bytes(session.sizes, session.dtype)
    fits = ready <= _SHARE_OF_WEIGHTS * budget.total
    if fits:
        budget = replace(budget, fixed=budget.fixed + ready)
    layers = Layers(session.architecture, budget.tiles, session.dtype, session.device, fits, session.backends)
    return layers, Batching(session.sizes, budget, session.dtype)
