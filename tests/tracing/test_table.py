"""The trace table: its schema, its order, and that the same call gives the same table."""

import pyarrow as pa
import pytest
from helpers.compare import assert_table_close
from helpers.models import FACTS

import causalcone as cc

OPTIONS = {"states": (("hidden", 1), ("mlp", 2)), "samples": 2, "sigma": 0.5}

COLUMNS = {
    "fact_id": pa.types.is_string,
    "method": pa.types.is_string,
    "kind": pa.types.is_string,
    "window": pa.types.is_integer,
    "layer": pa.types.is_integer,
    "token": pa.types.is_integer,
    "token_text": pa.types.is_string,
    "subject_start": pa.types.is_integer,
    "subject_end": pa.types.is_integer,
    "prompt_tokens": pa.types.is_integer,
    "p_clean": pa.types.is_float64,
    "p_corrupted": pa.types.is_float64,
    "p_patched": pa.types.is_float64,
    "p_patched_sd": pa.types.is_float64,
    "answer_tokens": pa.types.is_integer,
    "logp_clean": pa.types.is_float64,
    "logp_corrupted": pa.types.is_float64,
    "logp_patched": pa.types.is_float64,
}


@pytest.fixture(scope="module")
def tracer(model, tokenizer):
    return cc.Tracer(model, tokenizer)


@pytest.fixture(scope="module")
def table(tracer):
    return tracer.trace(FACTS, **OPTIONS)


def test_schema(table):
    assert isinstance(table, pa.Table)
    assert table.column_names == list(COLUMNS)
    for name, is_right in COLUMNS.items():
        assert is_right(table.schema.field(name).type), name
        assert table[name].null_count == 0, name


def test_one_row_per_state_layer_and_token(table):
    for fact in FACTS:
        rows = [row for row in table.to_pylist() if row["fact_id"] == fact.id]
        tokens = rows[0]["prompt_tokens"]
        places = {(row["kind"], row["window"], row["layer"], row["token"]) for row in rows}
        layers = range(4)
        assert places == {(*state, layer, t) for state in OPTIONS["states"] for layer in layers for t in range(tokens)}
        assert len(places) == len(rows)


def test_a_single_sample_has_no_standard_deviation(tracer):
    table = tracer.trace(FACTS[:1], **{**OPTIONS, "samples": 1})
    assert table["p_patched_sd"].null_count == table.num_rows


def test_the_same_call_gives_the_same_table(table, tracer, model, tokenizer):
    assert_table_close(tracer.trace(FACTS, **OPTIONS), table)
    assert_table_close(cc.Tracer(model, tokenizer).trace(FACTS, **OPTIONS), table)


def test_facts_come_in_their_order(table, tracer):
    assert _runs(table["fact_id"].to_pylist()) == [fact.id for fact in FACTS]
    backwards = tracer.trace(FACTS[::-1], **OPTIONS)
    assert _runs(backwards["fact_id"].to_pylist()) == [fact.id for fact in FACTS[::-1]]


def test_a_stream_gives_whole_facts_in_order(table, tracer, model, tokenizer):
    batches = list(tracer.stream(FACTS, **OPTIONS))
    assert all(isinstance(batch, pa.RecordBatch) for batch in batches)
    assert_table_close(pa.Table.from_batches(batches), table)
    seen = [name for batch in batches for name in set(batch["fact_id"].to_pylist())]
    assert sorted(seen) == sorted(fact.id for fact in FACTS), "a fact is spread over several batches"


def test_facts_may_be_a_generator(table, tracer):
    assert_table_close(tracer.trace((fact for fact in FACTS), **OPTIONS), table)


def test_progress_is_told_after_every_fact(tracer):
    told = []
    tracer.trace(FACTS, **OPTIONS, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, len(FACTS)) for done in range(len(FACTS) + 1)]


def test_a_stream_checks_its_arguments_when_it_is_made(tracer):
    with pytest.raises(cc.CausalconeError):
        tracer.stream(FACTS, samples=0)


def _runs(names):
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
