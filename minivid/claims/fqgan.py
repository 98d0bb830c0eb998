"""FQGAN in a per-frame tokenizer of frames of 32 x 32, 8 x 8 cells: two small books against one large one, at equal bits.

All arms have the same encoder and decoder, 16 numbers a cell, batches (16 frames, 1,024 cells), steps and rate (2e-3, cosine; not
tuned for any arm). "fq": two heads of one block, two books of 2^(b/2) codes of 8 numbers, learnt by gradient, lambda 0.1.
"single": one head of two blocks, one book of 2^b unit vectors of 16 numbers, running means with restart, the same entropy term.
"residual": the same head, two books of 2^(b/2) one after the other, running means with restart. Bits are counted for all books
together. Frames: the world's recipes base, textured, varied and camera, 4,096 to learn from and 1,024 held out (65,536 cells).

The teacher of the second head ("meaning") is the caption as the shipped video model's text encoder reads it, words averaged and
centred. Single frames don't show motion, so the probes ask for colours and shapes alone: ridge regression on the mean of a book's
vectors over the frame, balanced accuracy over ten words, chance 50 points.

The heads for generation learn 300 steps on the codes of the trained tokenizer; nats a cell on held-out frames.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivid import world
from minivid.core import fit, text, weights
from minivid.core.baselines.vq import VQ, ResidualVQ
from minivid.core.corpus import scenes
from minivid.core.surgery import tap
from minivid.core.tokenizer import Tokenizer
from minivid.lab.claims import Arm, Claims, Compare, Floor
from minivid.tokenizers import fqgan as paper
from minivid.tokenizers.fqgan import FAR, Factorized, Head, Meaning
from minivid.training.recipe import pick
from minivid.world.scores import perplexity, psnr, usage

C, D, BATCH, RATE = 32, 16, 16, 2e-3  # channels before and behind the bottleneck, numbers a cell
STEPS, FAR_STEPS = (600, 4), (300, 3)  # full, fast
BITS = (8, 10, 12)
RECIPES = ("base", "textured", "varied", "camera")
MEANS = {"decay": 0.99, "restart": 0.1}


def bottleneck(how: str, bits: int, apart: float = 0.1, seed: int = 0) -> Factorized:
    """The bottleneck of an arm."""
    half = 2 ** (bits // 2)
    match how:
        case "fq" | "fq means":
            more = MEANS if how == "fq means" else {}
            books = [VQ(half, D // 2, unit=True, seed=2 * seed + i, **more) for i in range(2)]
            heads = [Head(C, D // 2) for _ in books]
        case "single":
            books = [VQ(2**bits, D, unit=True, seed=seed, **MEANS)]
            heads = [Head(C, D, depth=2)]
        case _:
            books = [ResidualVQ(*(VQ(half, D, seed=2 * seed + i, **MEANS) for i in range(2)))]
            heads = [Head(C, D, depth=2)]
    return Factorized(heads, books, nn.Conv3d(D, C, 1), apart)


# --- frames, captions, words ----------------------------------------------------------------------------------------------


@lru_cache(2)
@torch.no_grad()
def frames(split: str, fast: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Single frames `b 3 1 32 32`, their captions as the text encoder reads them `b d`, which of ten words are true `b 10`."""
    n = {"train": 64, "held-out": 64}[split] if fast else {"train": 4096, "held-out": 1024}[split]
    drawn = [s for recipe in RECIPES for s in scenes(recipe, n // len(RECIPES), 41, split)]
    ids = text.tokens([world.caption(s) for s in drawn], 64)
    read = torch.cat([weights.load("video").text(some) for some in ids.split(256)])
    there = (ids != text.PAD)[..., None]
    said = (read * there).sum(1) / there.sum(1)
    words = [*world.COLOURS, *world.SHAPES]
    true = torch.tensor([[any(w in (body.colour, body.shape) for body in s.bodies) for w in words] for s in drawn])
    return world.batch(drawn, 32, 1), said, true


# --- training -------------------------------------------------------------------------------------------------------------


def made(seed: int, fast: bool, how: str, bits: int, apart: float, meaning: float, steps: int | None = None) -> Tokenizer:
    """A tokenizer, trained as every arm is."""
    torch.manual_seed(seed)
    tok = Tokenizer(C, 1, (32, 64), (1, 2), bottleneck=bottleneck(how, bits, apart, seed), noise=0.0)
    clips, said, _ = frames("train", fast)
    said, steps = said - said.mean(0), steps or STEPS[fast]
    summary = Meaning(D // 2, said.shape[1]) if meaning else nn.Identity()
    adam = torch.optim.Adam([*tok.parameters(), *summary.parameters()], RATE, (0.9, 0.95), fused=True)

    def step(state, batch, generator):
        clip, told = batch
        adam.param_groups[0]["lr"] = RATE * fit.cosine(state.i, steps)
        with tap(tok, ["bottleneck.books.1"] if meaning else []) as heard:
            back, _, losses = tok(clip)
        error = back - clip
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = error.abs().mean() + edges + sum(loss for name, loss in losses.items() if name != "lean")
        if meaning:
            loss = loss + meaning * paper.infonce(summary(heard["bottleneck.books.1"][0]), told)
        adam.zero_grad(), loss.backward()
        nn.utils.clip_grad_norm_(tok.parameters(), 1.0)
        adam.step()
        return {"loss": loss}

    batches = lambda i: [x[pick(i, len(clips), BATCH, seed)] for x in (clips, said)]
    fit.fit(step, fit.State({"tok": tok, "summary": summary, "adam": adam}), batches, steps, seed)
    return tok.eval()


@torch.no_grad()
def codes_of(tok: Tokenizer, clips: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Codes `b books 64`, vectors of every book `b d f h w`, and the frames that come back."""
    grids, parts, back = [], [], []
    for clip in clips.split(64):
        part, codes, _ = tok.bottleneck.split(tok.features(clip))
        grids.append(torch.stack([c.index.flatten(1) for c in codes], 1)), parts.append(part)
        back.append(tok.decode(tok.bottleneck.join(torch.cat(part, 1))))
    return torch.cat(grids), [torch.cat(p) for p in zip(*parts, strict=True)], torch.cat(back)


def probe(seen: Tensor, true: Tensor, unseen: Tensor, answers: Tensor) -> float:
    """Balanced accuracy in points, mean over words, of ridge regression; each word's yes and no weigh the same."""
    mean, std = seen.mean(0), seen.std(0) + 1e-6
    a, b = (F.pad((x - mean) / std, (0, 1), value=1).double() for x in (seen, unseen))
    each = []
    for yes, was in zip(true.T, answers.T, strict=True):
        weigh = torch.where(yes, 0.5 / yes.double().mean().clamp(min=1e-3), 0.5 / (~yes).double().mean().clamp(min=1e-3))
        heavy = (a * weigh[:, None]).T
        w = torch.linalg.solve(heavy @ a + 1e-2 * len(a) * torch.eye(a.shape[1]), heavy @ (2 * yes.double() - 1))
        right = (b @ w > 0) == was
        each += [100 * right[side].double().mean().item() for side in (was, ~was) if side.any()]
    return sum(each) / len(each)


def naming(codes: Tensor, unseen: Tensor, sizes: tuple[int, ...], parallel: bool, seed: int, fast: bool) -> float:
    """Nats a cell (all books) that a generator pays on unseen codes."""
    torch.manual_seed(seed)
    model, steps = FAR(sizes, parallel=parallel), FAR_STEPS[fast]
    adam = torch.optim.AdamW(model.parameters(), 2e-3, (0.9, 0.95), fused=True)

    def step(state, batch, generator):
        adam.param_groups[0]["lr"] = 2e-3 * fit.cosine(state.i, steps)
        loss = model.nll(batch).sum()
        adam.zero_grad(), loss.backward(), adam.step()
        return {"loss": loss}

    fit.fit(step, fit.State({"model": model, "adam": adam}), lambda i: codes[pick(i, len(codes), BATCH, seed)], steps, seed)
    with torch.no_grad():
        return sum(model.nll(some).sum().item() * len(some) for some in unseen.split(128)) / len(unseen)


# --- what is measured -------------------------------------------------------------------------------------------------------


def tokenizer(seed, fast, how, bits, apart=0.1, meaning=0.0, name=False):
    """PSNR in dB, share of codes and words in use; of two books their cosines, what they share, and what each knows."""
    tok = made(seed, fast, how, bits, apart, meaning)
    (clips, _, true), (unseen, _, answers) = frames("train", fast), frames("held-out", fast)
    codes, parts, back = codes_of(tok, unseen)
    half = 2 ** (bits // 2)
    one = codes.shape[1] == 1
    word = codes[:, 0] if one else codes[:, 0] * half + codes[:, 1]
    found = {"psnr": psnr(back, unseen).mean().item(), "perplexity": perplexity(word, 2**bits), "words": usage(word, 2**bits)}
    found["usage"] = found["words"] if one else sum(usage(codes[:, j], half) for j in range(2)) / 2
    if len(parts) == 2:
        seen, old, _ = codes_of(tok, clips)
        found |= {"cos2": paper.apart(*parts).item(), "mutual": paper.mutual(codes[:, 0], codes[:, 1])}
        for j, book in enumerate(("first", "second")):
            found[book] = probe(old[j].mean((2, 3, 4)), true, parts[j].mean((2, 3, 4)), answers)
        found["ahead"] = found["second"] - found["first"]
        if name:
            turns, alone = (naming(seen, codes, (half, half), parallel, seed, fast) for parallel in (False, True))
            found |= {"nats": turns, "nats_parallel": alone, "gain": alone - turns}
    return found


# --- what is decided before the run -----------------------------------------------------------------------------------------

FILES = ("minivid/weights/video.safetensors",)  # the teacher
ARMS = {
    **{f"{how}, {b}": Arm(tokenizer, FILES, how=how, bits=b) for how in ("single", "residual") for b in BITS},
    **{f"fq, {b}": Arm(tokenizer, FILES, how="fq", bits=b, name=b == 10) for b in BITS},
    "fq means, 12": Arm(tokenizer, FILES, how="fq means", bits=12),
    **{f"lambda {x}": Arm(tokenizer, FILES, how="fq", bits=10, apart=float(x), name=True) for x in (0, 1)},
    "meaning": Arm(tokenizer, FILES, how="fq", bits=10, meaning=0.5),
}


def over(metric: str, method: str, baseline: str, margin: float, counts: bool = True, **rest) -> Compare:
    return Compare(f"{metric}: {method} over {baseline}", metric, method, baseline, margin, counts=counts, **rest)


CLAIMS = Claims(
    "fqgan",
    arms=ARMS,
    tests=[
        # 1: equal bits
        *(over("psnr", f"fq, {b}", f"single, {b}", -0.3) for b in (8, 10)),
        over("psnr", "fq, 12", "single, 12", 0.3),
        *(over("psnr", f"fq, {b}", f"residual, {b}", 0.0, counts=False) for b in BITS),
        over("psnr", "fq means, 12", "single, 12", 0.3, counts=False),
        # 2: apart
        Floor("cosines of lambda 0.1 lie below chance", "cos2", "fq, 10", at_most=0.125),
        over("cos2", "fq, 10", "lambda 0", 0.0, higher=False),
        over("mutual", "fq, 10", "lambda 0", 0.0, higher=False),
        over("psnr", "fq, 10", "lambda 0", -0.2),
        over("mutual", "lambda 1", "lambda 0", 0.0, higher=False, counts=False),
        # 3: division of labour
        Floor("the taught book knows more", "ahead", "meaning", at_least=10),
        Floor("untaught books know about as much", "ahead", "fq, 10", at_most=3),
        over("psnr", "meaning", "fq, 10", -0.3),
        # 4: one book after the other
        Floor("naming books in turn pays", "gain", "fq, 10", at_least=0.005),
        over("gain", "lambda 1", "lambda 0", 0.0, higher=False, counts=False),
    ],
    minutes=60,
)
