"""The command of fact files: ``data``."""

import warnings
from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Argument, Option

from causalcone.runners.options import COLUMN_HELP


def data(
    source: Annotated[
        str,
        Argument(
            help="File of facts (JSON, JSON lines, CSV, TSV or Parquet, of any format in docs/data.md), folder or hub "
            "id of a data set (needs the package datasets); 'smollm2', real facts; or 'demo', the demo world."
        ),
    ],
    out: Annotated[
        Path | None, Option(help="File for the facts, such as facts.jsonl; without it they are only looked at.")
    ] = None,
    split: Annotated[str | None, Option(help="The data set's split; train by default.", show_default=False)] = None,
    dataset_config: Annotated[str | None, Option(help="The data set's configuration.")] = None,
    limit: Annotated[int | None, Option(help="Only the first N facts.", min=1)] = None,
    seed: Annotated[int, Option(help="Seed of the false targets that are drawn for zsRE.", min=0, max=2**32 - 1)] = 0,
    zsre_form: Annotated[
        str,
        Option(
            help="Prompts and targets of zsRE: hase (question and answer, another record's answer as the target), meng "
            "(raw questions, the true answer), or alt (raw questions, the record's false answer)."
        ),
    ] = "hase",
    column: Annotated[list[str] | None, Option(help=COLUMN_HELP, show_default=False)] = None,
    skip_bad_facts: Annotated[
        bool, Option("--skip-bad-facts", help="List facts that cannot be used and write the others.")
    ] = False,
    model: Annotated[
        str | None,
        Option(help="Check that every fact can be encoded for this model, by its tokenizer and configuration."),
    ] = None,
    check: Annotated[
        bool,
        Option("--check", help="Run the clean prompts in the model, and name answers that want another joiner."),
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file.")] = False,
    quiet: Annotated[bool, Option("--quiet", help="No summary.")] = False,
) -> None:
    """Convert facts into a fact file of causalcone's own, check every one, and summarize them.

    Without --out nothing is written. Writes OUT (JSON lines, one fact a line), which every command takes as --facts.
    Bad records are listed, and nothing is written then; with --skip-bad-facts the others are.
    """
    from causalcone.engine.errors import ExperimentError, FactError
    from causalcone.runners.facts import data as fact_data
    from causalcone.runners.facts.files import listed
    from causalcone.runners.facts.formats.flat import parse_columns
    from causalcone.runners.facts.schemas import Reading
    from causalcone.runners.names import path_of, title_of

    if check and model is None:
        raise ExperimentError("--check runs the prompts in a model; name it with --model")
    if out is not None:
        fact_data.refuse_occupied_file(out, overwrite)
    how = Reading(seed, zsre_form, parse_columns(column or ()))  # type: ignore[arg-type]
    path, title = path_of(source, "facts"), title_of(source, "facts")
    opened = fact_data.open_records(path, how, split, dataset_config, title)
    usable = None if model is None else fact_data.encoding_check(path_of(model, "model"))
    facts, problems = opened.facts(limit, usable)
    if problems:
        complaint = f"{len(problems)} records of {opened.place} cannot be used:{listed(problems, most=20)}"
        if not facts:
            raise FactError(f"{complaint}\nno fact is left, and nothing was written")
        if not skip_bad_facts:
            raise FactError(f"{complaint}\nnothing was written; fix them, or leave them out with --skip-bad-facts")
        warnings.warn(f"{complaint}\nthey were left out", stacklevel=2)
    lines = [] if quiet else [*fact_data.summary(opened.recognised, facts)]
    if check:
        from causalcone.engine.compute import Compute
        from causalcone.runners.facts.model_check import check_lines
        from causalcone.runners.inputs.inputs import open_model

        lines += check_lines(open_model(path_of(str(model), "model"), Compute()), facts)
    if out is not None:
        fact_data.write_facts(facts, out)
        lines += [] if quiet else [f"{opened.place} -> {out}"]
    for line in lines:
        Console().print(line, highlight=False, markup=False, soft_wrap=True)


COMMANDS = {
    data: """
causalcone data counterfact.json --out facts.jsonl
causalcone data azhx/counterfact --split train --limit 1000 --out facts.jsonl --model gpt2-xl
causalcone data zsre_mend_eval.json --zsre-form meng --skip-bad-facts --out zsre.jsonl
causalcone data mine.csv --column subject=person --column target_true=city --out facts.jsonl
causalcone data demo --out facts.jsonl
causalcone data facts.jsonl --model ./my-model --check
"""
}
