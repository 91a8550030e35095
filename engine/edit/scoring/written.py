"""Texts that models write after prompts about an edit's fact, before and after the edit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from causalcone.engine.edit.deltas.delta import Delta
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.runs.packed_runs import Text


@dataclass(frozen=True)
class OpenPrompt:
    """A prompt that texts are written after: kind, and number in its kind; tokens: it as the model reads it; accepted:
    the answers that are right, none where that is not to be counted; room, seed: of a text that is sampled, its tokens
    and where its random numbers begin."""

    kind: str
    index: int
    prompt: str
    tokens: Text
    accepted: tuple[str, ...] = ()
    room: int = 0
    seed: int = 0


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
    write: Callable[[Sequence[OpenPrompt], Sequence[Delta | None]], Sequence[str]],
) -> Iterator[Written]:
    """The texts of each edit whose fact has prompts. write: the text after each prompt, by the model under the change
    of weights of the same number."""
    prompts = {id(edit.request): prompts_of(edit.request) for edit in edits}
    edits = [edit for edit in edits if prompts[id(edit.request)]]
    runs: dict[int, tuple[int, Delta | None]] = {id(edit.request): (id(edit.request), None) for edit in edits}
    runs |= {id(edit): (id(edit.request), edit.delta) for edit in edits if edit.delta is not None}
    asked = [(prompt, delta) for request, delta in runs.values() for prompt in prompts[request]]
    texts = iter(write([prompt for prompt, _ in asked], [delta for _, delta in asked]))
    written = {run: [next(texts) for _ in prompts[request]] for run, (request, _) in runs.items()}
    for edit in edits:
        yield Written(edit, prompts[id(edit.request)], written[id(edit.request)], written.get(id(edit)))
