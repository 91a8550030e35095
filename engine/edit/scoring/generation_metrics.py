"""Metrics of what edited models write: n-gram entropy, and likeness to texts about the new target (docs/editing.md,
"Scores")."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from causalcone.engine.edit.methods.edits import Edit
from causalcone.engine.edit.requests.prompts import Encoder
from causalcone.engine.edit.scoring.metrics import Row
from causalcone.engine.edit.scoring.sampled_texts import generated, generation_prompts
from causalcone.engine.edit.scoring.written import OpenPrompt, Written, before_and_after
from causalcone.engine.errors import ExperimentError
from causalcone.engine.facts import Fact
from causalcone.engine.run.session import Session

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")
_ENTROPY_WEIGHTS = {2: 2 / 3, 3: 4 / 3}


def words(text: str) -> list[str]:
    """The words of a text, contractions whole (unlike Penn Treebank's), and every other character but space as one."""
    return _WORD.findall(text)


def generation_entropy(texts: Sequence[str]) -> float:
    """Meng et al. 2022's generation entropy in bits, low where a model repeats itself: the mean over texts of that of
    2/3 of the entropy of its bigrams and 4/3 of that of its trigrams (0 for a text too short to have any)."""
    if not texts:
        raise ExperimentError("there are no texts; give at least one generated text")
    entropies = (weight * _entropy(words(text), n) for text in texts for n, weight in _ENTROPY_WEIGHTS.items())
    return math.fsum(entropies) / len(_ENTROPY_WEIGHTS) / len(texts)


def _entropy(tokens: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(tokens[start:] for start in range(n)), strict=False)).values()
    total = sum(counts)
    return math.fsum(count / total * math.log2(total / count) for count in counts)


class ReferenceScorer:
    """Meng et al. 2022's reference score: how similar generated texts are to reference texts.

    The fewer texts of ``corpus`` (in published code all reference texts of a data set) have a word, the more it weighs
    (smoothed inverse document frequency). Words are lower-cased and have two or more letters or digits.
    """

    def __init__(self, corpus: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import, and few need it

        self._vectorizer = TfidfVectorizer()
        try:
            self._vectorizer.fit(corpus)
        except ValueError as error:
            raise ExperimentError(f"the {len(corpus)} texts of the corpus cannot weigh words: {error}") from error

    def score(self, generations: Sequence[str], references: Sequence[str]) -> float:
        """The cosine, in [0, 1], between the weighted word counts of both; 0 where one has no word of the corpus."""
        for name, texts in (("generations", generations), ("references", references)):
            if not texts:
                raise ExperimentError(f"there are no {name}; give at least one text")
        vectors = self._vectorizer.transform([" ".join(generations), " ".join(references)])
        generated, reference = vectors.toarray()  # of length 1, or 0
        return min(1.0, float(generated @ reference))


class References(Protocol):
    """Texts about targets: those about a fact's new target, and all of them (``corpus``)."""

    def of(self, fact: Fact) -> Sequence[str]: ...

    @property
    def corpus(self) -> Sequence[str]: ...


def generations(session: Session, edits: Sequence[Edit], seed: int, encoder: Encoder) -> Iterator[Written]:
    """What the model writes after the facts' generation prompts, before and after edits."""
    return before_and_after(
        edits,
        lambda request: generation_prompts(session, encoder, request, seed),
        lambda prompts, deltas: generated(session, prompts, deltas),
    )


def generation_rows(written: Iterable[Written], scoring: tuple[References, ReferenceScorer] | None) -> Iterator[Row]:
    """The metrics of texts that ``generations`` gives."""
    for each in written:
        edit_id, pre = each.edit.edit_id, _whole(each.prompts, each.before)
        post = None if each.after is None else _whole(each.prompts, each.after)
        entropy = None if post is None else generation_entropy(post)
        yield edit_id, "generation_entropy", generation_entropy(pre), entropy
        if scoring is not None:
            references, scorer = scoring
            texts = references.of(each.edit.request.fact)
            score = None if post is None else scorer.score(post, texts)
            yield edit_id, "reference_score", scorer.score(pre, texts), score


def _whole(prompts: Sequence[OpenPrompt], written: Sequence[str]) -> list[str]:
    return [each.prompt + text for each, text in zip(prompts, written, strict=True)]
