"""What the engine computes to edit and to score, counted from the lengths of the texts: it computes nothing itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window
from causalcone.engine.edit.runs import flops
from causalcone.engine.edit.runs.flops import Asked, Searched
from causalcone.engine.edit.scoring.probes import ProbeSet, probes_of


@dataclass(frozen=True)
class Flops:
    """Of edits that were made together, on a model of the encoder's sizes: ``engine/edit/runs/flops.py`` says
    what is counted. Every edit takes all ``steps``: none may have stopped early."""

    encoder: Encoder

    def rome(self, edits: Sequence[Edit], contexts: Sequence[str], steps: int) -> int:
        return _whole(
            self._of.rome(self._searched(request, contexts), [edit.layer for edit in own], steps)
            for request, own in by_request(edits)
        )

    def memit(self, edits: Sequence[Edit], contexts: Sequence[str], steps: int) -> int:
        return _whole(
            self._of.memit(self._searched(request, contexts), [self._window(edit) for edit in own], steps)
            for request, own in by_request(edits)
        )

    def finetune(self, edits: Sequence[Edit], steps: int) -> int:
        """The rows of every request go through the unedited model once, as far as the last window's first layer."""
        first = max(self._window(edit)[0] for edit in edits)
        found = []
        for request, own in by_request(edits):
            prompt = self.encoder.prompted(request, request.fact.prompt).text
            rows = len(self.encoder.followed(request, prompt, request.target))
            windows = [self._window(edit) for edit in own]
            found.append(self._of.finetune(rows, len(request.target), windows, steps, first))
        return _whole(found)

    def scoring(self, edits: Sequence[Edit]) -> int:
        """Of edits of one layer each, of rank one."""
        whole = any(edit.layer == self.encoder.sizes.depth - 1 for edit in edits)
        found = []
        for request, own in by_request(edits):
            questions = probes_of(request, self.encoder)
            asked = Asked(questions.rows, sum(questions.read), distinct_rows(questions))
            found.append(self._of.unedited(asked, whole))
            found += [self._of.edited(asked, (edit.layer,)) for edit in own]
        return _whole(found)

    def _searched(self, request: Request, contexts: Sequence[str]) -> Searched:
        prompts = self.encoder.contexts(request, contexts)
        essence = self.encoder.essence(request).lookup + 1
        return Searched.of([(len(each.text), each.lookup) for each in prompts], essence, len(request.target))

    def _window(self, edit: Edit) -> tuple[int, ...]:
        return Window.around(edit.layer, edit.window, self.encoder.sizes.depth).layers

    @property
    def _of(self) -> flops.Flops:
        return flops.Flops(self.encoder.sizes)


def _whole(counts: Iterable[float]) -> int:
    """The sum of counts of whole numbers."""
    return int(sum(counts))


def by_request(edits: Sequence[Edit]) -> list[tuple[Request, list[Edit]]]:
    """The edits of each request."""
    own: dict[int, list[Edit]] = {}
    for edit in edits:
        own.setdefault(id(edit.request), []).append(edit)
    return [(each[0].request, each) for each in own.values()]


def distinct_rows(questions: ProbeSet) -> int:
    """Rows that the answers are read at: several of them may be read at one."""
    return len({(asked.run, place) for asked in questions.probes for place in range(len(asked.tokens))})
