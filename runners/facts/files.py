"""Reading facts from the published file formats, and reading and writing causalcone's JSON lines."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from causalcone.engine.errors import FactError
from causalcone.engine.facts import Fact, OnError
from causalcone.runners.checked_files import PLAINER, read_text
from causalcone.runners.facts.schemas import SCHEMAS, Convert, ZsreForm, converter, detect_schema


class SkippedRecords(UserWarning):
    """Records left out under ``on_error="skip"``: ``problems`` says why, one by one."""

    def __init__(self, path: Path, problems: Sequence[str]) -> None:
        super().__init__(f"skipped {len(problems)} records of {path}:{listed(problems, 10)}")
        self.problems = tuple(problems)


def load_facts(
    path: str | os.PathLike[str],
    limit: int | None = None,
    seed: int = 0,
    *,
    zsre_form: ZsreForm = "hase",
    on_error: OnError = "raise",
) -> list[Fact]:
    """Facts of a JSON or JSON-lines file, in the file's order (docs/data.md).

    The schema is recognised by content: CounterFact, MEND's zsRE evaluation file, ROME's known facts, or the lines that
    ``save_facts`` writes. Ids are case_id, known_id or id where the file has one, else the record's index from 0.

    Args:
        path: The file.
        limit: Take the first N facts only.
        seed: Draws zsRE's ``target_new``.
        zsre_form: "hase" for question and answer prompts, with false targets from other records; "meng" for raw
            questions, whose answer is both targets.
        on_error: "skip" leaves out bad records, and later ones of an id that was there before, and lists them in one
            warning, ``SkippedRecords``.

    Raises:
        FactError: Names the file and the record at fault.
    """
    facts, problems = read_facts(path, limit, seed, zsre_form=zsre_form, on_error=on_error)
    if problems:
        warnings.warn(SkippedRecords(Path(path), problems), stacklevel=2)
    return facts


def read_facts(
    path: str | os.PathLike[str],
    limit: int | None = None,
    seed: int = 0,
    *,
    zsre_form: ZsreForm = "hase",
    on_error: OnError = "raise",
) -> tuple[list[Fact], list[str]]:
    """As ``load_facts``: the facts, and what is wrong with the records that are left out."""
    path = Path(path)
    if limit is not None and limit < 1:
        raise FactError(f"limit is {limit}; it must be at least 1, or None for all facts")
    if on_error not in ("raise", "skip"):
        raise FactError(f"on_error is {on_error!r}; it must be 'raise' or 'skip'")
    if zsre_form not in ("hase", "meng"):
        raise FactError(f"zsre_form is {zsre_form!r}; it must be 'hase' or 'meng'")

    records = read_records(path)
    convert = converter(known_schema(path, records), records, seed, zsre_form)
    if on_error == "raise":
        facts = [_convert(path, index, record, convert) for index, record in enumerate(records[:limit])]
        _refuse_duplicates(path, facts)
        return facts, []
    facts, problems = good_facts(path, records, convert, limit)
    if not facts:
        raise FactError(f"{path} holds no usable fact; the first problem: {problems[0]}")
    return facts, problems


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


def good_facts(
    place: str | Path, records: Iterable[Any], convert: Convert, limit: int | None
) -> tuple[list[Fact], list[str]]:
    """The first ``limit`` records that are facts, and what is wrong with those between them, a line each. No further
    record is taken. Of several with one id the first counts; ``place`` names the source in messages."""
    facts: dict[str, Fact] = {}
    problems: list[str] = []
    for index, record in enumerate(records):
        try:
            fact = _convert(place, index, record, convert)
        except FactError as error:
            problems.append(str(error))
            continue
        if fact.id in facts:
            problems.append(f"{_place(place, index, record)}: the id {fact.id!r} was there before")
            continue
        facts[fact.id] = fact
        if len(facts) == limit:
            break
    return list(facts.values()), problems


def listed(problems: Sequence[str], most: int) -> str:
    """Problems on indented lines, each after a line break; then the number of those beyond the first ``most``."""
    more = f"\n  and {len(problems) - most} more" if len(problems) > most else ""
    return "".join(f"\n  {problem}" for problem in problems[:most]) + more


def _refuse_duplicates(path: Path, facts: Sequence[Fact]) -> None:
    repeated = [name for name, count in Counter(fact.id for fact in facts).items() if count > 1]
    if repeated:
        more = f" and {len(repeated) - 10} more" if len(repeated) > 10 else ""
        raise FactError(
            f"{path}: ids must be unique, but {', '.join(map(repr, repeated[:10]))}{more} occur more than once; "
            "rename them, or load with on_error='skip' to keep the first of each"
        )


def _convert(place: str | Path, index: int, record: Any, convert: Convert) -> Fact:
    if not isinstance(record, Mapping):
        raise FactError(f"{_place(place, index, record)} is {_kind(record)}, not an object")
    try:
        return convert(index, record)
    except ValidationError as error:
        complaints = (
            f"{'.'.join(map(str, problem['loc']))} {_PLAINER.get(problem['type'], problem['msg'])}"
            for problem in error.errors(include_url=False)
        )
        raise FactError(f"{_place(place, index, record)}: {'; '.join(complaints)}") from error
    except ValueError as error:
        raise FactError(f"{_place(place, index, record)}: {error}") from error


_PLAINER = {**PLAINER, "model_type": "must be an object", "extra_forbidden": "is not a field of a fact"}


def _place(place: str | Path, index: int, record: Any) -> str:
    if isinstance(record, Mapping):
        for key in ("case_id", "known_id", "id"):
            if record.get(key) is not None:
                return f"{place}: record {index} ({key} {record[key]})"
    return f"{place}: record {index}"


def read_records(path: Path) -> list[Any]:
    """The items of a JSON list, the one object of a file, or one object per line."""
    text = read_text(path)
    if not text.strip():
        raise FactError(f"{path} is empty")
    try:
        content = json.loads(text)
    except RecursionError:
        raise FactError(f"{path} is nested too deeply to be a fact file") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _read_lines(path, text)
        raise FactError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    return content if isinstance(content, list) else [content]


def _read_lines(path: Path, text: str) -> list[Any]:
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise FactError(
                    f"{path} is not JSON lines: {error.msg} at line {number}, column {error.colno}"
                ) from error
    return records


def known_schema(path: Path, records: Sequence[Any]) -> str:
    schema = detect_schema(records)
    if schema is None:
        raise FactError(f"{path} is JSON, but holds no facts: {_found(records)}. Supported are {supported()}")
    return schema


def _found(records: Sequence[Any]) -> str:
    if not records:
        return "it is an empty list"
    if isinstance(records[0], Mapping):
        keys = ", ".join(map(repr, list(records[0])[:8])) or "no keys"
        return f"its first record has the keys {keys}" if records[0] else "its first record is an empty object"
    return f"its first item is {_kind(records[0])}"


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def supported() -> str:
    return "; ".join(description for _, description in SCHEMAS.values())
