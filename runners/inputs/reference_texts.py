"""Reading the texts that the reference score compares with: CounterFact's attribute snippets."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, StrictStr, ValidationError

from causalcone.engine.errors import FactError
from causalcone.engine.facts import Fact
from causalcone.runners.checked_files import parse_json, read_text


@dataclass(frozen=True)
class ReferenceTexts:
    """Texts about things that share an attribute, by relation and target (Wikidata's identifiers, as in ``Fact``)."""

    texts: Mapping[tuple[str, str], tuple[str, ...]]

    @property
    def corpus(self) -> list[str]:
        """All texts, to weigh words by."""
        return [text for texts in self.texts.values() for text in texts]

    def of(self, fact: Fact) -> tuple[str, ...]:
        """The texts about things of which ``target_new`` is true. Raises ``FactError`` where there are none."""
        if fact.relation_id is None or fact.target_new_id is None:
            missing = "relation_id" if fact.relation_id is None else "target_new_id"
            raise FactError(f"fact {fact.id!r} has no {missing}, which its reference texts are looked up by")
        try:
            return self.texts[fact.relation_id, fact.target_new_id]
        except KeyError:
            raise FactError(
                f"fact {fact.id!r}: there are no reference texts of relation {fact.relation_id} and target "
                f"{fact.target_new_id}; leave the fact out of the reference score"
            ) from None


class _Sample(BaseModel):
    text: StrictStr


class _ReferenceRecord(BaseModel):
    relation_id: StrictStr
    target_id: StrictStr
    samples: list[_Sample]


def load_reference_texts(path: str | os.PathLike[str]) -> ReferenceTexts:
    """The texts of an attribute snippets file: a JSON list of ``relation_id``, ``target_id`` and ``samples``, each of
    which has a ``text``. Entries of the same relation and target are put together. Raises ``FactError`` naming the file
    and the entry at fault."""
    path = Path(path)
    content = parse_json(read_text(path), path)
    if not isinstance(content, list):
        raise FactError(f"{path} is not a list of attribute snippets (relation_id, target_id, samples)")
    return as_reference_texts(content, str(path))


def as_reference_texts(entries: Sequence[Any], source: str) -> ReferenceTexts:
    """The texts of attribute snippets that are in memory; ``source`` names them in messages."""
    texts: dict[tuple[str, str], tuple[str, ...]] = {}
    for index, value in enumerate(entries):
        try:
            entry = _ReferenceRecord.model_validate(value)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            place = ".".join(map(str, problem["loc"])) or "it"
            raise FactError(f"{source}: entry {index}: {place}: {problem['msg']}") from error
        key = (entry.relation_id, entry.target_id)
        texts[key] = texts.get(key, ()) + tuple(sample.text for sample in entry.samples)
    return ReferenceTexts({key: samples for key, samples in texts.items() if samples})
