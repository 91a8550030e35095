"""Reading facts from files of every format, and writing causalcone's JSON lines."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError

from causalcone.engine.errors import FactError, one_of
from causalcone.engine.facts import Fact, OnError
from causalcone.runners.checked_files import PLAINER, plainly
from causalcone.runners.facts.records import is_table, read_records, without_nulls
from causalcone.runners.facts.schemas import Reading, Schema, ZsreForm, in_form, named_columns, recognise, supported

Check = Callable[[Fact], object]


class SkippedRecords(UserWarning):
    """Records left out under ``on_error="skip"``: ``problems`` says why, one by one."""

    def __init__(self, path: Path, problems: Sequence[str]) -> None:
        super().__init__(f"skipped {len(problems)} records of {path}:{listed(problems, 10)}")
        self.problems = tuple(problems)


class FactsRead(NamedTuple):
    """Facts of a file, what is wrong with records that are left out, and what the file was taken for."""

    facts: list[Fact]
    problems: list[str]
    recognised: Schema


def load_facts(
    path: str | os.PathLike[str],
    limit: int | None = None,
    seed: int = 0,
    *,
    zsre_form: ZsreForm = "hase",
    on_error: OnError = "raise",
    columns: Mapping[str, str] | None = None,
) -> list[Fact]:
    """Facts of a file: JSON, JSON lines, CSV, TSV or Parquet, in the file's order (docs/data.md).

    The format is recognised by content: CounterFact, zsRE, ROME's known facts, KnowEdit, EasyEdit's files, MQuAKE,
    RippleEdits, WikiBigEdit, UltraEditBench, or the lines that ``save_facts`` writes. Ids are case_id, known_id or id
    where the file has one, else the record's index from 0; edits of one MQuAKE case are "case/0", "case/1", ...

    Args:
        path: The file.
        limit: Take the first N facts only.
        seed: Draws zsRE's ``target_new``.
        zsre_form: "hase" for question and answer prompts, with false targets from other records; "meng" for raw
            questions, whose answer is both targets; "alt" for raw questions with the record's own false target.
        on_error: "skip" leaves out bad records, and later ones of an id that was there before, and lists them in one
            warning, ``SkippedRecords``.
        columns: For flat records of one's own, by field the column that it is in, such as ``{"subject": "name"}``.

    Raises:
        FactError: Names the file and the record at fault.
    """
    read = read_facts(path, Reading(seed, zsre_form, columns), limit, on_error)
    if read.problems:
        warnings.warn(SkippedRecords(Path(path), read.problems), stacklevel=2)
    return read.facts


def read_facts(
    path: str | os.PathLike[str], how: Reading, limit: int | None = None, on_error: OnError = "raise"
) -> FactsRead:
    """As ``load_facts``: the facts, what is wrong with the records that are left out, and what the file is."""
    path = Path(path)
    if limit is not None and limit < 1:
        raise FactError(f"limit is {limit}; it must be at least 1, or None for all facts")
    one_of("on_error", on_error, get_args(OnError), FactError)
    opened = open_file(path, path, how)
    facts, problems = opened.facts(limit, on_error=on_error)
    if not facts:
        raise FactError(f"{path} holds no usable fact; the first problem: {problems[0]}")
    return FactsRead(facts, problems, opened.recognised)


def save_facts(facts: Iterable[Fact], path: str | os.PathLike[str]) -> None:
    """Write one JSON object per line (UTF-8), with Fact's field names; ``load_facts`` reads the same facts back.

    Args:
        facts: The facts; fields left at their default are omitted.
        path: The file, which is replaced if it is there.

    Raises:
        FactError: The file cannot be written.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Fact)}
    filled = (
        {name: value for name, value in dataclasses.asdict(fact).items() if value != defaults[name]} for fact in facts
    )
    lines = [json.dumps(fields, ensure_ascii=False) + "\n" for fields in filled]
    try:
        Path(path).write_text("".join(lines), encoding="utf-8", newline="\n")
    except OSError as error:
        raise FactError(f"cannot write {path}: {error.strerror}") from error


