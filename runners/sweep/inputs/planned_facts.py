"""The facts that a sweep is planned for: their number, and the lengths of their texts, on which alone it depends what a
sweep takes. Without a file of facts they are those of CounterFact in GPT-2's tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from causalcone.engine.edit.requests.problems import REVERSAL_TOKENS
from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.requests.requests import FACT_AMPLIFICATION, TRACING_REVERSAL, Request
from causalcone.engine.edit.runs.flops import Asked, Searched
from causalcone.engine.edit.texts.contexts import MEMIT_TOKENS, MEMIT_WORDS, ROME_TOKENS, Contexts
from causalcone.engine.encoding import EncodedFact, PromptEncoder
from causalcone.engine.errors import CausalconeError
from causalcone.engine.facts import Fact
from causalcone.engine.models.base import Sizes
from causalcone.runners.edits.settings import read_contexts
from causalcone.runners.names import path_of
from causalcone.runners.sweep.inputs.facts_table import read_facts
from causalcone.runners.sweep.inputs.model_outline import known_tokenizer
from causalcone.runners.sweep.inputs.settings import Sweep

MEASURED = 1000
"""Of how many facts the texts are measured, evenly spaced ones, where there are more."""

USUAL_FACTS = 1000
"""How many facts are taken to be there, where neither the file nor a limit says it."""

DRAWN = {"rome": ROME_TOKENS, "memit": (MEMIT_TOKENS + 1,) * len(MEMIT_WORDS)}
"""Tokens that contexts put before a prompt, where they are still to be drawn. Each ends in a full stop, which in ROME's
comes in place of the token that they begin from."""

_PROMPT = (5, 6, 7, 8, 9, 10, 11, 8, 10, 10, 12, 14)
_BEFORE = (0, 0, 0, 0, 0, 0, 0, 3, 4, 6, 4, 4)
_SUBJECT = (2, 3, 4, 5, 5, 5, 7, 3, 4, 1, 7, 8)
_SHARE = (0.08, 0.17, 0.18, 0.07, 0.08, 0.08, 0.07, 0.09, 0.06, 0.04, 0.05, 0.03)
SHAPES = tuple(zip(zip(_PROMPT, _BEFORE, _SUBJECT, strict=True), _SHARE, strict=True))
"""Tokens of the prompt and before the subject, tokens of the subject, and their share: the first 60 prompts of
CounterFact, put together by what is alike (mean 8.3 tokens, of the subject 4.2). All of their targets are one token."""

ASKED, GENERATION = tuple((tokens, 0) for tokens in (10, 14, *(7,) * 20)), (7,) * 10
"""Lengths of a record's other prompts: two paraphrases, ten neighbours and ten of the attribute; and of generation
prompts, these as the neighbours on average."""


@dataclass(frozen=True)
class FactLengths:
    """Tokens of the texts about a fact.

    prompt: its own; span: those of the subject in it; target, new: of both answers, ``new`` None where there is none;
    essence: of the essence prompt up to the subject's end; asked: of each further prompt that edits are scored on, and
    of the prompt's own answer (0: none); generation: of each generation prompt; contexts: by method, tokens and lookup
    of the prompt, bare and after each context; paraphrases: of each paraphrase, which are asked as well; probes: of
    each of the fact's own probes, and of its accepted answers; conditions: of each condition's prompt.
    """

    prompt: int
    span: tuple[int, int]
    target: int
    new: int | None
    essence: int
    asked: tuple[tuple[int, int], ...]
    generation: tuple[int, ...]
    contexts: Mapping[str, Sequence[tuple[int, int]]]
    paraphrases: tuple[int, ...] = ()
    probes: tuple[tuple[int, tuple[int, ...]], ...] = ()
    conditions: tuple[int, ...] = ()

    @property
    def open(self) -> tuple[int, ...]:
        """Of each prompt that is answered freely."""
        return (self.prompt, *self.paraphrases, *(tokens for tokens, _ in self.probes))

    @property
    def reversed(self) -> int:
        """Tokens that the model writes under noise, in Tracing Reversal."""
        return max(1, REVERSAL_TOKENS - self.prompt)

    def targets(self, problem: str, published: bool) -> tuple[int, int | None]:
        """Tokens of the target that is trained, and of the other one."""
        if problem == TRACING_REVERSAL:
            return self.reversed + self.prompt * published, self.target
        if problem == "error_injection":
            return self.new or self.target, self.target
        return self.target, self.new

    def searched(self, contexts: str | None, target: int) -> Searched:
        """The texts that a vector is searched on: in a method's contexts, or the bare prompt."""
        texts = self.contexts["rome"][:1] if contexts is None else self.contexts[contexts]
        return Searched.of(texts, self.essence, target)

    def answers(self, target: int, other: int | None) -> Asked:
        """The prompts that edits are scored on, but for essence texts."""
        both = [target] if other is None else [target, other]
        prompts = [(self.prompt, 0), *self.asked]
        asked = [(tokens, [*both, answer] if answer else both) for tokens, answer in prompts]
        return Asked.total((Asked.after(*each), 1) for each in (*asked, *self.probes))

    def encoded(self, target: str) -> EncodedFact:
        """A fact of these lengths."""
        fact = Fact("of these lengths", "{}", "subject", "target")
        return EncodedFact(fact, (0,) * self.prompt, self.span, (0,) * self.target if target == "label" else ())


