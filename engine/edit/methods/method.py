"""A method of editing: everything that is known of it, in one value."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from itertools import starmap
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Dense, LowRank, Place, layer_and_projection
from causalcone.engine.edit.methods.batching import Batching
from causalcone.engine.edit.methods.edits import Edit, suspicion
from causalcone.engine.edit.methods.hparams import Hparams, ValueHparams
from causalcone.engine.edit.methods.least_squares import History
from causalcone.engine.edit.methods.value_search import EditObjective, FoundValue, Site, ValueOptimizer
from causalcone.engine.edit.moments.moments import Moments, factors_fit
from causalcone.engine.edit.requests.prompts import EditTask, Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window, as_layers, as_windows
from causalcone.engine.edit.runs.flops import EditWork
from causalcone.engine.edit.runs.frozen_prefix import Wanted
from causalcone.engine.edit.runs.layers import Layers
from causalcone.engine.errors import ExperimentError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class EditableModel:
    """What a method works with. layers: the model's, which edited runs pass through; batching: how many edits fit into
    memory; contexts: texts put before prompts, for methods that need them; history: keys of earlier edits, which closed
    forms preserve; state: what a method keeps from batch to batch of a sequence, by names of its own, which is saved
    with every batch."""

    layers: Layers
    encoder: Encoder
    batching: Batching
    contexts: Sequence[str] = ()
    moments: Moments | None = None
    history: History | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    _norms: dict[tuple[Place, bool], float] = field(default_factory=dict)

    def tasks(self, requests: Sequence[Request]) -> list[EditTask]:
        """The requests as token sequences, in the contexts."""
        return [self.encoder.task(request, self.contexts) for request in requests]

    @property
    def second_moments(self) -> Moments:
        """Of a method that needs moments."""
        assert self.moments is not None
        return self.moments

    def judged(self, edit: Edit) -> Edit:
        """The edit with the norm of its change over that of the changed weights, and, where it is out of the ordinary,
        why it is suspect."""
        if edit.delta is None or edit.delta_norm is None:
            return replace(edit, key_alignment=None)
        weights = math.hypot(*starmap(self.norm, edit.delta.changes.items()))
        relative = edit.delta_norm / weights if weights else math.inf
        at_start = bool(self.contexts) and not self.encoder.bare(edit.request).lookup
        return replace(edit, relative_norm=relative, suspect=suspicion(relative, edit.key_alignment, at_start))

    def norm(self, place: Place, change: LowRank | Dense) -> float:
        """The norm of what a change adds to."""
        with_bias = isinstance(change, Dense) and change.bias is not None
        if (place, with_bias) not in self._norms:
            layer, name = layer_and_projection(place)
            linear = self.layers.block(layer).projection(name)
            tensors = [linear.weight, linear.bias] if with_bias and linear.bias is not None else [linear.weight]
            norms = (torch.linalg.vector_norm(tensor, dtype=torch.float64).item() for tensor in tensors)
            self._norms[place, with_bias] = math.hypot(*norms)
        return self._norms[place, with_bias]


class EditMaker(Protocol):
    def batches(self, requests: Sequence[Request], windows: Sequence[Window]) -> Iterator[list[Edit]]:
        """An edit of each request in each window, request by request, in batches of those made together."""


@dataclass(frozen=True)
class Found:
    """Vectors of requests: values by request, a number, and layer; rows: what a method keeps of the unedited model."""

    requests: Sequence[Request]
    objective: EditObjective
    rows: Mapping[tuple[str, int], Tensor]
    values: Mapping[tuple[int, int], FoundValue]

    def at(self, window: Window) -> list[FoundValue]:
        """The vector of each request at the end of a window."""
        return [self.values[number, window.layers[-1]] for number in range(len(self.requests))]


@dataclass(frozen=True)
class VectorMethod:
    """Base of the methods that find a vector at the end of each window first, and then the change of its layers."""

    site: ClassVar[Site]

    model: EditableModel
    hparams: ValueHparams

    def batches(self, requests: Sequence[Request], windows: Sequence[Window]) -> Iterator[list[Edit]]:
        groups = self.groups(self.model.tasks(requests), windows)
        rounds = self.rounds(groups, lambda group: sum(self.held(task, windows) for task in group), windows)
        tasks_of = ([task for group in groups for task in group] for groups in rounds)
        return (self.model.batching.run(tasks, lambda tasks: self._batch(tasks, windows)) for tasks in tasks_of)

    def groups(self, tasks: Sequence[EditTask], windows: Sequence[Window]) -> list[list[EditTask]]:
        """The requests whose vectors are searched together."""
        return self.model.batching.of_tasks(tasks, {window.layers[-1] for window in windows})

    def rounds(self, items: Sequence[Item], held: Callable[[Item], int], windows: Sequence[Window]) -> list[list[Item]]:
        """The items of work that go through the layers together, so that a factor serves them all: where the factors of
        all layers are kept each goes alone, and comes sooner. held: bytes of an item that waits for its layers."""
        edited = {layer for window in windows for layer in window.layers}
        if factors_fit(self.model.second_moments, edited, self.model.layers.device):
            return [[item] for item in items]
        return self.model.batching.waiting(items, held)

    def find(self, tasks: Sequence[EditTask], windows: Sequence[Window]) -> Found:
        ends = sorted({window.layers[-1] for window in windows})
        search, values = self._search(tasks, ends, windows)
        rows = {key: search.unedited.rows[key] for key in self.more(search.objective, windows)}
        return Found([task.request for task in tasks], search.objective, rows, values)

    def reached_norms(self, tasks: Sequence[EditTask], layer: int) -> list[float]:
        """The norm of the MLP's output with the vector of each request that finds one."""
        search, values = self._search(tasks, [layer], ())
        outputs = (search.output(goal, layer) + value.delta for (goal, _), value in values.items() if not value.reason)
        return [output.norm().item() for output in outputs]

    def _search(
        self, tasks: Sequence[EditTask], ends: Sequence[int], windows: Sequence[Window]
    ) -> tuple[ValueOptimizer, dict[tuple[int, int], FoundValue]]:
        objective = EditObjective.of(tasks)
        more = self.more(objective, windows)
        search = objective.search(self.model.layers, ends, self.site, self.hparams, more)
        wanted = [(number, end) for number in range(len(tasks)) for end in ends]
        return search, dict(self.model.batching.of_vectors(wanted, search))

    @torch.inference_mode(False)
    def _batch(self, tasks: Sequence[EditTask], windows: Sequence[Window]) -> list[Edit]:
        self.model.layers.forget()
        made = layers_outermost(edits for group in self.groups(tasks, windows) for edits in self._begun(group, windows))
        self.model.layers.forget()
        by_group = zip(*[iter(made)] * len(windows), strict=True)
        return [edit for by_window in by_group for edits in zip(*by_window, strict=True) for edit in edits]

    def _begun(self, tasks: Sequence[EditTask], windows: Sequence[Window]) -> list[Turns[list[Edit]]]:
        found = self.find(tasks, windows)
        return [self.edits(window, found) for window in windows]

    def more(self, objective: EditObjective, windows: Sequence[Window]) -> Wanted:
        """What is kept of the unedited model for ``edits``."""
        raise NotImplementedError

    def held(self, task: EditTask, windows: Sequence[Window]) -> int:
        """Bytes that ``edits`` of a request keep while they wait for their layers."""
        raise NotImplementedError

    def edits(self, window: Window, found: Found) -> Turns[list[Edit]]:
        """The edit of each request in a window, from its vector."""
        raise NotImplementedError


