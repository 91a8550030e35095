"""Facts from files and data sets, checked and written as causalcone's JSON lines."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from string import ascii_letters, digits
from typing import Any, get_args

from pydantic import BaseModel

from causalcone.engine.atomic import replacing
from causalcone.engine.encoding import PromptEncoder
from causalcone.engine.errors import ExperimentError, FactError, ModelError
from causalcone.engine.facts import Fact
from causalcone.engine.models import family_of
from causalcone.runners.checked_files import STANDARD_INPUT
from causalcone.runners.facts.data_sets import DataSet
from causalcone.runners.facts.files import good_facts, known_schema, read_records, save_facts, supported
from causalcone.runners.facts.schemas import (
    SCHEMAS,
    Convert,
    CounterFactRecord,
    FactLine,
    KnownFact,
    Record,
    ZsreForm,
    ZsreRecord,
    converter,
)
from causalcone.runners.results.folder import ResultError

Check = Callable[[Fact], object]


@dataclass(frozen=True)
class Records:
    """Records of one schema, read while they are taken; place: what they are of, in words."""

    place: str
    schema: str
    records: Iterable[Any]
    convert: Convert

    def facts(self, limit: int | None, check: Check | None = None) -> tuple[list[Fact], list[str]]:
        """The first ``limit`` facts that ``check`` raises no error of, and what is wrong with records before those."""

        def checked(index: int, record: Record) -> Fact:
            fact = self.convert(index, record)
            if check is not None:
                check(fact)
            return fact

        return good_facts(self.place, self.records, checked, limit)


def open_records(
    source: str,
    split: str | None = None,
    config: str | None = None,
    seed: int = 0,
    zsre_form: str = "hase",
    title: str | None = None,
) -> Records:
    """The records of a file, which messages call ``title``, or of a data set (a folder of one, or a hub id). ``split``
    ("train" by default) and ``config`` are a data set's, ``seed`` and ``zsre_form`` those of ``load_facts``. Raises
    ``FactError`` where there is nothing to read, or nothing of a known schema."""
    if zsre_form not in get_args(ZsreForm):
        raise FactError(f"the zsRE form is {zsre_form!r}; choose from {', '.join(get_args(ZsreForm))}")
    form: ZsreForm = "hase" if zsre_form == "hase" else "meng"
    if source != STANDARD_INPUT and (os.path.isdir(source) or not os.path.exists(source)):
        return _of_data_set(source, split or "train", config, seed, form)
    name = title or source
    if split is not None or config is not None:
        raise ExperimentError(f"--split and --dataset-config are for data sets, and {name} is a file; leave them out")
    records = read_records(Path(source))
    schema = known_schema(Path(source), records)
    return Records(name, schema, records, converter(schema, records, seed, form))


def _of_data_set(name: str, split: str, config: str | None, seed: int, zsre_form: ZsreForm) -> Records:
    _refuse_missing_file(name)
    data_set = DataSet.open(name, config, split)
    rows = iter(data_set)
    first = next(rows, None)
    if first is None:
        raise FactError(f"the split {split!r} of the data set {name!r} is empty; choose another with --split")
    schema = next((schema for schema in SCHEMAS if _has_columns(first.keys(), _MODELS[schema])), None)
    if schema is None:
        raise FactError(
            f"the data set {name!r} holds no facts: its columns are {', '.join(first)}. Supported are {supported()}"
        )
    records: Iterable[Record] = map(_without_nulls, chain([first], rows))
    every: Sequence[Record] = ()
    if schema == "zsre" and zsre_form == "hase":  # false targets are drawn from all answers, whatever the limit
        records = every = list(records)
    return Records(str(data_set), schema, records, converter(schema, every, seed, zsre_form))


_HUB_CHARACTERS = frozenset(f"{ascii_letters}{digits}._-/")
_FILE_ENDINGS = (".json", ".jsonl", ".parquet", ".csv", ".txt")


def _refuse_missing_file(name: str) -> None:
    """Tell a mistyped path from a hub id, so that nobody waits for the network to say so."""
    is_id = _HUB_CHARACTERS.issuperset(name) and not name.startswith((".", "/")) and name.count("/") <= 1
    if not os.path.isdir(name) and (not is_id or not name or name.endswith(_FILE_ENDINGS)):
        raise FactError(f"there is no {name!r}; give a file of facts, a folder of a data set, or a hub id")


_MODELS: dict[str, type[BaseModel]] = {
    "counterfact": CounterFactRecord,
    "zsre": ZsreRecord,
    "known": KnownFact,
    "fact": FactLine,
}


def _has_columns(columns: Iterable[str], model: type[BaseModel]) -> bool:
    """Whether a table of these columns can be one of such records: a table's rows, unlike a file's, all have them."""
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    closed = model.model_config.get("extra") == "forbid"
    return required <= set(columns) and not (closed and set(columns) - model.model_fields.keys())


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a record: tables have nulls, and structs of nothing else, where a record has no such key."""
    filled = {key: _without_nulls(value) if isinstance(value, Mapping) else value for key, value in row.items()}
    return {key: value for key, value in filled.items() if value is not None and value != {}}


def encoding_check(model: str) -> Check:
    """A check that a fact can be encoded for a model, of which only tokenizer and configuration are read. Raises
    ``ModelError`` where they cannot be, or the engine could not use them."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(_model_place(model))
        tokenizer = AutoTokenizer.from_pretrained(_model_place(model))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"no tokenizer and configuration can be loaded from {model!r}: {error}") from error
    family_of(config.model_type)
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {model!r} gives no character offsets; save its fast form there")
    return PromptEncoder(tokenizer, config.vocab_size, config.max_position_embeddings).fact


def _model_place(model: str) -> str:
    if model.startswith((".", "/", "~")):
        model = str(Path(model).expanduser())
        if not Path(model).is_dir():
            raise ModelError(f"the model folder {model} does not exist; check the path")
    return model


def refuse_occupied_file(out: Path, overwrite: bool) -> None:
    """Raise ``ResultError`` for what must not be replaced: anything but a file, and a file unless ``overwrite``."""
    if out.exists() and not out.is_file():
        raise ResultError(f"{out} is not a file; name a file to write the facts to")
    if out.exists() and not overwrite:
        raise ResultError(f"{out} exists already; choose another file, or give --overwrite")


def write_facts(facts: Iterable[Fact], out: Path) -> None:
    """Write a fact file that is there whole or not at all; its folder is made where there is none."""
    try:
        with replacing(out) as partial:
            save_facts(facts, partial)
    except OSError as error:
        raise ResultError(f"cannot write {out}: {error.strerror}") from error


_OPTIONAL = ("target_new", "paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts")


def summary(schema: str, facts: Sequence[Fact]) -> list[str]:
    """Lines that say what schema the facts are of and what they hold."""
    having = [f"{name} {sum(bool(getattr(fact, name)) for fact in facts):,}" for name in _OPTIONAL]
    relations = {fact.relation_id for fact in facts} - {None}
    again = len(facts) - len({(fact.prompt, fact.subject) for fact in facts})
    return [
        f"schema: {SCHEMAS[schema][1]}",
        f"facts: {len(facts):,}",
        f"of them with {', '.join(having)}",
        f"distinct relations: {len(relations):,}",
        f"duplicates of (prompt, subject): {again:,}",
    ]
