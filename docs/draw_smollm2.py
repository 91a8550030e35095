"""The study of smollm2.md, from the rows of its sweeps in docs/smollm2 to the numbers in its text. Run it as
``python docs/draw_smollm2.py``.

Sweeps ``study``, ``problems`` and ``keys`` are there as ``causalcone sweep`` writes them, but in one Parquet file of
each table (``python docs/draw_smollm2.py FOLDER ...`` takes them in so). From them come the tables on record,
``smollm2`` and ``smollm2-problems`` in ``analysis/papers/published``, further CSV files beside the rows, and figures.
Then every number of the text that names its table is set:

    0.042<!-- table3_rewrite diff method=rome -->         the cell of that column in the row that is so, as many digits
    4.2 %<!-- ... -->                                     the same in percent
    <!-- rows table3_rewrite method,diff layer=2 -->      rows and columns, up to <!-- end -->
"""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from causalcone.analysis.effects import average_indirect_effect, concentrated_facts
from causalcone.analysis.layer_effects import severed_effects, zeroing_curve
from causalcone.analysis.papers.figures import paper_figures
from causalcone.analysis.papers.inputs import AnalysisInputs, AnalysisOptions
from causalcone.analysis.papers.records import ABOUT
from causalcone.analysis.papers.table_files import cells
from causalcone.analysis.papers.tables import paper_tables
from causalcone.analysis.plot import heatmaps
from causalcone.analysis.scores import mean_scores
from causalcone.analysis.stats.regressions import regressions
from causalcone.analysis.stats.uncertainty import permutation_test
from causalcone.analysis.sweep_results import Study
from causalcone.runners.sweep.status import status_of

DOCS = Path(__file__).parent
RAW, TEXTS = DOCS / "smollm2", (DOCS / "smollm2.md", DOCS.parent / "README.md")
RECORDS = DOCS.parent / "analysis" / "papers" / "published"
NAMES = {"study": "smollm2", "problems": "smollm2-problems"}
"""Of sweeps, the names of their tables on record."""
FIGURES = ("average_indirect_effect", "effects_by_window", "scores_error_injection", "r2_mlp_5", "severed", "zeroing")
FACT = "city_country/Bordeaux"
"""That there is a heat map of."""
MAIN = ("mlp", 5)
POSITIONS = ("first", "inside")
KEY = ["problem", "method", "window"]
NO_RECORD = AnalysisOptions()


def main() -> None:
    studies = {name: Study(RAW / name) for name in ("study", "problems", "keys") if (RAW / name).is_dir()}
    for name, record in NAMES.items():
        if name in studies:
            write_record(studies[name], RECORDS / record)
    study = studies["study"]
    joined = {name: each.joined(MAIN) for name, each in studies.items() if name in NAMES}
    write("edits", pl.concat(joined.values()))
    for name, each in studies.items():
        write("scores" if each is study else f"{name}_scores", each.mean_scores)
    for score in ("rewrite", "paraphrase", "neighborhood"):
        write(f"{score}_by_layer", by_layer(study, score))
    write("facts", pl.concat(known(study, position) for position in ("all", *POSITIONS)))
    for name, table in by_position(study, joined["study"]).items():
        write(name, table)
    write("severed", severed_effects(study.folder / "traces", common=True))
    write("zeroing_curve", zeroing_curve(study.folder / "traces" / "zero"))
    if "problems" in studies:
        write("problems_by_layer", by_layer(studies["problems"], "rewrite"))
    write("suspect", changes(study, study.scan("edits").collect(), ["method", "window"]))
    if "keys" in studies:
        for name, table in keys(study, studies["keys"]).items():
            write(name, table)
    draw(study)
    for text in TEXTS:
        text.write_text(filled(text.read_text(encoding="utf-8")), encoding="utf-8")


def pack(sweep: Path, folder: Path) -> None:
    """Copy the rows of a sweep, one file of each table's parts."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in sorted({part.parent for part in sweep.rglob("*.parquet")}):
        if table == sweep:
            shutil.copy(sweep / "facts.parquet", folder)
            continue
        rows = pa.concat_tables(pq.read_table(part) for part in sorted(table.glob("*.parquet")))
        place = folder / table.relative_to(sweep) / "part-00000.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, place, compression="zstd", compression_level=19)
    minutes = {each.work.title.replace(" ", "_"): each.seconds / 60 for each in status_of(str(sweep)).stages}
    minutes["all"] = sum(minutes.values())
    pl.DataFrame({"stage": minutes.keys(), "minutes": minutes.values()}).write_csv(folder / "minutes.csv")
    for name in ("run.json", "noise.json", "contexts.json"):
        if (sweep / name).is_file():  # noise is only where facts are traced
            shutil.copy(sweep / name, folder)


def write(name: str, table: pl.DataFrame) -> None:
    table.write_csv(RAW / f"{name}.csv")


def write_record(study: Study, folder: Path) -> None:
    """The tables that ``causalcone analyze`` writes, as CSV, with whose they are and how they were computed."""
    folder.mkdir(exist_ok=True)
    for table in paper_tables(study, NO_RECORD)[0]:
        table.frame.write_csv(folder / f"{table.name}.csv")
    about = {"label": study.title, "protocol": AnalysisInputs(study, NO_RECORD).protocol}
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def by_layer(study: Study, score: str) -> pl.DataFrame:
    """Mean scores, a column for each edited layer."""
    means = study.mean_scores.filter(score=score).with_columns(layer=pl.format("layer_{}", "layer"))
    return means.pivot("layer", index=KEY, values="mean")


def of_position(traces: pl.DataFrame, position: str) -> pl.DataFrame:
    first = pl.col("subject_start") == 0
    return traces.filter({"all": True, "first": first, "inside": ~first}[position])


def known(study: Study, position: str) -> pl.DataFrame:
    """How many facts there are, what the model knows of them, and how many have their effects in few layers."""
    facts = of_position(study.traces, position).unique("fact_id")
    return facts.join(concentrated_facts(study.effects(MAIN)), on="fact_id", validate="1:1").select(
        subject=pl.lit(position),
        facts=pl.len(),
        p_clean=pl.mean("p_clean"),
        p_corrupted=pl.mean("p_corrupted"),
        concentrated=pl.sum("concentrated"),
    )


def by_position(study: Study, joined: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Regressions, mean scores and average effects of the facts whose subject begins the prompt, and of the others."""
    first = of_position(study.traces, "first")["fact_id"].unique()
    tables: dict[str, list[pl.DataFrame]] = {"position_r2": [], "position_scores": [], "position_effects": []}
    for position in POSITIONS:
        own = pl.col("fact_id").is_in(first.implode())
        own = own if position == "first" else ~own
        edits = joined.filter(own)
        tests = permutation_test(edits).select(*KEY, "chance", p_permutation="p")
        tables["position_r2"].append(regressions(edits).join(tests, on=KEY, how="left", maintain_order="left"))
        tables["position_scores"].append(mean_scores(study.scores.filter(own)))
        tables["position_effects"].append(average_indirect_effect(study.traces.filter(own)))
        for each in tables.values():
            each[-1] = each[-1].with_columns(subject=pl.lit(position))
    return {
        name: pl.concat(parts).with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))
        for name, parts in tables.items()
    }


