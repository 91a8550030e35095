"""The table of what ROME's keys do: of edits made here, and of a tiny model's."""

import json

from helpers.edit_command import write_inputs

ROW = {"fact": "a", "place": "inside", "layer": 1, "keys": "published", "steps": 19, "delta_norm": 30.0, "pre": 4.0}
ROW |= {"relative_norm": 0.2, "key_alignment": 0.9, "suspect": None, "p": 0.5, "post": 5.0}


def test_medians_and_the_worst(bench):
    odd = {**ROW, "delta_norm": 90.0, "key_alignment": 0.1, "suspect": "odd", "post": 8.0}
    first = {**ROW, "place": "first, one token"}
    _, _, inside, start = bench("rome_keys").table([first, ROW, ROW, odd]).splitlines()
    expected = (
        "inside",
        "1",
        "published",
        "30 (90)",
        "0.20 (0.20)",
        "0.90 (0.10)",
        "0.50",
        "4.0 -> 5.0 (8.0)",
        "1 of 3",
    )
    assert inside == f"| {' | '.join(expected)} |"
    assert start.startswith("| first, one token | 1 | published | 30 (30) |")


def test_a_tiny_model(bench, folder, tmp_path, monkeypatch, capsys):
    user, rows = write_inputs(folder), tmp_path / "rows.jsonl"
    given = ["--model", user / "model", "--moments", user / "moments.safetensors", "--layers", 0, 1, "--countries", 0]
    monkeypatch.setattr("sys.argv", ["rome_keys.py", *map(str, [*given, "--rows", rows])])
    bench("rome_keys").main()
    made = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["layer"], row["keys"]) for row in made[:6]] == [
        (layer, keys) for keys in ("published", "mean", "prompt") for layer in (0, 1)
    ]
    assert {row["place"] for row in made} == {"inside", "first, several tokens"}
    assert len({row["steps"] for row in made if row["layer"] == 0 and row["place"] == "inside"}) == 1
    assert all(row["key_alignment"] == 1 for row in made if row["keys"] != "published")
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(made)
