"""The command that edits facts: ``edit``."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Option

from causalcone.runners.commands.shared import check_place, open_results, place_of, print_line, show, takes
from causalcone.runners.options import (
    EditedOptions,
    EditingOptions,
    PromptOutputOptions,
    SavingOptions,
    ScoringOptions,
    SequenceOptions,
)


@takes(EditedOptions, EditingOptions, ScoringOptions, SequenceOptions, PromptOutputOptions, SavingOptions)
def edit(
    source: EditedOptions,
    editing: EditingOptions,
    scoring: ScoringOptions,
    sequence: SequenceOptions,
    output: PromptOutputOptions,
    saving: SavingOptions,
    plot: Annotated[
        bool, Option("--plot", help="Draw the mean scores by layer, in sequence by the number of edits.")
    ] = False,
) -> None:
    """Edit facts at every chosen layer by ROME, MEMIT or constrained fine-tuning, and score every edited model.

    Facts are edited one by one; memit_joint edits all of them at once, --sequential one batch after another, into
    OUT/sequence, OUT/checkpoints and OUT/batches. Of a single --prompt it shows both answers'
    probabilities and what the model writes, before and after.

    Writes OUT/edits, OUT/probes and OUT/metrics (Parquet; a row per edit, per prompt of it and per metric of it), where
    models write OUT/texts, and OUT/run.json. No weight of the model is changed; --save writes another model.
    """
    from causalcone.analysis.tables.edits import unmet
    from causalcone.runners.edits import inputs
    from causalcone.runners.edits.exports import check_saving, kept_edits, written
    from causalcone.runners.edits.prompt_edits import PromptEdits
    from causalcone.runners.edits.sequences import carry_out, sequences_of
    from causalcone.runners.results.folder import MOMENTS, ResultFolder
    from causalcone.runners.results.store import Store
    from causalcone.runners.show.edit_tables import (
        answer_tables,
        failed_lines,
        metrics_of,
        score_tables,
        scores_of,
        text_table,
    )
    from causalcone.runners.show.figures import draw_scores

    check_place(source, output)
    study = inputs.editing(source, editing, scoring, output, sequence)
    if saving.save is not None:
        check_saving(study, saving.save, saving.format, sequence.sequential)
        study = replace(study, keep_deltas=True)
    if sequence.sequential:
        from causalcone.runners.show.figures import draw_sequence
        from causalcone.runners.show.sequence_tables import checkpoint_tables

        out = Path(str(output.out))
        for _ in sequences_of(study, sequence, Store.open(out)):  # all are checked before one is made
            pass
        with ResultFolder(out, study.configuration, output.overwrite, resume=True) as folder:
            if study.collected is not None and not (out / MOMENTS).exists():
                study.collected.save(out / MOMENTS)
            made = carry_out(study, sequence, out, Console(), output.quiet)
            folder.finish(**made.results, filtered=study.filtered)
        figures = draw_sequence(out) if plot else []
        if not output.quiet:
            show(checkpoint_tables(out), made.sentence(), figures)
        return
    wanted = (study.plan.aggregate, scoring.essence, scoring.answer_score)
    single = None if source.prompt is None else PromptEdits(study)
    saved: dict[str, Any] = {}
    with place_of(output) as place:
        with open_results(output, place, study.configuration, "edits") as folder:
            seen = {} if single is None else {"seen": single.add}
            done = study.carry_out(folder, Console(), output.quiet or single is not None, **seen)
            figures = draw_scores(output.out or Path(), scores_of(place, *wanted)) if plot else []
            if saving.save is not None:
                told, record = written(kept_edits(place, "all"), study.editor.session, saving.save, saving.format)
                saved = {"saved": record}
        folder.finish(**done.results, filtered=study.filtered, **saved)
        if not output.quiet:
            tables = [*(score_tables(scores_of(place, *wanted)) if single is None else single.shown(place))]
            tables += metrics_of(place, scoring.accuracy, scoring.generation or scoring.references is not None)
            tables += [*answer_tables(place), *text_table(place)]
            sentence = done.sentence() if output.out is not None else done.sentence().partition(" -> ")[0]
            reasons = failed_lines(done.failed) + failed_lines(done.suspect, "are suspect")
            show([*tables, *reasons], sentence, figures)
            if saved:
                print_line(told)
        if presupposed := unmet(place / "edits", place / "probes"):
            warnings.warn(presupposed, stacklevel=2)


COMMANDS = {
    edit: """
causalcone edit --model gpt2-xl --facts counterfact.json --method rome --preset gpt2-xl --moments m.safetensors --out xl
causalcone edit --model ./my-model --facts facts.jsonl --method finetune:1 --method finetune:5 --layers 0,8 --out edits
causalcone edit --model demo --facts demo --method memit:3 --preset demo --moments demo --essence --out edits --plot
causalcone edit --model demo --facts demo --method rome --set clamp=2 --texts demo --keep-deltas --out edits
causalcone edit --model gpt2-xl --facts counterfact.json --method alphaedit:5 --layer 15 --sequential --out sequence
causalcone edit --model demo --facts demo --method memit_joint:3 --layers 1 --preset demo --moments demo --out mass
"""
}
