"""Draw one caption from one noise by every small model of the chapter on quantization: python scripts/make_few_bits.py

writes notebooks/06_quantization.safetensors: every fourth frame of each clip in bytes, "way, bits" -> `c f h w`. The models are
those of the claim `few-bits`, seed 0. Clips that the file has already stay as they are: delete it to draw them all anew, which
takes half an hour on one core.
"""

from pathlib import Path

import torch
from tqdm.auto import tqdm

from minivid.claims import few_bits as claim
from minivid.core import weights
from minivid.core.sample import generate

OUT = Path(__file__).resolve().parents[1] / "notebooks" / "06_quantization.safetensors"
CAPTION, SEED = "a red circle moves right", 3
MODELS = {claim.nearest: claim.to_nearest, claim.gptq: claim.by_gptq, claim.tuned: claim.by_tuned_steps,
          claim.searched: claim.by_search, claim.shared_out: claim.by_curvature, claim.rotated: claim.by_rotation,
          claim.codewords: claim.by_codewords, claim.trained: claim.by_training, claim.shifted: claim.by_shifts}  # fmt: skip


def stills(model) -> torch.Tensor:
    clip = generate([CAPTION], SEED, model=model, tokenizer=claim.loaded("tok-v"))[0, :, ::4]
    return clip.add(1).mul(127.5).round().byte()


if __name__ == "__main__":
    torch.set_num_threads(1)
    made = weights.read(OUT)[0] if OUT.exists() else {"float": stills(claim.loaded("video"))}
    for name, arm in tqdm(claim.CLAIMS.arms.items()):
        if arm.run in MODELS and name not in made:
            made[name] = stills(MODELS[arm.run](0, False, **arm.settings))
    weights.write(OUT, made, {"by": "python scripts/make_few_bits.py", "caption": CAPTION, "seed": str(SEED)})
