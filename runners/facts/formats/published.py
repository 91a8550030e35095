"""CounterFact, MEND's zsRE, ROME's known facts, and causalcone's own lines."""

import dataclasses
from collections.abc import Mapping, Sequence
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


class ZsreRecord(BaseModel):
    case_id: Identifier = None
    src: Text
    subject: Text
    answers: Annotated[tuple[Text, ...], Field(min_length=1)]
    rephrase: Text | None = None
    loc: Text | None = None
    loc_ans: Text | None = None


class KnownFact(BaseModel):
    known_id: Identifier = None
    prompt: Text
    subject: Text
    attribute: Text
    relation_id: str | None = None


def _own_line_model() -> type[BaseModel]:
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
    return create_model("FactLine", __config__=ConfigDict(extra="forbid"), **columns)


FactLine = _own_line_model()


def from_counterfact(case: CounterFactRecord, index: int) -> list[Fact]:
    names = ("paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts")
    prompts = {name: getattr(case, name) for name in names}
    return [case.requested_rewrite.fact(identifier(case.case_id, index), **prompts)]


def from_known_fact(known: KnownFact, index: int) -> list[Fact]:
    prompt = _first_place(known.prompt, known.subject, "prompt")
    name = identifier(known.known_id, index)
    return [Fact(name, prompt, known.subject, known.attribute, relation_id=known.relation_id)]


def from_own_line(line: BaseModel, index: int) -> list[Fact]:
    fields = dict(line)
    prompt = template(fields["prompt"], fields["subject"])
    return [Fact(**{**fields, "id": identifier(fields["id"], index), "prompt": prompt})]


def from_zsre_as_meng(item: ZsreRecord, index: int) -> list[Fact]:
    """Raw questions, trained towards the true answer."""
    return [_zsre(item, index, "{}", item.loc or "", item.answers[0])]


def from_zsre_as_hase(item: ZsreRecord, index: int, other: str | None) -> list[Fact]:
    """Questions and answers, trained towards another record's answer."""
    neighbor = (item.loc or "").removeprefix("nq question: ")
    return [_zsre(item, index, "Question: {} Answer:", neighbor, other)]


def _zsre(item: ZsreRecord, index: int, form: str, neighbor: str, new: str | None) -> Fact:
    def posed(question: str) -> str:
        return form.replace("{}", question)

    return Fact(
        id=identifier(item.case_id, index),
        prompt=posed(_first_place(item.src, item.subject, "src")),
        subject=item.subject,
        target_true=item.answers[0],
        target_new=new,
        paraphrase_prompts=(posed(item.rephrase),) if item.rephrase else (),
        neighborhood_prompts=(posed(f"{neighbor}?"),) if item.loc else (),
        neighborhood_target=item.loc_ans,
    )


def draw_other_answers(records: Sequence[Any], seed: int) -> list[str | None]:
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
