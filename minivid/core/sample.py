"""From a caption to a clip: noise, the guided model, a sampler, the tokenizer's decoder."""

import torch
from jaxtyping import Float
from torch import Tensor

from . import fit, noise, text, weights
from .model import Cond, Guided


def start(n: int, shape: tuple[int, ...], seed: int = 0) -> Float[Tensor, "b c f h w"]:
    """The noise that samples begin with. Each sample has its own number, so a batch of one and a batch of many agree."""
    return torch.stack([torch.randn(shape, generator=fit.draws(seed, i)) for i in range(n)])


def generate(
    captions: list[str], seed: int = 0, steps: int = 20, guidance: float = 2.0, frames: int = 17, size: int = 32,
    model=None, tokenizer=None,
) -> Float[Tensor, "b 3 f h w"]:
    """Clips in [-1, 1] that follow the captions, by Euler's rule on the flow path.

    model, tokenizer: shipped `video` and `tok-v` by default. Raises ValueError for words outside the vocabulary, and for
    a number of frames (1 + 4k) or a size (a multiple of 8) that the two can't make.
    """
    if steps < 1:
        raise ValueError(f"sampling takes at least one step, got {steps}")
    words = text.tokens(captions)
    model, tokenizer = model or weights.load("video"), tokenizer or weights.load("tok-v")
    if not tokenizer.frames(frames) or size % 8 or size < 8:
        raise ValueError(f"frames must be 1 + {tokenizer.time_stride}k and size a multiple of 8, got {frames} and {size}")
    x = start(len(captions), tokenizer.latent_shape(frames, size, size), seed)
    times = noise.table(steps, x.shape[2], shift=3.0)  # short steps near noise: it is there that what and where are decided
    latent = noise.sample(Guided(model, guidance), noise.flow(), x, Cond(text=words), times)
    with torch.no_grad():
        return tokenizer.decode(latent)
