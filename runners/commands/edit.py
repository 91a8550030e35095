"""The command that edits facts: ``edit``."""

import warnings
from typing import Annotated

from rich.console import Console
from typer import Option

from causalcone.runners.commands.shared import open_results, show, takes
from causalcone.runners.options import EditingOptions, OutputOptions, ScoringOptions, SourceOptions


@takes(SourceOptions, EditingOptions, ScoringOptions, OutputOptions)
def edit(
    source: SourceOptions,
    editing: EditingOptions,
    scoring: ScoringOptions,
    output: OutputOptions,
    plot: Annotated[bool, Option("--plot", help="Draw the mean scores by layer.")] = False,
) -> None:
    """Edit facts at every chosen layer by ROME, MEMIT or constrained fine-tuning, and score every edited model.

    Facts are edited one by one; memit_joint edits all of them at once.

    Writes OUT/edits, OUT/probes and OUT/metrics (Parquet; a row per edit, per prompt of it and per metric of it), where
    models write OUT/texts, and OUT/run.json. No weight of the model is changed.
    """
    from causalcone.analysis.tables.edits import unmet
    from causalcone.runners.edits import inputs
    from causalcone.runners.show.edit_tables import (
        answer_tables,
        failed_lines,
        metrics_of,
        score_tables,
        scores_of,
        text_table,
    )
    from causalcone.runners.show.figures import draw_scores

    study = inputs.editing(source, editing, scoring, output)
    shown = (study.plan.aggregate, scoring.essence, scoring.answer_score)
    with open_results(output, study.configuration, "edits") as folder:
        done = study.carry_out(folder, Console(), output.quiet)
        figures = draw_scores(output.out, scores_of(output.out, *shown)) if plot else []
    folder.finish(**done.results, filtered=study.filtered)
    if not output.quiet:
        tables = score_tables(scores_of(output.out, *shown))
        metrics = metrics_of(output.out, scoring.accuracy, scoring.generation or scoring.references is not None)
        tables += [*metrics, *answer_tables(output.out), *text_table(output.out)]
        reasons = failed_lines(done.failed) + failed_lines(done.suspect, "are suspect")
        show([*tables, *reasons], done.sentence(), figures)
    if presupposed := unmet(output.out / "edits", output.out / "probes"):
        warnings.warn(presupposed, stacklevel=2)


COMMANDS = {
    edit: """
causalcone edit --model gpt2-xl --facts counterfact.json --method rome --preset gpt2-xl --moments m.safetensors --out xl
causalcone edit --model ./my-model --facts facts.jsonl --method finetune:1 --method finetune:5 --layers 0,8 --out edits
causalcone edit --model demo --facts demo --method memit:3 --preset demo --moments demo --essence --out edits --plot
causalcone edit --model demo --facts demo --method rome --set clamp=2 --texts demo --keep-deltas --out edits
causalcone edit --model demo --facts demo --method memit_joint:3 --layers 1 --preset demo --moments demo --out mass
"""
}
