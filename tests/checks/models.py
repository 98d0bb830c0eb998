"""Models that tests of many papers are tried on."""

import torch
from torch import nn

from minivid.core.model import VideoModel
from minivid.core.surgery import parts


def video(seed: int = 0, d: int = 16) -> VideoModel:
    """A small video model whose every parameter is random, as if trained (a fresh one says 0)."""
    torch.manual_seed(seed)
    model = VideoModel(4, d, 2, 2)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval().requires_grad_(False)


def linears(model: nn.Module) -> list[str]:
    """Names of the linear layers of its blocks."""
    return [name for name, _, role in parts(model) if name.startswith("trunk") and role != "block"]
