"""Turns Triton's interpreter on where there is no CUDA device. Imported before anything that imports Triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
