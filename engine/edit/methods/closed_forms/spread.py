"""Methods that find one vector at the end of a window of layers and spread it over the window's layers, each changed by
a closed form (docs/editing.md, "Closed forms")."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Delta, LowRank
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.methods.hparams import ValueHparams
from causalcone.engine.edit.methods.least_squares import History, LeastSquares
from causalcone.engine.edit.methods.method import Found, Method, Turns, VectorMethod, layers_outermost
from causalcone.engine.edit.methods.value_search import EditObjective, FoundValue
from causalcone.engine.edit.requests.prompts import EditTask
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.runs.frozen_prefix import Wanted
from causalcone.engine.edit.runs.layers import Layers, Passed
from causalcone.engine.edit.runs.packed_runs import Runs, in_order, spans
from causalcone.kernels.tiles import pieces
from causalcone.kernels.transfer import send

Update = Callable[[Tensor, slice], Tensor]
"""What a change adds to the values (R, hidden) of rows with keys (R, inner): a slice of all rows."""


@dataclass(frozen=True, eq=False)
class JointEdit:
    """One change for several requests: delta, None where no vector was found; found: of each request, with reasons;
    keys (n, inner): of each layer, those that the change is of; judged: marks edits that are out of the ordinary."""

    requests: tuple[Request, ...]
    window: Window
    found: tuple[FoundValue, ...]
    delta: Delta | None
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    judged: Callable[[Edit], Edit] = lambda edit: edit

    def edits(self) -> list[Edit]:
        """For each request an edit that holds the common change: what is scored and written."""
        pairs = zip(self.requests, self.found, strict=True)
        return [self.judged(value.edit(request, "memit_joint", self.window, self.delta)) for request, value in pairs]


@dataclass(frozen=True)
class Spread(VectorMethod):
    """Such a method on a model: by default every request by itself; together: all requests of a window in one
    change."""

    site = "out"

    together: bool = False

    def problem(self, count: int) -> LeastSquares:
        """What is solved in each layer, for so many requests together."""
        raise NotImplementedError

    def notes(self, layers: Sequence[int]) -> dict[str, Any]:
        """What results should say of the problem in these layers; raises ``ExperimentError`` where it has no
        solution."""
        return {}

    def joined(self, tasks: Sequence[EditTask]) -> Sequence[EditTask]:
        """What vectors are found for, of requests that are edited together."""
        return tasks

    def batches(self, requests: Sequence[Request], windows: Sequence[Window]) -> Iterator[list[Edit]]:
        """An edit of each request in each window: request by request, or, together, window by window; those of a window
        then share their change."""
        self.notes(sorted({layer for window in windows for layer in window.layers}))
        if not self.together:
            return super().batches(requests, windows)
        return (joint.edits() for joint in self.joint(requests, windows))

    def more(self, objective: EditObjective, windows: Sequence[Window]) -> Wanted:
        """All tokens of all contexts up to the lookup."""
        texts = objective.keyed.flatten()
        count = objective.prompts.lookup[texts] + 1
        prefixes = np.repeat(texts, count), spans(np.zeros_like(count), count)
        return {("inputs", window.layers[0]): prefixes for window in windows}

    def held(self, task: EditTask, windows: Sequence[Window]) -> int:
        """The rows of its contexts on their way through every window, and the changes that are made there."""
        sizes, rows = self.model.batching.sizes, sum(prompted.lookup + 1 for prompted in task.prompts[: task.keyed])
        changed = sum(len(window.layers) for window in windows) * self._wide.itemsize * (sizes.hidden + sizes.inner)
        return len(windows) * rows * sizes.hidden * self.model.layers.dtype.itemsize + changed

    def prefixes(self, window: Window, found: Found) -> list[Prefixes]:
        """The contexts of the requests that found their vector, if there are any."""
        values = found.at(window)
        numbers = [number for number, value in enumerate(values) if value.reason is None]
        if not numbers:
            return []
        goal = torch.stack([values[number].base + values[number].delta for number in numbers])
        return [Prefixes(self.model.layers, window, found, numbers, goal)]

    def edits(self, window: Window, found: Found) -> Turns[list[Edit]]:
        requests, values, groups = found.requests, found.at(window), self.prefixes(window, found)
        del found  # all windows' rows
        changes: list[dict[int, LowRank]] = [{} for value in values if value.reason is None]
        problem = self.problem(1)
        for number, layer in enumerate(window.layers):
            yield layer
            for prefixes in groups:
                keys, missing = prefixes.look(layer)
                left, right = problem.each(layer, keys, missing / (len(window.layers) - number))
                left, right = left.to(self._wide), right.to(self._wide)
                for row, change in enumerate(changes):
                    change[layer] = LowRank(left[row, :, None], right[row, :, None])
                if layer != window.layers[-1]:
                    prefixes.apply(_update_each(left, right, prefixes.request))
        deltas = iter(changes)
        return [
            value.edit(request, "memit", window, None if value.reason else Delta(next(deltas)))
            for request, value in zip(requests, values, strict=True)
        ]

    @property
    def _wide(self) -> torch.dtype:
        """What changes of weights are kept in."""
        return torch.promote_types(self.model.layers.dtype, torch.float32)

    def remember(self, history: History, keys: Mapping[int, Tensor]) -> None:
        """Let a history preserve keys (n, inner) by layer."""
        for layer, of_layer in keys.items():
            replace(self.problem(1), history=history).remember(layer, of_layer.to(self.model.layers.device))

    def joint(self, requests: Sequence[Request], windows: Sequence[Window]) -> Iterator[JointEdit]:
        """For each window, one change of the model for all requests together."""
        tasks = self.joined(self.model.tasks(requests))
        rounds = self.rounds(windows, lambda window: sum(self.held(task, [window]) for task in tasks), windows)
        groups = [self.groups(tasks, together) for together in rounds]
        return chain.from_iterable(self._together(requests, *each) for each in zip(rounds, groups, strict=True))

    @torch.inference_mode(False)
    def _together(
        self, requests: Sequence[Request], windows: Sequence[Window], batches: Sequence[Sequence[EditTask]]
    ) -> list[JointEdit]:
        self.model.layers.forget()
        groups: list[list[Prefixes]] = [[] for _ in windows]
        values: list[dict[int, FoundValue]] = [{} for _ in windows]
        for tasks in batches:
            found = self.find(tasks, windows)
            for number, window in enumerate(windows):
                groups[number] += self.prefixes(window, found)
                for task, value in zip(tasks, found.at(window), strict=True):
                    values[number] |= {id(request): value for request in task.members}
            del found  # all windows' rows
        solved = layers_outermost(map(self._solve_together, windows, groups))
        self.model.layers.forget()
        of_windows = zip(windows, values, solved, strict=True)
        return [
            JointEdit(tuple(requests), window, tuple(of[id(request)] for request in requests), *parts)
            for window, of, parts in of_windows
        ]

    def _solve_together(
        self, window: Window, groups: Sequence[Prefixes]
    ) -> Turns[tuple[Delta | None, dict[int, Tensor]]]:
        """The change that takes all keys to their goals, layer by layer, and the keys; None where no request found its
        vector. Layers before a layer are changed when its keys are looked at: these are the keys of the edited
        model."""
        changes: dict[int, LowRank] = {}
        keys_of: dict[int, Tensor] = {}
        for number, layer in enumerate(window.layers):
            yield layer
            if not groups:
                continue
            seen = []
            for prefixes in groups:
                seen.append(prefixes.look(layer))
                prefixes.release()
            keys, missing = (torch.cat(column) for column in zip(*seen, strict=True))
            problem = replace(self.problem(len(keys)), history=self.model.history)
            left, right = problem.together(layer, keys, missing / (len(window.layers) - number))
            keys_of[layer] = keys
            changes[layer] = LowRank(*(part.to(self._wide).contiguous() for part in (left, right)))
            if layer != window.layers[-1]:
                for prefixes in groups:
                    prefixes.apply(_update_all(changes[layer]))
        return (Delta(changes) if changes else None), keys_of


def spread_method(name: str, form: type[Spread], hparams: type[ValueHparams], **more: Any) -> Method:
    """The definition of such a method; more: what differs from the usual."""
    usual: dict[str, Any] = {
        "build": form,
        "together": partial(form, together=True),
        "flops": lambda work, hparams: work.flops.memit(work.searched, work.windows, hparams.steps),
        "window": 5,
        "needs_moments": True,
        "contexts": "memit",
        "grid": {"kl_factor": (0.0625, 0.9, 1.0)},
    }
    return Method(name=name, hparams=hparams, **{**usual, **more})


def _update_each(left: Tensor, right: Tensor, request: Tensor) -> Update:
    """Each row changed by its request's rank-one change: left (n, hidden), right (n, inner), request (R,)."""

    def update(keys: Tensor, rows: slice) -> Tensor:
        numbers = request[rows]
        along = (keys * right.index_select(0, numbers).to(keys.dtype)).sum(1, keepdim=True)
        return along * left.index_select(0, numbers).to(keys.dtype)

    return update


