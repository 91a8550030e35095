"""Facts from files and data sets, checked and written as causalcone's JSON lines."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import ascii_letters, digits

from causalcone.engine.atomic import replacing
from causalcone.engine.encoding import PromptEncoder
from causalcone.engine.errors import ExperimentError, FactError, ModelError
from causalcone.engine.facts import Fact
from causalcone.engine.models import family_of
from causalcone.engine.run.loading import opening
from causalcone.runners.checked_files import STANDARD_INPUT
from causalcone.runners.facts.data_sets import DataSet
from causalcone.runners.facts.files import Check, Records, as_records, open_file, save_facts
from causalcone.runners.facts.schemas import Reading, Schema
from causalcone.runners.results.folder import ResultError


def open_records(
    source: str, how: Reading, split: str | None = None, config: str | None = None, title: str | None = None
) -> Records:
    """The records of a file, which messages call ``title``, or of a data set (a folder of one, or a hub id), which
    ``split`` ("train" by default) and ``config`` are of. Raises ``FactError`` where there is nothing to read, or
    nothing of a known format."""
    if source != STANDARD_INPUT and (os.path.isdir(source) or not os.path.exists(source)):
        return _of_data_set(source, how, split or "train", config)
    name = title or source
    if split is not None or config is not None:
        raise ExperimentError(f"--split and --dataset-config are for data sets, and {name} is a file; leave them out")
    return open_file(Path(source), name, how)


def _of_data_set(name: str, how: Reading, split: str, config: str | None) -> Records:
    _refuse_missing_file(name)
    data_set = DataSet.open(name, config, split)
    rows = iter(data_set)
    first = next(rows, None)
    if first is None:
        raise FactError(f"the split {split!r} of the data set {name!r} is empty; choose another with --split")
    return as_records(str(data_set), [first], rows, True, how)


_HUB_CHARACTERS = frozenset(f"{ascii_letters}{digits}._-/")
_FILE_ENDINGS = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt")


def _refuse_missing_file(name: str) -> None:
    """Tell a mistyped path from a hub id, so that nobody waits for the network to say so."""
    is_id = _HUB_CHARACTERS.issuperset(name) and not name.startswith((".", "/")) and name.count("/") <= 1
    if not os.path.isdir(name) and (not is_id or not name or name.endswith(_FILE_ENDINGS)):
        raise FactError(f"there is no {name!r}; give a file of facts, a folder of a data set, or a hub id")


def encoding_check(model: str) -> Check:
    """A check that a fact can be encoded for a model, of which only tokenizer and configuration are read. Raises
    ``ModelError`` where they cannot be, or the engine could not use them."""
    from transformers import AutoConfig, AutoTokenizer

    with opening(model, "tokenizer and configuration") as place:
        config = AutoConfig.from_pretrained(place)
        tokenizer = AutoTokenizer.from_pretrained(place)
    family_of(config.model_type)
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {model!r} gives no character offsets; save its fast form there")
    return PromptEncoder(tokenizer, config.vocab_size, config.max_position_embeddings).fact


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


def summary(recognised: Schema, facts: Sequence[Fact]) -> list[str]:
    """Lines that say what format the facts are of, why it is taken for that, and what they hold."""
    having = [f"{name} {sum(bool(getattr(fact, name)) for fact in facts):,}" for name in _OPTIONAL]
    relations = {fact.relation_id for fact in facts} - {None}
    again = len(facts) - len({(fact.prompt, fact.subject) for fact in facts})
    probes = Counter(probe.group for fact in facts for probe in fact.probes)
    aliases = {
        name: sum(len(getattr(fact, f"{name}_aliases")) for fact in facts) for name in ("target_true", "target_new")
    }
    return [
        *recognised.lines(),
        f"facts: {len(facts):,}",
        f"of them with {', '.join(having)}",
        *([f"probes: {_counted(probes)}"] if probes else []),
        *([f"aliases: {_counted(aliases)}"] if any(aliases.values()) else []),
        f"distinct relations: {len(relations):,}",
        f"duplicates of (prompt, subject): {again:,}",
    ]


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