def measured_lengths(fact: Fact, encoder: Encoder, contexts: Contexts | None) -> FactLengths:
    """The lengths of a fact's texts, with given contexts, or those that are still to be drawn. Raises ``FactError``
    where the fact cannot be encoded."""
    encoded, target = encoder.prompts.fact(fact), fact.neighborhood_target
    request = Request(fact, FACT_AMPLIFICATION, encoded.target)
    asked = [(text, 0) for text in fact.paraphrase_prompts + fact.attribute_prompts]
    asked += [
        (text, 0 if target is None else len(encoder.answer(request, text, target)))
        for text in fact.neighborhood_prompts
    ]
    if contexts is None:
        by_method = drawn_contexts(len(encoded.prompt), encoded.span[1] - 1)
    else:
        texts = {"rome": contexts.rome, "memit": contexts.memit}
        prompts = {method: encoder.contexts(request, before) for method, before in texts.items()}
        by_method = {key: [(len(prompt.text), prompt.lookup) for prompt in value] for key, value in prompts.items()}
    return FactLengths(
        prompt=len(encoded.prompt),
        span=encoded.span,
        target=len(encoded.target),
        new=None if fact.target_new is None else len(encoder.answer(request, fact.text, fact.target_new)),
        essence=encoder.essence(request).lookup + 1,
        asked=tuple((len(encoder.written(request, text)), tokens) for text, tokens in asked),
        generation=tuple(len(encoder.free(request, text)) for text in fact.generation_prompts),
        contexts=by_method,
        paraphrases=tuple(len(encoder.written(request, text)) for text in fact.paraphrase_prompts),
        probes=tuple(
            (
                len(encoder.written(request, probe.prompt)),
                tuple(len(encoder.answer(request, probe.prompt, answer)) for answer in probe.answers),
            )
            for probe in fact.probes
        ),
        conditions=tuple(
            len(encoder.written(request, condition.prompt)) for probe in fact.probes for condition in probe.conditions
        ),
    )


def drawn_contexts(prompt: int, lookup: int) -> dict[str, list[tuple[int, int]]]:
    """By method: tokens and lookup of a prompt, bare and after contexts that are still to be drawn."""
    return {method: [(prompt + more, lookup + more) for more in (0, *lengths)] for method, lengths in DRAWN.items()}


def typical_facts() -> list[tuple[FactLengths, float]]:
    """Lengths of a dozen facts, with the share of facts that have them."""
    facts = []
    for (prompt, start, subject), share in SHAPES:
        contexts = drawn_contexts(prompt, start + subject - 1)
        span, paraphrases = (start, start + subject), tuple(tokens for tokens, _ in ASKED[:2])
        facts.append((FactLengths(prompt, span, 1, 1, subject, ASKED, GENERATION, contexts, paraphrases), share))
    return facts


Weighted = list[tuple[FactLengths, float]]


@dataclass(frozen=True)
class PlannedFacts:
    """The facts of a sweep. count: how many; lengths: of all of them one by one, or (not ``complete``) of some that
    stand for all, with their shares; lines: in words, where this is from."""

    count: int
    lengths: Sequence[tuple[FactLengths, float]]
    complete: bool
    lines: tuple[str, ...]

    def some(self, count: int, first: bool) -> Weighted:
        """Lengths of ``count`` facts, with how many have them: of the ``first``, or of any."""
        if self.complete and first:
            return list(self.lengths[:count])
        whole = sum(weight for _, weight in self.lengths)
        return [(lengths, weight * count / whole) for lengths, weight in self.lengths]


def facts_of(sweep: Sweep, sizes: Sizes) -> PlannedFacts:
    """All that can be known of the sweep's facts: the file's, measured with the model's tokenizer; else usual ones."""
    if not Path(path_of(sweep.facts, "facts")).expanduser().is_file():
        count = sweep.limit or USUAL_FACTS
        source = "the sweep's limit" if sweep.limit else "a guess; set limit"
        return _typical(count, f"facts: {count:,} ({source}), since {sweep.facts} is not there")
    facts = read_facts(sweep).facts
    line = f"facts: {len(facts):,} of {sweep.facts}"
    tokenizer = known_tokenizer(sweep)
    if tokenizer is None:
        return _typical(len(facts), line, f", since no tokenizer of {sweep.model} is at hand")
    encoder = Encoder(PromptEncoder(tokenizer, sizes.vocabulary, sizes.positions, sweep.form), sizes)
    contexts = None if sweep.contexts is None else read_contexts(Path(sweep.contexts))
    sample = [facts[number * len(facts) // MEASURED] for number in range(MEASURED)] if len(facts) > MEASURED else facts
    measured = []
    for fact in sample:
        try:
            measured.append((measured_lengths(fact, encoder, contexts), 1.0))
        except CausalconeError:
            if not sweep.skip_bad_facts:
                raise
    source = f"lengths: those of {len(measured):,} facts, by the tokenizer of {sweep.model}"
    count = len(facts) if len(sample) < len(facts) else len(measured)
    return PlannedFacts(count, measured, len(measured) == len(facts), (line, source))


def _typical(count: int, line: str, reason: str = "") -> PlannedFacts:
    source = f"lengths: those typical of CounterFact in GPT-2's tokens{reason}"
    return PlannedFacts(count, typical_facts(), False, (line, source))
