"""The words of the synthetic world: name parts, relations with their phrasings and objects, filler sentences."""

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice, product


@dataclass(frozen=True)
class Relation:
    """A relation between subjects of one kind and objects, and the ways to say it. The answer follows each phrasing
    directly. ``essence`` is one more phrasing, which says first what the subject is; ``KIND`` in it stands for that
    word."""

    id: str
    kind: str
    phrasings: tuple[str, ...]
    essence: str
    objects: tuple[str, ...]


WORDS = tomllib.loads(files("causalcone.runners").joinpath("demo/words.toml").read_text(encoding="utf-8"))

RELATIONS = tuple(
    Relation(**{**words, "phrasings": tuple(words["phrasings"]), "objects": tuple(words["objects"])})
    for words in WORDS["relations"]
)

FILLERS = tuple(WORDS["fillers"])


def name_parts(kind: str, count: int) -> list[str]:
    """The first ``count`` words of a ``kind`` such as ``"first_names"``, then made-up ones where the list ends."""
    syllables = product(("Bal", "Cor", "Dan", "Fen", "Gor", "Hal", "Jor", "Kel", "Lor", "Mar", "Nor", "Tor"), "aeiou")
    heads = ["".join(pair) for pair in syllables]
    tails = ("bek", "dal", "fin", "gard", "lin", "mund", "nes", "ric", "stan", "ton", "ver", "wick")
    made_up = (head + tail for tail, head in product(tails, heads))
    more = (head + middle + tail for middle, head, tail in product(("la", "ne", "ri", "so", "tu"), heads, tails))
    known = WORDS[kind]
    words = [*known[:count], *islice(made_up, max(0, count - len(known)))]
    return [*words, *islice(more, count - len(words))]
