"""Probes of a model, edited or not, about a request: answers after prompts (docs/editing.md, "Scores")."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.runs.packed_runs import Text

REWRITE, PARAPHRASE, NEIGHBORHOOD, ATTRIBUTE = PROMPT_KINDS = ("rewrite", "paraphrase", "neighborhood", "attribute")
ESSENCE = "essence"
Answer = Literal["target", "other", "own"]
TARGET: Final = "target"
OTHER: Final = "other"
OWN: Final = "own"


@dataclass(frozen=True)
class Probe:
    """The tokens of an answer after a prompt: kind and index of the prompt; answer: the request's ``target``, its
    ``other`` one, or the prompt's ``own``; run: which of the request's runs reads it, from the first row read on."""

    kind: str
    index: int
    answer: Answer
    tokens: tuple[int, ...]
    run: int


@dataclass(frozen=True)
class ProbeSet:
    """The probes of a request, and the runs that answer them, with how many of their last tokens are read."""

    request: Request
    runs: tuple[Text, ...]
    read: tuple[int, ...]
    probes: tuple[Probe, ...]

    @property
    def rows(self) -> int:
        return sum(map(len, self.runs))


def probes_of(request: Request, encoder: Encoder, essence: Sequence[str] = ()) -> ProbeSet:
    """Both targets after all prompts of the fact, a neighbour's own answer where it has one, and the essence texts."""
    fact = request.fact
    prompts = [(REWRITE, 0, fact.text, encoder.bare(request).text)]
    for kind, texts in (
        (PARAPHRASE, fact.paraphrase_prompts),
        (NEIGHBORHOOD, fact.neighborhood_prompts),
        (ATTRIBUTE, fact.attribute_prompts),
    ):
        prompts += [(kind, index, text, encoder.written(request, text)) for index, text in enumerate(texts)]
    runs: list[Text] = []
    read: list[int] = []
    probes: list[Probe] = []

    def add(kind: str, index: int, text: Text, answers: dict[Answer, tuple[int, ...]]) -> None:
        """Answers after one prompt: the longest first, and those that it begins with in the same run."""
        first = len(runs)
        for name, tokens in sorted(answers.items(), key=lambda item: -len(item[1])):
            whole = encoder.followed(request, text, tokens)
            same = (run for run in range(first, len(runs)) if runs[run].tokens[: len(whole)] == whole.tokens)
            run = next(same, len(runs))
            if run == len(runs):
                runs.append(whole)
                read.append(len(tokens))
            probes.append(Probe(kind, index, name, tokens, run))

    target, other = request.answers
    for kind, index, prompt, text in prompts:
        own = fact.neighborhood_target if kind == NEIGHBORHOOD else None
        words: dict[Answer, str | None] = {TARGET: target, OTHER: other, OWN: own}
        answers = {name: encoder.answer(request, prompt, said) for name, said in words.items() if said is not None}
        if target is None:
            answers[TARGET] = request.target
        if other is None and request.other is not None:
            answers[OTHER] = request.other
        add(kind, index, text, answers)
    for index, written in enumerate(essence):
        text = encoder.free(request, written)
        add(ESSENCE, index, replace(text, tokens=text.tokens[:1]), {OWN: text.tokens[1:]})
    return ProbeSet(request, tuple(runs), tuple(read), tuple(probes))
