"""Streamed weights give the numbers of resident ones, from whatever files, in little memory, and read each once."""

import json
import os
import re
import struct
import subprocess
import sys
import threading
from collections import Counter
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from helpers.compare import assert_table_close
from helpers.families import EVERY_FAMILY, FAMILIES
from helpers.models import FACTS, gpt2, tokenizer as make_tokenizer
from safetensors.torch import load_file, save_file
from streamed_memory import trace as traced

import causalcone as cc
from causalcone.engine.errors import ExperimentError, MemoryBudgetError, ModelError
from causalcone.engine.run import runner as job
from causalcone.engine.streaming import prefetch as ahead, tensor_files as files

OPTIONS = {"states": (("hidden", 1), ("mlp", 2), ("attn", 3)), "samples": 2, "sigma": 0.5}
HERE = Path(__file__).parents[1] / "support"
MIB = 2**20


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    make_tokenizer().save_pretrained(folder)
    return folder


def both(folder, **options):
    return (cc.Tracer.from_pretrained(str(folder), weights=weights, **options) for weights in ("resident", "stream"))


def assert_same(folder, **options):
    """Tables equal to the last bit."""
    resident, streamed = both(folder, **options)
    assert resident.dtype == streamed.dtype
    assert streamed.trace(FACTS, **OPTIONS).equals(resident.trace(FACTS, **OPTIONS))
    assert streamed.zero(FACTS[:3], target="argmax").equals(resident.zero(FACTS[:3], target="argmax"))
    assert streamed.noise_level(FACTS, "2sd") == resident.noise_level(FACTS, "2sd")
    return streamed


def rewrite(folder, change):
    """Change the tensors of a model's only file."""
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


@pytest.fixture
def saved(tmp_path):
    return save(gpt2(dtype=torch.float32), tmp_path)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_numbers_are_those_of_resident_weights(family, tmp_path):
    tracer = assert_same(save(FAMILIES[family](3, dtype=torch.float32), tmp_path))
    layers = [name for names in tracer.session.architecture.names for name in names]
    assert all(tracer.session.model.get_parameter(name).is_meta for name in layers)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_tied_and_untied(family, tied, tmp_path):
    assert_same(save(FAMILIES[family](2, dtype=torch.float32, tie_word_embeddings=tied), tmp_path))


