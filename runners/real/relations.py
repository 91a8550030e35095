"""Real facts of common knowledge, written for this project: by relation its wordings, and subjects with their answers.

``facts/RELATION.jsonl`` has the relation in its first line and a subject in each of the others. In half of a relation's
facts the subject stands first in the prompt. What goes with a fact is made of the others of its relation: a false
target, neighbours (subjects with the same answer; where there are none, probes of others with answers of their own)
and subjects that have the false target.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path
from random import Random

from causalcone.engine.atomic import write_text
from causalcone.engine.cache import cache_folder
from causalcone.engine.facts import Fact, FactProbe

TITLE = "causalcone's real facts"
NEIGHBORS = 5
WORDINGS = 2
"""Paraphrases of a fact, of those that a relation has."""


@dataclass(frozen=True)
class Known:
    """A subject with its answer, and other words for that."""

    subject: str
    answer: str
    aliases: Sequence[str] = ()

    def fill(self, text: str) -> str:
        return text.replace("{}", self.subject)

    def probe(self, prompt: str) -> FactProbe:
        return FactProbe("locality/relation", self.fill(prompt), (self.answer, *self.aliases))


@dataclass(frozen=True)
class RealRelation:
    """Wordings with a place for the subject, and who is known. prompts: one with the subject inside, one that begins
    with it."""

    relation: str
    prompts: Sequence[str]
    paraphrases: Sequence[str]
    generation_prompts: Sequence[str]
    known: Sequence[Known]

    @classmethod
    def read(cls, text: str) -> RealRelation:
        first, *others = map(json.loads, text.splitlines())
        return cls(**first, known=[Known(**other) for other in others])

    def facts(self) -> Iterator[Fact]:
        """Its facts, the same whenever they are asked for."""
        rng = Random(self.relation)
        for number, own in enumerate(self.known):
            prompt = self.prompts[number % len(self.prompts)]
            turned = [self.paraphrases[(number + more) % len(self.paraphrases)] for more in range(WORDINGS)]
            others = [each for each in self.known if each.answer != own.answer]
            false = rng.choice(others).answer
            alike = [each for each in self.known if each.answer == own.answer and each is not own]
            near = rng.sample(alike or others, min(NEIGHBORS, len(alike or others)))
            probes = () if alike else (each.probe(prompt) for each in near)
            yield Fact(
                f"{self.relation}/{own.subject}",
                prompt,
                own.subject,
                own.answer,
                false,
                paraphrase_prompts=tuple(map(own.fill, turned)),
                neighborhood_prompts=tuple(each.fill(prompt) for each in near if alike),
                attribute_prompts=tuple(each.fill(prompt) for each in others if each.answer == false)[:NEIGHBORS],
                generation_prompts=tuple(map(own.fill, self.generation_prompts)),
                relation_id=self.relation,
                target_true_aliases=tuple(own.aliases),
                probes=tuple(probes),
            )


def relations() -> list[RealRelation]:
    folder = files("causalcone.runners").joinpath("real/facts")
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith(".jsonl"))
    return [RealRelation.read(folder.joinpath(name).read_text(encoding="utf-8")) for name in names]


def real_facts() -> list[Fact]:
    """All facts, those of each relation in turn. Of every eight, five have the subject first: models know fewer of
    these, and half of what SmolLM2 knows among them has it inside."""
    turns = zip_longest(*(relation.facts() for relation in relations()))
    facts = [fact for fact in chain.from_iterable(turns) if fact is not None]
    first = [fact for fact in facts if fact.prompt.startswith("{}")]
    inside = [fact for fact in facts if not fact.prompt.startswith("{}")]
    mixed = [(number / 5, fact) for number, fact in enumerate(first)] + [(n / 3, fact) for n, fact in enumerate(inside)]
    return [fact for _, fact in sorted(mixed, key=lambda each: each[0])]


def facts_file() -> Path:
    """All facts as causalcone's own lines, in the cache folder; the name has a hash of the content."""
    lines = "".join(f"{json.dumps(fact.record, ensure_ascii=False)}\n" for fact in real_facts())
    path = cache_folder() / f"real-facts-{hashlib.sha256(lines.encode()).hexdigest()[:12]}.jsonl"
    if not path.exists():
        write_text(path, lines)
    return path
