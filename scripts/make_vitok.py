"""Draw two held-out clips by every code of the claim `vitok`, seed 0: python scripts/make_vitok.py

writes notebooks/papers/vitok.safetensors: clips `2 3 8 32 32` in bytes (every second frame), by code, and "true". The tokenizers
are read from the claim's checkpoints where they are, else trained anew, half a minute each on one core.
"""

from pathlib import Path

import torch

from minivid.claims import vitok as claim
from minivid.core import corpus, weights
from minivid.lab import claims, jobs

OUT = Path(__file__).resolve().parents[1] / "notebooks" / "papers" / "vitok.safetensors"
SEED, CLIPS = 0, (0, -1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    clip = claim.held(SEED, False)[1][list(CLIPS)]
    made = {"true": corpus.bytes_of(clip[:, :, ::2])}
    folder = jobs.CACHE / jobs.key(claims.load("vitok"), "sweep", SEED, False)
    for shape in claim.CODES:
        tok = claim.trained(SEED, False, folder, shape)
        with torch.no_grad():
            made[str(shape)] = corpus.bytes_of(tok.decode(tok.encode(clip))[:, :, ::2].clamp(-1, 1))
    weights.write(OUT, made, {"by": "python scripts/make_vitok.py", "seed": str(SEED)})
