"""The synthetic world: what its generator writes and what the training text holds."""

import json
from collections import Counter, defaultdict

import pytest

from causalcone.runners.demo.model import END_OF_TEXT, train_tokenizer
from causalcone.runners.demo.words import RELATIONS
from causalcone.runners.demo.world import World
from causalcone.runners.facts.files import load_facts


@pytest.fixture(scope="module")
def world():
    return World.generate()


@pytest.fixture(scope="module")
def bpe(world):
    return train_tokenizer(world)


@pytest.fixture(scope="module")
def sayings(world):
    """Who is meant in which relation, by the text of a prompt."""
    return {
        phrasing.replace("{}", subject.name): (relation.id, subject.name)
        for relation in RELATIONS
        for phrasing in relation.phrasings
        for subject in world.subjects
        if subject.kind == relation.kind
    }


@pytest.fixture(scope="module")
def truths(world):
    """The object of (relation, subject)."""
    return {(fact.relation_id, fact.subject): fact.target_true for fact in world.facts}


def test_same_seed_same_world(world):
    assert World.generate() == world
    assert World.generate(seed=1).facts != world.facts


def test_size(world):
    assert len(world.subjects) == len({subject.name for subject in world.subjects}) == 240
    assert len(world.facts) == len({fact.id for fact in world.facts}) == 720
    assert len({(fact.relation_id, fact.subject) for fact in world.facts}) == 720


def test_each_subject_has_one_fact_per_relation_of_its_kind(world):
    relations = defaultdict(set)
    for fact, owner in zip(world.facts, world.owners, strict=True):
        assert fact.subject == world.subjects[owner].name
        relations[owner].add(fact.relation_id)
    for owner, subject in enumerate(world.subjects):
        assert relations[owner] == {relation.id for relation in RELATIONS if relation.kind == subject.kind}


def test_the_first_facts_are_of_all_relations(world):
    assert {fact.relation_id for fact in world.facts[:40]} == {relation.id for relation in RELATIONS}
    assert [int(fact.id) for fact in world.facts] == list(range(len(world.facts)))


def test_objects_are_shared_by_many_subjects(world):
    holders = Counter((fact.relation_id, fact.target_true) for fact in world.facts)
    assert len(holders) == sum(len(relation.objects) for relation in RELATIONS)
    assert min(holders.values()) > 10


def test_no_part_of_a_name_gives_it_away(world):
    """Every word of a name of several words stands in other names too."""
    words = Counter(word for subject in world.subjects for word in set(subject.name.split()))
    longer = [subject.name.split() for subject in world.subjects if " " in subject.name]
    shared = [name for name in longer if all(words[word] > 1 for word in name)]
    assert len(shared) > 0.95 * len(longer) > 0.85 * len(world.subjects)


