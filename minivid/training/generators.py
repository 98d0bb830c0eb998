"""Generators of continuous latents: video transformers, block-causal ones, and U-Nets on pixels."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .. import world
from ..core import corpus, fit, noise, text, weights
from ..core.model import Cond
from ..core.rollout import block_loss
from ..core.tokenizer import Pix
from .recipe import Recipe, pick


def told(tokenizer: str, recipes: dict[str, int], frames: int, batch: int, size: int = 32, natural: int = 0) -> Callable:
    """Latents of so many clips of each recipe with their short captions, and of crops of the natural films without any."""

    def material(device):
        tok = weights.load(tokenizer, device)
        sets = {f"{r}-{n}x{frames}x{size}": corpus.clips(r, n, size, frames) for r, n in recipes.items()}
        if natural:
            sets[f"natural-{natural}x{frames}x{size}"] = corpus.natural(natural, size, frames)
        data = torch.cat([corpus.latents(tok, name, clips, device) for name, clips in sets.items()]).to(device)
        words = [corpus.captions(r, n) for r, n in recipes.items()] + [text.tokens([""]).expand(natural, -1)]
        said = torch.cat(words).to(device)

        def batches(i):
            rows = pick(i, len(data), batch, 7).to(device)
            return data[rows].float(), said[rows]

        return batches

    return material


def windows(tokenizer: str, recipe: str, n: int, batch: int, lengths: tuple[int, ...]) -> Callable:
    """Latents in which a frame is a frame, cut to `lengths[i % len(lengths)]` of 17 frames, with the captions.

    A step of short clips has more of them, at most four times as many, so that all steps cost about the same.
    """

    def material(device):
        tok = weights.load(tokenizer, device)
        data = corpus.latents(tok, f"{recipe}-{n}x17x32", corpus.clips(recipe, n, 32, 17), device).to(device)
        said = corpus.captions(recipe, n).to(device)

        def batches(i):
            f = lengths[i % len(lengths)]
            rows = pick(i, n, batch * min(4, max(lengths) // f), 7).to(device)
            first = int(pick(i, 17 - f + 1, 1, 31))
            return data[rows, :, first : first + f].float(), said[rows]

        return batches

    return material


def generate_loss(shift: float = 1.0) -> Callable:
    """Flow matching with one time a clip, one caption in ten emptied (for guidance)."""

    def objective(model, batch, generator):
        latent, words = batch
        b, _, f = latent.shape[:3]
        dropped = fit.uniform(b, generator=generator) < 0.1
        t = noise.logit_normal(b, f, generator, shift)
        eps = fit.normal(*latent.shape, generator=generator)
        return {"loss": noise.loss(model, noise.flow(), latent, t, Cond(text=words).drop(dropped), eps).mean()}

    return objective


def mixed(recipes: dict[str, int], frames: slice, device, length: int = 16) -> tuple[Tensor, Tensor]:
    """Clips in bytes `n 3 f 32 32` (those frames of 17) and word numbers `n length` of several recipes, n of each."""
    data = [torch.from_numpy(np.array(corpus.clips(r, n, 32, 17)[:, :, frames])) for r, n in recipes.items()]
    said = [corpus.captions(r, n, length=length) for r, n in recipes.items()]
    return torch.cat(data).to(device), torch.cat(said).to(device)


def pixels(batch: int, recipes: dict[str, int], still: bool) -> Callable:
    """`Pix(2)` latents of 8 frames (every other of 16), or of one frame anywhere, with their captions."""

    def material(device):
        data, said = mixed(recipes, slice(0, 17 if still else 16, 1 if still else 2), device)
        pix = Pix(2)

        def batches(i):
            rows = pick(i, len(data), batch, 17).to(device)
            clip = data[rows]
            if still:
                which = pick(i, data.shape[2], batch, 19).to(device)
                clip = clip[torch.arange(batch, device=device), :, which][:, :, None]
            return pix.encode(corpus.clip_of(clip)), said[rows]

        return batches

    return material


def chunk_words(recipe: str, n: int, chunks: int) -> Tensor:
    """Word numbers `n chunks 16`: what is seen in each chunk of 4 frames."""
    jobs = [(recipe, i, chunks) for i in range(n)]
    return corpus.by_all_cores(f"chunks-{recipe}-{n}x{chunks}-{text.VOCABULARY}", (n, chunks, 16), _chunk_words, jobs)


def _chunk_words(job) -> np.ndarray:
    recipe, i, chunks = job
    scene = world.draw(0, i, recipe)
    return text.tokens([world.chunk_caption(scene, 4 * j) for j in range(chunks)]).numpy()


def chunked(batch: int, n: int = 16384, chunks: int = 8, tokenizer: str = "tok-f") -> Callable:
    """Latents of films in which a scene returns (A B A C ...): `chunks` chunks of 4 frames out of 12, a caption a chunk.

    Every third step brings base clips of 4 chunks, so that the model also meets two bodies and captions with colours.
    """

    def material(device):
        tok, total = weights.load(tokenizer, device), 12
        sets = []
        for recipe, frames in (("recurrent", 4 * total), ("base", 16)):
            data = corpus.clips(recipe, n, 32, frames)
            sets.append((corpus.latents(tok, f"{recipe}-{n}x{frames}x32", data, device).to(device),
                         chunk_words(recipe, n, frames // 4).to(device)))

        def batches(i):
            (latent, said), base = sets[i % 3 == 2], i % 3 == 2
            rows = pick(i, n, batch, 23).to(device)
            first = 0 if base else int(pick(i, total - chunks + 1, 1, 29))
            last = first + (4 if base else chunks)
            return latent[rows][:, :, 4 * first : 4 * last].float(), said[rows][:, first:last]

        return batches

    return material


def block_objective(model, batch, generator) -> dict[str, Tensor]:
    """Flow matching on the noised chunks; one sample in ten without captions; the past at times up to 0.05."""
    latent, said = batch
    dropped = fit.uniform(len(latent), generator=generator) < 0.1
    return {"loss": block_loss(model, noise.flow(), latent, Cond(text=said).drop(dropped), generator, 0.05)}


RECIPES = {
    "video": Recipe(
        "video", dict(channels=10), told("tok-v", {"base": 49152}, 17, 32), generate_loss(3.0), 45000, 3e-3, 32, muon=1e-2
    ),
    "frames": Recipe(
        "video", dict(channels=4), windows("tok-f", "base", 49152, 32, (16, 8, 16, 1)), generate_loss(3.0), 12000, 3e-3, 32,
        muon=1e-2,
    ),
    "frames-64": Recipe(  # grounds with texture, and film, which `frames` never met
        "video", dict(channels=4), told("tok-f", {"base": 8192, "textured": 8192, "varied": 4096}, 8, 16, 64, natural=8192),
        generate_loss(3.0), 4000, 1.5e-3, 16, muon=5e-3, start="frames",
    ),
    "block": Recipe(
        "video", dict(channels=4, block=4), chunked(16, 8192), block_objective, 6000, 2e-3, 16, muon=5e-3, start="frames"
    ),
    "unet": Recipe("unet", {}, pixels(128, {"base": 65536}, False), generate_loss(2.0), 10000, 1.5e-3, 128, half=False),
    "unet-i": Recipe(
        "unet", dict(time=False), pixels(128, {"base": 24576, "textured": 8192}, True), generate_loss(1.5), 5000, 2e-3, 128,
        half=False,
    ),
}