Turns = Generator[int, None, Result]
"""A computation that names each layer whose second moment it is to use, in rising order, before it uses it."""


def layers_outermost(parts: Iterable[Turns[Result]]) -> list[Result]:
    """The results of computations that take turns: all that use a layer's moment do so one after the other. Each begins
    before the next is made."""
    turns: list[tuple[int, int, Turns[Result]]] = []
    results: dict[int, Result] = {}
    for number, part in enumerate(parts):
        heappush(turns, (next(part), number, part))
    while turns:
        _, number, part = heappop(turns)
        try:
            heappush(turns, (next(part), number, part))
        except StopIteration as end:
            results[number] = end.value
    return [results[number] for number in sorted(results)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """A method of editing.

    name: what options and tables call it; hparams: the class of its hyperparameters; build: makes it on a model;
    together: makes it on a model so that all requests of a window share one change, where that differs; flops: what it
    takes to edit, in multiply-adds x 2. window: how many layers it edits together by default; None for a method of one
    layer; joint: whether all requests share one change of the weights; rank: of the change of a weight per request,
    None for a dense one; history: whether a sequence of edits preserves the keys of earlier ones by default, None where
    the method cannot. needs_moments: whether it needs second moments of the edited layers; contexts: whose contexts it
    needs. preset_name: the method whose settings a preset has for it, itself by default; by_window: whether presets
    have settings for each size of window; grid: the values that tuning tries by default; caution: for each
    hyperparameter whether more of it makes an edit more cautious (1) or bolder (-1). aliases: further names for it,
    each with the hyperparameters that it stands for; fixed: those of this name.
    """

    name: str
    hparams: type[Hparams]
    build: Callable[[EditableModel, Any], EditMaker]
    flops: Callable[[EditWork, Any], float]
    together: Callable[[EditableModel, Any], EditMaker] | None = None
    window: int | None = None
    joint: bool = False
    history: bool | None = None
    rank: int | None = 1
    needs_moments: bool = False
    contexts: Literal["rome", "memit"] | None = None
    preset_name: str = ""
    by_window: bool = False
    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)
    caution: Mapping[str, Literal[1, -1]] = field(default_factory=dict)
    aliases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.preset_name:
            object.__setattr__(self, "preset_name", self.name)

    def size(self, window: int | None) -> int:
        """How many layers are edited together where ``window`` are asked for."""
        if window is None:
            return self.window or 1
        if self.window is None and window != 1:
            raise ExperimentError(f"{self.name} edits one layer, not a window of {window}; choose another method")
        return window

    def windows(self, layers: Any, window: int | None, depth: int) -> list[Window]:
        """The windows that are edited: around each layer, or as listed."""
        size = self.size(window)
        return as_windows(as_layers(layers, depth) if self.window is None else layers, size, depth)

    def checked(self, hparams: Hparams | None) -> Hparams:
        """The hyperparameters, by default all at their defaults, with what the name stands for; refuses those of other
        methods."""
        if hparams is None:
            return self.hparams(**self.fixed)
        if not isinstance(hparams, self.hparams):
            raise ExperimentError(f"the hyperparameters are {type(hparams).__name__}; give {self.hparams.__name__}")
        return replace(hparams, **self.fixed)