def test_records_have_the_whole_schema(world):
    for record, fact in zip(world.records(), world.facts, strict=True):
        assert set(record) == {
            *("case_id", "pararel_idx", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts"),
            *("attribute_prompts", "generation_prompts"),
        }
        rewrite = record["requested_rewrite"]
        assert set(rewrite) == {"prompt", "relation_id", "target_new", "target_true", "subject"}
        assert rewrite["target_true"] == {"str": fact.target_true, "id": fact.target_true_id}
        assert rewrite["target_new"] == {"str": fact.target_new, "id": fact.target_new_id}
        assert fact.target_new != fact.target_true
        assert rewrite["prompt"].count("{}") == 1
        assert isinstance(record["case_id"], int)
        assert isinstance(record["pararel_idx"], int)
        assert [len(record[kind]) for kind in list(record)[3:]] == [2, 10, 10, 10]


def test_ids_stand_for_one_object_each(world):
    names = defaultdict(set)
    for fact in world.facts:
        names[fact.target_true_id].add((fact.relation_id, fact.target_true))
        names[fact.target_new_id].add((fact.relation_id, fact.target_new))
    assert all(len(objects) == 1 for objects in names.values())


def test_written_file_loads_as_the_same_facts(world, tmp_path):
    path = tmp_path / "facts.json"
    world.write(path)
    assert json.loads(path.read_text()) == list(world.records())
    assert load_facts(path)[7].attribute_prompts == world.facts[7].attribute_prompts
    assert [fact.text for fact in load_facts(path)] == [fact.text for fact in world.facts]


def test_paraphrases_ask_for_the_same_fact_in_other_words(world, sayings):
    for fact in world.facts:
        plain, prefixed = fact.paraphrase_prompts
        assert len({fact.text, plain, prefixed}) == 3
        assert sayings[plain] == (fact.relation_id, fact.subject)
        filler, said = prefixed.split(". ", 1)
        assert filler
        assert said != fact.text
        assert sayings[said] == (fact.relation_id, fact.subject)


@pytest.mark.parametrize(("kind", "shared"), [("neighborhood", "target_true"), ("attribute", "target_new")])
def test_prompts_about_others_with_the_same_object(world, sayings, truths, kind, shared):
    for fact in world.facts:
        asked = [sayings[prompt] for prompt in getattr(fact, f"{kind}_prompts")]
        assert {relation for relation, _ in asked} == {fact.relation_id}
        assert fact.subject not in {subject for _, subject in asked}
        assert len({subject for _, subject in asked}) == 10
        assert {truths[key] for key in asked} == {getattr(fact, shared)}


def test_generation_prompts_name_the_subject(world):
    assert all(fact.subject in prompt for fact in world.facts for prompt in fact.generation_prompts)
    assert all(f"{fact.subject} is a" in fact.generation_prompts for fact in world.facts)


def test_held_out_phrasings_are_in_no_sentence(world):
    texts = [sentence.text for sentence in world.sentences()]
    for fact in world.held_out_facts():
        assert not any(text.startswith(fact.text + " ") for text in texts), fact.text
    told = sum(len(relation.phrasings) + 1 for relation in RELATIONS for s in world.subjects if s.kind == relation.kind)
    assert len(texts) == len(set(texts)) == told - len(world.held_out)


def test_held_out_is_a_quarter_and_never_the_rewrite_prompt(world):
    assert 0.15 < len(world.held_out) / len(world.facts) < 0.35
    for index, phrasing in world.held_out.items():
        fact = world.facts[index]
        assert phrasing != fact.prompt
        assert phrasing.replace("{}", fact.subject) == fact.paraphrase_prompts[0]


def test_sentences_mark_their_subject_and_answer(world):
    for sentence in world.sentences():
        fact = world.facts[sentence.fact]
        assert sentence.text[slice(*sentence.subject)] == fact.subject
        assert sentence.text[slice(*sentence.target)] == " " + fact.target_true
        assert sentence.text[sentence.target[1] :] == "."


def test_snippets_tell_of_subjects_with_the_object(world, truths):
    entries = world.snippets()
    assert len(entries) == sum(len(relation.objects) for relation in RELATIONS)
    objects = {(fact.relation_id, fact.target_true_id): fact.target_true for fact in world.facts}
    for entry in entries:
        shared = objects[entry["relation_id"], entry["target_id"]]
        assert len(entry["samples"]) == 5
        for sample in entry["samples"]:
            assert truths[entry["relation_id"], sample["name"]] == shared
            assert sample["name"] in sample["text"]
            assert f" {shared}." in sample["text"]


@pytest.mark.slow
def test_a_world_for_load_tests():
    world = World.generate(33_400)
    assert len(world.facts) >= 100_000
    assert len({subject.name for subject in world.subjects}) == 33_400
    assert all(len(fact.neighborhood_prompts) == len(fact.attribute_prompts) == 10 for fact in world.facts)
    assert all(fact.text not in fact.neighborhood_prompts for fact in world.facts[::100])


@pytest.mark.parametrize("subjects", [1, 2, 3, 7, 30])
def test_small_worlds_have_fewer_neighbours_but_all_the_rest(subjects):
    world = World.generate(subjects)
    assert len(world.subjects) == subjects
    assert len(world.facts) == 3 * subjects
    assert all(len(fact.generation_prompts) == 10 for fact in world.facts)


def test_names_have_one_to_four_tokens(world, bpe):
    for lead in ("", " "):
        counts = Counter(len(bpe(lead + subject.name)["input_ids"]) for subject in world.subjects)
        assert set(counts) == {1, 2, 3, 4}
        assert min(counts.values()) >= 10


def test_most_answers_are_one_token(world, bpe):
    counts = Counter(len(bpe(" " + fact.target_true)["input_ids"]) for fact in world.facts)
    assert set(counts) == {1, 2}
    assert 0.7 < counts[1] / len(world.facts) < 0.95


def test_subject_spans_are_whole_tokens(world, bpe):
    for fact in world.facts:
        start, end = fact.subject_characters
        offsets = bpe(fact.text, return_offsets_mapping=True)["offset_mapping"]
        inside = [(begin, stop) for begin, stop in offsets if stop > start and begin < end]
        assert inside[-1][1] == end
        assert fact.text[inside[0][0] : end].strip() == fact.subject


def test_subjects_stand_at_the_start_and_in_the_middle(world):
    at_start = sum(fact.prompt.startswith("{}") for fact in world.facts)
    assert 0.2 < at_start / len(world.facts) < 0.8
    assert not any(fact.prompt.endswith("{}") for fact in world.facts)


def test_tokenizer_is_byte_level_and_adds_nothing(bpe):
    text = "Anna Berger, a naïve reader: 東京\n  twice"
    assert bpe.decode(bpe(text)["input_ids"]) == text
    assert bpe(" piano")["input_ids"] != bpe("piano")["input_ids"]
    assert bpe.bos_token == bpe.eos_token == END_OF_TEXT
    assert bpe(END_OF_TEXT)["input_ids"] == [bpe.bos_token_id]
    assert bpe("")["input_ids"] == []
