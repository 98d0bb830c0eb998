"""The shared models against the floors they must reach: a weak baseline would make every later claim true.

Tokenizers reconstruct held-out clips of the world (other seeds, held-out combinations) and the columns of the natural films
that training never saw. The generator is given captions whose colour-shape-motion combination was held out, and the judge
reads back what it drew; then one word of each caption is changed, with the same noise, and what that word names must change.
`block` is given the true scenes A and B and draws A's return, whose caption names its shape and not its colour; then two true
chunks, and draws thirty more with the last seven in its cache.

Outcome: the tokenizers reach their floors, but for `tok-f` on natural clips: 4 numbers for 48 leave no room for grass, and it
has no neighbouring frames to borrow from, as `tok-v` has. The feature networks name shapes; `feat-b` sees velocities nearly as
well as it should. The generator, after 1.4 million clips in a hundred minutes of two cores, does what captions with unknown
combinations say: colours, directions, and a single changed word. Shapes come out right in 86 of 100 bodies where 90 are asked
for, and of two bodies both are right in every respect only half of the time; `tok-v` itself lets the judge read 97 of 100
shapes. Three quarters of the heads of `frames` do with one window, if what counts is the energy of what they say; of what
varies in it, nearly half do. `block` gives every returning body the colour that it had, and with the scene out of its cache one
in nine, as by guessing; its shapes, 81 of 100, are as `tok-f` shows them. After 32 chunks, four times what it was trained on,
nothing has blurred and 76 of 100 chunks show the one body that was told, where 80 were asked for: 85 do in the first eight, and
bodies that leave the frame come back as smears. `tok-q` draws the world at 31.3 dB with codes of 8 bits, 0.7 less than asked;
250 of its 256 codes are in use. `codes` says a code of a held-out clip, rows of eight at once, with 1.1 bits, where its
frequency alone would take 6.6; leaving the caption out costs 7 % more, so most of it is said by the frames before. `qa` answers
nearly every question about held-out clips (one wrong of 2,304). How all got here stands in docs/log.md.
"""

import math

import torch

from minivid import world
from minivid.core import attention, noise, sample, surgery, text, weights
from minivid.core.cache import Cache, Window
from minivid.core.codes import nll
from minivid.core.corpus import bytes_of, scenes
from minivid.core.model import Cond
from minivid.core.sample import generate
from minivid.lab.claims import Arm, Claims, Floor
from minivid.training.tokenizers import answers
from minivid.training.tokens import codes_of
from minivid.world import questions
from minivid.world.clips import natural_crops
from minivid.world.judge import judge, read_many, score
from minivid.world.scores import psnr, sharpness


@torch.no_grad()
def recognise(seed, fast, name):
    """Shares of held-out clips whose colours are all named and of shapes; error of the velocity in sides per 16 frames."""
    n, net = 16 if fast else 256, weights.load(name)
    asked = scenes("base", n, 3000 + seed, "held-out")
    said, truth = net.answers(world.batch(asked, 32, 17)), torch.stack([answers(s) for s in asked])
    there = truth[..., 0] > 0
    return {
        "colours": ((said[..., 0] > 0) == there).all(-1).float().mean().item(),
        "shapes": (said[..., 1:-2].argmax(-1) == truth[..., 1])[there].float().mean().item(),
        "velocity": (said[..., -2:] - truth[..., 2:])[there].abs().mean().item(),
    }


@torch.no_grad()
def reconstruct(seed, fast, name, frames):
    """PSNR in dB over held-out clips of the world and of the natural films at 32 px; pixels per number of the latent."""
    tokenizer, n = weights.load(name), 8 if fast else 128
    found = {}
    for kind in ("world", "natural"):
        if kind == "world":
            clips = world.batch(scenes("base", n, 1000 + seed, "held-out"), 32, frames)
        else:
            clips = natural_crops(n, 32, frames, "held-out", seed)
        latent = tokenizer.encode(clips)
        found[kind] = psnr(tokenizer.decode(latent), clips).mean().item()
    found["fewer"] = clips.numel() / latent.numel()
    found["spread"] = (latent.std((0, 2, 3, 4)) - 1).abs().max().item()
    return found


@torch.no_grad()
def tokens(seed, fast):
    """Codes of held-out clips: how many of 256 occur, the bits of one by its frequency alone, and by `codes`, as shares of that.

    "likely": negative log-likelihood under teacher forcing, rows of eight at once; "unread": with the captions left out
    """
    n, tok, model = 2 if fast else 128, weights.load("tok-q"), weights.load("codes")
    asked = scenes("base", n, 2000 + seed, "held-out")
    codes = codes_of(tok, bytes_of(world.batch(asked, 32, 16)), 8).long()
    share = torch.bincount(codes.flatten(), minlength=256) / codes.numel()
    alone = -(share * share.clamp_min(1e-12).log()).sum()
    said = text.tokens([world.caption(scene) for scene in asked], 48)
    bits = lambda said: torch.cat([nll(model.predict(some, Cond(text=words)), some)
                                   for some, words in zip(codes.split(8), said.split(8), strict=True)]).mean()  # fmt: skip
    return {"used": (share > 0).sum().item(), "alone": (alone / math.log(2)).item(), "likely": (bits(said) / alone).item(),
            "unread": (bits(text.tokens([""] * n, 48)) / alone).item()}  # fmt: skip


