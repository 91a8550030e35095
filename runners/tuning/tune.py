"""Tuning of editing as Hase et al. 2023 did it: few facts at one layer are edited with every setting of a grid, one
setting is chosen by the mean scores, and written as a preset (docs/editing.md, "Tuning")."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from causalcone.engine.edit.moments.identity import model_fingerprint
from causalcone.engine.edit.moments.moments import Moments
from causalcone.engine.edit.requests.windows import as_windows
from causalcone.runners.edits.inputs import TextInputs, editor_of, moments_of, prepared_edits, read_texts
from causalcone.runners.edits.settings import record
from causalcone.runners.edits.study import MOMENTS, EditStudy
from causalcone.runners.inputs.fingerprints import facts_fingerprint
from causalcone.runners.inputs.inputs import Inputs, open_inputs
from causalcone.runners.options import OutputOptions, ScoringOptions, SourceOptions, TuningOptions
from causalcone.runners.results.folder import ResultError, ResultFolder
from causalcone.runners.tuning.folder import COMPLETE, PARTIAL, PRESET, TABLE, TuningFolder
from causalcone.runners.tuning.grid import ProblemGrids, problem_grids
from causalcone.runners.tuning.results import TrialResult, TuningResult, chosen_preset, tuning_table

_UNSCORED = ScoringOptions()  # only probabilities are measured


def tune(source: SourceOptions, choice: TuningOptions, output: OutputOptions, console: Console) -> list[TuningResult]:
    """Try the settings that have no results yet, choose, and write the table, the preset and the record. Finished
    settings stay whatever ends it, and the same call resumes; with a complete folder, only the choice is made again,
    and the model is not read. Raises ``ResultError`` for a folder of another configuration."""
    grids = problem_grids(choice)
    folder = TuningFolder(output.out, _configuration(source, choice, grids), output.overwrite)
    if not folder.holds(grids):
        texts = read_texts(choice, grids[0].plan, _UNSCORED)
        try:
            _Trials(source, choice, output, console, folder, texts).all_of(grids)
        except BaseException:
            with suppress(ResultError):  # of the two errors, the one that ended it is shown
                if folder.stopped():
                    console.print("stopped; finished settings are kept, and the same command goes on", highlight=False)
            raise
        finally:
            folder.release()
    return _chosen(source, choice, grids, folder)


def _configuration(source: SourceOptions, choice: TuningOptions, grids: Sequence[ProblemGrids]) -> dict[str, Any]:
    """Everything that decides the scores."""
    names = ("moments", "texts", "ridge", "contexts", "seed", "filtered", "compat")
    return {
        "command": "tune",
        **{name: getattr(source, name) for name in ("model", "facts", "limit", "skip_bad_facts", "dtype")},
        "layer": choice.layer,
        "problems": {posed.plan.problem: posed.configuration for posed in grids},
        **{name: getattr(choice, name) for name in names},
        "contexts": None if choice.contexts is None else str(choice.contexts),
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
        points = [(grid, point) for grid in grids.grids for point in grid.points]
        todo = []
        for grid, point in points:
            trial = replace(prepared, plan=replace(grids.plan, settings=(point.setting,)))
            method = {**point.setting.configuration, "hparams": record(point.setting.hparams)}
            configuration = {**trial.configuration, "command": "tune", "methods": [method], **fingerprints}
            path = self.folder.path_of(grid, point)
            if not self.folder.is_done(path, configuration):
                todo.append((f"of {len(points)}: {point}", grid, trial, configuration, path))
        for number, (text, grid, trial, configuration, path) in enumerate(todo, start=len(points) - len(todo) + 1):
            if not self.output.quiet:
                self.console.print(f"{grid}, setting {number} {text}", highlight=False)
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
            paths = [(point, folder.path_of(grid, point)) for point in grid.points]
            trials = [TrialResult.read(point, path, posed.plan.aggregate) for point, path in paths]
            results.append(TuningResult.of(grid, trials, choice.most, choice.give_up))
            if results[-1].choice.note is not None:
                warnings.warn(f"{grid}: {results[-1].choice.note}", stacklevel=2)
    table = tuning_table(results, choice.layer, folder.path)
    with folder.writing(TABLE) as partial:
        table.write_parquet(partial)
    folder.write_text(PRESET, chosen_preset(source, choice, grids[0].plan, folder.record["depth"], results))
    records = [result.record for result in results]
    folder.write(COMPLETE, most=choice.most, give_up=choice.give_up, chosen=records, tried=table.to_dicts())
    return results
