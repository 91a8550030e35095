"""Records of the formats of fact files, with the fields that these are documented to have, and files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from causalcone.engine.facts import Fact
from causalcone.runners.facts.files import load_facts
from helpers.fact_records import COUNTERFACT

_MOTHER = {
    "prompt": "The name of the mother of Leonardo DiCaprio is",
    "answers": [{"value": "Irmelin DiCaprio", "aliases": ["Irmelin Indenbirken"]}],
    "query_type": "regular",
    "subject_id": "Q38111",
    "relation": "MOTHER",
    "target_ids": ["Q22984557"],
    "phrase": None,
}
_ALIAS = {
    "prompt": "The country of Leo is",
    "answers": [{"value": "Syria", "aliases": ["Syrian Arab Republic"]}],
    "query_type": "regular",
    "subject_id": "Q38111",
    "relation": "COUNTRY_OF_CITIZENSHIP",
    "target_ids": ["Q858"],
    "phrase": "The country of Leo is",
}
_CHILD = {
    "prompt": "The name of the child of George DiCaprio is",
    "answers": [{"value": "Leonardo DiCaprio", "aliases": []}],
    "query_type": "regular",
    "subject_id": "Q1",
    "relation": "CHILD",
    "target_ids": ["Q38111"],
    "phrase": None,
}
_TWO_HOP = {
    "prompt": "The country of the child of George DiCaprio is",
    "answers": [{"value": "Syria", "aliases": []}],
    "query_type": "two_hop",
    "subject_id": "Q1",
    "relation": "CHILD",
    "target_ids": "Q38111",
    "second_relation": "COUNTRY_OF_CITIZENSHIP",
    "second_hop_target_ids": ["Q858"],
    "phrase": "The country of the child of George DiCaprio is",
}
RIPPLE: dict[str, Any] = {
    "example_type": "popular",
    "edit": {
        "prompt": "The country of Leonardo DiCaprio is Syria.",
        "subject_id": "Q38111",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "target_id": "Q858",
        "original_fact": {
            "prompt": "The country of Leonardo DiCaprio is USA.",
            "subject_id": "Q38111",
            "relation": "COUNTRY_OF_CITIZENSHIP",
            "target_id": "Q30",
        },
    },
    "Relation_Specifity": [{"test_queries": [_MOTHER], "test_condition": "OR", "condition_queries": [_MOTHER]}],
    "Logical_Generalization": [{"test_queries": [_MOTHER, _CHILD], "test_condition": "AND", "condition_queries": []}],
    "Subject_Aliasing": [{"test_queries": [_ALIAS], "test_condition": "OR", "condition_queries": []}],
    "Compositionality_I": [],
    "Compositionality_II": [{"test_queries": [_TWO_HOP], "test_condition": "OR", "condition_queries": [_CHILD]}],
    "Forgetfulness": [],
}
MQUAKE: dict[str, Any] = {
    "case_id": 2500,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "target_new": {"str": "Libya", "id": "Q1016"},
            "target_true": {"str": "United States of America", "id": "Q30"},
            "subject": "Vince McMahon",
            "question": "What is the country of citizenship of Vince McMahon?",
        },
        {
            "prompt": "The capital of {} is",
            "relation_id": "P36",
            "target_new": {"str": "Franklin", "id": "Q1778943"},
            "target_true": {"str": "Tripoli", "id": "Q3579"},
            "subject": "Libya",
            "question": "What is the capital of Libya?",
        },
    ],
    "questions": ["What is the capital of the country that the CEO of WWE is from?", "Second?", "Third?"],
    "answer": "Washington, D.C.",
    "answer_alias": ["Washington"],
    "new_answer": "Franklin",
    "new_answer_alias": ["Franklin, Kentucky"],
    "single_hops": [{"question": "Who leads WWE?", "cloze": "WWE is led by", "answer": "V", "answer_alias": []}],
    "new_single_hops": [
        {"question": "Who leads WWE?", "cloze": "WWE is led by", "answer": "Vince McMahon", "answer_alias": ["Vince"]}
    ],
    "orig": {"triples": []},
}
KNOWEDIT: dict[str, Any] = {
    "subject": "Leo Arons",
    "prompt": "The place of death of Leo Arons is",
    "target_new": "Berlin",
    "ground_truth": ["Vienna", "Wien"],
    "rephrase_prompt": "Leo Arons died in",
    "cond": "unused",
    "portability": {
        "Logical_Generalization": [{"prompt": "Is Leo Arons alive?", "ground_truth": [["no"], ["is dead"]]}],
        "Reasoning": [
            {"prompt": "The mayor of the place of death is", "ground_truth": [["Kai Wegner", "Kai Peter Wegner"]]}
        ],
    },
    "locality": {"Relation_Specificity": [{"prompt": "The father of Leo Arons is", "ground_truth": "Albert Arons"}]},
}
WIKIBIO: dict[str, Any] = {
    "text": "This is a passage about john russell reynolds. He was",
    "labels": "a physician.",
    "concept": "john russell reynolds",
    "locality": {"Relation_Specificity": [{"prompt": "His field is", "ground_truth": ["medicine"]}]},
}
EASYEDIT: dict[str, Any] = {  # counterfact-edit.json
    "case_id": 2,
    "prompt": "Toko Yasuda, the",
    "target_new": "piano",
    "subject": "Toko Yasuda",
    "ground_truth": "guitar",
    "rephrase_prompt": "Toko Yasuda is incredible at",
    "locality_prompt": "John Lennon performs on the",
    "locality_ground_truth": "guitar",
}
REQUEST: dict[str, Any] = {  # of EasyEdit's editor
    "prompt": "The capital of France is",
    "target_new": "Rome",
    "subject": "France",
    "ground_truth": "Paris",
    "portability": {"one_hop": {"prompt": ["The capital of the country of Lyon is"], "ground_truth": ["Rome"]}},
    "locality": {"neighborhood": {"prompt": ["Spain's is", "Italy's is"], "ground_truth": ["Madrid", "Rome"]}},
}
ZSRE: dict[str, Any] = {
    "subject": "Christiane Cohendy",
    "src": "What is the native language of Christiane Cohendy?",
    "pred": "",
    "rephrase": "What was Christiane Cohendy's mother tongue?",
    "alt": "German",
    "answers": ["French", "Français"],
    "loc": "nq question: where do swallows go",
    "loc_ans": "Africa",
    "cond": "French >> German || What?",
    "portability": {
        "Recalled Relation": "x",
        "New Question": "Where is it spoken?",
        "New Answer": "Germany",
    },
}
ZSRE_LIFELONG: dict[str, Any] = {  # RLEdit's, UltraEdit's
    "subject": "Watts Humphrey",
    "src": "What university did Watts Humphrey attend?",
    "rephrase": "Where did Watts Humphrey study?",
    "ans": "University of Michigan",
    "loc": "nq question: who sang",
    "loc_ans": "A",
}
WIKIBIGEDIT: dict[str, Any] = {
    "tag": "P1",
    "subject": "Kurt Denk",
    "update": "What is the field of Kurt Denk?",
    "ans": "ecology",
    "rephrase": "In what does Kurt Denk work?",
    "personas": "Captain's log: what is the field of Kurt Denk?",
    "loc": "Who wrote Emma?",
    "loc_ans": "Jane Austen",
    "mhop": "What studies the field of Kurt Denk?",
    "mhop_ans": "ecologists",
}
ULTRAEDIT: dict[str, Any] = {
    "subject": "Åse Lund",
    "prompt": "Where was Åse Lund born?",
    "ans": "Lima",
    "rephrase_prompt": "Åse Lund's birthplace is?",
    "loc": "Who wrote Emma?",
    "loc_ans": "Jane Austen",
}
KNOWN: dict[str, Any] = {
    "known_id": 5,
    "subject": "Rome",
    "attribute": "Italy",
    "template": "{} lies in",
    "prompt": "Rome lies in",
    "relation_id": "P17",
}
OWN: dict[str, Any] = {
    "id": "a",
    "prompt": "{} plays",
    "subject": "Ann Lee",
    "target_true": "tennis",
    "target_new": "golf",
    "probes": [{"group": "portability/sport", "prompt": "Ann Lee's ball is", "answers": ["white"], "every": True,
                "conditions": [{"prompt": "A golf ball is", "answers": ["white"]}]}],
}  # fmt: skip

FORMATS: dict[str, list[dict[str, Any]]] = {
    "counterfact": [COUNTERFACT],
    "mquake": [MQUAKE],
    "rippleedits": [RIPPLE],
    "zsre": [ZSRE, {**ZSRE, "answers": ["Dutch"]}],
    "known": [KNOWN],
    "knowedit": [KNOWEDIT],
    "wikibio": [WIKIBIO],
    "wikibigedit": [WIKIBIGEDIT],
    "easyedit": [EASYEDIT],
    "request": [REQUEST],
    "ultraedit": [ULTRAEDIT],
    "zsre of lifelong editing": [ZSRE_LIFELONG],
    "fact": [OWN],
}
"""By name, records of a file of the format."""


def write(folder: Path, content: Any, name: str = "facts.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def load(folder: Path, *content: Any, **options: Any) -> list[Fact]:
    """The facts of a file that holds these records."""
    return load_facts(write(folder, content), **options)
