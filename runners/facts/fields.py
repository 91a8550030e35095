"""Types of fields that the formats of fact files share, and a prompt's place for its subject."""

import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainValidator, StrictStr
from pydantic_core import PydanticCustomError


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


def _leaves(value: Any) -> Iterator[Any]:
    if not isinstance(value, list | tuple):
        yield value
        return
    for item in value:
        yield from _leaves(item)


def _texts(value: Any) -> tuple[str, ...]:
    texts = tuple(_leaves(value))
    if not all(isinstance(text, str) for text in texts):
        raise PydanticCustomError("texts", "must be a text, or a list of texts")
    return tuple(dict.fromkeys(map(_usable_text, texts)))


def _at_least_one(texts: tuple[str, ...]) -> tuple[str, ...]:
    if not texts:
        raise PydanticCustomError("no_texts", "is empty")
    return texts


Text = Annotated[StrictStr, AfterValidator(_usable_text)]
Prompts = tuple[Text, ...]
Identifier = Annotated[Text | None, BeforeValidator(_identifier_text)]
Lines = Annotated[tuple[str, ...], PlainValidator(_texts)]
"""A text, or a list of texts, nested or not; each once."""
Answers = Annotated[Lines, AfterValidator(_at_least_one)]


def template(prompt: str, subject: str, name: str = "prompt") -> str:
    """The prompt with ``{}`` in the subject's place: where it has none, the first occurrence that is no part of a word,
    or else the first. Raises ``ValueError`` where the subject is not in it; ``name`` is the prompt's in messages."""
    if "{}" in prompt:
        return prompt
    word = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt)
    start = word.start() if word else prompt.find(subject)
    if start < 0:
        raise ValueError(f"the subject {subject!r} is not in its {name} {prompt!r}")
    return f"{prompt[:start]}{{}}{prompt[start + len(subject) :]}"


def identifier(name: str | None, index: int) -> str:
    """A record's own name, or else its index."""
    return str(index) if name is None else name
