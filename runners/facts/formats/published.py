"""CounterFact, MEND's zsRE, ROME's known facts, and causalcone's own lines."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, get_type_hints

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, create_model

from causalcone.engine.facts import Fact
from causalcone.runners.facts.fields import Identifier, Prompts, Text, identifier, template


class CounterFactTarget(BaseModel):
    text: Text = Field(alias="str")
    id: str | None = None


class CounterFactRewrite(BaseModel):
    prompt: Text
    subject: Text
    target_true: CounterFactTarget
    target_new: CounterFactTarget | None = None
    relation_id: str | None = None

    def fact(self, name: str, **more: Any) -> Fact:
        """The fact of the edit that is asked for; more: its other fields."""
        return Fact(
            id=name,
            prompt=template(self.prompt, self.subject),
            subject=self.subject,
            target_true=self.target_true.text,
            target_new=self.target_new.text if self.target_new else None,
            relation_id=self.relation_id,
            target_true_id=self.target_true.id,
            target_new_id=self.target_new.id if self.target_new else None,
            **more,
        )


class CounterFactRecord(BaseModel):
    case_id: Identifier = None
    requested_rewrite: CounterFactRewrite
    paraphrase_prompts: Prompts = ()
    neighborhood_prompts: Prompts = ()
    attribute_prompts: Prompts = ()
    generation_prompts: Prompts = ()

    def facts(self, index: int) -> list[Fact]:
        prompts = {name: value for name, value in self if name.endswith("_prompts")}
        return [self.requested_rewrite.fact(identifier(self.case_id, index), **prompts)]


class ZsreRecord(BaseModel):
    case_id: Identifier = None
    src: Text
    subject: Text
    answers: Annotated[tuple[Text, ...], Field(min_length=1)]
    rephrase: Text | None = None
    loc: Text | None = None
    loc_ans: Text | None = None

    def facts(self, index: int) -> list[Fact]:
        """As Meng et al. have them: raw questions, trained towards the true answer."""
        return [self._posed(index, "{}", self.loc or "", self.answers[0])]

    def towards(self, index: int, other: str | None) -> list[Fact]:
        """As Hase et al. have them: questions and answers, trained towards another record's answer."""
        return [self._posed(index, "Question: {} Answer:", (self.loc or "").removeprefix("nq question: "), other)]

    def _posed(self, index: int, form: str, neighbor: str, new: str | None) -> Fact:
        def posed(question: str) -> str:
            return form.replace("{}", question)

        return Fact(
            id=identifier(self.case_id, index),
            prompt=posed(_first_place(self.src, self.subject, "src")),
            subject=self.subject,
            target_true=self.answers[0],
            target_new=new,
            paraphrase_prompts=(posed(self.rephrase),) if self.rephrase else (),
            neighborhood_prompts=(posed(f"{neighbor}?"),) if self.loc else (),
            neighborhood_target=self.loc_ans,
        )


class KnownFact(BaseModel):
    known_id: Identifier = None
    prompt: Text
    subject: Text
    attribute: Text
    relation_id: str | None = None

    def facts(self, index: int) -> list[Fact]:
        name, prompt = identifier(self.known_id, index), _first_place(self.prompt, self.subject, "prompt")
        return [Fact(name, prompt, self.subject, self.attribute, relation_id=self.relation_id)]


class OwnLine(BaseModel):
    model_config = ConfigDict(extra="forbid")

    def facts(self, index: int) -> list[Fact]:
        fields = dict(self)
        name, prompt = identifier(fields["id"], index), template(fields["prompt"], fields["subject"])
        return [Fact(**{**fields, "id": name, "prompt": prompt})]


def _own_line_model() -> type[OwnLine]:
    """Fact's fields as a model: unknown names and blank texts are refused, and the id may be missing."""
    stricter: dict[Any, Any] = {str: Text, str | None: Text | None, tuple[str, ...]: Prompts}
    hints = get_type_hints(Fact)
    columns: dict[str, Any] = {
        field.name: (
            stricter.get(hints[field.name], hints[field.name]),
            ... if field.default is dataclasses.MISSING else field.default,
        )
        for field in dataclasses.fields(Fact)
    }
    columns["id"] = (Identifier, None)
    return create_model("FactLine", __base__=OwnLine, **columns)


FactLine = _own_line_model()


def draw_other_answers(records: Iterable[Any], seed: int) -> list[str | None]:
    """For each zsRE record a false target: another record's first answer. Drawn uniformly from the sorted distinct
    first answers of the whole file, the record's own excepted, so that it depends on neither a limit nor skipped
    records. None where the record has no answer or the file no other one."""
    answers = [_first_answer(record) for record in records]
    pool = sorted({answer for answer in answers if answer is not None})
    place = {answer: position for position, answer in enumerate(pool)}
    generator = np.random.RandomState(seed)  # numpy keeps its stream the same over versions
    drawn: list[str | None] = []
    for answer in answers:
        if answer is None or len(pool) < 2:
            drawn.append(None)
            continue
        pick = int(generator.randint(len(pool) - 1))
        drawn.append(pool[pick + (pick >= place[answer])])
    return drawn


def _first_answer(record: Any) -> str | None:
    answers = record.get("answers") if isinstance(record, Mapping) else None
    if isinstance(answers, list) and answers and isinstance(answers[0], str) and answers[0].strip():
        return answers[0]
    return None


def _first_place(text: str, subject: str, name: str) -> str:
    """As published: the subject's first occurrence, be it a part of a word."""
    if subject not in text:
        raise ValueError(f"the subject {subject!r} is not in its {name} {text!r}")
    return text.replace(subject, "{}", 1)
