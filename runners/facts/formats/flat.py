"""Flat records, whose fields have other names in every data set: EasyEdit's, KnowEdit, WikiBigEdit, UltraEditBench, a
table of one's own (docs/data.md, "Formats")."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from causalcone.engine.errors import FactError
from causalcone.engine.facts import Fact, FactProbe, Joiner
from causalcone.runners.facts.fields import Answers, Identifier, Lines, Text, identifier, template


class AskedPrompt(BaseModel):
    """A prompt and its accepted answers."""

    prompt: Text
    ground_truth: Answers


def _one_by_one(value: Any) -> list[Any]:
    """What a group asks, prompt by prompt: records have a list of such objects, or one object of two lists."""
    return [asked for item in (value if isinstance(value, list) else [value]) for asked in _each(item)]


def _each(item: Any) -> Iterator[Any]:
    prompts, answers = (item.get(name) if isinstance(item, Mapping) else None for name in ("prompt", "ground_truth"))
    if not isinstance(prompts, list):
        yield item
        return
    answers = [answers] if len(prompts) == 1 or not isinstance(answers, list) else answers
    if len(prompts) != len(answers):
        raise PydanticCustomError("unequal", f"has {len(prompts)} prompts, and {len(answers)} answers")
    for prompt, answer in zip(prompts, answers, strict=True):
        yield {"prompt": prompt, "ground_truth": answer}


def _by_group(value: Any) -> Any:
    """EasyEdit's zsRE has one question under names of its own."""
    if isinstance(value, Mapping) and "New Question" in value:
        return {"one_hop": {"prompt": value["New Question"], "ground_truth": value.get("New Answer")}}
    return value


Groups = Annotated[
    dict[str, Annotated[tuple[AskedPrompt, ...], BeforeValidator(_one_by_one)]], BeforeValidator(_by_group)
]

FIELDS: dict[str, tuple[Any, Any, str]] = {
    "id": (Identifier, None, "id case_id"),
    "subject": (Text | None, None, "subject concept"),
    "prompt": (Text, ..., "prompt src update text"),
    "target_new": (Answers, (), "target_new ans alt labels"),
    "target_true": (Answers, (), "target_true ground_truth answers"),
    "paraphrase": (Lines, (), "paraphrase paraphrase_prompts rephrase rephrase_prompt ood_rephrase"),
    "neighborhood": (Lines, (), "neighborhood neighborhood_prompts loc locality_prompt"),
    "neighborhood_target": (Text | None, None, "neighborhood_target loc_ans locality_ground_truth"),
    "attribute": (Lines, (), "attribute attribute_prompts"),
    "generation": (Lines, (), "generation generation_prompts"),
    "relation_id": (Text | None, None, "relation_id"),
    "joiner": (Joiner, "auto", "joiner"),
    "portability": (Groups, {}, "portability"),
    "locality": (Groups, {}, "locality"),
    "personas": (Lines, (), "personas"),
    "mhop": (Lines, (), "mhop portability_prompt"),
    "mhop_target": (Answers, (), "mhop_target mhop_ans portability_ground_truth portability_answer"),
}
"""The fields of a flat record: type, default, and the columns that they may be in. Own tables name others."""


class _Flat(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def _filled(cls, record: Any) -> Any:
        """Without nulls, and without the NaN that tables write for them."""
        if not isinstance(record, Mapping):
            return record
        return {key: value for key, value in record.items() if value is not None and value == value}

    def facts(self, index: int) -> list[Fact]:
        """Where a record does not say what is true now, what is new is the answer too."""
        item: Any = self
        new, true = item.target_new, item.target_true or item.target_new
        if not true:
            raise ValueError("target_true and target_new are missing; give one at least")
        if item.subject is None:
            raise ValueError(
                "subject is missing: what the prompt is about has to be named, in its words; name the column that "
                "holds it (--column subject=COLUMN), or add a field 'subject'"
            )
        if bool(item.mhop) != bool(item.mhop_target):
            raise ValueError("a question over several hops needs its answer: give both mhop and mhop_ans, or neither")
        groups = [
            (f"{kind}/{name}", asked)
            for kind in ("portability", "locality")
            for name, asked in getattr(item, kind).items()
        ]
        probes = [FactProbe(group, one.prompt, one.ground_truth) for group, asked in groups for one in asked]
        probes += [FactProbe("portability/personas", prompt, new or true) for prompt in item.personas]
        probes += [FactProbe("portability/mhop", prompt, item.mhop_target) for prompt in item.mhop]
        return [
            Fact(
                id=identifier(item.id, index),
                prompt=template(item.prompt, item.subject),
                subject=item.subject,
                target_true=true[0],
                target_new=new[0] if new else None,
                paraphrase_prompts=item.paraphrase,
                neighborhood_prompts=item.neighborhood,
                attribute_prompts=item.attribute,
                generation_prompts=item.generation,
                relation_id=item.relation_id,
                neighborhood_target=item.neighborhood_target,
                target_true_aliases=true[1:],
                target_new_aliases=new[1:],
                probes=tuple(probes),
                joiner=item.joiner,
            )
        ]


def flat_model(columns: Mapping[str, str], *required: str) -> type[_Flat]:
    """The model of flat records; columns: the one in which a field is, for those named otherwise than usual."""
    fields: dict[str, Any] = {
        name: (kind, Field(... if name in required else default, validation_alias=_names(columns.get(name), usual)))
        for name, (kind, default, usual) in FIELDS.items()
    }
    return create_model("FlatRecord", __base__=_Flat, **fields)


def _names(column: str | None, usual: str) -> AliasChoices:
    return AliasChoices(*(usual.split() if column is None else [column]))


EditRecord = flat_model({}, "target_new")


def parse_columns(options: Iterable[str]) -> dict[str, str]:
    """The columns of fields, from FIELD=COLUMN each. Raises ``FactError`` for any other text."""
    columns: dict[str, str] = {}
    for option in options:
        field, _, column = option.partition("=")
        if not column or field in columns:
            raise FactError(f"--column {option!r} is not FIELD=COLUMN, or names a field again; such as subject=name")
        columns[field] = column
    return columns


_CALL = {
    **{name: name for name in ("subject", "target_new", "ground_truth")},
    **{"prompts": "prompt", "rephrase_prompts": "rephrase_prompt"},
    **{f"{name}_inputs": name for name in ("locality", "portability")},
}
"""Arguments of EasyEdit's ``edit``, which are lists of what its records have one of."""


def records_of_call(call: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of a call's arguments, of which others are not read. Raises ``FactError`` for lists of unequal
    length."""
    count = len(call["prompts"])
    given = {_CALL[name]: (name, value) for name, value in call.items() if name in _CALL and value is not None}
    return [{key: _nth(name, value, number, count) for key, (name, value) in given.items()} for number in range(count)]


def _nth(name: str, value: Any, number: int, count: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _nth(f"{name}.{key}", inner, number, count) for key, inner in value.items()}
    if not isinstance(value, list):
        raise FactError(f"{name} must be a list, with one for every prompt")
    if len(value) != count:
        raise FactError(f"{name} has {len(value)} items, and prompts {count}; give one for every prompt")
    return value[number]
