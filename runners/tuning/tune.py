"""Tuning of editing as Hase et al. 2023 did it: few facts at one layer are edited with every setting of a grid, one
setting is chosen by the mean scores, and a preset says which (docs/editing.md, "Tuning")."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.edit.requests.windows import as_windows
from causalcone.runners.edits.inputs import (
    GivenTexts,
    PreparedEdits,
    editor_of,
    given_texts,
    moments_of,
    prepared_edits,
)
from causalcone.runners.edits.study import MOMENTS
from causalcone.runners.inputs.fingerprints import facts_fingerprint, model_fingerprint
from causalcone.runners.inputs.inputs import Inputs, open_inputs
from causalcone.runners.options import OutputOptions, ScoringOptions, SourceOptions, TuningOptions
from causalcone.runners.results.folder import ResultError, ResultFolder
from causalcone.runners.tuning.folder import COMPLETE, PARTIAL, PRESET, TABLE, TuningFolder
from causalcone.runners.tuning.grid import ProblemGrids, problem_grids
from causalcone.runners.tuning.results import TrialResult, TuningResult, chosen_preset, tuning_table

_UNSCORED = ScoringOptions()  # probabilities alone


def tune(source: SourceOptions, choice: TuningOptions, output: OutputOptions, console: Console) -> list[TuningResult]:
    """Try what is not tried yet, choose, and write the table, the preset and the record. Settings that are done stay,
    whatever ends it, and the same call goes on; of a complete folder the model is not read. ``ResultError`` for one
    of another configuration."""
    grids = problem_grids(choice)
    folder = TuningFolder(output.out, _configuration(source, choice, grids), output.overwrite)
    if not folder.holds(grids):
        texts = given_texts(choice, grids[0].plan, _UNSCORED)
        try:
            _Trying(source, choice, output, console, folder, texts).all_of(grids)
        except BaseException:
            with suppress(ResultError):  # of the two errors, the one that ended it is shown
                if folder.stopped():
                    console.print("stopped; finished settings are kept, and the same command goes on", highlight=False)
            raise
        finally:
            folder.release()
    return _chosen(source, choice, grids, folder)


def _configuration(source: SourceOptions, choice: TuningOptions, grids: Sequence[ProblemGrids]) -> dict[str, Any]:
    """What decides the scores."""
    names = ("moments", "texts", "ridge", "contexts", "seed", "filtered", "compat")
    return {
        "command": "tune",
        **{name: getattr(source, name) for name in ("model", "facts", "limit", "skip_bad_facts", "dtype")},
        "layer": choice.layer,
        "problems": {problem.plan.problem: problem.configuration for problem in grids},
        **{name: getattr(choice, name) for name in names},
        "contexts": None if choice.contexts is None else str(choice.contexts),
    }


@dataclass(frozen=True)
class _Trying:
    """Edits facts with every setting, and scores that, a folder for each."""

    source: SourceOptions
    choice: TuningOptions
    output: OutputOptions
    console: Console
    folder: TuningFolder
    texts: GivenTexts

    def all_of(self, grids: Sequence[ProblemGrids]) -> None:
        """All settings of all problems; the model, moments and contexts are the same for each."""
        inputs = open_inputs(self.source)
        as_windows((self.choice.layer,), 1, inputs.session.sizes.depth)
        contexts, moments = self.texts.contexts, None
        fingerprints = {
            "facts_fingerprint": facts_fingerprint(inputs.facts),
            "model_fingerprint": model_fingerprint(inputs.session.architecture),
        }
        for number, problem in enumerate(grids):
            copy = replace(inputs, skipped=list(inputs.skipped))
            editor = editor_of(copy, self.choice, problem.plan, contexts)
            if number == 0:
                moments = self._moments(inputs, problem)
            prepared = prepared_edits(editor, moments, copy, self.choice, problem.plan, _UNSCORED)
            self.folder.begin(inputs.session.sizes.depth)
            self._try_settings(problem, prepared, fingerprints)
            contexts = editor.contexts if problem.plan.of_contexts else contexts

    def _moments(self, inputs: Inputs, grids: ProblemGrids) -> Moments | None:
        """Those given; or collected once, and kept in the folder."""
        if self.texts.running is None:
            return moments_of(inputs, self.choice, grids.plan, None, self.output.quiet)
        self.folder.begin(inputs.session.sizes.depth)
        file, partial = self.folder.path / MOMENTS, self.folder.path / PARTIAL
        if file.exists():
            return Moments.load(file)
        moments = moments_of(inputs, self.choice, grids.plan, self.texts.running, self.output.quiet, partial)
        assert moments is not None
        moments.save(file)
        partial.unlink(missing_ok=True)
        return moments

    def _try_settings(self, grids: ProblemGrids, prepared: PreparedEdits, fingerprints: dict[str, str]) -> None:
        """The settings of a problem that are not done."""
        points = [(grid, point) for grid in grids.grids for point in grid.points]
        todo = []
        for grid, point in points:
            plan = replace(grids.plan, settings=(point.setting,))
            edits = replace(prepared, study=replace(prepared.study, plan=plan))
            configuration = {**edits.configuration, "command": "tune", **fingerprints}
            place = self.folder.place(grid, point)
            if not self.folder.is_done(place, configuration):
                todo.append((f"of {len(points)}: {point}", grid, edits.study, configuration, place))
        for number, (text, grid, study, configuration, place) in enumerate(todo, start=len(points) - len(todo) + 1):
            if not self.output.quiet:
                self.console.print(f"{grid}, setting {number} {text}", highlight=False)
            with ResultFolder(place, configuration, overwrite=True) as results:
                done = study.carry_out(results, self.console, self.output.quiet)
                results.finish(**done.results, filtered=prepared.filtered)


def _chosen(
    source: SourceOptions, choice: TuningOptions, grids: Sequence[ProblemGrids], folder: TuningFolder
) -> list[TuningResult]:
    """Choose from what was tried, and write what is chosen."""
    tuned = []
    for problem in grids:
        for grid in problem.grids:
            places = [(point, folder.place(grid, point)) for point in grid.points]
            trials = [TrialResult.read(point, place, problem.plan.aggregate) for point, place in places]
            tuned.append(TuningResult.of(grid, trials, choice.most, choice.give_up))
            if tuned[-1].choice.note is not None:
                warnings.warn(f"{grid}: {tuned[-1].choice.note}", stacklevel=2)
    table = tuning_table(tuned, choice.layer, folder.path)
    with folder.writing(TABLE) as partial:
        table.write_parquet(partial)
    folder.write_text(PRESET, chosen_preset(source, choice, grids[0].plan, folder.record["depth"], tuned))
    chosen = [result.record for result in tuned]
    folder.write(COMPLETE, most=choice.most, give_up=choice.give_up, chosen=chosen, tried=table.to_dicts())
    return tuned
