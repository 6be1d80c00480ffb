"""Without a GPU the Triton backends are interpreted, which has to be said before a kernel is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
