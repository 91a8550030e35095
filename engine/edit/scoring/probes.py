"""Probes of a model, edited or not, about a request: answers after prompts (docs/editing.md, "Scores")."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, Literal

from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.errors import FactError
from causalcone.engine.facts import Fact, FactProbe
from causalcone.engine.schemas import PROMPT_KINDS

REWRITE, PARAPHRASE, NEIGHBORHOOD, ATTRIBUTE = PROMPT_KINDS
ESSENCE, LOCALITY = "essence", "locality"
Answer = Literal["target", "other", "own"]
TARGET: Final = "target"
OTHER: Final = "other"
OWN: Final = "own"


@dataclass(frozen=True)
class Probe:
    """The tokens of an answer after a prompt: kind and index of the prompt; answer: the request's ``target``, its
    ``other`` one, or one of the prompt's ``own``; run: which of the request's runs reads it, from the first row read
    on; name: of a fact's own probe; held: whether what must hold before the edit does, None where nothing must."""

    kind: str
    index: int
    answer: Answer
    tokens: tuple[int, ...]
    run: int
    name: str = ""
    held: bool | None = None


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

    @cached_property
    def groups(self) -> dict[str, list[list[int]]]:
        """By group of the fact's own probes, of each that counts, the numbers of its accepted answers."""
        found: dict[str, dict[int, list[int]]] = {}
        for number, probe in enumerate(self.probes):
            if probe.kind not in (*PROMPT_KINDS, ESSENCE) and probe.held is not False:
                found.setdefault(probe.kind, {}).setdefault(probe.index, []).append(number)
        return {group: list(by_index.values()) for group, by_index in found.items()}


def numbered(fact: Fact) -> Iterator[tuple[int, FactProbe]]:
    """A fact's own probes, each with its number in its group."""
    counts: Counter[str] = Counter()
    for probe in fact.probes:
        if probe.group in (*PROMPT_KINDS, ESSENCE):
            raise FactError(
                f"fact {fact.id!r}: the probe {probe.prompt!r} is of the group {probe.group!r}, which is the name of "
                "other prompts; name the group otherwise, or give the prompt as one of those"
            )
        yield counts[probe.group], probe
        counts[probe.group] += 1


def probes_of(
    request: Request, encoder: Encoder, essence: Sequence[str] = (), held: Sequence[bool | None] = ()
) -> ProbeSet:
    """Both targets after all prompts of the fact, a neighbour's own answer where it has one, the essence texts, and all
    accepted answers of the fact's own probes. held: of each of these, whether its conditions hold."""
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

    def add(kind: str, index: int, text: Text, answers: Iterable[tuple[Answer, tuple[int, ...]]], *about: Any) -> None:
        """Answers after one prompt: the longest first, and those that it begins with in the same run."""
        first = len(runs)
        for name, tokens in sorted(answers, key=lambda item: -len(item[1])):
            whole = encoder.followed(request, text, tokens)
            same = (run for run in range(first, len(runs)) if runs[run].tokens[: len(whole)] == whole.tokens)
            run = next(same, len(runs))
            if run == len(runs):
                runs.append(whole)
                read.append(len(tokens))
            probes.append(Probe(kind, index, name, tokens, run, *about))

    target, other = request.answers
    for kind, index, prompt, text in prompts:
        own = fact.neighborhood_target if kind == NEIGHBORHOOD else None
        words: dict[Answer, str | None] = {TARGET: target, OTHER: other, OWN: own}
        answers = {name: encoder.answer(request, prompt, said) for name, said in words.items() if said is not None}
        if target is None:
            answers[TARGET] = request.target
        if other is None and request.other is not None:
            answers[OTHER] = request.other
        add(kind, index, text, answers.items())
    for index, written in enumerate(essence):
        text = encoder.free(request, written)
        add(ESSENCE, index, replace(text, tokens=text.tokens[:1]), [(OWN, text.tokens[1:])])
    for (index, probe), holds in zip(numbered(fact), held or [None] * len(fact.probes), strict=True):
        accepted = dict.fromkeys(encoder.answer(request, probe.prompt, answer) for answer in probe.answers)
        text = encoder.written(request, probe.prompt)
        add(probe.group, index, text, [(OWN, tokens) for tokens in accepted], probe.name, holds)
    return ProbeSet(request, tuple(runs), tuple(read), tuple(probes))