def test_shards(tmp_path):
    folder = save(FAMILIES["llama"](4, dtype=torch.float32), tmp_path, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 4
    assert_same(folder)


@pytest.mark.parametrize("saved_as", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_dtypes(saved_as, dtype, tmp_path):
    assert_same(save(FAMILIES["gptj"](2, dtype=saved_as), tmp_path), dtype=dtype)


def test_files_of_the_base_model_alone(saved):
    rewrite(saved, lambda all: {name.removeprefix("transformer."): tensor for name, tensor in all.items()})
    assert_same(saved)


def test_tied_weights_under_either_name(saved):
    def renamed(tensors):
        return {name.replace("transformer.wte", "lm_head"): tensor for name, tensor in tensors.items()}

    rewrite(saved, renamed)
    assert_same(saved)


def test_what_the_files_hold_besides_is_left(saved):
    rewrite(saved, lambda all: {**all, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)})
    assert_same(saved)


def test_interventions_of_ones_own(saved):
    runs = [[cc.Intervention("hidden", layer, -1, "zero")] for layer in range(4)]
    reads = [cc.Read("logits"), cc.Read("mlp", layers=range(4))]
    texts = ["Ann Lee plays the sport of", "In the city of Rome they speak"]
    found = [tracer.run(texts, runs, read=reads) for tracer in both(saved)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(torch.from_numpy(one.patched.p), torch.from_numpy(other.patched.p))
        assert all(torch.equal(a, b) for a, b in zip(one.patched.values, other.patched.values, strict=True))


def test_noise_like_text(saved):
    resident, streamed = (tracer.embedding_noise(["Ann Lee plays tennis", "Bo"]) for tracer in both(saved))
    assert (resident.covariance == streamed.covariance).all()


@pytest.fixture
def reads(monkeypatch):
    """How often each tensor's values were read, whole or in part, by its name."""
    counted, whole = Counter(), files.read_values

    def read(entry, parts):
        counted[entry.name] += sum(len(out) for _, out in parts) / entry.elements
        whole(entry, parts)

    monkeypatch.setattr(files, "read_values", read)
    monkeypatch.setattr(ahead, "read_values", read)
    return counted


def test_a_pass_reads_each_layer_once(saved, reads):
    tracer = cc.Tracer.from_pretrained(str(saved), weights="stream", memory="2MiB")
    tracer.trace(FACTS[:1], **OPTIONS)  # compares with the model's own forward
    reads.clear()
    passes = tracer.plan(FACTS, **OPTIONS).passes
    assert passes > 1
    assert not reads
    tracer.trace(FACTS, **OPTIONS)
    layers = {name: count for name, count in reads.items() if ".h." in name}
    assert len(layers) == 4 * 12
    assert set(layers.values()) == {passes}


@pytest.mark.parametrize(("target", "walks"), [("label", 1), ("argmax", 2)])
def test_a_pass_walks_through_the_unembedding_once(target, walks, tmp_path, reads):
    folder = save(FAMILIES["llama"](2, dtype=torch.float32), tmp_path)
    tracer = cc.Tracer.from_pretrained(str(folder), weights="stream", memory="1GiB")
    tracer.trace(FACTS[:1], **OPTIONS)
    reads.clear()
    assert tracer.plan(FACTS, **OPTIONS).passes == 1
    tracer.trace(FACTS, target=target, **OPTIONS)
    assert reads["lm_head.weight"] == walks
    assert reads["model.embed_tokens.weight"] < len(FACTS)


def test_slices_of_the_unembedding(tmp_path, reads):
    """Read ahead, each once, whatever is asked for first."""
    folder = save(FAMILIES["llama"](1, dtype=torch.float32), tmp_path)
    tracer = cc.Tracer.from_pretrained(str(folder), weights="stream")
    matrix, _ = tracer.session.architecture.unembedding()
    reads.clear()
    parts = [matrix[first : first + 100] for first in range(0, len(matrix), 100)]
    assert reads["lm_head.weight"] == pytest.approx(1)
    whole = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(matrix[7:9], whole[7:9])
    assert torch.equal(matrix[50:], whole[50:])


def test_a_plan_says_what_is_read(saved):
    tracer = cc.Tracer.from_pretrained(str(saved), weights="stream")
    plan = tracer.plan(FACTS, **OPTIONS)
    read = sum(p.nbytes for name, p in gpt2(dtype=torch.float32).named_parameters() if ".h." in name or "wte" in name)
    assert plan.read_bytes == read
    assert cc.Tracer.from_pretrained(str(saved)).plan(FACTS, **OPTIONS).read_bytes == 0


def test_threads_end_with_a_pass(saved):
    tracer = cc.Tracer.from_pretrained(str(saved), weights="stream")
    tracer.trace(FACTS[:1], **OPTIONS)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("causalcone-weights")]


def test_running_out_of_memory_splits_passes(saved, monkeypatch):
    resident, streamed = both(saved)
    expected = resident.trace(FACTS, **OPTIONS)
    streamed.trace(FACTS[:1], **OPTIONS)
    run_pass, failed = job.run_pass, []

    def failing(architecture, groups, tiles, space, backends, room):
        if sum(group.facts for group in groups) > 3:
            failed.append(groups)
            with closing(architecture.blocks(space.dtype, space.device)) as blocks:  # in the midst of the layers
                next(blocks)
            raise torch.OutOfMemoryError("out of memory")
        return run_pass(architecture, groups, tiles, space, backends, room)

    monkeypatch.setattr(job, "run_pass", failing)
    assert_table_close(streamed.trace(FACTS, **OPTIONS), expected, 1e-5)
    assert failed


def test_two_layers_count_as_memory(saved):
    with pytest.raises(MemoryBudgetError, match="give more memory"):
        cc.Tracer.from_pretrained(str(saved), weights="stream", memory="100kB").plan(FACTS, **OPTIONS)
    resident, streamed = (tracer.session for tracer in both(saved, memory="1GiB"))
    layer = sum(p.nbytes for p in gpt2(dtype=torch.float32).transformer.h[0].parameters())
    assert streamed.budget().fixed - resident.budget().fixed >= 2 * layer


@pytest.mark.slow
def test_hub_ids_are_found_in_the_cache(tmp_path):
    snapshot = tmp_path / "hub" / "models--someone--small" / "snapshots" / ("0" * 40)
    save(FAMILIES["llama"](4, dtype=torch.float32), snapshot, max_shard_size="30KB")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    script = 'import causalcone as cc; print(cc.Tracer.from_pretrained("someone/small", weights="stream").dtype)'
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "torch.float32", done.stderr


@pytest.mark.slow
def test_memory_of_a_model_three_times_larger(tmp_path):
    """Growth since a small model was traced, from opening the files on: all of it is within the budget. The numbers are
    those of resident weights."""
    small = save(gpt2(2, 96, 4, dtype=torch.float32), tmp_path / "small")
    large = save(gpt2(14, 768, 12, dtype=torch.float32), tmp_path / "large", max_shard_size="100MB")
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    budget = size // 3 // MIB
    done = subprocess.run(
        [sys.executable, HERE / "streamed_memory.py", small, large, str(budget), tmp_path / "streamed.parquet"],
        capture_output=True, text=True, check=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)},
    )  # fmt: skip
    assert int(done.stdout) <= 1.05 * budget * MIB
    table = pq.read_table(tmp_path / "streamed.parquet")
    assert table.num_rows == 2 * 14
    assert_table_close(table, traced(str(large), weights="resident"), 1e-5)


