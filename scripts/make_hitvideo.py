"""Keep three tokenizers of the claim `hitvideo`, seed 0: python scripts/make_hitvideo.py

writes notebooks/papers/hitvideo.safetensors: the values of "layers 8" (trained with dropping), "never dropped" and "flowing" in
fp16. They are read from the claim's checkpoints where they are, else trained anew, a minute each on one core.
"""

from pathlib import Path

import torch

from minivid.claims import hitvideo as claim
from minivid.core import weights
from minivid.lab import claims, jobs
from minivid.tokenizers.hitvideo import HiTVideo

OUT = Path(__file__).resolve().parents[1] / "notebooks" / "papers" / "hitvideo.safetensors"
SEED = 0


def tokenizer(name: str):
    folder = jobs.CACHE / jobs.key(claims.load("hitvideo"), name, SEED, False)
    if name != "flowing":
        return claim.tokenizer(SEED, False, "layers", 8, claim.ARMS[name].settings.get("drop", 0.0), folder)
    torch.manual_seed(SEED)
    tok = HiTVideo(claim.levels("layers", 8), 0.0, 16, (16, 32), (1, 1), SEED)
    tok.bottleneck.__class__ = claim.Flowing
    return claim.train(tok, claim.material(False)[0], claim.STEPS[0], SEED, folder / "tokenizer.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    states = {name: tokenizer(name).state_dict() for name in (claim.KEPT, claim.NEVER, "flowing")}
    every = {f"{name}: {key}": value for name, state in states.items() for key, value in state.items()}
    made = {name: value.half() if value.is_floating_point() else value for name, value in every.items()}
    weights.write(OUT, made, {"by": "python scripts/make_hitvideo.py", "seed": str(SEED)})
