"""Entropy of generated texts, their likeness to reference texts, and the file of these."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from causalcone.engine.edit.scoring.generation_metrics import ReferenceScorer, generation_entropy, words
from causalcone.engine.errors import ExperimentError, FactError
from causalcone.engine.facts import Fact
from causalcone.runners.inputs.reference_texts import load_reference_texts


def test_words() -> None:
    assert words("Don't stop: O\u2019Neal's Straße, no. 7!") == [
        "Don't", "stop", ":", "O\u2019Neal's", "Straße", ",", "no", ".", "7", "!",
    ]  # fmt: skip
    assert words("") == words(" \n") == []
    assert words("'a' b-c 'tis") == ["'", "a", "'", "b", "-", "c", "'", "tis"]


def entropy(*counts: int) -> float:
    return -sum(count / sum(counts) * math.log2(count / sum(counts)) for count in counts)


def test_entropy_by_hand() -> None:
    # bigrams ab, ba, ab; trigrams aba, bab
    assert generation_entropy(["a b a b"]) == pytest.approx((2 / 3 * entropy(2, 1) + 4 / 3 * 1) / 2)
    # four different bigrams, three different trigrams
    assert generation_entropy(["one two , three ."]) == pytest.approx((2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    mean = generation_entropy(["a b a b", "one two , three ."])
    assert mean == pytest.approx((generation_entropy(["a b a b"]) + generation_entropy(["one two , three ."])) / 2)


def test_repeated_and_short_texts_have_no_entropy() -> None:
    assert generation_entropy(["no no no no no no"]) == 0
    assert [generation_entropy([text]) for text in ("", "word", "two words")] == [0, 0, 0]
    assert generation_entropy(["three words here"]) == pytest.approx(2 / 3 * 1 / 2)  # two bigrams, one trigram
    with pytest.raises(ExperimentError, match="there are no texts"):
        generation_entropy([])


@given(st.lists(st.sampled_from("abc"), max_size=40))
def test_entropy_against_a_plain_count(letters: list[str]) -> None:
    expected = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = Counter(tuple(letters[i : i + n]) for i in range(len(letters) - n + 1))
        expected += weight * entropy(*grams.values()) / 2
    found = generation_entropy([" ".join(letters)])
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0 <= found <= math.log2(max(2, len(letters)))


CORPUS = ["red apples and green pears", "green cars", "red cars and red houses"]


def weighted(text: str) -> dict[str, float]:
    """Words of two letters or more, by count x (ln((1 + texts) / (1 + texts with it)) + 1)."""
    found = Counter(word for word in text.lower().split() if any(word in other.split() for other in CORPUS))
    having = {word: sum(word in other.split() for other in CORPUS) for word in found}
    return {word: count * (math.log((1 + len(CORPUS)) / (1 + having[word])) + 1) for word, count in found.items()}


def test_reference_score_by_hand() -> None:
    a, b = weighted("Red cars red house pears"), weighted("green pears cars cars and")
    cosine = sum(a[word] * b.get(word, 0) for word in a) / (math.hypot(*a.values()) * math.hypot(*b.values()))
    scorer = ReferenceScorer(CORPUS)
    assert scorer.score(["Red cars red", "house pears"], ["green pears", "cars cars and"]) == pytest.approx(cosine)
    assert 0.1 < cosine < 0.9


def test_reference_score_at_its_ends() -> None:
    scorer = ReferenceScorer(CORPUS)
    assert scorer.score(["red", "cars"], ["Cars, red!"]) == pytest.approx(1)
    assert scorer.score(["red cars"], ["green pears"]) == 0
    assert scorer.score(["unknown words"], CORPUS) == scorer.score([""], [""]) == 0


@given(
    st.lists(st.sampled_from([*" ".join(CORPUS).split(), "other"]), min_size=1),
    st.lists(st.sampled_from(CORPUS), min_size=1),
)
def test_reference_score_is_a_cosine(generated: list[str], references: list[str]) -> None:
    score = SCORER.score(generated, references)
    assert 0 <= score <= 1
    assert score == pytest.approx(SCORER.score(references, generated))


SCORER = ReferenceScorer(CORPUS)


def test_what_cannot_be_scored() -> None:
    for corpus in ([], ["", "a !"]):
        with pytest.raises(ExperimentError, match="of the corpus cannot weigh words"):
            ReferenceScorer(corpus)
    with pytest.raises(ExperimentError, match="there are no generations"):
        SCORER.score([], CORPUS)
    with pytest.raises(ExperimentError, match="there are no references"):
        SCORER.score(CORPUS, [])


def test_the_library_is_loaded_only_where_it_is_used() -> None:
    code = "import causalcone.engine.edit.scoring.generation_metrics, sys; print('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


SNIPPETS: list[dict[str, Any]] = [
    {"relation_id": "P1", "target_id": "Q1", "samples": [{"name": "x", "text": "One."}, {"text": "Two."}]},
    {"relation_id": "P1", "target_id": "Q2", "samples": []},
    {"relation_id": "P2", "target_id": "Q1", "samples": [{"text": "Three."}]},
    {"relation_id": "P1", "target_id": "Q1", "samples": [{"text": "Four."}]},
]


def snippets_file(folder: Path, content: Any) -> Path:
    path = folder / "snippets.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def fact(relation: str | None, target: str | None) -> Fact:
    return Fact(
        "7", "{} is", "Bo", "x", target_new="y", relation_id=relation, target_true_id="Q1", target_new_id=target
    )


def test_reference_texts(tmp_path: Path) -> None:
    texts = load_reference_texts(snippets_file(tmp_path, SNIPPETS))
    assert texts.of(fact("P1", "Q1")) == ("One.", "Two.", "Four.")
    assert texts.of(fact("P2", "Q1")) == ("Three.",)
    assert sorted(texts.corpus) == ["Four.", "One.", "Three.", "Two."]


@pytest.mark.parametrize(
    ("relation", "target", "message"),
    [
        ("P1", "Q2", "fact '7': there are no reference texts of relation P1 and target Q2"),
        ("P3", "Q1", "fact '7': there are no reference texts of relation P3 and target Q1"),
        (None, "Q1", "fact '7' has no relation_id"),
        ("P1", None, "fact '7' has no target_new_id"),
    ],
)
def test_facts_without_reference_texts(tmp_path: Path, relation: str | None, target: str | None, message: str) -> None:
    texts = load_reference_texts(snippets_file(tmp_path, SNIPPETS))
    with pytest.raises(FactError, match=message):
        texts.of(fact(relation, target))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", r"snippets.json is not JSON: .* at line 1, column 2"),
        ("[" * 100_000, "nested too deeply"),
        ({"relation_id": "P1"}, "is not a list of attribute snippets"),
        ([*SNIPPETS, 3], r"snippets.json: entry 4: it: "),
        ([{"relation_id": "P1", "samples": []}], "entry 0: target_id: Field required"),
        ([{"relation_id": "P1", "target_id": "Q1", "samples": [{"name": "x"}]}], r"entry 0: samples\.0\.text: "),
        ([{"relation_id": "P1", "target_id": 5, "samples": []}], "entry 0: target_id: Input should be a valid string"),
    ],
)
def test_files_without_reference_texts(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(FactError, match=message):
        load_reference_texts(snippets_file(tmp_path, content))
    with pytest.raises(FactError, match=r"nowhere.json does not exist"):
        load_reference_texts(tmp_path / "nowhere.json")
