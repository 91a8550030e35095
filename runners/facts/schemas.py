"""The formats of fact files, a registration each, and how records are recognised (docs/data.md, "Formats")."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, get_args

from pydantic import AliasChoices, BaseModel

from causalcone.engine.errors import FactError, one_of
from causalcone.engine.facts import Fact
from causalcone.runners.facts.formats.benchmarks import MquakeRecord, RippleRecord
from causalcone.runners.facts.formats.flat import FIELDS, EditRecord, flat_model
from causalcone.runners.facts.formats.published import (
    CounterFactRecord,
    FactLine,
    KnownFact,
    ZsreRecord,
    draw_other_answers,
)

Record = Mapping[str, Any]
ZsreForm = Literal["hase", "meng", "alt"]


@dataclass(frozen=True)
class Reading:
    """How records are read, as ``load_facts`` says. Raises ``FactError`` for a form that there is none of."""

    seed: int = 0
    zsre_form: ZsreForm = "hase"
    columns: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        one_of("zsre_form", self.zsre_form, get_args(ZsreForm), FactError)


@dataclass(frozen=True)
class Schema:
    """A format. marks: keys, each enough to recognise it by, or several together; model: what a record must be;
    description: in a few words, with the keys; convert: a record so checked, and its index, to facts; why: the keys
    that records are recognised by, and how many have them."""

    name: str
    marks: tuple[str, ...]
    model: type[BaseModel]
    description: str
    convert: Callable[[Any, int], list[Fact]] = lambda record, index: record.facts(index)
    why: str = ""

    def mark(self, keys: Iterable[str]) -> str | None:
        """The mark that a record of these keys has."""
        return next((mark for mark in self.marks if {*mark.split()} <= {*keys}), None)

    def fits(self, columns: Iterable[str]) -> bool:
        """Whether a table of these columns can be one of such records: its rows, unlike a file's, all have them."""
        fields = {tuple(_names(name, field)): field for name, field in self.model.model_fields.items()}
        columns = {*columns}
        closed = self.model.model_config.get("extra") == "forbid" and columns - {
            name for names in fields for name in names
        }
        return not closed and all(columns & {*names} for names, field in fields.items() if field.is_required())

    def facts(self, index: int, record: Record) -> list[Fact]:
        """The facts of a record. Raises pydantic's ``ValidationError``, or ``ValueError``."""
        return self.convert(self.model.model_validate(record), index)

    def lines(self) -> list[str]:
        """What records are taken for and why, for people."""
        return [f"schema: {self.description}", f"recognised by: {self.why}"]


def _names(name: str, field: Any) -> Sequence[Any]:
    alias = field.validation_alias
    return alias.choices if isinstance(alias, AliasChoices) else [alias or name]


# fmt: off
SCHEMAS = (  # of a record the first whose marks it has
    Schema("mquake", ("requested_rewrite questions",), MquakeRecord,
           "MQuAKE (requested_rewrite, questions, new_answer)"),
    Schema("counterfact", ("requested_rewrite",), CounterFactRecord, "CounterFact (requested_rewrite, case_id)"),
    Schema("rippleedits", ("edit",), RippleRecord, "RippleEdits (edit, Relation_Specificity, Forgetfulness, ...)"),
    Schema("zsre", ("src answers",), ZsreRecord, "MEND's zsRE evaluation file (src, subject, answers, rephrase, loc)"),
    Schema("known", ("attribute", "known_id"), KnownFact, "ROME's known facts (prompt, subject, attribute, known_id)"),
    Schema("wikibigedit", ("update",), EditRecord, "WikiBigEdit (subject, update, ans, rephrase, personas, mhop, loc)"),
    Schema("knowedit", ("prompt locality", "prompt portability", "concept labels"), EditRecord,
           "KnowEdit, EasyEdit's requests (subject, prompt, target_new, portability, locality)"),
    Schema("fact", ("target_true",), FactLine, "causalcone's own lines (id, prompt, subject, target_true, ...)"),
    Schema("easyedit", ("prompt target_new", "src alt"), EditRecord,
           "EasyEdit's files (subject, prompt, target_new, ground_truth, rephrase_prompt, ...)"),
    Schema("ultraedit", ("prompt ans", "src ans"), EditRecord,
           "UltraEditBench, zsRE for lifelong editing (subject, prompt or src, ans, rephrase, loc)"),
)
# fmt: on


def recognise(records: Iterable[Any], table: bool = False) -> Schema | None:
    """The format that most records have, so that a broken one does not hide what a file is. table: of a table's rows,
    each of which has all columns."""
    found: Counter[tuple[Schema, str]] = Counter()
    shapes = Counter(tuple(record) for record in records if isinstance(record, Mapping))
    for keys, count in shapes.items():
        fitting = (schema for schema in SCHEMAS if not table or schema.fits(keys))
        marked = ((schema, mark) for schema in fitting if (mark := schema.mark(keys)))
        found.update(dict.fromkeys(islice(marked, 1), count))
    if not found:
        return None
    (schema, mark), count = found.most_common(1)[0]
    kind = "columns" if table else "keys"
    often = "" if table else f" of {count:,} of {shapes.total():,} records"
    return replace(schema, why=f"{kind} {', '.join(mark.split())}{often}")


def named_columns(columns: Mapping[str, str], found: Iterable[str]) -> Schema:
    """A flat table whose columns are named. Raises ``FactError`` for a field or a column that is not there."""
    found = [*dict.fromkeys(found)]
    for field, column in columns.items():
        if field not in FIELDS:
            raise FactError(f"there is no field {field!r} for the column {column!r}; choose from {', '.join(FIELDS)}")
        if column not in found:
            raise FactError(f"there is no column {column!r} for {field}; there are {', '.join(found)}")
    named = ", ".join(f"{field}={column}" for field, column in columns.items())
    description = "flat records (subject, prompt, target_true, ...)"
    return Schema("columns", (), flat_model(columns), description, why=f"named columns {named}")


def in_form(schema: Schema, how: Reading, records: Iterable[Any]) -> Schema:
    """The schema as its records are to be read: zsRE's have three forms."""
    if schema.name != "zsre" or how.zsre_form == "meng":
        return schema
    if how.zsre_form == "alt":
        return replace(schema, model=EditRecord)
    drawn = draw_other_answers(records, how.seed)
    return replace(schema, convert=lambda record, index: record.towards(index, drawn[index]))


def supported() -> str:
    """All formats, for messages."""
    formats = "; ".join(sorted(schema.description for schema in SCHEMAS))
    return f"{formats}; any other flat records with --column FIELD=COLUMN"
