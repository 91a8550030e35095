"""Figures: token-by-layer heat maps of one fact; averages by token role or by layer, gradients and scores.

Every function returns its matplotlib ``Figure`` and writes it to ``path`` where one is given (the suffix chooses the
format; missing folders are made). No display and no pyplot state is used.
"""

from causalcone.analysis.plot.layers import joint_effect, severed, zeroing
from causalcone.analysis.plot.maps import gradients, heatmap, heatmaps
from causalcone.analysis.plot.roles import indirect_effect
from causalcone.analysis.plot.scores import scores
from causalcone.analysis.plot.sequences import sequence

__all__ = [
    "gradients",
    "heatmap",
    "heatmaps",
    "indirect_effect",
    "joint_effect",
    "scores",
    "sequence",
    "severed",
    "zeroing",
]
