"""Carries a sweep out in a process of its own, to be killed: ``FILE OUT``."""

import sys
from pathlib import Path

import torch
from helpers.sweeps import swept

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(swept(Path(sys.argv[1]), sys.argv[2]).status)
