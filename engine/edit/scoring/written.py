"""Texts that models write after prompts about an edit's fact, before and after the edit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from causalcone.engine.edit.deltas.delta import Delta
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.requests.requests import Request


@dataclass(frozen=True)
class OpenPrompt:
    """A prompt that texts are written after: kind, and number in its kind; accepted: the answers that are right, none
    where that is not to be counted."""

    kind: str
    index: int
    prompt: str
    accepted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """What was written after each of the prompts, before and after an edit; None if it failed."""

    edit: Edit
    prompts: Sequence[OpenPrompt]
    before: Sequence[str]
    after: Sequence[str] | None


def before_and_after(
    edits: Sequence[Edit],
    prompts_of: Callable[[Request], Sequence[OpenPrompt]],
    write: Callable[[Sequence[Request], Sequence[Delta | None]], Sequence[Sequence[str]]],
) -> Iterator[Written]:
    """The texts of each edit whose fact has prompts. write: the texts after the prompts of requests, by the model under
    one change of weights each."""
    prompts = {id(edit.request): prompts_of(edit.request) for edit in edits}
    edits = [edit for edit in edits if prompts[id(edit.request)]]
    requests = {id(edit.request): edit.request for edit in edits}
    made = [edit for edit in edits if edit.delta is not None]
    before = dict(zip(requests, write([*requests.values()], [None] * len(requests)), strict=True))
    written = write([edit.request for edit in made], [edit.delta for edit in made])
    after = {id(edit): texts for edit, texts in zip(made, written, strict=True)}
    for edit in edits:
        yield Written(edit, prompts[id(edit.request)], before[id(edit.request)], after.get(id(edit)))