@torch.no_grad()
def questioned(seed, fast):
    """Share of right answers of `qa` about held-out clips of three recipes: of all, and by kind of question (see `questions`)."""
    model, right = weights.load("qa"), {}
    for recipe in ("base", "two", "many"):
        some, cache = scenes(recipe, 4 if fast else 64, 4000 + seed, "held-out"), Cache()
        model.watch(world.batch(some, 32, 16), cache)
        for number in range(2 if fast else 4):
            pairs = [questions.ask(scene, number) for scene in some]
            said = model.answer(text.tokens([q for q, _ in pairs], 8), cache).argmax(-1)
            true = text.tokens([a for _, a in pairs], 1)[:, 0]
            for scene, pair, ok in zip(some, pairs, said == true, strict=True):
                kind = next(kind for kind, such in questions.questions(scene).items() if pair in such)
                right.setdefault(kind, []).append(ok.item())
    share = lambda some: sum(some) / len(some)
    return {"right": share(sum(right.values(), []))} | ({} if fast else {kind: share(x) for kind, x in sorted(right.items())})


def follow(seed, fast, name):
    """Shares of what the judge reads back from clips of held-out captions, and of changed words that changed their thing."""
    n, model = 8 if fast else 128, weights.load(name)
    asked = scenes("base", n, 2000 + seed, "held-out")
    clips = generate([world.caption(s) for s in asked], seed, steps=5 if fast else 20, model=model)
    found = {k: v for k, v in judge(clips, asked).items() if k in ("colour", "shape", "motion", "binding", "count")}
    if fast:
        return found
    right = []
    for i, scene in enumerate(asked[:60]):
        field = ("colour", "shape", "motion")[i % 3]
        other = world.vary(scene, field, seed)
        drawn = generate([world.caption(other)], seed * 1000 + i, model=model)[0]
        right.append(score(drawn, other)[field] is True)
    return {**found, "swapped": sum(right) / len(right)}


@torch.no_grad()
def windows(seed, fast, name, tokenizer):
    """Shares of the heads to which one window is enough: 10 % lost of the energy of what they say, or of what varies in it.

    A window is two frames to either side, or two of 16 places (in rows), each fixed for the head; noisy held-out clips.
    """
    model, tok, n = weights.load(name), weights.load(tokenizer), 1 if fast else 8
    asked = scenes("base", n, 2000 + seed, "held-out")
    latent, said = tok.encode(world.batch(asked, 32, 16)), Cond(text=text.tokens([world.caption(s) for s in asked]))
    layers = [part for part, module in model.named_modules() if isinstance(module, attention.Attention)]
    lost = torch.zeros(2, len(layers), 2, model.trunk.blocks[0].attention.heads)  # energy or variation, layer, window, head

    def watch(i):
        def attend(q, k, v, where):
            full, weight = attention.dense(q, k, v, where), attention.scores(q, k, where)
            frame, row, column = where.coords[0].long().unbind(-1)
            for w, place in enumerate((frame, row * where.grid[2] + column)):
                kept = weight * ((place[:, None] - place).abs() <= 2)
                gap = (kept / kept.sum(-1, keepdim=True) @ v - full).square().mean((0, 2, 3))
                lost[0, i, w] += gap / full.square().mean((0, 2, 3)) / 4
                lost[1, i, w] += gap / full.var(2, unbiased=False).mean((0, 2)) / 4
            return full

        return attend

    watched = surgery.swap(model, {f"{part}.attend": watch(i) for i, part in enumerate(layers)})
    for t in (0.3, 0.5, 0.7, 0.9):
        x = noise.flow().at(latent, sample.start(n, latent.shape[1:], seed), torch.tensor(t))
        watched(x, torch.full((n,), t), said)
    energy, varying = (lost.amin(2) < 0.1).float().mean((1, 2)).tolist()
    return {"windows": energy, "windows_varying": varying}


def told(scene, chunks):
    """The caption of each chunk of a film."""
    return [world.chunk_caption(scene, 4 * i) for i in range(chunks)]


