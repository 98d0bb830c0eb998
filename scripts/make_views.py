"""Train the small geometry transformer that the QuantVGGT claim and lesson quantise: two minutes on one core.

    python scripts/make_views.py

writes notebooks/papers/quantvggt.safetensors (fp16), whose header says what it was trained with and how well it does.
"""

import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from minivid.claims.quantvggt import scored, taught
from minivid.core import weights

OUT = Path(__file__).resolve().parents[1] / "notebooks" / "papers" / "quantvggt.safetensors"

if __name__ == "__main__":
    torch.set_num_threads(1)
    with tqdm(unit="step") as bar:
        model = taught(0, tell=lambda i, loss: bar.update() or bar.set_postfix(loss=f"{loss:.3f}"))
    weights.save(OUT, model, "views", {}, {"by": "python scripts/make_views.py"} | scored(model))
    print(json.dumps(scored(model)))