@dataclass(frozen=True)
class Records:
    """Records of one format, read while they are taken; place: what they are of, in words."""

    place: str | Path
    recognised: Schema
    records: Iterable[Any]

    def facts(
        self, limit: int | None, check: Check | None = None, on_error: OnError = "skip"
    ) -> tuple[list[Fact], list[str]]:
        """The first ``limit`` facts that ``check`` raises no error of, and what is wrong with records before those, a
        line each. No further record is taken. Of several facts with one id the first counts. Under "raise" a record
        that is none raises ``FactError``, and so do ids that are there twice."""
        facts: dict[str, Fact] = {}
        problems: list[str] = []
        again: dict[str, None] = {}
        for index, record in enumerate(self.records):
            try:
                found = self._facts_of(index, record, check)
            except FactError as error:
                if on_error == "raise":
                    raise
                problems.append(str(error))
                continue
            twice = [fact.id for fact in found if fact.id in facts]
            problems += [f"{_place(self.place, index, record)}: the id {name!r} was there before" for name in twice]
            again |= dict.fromkeys(twice)
            facts |= {fact.id: fact for fact in found if fact.id not in facts}
            if limit is not None and len(facts) >= limit:
                break
        if again and on_error == "raise":
            more = f" and {len(again) - 10} more" if len(again) > 10 else ""
            raise FactError(
                f"{self.place}: ids must be unique, but {', '.join(map(repr, [*again][:10]))}{more} occur more than "
                "once; rename them, or load with on_error='skip' to keep the first of each"
            )
        return list(facts.values())[:limit], problems

    def _facts_of(self, index: int, record: Any, check: Check | None = None) -> list[Fact]:
        place = _place(self.place, index, record)
        if not isinstance(record, Mapping):
            raise FactError(f"{place} is {_kind(record)}, not an object")
        try:
            facts = self.recognised.facts(index, record)
            for fact in facts if check else ():
                check(fact)  # type: ignore[misc]
        except ValidationError as error:
            complaints = (
                f"{'.'.join(map(str, problem['loc']))} {plainly(problem, _PLAINER)}"
                for problem in error.errors(include_url=False)
            )
            raise FactError(f"{place}: {'; '.join(complaints)}") from error
        except ValueError as error:
            raise FactError(f"{place}: {error}") from error
        return facts


_PLAINER = {
    **PLAINER,
    **dict.fromkeys(("model_type", "model_attributes_type", "dataclass_type", "dict_type"), "must be an object"),
    "extra_forbidden": "is not a field of a fact",
    "unexpected_keyword_argument": "is not a field of a probe",
}


def open_file(path: Path, place: str | Path, how: Reading) -> Records:
    """The records of a file, which messages call ``place``."""
    return as_records(place, read_records(path), (), is_table(path), how)


def as_records(place: str | Path, first: Sequence[Any], others: Iterable[Any], table: bool, how: Reading) -> Records:
    """Records of the format of the ``first`` ones. table: whether they are rows, which all have the same keys."""
    if how.columns:
        names = (key for record in first if isinstance(record, Mapping) for key in record)
        recognised: Schema | None = named_columns(how.columns, names)
    else:
        recognised = recognise(first, table)
    if recognised is None:
        raise FactError(f"{place} holds no facts: {_found(first, table)}. Supported are {supported()}")
    records: Iterable[Any] = chain(first, others)
    if table:
        records = map(without_nulls, records)
    if recognised.name == "zsre" and how.zsre_form == "hase":
        records = list(records)  # false targets are drawn from all answers, whatever the limit
    return Records(place, in_form(recognised, how, records), records)


def listed(problems: Sequence[str], most: int) -> str:
    """Problems on indented lines, each after a line break; then the number of those beyond the first ``most``."""
    more = f"\n  and {len(problems) - most} more" if len(problems) > most else ""
    return "".join(f"\n  {problem}" for problem in problems[:most]) + more


def _place(place: str | Path, index: int, record: Any) -> str:
    if isinstance(record, Mapping):
        for key in ("case_id", "known_id", "id"):
            if record.get(key) is not None:
                return f"{place}: record {index} ({key} {record[key]})"
    return f"{place}: record {index}"


def _found(records: Sequence[Any], table: bool) -> str:
    if table:
        return f"its columns are {', '.join(records[0])}"
    if not records:
        return "it is an empty list"
    if isinstance(records[0], Mapping):
        keys = ", ".join(map(repr, list(records[0])[:8])) or "no keys"
        return f"its first record has the keys {keys}" if records[0] else "its first record is an empty object"
    return f"its first item is {_kind(records[0])}"


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
