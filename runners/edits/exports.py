"""Edits written as models or adapters, and what rounding and cut ranks take from them (docs/editing.md, "Export")."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from causalcone.analysis.tables.edits import finished, read_edits
from causalcone.engine.atomic import write_text
from causalcone.engine.compute import Compute, as_dtype
from causalcone.engine.edit.deltas.apply import Format, applied, export, refuse_taken
from causalcone.engine.edit.deltas.delta import NOTHING, Delta, load_delta
from causalcone.engine.edit.deltas.peft import adapted, low_rank
from causalcone.engine.edit.editor import Editor
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.encoding import PromptForm
from causalcone.engine.errors import ExperimentError, one_of
from causalcone.engine.run.session import Session
from causalcone.runners.edits.study import DELTAS, EditStudy, delta_file
from causalcone.runners.inputs.inputs import open_model
from causalcone.runners.names import path_of
from causalcone.runners.options import ExportOptions

RECORD = "causalcone.json"
"""The file beside what is written, that says what it is."""

SCORED = 100
"""Edits that are scored again, at most."""

NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class KeptEdits:
    """Edits that are written together: their ids, the sum of their changes, what they were to do, and the form of their
    prompts. Files of before say nothing of the last two."""

    names: Sequence[str]
    delta: Delta
    requests: Sequence[Request]
    form: PromptForm

    @classmethod
    def of_files(cls, files: Mapping[str, Path]) -> "KeptEdits":
        """Of delta files by the edits' ids; several edits may share one."""
        delta, requests, form = NOTHING, [], PromptForm()
        for path in dict.fromkeys(files.values()):
            change, described = load_delta(path)
            delta += change
            requests += [Request.from_record(each) for each in json.loads(described.get("requests", "[]"))]
            form = PromptForm(**json.loads(described.get("prompts", "{}")))
        return cls(list(files), delta, requests, form)


def kept_edits(place: Path, chosen: str | None) -> KeptEdits:
    """Of a result folder the edit of an id, or the sum of ``all``; or the one of a delta file."""
    if place.is_file():
        if chosen not in (None, "all"):
            raise ExperimentError(f"{place} is a single change; leave out --edit, or give a result folder")
        return KeptEdits.of_files({load_delta(place)[1].get("edit_id", place.stem): place})
    if not (place / "edits").is_dir():
        raise ExperimentError(
            f"{place} is neither a result folder of causalcone edit nor a delta file; give one of these"
        )
    edits = finished(read_edits(place / "edits"))
    names = edits["edit_id"].to_list()
    rows = edits.select("method", "window", "layer", "fact_id").rows()
    files = {name: delta_file(place / DELTAS, *row) for name, row in zip(names, rows, strict=True)}
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if not names:
        raise ExperimentError(f"{place} holds no finished edit; wait for one, or give another folder")
    if chosen is None and len(names) != 1:
        raise ExperimentError(f"--edit is missing: give one of {listed}; or all, for the sum of their changes")
    if chosen not in (None, "all", *names):
        raise ExperimentError(f"{place} holds no finished edit {chosen!r}; it has {listed}")
    wanted = {name: file for name, file in files.items() if chosen in (None, "all", name)}
    if any(not file.exists() for file in wanted.values()):
        raise ExperimentError(f"{place} has not kept the changes of its edits; edit again with --keep-deltas")
    return KeptEdits.of_files(wanted)


def export_kept(choice: ExportOptions) -> str:
    """Write what the options choose; says what was written."""
    refuse_taken(choice.out)
    one_of("--format", choice.format, get_args(Format))
    dtype = None if choice.dtype is None else as_dtype(choice.dtype)
    edits = kept_edits(choice.edits, choice.edit)
    if choice.format == "peft":
        low_rank(edits.delta)  # before the model is read
    compute = Compute.of(None, choice.device, choice.memory)
    session = open_model(path_of(choice.model, "model"), compute, form=edits.form)
    return written(edits, session, choice.out, choice.format, choice.max_rank, dtype)[0]


