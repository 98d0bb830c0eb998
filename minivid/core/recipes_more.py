"""Recipes of the models that aren't plain video transformers: `codes`, `qa`, `unet`, `unet-i`, `block`."""

import multiprocessing
import os
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import world
from ..world import questions
from . import corpus, fit, noise, text, weights
from .cache import Cache
from .codes import nll
from .model import Cond
from .rollout import block_loss
from .tokenizer import Pix
from .train import Recipe, generate_loss, pick


def mixed(recipes: dict[str, int], frames: slice, device, length: int = 16) -> tuple[Tensor, Tensor]:
    """Clips in bytes `n 3 f 32 32` (those frames of 17) and word numbers `n length` of several recipes, n of each."""
    data = [torch.from_numpy(np.array(corpus.clips(r, n, 32, 17)[:, :, frames])) for r, n in recipes.items()]
    said = [corpus.captions(r, n, length=length) for r, n in recipes.items()]
    return torch.cat(data).to(device), torch.cat(said).to(device)


# ---------------------------------------------------------------------------------------------------- codes

CODED = {"base": 24576, "cuts": 12288, "varied": 12288}


@torch.no_grad()
def codes_of(tokenizer, data: Tensor, batch: int = 128) -> Tensor:
    """Codes `n f h w` (bytes) of clips in bytes, by a tokenizer whose bottleneck has one grid of at most 256 codes."""
    parts = (tokenizer.bottleneck(tokenizer.features(corpus.clip_of(part)))[1][0] for part in data.split(batch))
    return torch.cat([p.to(torch.uint8) for p in parts])


def coded(batch: int, recipes: dict[str, int] = CODED, tokenizer: str = "tok-q") -> Callable:
    """Codes of 16 frames with their captions."""

    def material(device):
        tok = weights.load(tokenizer, device)
        data, said = mixed(recipes, slice(0, 16), device, 48)  # films of three shots take many words
        codes = codes_of(tok, data)

        def batches(i):
            rows = pick(i, len(codes), batch, 11).to(device)
            return codes[rows].long(), said[rows]

        return batches

    return material


def next_block(model, batch, generator) -> dict[str, Tensor]:
    """Negative log-likelihood a token in nats; one caption in ten emptied."""
    codes, said = batch
    dropped = fit.uniform(len(codes), generator=generator) < 0.1
    return {"nll": nll(model.predict(codes, Cond(text=said).drop(dropped)), codes).mean()}


# ---------------------------------------------------------------------------------------------------- questions

ASKED = {"base": 24576, "two": 12288, "many": 16384}
EACH = 4  # questions that are kept of each scene


def interviews(recipe: str, n: int, each: int = EACH) -> Tensor:
    """`each` questions about every scene with their answers, as word numbers `n each 9`: 8 places and the answer last."""
    name = f"questions-{recipe}-{n}x{each}-{text.VOCABULARY}"
    return by_all_cores(name, (n, each, 9), _interview, [(recipe, i, each) for i in range(n)])


def _interview(job) -> np.ndarray:
    recipe, i, each = job
    scene = world.draw(0, i, recipe)
    said = [questions.ask(scene, number) for number in range(each)]
    return torch.cat([text.tokens([q for q, _ in said], 8), text.tokens([a for _, a in said], 1)], 1).numpy()


def by_all_cores(name: str, shape: tuple[int, ...], function: Callable, jobs: list) -> Tensor:
    """The array of what `function` says of every job, made by all cores once and then kept with the corpus."""

    def parts():
        with multiprocessing.get_context("spawn").Pool(os.cpu_count(), torch.set_num_threads, (1,)) as pool:
            yield from (part[None] for part in pool.imap(function, jobs, 256))

    return torch.from_numpy(np.array(corpus._kept(name, shape, np.int64, parts, len(jobs))))


def asked(batch: int, recipes: dict[str, int] = ASKED) -> Callable:
    """Clips of 16 frames, each with a few questions and their answers."""

    def material(device):
        data = torch.cat([torch.from_numpy(np.array(corpus.clips(r, n, 32, 17)[:, :, :16])) for r, n in recipes.items()])
        said = torch.cat([interviews(r, n) for r, n in recipes.items()]).to(device)
        data = data.to(device)

        def batches(i):
            rows = pick(i, len(data), batch, 13).to(device)
            return corpus.clip_of(data[rows]), said[rows]

        return batches

    return material


def answer_right(model, batch, generator) -> dict[str, Tensor]:
    """Cross-entropy of the answers. The clip is watched once, then all its questions are asked."""
    clip, said = batch
    cache = Cache()
    model.watch(clip, cache)
    logits = torch.stack([model.answer(question, cache) for question in said[..., :8].unbind(1)], 1)
    loss = F.cross_entropy(logits.flatten(0, 1), said[..., 8].flatten())
    return {"loss": loss, "wrong": (logits.argmax(-1) != said[..., 8]).float().mean()}


# ---------------------------------------------------------------------------------------------------- U-Nets


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


# ---------------------------------------------------------------------------------------------------- block diffusion


def chunk_words(recipe: str, n: int, chunks: int) -> Tensor:
    """Word numbers `n chunks 16`: what is seen in each chunk of 4 frames."""
    jobs = [(recipe, i, chunks) for i in range(n)]
    return by_all_cores(f"chunks-{recipe}-{n}x{chunks}-{text.VOCABULARY}", (n, chunks, 16), _chunk_words, jobs)


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


MORE: dict[str, Recipe] = {
    "codes": Recipe("tokens", dict(codes=256), coded(64), next_block, 6000, 2e-3, 64),
    "qa": Recipe("answerer", {}, asked(128), answer_right, 6000, 1.5e-3, 128),
    "unet": Recipe("unet", {}, pixels(128, {"base": 65536}, False), generate_loss(2.0), 10000, 1.5e-3, 128),
    "unet-i": Recipe("unet", dict(time=False), pixels(512, {"base": 65536, "textured": 12288}, True), generate_loss(1.5), 8000, 1.5e-3, 512),
    "block": Recipe("video", dict(channels=4, block=4), chunked(64), block_objective, 10000, 1.5e-3, 64),
}
