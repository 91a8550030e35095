"""An editing study: edits are made, scored, written and dropped, batch by batch."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console

from causalcone.engine.edit.editor import Editor
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.methods.registry import method_named
from causalcone.engine.edit.moments.moments import Moments, factors_fit
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.schemas import EDIT_SCHEMA, METRIC_SCHEMA, PROBE_SCHEMA, TEXT_SCHEMA
from causalcone.runners.edits.settings import EditPlan, Setting
from causalcone.runners.results.folder import MOMENTS, ResultFolder, TableWriter
from causalcone.runners.show.progress import shown_progress

EDITS_AT_ONCE = 256
"""More edits together would gain nothing; fewer are finished, and written, sooner."""

DELTAS = "deltas"


@dataclass(frozen=True)
class EditsDone:
    """The results of a study in ``path``: the number of edits, of ``facts`` facts, in ``seconds``; failed, suspect: how
    many for which reason."""

    path: Path
    facts: int
    edits: int
    failed: Mapping[str, int]
    suspect: Mapping[str, int]
    seconds: float

    @property
    def results(self) -> dict[str, Any]:
        counts = {"facts": self.facts, "edits": self.edits, "failed": {**self.failed}, "suspect": {**self.suspect}}
        return {**counts, "seconds": round(self.seconds, 3)}

    def sentence(self) -> str:
        failed = sum(self.failed.values())
        rate = f"{self.seconds:.1f} s ({self.edits / self.seconds:.2f} edits/s)"
        return f"{self.edits} edits of {self.facts} facts, {failed} failed, in {rate} -> {self.path}"


@dataclass(frozen=True, kw_only=True)
class EditStudy:
    """Edits that are yet to be made: every setting of the plan, at all of its layers, for all requests. evaluate:
    options of ``Editor.evaluate``; keep_deltas: whether changes of weights are kept; options: those to keep beside the
    results; filtered: why the problem is not posed for some facts; collected: moments to keep."""

    editor: Editor
    requests: Sequence[Request]
    plan: EditPlan
    evaluate: Mapping[str, Any]
    keep_deltas: bool
    options: Mapping[str, Any]
    filtered: Sequence[str]
    collected: Moments | None = None

    @property
    def configuration(self) -> dict[str, Any]:
        moments = self.editor.moments if self.plan.of_moments else None
        return {
            "command": "edit",
            **self.options,
            "problem": self.plan.problem,
            "methods": [setting.configuration for setting in self.plan.settings],
            "layers": list(dict.fromkeys(layer for setting in self.plan.settings for layer in self.layers_of(setting))),
            "seed": self.editor.seed,
            "aggregate": self.plan.aggregate,
            "contexts": asdict(self.editor.contexts) if self.plan.of_contexts else None,
            "moments": moments and {"source": moments.source, "tokens": moments.tokens, "ridge": moments.ridge},
        }

    def layers_of(self, setting: Setting) -> tuple[int, ...]:
        return self.plan.layers_of(setting, self.editor.session.sizes.depth)

    @property
    def changes(self) -> int:
        """How many changes of the weights it makes."""
        counts = ((1 if setting.definition.joint else len(self.requests), setting) for setting in self.plan.settings)
        return sum(count * len(self.layers_of(setting)) for count, setting in counts)

    @property
    def writes(self) -> bool:
        """Whether models write texts, which are kept."""
        return any(self.evaluate.get(name) for name in ("generation", "references", "answers"))

    def check(self) -> None:
        """Refuse what the editor would refuse, such as memory that is too little for a single request."""
        for setting in self.plan.settings:
            self._edits(self.requests, setting)

    def carry_out(
        self,
        folder: ResultFolder,
        console: Console,
        quiet: bool = False,
        seen: Callable[[Sequence[Edit]], object] = lambda edits: None,
    ) -> EditsDone:
        """Compute the study into the tables ``edits``, ``probes`` and ``metrics`` of the folder, and ``texts`` where
        models write; batches are ``seen``. Whatever ends it early, the batches finished by then are in the tables."""
        if self.collected is not None:
            self.collected.save(folder.path / MOMENTS)
        started = time.monotonic()
        reasons: tuple[Counter[str], Counter[str]] = Counter(), Counter()
        count = 0
        with ExitStack() as stack:
            schemas = {"edits": EDIT_SCHEMA, "probes": PROBE_SCHEMA, "metrics": METRIC_SCHEMA}
            schemas |= {"texts": TEXT_SCHEMA} if self.writes else {}
            tables = {name: stack.enter_context(folder.table(name, schema)) for name, schema in schemas.items()}
            for setting in self.plan.settings:
                total, done = len(self.requests) * len(self.layers_of(setting)), 0
                with shown_progress(console, f"editing, {setting}", "edits", quiet) as progress:
                    progress(0, total)
                    for batch in self._batches(setting):
                        scored = self._written(batch, tables, folder.path / DELTAS)
                        for counted, told in zip(reasons, _told(scored), strict=True):
                            counted.update(told)
                        seen(scored)
                        done += len(batch)
                        progress(done, total)
                        del batch, scored  # its changes of weights, before those of the next one are made
                count += done
        return EditsDone(folder.path / "edits", len(self.requests), count, *reasons, time.monotonic() - started)

    def _written(self, batch: Sequence[Edit], tables: Mapping[str, TableWriter], deltas: Path) -> list[Edit]:
        """Score edits and write their tables; the edits, of which some may have failed in that."""
        scores = self.editor.evaluate(batch, **self.evaluate)
        if self.keep_deltas:
            _save_deltas(scores.edits, deltas, vars(self.editor.session.prompts.form))
        for name, table in scores.tables.items():
            if name in tables:
                tables[name].write(table)
        return scores.edits

    def _batches(self, setting: Setting) -> Iterator[list[Edit]]:
        step = max(1, EDITS_AT_ONCE // len(self.layers_of(setting)))
        if setting.definition.joint or not self._factors_fit(setting):
            step = max(1, len(self.requests))
        for start in range(0, len(self.requests), step):
            yield from self._edits(self.requests[start : start + step], setting)

    def _factors_fit(self, setting: Setting) -> bool:
        """Whether no second moment is factorised anew for each of several batches."""
        if self.editor.moments is None or not setting.definition.needs_moments:
            return True
        session = self.editor.session
        edited = setting.edited(self.plan.layers, session.sizes.depth)
        return factors_fit(self.editor.moments, edited, session.device)

    def _edits(self, requests: Sequence[Request], setting: Setting) -> Iterator[list[Edit]]:
        return self.editor.batches(requests, setting.method, self.layers_of(setting), setting.window, setting.hparams)


def _told(edits: Sequence[Edit]) -> tuple[list[str], list[str]]:
    """The reasons why some failed, and why others are suspect."""
    failed = [edit.reason for edit in edits if edit.reason is not None]
    return failed, [edit.suspect for edit in edits if edit.reason is None and edit.suspect is not None]


def delta_file(folder: Path, method: str, window: int, layer: int, fact_id: str) -> Path:
    """Where the change of an edit is kept; one that all facts share is that of ``all``."""
    fact = "all" if method_named(method).joint else quote(fact_id, safe=" ")
    return folder / f"{method}-{window}" / str(layer) / f"{fact}.safetensors"


def _save_deltas(edits: Sequence[Edit], folder: Path, form: Mapping[str, Any]) -> None:
    """Each change of weights in a file, with what it is to do: requests, and the form of their prompts."""
    saved: set[int] = set()
    for edit in edits:
        if edit.delta is not None and id(edit.delta) not in saved:
            saved.add(id(edit.delta))
            described = {name: str(getattr(edit, name)) for name in EDIT_SCHEMA.names if name != "reason"}
            requests = [each.request.record for each in edits if each.delta is edit.delta]
            described |= {"requests": json.dumps(requests), "prompts": json.dumps(dict(form))}
            path = delta_file(folder, edit.method, edit.window, edit.layer, edit.fact_id)
            edit.delta.save(path, described)
