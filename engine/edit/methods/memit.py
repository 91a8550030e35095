"""MEMIT: one vector found at the end of a window of layers, spread over the layers of the window (Meng et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Delta, LowRank
from causalcone.engine.edit.methods.batching import Batching
from causalcone.engine.edit.methods.edits import Edit, JointEdit, failed, made
from causalcone.engine.edit.methods.hparams import MemitHparams
from causalcone.engine.edit.methods.memit_prefixes import Prefixes, Update, head_places
from causalcone.engine.edit.methods.objective import EditObjective
from causalcone.engine.edit.methods.value_search import FoundValue, ValueOptimizer
from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.runs.layers import Layers
from causalcone.engine.errors import ExperimentError

if TYPE_CHECKING:
    from causalcone.engine.edit.moments.moments import Moments

METHOD = "memit"


@dataclass(frozen=True)
class Memit:
    """The method on a model."""

    layers: Layers
    encoder: Encoder
    moments: Moments
    contexts: Sequence[str]
    hparams: MemitHparams
    batching: Batching

    def batches(self, requests: Sequence[Request], windows: Sequence[Window]) -> Iterator[list[Edit]]:
        """An edit of each request in each window, request by request; as many together as are made together."""
        ends = sorted({window.layers[-1] for window in windows})
        for own in self.batching.of_requests(requests, ends, self._training):
            yield self.batching.run(own, lambda part: self._batch(part, windows, ends))

    @torch.inference_mode(False)
    def _batch(self, own: Sequence[Request], windows: Sequence[Window], ends: Sequence[int]) -> list[Edit]:
        self.layers.forget()
        training = self._training(own)
        search = self._search(training, windows, ends)
        wanted = [(number, end) for number in range(len(own)) for end in ends]
        vectors = dict(self.batching.of_vectors(wanted, search))
        by_window = []
        for window in windows:
            found = [vectors[number, window.layers[-1]] for number in range(len(own))]
            by_window.append(self._spread_each(own, window, search, training, found))
        self.layers.forget()
        return [edit for edits in zip(*by_window, strict=True) for edit in edits]

    @torch.inference_mode(False)
    def joint(self, requests: Sequence[Request], window: Window) -> JointEdit:
        """One change of the model for all requests together."""
        end = window.layers[-1]
        self.layers.forget()
        parts: list[Prefixes] = []
        found: list[FoundValue] = []
        for own in self.batching.of_requests(requests, [end], self._training):
            training = self._training(own)
            search = self._search(training, [window], [end])
            vectors = [each for _, each in self.batching.of_vectors([(n, end) for n in range(len(own))], search)]
            parts += self._heads(window, search, training, vectors)
            found += vectors
        delta = self._solve_together(window, parts)
        self.layers.forget()
        return JointEdit(tuple(requests), window, tuple(found), delta)

    def _solve_together(self, window: Window, parts: Sequence[Prefixes]) -> Delta | None:
        """The change that takes all keys to their goals, layer by layer; None where no request found its vector."""
        changes: dict[int, LowRank] = {}
        for place, layer in enumerate(window.layers if parts else ()):
            seen = []
            for part in parts:
                seen.append(part.look(layer))
                part.release()
            keys, missing = (torch.cat(column) for column in zip(*seen, strict=True))
            rest = missing / (len(window.layers) - place)
            right = self.moments.solve(layer, keys.T).to(keys.device)
            # R K^T (lambda C + K K^T)^-1 = R (lambda + K^T C^-1 K)^-1 (C^-1 K)^T
            matrix = keys @ right
            matrix.diagonal().add_(self.hparams.covariance_weight)
            left = _solved(matrix.T, rest).T
            changes[layer] = LowRank(left.to(self.wide), right.to(self.wide))
            if layer != window.layers[-1]:
                for part in parts:
                    part.apply(_shared_update(changes[layer]))
        return Delta(changes) if changes else None

    def _training(self, requests: Sequence[Request]) -> EditObjective:
        return EditObjective.of(requests, self.encoder, self.contexts)

    def _search(self, training: EditObjective, windows: Sequence[Window], ends: Sequence[int]) -> ValueOptimizer:
        heads = head_places(training)
        more = {("inputs", window.layers[0]): heads for window in windows}
        return training.search(self.layers, ends, "out", self.hparams, more)

    def _heads(
        self, window: Window, search: ValueOptimizer, training: EditObjective, found: Sequence[FoundValue]
    ) -> list[Prefixes]:
        """The contexts of the requests that found their vector, if there are any."""
        kept = [number for number, each in enumerate(found) if each.reason is None]
        if not kept:
            return []
        goal = torch.stack([found[number].base + found[number].delta for number in kept])
        return [Prefixes(self.layers, window, search.unedited, training, kept, goal)]

    def _spread_each(
        self,
        requests: Sequence[Request],
        window: Window,
        search: ValueOptimizer,
        training: EditObjective,
        found: Sequence[FoundValue],
    ) -> list[Edit]:
        """The edit of each request by itself."""
        changes: list[dict[int, LowRank]] = [{} for each in found if each.reason is None]
        for heads in self._heads(window, search, training, found):
            for place, layer in enumerate(window.layers):
                keys, missing = heads.look(layer)
                rest = missing / (len(window.layers) - place)
                right = self.moments.solve(layer, keys.T).T.to(keys.device)
                # R k^T (lambda C + k k^T)^-1 = R (C^-1 k)^T / (lambda + k . C^-1 k)
                left = rest / (self.hparams.covariance_weight + (keys * right).sum(1))[:, None]
                left, right = left.to(self.wide), right.to(self.wide)
                for number, own in enumerate(changes):
                    own[layer] = LowRank(left[number, :, None], right[number, :, None])
                if layer != window.layers[-1]:
                    heads.apply(_own_update(left, right, heads.request))
        own_changes = iter(changes)
        edits = []
        for request, each in zip(requests, found, strict=True):
            common = (request, METHOD, window.layer, window.size, each.steps, each.loss)
            if each.reason is not None:
                edits.append(failed(*common, each.reason))
            else:
                edits.append(made(*common, Delta(next(own_changes))))
        listed = window.layers if window.listed else ()
        return [replace(edit, listed=listed) for edit in edits]

    @property
    def wide(self) -> torch.dtype:
        """What changes of weights are kept in."""
        return torch.promote_types(self.layers.dtype, torch.float32)


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    try:
        return torch.linalg.solve(matrix, right)
    except torch.linalg.LinAlgError as error:
        raise ExperimentError(
            "the facts' keys cannot be told apart; give a covariance_weight above zero, or leave out facts that share "
            "their prompt's beginning"
        ) from error


def _own_update(left: Tensor, right: Tensor, request: Tensor) -> Update:
    """Each row changed by its request's rank-one change: left (n, hidden), right (n, inner), request (R,)."""

    def update(keys: Tensor, rows: slice) -> Tensor:
        own = request[rows]
        along = (keys * right.index_select(0, own).to(keys.dtype)).sum(1, keepdim=True)
        return along * left.index_select(0, own).to(keys.dtype)

    return update


def _shared_update(change: LowRank) -> Update:
    """All rows changed by one change."""
    return lambda keys, _: change.to(keys.device, keys.dtype).product(keys)
