"""Texts as token ids: prompts as they are put to a model, the subject's tokens in them, and the answer that follows
(docs/methods.md, "Facts and tokens")."""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, TypedDict, get_args

from causalcone.engine.errors import ExperimentError, FactError, one_of
from causalcone.engine.facts import Fact, Joiner

Bos = Literal["auto", "always", "never"]
"""Whether a prompt begins with the tokenizer's BOS token: as the tokenizer does it, or against that."""

KEPT = 1 << 13
"""Texts whose token ids are kept."""

_MARK = "\ue000"
"""Stands for a message in a chat template: a character that no text has."""
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_SPACELESS = ("CJK", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
"""Scripts without spaces between words, as the names of their letters begin."""
_BEFORE = ("\n", '"', "(", "1")
"""Characters that no tokenizer joins to what follows, in the order in which they are tried."""


class PromptOptions(TypedDict, total=False):
    """Options of ``PromptForm`` for ``Tracer`` and ``Editor``."""

    chat: bool
    system: str | None
    bos: Bos
    keep_space: bool


@dataclass(frozen=True, kw_only=True)
class PromptForm:
    """How prompts are put to a model. chat: as the user's message in the tokenizer's chat template, which the answer
    follows. system: the system's message before it. bos: whether prompts begin with the BOS token; "auto" as the
    tokenizer does it. keep_space: leave spaces at a prompt's end, which are cut otherwise."""

    chat: bool = False
    system: str | None = None
    bos: Bos = "auto"
    keep_space: bool = False

    def __post_init__(self) -> None:
        one_of("bos", self.bos, get_args(Bos))
        if self.system is not None and not self.chat:
            raise ExperimentError("a system message goes with a chat; give chat=True (--chat) too")
        if self.bos != "auto" and self.chat:
            raise ExperimentError("a chat begins as its template says; leave out bos, or chat")


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as a model reads it: the whole ``text``, its token ids, the half-open range of those that overlap the
    characters that were asked for (None: no token does), and whether spaces at its end were cut. opening: what a chat
    template puts between its end and an answer, None outside of chats."""

    text: str
    tokens: tuple[int, ...]
    span: tuple[int, int] | None
    cut: bool = False
    opening: str | None = None


@dataclass(frozen=True)
class AnswerTokens:
    """An answer after a prompt: its token ids, what joins it to the prompt, and whether the ids are those that it has
    in the joined text (else those that it has alone)."""

    tokens: tuple[int, ...]
    joiner: str
    joined: bool


@dataclass(frozen=True)
class EncodedFact:
    """A fact as token ids. prompt: ids of the filled prompt, special tokens included; span: half-open token range of
    the subject; target: ids of the target, empty where the clean run's own most likely token is the target;
    counterfactual: ids of the prompt about its ``counterfactual_subject``, where the subject is corrupted by that;
    answer: how the target was joined to the prompt; cut: whether spaces at the prompt's end were cut."""

    fact: Fact
    prompt: tuple[int, ...]
    span: tuple[int, int]
    target: tuple[int, ...]
    counterfactual: tuple[int, ...] | None = None
    answer: AnswerTokens | None = None
    cut: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """What runs through the model: the prompt and all target tokens but the last."""
        return self.prompt + self.target[:-1]


@dataclass(frozen=True)
class PromptEncoder:
    """Makes token ids of texts, for a model with a ``vocabulary`` and ``positions``. Raises ``FactError`` for what
    cannot be used."""

    tokenizer: Any
    vocabulary: int
    positions: int
    form: PromptForm = PromptForm()

    def __post_init__(self) -> None:
        if self.form.chat and not getattr(self.tokenizer, "chat_template", None):
            raise ExperimentError("the tokenizer has no chat template; leave out chat, or use the chat model's own")
        if self.form.bos == "always" and self.tokenizer.bos_token_id is None:
            raise ExperimentError("the tokenizer has no BOS token; leave out bos='always'")

    @cached_property
    def text(self) -> "PromptEncoder":
        """The same for texts as they are: in no chat, and with nothing cut."""
        return replace(self, form=PromptForm(bos=self.form.bos, keep_space=True))

    def fact(self, fact: Fact, target: str = "label") -> EncodedFact:
        """A fact with its target as ids under ``"label"``, without one under ``"argmax"``. Raises ``FactError`` where
        the subject overlaps no token, a token id is outside the vocabulary, or there are too few positions."""
        name = f"fact {fact.id!r}"
        prompt = self.prompt(fact.text, fact.subject_characters, fact.joiner, name)
        if prompt.span is None:
            raise FactError(f"{name}: the subject {fact.subject!r} overlaps no token of its prompt {fact.text!r}")
        answer = self.answer(prompt, fact.target_true, fact.joiner, name) if target == "label" else None
        ids = answer.tokens if answer else ()
        encoded = EncodedFact(fact, prompt.tokens, prompt.span, ids, answer=answer, cut=prompt.cut)
        if len(encoded.tokens) > self.positions:
            raise FactError(
                f"{name}: prompt and target need {len(encoded.tokens)} positions, the model has {self.positions}; "
                "shorten the prompt"
            )
        if max(prompt.tokens + ids) >= self.vocabulary:
            raise FactError(
                f"{name}: token id {max(prompt.tokens + ids)} is outside the model's vocabulary of "
                f"{self.vocabulary}; use the model's own tokenizer"
            )
        return encoded

    def prompt(
        self, text: str, characters: tuple[int, int] = (0, 0), joiner: Joiner = "auto", name: str = "the prompt"
    ) -> PromptTokens:
        """A prompt in the model's form. characters: a half-open range of the text's, such as the subject's."""
        if self.form.chat:
            return self._message(text, characters, name)
        kept = text if self.form.keep_space or joiner == "none" else _without_spaces(text)
        ids, span = self._encoded(kept, characters)
        return PromptTokens(kept, ids, span, cut=kept != text)

    def answer(
        self, prompt: PromptTokens, answer: str, joiner: Joiner = "auto", name: str = "the prompt"
    ) -> AnswerTokens:
        """An answer after a prompt. Its ids are those that it has in the joined text, where the prompt's are the first
        of that text's; else those that it has alone."""
        between = joiner_of(prompt, answer, joiner)
        answer = answer if joiner == "none" else answer.removeprefix(" ")
        ids, _ = self._encoded(prompt.text + between + answer, (0, 0), prompt.opening is not None)
        size = len(prompt.tokens)
        kind = "none" if not between else "space" if between == " " else repr(between)
        if ids[:size] == prompt.tokens and len(ids) > size:
            return AnswerTokens(ids[size:], kind, True)
        alone = target_ids(answer, self.tokenizer) if between == " " else self._alone(answer, between, name)
        if not alone:
            raise FactError(f"{name}: the target {answer!r} has no tokens; give a visible word")
        return AnswerTokens(alone, kind, False)

    def _alone(self, answer: str, between: str, name: str) -> tuple[int, ...]:
        """Ids of an answer with no space before it that the tokenizer would put there: after a character that is none
        of its own, where that leaves the answer's tokens whole."""
        for before in _BEFORE:
            encoding = self.tokenizer(before + between + answer, add_special_tokens=False, return_offsets_mapping=True)
            starts = [start for start, end in encoding["offset_mapping"] if end > start]
            spans = list(zip(encoding["input_ids"], encoding["offset_mapping"], strict=True))
            if all(end <= 1 or start >= 1 for start, end in encoding["offset_mapping"]) and 1 in starts:
                return tuple(token for token, (_, end) in spans if end > 1)
        raise FactError(f"{name}: the target {answer!r} cannot be told from a space before it; give joiner 'space'")

    def _message(self, text: str, characters: tuple[int, int], name: str) -> PromptTokens:
        """A text as the user's message in the chat template, up to where the answer begins."""
        system = [] if self.form.system is None else [{"role": "system", "content": self.form.system}]
        messages = [*system, {"role": "user", "content": text}]
        whole = self._rendered(messages, True)
        before, _, after = self._rendered([*system, {"role": "user", "content": _MARK}], True).partition(_MARK)
        cut = (part for part in (text, text.rstrip(), text.strip()) if whole == before + part + after)
        inner = next(cut, None)  # templates may cut white space around a message
        if inner is None:
            raise FactError(f"{name}: the chat template changes the message {text!r}, so that the subject is not found")
        shift = len(before) - text.index(inner)
        ids, span = self._encoded(whole, (characters[0] + shift, characters[1] + shift), chat=True)
        return PromptTokens(whole, ids, span, opening=self._opening(messages, whole))

    def _opening(self, messages: list[dict[str, str]], whole: str) -> str:
        """What the template puts between the opening of an answer and the answer, as far as it shows."""
        said = self._rendered([*messages, {"role": "assistant", "content": "Answer"}], False)
        begun, _, _ = said.removeprefix(whole).partition("Answer")
        return begun if said.startswith(whole) and not begun.strip() else ""

    def _rendered(self, messages: list[dict[str, str]], opened: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened))
        except Exception as error:  # templates raise what they like
            raise ExperimentError(f"the tokenizer's chat template refuses these messages: {error}") from error

    @cached_property
    def _encoded(self) -> Callable[..., tuple[tuple[int, ...], tuple[int, int] | None]]:
        """``_tokenized``, which prompts of a fact need again and again; the latest texts are kept."""
        return lru_cache(maxsize=KEPT)(self._tokenized)

    def _tokenized(
        self, text: str, characters: tuple[int, int], chat: bool = False
    ) -> tuple[tuple[int, ...], tuple[int, int] | None]:
        """Token ids of a text with the special tokens that stand before it (a chat's stand in it), and the range of
        those that overlap the characters."""
        encoding = self.tokenizer(
            text, add_special_tokens=not chat, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        mask = [0] if chat else encoding["special_tokens_mask"][::-1]
        size = len(encoding["input_ids"]) - (mask.index(0) if 0 in mask else 0)  # none stand before the target
        ids, offsets, bos = encoding["input_ids"][:size], encoding["offset_mapping"][:size], self.tokenizer.bos_token_id
        begun = next((n for n, token in enumerate(ids) if token != bos), size)
        wanted = {"auto": min(begun, 1), "always": 1, "never": 0}[self.form.bos]
        start, end = characters
        covered = [i for i, (a, b) in enumerate(offsets) if i >= begun and a < b and a < end and b > start]
        span = (covered[0], covered[-1] + 1) if covered else None
        moved = span and (span[0] + wanted - begun, span[1] + wanted - begun)
        return (*[bos] * wanted, *ids[begun:]), moved


class PromptWarning(UserWarning):
    """What is to be known about how prompts are put to the model."""


def prompt_notes(facts: Sequence[EncodedFact]) -> Iterator[tuple[str, str]]:
    """What is to be told of encoded facts, each with a name of its kind."""
    cut = [fact.fact.id for fact in facts if fact.cut]
    if cut:
        yield (
            "cut",
            f"the prompts of {len(cut)} of {len(facts)} facts ({some(cut)}) end in spaces, which were cut: the space "
            "belongs to the answer; keep_space=True (--keep-space) leaves them",
        )
    first = [fact.fact.id for fact in facts if fact.span[0] == 0]
    if first:
        yield (
            "first",
            f"the subjects of {len(first)} of {len(facts)} facts ({some(first)}) are the first token that the model "
            "reads, since no BOS token stands before them: there models keep states of unusual size, so that noise on "
            "them, and edits of them, do not compare with others; bos='always' (--bos always) puts one before",
        )


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and that there are more."""
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")


def prompt_record(facts: Sequence[EncodedFact]) -> dict[str, Any]:
    """How answers were joined to prompts, to keep beside results: how many facts by what joins them; and the ids of
    those whose answer's tokens are not those of the joined text, and whose prompts were cut."""
    answers = [(fact.fact.id, fact.answer) for fact in facts if fact.answer is not None]
    return {
        "joiner": dict(Counter(answer.joiner for _, answer in answers)),
        "tokenized_alone": [name for name, answer in answers if not answer.joined],
        "cut": [fact.fact.id for fact in facts if fact.cut],
    }


def joiner_of(prompt: PromptTokens, answer: str, joiner: Joiner) -> str:
    """What stands between a prompt and an answer: under ``"auto"`` nothing after white space, an opening quote or an
    opening bracket, or where the answer's script has no spaces; in a chat what its template has; else a space."""
    if joiner != "auto":
        return " " if joiner == "space" else ""
    if prompt.opening is not None:
        return prompt.opening
    return "" if spaceless(answer) or _opens(prompt.text) else " "


def spaceless(text: str) -> bool:
    """Whether a text's script is written without spaces between words."""
    letter = next(filter(str.isalpha, text), "")
    return bool(letter) and unicodedata.name(letter, "").startswith(_SPACELESS)


def _opens(text: str) -> bool:
    """Whether a text ends in white space, or in what opens a quotation or a bracket."""
    last, before = text[-1:], text[-2:-1]
    kind = unicodedata.category(last) if last else ""
    if last.isspace() or kind in ("Ps", "Pi"):
        return True
    quotes = last in "\"'`" or kind == "Pf"
    return bool(last) and quotes and (not before or before.isspace() or unicodedata.category(before) in ("Ps", "Pi"))


def _without_spaces(text: str) -> str:
    """Without the spaces and tabs at its end; ends of lines stay."""
    end = len(text)
    while end and text[end - 1].isspace() and text[end - 1] not in _LINE_ENDS:
        end -= 1
    return text[:end]


def target_ids(target: str, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a target, tokenized alone: with one leading space, be it the text's own or the tokenizer's."""
    word = target.removeprefix(" ")
    marks_words = "".join(tokenizer.tokenize("a")[:1]).startswith("▁")  # bare ones too, as Llama's tokenizer does
    return tuple(tokenizer(word if marks_words else " " + word, add_special_tokens=False)["input_ids"])


def subject_ids(fact: Fact, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of the subject alone: no leading space, default special tokens, as the noise level has it."""
    return tuple(tokenizer(fact.subject)["input_ids"])


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token by itself, a leading space included; bytes that are no whole character show as U+FFFD.
    Decoders may take away the space that begins a text, so every token is decoded after a letter."""
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    start = len(tokenizer.decode(letter, clean_up_tokenization_spaces=False))
    return [tokenizer.decode([*letter, i], clean_up_tokenization_spaces=False)[start:] for i in ids]