def keys(study: Study, other: Study) -> dict[str, pl.DataFrame]:
    """ROME and R-ROME of the facts and layers that both edited: mean scores of each layer and of all, and how large the
    changes are."""
    common = other.scores.select("fact_id", "layer").unique()

    def both(own: pl.DataFrame, others: pl.DataFrame) -> pl.DataFrame:
        return pl.concat([own.filter(method="rome"), others]).join(common, on=["fact_id", "layer"], how="semi")

    scores = both(study.scores, other.scores)
    edits = both(*(each.scan("edits").collect() for each in (study, other)))
    return {
        "keys": mean_scores(scores),
        "keys_overall": mean_scores(scores.with_columns(layer=pl.lit(0, pl.Int32))),
        "keys_changes": changes(study, edits, ["method"]),
    }


def changes(study: Study, edits: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    """How large the changes of edits are, over the norm of the weights, and how many are suspect, by whether the
    subject begins the prompt."""
    first = of_position(study.traces, "first")["fact_id"].unique()
    subject = pl.when(pl.col("fact_id").is_in(first.implode())).then(pl.lit("first")).otherwise(pl.lit("inside"))
    return (
        edits.group_by(*by, subject=subject, maintain_order=True)
        .agg(
            edits=pl.len(),
            suspect=pl.col("suspect").is_not_null().sum(),
            mean_norm=pl.mean("relative_norm"),
            largest_norm=pl.max("relative_norm"),
        )
        .sort(*by, "subject")
    )


def draw(study: Study) -> None:
    """The figures of the text and the README, so large that they are sharp where they are shown."""
    heatmaps(study.traces.filter(fact_id=FACT), FACT, RAW / "heatmap.png")
    with tempfile.TemporaryDirectory() as folder:
        paper_figures(study, Path(folder), NO_RECORD)
        for name in FIGURES:
            shutil.copy(Path(folder, f"{name}.png"), RAW / f"{name}.png")


def rows_of(name: str, conditions: str) -> pl.DataFrame:
    """The rows of a table, ``TABLE`` or ``RECORD/TABLE``, where columns are as ``COLUMN=VALUE COLUMN=VALUE`` says."""
    places = (RECORDS / "smollm2" / f"{name}.csv", RAW / f"{name}.csv", RECORDS / f"{name}.csv")
    table = pl.read_csv(next(place for place in places if place.is_file()), infer_schema_length=None)
    for condition in conditions.split():
        column, _, value = condition.partition("=")
        table = table.filter(pl.col(column).cast(pl.String) == value)
    return table


def filled(text: str) -> str:
    """The text with every number that names its table as the table has it."""

    def number(match: re.Match[str]) -> str:
        shown, unit, name, column, conditions = match.groups()
        value = rows_of(name, conditions)[column].item()
        digits = len(shown.partition(".")[2])
        value = value * 100 if unit.endswith("%") else value
        return f"{value:z,.{digits}f}{unit}<!--{match[0].partition('<!--')[2]}"

    def rows(match: re.Match[str]) -> str:
        head, name, columns, conditions = match.group("head", "name", "columns", "conditions")
        header, found = cells(rows_of(name, conditions).select("window", *columns.split(",")))
        lines = [header, ["---"] * len(header), *found]
        return f"{head}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n<!-- end -->"

    text = re.sub(r"(-?[\d.,]*\d)((?: %)?)<!--\s([\w/-]+)\s(\w+)((?:\s\S+=\S+)*)\s-->", number, text)
    block = r"(?P<head><!-- rows (?P<name>[\w/-]+) (?P<columns>\S+)(?P<conditions>(?: \S+=\S+)*) -->).*?<!-- end -->"
    return re.sub(block, rows, text, flags=re.DOTALL)


if __name__ == "__main__":
    for sweep in map(Path, sys.argv[1:]):
        pack(sweep, RAW / sweep.name)
    main()
