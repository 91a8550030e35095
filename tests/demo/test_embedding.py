"""The examples of docs/embedding.md run, and patch activations as hooks on the model do."""

import re
from pathlib import Path

import pytest
import torch

from causalcone.runners.demo.model import demo_folder

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "embedding.md").read_text(encoding="utf-8")
METHODS, DOOR = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

pytestmark = pytest.mark.demo


def test_the_methods_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    example = METHODS.replace('"gpt2"', repr(str(demo_folder(progress=False)))).replace("steps=50", "steps=2")
    exec(example, names)
    assert names["severed"]["method"].unique().to_pylist() == ["sever_mlp"]
    assert len(set(names["heads"]["kind"].to_pylist())) == names["model"].config.n_head
    for table in ("plain", "heavy", "zeroed", "grads"):
        assert names[table].num_rows > 0
    assert (tmp_path / "severed.png").stat().st_size > 10_000


def test_the_general_door_patches_as_hooks_do(capsys):
    assert len(DOOR.splitlines()) < 25
    names = {}
    exec(DOOR, names)
    restored = names["restored"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == restored.shape[1]

    model, tokenizer = names["model"], names["tokenizer"]
    clean, other = (tokenizer(names[name], return_tensors="pt")["input_ids"] for name in ("clean", "other"))
    first, second = names["answers"]

    def difference(ids):
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        return float(logits[first] - logits[second])

    with torch.no_grad():
        states = model(clean, output_hidden_states=True).hidden_states
    low, high = difference(other), difference(clean)
    assert low < 0 < high
    for layer, token in [(0, 4), (2, 5), (3, 5), (5, 10), (6, 9), (4, 0)]:

        def patch(module, arguments, output, layer=layer, token=token):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[0, token] = states[layer + 1][0, token]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = model.transformer.h[layer].register_forward_hook(patch)
        found = (difference(other) - low) / (high - low)
        handle.remove()
        assert float(restored[layer, token]) == pytest.approx(found, abs=1e-4)
    assert restored.shape == (model.config.n_layer, clean.shape[1])
