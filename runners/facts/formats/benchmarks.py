"""MQuAKE, whose cases have several edits, and RippleEdits, whose edits have tests under conditions."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, Field, create_model

from causalcone.engine.facts import Fact, FactProbe, ProbeCondition
from causalcone.runners.facts.fields import Identifier, Lines, Prompts, Text, identifier, template
from causalcone.runners.facts.formats.published import CounterFactRewrite


class MquakeRewrite(CounterFactRewrite):
    question: Text | None = None


class Hop(BaseModel):
    question: Text
    answer: Text
    answer_alias: Prompts = ()


class MquakeRecord(BaseModel):
    case_id: Identifier = None
    requested_rewrite: Annotated[tuple[MquakeRewrite, ...], Field(min_length=1)]
    questions: Annotated[Prompts, Field(min_length=1)]
    new_answer: Text
    new_answer_alias: Prompts = ()
    new_single_hops: tuple[Hop, ...] = ()

    def facts(self, index: int) -> list[Fact]:
        """A fact for each edit. The questions follow from all of them, and stand with the last."""
        answers = (self.new_answer, *self.new_answer_alias)
        probes = [FactProbe("portability/questions", question, answers) for question in self.questions]
        probes += [
            FactProbe("portability/single_hops", hop.question, (hop.answer, *hop.answer_alias))
            for hop in self.new_single_hops
        ]
        name, last = identifier(self.case_id, index), len(self.requested_rewrite) - 1
        return [
            rewrite.fact(
                f"{name}/{number}",
                paraphrase_prompts=(rewrite.question,) if rewrite.question else (),
                probes=tuple(probes) if number == last else (),
            )
            for number, rewrite in enumerate(self.requested_rewrite)
        ]


RIPPLES = {
    "Logical_Generalization": "portability/Logical_Generalization",
    "Compositionality_I": "portability/Compositionality_I",
    "Compositionality_II": "portability/Compositionality_II",
    "Subject_Aliasing": "portability/Subject_Aliasing",
    "Relation_Specificity": "locality/Relation_Specificity",
    "Relation_Specifity": "locality/Relation_Specificity",  # as the repository's own page spells it
    "Forgetfulness": "locality/Forgetfulness",
}


class RippleAnswer(BaseModel):
    value: Text
    aliases: Lines = ()


class RippleQuery(BaseModel):
    prompt: Text
    answers: Annotated[tuple[RippleAnswer, ...], Field(min_length=1)]
    relation: str | None = None
    target_ids: Any = None
    second_hop_target_ids: Any = None

    @property
    def accepted(self) -> tuple[str, ...]:
        return tuple(text for answer in self.answers for text in (answer.value, *answer.aliases))

    @property
    def named(self) -> Iterator[tuple[Any, RippleAnswer]]:
        """Identifiers with the answers that name them."""
        ids = self.second_hop_target_ids or self.target_ids
        return zip(ids if isinstance(ids, list) else [ids], self.answers, strict=False)


class RippleTest(BaseModel):
    test_queries: Annotated[tuple[RippleQuery, ...], Field(min_length=1)]
    test_condition: Literal["OR", "AND"] = "OR"
    condition_queries: tuple[RippleQuery, ...] = ()


class RippleEdit(BaseModel):
    """A sentence with its target; subject and target: their words, where a file was given them."""

    prompt: Text
    subject_id: str | None = None
    target_id: str | None = None
    relation: str | None = None
    subject: Text | None = None
    target: Text | None = None
    before: "RippleEdit | None" = Field(None, validation_alias=AliasChoices("original_fact", "previous_fact"))

    @property
    def sentence(self) -> str:
        return self.prompt.strip().removesuffix(".")


class _RippleRecord(BaseModel):
    edit: RippleEdit

    def facts(self, index: int) -> list[Fact]:
        """The edit's sentence is cut before its target; its subject, and where need be its target, are named by
        answers."""
        edit = self.edit
        tests = [(group, test) for name, group in RIPPLES.items() for test in getattr(self, name)]
        queries = [query for _, test in tests for query in (*test.test_queries, *test.condition_queries)]
        names = {key: answer for query in queries for key, answer in query.named if isinstance(key, str)}
        named, target = names.get(edit.subject_id or ""), names.get(edit.target_id or "")
        subject = edit.subject or (named.value if named else None)
        if subject is None:
            raise ValueError(
                f"edit.subject is missing: the subject is there only as the identifier {edit.subject_id!r}, which no "
                "answer of the record names; add its name as edit.subject"
            )
        beginning, new = _cut(edit, subject, edit.target or (target.value if target else None))
        true = edit.before.sentence.removeprefix(beginning).strip() if edit.before else ""
        return [
            Fact(
                id=str(index),
                prompt=template(beginning.rstrip(), subject, "edit.prompt"),
                subject=subject,
                target_true=true or new,
                target_new=new,
                relation_id=edit.relation,
                target_true_id=edit.before.target_id if edit.before else None,
                target_new_id=edit.target_id,
                target_new_aliases=target.aliases if target else (),
                probes=tuple(probe for group, test in tests for probe in _probes(group, test)),
            )
        ]


_LISTS: dict[str, Any] = dict.fromkeys(RIPPLES, (tuple[RippleTest, ...], ()))
RippleRecord = create_model("RippleRecord", __base__=_RippleRecord, **_LISTS)


def _cut(edit: RippleEdit, subject: str, target: str | None) -> tuple[str, str]:
    """What the edit's sentence says before its target, and the target: named, or all after the words that it shares
    with the sentence of what was true; capitalised words after the subject are the target's, as in "United States" and
    "United Kingdom"."""
    if target is not None and edit.sentence.endswith(f" {target}"):
        return edit.sentence.removesuffix(target), target
    before = edit.before.sentence.split(" ") if edit.before else ()
    words = edit.sentence.split(" ")
    shared = next((number for number, (new, old) in enumerate(zip(words, before, strict=False)) if new != old), 0)
    while shared and words[shared - 1][:1].isupper() and subject in " ".join(words[: shared - 1]):
        shared -= 1
    if shared:
        return " ".join(words[:shared]), " ".join(words[shared:])
    raise ValueError(
        f"edit.target is missing: where the target begins in {edit.prompt!r} is told neither by an answer that names "
        f"{edit.target_id!r} nor by another sentence in edit.original_fact; add the target's words as edit.target"
    )


def _probes(group: str, test: RippleTest) -> Iterator[FactProbe]:
    """The queries of a test, under all its conditions, as published; of several, the name says if all must hold."""
    conditions = tuple(ProbeCondition(query.prompt, query.accepted) for query in test.condition_queries)
    several = f"{test.test_condition} of {len(test.test_queries)}" if len(test.test_queries) > 1 else None
    for query in test.test_queries:
        yield FactProbe(group, query.prompt, query.accepted, several or query.relation or "", conditions, every=True)
