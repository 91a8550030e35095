"""Contexts: texts sampled from the unedited model that are put before prompts in editing (docs/editing.md, "Second
moments and contexts")."""

from collections.abc import Sequence
from dataclasses import dataclass

from causalcone.engine.edit.runs.decoding import continuations, text_seed
from causalcone.engine.edit.runs.packed_runs import Text
from causalcone.engine.errors import ExperimentError
from causalcone.engine.run.session import Session

TOP_K = 5
ROME_TOKENS = (5,) * 10 + (10,) * 10
MEMIT_WORDS = ("The", "Therefore", "Because", "I", "You")
MEMIT_TOKENS = 10
ATTEMPTS = 100


@dataclass(frozen=True)
class Contexts:
    """Texts that ROME and MEMIT put before a prompt, ``"{text}. {prompt}"``, in addition to the bare prompt.

    Attributes:
        rome: Texts for ROME.
        memit: Texts for MEMIT.
    """

    rome: tuple[str, ...]
    memit: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("rome", "memit"):
            object.__setattr__(self, name, check_contexts(getattr(self, name)))


def check_contexts(texts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ExperimentError(f"contexts are {texts!r}; give a list of texts, or None to sample them from the model")
    return tuple(texts)


def sample_contexts(session: Session, seed: int) -> Contexts:
    """Texts whose tokens are each one of the five likeliest, the same for a model and a seed.

    ROME's are 10 texts of 5 tokens and 10 of 10, begun from the BOS token (else the EOS token), MEMIT's 5 of 10, each
    begun from a word. All tokens that run through the model count, special ones too, as in published code; the texts
    are without special tokens and braces. A text of nothing but white space is sampled again.
    """
    start = start_token(session)
    begun: list[tuple[str, tuple[int, ...], int]] = [("", (start,), total) for total in ROME_TOKENS]
    begun += [(word, session.prompts.text.prompt(word).tokens, MEMIT_TOKENS) for word in MEMIT_WORDS]
    texts = [""] * len(begun)
    for attempt in range(ATTEMPTS):
        missing = [number for number, text in enumerate(texts) if not text.strip()]
        if not missing:
            return Contexts(tuple(texts[: len(ROME_TOKENS)]), tuple(texts[len(ROME_TOKENS) :]))
        seeds = [text_seed(seed, "context", number, attempt) for number in missing]
        beginnings = [Text(begun[number][1]) for number in missing]
        lengths = [max(0, begun[number][2] - len(begun[number][1])) for number in missing]
        new = continuations(session, beginnings, lengths, top_k=TOP_K, seeds=seeds)
        for number, tokens in zip(missing, new, strict=True):
            words, ids, _ = begun[number]
            texts[number] = (words + continued(session, ids, tokens)).replace("{", "").replace("}", "")
    raise ExperimentError(
        f"the model says nothing but white space after its token {start} ({ATTEMPTS} tries); give contexts of your own"
    )


def continued(session: Session, tokens: Sequence[int], new: Sequence[int]) -> str:
    """The text that new tokens add to those before, without special tokens: decoders may begin texts differently."""

    def text(ids: Sequence[int]) -> str:
        return str(session.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    return text([*tokens, *new])[len(text(tokens)) :]


def start_token(session: Session) -> int:
    """The token that begins texts: BOS, else EOS."""
    tokenizer, vocabulary = session.tokenizer, session.sizes.vocabulary
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            if token >= vocabulary:
                raise ExperimentError(
                    f"the tokenizer's token {token}, which begins texts, is outside the model's vocabulary of "
                    f"{vocabulary}; use the model's own tokenizer, or give contexts of your own"
                )
            return int(token)
    raise ExperimentError("the tokenizer has neither a BOS nor an EOS token to begin texts from; give contexts")
