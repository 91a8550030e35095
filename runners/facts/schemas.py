"""The published schemas of fact files, and how one record of each becomes a ``Fact`` (docs/data.md, "Sources")."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_type_hints

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictStr, create_model
from pydantic_core import PydanticCustomError

from causalcone.engine.facts import Fact

Record = Mapping[str, Any]
Convert = Callable[[int, Record], Fact]
ZsreForm = Literal["hase", "meng"]


def _usable_text(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("surrogate", "holds half of a surrogate pair, which is not a character") from None
    return text


def _identifier_text(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str | None):
        raise PydanticCustomError("identifier", "must be a whole number or a string")
    return str(value) if isinstance(value, int) else value


Text = Annotated[StrictStr, AfterValidator(_usable_text)]
Prompts = tuple[Text, ...]
Identifier = Annotated[Text | None, BeforeValidator(_identifier_text)]


class CounterFactTarget(BaseModel):
    text: Text = Field(alias="str")
    id: str | None = None


class CounterFactRewrite(BaseModel):
    prompt: Text
    subject: Text
    target_true: CounterFactTarget
    target_new: CounterFactTarget | None = None
    relation_id: str | None = None


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


# The keys by which a schema is known: no other schema's records have them. The project's comes last.
SCHEMAS: dict[str, tuple[frozenset[str], str]] = {
    "counterfact": (frozenset({"requested_rewrite"}), "CounterFact (requested_rewrite, case_id)"),
    "zsre": (frozenset({"src", "answers"}), "MEND's zsRE evaluation file (src, subject, answers, rephrase, loc)"),
    "known": (frozenset({"attribute", "known_id"}), "ROME's known facts (prompt, subject, attribute, known_id)"),
    "fact": (frozenset({"target_true"}), "causalcone's own lines (id, prompt, subject, target_true, ...)"),
}


def detect_schema(records: Sequence[Any]) -> str | None:
    """The schema of the first record that has one, so that one broken record does not hide what the file is."""
    for record in records:
        if isinstance(record, Mapping):
            for name, (marks, _) in SCHEMAS.items():
                if marks & record.keys():
                    return name
    return None


def converter(schema: str, records: Sequence[Any], seed: int, zsre_form: ZsreForm) -> Convert:
    if schema != "zsre":
        return {"counterfact": _from_counterfact, "known": _from_known_fact, "fact": _from_own_line}[schema]
    drawn = draw_other_answers(records, seed) if zsre_form == "hase" else ()
    return lambda index, record: _from_zsre(index, record, zsre_form, drawn)


def _from_counterfact(index: int, record: Record) -> Fact:
    case = CounterFactRecord.model_validate(record)
    rewrite = case.requested_rewrite
    return Fact(
        id=_identifier(case.case_id, index),
        prompt=rewrite.prompt,
        subject=rewrite.subject,
        target_true=rewrite.target_true.text,
        target_new=rewrite.target_new.text if rewrite.target_new else None,
        paraphrase_prompts=case.paraphrase_prompts,
        neighborhood_prompts=case.neighborhood_prompts,
        attribute_prompts=case.attribute_prompts,
        generation_prompts=case.generation_prompts,
        relation_id=rewrite.relation_id,
        target_true_id=rewrite.target_true.id,
        target_new_id=rewrite.target_new.id if rewrite.target_new else None,
    )


def _from_known_fact(index: int, record: Record) -> Fact:
    known = KnownFact.model_validate(record)
    return Fact(
        id=_identifier(known.known_id, index),
        prompt=_template(known.prompt, known.subject, "prompt"),
        subject=known.subject,
        target_true=known.attribute,
        relation_id=known.relation_id,
    )


def _from_zsre(index: int, record: Record, zsre_form: ZsreForm, drawn: Sequence[str | None]) -> Fact:
    item = ZsreRecord.model_validate(record)
    hase = zsre_form == "hase"

    def posed(question: str) -> str:
        return f"Question: {question} Answer:" if hase else question

    neighbor = (item.loc or "").removeprefix("nq question: " if hase else "")
    return Fact(
        id=_identifier(item.case_id, index),
        prompt=posed(_template(item.src, item.subject, "src")),
        subject=item.subject,
        target_true=item.answers[0],
        target_new=drawn[index] if hase else item.answers[0],
        paraphrase_prompts=(posed(item.rephrase),) if item.rephrase else (),
        neighborhood_prompts=(posed(f"{neighbor}?"),) if item.loc else (),
        neighborhood_target=item.loc_ans,
    )


def _from_own_line(index: int, record: Record) -> Fact:
    line = dict(FactLine.model_validate(record))
    return Fact(**{**line, "id": _identifier(line["id"], index)})


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


def _template(text: str, subject: str, name: str) -> str:
    if subject not in text:
        raise ValueError(f"the subject {subject!r} is not in its {name} {text!r}")
    return text.replace(subject, "{}", 1)


def _identifier(name: str | None, index: int) -> str:
    return str(index) if name is None else name