def test_the_check_on_first_use_is_real(saved):
    """Weights that only the engine gets wrong are noticed."""
    tracer = cc.Tracer.from_pretrained(str(saved), weights="stream")
    architecture = tracer.session.architecture
    inner = architecture.inner.block

    def wrong(layer, dtype, device):
        block = inner(layer, dtype, device)
        if layer == 2:
            object.__setattr__(block, "scale", 2 * block.scale)
        return block

    architecture.inner.block = wrong
    with pytest.raises(ModelError, match="differ"):
        tracer.trace(FACTS, **OPTIONS)


def test_changed_files_are_compared_again(saved):
    tracer = cc.Tracer.from_pretrained(str(saved), weights="stream")
    first = tracer.trace(FACTS, **OPTIONS)
    change = torch.zeros(32)
    change[0] = torch.nan
    rewrite(saved, lambda all: {**all, "transformer.h.3.ln_2.bias": change})
    with pytest.raises(ModelError, match=r"transformer.h.3.ln_2.bias.*NaN"):
        tracer.trace(FACTS, **OPTIONS)
    save(gpt2(dtype=torch.float32), saved)
    assert_table_close(tracer.trace(FACTS, **OPTIONS), first, 1e-5)


def test_the_model_is_left_as_it_was(saved):
    tracer = cc.Tracer.from_pretrained(str(saved), weights="stream")
    model = tracer.session.model
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    tracer.trace(FACTS[:2], **OPTIONS)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.transformer.h)


def test_what_needs_all_weights_is_refused(saved):
    tracer = cc.Tracer.from_pretrained(str(saved), weights="stream")
    with pytest.raises(ModelError, match="weights='resident'"):
        tracer.integrated_gradients(FACTS)
    with pytest.raises(ModelError, match="weights='resident'"):
        cc.Tracer(tracer.session.model, make_tokenizer())
    with pytest.raises(ModelError, match="weights='resident'"):
        cc.Moments.collect(tracer.session.model, make_tokenizer(), ["Ann Lee plays tennis"])
    with pytest.raises(ExperimentError, match="resident, stream"):
        cc.Tracer.from_pretrained(str(saved), weights="disk")


