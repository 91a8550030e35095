"""What ROME and MEMIT train vectors on: the contexts of each request, and the prompt of its subject's essence."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from causalcone.engine.edit.methods.hparams import MemitHparams, RomeHparams
from causalcone.engine.edit.methods.value_search import Goal, Site, ValueOptimizer, wanted_by_vectors
from causalcone.engine.edit.requests.prompts import ESSENCE, Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.runs.edited_runs import Prompts
from causalcone.engine.edit.runs.frozen_prefix import Wanted, run_unedited
from causalcone.engine.edit.runs.layers import Layers
from causalcone.engine.edit.runs.packed_runs import Text


@dataclass(frozen=True)
class EditObjective:
    """The texts of some requests, and each request's goal."""

    prompts: Prompts
    goals: list[Goal]

    @classmethod
    def of(cls, requests: Sequence[Request], encoder: Encoder, contexts: Sequence[str]) -> EditObjective:
        texts: list[Text] = []
        lookup: list[int] = []
        read: list[int] = []
        goals: list[Goal] = []
        for request in requests:
            first = len(texts)
            for prompted in encoder.contexts(request, contexts):
                texts.append(encoder.followed(request, prompted.text, request.target))
                lookup.append(prompted.lookup)
                read.append(len(request.target))
            essence = encoder.prompted(request, ESSENCE)
            texts.append(replace(essence.text, tokens=essence.text.tokens[: essence.lookup + 1]))
            lookup.append(essence.lookup)
            read.append(1)
            numbers = tuple(range(first, len(texts) - 1))
            goals.append(Goal(numbers, len(texts) - 1, request.target, request.erases))
        return cls(Prompts(texts, np.array(lookup), np.array(read)), goals)

    @property
    def contexts(self) -> np.ndarray:
        """(requests, contexts) texts by number, the bare prompt first."""
        return np.array([goal.contexts for goal in self.goals])

    def search(
        self,
        layers: Layers,
        at: Collection[int],
        site: Site,
        hparams: RomeHparams | MemitHparams,
        more: Wanted,
    ) -> ValueOptimizer:
        """The search for vectors at the layers ``at``, with what the unedited model makes of the texts, ``more`` of it
        than the search needs."""
        essence = np.array([goal.essence for goal in self.goals])
        wanted: Wanted = {**wanted_by_vectors(self.prompts, at, site), **more}
        distributions = essence, self.prompts.lookup[essence]
        unedited = run_unedited(layers, self.prompts.texts, wanted, min(at) + 1, distributions)
        return ValueOptimizer(layers, self.prompts, unedited, self.goals, site, hparams)
