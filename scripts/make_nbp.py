"""Go on with held-out clips by the models of the claim `nbp`, seed 0: python scripts/make_nbp.py

writes notebooks/papers/nbp.safetensors: codes `4 8 8 8` in bytes, "arm, way" (see the claim), and "true". The models are read
from the claim's checkpoints where they are, else trained anew, two minutes each on one core.
"""

from pathlib import Path

import torch

from minivid.block_diffusion import nbp as paper
from minivid.claims import nbp as claim
from minivid.core import weights
from minivid.core.model import Cond
from minivid.lab import claims, jobs

OUT = Path(__file__).resolve().parents[1] / "notebooks" / "papers" / "nbp.safetensors"
SEED, CLIPS = 0, slice(0, 6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    codes = claim.held(SEED, False)[1]
    u = torch.rand(codes.shape, generator=torch.Generator().manual_seed(SEED))[CLIPS]
    made = {"true": codes[CLIPS]}
    for name in claim.SIZES:
        folder = jobs.CACHE / jobs.key(claims.load("nbp"), name, SEED, False)
        model = claim.trained(SEED, False, claim.SHAPES[name], folder)
        for way, how in claim.WAYS.items():
            made[f"{name}, {way}"] = paper.generate(model, claim.FRAMES, Cond(), codes[CLIPS, : claim.GIVEN], None, u, how)
    weights.write(OUT, {name: x.byte() for name, x in made.items()}, {"by": "python scripts/make_nbp.py", "seed": str(SEED)})