def _update_all(change: LowRank) -> Update:
    return lambda keys, _: change.to(keys.device, keys.dtype).product(keys)


class Prefixes:
    """The contexts up to the lookups of n requests, each bare prompt first, on their way through the window, whose last
    layer's outputs at the bare prompts' ends are to become the goal (n, hidden)."""

    def __init__(self, layers: Layers, window: Window, found: Found, numbers: Sequence[int], goal: Tensor) -> None:
        """numbers: of the requests, among those found."""
        self.layers, self.window, self.goal = layers, window, goal.double()
        lengths = found.objective.prompts.lookup[found.objective.keyed] + 1
        starts = (np.cumsum(lengths) - lengths.ravel()).reshape(lengths.shape)
        n, contexts = len(numbers), lengths.shape[1]
        order = in_order(lengths[list(numbers)].ravel())
        count = lengths[list(numbers)].ravel()[order]
        first = np.cumsum(count) - count
        bare = order % contexts == 0
        bare_count = count[bare]
        bare_end = np.empty(n, dtype=np.int64)
        bare_end[order[bare] // contexts] = np.cumsum(bare_count) - 1

        indices = (
            Runs.whole(count),
            Runs.whole(bare_count),
            spans(starts[list(numbers)].ravel()[order], count),
            (first + count - 1)[np.argsort(order)].reshape(n, contexts),
            spans(first[bare], bare_count),
            bare_end,
            np.repeat(order // contexts, count),
        )
        sent = send(indices, layers.device)
        self.runs, self.bare_runs, picked, self.lookup, self.bare, self.bare_lookup, self.request = sent
        self.at = window.layers[0]
        self.rows = found.rows["inputs", self.at].index_select(0, picked)
        self._passed: Passed | None = None

    @torch.no_grad()
    def look(self, layer: int) -> tuple[Tensor, Tensor]:
        """At a layer, as those before it are now: each request's key (n, inner), half of it the bare prompt's, and how
        far its output (n, hidden) at the window's last layer is from the goal; float64."""
        while self.at < layer:
            self.rows = self.layers.advance(self.layers.block(self.at), self.rows, self.runs).out
            self.at += 1
        passed = self._pass()
        assert passed.keys is not None
        keys = passed.keys[self.lookup].double()
        rows = passed.out.index_select(0, self.bare)
        for later in range(layer + 1, self.window.layers[-1] + 1):
            rows = self.layers.advance(self.layers.block(later), rows, self.bare_runs).out
        rest = self.goal - rows.index_select(0, self.bare_lookup).double()
        return (keys[:, 0] + keys[:, 1:].mean(1)) / 2, rest

    def release(self) -> None:
        """Free what was seen at the layer, several times the memory of what enters it; it is computed again."""
        self._passed = None

    @torch.no_grad()
    def apply(self, update: Update) -> None:
        """Go through the layer that was looked at, changed."""
        block, passed = self.layers.block(self.at), self._pass()
        assert passed.keys is not None
        out = torch.empty_like(passed.out)
        for rows in pieces(len(out), self.layers.tiles.rows, out.device):
            values = passed.values[rows] + update(passed.keys[rows], rows)
            out[rows] = passed.mid[rows] + block.mlp_out(values)
        self.rows = out
        self.at += 1
        self.release()

    def _pass(self) -> Passed:
        if self._passed is None:
            self._passed = self.layers.advance(self.layers.block(self.at), self.rows, self.runs, keep_keys=True)
        return self._passed
