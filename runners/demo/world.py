"""A synthetic world of facts in the CounterFact schema, for tests, the demo and load tests.

Subjects are people and things whose names share their parts, so that a name is known only by all of its parts. Each
subject has one object per relation of its kind, each object is shared by many subjects, and each relation can be said
in several ways. For a quarter of the facts one way is held out of the training sentences.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from causalcone.engine.facts import Fact
from causalcone.runners.demo.words import FILLERS, RELATIONS, WORDS, Relation, name_parts

NEIGHBORS = 10
HELD_OUT_SHARE = 0.25
TITLES = {"facts": "the demo world", "texts": "the demo world's sentences"}
"""The names of its facts and of its training sentences in messages and results."""


@dataclass(frozen=True)
class Subject:
    name: str
    kind: str  # of relations: "person" or "thing"
    noun: str  # what "... is a" continues with


@dataclass(frozen=True)
class Sentence:
    """A training sentence: a phrasing of a fact, completed. The ranges are half-open, in characters of ``text``."""

    text: str
    fact: int
    phrasing: str
    subject: tuple[int, int]
    target: tuple[int, int]


@dataclass(frozen=True)
class World:
    """Facts about ``subjects``: fact i is about subject ``owners[i]``. ``held_out`` maps a fact's index to the one
    phrasing, if any, that no training sentence has."""

    seed: int
    subjects: tuple[Subject, ...]
    facts: list[Fact]
    owners: list[int]
    held_out: dict[int, str]

    @classmethod
    def generate(cls, subjects: int = 240, seed: int = 0) -> World:
        """The world of this many people and things, the same for the same seed."""
        rng = Random(seed)
        people = max(1, round(subjects * 0.625))
        inhabitants = (*_people(people, rng), *_things(subjects - people, rng))
        members = [[k for k, subject in enumerate(inhabitants) if subject.kind == r.kind] for r in RELATIONS]
        total = sum(map(len, members))
        indices = iter(rng.sample(range(total), total))  # mixed, so that the first few facts are of all relations
        facts_and_phrasings = [
            fact
            for relation, known in zip(RELATIONS, members, strict=True)
            for fact in _relation_facts(relation, inhabitants, known, indices, rng)
        ]
        facts_and_phrasings.sort(key=lambda entry: int(entry[0].id))
        facts, owners, unseen = map(list, zip(*facts_and_phrasings, strict=True))
        return cls(seed, inhabitants, facts, owners, {k: p for k, p in enumerate(unseen) if p is not None})

    def sentences(self) -> Iterator[Sentence]:
        """Every phrasing of every fact but the held-out ones, with its answer."""
        relations = {relation.id: relation for relation in RELATIONS}
        for index, fact in enumerate(self.facts):
            relation = relations[str(fact.relation_id)]
            essence = relation.essence.replace("KIND", self.subjects[self.owners[index]].noun)
            for phrasing in (*relation.phrasings, essence):
                if phrasing != self.held_out.get(index):
                    yield _sentence(index, fact, phrasing)

    def held_out_facts(self) -> list[Fact]:
        """The facts with a held-out phrasing, asked in that phrasing."""
        return [
            Fact(f"{self.facts[index].id}-held-out", phrasing, self.facts[index].subject, self.facts[index].target_true)
            for index, phrasing in self.held_out.items()
        ]

    def records(self) -> Iterator[dict[str, Any]]:
        for index, fact in enumerate(self.facts):
            yield {
                "case_id": index,
                "pararel_idx": index,
                "requested_rewrite": {
                    "prompt": fact.prompt,
                    "relation_id": fact.relation_id,
                    "target_new": {"str": fact.target_new, "id": fact.target_new_id},
                    "target_true": {"str": fact.target_true, "id": fact.target_true_id},
                    "subject": fact.subject,
                },
                "paraphrase_prompts": list(fact.paraphrase_prompts),
                "neighborhood_prompts": list(fact.neighborhood_prompts),
                "attribute_prompts": list(fact.attribute_prompts),
                "generation_prompts": list(fact.generation_prompts),
            }

    def counterfact(self) -> str:
        """The records as one JSON list, a record a line."""
        lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in self.records())
        return f"[\n{lines}\n]\n"

    def write(self, path: str | Path) -> None:
        Path(path).write_text(self.counterfact(), encoding="utf-8")

    def snippets(self, samples: int = 5) -> list[dict[str, Any]]:
        """Reference texts about subjects that share an object: attribute snippets, one entry per (relation, object)."""
        texts: dict[int, list[str]] = {}
        for fact, owner in zip(self.facts, self.owners, strict=True):
            texts.setdefault(owner, []).append(f"{fact.text} {fact.target_true}.")
        holders: dict[tuple[str, str], list[int]] = {}
        for fact, owner in zip(self.facts, self.owners, strict=True):
            holders.setdefault((str(fact.relation_id), str(fact.target_true_id)), []).append(owner)
        return [
            {
                "relation_id": relation_id,
                "target_id": target_id,
                "samples": [{"name": self.subjects[k].name, "text": " ".join(texts[k])} for k in owners[:samples]],
            }
            for (relation_id, target_id), owners in holders.items()
        ]


def _people(count: int, rng: Random) -> list[Subject]:
    """Names of one part, two parts, and the two with a middle name or a particle between them."""
    single = name_parts("single_names", round(0.08 * count))
    size = math.ceil(math.sqrt(count))
    firsts, lasts = name_parts("first_names", size), name_parts("last_names", size)
    two = [f"{first} {last}" for first, last in product(firsts, lasts)]
    middles = WORDS["middle_names"][:4]
    three = [f"{first} {middle} {last}" for first, last in product(firsts, lasts) for middle in middles]
    four = [f"{first} van der {last}" for first, last in product(firsts, lasts)]
    names = [*single, *rng.sample(three, round(0.25 * count)), *rng.sample(four, round(0.12 * count))]
    names += rng.sample(two, count - len(names))
    rng.shuffle(names)
    return [Subject(name, "person", "person") for name in names]


def _things(count: int, rng: Random) -> list[Subject]:
    """Buildings: a name and a kind, some with their age and side of town before it."""
    size = max(len(WORDS["place_names"]) // 2, math.ceil(count / len(WORDS["place_kinds"])))
    two = [f"{name} {kind}" for name, kind in product(name_parts("place_names", size), WORDS["place_kinds"])]
    three = [f"{age} {name}" for age, name in product(WORDS["place_ages"], two)]
    four = [f"{age} {side} {name}" for age, side, name in product(WORDS["place_ages"], WORDS["place_sides"], two)]
    names = [*rng.sample(three, round(0.3 * count)), *rng.sample(four, round(0.15 * count))]
    names += rng.sample(two, count - len(names))
    rng.shuffle(names)
    return [Subject(name, "thing", name.split()[-1].lower()) for name in names]


def _relation_facts(
    relation: Relation, subjects: Sequence[Subject], members: Sequence[int], indices: Iterator[int], rng: Random
) -> Iterator[tuple[Fact, int, str | None]]:
    """The facts of one relation, each with its subject's index and its held-out phrasing, if any."""
    targets = [k % len(relation.objects) for k in range(len(members))]
    rng.shuffle(targets)
    holders: list[list[int]] = [[] for _ in relation.objects]
    for member, target in zip(members, targets, strict=True):
        holders[target].append(member)
    # One string per (phrasing, subject), shared by all the facts that quote it.
    prompts = [{k: phrasing.replace("{}", subjects[k].name) for k in members} for phrasing in relation.phrasings]

    def about_others(owner: int, target: int) -> tuple[str, ...]:
        drawn = rng.sample(holders[target], min(NEIGHBORS + 1, len(holders[target])))
        others = [k for k in drawn if k != owner][:NEIGHBORS]
        return tuple(asked[k] for asked, k in zip(rng.choices(prompts, k=len(others)), others, strict=True))

    for owner, true, index in zip(members, targets, indices, strict=False):
        order = rng.sample(range(len(relation.phrasings)), len(relation.phrasings))
        new = (true + rng.randrange(1, len(relation.objects))) % len(relation.objects)
        name = subjects[owner].name
        fact = Fact(
            id=str(index),
            prompt=relation.phrasings[order[0]],
            subject=name,
            target_true=relation.objects[true],
            target_new=relation.objects[new],
            paraphrase_prompts=(prompts[order[1]][owner], f"{rng.choice(FILLERS)} {prompts[order[2]][owner]}"),
            neighborhood_prompts=about_others(owner, true),
            attribute_prompts=about_others(owner, new),
            generation_prompts=(
                *(prompts[order[k % len(order)]][owner] for k in range(3, 11)),
                f"{name} is",
                f"{name} is a",
            ),
            relation_id=relation.id,
            target_true_id=_object_id(relation, true),
            target_new_id=_object_id(relation, new),
        )
        # The held-out phrasing is the first paraphrase, so that scores on it show generalisation.
        unseen = relation.phrasings[order[1]] if rng.random() < HELD_OUT_SHARE else None
        yield fact, owner, unseen


def _object_id(relation: Relation, target: int) -> str:
    return f"Q{relation.id[1:]}{target:02d}"


def _sentence(index: int, fact: Fact, phrasing: str) -> Sentence:
    start = phrasing.index("{}")
    prompt = phrasing.replace("{}", fact.subject)
    return Sentence(
        text=f"{prompt} {fact.target_true}.",
        fact=index,
        phrasing=phrasing,
        subject=(start, start + len(fact.subject)),
        target=(len(prompt), len(prompt) + 1 + len(fact.target_true)),
    )
