"""What ROME's choice of keys does to a model: ``python bench/rome_keys.py --model FOLDER --texts FILE``.

Capitals of 20 countries are replaced by others, the country inside the prompt and as its first words, at some layers,
with all three choices of ``RomeHparams.keys``. The values are searched once, since they do not depend on the keys.
Prints a Markdown table, such as that of docs/editing.md, "Edits that break the model"; ``--rows`` adds all edits to a
file of JSON lines, and with ``--rows`` alone the table is of that file.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from causalcone import Editor, Fact, Moments, RomeHparams
from causalcone.engine.edit.methods.closed_forms.rome import ROME, Rome
from causalcone.engine.edit.methods.method import layers_outermost
from causalcone.engine.edit.requests.requests import Request
from causalcone.engine.edit.requests.windows import Window

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "China": "Beijing", "Japan": "Tokyo",
    "Russia": "Moscow", "Egypt": "Cairo", "England": "London", "Hungary": "Budapest", "Greece": "Athens",
    "Ireland": "Dublin", "Poland": "Warsaw", "Portugal": "Lisbon", "Norway": "Oslo", "Sweden": "Stockholm",
    "Austria": "Vienna", "Peru": "Lima", "Cuba": "Havana", "Thailand": "Bangkok",
}  # fmt: skip
PROMPTS = {"inside": "The capital of {} is", "first": "{}'s capital,"}
KEYS = ("published", "mean", "prompt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model and its tokenizer")
    parser.add_argument("--texts", type=Path, help="running text, for the second moments")
    parser.add_argument("--moments", type=Path, help="second moments; collected and kept there if they are missing")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 5, 8, 12])
    parser.add_argument("--countries", type=int, nargs="+", default=[*range(len(CAPITALS))], help="by number")
    parser.add_argument("--rows", type=Path, help="JSON lines of all edits")
    options = parser.parse_args()
    made = [] if options.model is None else list(measured(options))
    if options.rows is not None:
        with options.rows.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
        made = [json.loads(line) for line in options.rows.read_text().splitlines()]
    print(table(made))


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each edit."""
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    kept: Path | None = options.moments
    if kept is not None and kept.exists():
        moments = Moments.load(kept)
    else:
        moments = Moments.collect(model, tokenizer, options.texts.read_text().splitlines())
        if kept is not None:
            moments.save(kept)
    editor = Editor(model, tokenizer, moments)
    countries, capitals = list(CAPITALS), list(CAPITALS.values())
    for place, prompt in PROMPTS.items():
        facts = [
            Fact(f"{countries[n]}, {place}", prompt, countries[n], capitals[n], target_new=capitals[n - 1])
            for n in options.countries
        ]
        for request in editor.requests(facts, filtered=False):
            print(request.fact.id, file=sys.stderr, flush=True)
            yield from edited(editor, request, place, options.layers)


def edited(editor: Editor, request: Request, place: str, layers: list[int]) -> Iterator[dict[str, Any]]:
    model = editor._model(ROME)
    windows = [Window.around(layer, 1, model.layers.depth) for layer in layers]
    with editor.session.computing():
        found = Rome(model, RomeHparams()).find(model.tasks([request]), windows)
    if place == "first":
        place = "first, one token" if model.encoder.bare(request).lookup == 0 else "first, several tokens"
    for keys in KEYS:
        maker = Rome(model, RomeHparams(keys=keys))
        made = layers_outermost(maker.edits(window, found) for window in windows)
        edits = [replace(model.judged(edit), method=keys) for (edit,) in made]
        scores = editor.evaluate(edits, essence=True)
        p = {row["edit_id"]: row["p_post"] for row in scores.probes.to_pylist() if row["prompt_kind"] == "rewrite"}
        perplexity = {row["edit_id"]: row for row in scores.metrics.to_pylist() if row["metric"] == "perplexity"}
        for edit in scores.edits:
            about = {"fact": edit.fact_id, "place": place, "layer": edit.layer, "keys": keys, "steps": edit.steps}
            sizes = {name: getattr(edit, name) for name in ("delta_norm", "relative_norm", "key_alignment", "suspect")}
            texts = {side: perplexity[edit.edit_id][side] for side in ("pre", "post")}
            yield {**about, **sizes, "p": p[edit.edit_id], **texts}


def table(rows: list[dict[str, Any]]) -> str:
    """For each place of the subject, layer and choice, medians over the facts, and the largest in brackets."""
    heads = ("subject", "layer", "keys", "norm", "relative_norm", "key_alignment", "p(new)", "perplexity", "suspect")
    lines = [heads, tuple("--" if head in ("subject", "keys") else "--:" for head in heads)]
    for place, layer, keys in sorted({(r["place"], r["layer"], r["keys"]) for r in rows}, key=_order):
        of = [row for row in rows if (row["place"], row["layer"], row["keys"]) == (place, layer, keys)]
        columns = {name: [row[name] for row in of] for name in of[0]}
        shown = [_of(columns["delta_norm"], "{:.0f}"), _of(columns["relative_norm"], "{:.2f}")]
        shown += [_of(columns["key_alignment"], "{:.2f}", min), f"{median(columns['p']):.2f}"]
        before = median(columns["pre"])
        shown += [f"{before:.1f} -> {_of(columns['post'], '{:.1f}')}"]
        lines.append((place, str(layer), keys, *shown, f"{sum(map(bool, columns['suspect']))} of {len(of)}"))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _order(group: tuple[str, int, str]) -> tuple[int, int, int]:
    place, layer, keys = group
    return ("inside", "first, several tokens", "first, one token").index(place), layer, KEYS.index(keys)


def _of(values: list[float], form: str, extreme: Any = max) -> str:
    return f"{form.format(median(values))} ({form.format(extreme(values))})"


if __name__ == "__main__":
    main()
