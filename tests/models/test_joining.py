"""How a prompt and its answer are joined, in every style of tokenizer: the probability is the text's own."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from helpers.families import FAMILIES
from helpers.tokenizers import TOKENIZERS, sentencepiece
from hypothesis import given, settings, strategies as st
from oracles.facts import answer_ids, encode_prompt, filled
from transformers import GPT2Tokenizer

import causalcone as cc
from causalcone.engine.encoding import PromptEncoder, PromptForm, PromptWarning
from causalcone.engine.run.model_files import model_place

SCRIPTS = {
    "latin": ("The capital of {} is", "France", "Paris", " "),
    "cyrillic": ("Столица страны {} —", "Россия", "Москва", " "),
    "greek": ("Η πρωτεύουσα της χώρας {} είναι", "Ελλάδα", "Αθήνα", " "),  # noqa: RUF001
    "arabic": ("عاصمة {} هي", "فرنسا", "باريس", " "),
    "devanagari": ("{} की राजधानी", "भारत", "दिल्ली", " "),
    "hangul": ("{}의 수도는", "대한민국", "서울", " "),
    "han": ("{}的首都是", "中国", "北京", ""),
    "kana": ("{}の首都は", "日本", "トウキョウ", ""),
    "thai": ("เมืองหลวงของ{}คือ", "ไทย", "กรุงเทพ", ""),
    "lao": ("ນະຄອນຫຼວງຂອງ{}ແມ່ນ", "ລາວ", "ວຽງຈັນ", ""),
    "khmer": ("រដ្ឋធានីនៃ{}គឺ", "កម្ពុជា", "ភ្នំពេញ", ""),
    "burmese": ("{}၏မြို့တော်", "မြန်မာ", "နေပြည်တော်", ""),
}
"""By script: a prompt, its subject, the answer, and what stands between them."""

ENDS = {
    "straight quote": ('The capital of {} is called "', "", "France", "Paris", '"Paris'),
    "single quote": ("The capital of {} is called '", "", "France", "Paris", "'Paris"),
    "curly quote": ("Die Hauptstadt von {} heißt „", "", "Polen", "Warschau", "„Warschau"),
    "guillemet": ("La capitale de {} est «", "", "France", "Paris", "«Paris"),
    "corner bracket": ("{}の首都は「", "", "日本", "東京", "「東京"),
    "parenthesis": ("The capital of {} (", "", "France", "Paris", "(Paris"),
    "closing quote": ('"{}" is', " ", "France", "Paris", '"France" is Paris'),
    "quoted subject": ('The capital of "{}"', " ", "France", "Paris", '"France" Paris'),
    "line end": ("Q: What is the capital of {}?\nA:\n", "", "France", "Paris", "A:\nParis"),
    "space, cut": ("The capital of {} is ", " ", "France", "Paris", "is Paris"),
    "spaces, cut": ("The capital of {} is \t ", " ", "France", "Paris", "is Paris"),
    "colon": ("Q: the capital of {}? A:", " ", "France", "Paris", "A: Paris"),
    "an answer with its own space": ("The capital of {} is", " ", "France", " Paris", "is Paris"),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def model(tokenizer):
    return FAMILIES["llama"](2, 16, 2, vocab_size=len(tokenizer), max_position_embeddings=512)


def own_probability(model, prompt, answer):
    """By a plain forward of the model: that of the answer's tokens after the prompt's."""
    with torch.no_grad():
        log_p = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return math.exp(sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)))


def traced(model, tokenizer, fact, **form):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        table = cc.Tracer(model, tokenizer, **form).zero([fact], ["mlp:1"])
    return table["p_clean"][0].as_py()


def assert_own(model, tokenizer, fact):
    prompt = encode_prompt(tokenizer, fact)[0]
    expected = own_probability(model, prompt, answer_ids(tokenizer, fact, prompt))
    assert traced(model, tokenizer, fact) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script(model, tokenizer, script):
    prompt, subject, answer, between = SCRIPTS[script]
    fact = cc.Fact("0", prompt, subject, answer)
    encoded = PromptEncoder(tokenizer, len(tokenizer), 512).fact(fact)
    assert encoded.answer.joiner == ("space" if between else "none")
    if encoded.answer.joined:
        assert encoded.prompt + encoded.target == tuple(tokenizer(fact.text + between + answer)["input_ids"])
    assert_own(model, tokenizer, fact)


@pytest.mark.parametrize("end", ENDS)
def test_every_end_of_a_prompt(model, tokenizer, end):
    prompt, between, subject, answer, whole = ENDS[end]
    fact = cc.Fact("0", prompt, subject, answer)
    assert (filled(fact) + between + answer.removeprefix(" ")).endswith(whole)
    encoded = PromptEncoder(tokenizer, len(tokenizer), 512).fact(fact)
    assert encoded.answer.joiner == ("space" if between else "none")
    assert encoded.cut == prompt.endswith((" ", "\t"))
    if encoded.answer.joined:
        text = filled(fact) + between + answer.removeprefix(" ")
        assert encoded.prompt + encoded.target == tuple(tokenizer(text)["input_ids"])
    assert_own(model, tokenizer, fact)


PIECES = [*(part for prompt, *_ in SCRIPTS.values() for part in prompt.split("{}") if part), "(", ' "', "„", "\n", " "]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    before=st.lists(st.sampled_from(PIECES), max_size=2),
    subject=st.sampled_from([subject for _, subject, _, _ in SCRIPTS.values()]),
    after=st.lists(st.sampled_from(PIECES), max_size=3),
    answer=st.sampled_from([answer for _, _, answer, _ in SCRIPTS.values()]),
    joiner=st.sampled_from(["auto", "space", "none"]),
)
def test_the_probability_is_the_texts_own(name, before, subject, after, answer, joiner):
    """Or the fact is refused by name."""
    tokenizer = TOKENIZERS[name]()
    model = FAMILIES["llama"](1, 8, 2, vocab_size=len(tokenizer), max_position_embeddings=512)
    fact = cc.Fact("the fact", "".join(before) + "{}" + "".join(after), subject, answer, joiner=joiner)
    try:
        traced(model, tokenizer, fact)
    except cc.CausalconeError as error:
        assert "the fact" in str(error)  # noqa: PT017 - no error is right too
        return
    assert_own(model, tokenizer, fact)


def test_a_joiner_of_ones_own():
    tokenizer = TOKENIZERS["byte-level"]()
    encoder = PromptEncoder(tokenizer, len(tokenizer), 64)
    for joiner, text in (("none", "Ann Lee playsgolf"), ("space", "Ann Lee plays golf")):
        fact = cc.Fact("0", "{} plays", "Ann Lee", "golf", joiner=joiner)
        assert tokenizer.decode(encoder.fact(fact).prompt + encoder.fact(fact).target) == text
    with pytest.raises(cc.CausalconeError, match="fact '0': joiner is 'tab'"):
        cc.Fact("0", "{} plays", "Ann Lee", "golf", joiner="tab")


def test_spaces_stay_where_they_are_wanted():
    tokenizer = TOKENIZERS["byte-level"]()
    fact = cc.Fact("0", "{} plays ", "Ann Lee", "golf")
    kept = PromptEncoder(tokenizer, len(tokenizer), 64, PromptForm(keep_space=True)).fact(fact)
    assert not kept.cut
    assert tokenizer.decode(kept.prompt) == "Ann Lee plays "
    assert tokenizer.decode(kept.target) == "golf"


def test_what_is_cut_is_said_once():
    tokenizer = TOKENIZERS["byte-level, bos"]()
    tracer = cc.Tracer(FAMILIES["llama"](1, 8, 2, vocab_size=len(tokenizer)), tokenizer)
    facts = [cc.Fact("a", "{} plays ", "Ann Lee", "golf"), cc.Fact("b", "{} plays", "Bo", "golf")]
    with pytest.warns(PromptWarning, match=r"1 of 2 facts \('a'\) end in spaces, which were cut"):
        tracer.zero(facts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracer.zero(facts)


# --- BOS ---


def test_a_subject_that_nothing_stands_before_is_said_once():
    tokenizer = TOKENIZERS["byte-level"]()
    model = FAMILIES["llama"](1, 8, 2, vocab_size=len(tokenizer))
    fact = cc.Fact("a", "{} plays", "Ann Lee", "golf")
    with pytest.warns(PromptWarning, match="are the first token that the model reads"):
        cc.Tracer(model, tokenizer).zero([fact])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cc.Tracer(model, tokenizer, bos="always").zero([fact])


@pytest.mark.parametrize("name", ["byte-level", "byte-level, bos", "bpe, first", "bpe, first, no bos"])
@pytest.mark.parametrize("begun", [False, True], ids=["bare", "begun"])
def test_one_bos_token_or_none(name, begun):
    """Never two, whether the text itself begins with one, the tokenizer puts one before, or both."""
    tokenizer = TOKENIZERS[name]()
    bos = tokenizer.bos_token_id
    fact = cc.Fact("0", f"{tokenizer.bos_token * begun}{{}} plays", "Ann Lee", "golf")
    adds = tokenizer("a")["input_ids"][0] == bos
    bare = PromptEncoder(tokenizer, len(tokenizer), 64, PromptForm(bos="never")).fact(fact)
    assert bos not in bare.prompt
    for choice, count in (("auto", int(begun or adds)), ("always", 1)):
        encoded = PromptEncoder(tokenizer, len(tokenizer), 64, PromptForm(bos=choice)).fact(fact)
        assert encoded.prompt == (bos,) * count + bare.prompt
        assert encoded.span == (bare.span[0] + count, bare.span[1] + count)
        assert encoded.target == bare.target


# --- chats ---

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "",
    ),
    "inst": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
        "{% elif m.role == 'system' %}[SYS] {{ m.content }} [/SYS]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}",
        " ",
    ),
    "turns": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<turn>{{ m.role }}\n{{ m.content | trim }}<end>\n{% endfor %}{% if add_generation_prompt %}<turn>assistant\n"
        "{% endif %}",
        "",
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["byte-level, bos", "bpe, always", "bpe, never"])
def test_chats_are_as_the_template_has_them(name, template):
    tokenizer = chatting(name, template)
    model = FAMILIES["llama"](2, 16, 2, vocab_size=len(tokenizer), max_position_embeddings=512)
    fact = cc.Fact("0", "Ann says user. What does {} play? ", "Ann Lee", "golf")
    encoder = PromptEncoder(tokenizer, len(tokenizer), 512, PromptForm(chat=True))
    encoded = encoder.fact(fact)
    messages = [{"role": "user", "content": fact.text}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert encoded.prompt == tuple(tokenizer(whole, add_special_tokens=False)["input_ids"])
    assert encoded.prompt.count(tokenizer.bos_token_id) == whole.count(tokenizer.bos_token)
    assert tokenizer.decode(encoded.prompt[slice(*encoded.span)]).strip().startswith("Ann Lee")
    assert len(encoded.prompt[: encoded.span[0]]) > len(tokenizer("Ann says user")["input_ids"]) - 1
    said = tokenizer(whole + TEMPLATES[template][1] + "golf", add_special_tokens=False)["input_ids"]
    assert encoded.prompt + encoded.target == tuple(said)
    expected = own_probability(model, list(encoded.prompt), said[len(encoded.prompt) :])
    assert traced(model, tokenizer, fact, chat=True) == pytest.approx(expected, rel=1e-4)


def chatting(name, template):
    tokenizer = TOKENIZERS[name]()
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
    )
    tokenizer.chat_template = TEMPLATES[template][0]
    return tokenizer


def test_the_subject_is_that_of_the_message():
    """Also where the template has the same words."""
    tokenizer = chatting("byte-level", "chatml")
    fact = cc.Fact("0", "{}", "assistant", "golf")
    encoded = PromptEncoder(tokenizer, len(tokenizer), 512, PromptForm(chat=True, system="assistant")).fact(fact)
    before = tokenizer.decode(encoded.prompt[: encoded.span[0]])
    assert before.endswith("<|im_start|>user\n")


def test_a_system_message_stands_before():
    tokenizer = chatting("byte-level", "chatml")
    fact = cc.Fact("0", "What does {} play?", "Bo", "golf")
    encoded = PromptEncoder(tokenizer, len(tokenizer), 512, PromptForm(chat=True, system="Bo is a city.")).fact(fact)
    text = tokenizer.decode(encoded.prompt)
    assert text.startswith("<|im_start|>system\nBo is a city.<|im_end|>\n<|im_start|>user\n")
    before = tokenizer.decode(encoded.prompt[: encoded.span[0]])
    assert before.rstrip().endswith("user\nWhat does")


def test_chats_that_cannot_be():
    plain, turns = sentencepiece("bpe", "first"), chatting("byte-level", "turns")
    model = FAMILIES["llama"](1, 8, 2, vocab_size=len(plain))
    with pytest.raises(cc.CausalconeError, match="no chat template"):
        cc.Tracer(model, plain, chat=True)
    with pytest.raises(cc.CausalconeError, match="give chat=True"):
        cc.Tracer(model, plain, system="Be brief.")
    with pytest.raises(cc.CausalconeError, match="leave out bos"):
        cc.Tracer(model, plain, chat=True, bos="never")
    with pytest.raises(cc.CausalconeError, match="refuses these messages: no system"):
        PromptEncoder(turns, 400, 64, PromptForm(chat=True, system="x")).fact(cc.Fact("0", "{}?", "Bo", "golf"))
    with pytest.raises(cc.CausalconeError, match="bos is 'sometimes'"):
        cc.Tracer(model, plain, bos="sometimes")


# --- the real model ---

REAL = [
    (cc.Fact("quote", 'The capital of {} is called "', "France", "Paris"), 0.3),
    (cc.Fact("line", "Q: What is the capital of {}?\nA:\n", "France", "Paris"), 0.004),
    (cc.Fact("han", "{}的首都是", "中国", "北京"), 2e-4),
    (cc.Fact("space", "The capital of {} is ", "France", "Paris"), 0.6),
]


@pytest.mark.real
def test_a_real_model_says_what_its_own_text_says():
    """Least probabilities are a little below those of the texts' own continuations."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = model_place("smollm2")
    tokenizer, model = AutoTokenizer.from_pretrained(place), AutoModelForCausalLM.from_pretrained(place).double()
    for fact, least in REAL:
        assert traced(model, tokenizer, fact) > least, fact.id
        assert_own(model, tokenizer, fact)
    asked = cc.Fact("chat", "What is the capital of {}?", "France", "Paris")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": asked.text}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    expected = own_probability(model, list(prompt), tokenizer("Paris")["input_ids"])
    assert traced(model, tokenizer, asked, chat=True) == pytest.approx(expected, rel=1e-4)


SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="the data is not beside this checkout")
def test_published_facts_keep_their_published_tokens(tmp_path):
    """The prompt by itself, and the target after one space by itself, as published code has them."""
    tokenizer = GPT2Tokenizer(
        vocab=str(SHARED / "gpt2-tokenizer" / "vocab.json"), merges=str(SHARED / "gpt2-tokenizer" / "merges.txt")
    )
    encoder = PromptEncoder(tokenizer, len(tokenizer), 1024)
    real = [*cc.load_facts(SHARED / "counterfact_prompts.json"), *cc.load_facts(SHARED / "real_facts.jsonl")]
    zsre = {
        "subject": "Anna",
        "src": "Where was Anna born?",
        "answers": ["Aš"],
        "rephrase": "Anna is from?",
        "loc": "x",
    }
    (tmp_path / "zsre.json").write_text(json.dumps([zsre, {**zsre, "answers": ["Paris"]}]), encoding="utf-8")
    asked = [*cc.load_facts(tmp_path / "zsre.json"), *cc.load_facts(tmp_path / "zsre.json", zsre_form="meng")]
    assert len(real) > 150
    for fact in (*real, *asked):
        encoded = encoder.fact(fact)
        assert encoded.prompt == tuple(tokenizer(fact.text)["input_ids"]), fact
        assert encoded.target == tuple(tokenizer(" " + fact.target_true)["input_ids"]), fact
        assert encoded.answer.joiner == "space"
