"""Training material: clips drawn once by all cores and kept in a git-ignored folder; latents, likewise.

Everything here is a function of its arguments, so the folder may be deleted at any time.
"""

import contextlib
import fcntl
import hashlib
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from tqdm.auto import tqdm

from .. import world
from ..world.clips import natural_crops
from . import text

CHUNK = 256


def runs() -> Path:
    """The git-ignored folder of everything that can be made again: `runs`, or where MINIVID_RUNS points."""
    return Path(os.environ.get("MINIVID_RUNS", "runs"))


def bytes_of(clip: Float[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """A clip in [-1, 1] as bytes."""
    return ((clip.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def clip_of(data: UInt8[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Bytes as a clip in [-1, 1]."""
    return data.float() / 127.5 - 1


def scenes(recipe: str, n: int, seed: int = 0, split: str = "train", first: int = 0) -> list:
    """n scenes of a recipe, from number `first` on."""
    return [world.draw(seed, i, recipe, split) for i in range(first, first + n)]


def _chunk(job) -> np.ndarray:
    torch.set_num_threads(1)
    recipe, first, n, size, frames, seed, split = job
    return bytes_of(world.batch(scenes(recipe, n, seed, split, first), size, frames)).numpy()


@contextlib.contextmanager
def alone(path: Path):
    """One process at a time makes `path`; the others wait and find it made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _kept(name: str, shape: tuple[int, ...], dtype, parts, total: int) -> np.ndarray:
    """The array `name`, from its file or made of `parts` (arrays that follow one another along the first axis)."""
    path = runs() / "corpus" / f"{name}.npy"
    with alone(path):
        if not path.exists():
            temporary = path.with_suffix(".part")
            out = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
            at = 0
            for part in tqdm(parts(), total=total, desc=name, mininterval=2):
                out[at : at + len(part)] = part
                at += len(part)
            out.flush()
            os.replace(temporary, path)
    return np.load(path, mmap_mode="r")


def clips(recipe: str, n: int, size: int = 32, frames: int = 17, seed: int = 0, split: str = "train") -> np.ndarray:
    """n clips of a recipe as bytes `n 3 f h w`, drawn by all cores, read from disk the second time."""
    sample = world.batch(scenes(recipe, 8, seed, split), size, frames)  # another world must not find this one's clips
    mark = hashlib.sha256(bytes_of(sample).numpy().tobytes()).hexdigest()[:8]
    jobs = [(recipe, i, min(CHUNK, n - i), size, frames, seed, split) for i in range(0, n, CHUNK)]

    def parts():
        with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, len(jobs))) as pool:
            yield from pool.imap(_chunk, jobs)

    return _kept(f"{recipe}-{split}-{seed}-{n}x{frames}x{size}-{mark}", (n, 3, frames, size, size), np.uint8, parts, len(jobs))


def by_all_cores(name: str, shape: tuple[int, ...], function: Callable, jobs: list, dtype=np.int64) -> Tensor:
    """The array (integers) of what `function` says of every job, made by all cores once and then kept."""

    def parts():
        with multiprocessing.get_context("spawn").Pool(os.cpu_count(), torch.set_num_threads, (1,)) as pool:
            yield from (part[None] for part in pool.imap(function, jobs, 256))

    return torch.from_numpy(np.array(_kept(name, shape, dtype, parts, len(jobs))))


def captions(recipe: str, n: int, seed: int = 0, split: str = "train", length: int = 16) -> Tensor:
    """The short captions of the same scenes as word numbers `n l`."""
    return text.tokens([world.caption(s) for s in scenes(recipe, n, seed, split)], length)


@torch.no_grad()
def encoded(tokenizer, name: str, data: np.ndarray, like: tuple, say: Callable, batch: int = 8) -> Tensor:
    """What `say` says of clips in bytes, kept by all who ask. like: shape of one and dtype, such as ((16, 8, 8), np.uint8).

    name: what the clips are; the first of them and the tokenizer are part of the key
    """
    values = [v.cpu().numpy() for v in tokenizer.state_dict().values()]
    key = hashlib.sha256(b"".join(v.tobytes() for v in [np.array(data[:8]), *values])).hexdigest()[:12]

    def parts():
        for i in range(0, len(data), batch):
            yield say(torch.from_numpy(np.array(data[i : i + batch]))).cpu().numpy()

    return torch.from_numpy(np.array(_kept(f"{name}-{key}", (len(data), *like[0]), like[1], parts, -(-len(data) // batch))))


def latents(tokenizer, name: str, data: np.ndarray, device="cpu") -> Tensor:
    """Latents `n c f h w` (fp16) of clips in bytes, see `encoded`."""
    say = lambda some: tokenizer.encode(clip_of(some.to(device))).half()
    return encoded(tokenizer, f"latents-{name}", data, (tokenizer.latent_shape(*data.shape[2:]), np.float16), say)


def natural(n: int, size: int, frames: int, split: str = "train", seed: int = 0) -> np.ndarray:
    """n crops of the bundled natural clips as bytes `n 3 f size size`."""

    def parts():
        for i in range(0, n, CHUNK):
            m = min(CHUNK, n - i)
            yield bytes_of(natural_crops(m, size, frames, split, seed * 100_003 + i)).numpy()

    return _kept(f"natural-{split}-{seed}-{n}x{frames}x{size}", (n, 3, frames, size, size), np.uint8, parts, -(-n // CHUNK))
