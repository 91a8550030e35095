"""Draws docs/cone.png: what one restoration changes. Run it as ``python docs/draw_cone.py``."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

TOKENS = ("The", "Space", "Need", "le", "is", "in")
SUBJECT = (1, 4)
LAYERS, LAYER, TOKEN = 7, 2, 3
CORRUPTED, CONE, RESTORED = "#9ec9e6", "#e69f00", "#000000"


def main() -> None:
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    draw(left, "Published code: the whole model, once for every restoration", lambda layer, token: CONE)
    draw(right, "causalcone: what the restoration can reach", reached)
    left.set_ylabel("token")
    for axes in (left, right):
        axes.set_xlabel("layer")
    figure.savefig(Path(__file__).with_name("cone.png"), dpi=160)


def reached(layer: int, token: int) -> str:
    """Rows behind the restored one, at its token and later ones."""
    return CONE if layer > LAYER and token >= TOKEN else CORRUPTED


def draw(axes: Axes, title: str, color: Callable[[int, int], str]) -> None:
    for token in range(len(TOKENS)):
        for layer in range(LAYERS):
            restored = (layer, token) == (LAYER, TOKEN)
            fill = RESTORED if restored else color(layer, token)
            hatch = "///" if fill == CONE else ""
            axes.add_patch(
                Rectangle((layer - 0.45, token - 0.42), 0.9, 0.84, facecolor=fill, hatch=hatch, edgecolor="white")
            )
    names = [f"{text}*" if SUBJECT[0] <= token < SUBJECT[1] else text for token, text in enumerate(TOKENS)]
    axes.set_yticks(range(len(TOKENS)), names)
    axes.set_xticks(range(LAYERS))
    axes.set_xlim(-0.6, LAYERS - 0.4)
    axes.set_ylim(len(TOKENS) - 0.4, -0.6)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=10)


if __name__ == "__main__":
    main()
