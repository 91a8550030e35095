"""Edits of a single prompt: both answers' probabilities, and what the model writes, before and after."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from causalcone.analysis.prompt_map import one_line
from causalcone.analysis.tables.edits import read_edits, read_probes
from causalcone.analysis.tables.names import long_name
from causalcone.engine.edit.deltas.delta import Delta
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.runs.decoding import continuations
from causalcone.engine.edit.texts.contexts import continued
from causalcone.runners.edits.study import EditStudy
from causalcone.runners.show.tables import new_table

TOKENS = 20
"""That are written after the prompt, each the likeliest."""


@dataclass(frozen=True)
class PromptEdits:
    """Edits of the only request of a study. written: what the edited model writes, by edit."""

    study: EditStudy
    written: dict[str, str] = field(default_factory=dict)

    def add(self, edits: Sequence[Edit]) -> None:
        """Let the edited models write, while there are their changes of weights."""
        made = [edit for edit in edits if edit.delta is not None]
        texts = self._texts([edit.delta for edit in made])
        self.written.update(zip((edit.edit_id for edit in made), texts, strict=True))

    def _texts(self, deltas: Sequence[Delta | None]) -> list[str]:
        editor, (request,) = self.study.editor, self.study.requests
        text = editor.encoder.written(request, request.fact.text)
        length = min(TOKENS, editor.session.sizes.positions + 1 - len(text))
        new = continuations(editor.session, [text] * len(deltas), [length] * len(deltas), deltas=deltas)
        return [request.fact.text + continued(editor.session, text.tokens, tokens) for tokens in new]

    def shown(self, folder: Path) -> Iterator[Table | Text]:
        """What the unedited model writes, and for each method its probabilities and texts at every layer."""
        (request,), (before,) = self.study.requests, self._texts([None])
        answers = [request.fact.target_true, request.fact.target_new]
        names = [f"p({answer})" for answer in (answers[::-1] if request.trains_new else answers) if answer is not None]
        rows = read_probes(folder / "probes").filter(prompt_kind="rewrite")
        rows = read_edits(folder / "edits").join(rows, on="edit_id", how="left").sort("layer")
        yield _on_one_line(f"unedited: {before}")
        for setting in self.study.plan.settings:
            title = f"{long_name(setting.method, setting.window)}, {request.problem}"
            table = new_table(title, "layer", *(escape(_on_one_line(name).plain) for name in names))
            for column in table.columns:
                column.overflow = "fold"
            edits = rows.filter(method=setting.method, window=setting.window)
            table.add_row("unedited", *_probabilities(edits, "pre")[0][: len(names)])
            for layer, values in zip(edits["layer"], _probabilities(edits, "post"), strict=True):
                table.add_row(str(layer), *values[: len(names)])
            yield table
            for layer, name in edits.select("layer", "edit_id").rows():
                yield _on_one_line(f"layer {layer}: {self.written.get(name, '-')}")


def _probabilities(edits: pl.DataFrame, when: str) -> list[list[str]]:
    rows = edits.select(f"p_{when}", f"p_{when}_other").rows()
    return [["-" if value is None else f"{value:.3g}" for value in row] for row in rows]


def _on_one_line(text: str) -> Text:
    return Text(one_line(text, Console().options.ascii_only))
