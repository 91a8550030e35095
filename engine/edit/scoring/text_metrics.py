"""What generated texts are measured by: entropy of their n-grams, and likeness to reference texts (METHODS 5)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from causalcone.engine.errors import ExperimentError

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*|[^\w\s]")
_ENTROPY_WEIGHTS = {2: 2 / 3, 3: 4 / 3}


def words(text: str) -> list[str]:
    """The words of a text as they are written, contractions whole, and every other sign but space as a word of its own.

    Published code splits words as the Penn Treebank does, which also takes contractions apart.
    """
    return _WORD.findall(text)


def generation_entropy(texts: Sequence[str]) -> float:
    """Meng et al. 2022's generation entropy in bits, low where a model repeats itself: for each text the mean of 2/3 of
    the entropy of its bigrams and 4/3 of that of its trigrams, averaged over texts.

    A text too short to have n-grams has an entropy of 0 for them. Raises ``ExperimentError`` for no texts.
    """
    if not texts:
        raise ExperimentError("there are no texts; give at least one generated text")
    entropies = (weight * _entropy(words(text), n) for text in texts for n, weight in _ENTROPY_WEIGHTS.items())
    return math.fsum(entropies) / len(_ENTROPY_WEIGHTS) / len(texts)


def _entropy(of: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(of[start:] for start in range(n)), strict=False)).values()
    total = sum(counts)
    return math.fsum(count / total * math.log2(total / count) for count in counts)


class ReferenceScorer:
    """Meng et al. 2022's reference score: how like reference texts generated ones are.

    ``corpus`` are the texts that words are weighed by, published all reference texts of a data set: its words are the
    vocabulary, and the fewer of its texts have one, the more it weighs (inverse document frequency, smoothed).
    Words are lower-cased and of two letters or digits at least. Raises ``ExperimentError`` for a corpus without words.
    """

    def __init__(self, corpus: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import, and few need it

        self._vectorizer = TfidfVectorizer()
        try:
            self._vectorizer.fit(corpus)
        except ValueError as error:
            raise ExperimentError(f"the {len(corpus)} texts of the corpus cannot weigh words: {error}") from error

    def score(self, generations: Sequence[str], references: Sequence[str]) -> float:
        """The cosine, in [0, 1], between the weighted word counts of all generations and of all references; 0 where one
        side has no word of the vocabulary. Raises ``ExperimentError`` where one has no texts."""
        for texts, what in ((generations, "generations"), (references, "references")):
            if not texts:
                raise ExperimentError(f"there are no {what}; give at least one text")
        vectors = self._vectorizer.transform([" ".join(generations), " ".join(references)])
        generated, reference = vectors.toarray()  # of length 1, or 0
        return min(1.0, float(generated @ reference))
