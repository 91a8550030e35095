"""ROME: a rank-one change of one layer, which maps the subject's key to a value that says the target (Meng et al.
2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from causalcone.engine.edit.deltas.delta import Delta, LowRank
from causalcone.engine.edit.methods.batching import Batching
from causalcone.engine.edit.methods.edits import Edit, failed, made
from causalcone.engine.edit.methods.hparams import RomeHparams
from causalcone.engine.edit.methods.objective import EditObjective
from causalcone.engine.edit.methods.value_search import FoundValue, ValueOptimizer
from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.runs.layers import Layers

if TYPE_CHECKING:
    from causalcone.engine.edit.moments.moments import Moments

METHOD = "rome"


@dataclass(frozen=True)
class Rome:
    """The method on a model."""

    layers: Layers
    encoder: Encoder
    moments: Moments
    contexts: Sequence[str]
    hparams: RomeHparams
    batching: Batching

    def batches(self, requests: Sequence[Request], at: Sequence[int]) -> Iterator[list[Edit]]:
        """An edit of each request at each of the layers ``at``, request by request; as many together as are made
        together."""
        for own in self.batching.of_requests(requests, at, self._training):
            yield self.batching.run(own, lambda part: self._batch(part, at))

    @torch.inference_mode(False)
    def _batch(self, own: Sequence[Request], at: Sequence[int]) -> list[Edit]:
        self.layers.forget()
        training = self._training(own)
        keys = {("keys", layer): training.prompts.lookups for layer in at}
        search = training.search(self.layers, at, "values", self.hparams, keys)
        wanted = [(number, layer) for number in range(len(own)) for layer in at]
        found = dict(self.batching.of_vectors(wanted, search))
        directions = {layer: self._directions(search, layer) for layer in at}
        self.layers.forget()
        return [self._edit(own[n], (n, layer), found[n, layer], search, directions[layer][n]) for n, layer in wanted]

    def _directions(self, search: ValueOptimizer, layer: int) -> Tensor:
        """(requests, inner) float64: C^-1 k* of each."""
        keys = search.unedited.kept["keys", layer]
        means = torch.stack([keys[list(goal.contexts)].double().mean(0) for goal in search.goals])
        return self.moments.solve(layer, means.T).T

    def _training(self, requests: Sequence[Request]) -> EditObjective:
        return EditObjective.of(requests, self.encoder, self.contexts)

    def _edit(
        self, request: Request, edit: tuple[int, int], found: FoundValue, search: ValueOptimizer, direction: Tensor
    ) -> Edit:
        number, layer = edit
        if found.reason is not None:
            return failed(request, METHOD, layer, 1, found.steps, found.loss, found.reason)
        key = search.unedited.kept["keys", layer][search.goals[number].contexts[0]].double()
        change = rank_one(key, found.delta, direction.to(key.device))
        return made(request, METHOD, layer, 1, found.steps, found.loss, Delta({layer: change}))


def rank_one(key: Tensor, delta: Tensor, direction: Tensor) -> LowRank:
    """The change that adds delta (hidden,) to the value of a key (inner,), along C^-1 k* (inner,), in delta's dtype."""
    u = direction / direction.norm()
    weight = delta.double() / (key @ u)
    return LowRank(weight[:, None].to(delta.dtype), u[:, None].to(delta.dtype))
