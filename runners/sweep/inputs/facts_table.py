"""The facts of a sweep as a table, and what the filter found of them."""

import json
from collections.abc import Sequence

import pyarrow as pa

from causalcone.engine.facts import Fact, OnError
from causalcone.engine.schemas import FACT_SCHEMA, FILTER_SCHEMA
from causalcone.runners.facts import files
from causalcone.runners.facts.schemas import Reading
from causalcone.runners.names import path_of
from causalcone.runners.sweep.inputs.settings import Sweep
from causalcone.runners.sweep.inputs.units import Selection

FACTS = "facts.parquet"

_TEXTS = ("prompt", "subject", "target_true", "target_new", "relation_id")


def fact_table(facts: Sequence[Fact], filtered: pa.Table | None = None) -> pa.Table:
    """The table of facts, with what the filter found of them, once it has run."""
    rows = [
        {
            "fact_id": fact.id,
            **{name: getattr(fact, name) for name in _TEXTS},
            "paraphrase_prompts": len(fact.paraphrase_prompts),
            "neighborhood_prompts": len(fact.neighborhood_prompts),
            "fact": json.dumps(fact.record, ensure_ascii=False),
        }
        for fact in facts
    ]
    table = pa.Table.from_pylist(rows, schema=FACT_SCHEMA)
    if filtered is None:
        return table
    for name in FILTER_SCHEMA.names[1:]:
        if name not in filtered.column_names:  # of parts that are older than the column
            continue
        table = table.set_column(table.schema.get_field_index(name), FACT_SCHEMA.field(name), filtered[name])
    return table


def facts_of(table: pa.Table) -> list[Fact]:
    """The facts of their table."""
    return [Fact.from_record(json.loads(text)) for text in table["fact"].to_pylist()]


def select(sweep: Sweep, table: pa.Table) -> Selection:
    """The facts that go on, from what the filter found of them. Published code drops those that are not erasable from
    everything."""
    published = sweep.compat == "published"
    least = sweep.filter.erasable
    known, erasable = [], []
    for number, row in enumerate(table.select(("completes", "argmax", "p_true")).to_pylist()):
        likely = row["p_true"] > least if published else row["p_true"] >= least
        right = (row["completes"] or not sweep.filter.completes) and (row["argmax"] or not sweep.filter.argmax)
        if right and (likely or not published):
            known.append(number)
            if likely:
                erasable.append(number)
    return Selection(tuple(known), tuple(erasable))


def read_facts(sweep: Sweep) -> files.FactsRead:
    """The facts of the sweep's file, within its limit, why records were skipped, and what the file is."""
    on_error: OnError = "skip" if sweep.skip_bad_facts else "raise"
    how = Reading(sweep.seed, sweep.zsre_form, sweep.columns)
    return files.read_facts(path_of(sweep.facts, "facts"), how, sweep.limit, on_error)
