"""What models answer when they write freely, and whether that is an accepted answer (docs/editing.md, "Scores")."""

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from causalcone.engine.edit.deltas.delta import Delta
from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.requests.requests import TRACING_REVERSAL, Request
from causalcone.engine.edit.runs.decoding import continuations
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.edit.scoring.metrics import Row
from causalcone.engine.edit.scoring.probes import PARAPHRASE, REWRITE, numbered
from causalcone.engine.edit.scoring.written import OpenPrompt, Written, before_and_after
from causalcone.engine.edit.texts.contexts import continued
from causalcone.engine.encoding import spaceless
from causalcone.engine.facts import FactProbe
from causalcone.engine.run.session import Session

ANSWER_TOKENS = 32
_FIRST_TOKENS = 8
"""Most answers end within so many tokens: only the others are continued."""

_STOP = re.compile("([.\u3002])")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """As SQuAD's scores have it: in lower case, without punctuation, English articles and superfluous white space; a
    text of nothing else stays."""
    lower = text.lower()
    plain = "".join(c for c in lower if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", plain).split()) or lower.strip()


def matches(text: str, accepted: Sequence[str]) -> bool:
    """Whether a text, up to its natural end, is an accepted answer, both normalised."""
    return any(normalised(_sentences(text, _stops([answer]))) == normalised(answer) for answer in accepted)


def begins_with(text: str, accepted: Sequence[str]) -> bool:
    """Whether the words of a text begin with those of an accepted answer, both normalised."""
    said = normalised(text)
    return any(said.startswith(answer) and _is_word(answer, said) for answer in map(normalised, accepted))


def _is_word(beginning: str, text: str) -> bool:
    return spaceless(beginning) or not text[len(beginning) :][:1].isalnum()


def _stops(accepted: Sequence[str]) -> int:
    """The full stop that ends an answer: the first one that is not within an accepted answer, as in "St. Louis"."""
    return 1 + max((len(_STOP.findall(answer.strip().rstrip(".\u3002"))) for answer in accepted), default=0)


def _sentences(text: str, stops: int) -> str:
    """A text up to the end of its first line, or its so-many-th full stop."""
    return "".join(_STOP.split(text.split("\n", 1)[0])[: 2 * stops]).strip()


def answers(
    session: Session,
    texts: Sequence[Text],
    accepted: Sequence[Sequence[str]],
    deltas: Sequence[Delta | None] | None = None,
) -> list[str]:
    """What the model, changed by a text's delta where there is one, goes on with, by the likeliest tokens, up to the
    natural end: an end-of-text token, the end of the line, or a full stop that is in no accepted answer; at most
    ``ANSWER_TOKENS`` tokens."""
    ends = _end_tokens(session)
    new: list[tuple[int, ...]] = [()] * len(texts)
    said, going = [""] * len(texts), [*range(len(texts))]
    for total in (_FIRST_TOKENS, ANSWER_TOKENS):
        if not going:
            break
        begun = [replace(texts[n], tokens=texts[n].tokens + new[n]) for n in going]
        rooms = [min(total, session.sizes.positions + 1 - len(texts[n])) - len(new[n]) for n in going]
        changes = None if deltas is None else [deltas[n] for n in going]
        more, ended = continuations(session, begun, rooms, deltas=changes), set()
        for n, tokens in zip(going, more, strict=True):
            new[n] += tokens
            length = next((at for at, token in enumerate(new[n]) if token in ends), len(new[n]))
            text, stops = continued(session, texts[n].tokens, new[n][:length]), _stops(accepted[n])
            said[n] = _sentences(text, stops)
            if length < len(new[n]) or "\n" in text or len(_STOP.findall(text)) >= stops:
                ended.add(n)
        going = [n for n in going if n not in ended]
    return said


def _end_tokens(session: Session) -> set[int]:
    """The tokens that end a text, of the tokenizer and of the model, which may have several."""
    own = getattr(getattr(session.model, "generation_config", None), "eos_token_id", None)
    return {session.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


def conditions_held(session: Session, encoder: Encoder, requests: Sequence[Request]) -> list[list[bool | None]]:
    """For each request whether the conditions of its fact's own probes hold in the unedited model: whether its answer
    begins with an accepted one; None for a probe without conditions."""
    asked = [(request, each) for request in requests for probe in request.fact.probes for each in probe.conditions]
    texts = [encoder.written(request, condition.prompt) for request, condition in asked]
    said = iter(answers(session, texts, [condition.answers for _, condition in asked]))
    return [[_holds(probe, said) for probe in request.fact.probes] for request in requests]


def _holds(probe: FactProbe, said: Iterator[str]) -> bool | None:
    found = [begins_with(next(said), condition.answers) for condition in probe.conditions]
    return (all if probe.every else any)(found) if found else None


def answered(
    session: Session, encoder: Encoder, edits: Sequence[Edit], held: Callable[[Request], Sequence[bool | None]]
) -> Iterator[Written]:
    """What the model answers to prompts, paraphrases and the facts' own probes, before and after edits. held: of each
    probe of a request whether its conditions hold; if not, it does not count."""
    return before_and_after(
        edits,
        lambda request: _prompts(encoder, request, held(request)),
        lambda asked, deltas: answers(session, [p.tokens for p in asked], [p.accepted for p in asked], deltas),
    )


def _prompts(encoder: Encoder, request: Request, held: Sequence[bool | None]) -> list[OpenPrompt]:
    fact, accepted = request.fact, _accepted(request)
    asked = [(PARAPHRASE, number, text, accepted) for number, text in enumerate(fact.paraphrase_prompts)]
    for (index, probe), holds in zip(numbered(fact), held, strict=True):
        asked.append((probe.group, index, probe.prompt, () if holds is False else probe.answers))
    further = [OpenPrompt(kind, n, text, encoder.written(request, text), right) for kind, n, text, right in asked]
    return [OpenPrompt(REWRITE, 0, fact.text, encoder.bare(request).text, accepted), *further]


def _accepted(request: Request) -> tuple[str, ...]:
    """The answers that a request trains, or trains away from; what a noised model says, in Tracing Reversal, has no
    natural end to be compared at."""
    fact = request.fact
    if request.problem == TRACING_REVERSAL:
        return ()
    if request.trains_new:
        return () if fact.target_new is None else (fact.target_new, *fact.target_new_aliases)
    return fact.target_true, *fact.target_true_aliases


def match_rows(written: Iterable[Written]) -> Iterator[Row]:
    """By kind of prompt, the share of answers that are accepted ones."""
    for each in written:
        for kind in dict.fromkeys(prompt.kind for prompt in each.prompts if prompt.accepted):
            post = None if each.after is None else _share(each, kind, each.after)
            yield each.edit.edit_id, f"{kind}_exact_match", _share(each, kind, each.before), post


def _share(written: Written, kind: str, said: Sequence[str]) -> float:
    counted = [(text, p.accepted) for text, p in zip(said, written.prompts, strict=True) if p.kind == kind]
    right = [matches(text, accepted) for text, accepted in counted if accepted]
    return sum(right) / len(right)
