"""Tuning of editing as Hase et al. 2023 did it: few facts at one layer are edited with every setting of a grid, one
setting is chosen by the mean scores, and written as a preset (docs/editing.md, "Tuning")."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from causalcone.engine.atomic import replacing
from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.edit.requests.windows import as_windows
from causalcone.runners.edits.inputs import (
    TextInputs,
    editor_of,
    moments_of,
    prepared_edits,
    read_texts,
)
from causalcone.runners.edits.study import MOMENTS, EditStudy
from causalcone.runners.inputs.fingerprints import facts_fingerprint, model_fingerprint
from causalcone.runners.inputs.inputs import Inputs, open_inputs
from causalcone.runners.options import OutputOptions, ScoringOptions, SourceOptions, TuningOptions
from causalcone.runners.results.folder import ResultError, ResultFolder
from causalcone.runners.tuning.folder import COMPLETE, PARTIAL, PRESET, TABLE, TuningFolder
from causalcone.runners.tuning.grid import Grid, GridPoint, ProblemGrids, problem_grids
from causalcone.runners.tuning.results import TrialResult, TuningResult, choices, chosen_preset, tuning_table

_UNSCORED = ScoringOptions()
"""Only probabilities are measured."""


def tune(source: SourceOptions, choice: TuningOptions, output: OutputOptions, console: Console) -> list[TuningResult]:
    """Try the settings that have no results yet, choose, and write the table, the preset and the record.

    Whatever ends it early, finished settings stay, and the same call resumes. With a folder whose tuning is complete,
    only the choice is made again, and the model is not read. Raises ``ResultError`` for a folder of another
    configuration.
    """
    grids = problem_grids(choice)
    folder = TuningFolder(output.out, _configuration(source, choice, grids), output.overwrite)
    if not folder.holds(grids):
        texts = read_texts(choice, grids[0].plan, _UNSCORED)
        try:
            _Trials(source, choice, output, console, folder, texts).all_of(grids)
        except BaseException:
            with suppress(ResultError):  # of the two errors, the one that ended it is told
                if folder.stopped():
                    console.print("stopped; finished settings are kept, and the same command goes on", highlight=False)
            raise
        finally:
            folder.release()
    return _chosen(source, choice, grids, folder)


def _configuration(source: SourceOptions, choice: TuningOptions, grids: Sequence[ProblemGrids]) -> dict[str, Any]:
    """Everything that decides the scores."""
    return {
        "command": "tune",
        "model": source.model,
        "facts": source.facts,
        "limit": source.limit,
        "skip_bad_facts": source.skip_bad_facts,
        "dtype": source.dtype,
        "layer": choice.layer,
        "problems": {posed.plan.problem: posed.configuration for posed in grids},
        "moments": choice.moments,
        "texts": choice.texts,
        "ridge": choice.ridge,
        "contexts": None if choice.contexts is None else str(choice.contexts),
        "seed": choice.seed,
        "filtered": choice.filtered,
        "compat": choice.compat,
    }


@dataclass(frozen=True)
class _Trials:
    """Edits facts with every setting and scores the edits, a folder for each setting."""

    source: SourceOptions
    choice: TuningOptions
    output: OutputOptions
    console: Console
    folder: TuningFolder
    texts: TextInputs

    def all_of(self, grids: Sequence[ProblemGrids]) -> None:
        """All settings of all problems; the model, moments and contexts are the same for each."""
        inputs = open_inputs(self.source)
        as_windows((self.choice.layer,), 1, inputs.session.sizes.depth)
        contexts, moments = self.texts.contexts, None
        fingerprints = {
            "facts_fingerprint": facts_fingerprint(inputs.facts),
            "model_fingerprint": model_fingerprint(inputs.session.architecture),
        }
        for number, posed in enumerate(grids):
            facts = replace(inputs, skipped=list(inputs.skipped))
            editor = editor_of(facts, self.choice, posed.plan, contexts)
            if number == 0:
                moments = self._moments(inputs, posed)
            prepared = prepared_edits(editor, moments, facts, self.choice, posed.plan, _UNSCORED)
            self.folder.begin(inputs.session.sizes.depth)
            self._settings_of(posed, prepared, fingerprints)
            contexts = editor.contexts if posed.plan.of_contexts else contexts

    def _moments(self, inputs: Inputs, grids: ProblemGrids) -> Moments | None:
        """Those given; or collected once, and kept in the folder."""
        if self.texts.running is None:
            return moments_of(inputs, self.choice, grids.plan, None, self.output.quiet)
        self.folder.begin(inputs.session.sizes.depth)
        complete, partial = self.folder.path / MOMENTS, self.folder.path / PARTIAL
        if complete.exists():
            return Moments.load(complete)
        moments = moments_of(inputs, self.choice, grids.plan, self.texts.running, self.output.quiet, partial)
        assert moments is not None
        moments.save(complete)
        partial.unlink(missing_ok=True)
        return moments

    def _settings_of(self, grids: ProblemGrids, prepared: EditStudy, fingerprints: dict[str, str]) -> None:
        """Try the settings of a problem that are not done."""
        todo = []
        for grid in grids.grids:
            for point in grid.points:
                plan = replace(grids.plan, settings=(point.setting,))
                trial = replace(prepared, plan=plan)
                configuration = {**trial.configuration, "command": "tune", **fingerprints}
                path = self.folder.path_of(grid, point)
                if not self.folder.is_done(path, configuration):
                    todo.append((grid, point, trial, configuration, path))
        count = sum(len(grid.points) for grid in grids.grids)
        for number, arguments in enumerate(todo, start=count - len(todo) + 1):
            self._try(*arguments, f"{number} of {count}")

    def _try(
        self, grid: Grid, point: GridPoint, trial: EditStudy, configuration: dict[str, Any], path: Path, which: str
    ) -> None:
        if not self.output.quiet:
            self.console.print(f"{grid}, setting {which}: {point}", highlight=False)
        with ResultFolder(path, configuration, overwrite=True) as results:
            done = trial.carry_out(results, self.console, self.output.quiet)
            results.finish(**done.results, filtered=trial.filtered)


def _chosen(
    source: SourceOptions, choice: TuningOptions, grids: Sequence[ProblemGrids], folder: TuningFolder
) -> list[TuningResult]:
    """Choose among the settings, and write the choice."""
    results = []
    for posed in grids:
        for grid in posed.grids:
            trials = [
                TrialResult.read(point, folder.path_of(grid, point), posed.plan.aggregate) for point in grid.points
            ]
            results.append(TuningResult.of(grid, trials, choice.most, choice.give_up))
            if results[-1].choice.note is not None:
                warnings.warn(f"{grid}: {results[-1].choice.note}", stacklevel=2)
    table = tuning_table(results, choice.layer, folder.path)
    try:
        with replacing(folder.path / TABLE) as partial:
            table.write_parquet(partial)
    except OSError as error:
        raise ResultError(
            f"cannot write {folder.path / TABLE}: {error.strerror}; finished settings are kept"
        ) from error
    folder.write_text(PRESET, chosen_preset(source, choice, grids, folder.record["depth"], results))
    folder.write(COMPLETE, most=choice.most, give_up=choice.give_up, chosen=choices(results), tried=table.to_dicts())
    return results