@torch.no_grad()
def recall(seed, fast, past):
    """Shares of right colours and shapes of scene A when it comes back after B: A and B are true frames, A's return is made.

    past: "all" of it is in the cache, or the last "two" chunks: only B, and then A's colour is chance (its shape is told)
    """
    n, tok, found = 4 if fast else 32, weights.load("tok-f"), []
    films = scenes("recurrent", n, 5000 + seed, "held-out")
    for chunks in sorted({film.cuts[2].start // 4 for film in films}):  # A and B last 2 to 4 chunks each
        some = [film for film in films if film.cuts[2].start == 4 * chunks]
        true = tok.encode(world.batch(some, 32, 4 * chunks))
        cache = Cache() if past == "all" else Window(2)
        made = sample.film([told(f, chunks + 2) for f in some], true, cache, seed, 5 if fast else 20)
        found += [score(clip, f.cuts[0].shot) for clip, f in zip(tok.decode(made[:, :, 4 * chunks :]), some, strict=True)]
    return {name: sum(one[name] is True for one in found) / n for name in ("colour", "shape")}


@torch.no_grad()
def lasting(seed, fast):
    """Shares of chunks in which just one body is seen, of the shape that the caption names: the first and last eight of 32.

    Two chunks are true; the other 30 are made, four times the eight chunks of training, with the last seven in the cache.
    """
    n, tok, chunks = 2 if fast else 6, weights.load("tok-f"), 8 if fast else 32
    films = scenes("recurrent", n, 6000 + seed)
    known = tok.encode(world.batch(films, 32, 8))
    clips = tok.decode(sample.film([told(f, chunks) for f in films], known, Window(7), seed, 5 if fast else 20))
    right = torch.zeros(n, chunks)
    for i, film in enumerate(films):
        for j, seen in enumerate(read_many(torch.stack(clips[i].split(4, 1)))):
            right[i, j] = len(seen.bodies) == 1 and str(seen.bodies[0].shape) in told(film, chunks)[j].split()
    edge = chunks // 4
    sharp = sharpness(clips[:, :, -4 * edge :]).mean() / sharpness(clips[:, :, 8 : 8 + 4 * edge]).mean()
    early, late = right[:, 2 : 2 + edge].mean().item(), right[:, -edge:].mean().item()
    return {"early": early, "late": late, "kept": late / max(early, 0.01), "sharpness": sharp.item()}


BLOCK = ["minivid/weights/block.safetensors", "minivid/weights/tok-f.safetensors"]
CLAIMS = Claims(
    "core",
    arms={
        "tok-v": Arm(reconstruct, files=["minivid/weights/tok-v.safetensors"], name="tok-v", frames=17),
        "tok-f": Arm(reconstruct, files=["minivid/weights/tok-f.safetensors"], name="tok-f", frames=16),
        "tok-q": Arm(reconstruct, files=["minivid/weights/tok-q.safetensors"], name="tok-q", frames=16),
        "codes": Arm(tokens, files=["minivid/weights/tok-q.safetensors", "minivid/weights/codes.safetensors"]),
        "qa": Arm(questioned, files=["minivid/weights/qa.safetensors"]),
        "feat-a": Arm(recognise, files=["minivid/weights/feat-a.safetensors"], name="feat-a"),
        "feat-b": Arm(recognise, files=["minivid/weights/feat-b.safetensors"], name="feat-b"),
        "video": Arm(follow, files=["minivid/weights/video.safetensors", "minivid/weights/tok-v.safetensors"], name="video"),
        "frames": Arm(windows, files=["minivid/weights/frames.safetensors", "minivid/weights/tok-f.safetensors"],
                      name="frames", tokenizer="tok-f"),
        **{f"block: {past}": Arm(recall, files=BLOCK, past=past) for past in ("all", "two")},
        "block: 32 chunks": Arm(lasting, files=BLOCK),
    },
    tests=[
        Floor("frames: a window is enough for a third of the heads", "windows", "frames", at_least=1 / 3),
        Floor("block: a returning scene has its colour", "colour", "block: all", at_least=0.9),
        Floor("block: by memory alone", "colour", "block: two", at_most=0.4),
        Floor("block: its 30th chunk shows one body, as told", "late", "block: 32 chunks", at_least=0.8),
        Floor("block: it doesn't wear out", "kept", "block: 32 chunks", at_least=0.9),
        Floor("block: it doesn't blur", "sharpness", "block: 32 chunks", at_least=0.7),
        Floor("tok-v draws the world", "world", "tok-v", at_least=32.0),
        Floor("tok-v draws natural clips", "natural", "tok-v", at_least=26.0),
        Floor("tok-v needs few numbers", "fewer", "tok-v", at_least=16.0),
        Floor("tok-v has unit variance", "spread", "tok-v", at_most=0.25, counts=False),
        Floor("tok-f draws the world", "world", "tok-f", at_least=32.0),
        Floor("tok-f draws natural clips", "natural", "tok-f", at_least=26.0),
        Floor("tok-q draws the world", "world", "tok-q", at_least=32.0),
        Floor("tok-q uses its codes", "used", "codes", at_least=200),
        Floor("codes: a code is half guessed", "likely", "codes", at_most=0.5),
        Floor("qa answers", "right", "qa", at_least=0.95),
        Floor("video: colours", "colour", "video", at_least=0.95),
        Floor("video: shapes", "shape", "video", at_least=0.90),
        Floor("video: directions", "motion", "video", at_least=0.85),
        Floor("video: one word changed", "swapped", "video", at_least=0.80),
        Floor("feat-a names shapes", "shapes", "feat-a", at_least=0.85),
        Floor("feat-b names shapes", "shapes", "feat-b", at_least=0.85),
        Floor("feat-b sees motion", "velocity", "feat-b", at_most=0.05),
    ],
    minutes=10,
    sources=["minivid/core/tokenizer.py", "minivid/core/model.py", "minivid/core/noise.py", "minivid/core/sample.py"],
    tolerance=0.1,
)
