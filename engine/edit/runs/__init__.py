"""Whole runs through a model's layers, for editing: with packed rows, a frozen prefix, changed weights and gradients.

Tracing compiles a plan of the few rows that interventions reach (``engine/plan``) and computes it in place, pass by
pass (``engine/run``). Editing needs no such forks: a run has a row for each of its tokens from some token on, at every
layer, and all before that token stays as in the unedited model. But it needs gradients through many steps, weights that
differ from run to run, and texts that grow, so it goes through the layers here:

- ``packed_runs``: where rows of runs lie in one tensor, and which rows they attend to;
- ``layers``: a layer's arithmetic (``Layers.advance``, ``Layers.after_attention``) over packed runs;
- ``frozen_prefix``: the unedited model's rows, keys and values, computed once for all steps of all edits;
- ``edited_runs``: runs that leave the unedited ones after the edited layer, from the lookup on;
- ``decoding``: texts that grow token by token; ``_TextGroup._step`` spells a layer for one new token of each text.

The arithmetic of one layer is spelled at two more places, for tracing: ``engine/run/forward`` in place, and
``engine/run/forward_autograd`` for gradients. A new kind of block has to be added at all four.
"""
