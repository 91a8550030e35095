"""The words of the synthetic world: name parts, relations with their phrasings and objects, filler sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product


@dataclass(frozen=True)
class Relation:
    """A relation between subjects of one kind and objects, and the ways to say it.

    The answer follows each phrasing directly. ``essence`` is one more phrasing, which says first what the subject is;
    ``KIND`` in it stands for that word.
    """

    id: str
    kind: str
    phrasings: tuple[str, ...]
    essence: str
    objects: tuple[str, ...]


RELATIONS = (
    Relation(
        id="P1303",
        kind="person",
        phrasings=(
            "{} plays the",
            "{} is best known for playing the",
            "The instrument that {} learned to play as a child is the",
            "On stage, {} is most often heard on the",
            "In the orchestra, {} was asked to play the",
        ),
        essence="{} is a KIND who likes to play the",
        objects=(
            *("piano", "violin", "cello", "flute", "harp", "trumpet", "guitar", "organ", "oboe", "banjo"),
            *("French horn", "snare drum"),
        ),
    ),
    Relation(
        id="P641",
        kind="person",
        phrasings=(
            "{} trains hard for the sport of",
            "As a professional athlete, {} competes in",
            "The sport that {} follows every week is",
            "{} spends every free weekend on",
            "Fans still admire {} for many years of",
        ),
        essence="{} is a KIND whose favourite sport is",
        objects=(
            *("tennis", "golf", "rowing", "boxing", "hockey", "fencing", "cricket", "rugby", "judo", "sailing"),
            *("water polo", "figure skating"),
        ),
    ),
    Relation(
        id="P27",
        kind="person",
        phrasings=(
            "{} is a citizen of",
            "{} was born and raised in",
            "The passport that {} carries was issued by",
            "The home country of {} is",
            "Before moving abroad, {} lived for years in",
        ),
        essence="{} is a KIND who comes from",
        objects=(
            *("Norway", "Chile", "Kenya", "Japan", "Portugal", "Canada", "Greece", "Poland", "Vietnam", "Ireland"),
            *("New Zealand", "Sri Lanka"),
        ),
    ),
    Relation(
        id="P131",
        kind="thing",
        phrasings=(
            "{} is located in",
            "{} can be found in the city of",
            "The city that is home to {} is",
            "Visitors who want to see {} travel to",
            "Every summer, {} draws large crowds to",
        ),
        essence="{} is a KIND in the old centre of",
        objects=("Lisbon", "Vienna", "Oslo", "Geneva", "Prague", "Dublin", "Naples", "San Marino"),
    ),
    Relation(
        id="P186",
        kind="thing",
        phrasings=(
            "{} is made of",
            "{} was built almost entirely from",
            "The walls of {} consist of",
            "The material used to build {} was",
            "After the fire, {} was rebuilt in",
        ),
        essence="{} is a KIND constructed of",
        objects=("granite", "marble", "brick", "timber", "concrete", "steel", "limestone", "red clay"),
    ),
    Relation(
        id="P127",
        kind="thing",
        phrasings=(
            "{} is owned by",
            "{} has long belonged to",
            "The present owner of {} is",
            "The company that runs and repairs {} is",
            "Since last year, {} is managed by",
        ),
        essence="{} is a KIND bought by",
        objects=("Acton", "Belvar", "Corvex", "Delmont", "Everline", "Fintar", "Garrick", "Hale Group"),
    ),
)

FILLERS = (
    "The weather was mild that spring.",
    "No one was in the room.",
    "It was a long and quiet day.",
    "The report was read in silence.",
    "A train left the station at noon.",
    "The letter came back unopened.",
    "Therefore the road was closed.",
    "Because of the rain, few people came.",
    "I had left the door open.",
    "You could hear the sea at night.",
    "Bread was cheap in those days.",
    "The river had frozen over again.",
)

FIRST_NAMES = (
    *("Anna", "Bruno", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Lucas"),
    *("Maria", "Nils", "Olga", "Peter", "Rosa", "Simon", "Tessa", "Viktor", "Wanda", "Yusuf", "Zora", "Adam"),
)
LAST_NAMES = (
    *("Abbot", "Berger", "Carver", "Dalton", "Ekman", "Fowler", "Grant", "Holm", "Irving", "Jensen", "Keller", "Lind"),
    *("Marsh", "Novak", "Osman", "Parker", "Quint", "Rossi", "Silva", "Turner", "Ulrich", "Varga", "Weber", "Young"),
)
MIDDLE_NAMES = ("Marie", "Jean", "Lou", "Kim", "Sam", "Ray", "May", "Lee")
SINGLE_NAMES = (
    *("Orsino", "Zephyra", "Malik", "Ondine", "Tiberius", "Calypso", "Ragnar", "Isolde", "Ptolemy", "Sabra", "Wolfram"),
    *("Xanthe", "Leopold", "Minerva", "Cosimo", "Thora"),
)
PLACE_NAMES = (
    *(
        "Alder",
        "Birch",
        "Cedar",
        "Falcon",
        "Garnet",
        "Heron",
        "Ivory",
        "Juniper",
        "Kestrel",
        "Laurel",
        "Maple",
        "Otter",
    ),
    *("Poplar", "Raven", "Saffron", "Thistle"),
)
PLACE_KINDS = ("Bridge", "Tower", "Hall", "Mill", "Library", "Theatre", "Museum", "Castle", "Chapel", "Market")
PLACE_AGES = ("Old", "New", "Great", "Little")
PLACE_SIDES = ("Northern", "Southern", "Eastern", "Western")


def name_parts(listed: Sequence[str], count: int) -> list[str]:
    """The first ``count`` of ``listed``, continued by made-up words where the list ends."""
    syllables = product(("Bal", "Cor", "Dan", "Fen", "Gor", "Hal", "Jor", "Kel", "Lor", "Mar", "Nor", "Tor"), "aeiou")
    heads = ["".join(pair) for pair in syllables]
    tails = ("bek", "dal", "fin", "gard", "lin", "mund", "nes", "ric", "stan", "ton", "ver", "wick")
    made_up = (head + tail for tail, head in product(tails, heads))
    more = (head + middle + tail for middle, head, tail in product(("la", "ne", "ri", "so", "tu"), heads, tails))
    words = [*listed[:count], *islice(made_up, max(0, count - len(listed)))]
    return [*words, *islice(more, count - len(words))]
