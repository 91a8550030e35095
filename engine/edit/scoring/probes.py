"""What is read of a model, edited or not, about a request: answers after prompts (METHODS 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.facts import target_ids

REWRITE, PARAPHRASE, NEIGHBORHOOD, ATTRIBUTE = PROMPT_KINDS = ("rewrite", "paraphrase", "neighborhood", "attribute")
ESSENCE = "essence"
TARGET, OTHER, OWN = "target", "other", "own"


@dataclass(frozen=True)
class Probe:
    """How likely the tokens of an answer are after a prompt: kind and index of the prompt; answer: the request's
    ``target``, its ``other`` one, or the prompt's ``own``; run: which of the request's runs reads it, from the first
    of the rows read on."""

    kind: str
    index: int
    answer: str
    tokens: tuple[int, ...]
    run: int


@dataclass(frozen=True)
class ProbeSet:
    """The questions about a request, and the runs that answer them, with how many of their last tokens are read."""

    request: Request
    runs: tuple[Text, ...]
    read: tuple[int, ...]
    asked: tuple[Probe, ...]

    @property
    def rows(self) -> int:
        """Tokens of all runs."""
        return sum(map(len, self.runs))


def questions_about(request: Request, encoder: Encoder, essence: Sequence[str] = ()) -> ProbeSet:
    """Both targets after all prompts of the fact, a neighbour's own answer where it has one, and the essence texts."""
    fact = request.fact
    prompts = [(REWRITE, 0, encoder.prompted(request, fact.prompt).text)]
    for kind, texts in (
        (PARAPHRASE, fact.paraphrase_prompts),
        (NEIGHBORHOOD, fact.neighborhood_prompts),
        (ATTRIBUTE, fact.attribute_prompts),
    ):
        prompts += [(kind, index, encoder.written(request, text)) for index, text in enumerate(texts)]
    collected = _ProbeCollector([], [], [])
    for kind, index, text in prompts:
        answers = {TARGET: request.target}
        if request.other is not None:
            answers[OTHER] = request.other
        if kind == NEIGHBORHOOD and fact.neighborhood_target is not None:
            answers[OWN] = target_ids(fact.neighborhood_target, encoder.tokenizer)
        collected.ask(request, encoder, kind, index, text, answers)
    for index, written in enumerate(essence):
        text = encoder.written(request, written)
        first = replace(text, tokens=text.tokens[:1])
        collected.ask(request, encoder, ESSENCE, index, first, {OWN: text.tokens[1:]})
    return ProbeSet(request, tuple(collected.runs), tuple(collected.read), tuple(collected.asked))


@dataclass
class _ProbeCollector:
    runs: list[Text]
    read: list[int]
    asked: list[Probe]

    def ask(
        self, request: Request, encoder: Encoder, kind: str, index: int, text: Text, answers: dict[str, tuple[int, ...]]
    ) -> None:
        """Answers after one prompt: the longest first, and those that it begins with in the same run."""
        first = len(self.runs)
        for name, tokens in sorted(answers.items(), key=lambda item: -len(item[1])):
            whole = encoder.followed(request, text, tokens)
            for run in range(first, len(self.runs)):
                if self.runs[run].tokens[: len(whole)] == whole.tokens:
                    break
            else:
                run = len(self.runs)
                self.runs.append(whole)
                self.read.append(len(tokens))
            self.asked.append(Probe(kind, index, name, tokens, run))
