"""Go on with held-out films by the models of the claim `vid-gpt`, seed 0: python scripts/make_vid_gpt.py

writes notebooks/papers/vid-gpt.safetensors: latents `4 4 33 8 8` in fp16 of nine true frames and six chunks, by arm, and "true".
The models are read from the claim's checkpoints where they are, else trained anew, four minutes each on one core.
"""

from pathlib import Path

import torch

from minivid.claims import vid_gpt as claim
from minivid.core import weights
from minivid.lab import claims, jobs

OUT = Path(__file__).resolve().parents[1] / "notebooks" / "papers" / "vid-gpt.safetensors"
SEED, FILMS, CHUNKS = 0, slice(0, 4), 6


if __name__ == "__main__":
    torch.set_num_threads(1)
    x = claim.held(SEED, False)[1][FILMS]
    made = {"true": x[:, :, : claim.GIVEN + claim.L * CHUNKS]}
    for name in ("causal", "full", "full, 4"):
        settings = {"slight": 0.1, "lengths": (), "contexts": (claim.ROOM,)} | claim.ARMS[name].settings
        folder = jobs.CACHE / jobs.key(claims.load("vid-gpt"), name, SEED, False)
        model = claim.trained(SEED, False, folder, settings["mode"], settings["slight"], tuple(settings["lengths"]))
        room = settings["contexts"][-1]
        made[name] = claim.made(model, x, CHUNKS, SEED, room, settings["slight"], claim.K[False])
    weights.write(OUT, {name: y.half() for name, y in made.items()}, {"by": "python scripts/make_vid_gpt.py", "seed": str(SEED)})