def shorten(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with path.open("rb") as file:
        content = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    last = max((name for name in content if name != "__metadata__"), key=lambda name: content[name]["data_offsets"])
    return f"model.safetensors ends before its tensor {last!r}"


def cut_header(folder):
    os.truncate(folder / "model.safetensors", 50)
    return "model.safetensors is not a safetensors file, or a truncated one"


def remove(folder):
    (folder / "model.safetensors").unlink()
    return "has no weights as safetensors"


def change_shape(folder):
    rewrite(folder, lambda all: {**all, "transformer.h.1.ln_1.bias": torch.zeros(31)})
    return "'transformer.h.1.ln_1.bias' of .*model.safetensors has the shape [31], where the config makes"


def drop(folder):
    rewrite(folder, lambda all: {name: tensor for name, tensor in all.items() if "c_fc" not in name})
    return "no tensor for transformer.h.0.mlp.c_fc.weight, transformer.h.0.mlp.c_fc.bias"


def make_whole(folder):
    rewrite(folder, lambda all: {**all, "transformer.h.1.ln_1.bias": torch.zeros(32, dtype=torch.int8)})
    return "'transformer.h.1.ln_1.bias' of .*model.safetensors has no dtype that can be streamed"


@pytest.mark.parametrize("damage", [shorten, cut_header, remove, change_shape, drop, make_whole])
def test_files_that_do_not_fit(damage, saved):
    expected = damage(saved)
    with pytest.raises(ModelError, match=re.escape(expected).replace(r"\.\*", ".*")):
        cc.Tracer.from_pretrained(str(saved), weights="stream")


def test_a_missing_shard(tmp_path):
    folder = save(FAMILIES["llama"](4, dtype=torch.float32), tmp_path, max_shard_size="30KB")
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(ModelError, match=f"{shard.name} is missing"):
        cc.Tracer.from_pretrained(str(folder), weights="stream")


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 10_000)])
def test_files_that_go_while_they_are_used(damage, saved):
    tracer = cc.Tracer.from_pretrained(str(saved), weights="stream")
    damage(saved / "model.safetensors")
    with pytest.raises(ModelError, match=r"model.safetensors.*tensor"):
        tracer.trace(FACTS, sigma=0.1)


def test_command_line(folder, tmp_path, run):
    from causalcone.analysis import read_traces

    basic = ("--model", folder / "model", "--facts", folder / "facts.jsonl", "--state", "hidden:1")
    outs = {}
    for weights in ("resident", "stream"):
        for command, own in (("trace", ("--samples", 2)), ("zero", ())):
            out = tmp_path / f"{command}-{weights}"
            code, _, said = run(command, *basic, *own, "--weights", weights, "--out", out, "--quiet")
            assert code == 0, said
            outs[command, weights] = read_traces(out / "traces")
            assert json.loads((out / "run.json").read_text())["weights"] == weights
    for command in ("trace", "zero"):
        assert_table_close(outs[command, "stream"], outs[command, "resident"], 1e-5)

    code, printed, _ = run("plan", *basic, "--weights", "stream")
    assert code == 0
    for words in ("reading", "MiB a pass", "MiB/s"):
        assert words in printed
    code, _, said = run("plan", *basic, "--weights", "disk")
    assert (code, "resident, stream" in said) == (2, True)


@pytest.mark.gpu
@pytest.mark.parametrize("saved_as", [torch.float32, torch.bfloat16])
def test_on_a_cuda_device(saved_as, tmp_path):
    assert_same(save(FAMILIES["llama"](6, dtype=saved_as), tmp_path), device="cuda")