def written(
    edits: KeptEdits,
    session: Session,
    folder: Path,
    format: str,
    max_rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[str, dict[str, Any]]:
    """Write edits of a session's model, which is in ``dtype`` afterwards, and score them before and after where that,
    or a rank, changes them: in float32, whose own rounding does not count. In words, and as kept beside them."""
    model = session.model
    requests = list({(one.fact.id, one.problem): one for one in edits.requests}.values())[:SCORED]
    dtype = dtype or next(iter(model.parameters())).dtype
    held = adapted(edits.delta, dtype, max_rank) if format == "peft" else None
    before: list[float | None] = []
    after: list[float | None] = []
    lossy = bool(requests) and (dtype in NARROW or max_rank is not None)
    wide = Compute(dtype=torch.promote_types(dtype, torch.float32), device=session.device, memory=session.memory)
    if lossy:
        before = _probabilities(Session(model, session.tokenizer, wide, form=edits.form), requests, edits.delta)
    export(model.to(dtype), edits.delta, folder, session.tokenizer, format, max_rank)  # type: ignore[arg-type]
    if lossy:
        again = Session(model, session.tokenizer, wide, form=edits.form)
        with nullcontext() if held else applied(model, edits.delta):
            after = _probabilities(again, requests, Delta(held[0]) if held else None)
    asked = ({"fact_id": request.fact.id, "problem": request.problem} for request in requests)
    scores = [
        {**request, "p_before": old, "p_after": new} for request, old, new in zip(asked, before, after, strict=False)
    ]
    rank = {} if held is None else {"relative_error": held[1]}
    record = {
        "edits": list(edits.names),
        "format": format,
        "dtype": str(dtype)[len("torch.") :],
        **rank,
        "scores": scores,
    }
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    return f"{_told(edits, record)} -> {folder}", record


def check_saving(study: EditStudy, folder: Path, format: str, sequential: bool) -> None:
    """Refuse to write what a study makes where that is more than one change, or the folder is taken."""
    one_of("--format", format, get_args(Format))
    refuse_taken(folder)
    if sequential:
        raise ExperimentError(
            "--save writes a single edit, and --sequential makes a sequence; leave out one of the two"
        )
    if study.changes != 1:
        raise ExperimentError(
            f"--save writes one edited model, and {study.changes} are made; give one --prompt, or --limit 1, with one "
            "--method and one --layer; or edit all facts at once, by memit_joint; or keep all changes with "
            "--keep-deltas, and write one by causalcone export"
        )


def _probabilities(session: Session, requests: Sequence[Request], delta: Delta | None) -> list[float | None]:
    """That of each request's target after its prompt, in the model as it is, or with a change that no weight is rounded
    for."""
    reason = None if delta else "no change is asked for"
    no: dict[str, Any] = {"steps": 0, "loss": 0.0, "delta_norm": None, "layer": 0, "window": 1, "method": "export"}
    edits = [Edit(request=request, delta=delta, reason=reason, **no) for request in requests]
    rows = Editor.on(session).evaluate(edits).probes.to_pylist()
    return [row["p_post" if delta else "p_pre"] for row in rows if row["prompt_kind"] == "rewrite"]


def _told(edits: KeptEdits, record: dict[str, Any]) -> str:
    what = edits.names[0] if len(edits.names) == 1 else f"{len(edits.names)} edits"
    text = f"{what} as {record['format']} in {record['dtype']}"
    if not (scores := record["scores"]):
        return text
    before, after = ([score[name] or 0.0 for score in scores] for name in ("p_before", "p_after"))
    of = "p of the target" if len(scores) == 1 else f"mean p of {len(scores)} targets"
    means = [sum(values) / len(scores) for values in (before, after)]
    return f"{text}; {of}: {means[0]:.3g} before, {means[1]:.3g} as written"
