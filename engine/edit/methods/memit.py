"""MEMIT: one vector found at the end of a window of layers, spread over the layers of the window (Meng et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Delta, LowRank
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.methods.hparams import MemitHparams
from causalcone.engine.edit.methods.method import Found, Method, Turns, VectorMethod, layers_outermost
from causalcone.engine.edit.methods.value_search import EditObjective, FoundValue
from causalcone.engine.edit.requests.prompts import EditTask
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.runs.frozen_prefix import Wanted
from causalcone.engine.edit.runs.layers import Layers, Passed
from causalcone.engine.edit.runs.packed_runs import Runs, in_order, spans
from causalcone.engine.errors import ExperimentError
from causalcone.kernels.tiles import pieces
from causalcone.kernels.transfer import send

Update = Callable[[Tensor, slice], Tensor]
"""What a change adds to the values (R, hidden) of rows with keys (R, inner): a slice of all rows."""


@dataclass(frozen=True, eq=False)
class JointEdit:
    """One change for several requests: delta, None where no vector was found; found: of each request, with reasons;
    judged: marks edits that are out of the ordinary."""

    requests: tuple[Request, ...]
    window: Window
    found: tuple[FoundValue, ...]
    delta: Delta | None
    judged: Callable[[Edit], Edit] = lambda edit: edit

    def edits(self) -> list[Edit]:
        """For each request an edit that holds the common change: what is scored and written."""
        pairs = zip(self.requests, self.found, strict=True)
        return [self.judged(value.edit(request, MEMIT_JOINT.name, self.window, self.delta)) for request, value in pairs]


@dataclass(frozen=True)
class Memit(VectorMethod):
    """The method on a model, every request by itself."""

    site = "out"

    hparams: MemitHparams

    def more(self, objective: EditObjective, windows: Sequence[Window]) -> Wanted:
        """All tokens of all contexts up to the lookup."""
        texts = objective.contexts.flatten()
        count = objective.prompts.lookup[texts] + 1
        prefixes = np.repeat(texts, count), spans(np.zeros_like(count), count)
        return {("inputs", window.layers[0]): prefixes for window in windows}

    def held(self, task: EditTask, windows: Sequence[Window]) -> int:
        """The rows of its contexts on their way through every window, and the changes that are made there."""
        sizes, rows = self.model.batching.sizes, sum(prompted.lookup + 1 for prompted in task.prompts[:-1])
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
        for number, layer in enumerate(window.layers):
            yield layer
            for prefixes in groups:
                keys, missing = prefixes.look(layer)
                rest = missing / (len(window.layers) - number)
                right = self.model.solve(layer, keys.T).T.to(keys.device)
                # R k^T (lambda C + k k^T)^-1 = R (C^-1 k)^T / (lambda + k . C^-1 k)
                left = rest / (self.hparams.covariance_weight + (keys * right).sum(1))[:, None]
                left, right = left.to(self._wide), right.to(self._wide)
                for row, change in enumerate(changes):
                    change[layer] = LowRank(left[row, :, None], right[row, :, None])
                if layer != window.layers[-1]:
                    prefixes.apply(_update_each(left, right, prefixes.request))
        deltas = iter(changes)
        return [
            value.edit(request, MEMIT.name, window, None if value.reason else Delta(next(deltas)))
            for request, value in zip(requests, values, strict=True)
        ]

    @property
    def _wide(self) -> torch.dtype:
        """What changes of weights are kept in."""
        return torch.promote_types(self.model.layers.dtype, torch.float32)


@dataclass(frozen=True)
class JointMemit(Memit):
    """The method on a model, all requests together."""

    def batches(self, requests: Sequence[Request], windows: Sequence[Window]) -> Iterator[list[Edit]]:
        """An edit of each request in each window, window by window; those of a window share their change."""
        return (joint.edits() for joint in self.joint(requests, windows))

    def joint(self, requests: Sequence[Request], windows: Sequence[Window]) -> Iterator[JointEdit]:
        """For each window, one change of the model for all requests together."""
        tasks = self.model.tasks(requests)
        rounds = self.rounds(windows, lambda window: sum(self.held(task, [window]) for task in tasks), windows)
        groups = [self.groups(tasks, together) for together in rounds]
        return chain.from_iterable(map(self._together, rounds, groups))

    @torch.inference_mode(False)
    def _together(self, windows: Sequence[Window], batches: Sequence[Sequence[EditTask]]) -> list[JointEdit]:
        self.model.layers.forget()
        groups: list[list[Prefixes]] = [[] for _ in windows]
        values: list[list[FoundValue]] = [[] for _ in windows]
        for tasks in batches:
            found = self.find(tasks, windows)
            for number, window in enumerate(windows):
                groups[number] += self.prefixes(window, found)
                values[number] += found.at(window)
            del found  # all windows' rows
        deltas = layers_outermost(map(self._solve_together, windows, groups))
        self.model.layers.forget()
        requests = tuple(task.request for tasks in batches for task in tasks)
        return [
            JointEdit(requests, window, tuple(of_window), delta, self.model.judged)
            for window, of_window, delta in zip(windows, values, deltas, strict=True)
        ]

    def _solve_together(self, window: Window, groups: Sequence[Prefixes]) -> Turns[Delta | None]:
        """The change that takes all keys to their goals, layer by layer; None where no request found its vector."""
        changes: dict[int, LowRank] = {}
        for number, layer in enumerate(window.layers):
            yield layer
            if not groups:
                continue
            seen = []
            for prefixes in groups:
                seen.append(prefixes.look(layer))
                prefixes.release()
            keys, missing = (torch.cat(column) for column in zip(*seen, strict=True))
            rest = missing / (len(window.layers) - number)
            right = self.model.solve(layer, keys.T).to(keys.device)
            # R K^T (lambda C + K K^T)^-1 = R (lambda + K^T C^-1 K)^-1 (C^-1 K)^T
            matrix = keys @ right
            matrix.diagonal().add_(self.hparams.covariance_weight)
            left = _solved(matrix.T, rest).T
            changes[layer] = LowRank(left.to(self._wide), right.to(self._wide))
            if layer != window.layers[-1]:
                for prefixes in groups:
                    prefixes.apply(_update_all(changes[layer]))
        return Delta(changes) if changes else None


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    try:
        return torch.linalg.solve(matrix, right)
    except torch.linalg.LinAlgError as error:
        raise ExperimentError(
            "the facts' keys cannot be told apart; give a covariance_weight above zero, or leave out facts that share "
            "their prompt's beginning"
        ) from error


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
        lengths = found.objective.prompts.lookup[found.objective.contexts] + 1
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


MEMIT = Method(
    name="memit",
    hparams=MemitHparams,
    build=Memit,
    flops=lambda work, hparams: work.flops.memit(work.searched, work.windows, hparams.steps),
    window=5,
    needs_moments=True,
    contexts="memit",
    grid={"kl_factor": (0.0625, 0.9, 1.0)},
)
MEMIT_JOINT = replace(
    MEMIT,
    name="memit_joint",
    build=JointMemit,
    flops=lambda work, hparams: work.flops.memit_joint(work.searched, work.windows, hparams.steps),
    joint=True,
)
