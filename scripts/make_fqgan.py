"""Draw held-out frames by tokenizers of the claim `fqgan`, seed 0: python scripts/make_fqgan.py

writes notebooks/papers/fqgan.safetensors: frames in bytes, "true" and by arm `8 3 32 32`; "swap, arm" `16 3 32 32`, the first
head's codes of frame i with the second's of frame j (i, j from 0 to 3, row by row); "squared cosines, arm": their histogram
in 40 bins from 0 to 1. The tokenizers are read from the claim's checkpoints where they are, else trained anew, two minutes
each on one core.
"""

from pathlib import Path

import torch

from minivid.claims import fqgan as claim
from minivid.core import corpus, weights
from minivid.core.baselines.vq import Codes
from minivid.lab import claims, jobs

OUT = Path(__file__).resolve().parents[1] / "notebooks" / "papers" / "fqgan.safetensors"
SEED, FRAMES, SOME = 0, slice(0, 8), slice(0, 4)
ARMS = ("one, 12", "two, 12", "residual, 12", "three, 12", "captions", "lambda 0", "lambda 1")
SWAPPED, SPREAD = ("two, 12", "captions"), ("lambda 0", "two, 12", "lambda 1")


def tokenizer(name: str):
    folder = jobs.CACHE / jobs.key(claims.load("fqgan"), name, SEED, False)
    return claim.trained(SEED, False, folder, **claim.ARMS[name].settings)[0]


@torch.no_grad()
def swapped(tok, clips):
    """Frames of the first head's codes of one clip and the second's of another, all pairs."""
    n, grids = len(clips), tok.bottleneck.said(tok.features(clips))[1]
    first, second = grids[0].index.repeat_interleave(n, 0), grids[1].index.repeat(n, 1, 1, 1)
    return tok.decode(tok.bottleneck.lookup([Codes(first, None), Codes(second, None)]))


@torch.no_grad()
def squared_cosines(tok, clips):
    said = [tok.bottleneck.said(tok.features(some))[0] for some in clips.split(64)]
    a, b = (torch.cat(parts) for parts in zip(*said, strict=True))
    return torch.histc((a * b).sum(1).square(), 40, 0, 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    clips = claim.frames("held-out", False)[1]
    made, pixels = {"true": corpus.bytes_of(clips[FRAMES])[:, :, 0]}, lambda clip: corpus.bytes_of(clip.clamp(-1, 1))[:, :, 0]
    for name in ARMS:
        tok = tokenizer(name)
        with torch.no_grad():
            made[name] = pixels(tok.decode(tok.encode(clips[FRAMES])))
        if name in SWAPPED:
            made[f"swap, {name}"] = pixels(swapped(tok, clips[SOME]))
        if name in SPREAD:
            made[f"squared cosines, {name}"] = squared_cosines(tok, clips)
    weights.write(OUT, made, {"by": "python scripts/make_fqgan.py", "seed": str(SEED)})
