"""Make what the lesson on sparse attention shows but can't compute while a reader turns a knob: python scripts/make_explorer.py

One caption, one noise, the model with one pattern in all heads: the clip it believes in at four of its 20 steps, as latents.
Besides: the errors of all five modes at four widths, mean attention maps, and what each epsilon costs and keeps. The lesson
reads notebooks/papers/sparse-vdit.safetensors, whose header names the weights it was made with. Minutes on one core.
"""

import hashlib
import json
from dataclasses import astuple
from pathlib import Path

import torch
from torch.nn.functional import avg_pool2d

from minivid.core import noise, sample, text, weights
from minivid.core.attention import scores
from minivid.core.corpus import captions
from minivid.core.model import Cond, Guided
from minivid.sparse_attention import sparse_vdit as paper
from minivid.sparse_attention.sparse_vdit import Mode
from minivid.world.scores import psnr

OUT = Path(__file__).resolve().parents[1] / "notebooks" / "papers" / "sparse-vdit.safetensors"
MODEL, TOKENIZER, GRID = "frames", "tok-f", (16, 4, 4)
CAPTION, SEED, STEPS, SHOWN = "a red circle moves right", 3, 20, (1, 5, 11, 19)
WIDTHS = {0: 1, 1: 3, 2: 5, 4: 8}  # of the windows; columns of stripes that cost about as much
EPSILONS = [0.025 * i for i in range(25)]


def beliefs(model, words, x) -> torch.Tensor:
    """The clean latents `s b c f h w` that the guided model believes in at the shown steps."""
    seen = []

    def step(path, predict, x, t, s, generator):
        seen.append(predict(x, t))
        return noise.remix(path, x, seen[-1], t, s)

    noise.sample(Guided(model, 2.0), noise.flow(), x, Cond(text=words), noise.table(STEPS, x.shape[2], shift=3.0), step)
    return torch.stack([seen[i] for i in SHOWN])


def looked(model, calibrate) -> tuple:
    """Candidate tables and their errors `w l k m` for each width; mean maps `l k 64 64`."""
    tables = [paper.candidates(model, calibrate, width, columns) for width, columns in WIDTHS.items()]
    errors = torch.stack([paper.errors(model, calibrate, table).mean((0, 1)) for table in tables])
    maps: dict[int, list] = {}
    calibrate(paper.watched(model, lambda i, q, k, v, where: maps.setdefault(i, []).append(scores(q, k, where).mean(0))))
    mean = torch.stack([torch.stack(maps[i]).mean(0) for i in sorted(maps)])
    return tables, errors, avg_pool2d(mean, mean.shape[-1] // 64)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = weights.load(MODEL), weights.load(TOKENIZER)
    shape = tokenizer.latent_shape(GRID[0], 32, 32)
    words, train = text.tokens([CAPTION]), captions("base", 6, seed=1)
    x = sample.start(6, shape, 100)
    few = noise.table(5, GRID[0], shift=3.0)
    calibrate = lambda m: noise.sample(Guided(m, 2.0), noise.flow(), x, Cond(text=train), few)
    tables, errors, maps = looked(model, calibrate)

    runs = {"dense": model}
    for candidates, width in zip(tables, WIDTHS, strict=True):
        runs |= {f"{table[0][0].kind} {width}": paper.sparsify(model, table) for table in candidates[2:]}
    runs["skip 0"] = paper.sparsify(model, tables[0][1])
    cost = torch.tensor([paper.share(table[0][0], GRID) for table in tables[1]])
    for width in WIDTHS:  # the search, at the cost of each window
        limit = paper.tolerance(errors[1], cost, max(paper.share(Mode("diagonal", width), GRID), 0.2))
        runs[f"searched {width}"] = paper.sparsify(model, paper.assemble(paper.search(errors[1], cost, epsilon=limit), tables[1]))
    clips = {name: beliefs(one, words, sample.start(1, shape, SEED))[:, 0] for name, one in runs.items()}
    clips["second seed"] = beliefs(model, words, sample.start(1, shape, SEED + 1))[:, 0]

    four, noises, curve, kept = train[:4], sample.start(4, shape, SEED), [], {}
    whole = tokenizer.decode(beliefs(model, four, noises)[-1])
    for epsilon in EPSILONS:
        choice = paper.search(errors[1], cost, epsilon=epsilon)
        key = tuple(choice.flatten().tolist())
        if key not in kept:
            made = tokenizer.decode(beliefs(paper.sparsify(model, paper.assemble(choice, tables[1])), four, noises)[-1])
            kept[key] = cost[choice].mean().item(), psnr(made, whole).mean().item()
        curve.append((epsilon, *kept[key]))

    tensors = {"clips": torch.stack(list(clips.values())).half(), "errors": errors, "maps": maps.half(),
               "curve": torch.tensor(curve)}  # fmt: skip
    plain = [[[[astuple(mode) for mode in row] for row in table] for table in candidates] for candidates in tables]
    header = {"kind": "explorer", "caption": CAPTION, "seed": str(SEED), "steps": json.dumps(SHOWN),
              "names": json.dumps(list(clips)), "tables": json.dumps(plain), "weights": made_with()}  # fmt: skip
    OUT.parent.mkdir(exist_ok=True)
    weights.write(OUT, tensors, header)
    print(OUT, f"{OUT.stat().st_size / 1e6:.2f} MB")


def made_with() -> str:
    """The first digits of the hashes of both files of weights."""
    return " ".join(hashlib.sha256(weights.path_of(name).read_bytes()).hexdigest()[:12] for name in (MODEL, TOKENIZER))


if __name__ == "__main__":
    main()
