"""From captions to a clip: noise, the guided model, a sampler, the tokenizer's decoder; or a film, chunk by chunk."""

import torch
from jaxtyping import Float
from torch import Tensor

from . import fit, noise, text, weights
from .model import Cond, Guided
from .rollout import Plan, rollout


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


@torch.no_grad()
def film(
    captions: list[list[str]], known: Float[Tensor, "b c k h w"] | None = None, cache=None, seed: int = 0, steps: int = 20,
    guidance: float = 2.0, size: int = 32, model=None,
) -> Float[Tensor, "b c f h w"]:
    """Latents of films, one caption a chunk (`block` by default: 4 frames each, drawn by `tok-f`), after the chunks `known`.

    captions: for each film as many as it has chunks, the known ones too. cache: what is remembered of the past; None
    remembers nothing. Raises ValueError when films differ in length, or `known` is no whole number of chunks.
    """
    model = model or weights.load("block")
    chunk, lengths = model.block, {len(c) for c in captions}
    given = 0 if known is None else known.shape[2]
    if len(lengths) != 1 or given % chunk:
        raise ValueError(f"films have as many chunks each and known ones are whole, got {sorted(lengths)} and {given} / {chunk}")
    words, total = torch.stack([text.tokens(c) for c in captions]), lengths.pop() * chunk
    noises = start(len(captions), (model.channels, total, size // 4, size // 4), seed)
    plan = Plan(noise.flow(), noise.table(steps, chunk, shift=3.0))
    past = () if known is None else known.split(chunk, 2)
    return rollout(Guided(model, guidance), plan, noises[:, :, given:].split(chunk, 2), Cond(text=words), cache, first=past)
