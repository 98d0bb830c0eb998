# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · Sparse attention: which token pairs matter?
#
# In a video transformer every token asks every other token, in every layer, at every step. A clip twice as long has
# twice the tokens and four times the pairs. Which of them does the model listen to, and can the others be left out,
# not just thrown away after they were computed?
#
# **Reading time** about 25 minutes · **runs** in about a minute on one processor core, offline
#
# After it you can
# 1. say from which length on attention is what a video model spends its time on;
# 2. look at any head of a trained model, on a drawn clip and on a real film, and name its pattern;
# 3. tell what a pattern keeps from what the best possible choice would keep;
# 4. turn one knob and watch pairs, arithmetic and the clip go down together.

# %%
import json
from functools import lru_cache
from statistics import fmean

import torch
from IPython.display import Markdown

from minivid import world
from minivid.core import attention, noise, text, weights, where
from minivid.core.model import Cond
from minivid.lab import claims, maps, measure, papers, play, plots, show
from minivid.sparse_attention import sparse_vdit as paper
from minivid.world.clips import natural_crops
from minivid.world.scores import psnr

_ = torch.set_num_threads(1)
model, tokenizer, grid = weights.load("frames"), weights.load("tok-f"), (16, 4, 4)

# %% [markdown]
# ## Where the work goes
#
# `frames` is a transformer of six layers with four heads each. Its clips are 16 frames of 4 x 4 tokens: 256 tokens.
# Real models have a hundred thousand. Count the arithmetic of one call, for larger and larger frames:


# %%
def arithmetic(side):
    """Tokens of 16 frames of side x side tokens, and attention's share of a call's FLOPs in %."""
    x, n = torch.zeros(1, 4, 16, 2 * side, 2 * side), 16 * side**2
    whole = measure.flops(lambda: model(x, torch.tensor([0.5]), Cond()))
    pairs = sum(4 * n * n * layer.v.out_features for _, layer in paper.layers(model))
    return n, 100 * pairs / whole


points = [arithmetic(side) for side in (2, 4, 8, 12, 16)]
series = {"scores and sums": ([n for n, _ in points], [share for _, share in points])}
show.lines(series, "tokens", "share of a call's FLOPs, %", "What attention costs", log="x")

# %% [markdown]
# With few tokens attention is a detail; with 4,096 it is six sevenths of all. Whoever wants longer clips must make
# fewer pairs.
#
# ## What the heads look at
#
# Take two clips, one drawn and one from a real film (which `frames` never met in training), add noise, and ask the
# model once for the clean clip. Every head compares 256 queries with 256 keys: 24 maps of 65,536 numbers, rows are
# queries, frame after frame.


# %%
scene = world.draw(7, 1, "base", "held-out")
clips = {"world": world.render(scene, 32, 16)[None], "film": natural_crops(4, 32, 16, "held-out", seed=5)[1:2]}
conds = {"world": Cond(text=text.tokens([world.caption(scene)])), "film": Cond(text=text.tokens([""]))}
path, dice = noise.flow(), torch.Generator().manual_seed(0)
latents = {name: tokenizer.encode(clip) for name, clip in clips.items()}
grain = torch.randn(latents["world"].shape, generator=dice)


@torch.no_grad()
def believed(net, clip, t):
    """The clean clip `3 f h w` that a model believes in, told a clip with noise up to time t."""
    x = path.at(latents[clip], grain, torch.tensor([t]))
    at = torch.tensor([t])
    return tokenizer.decode(path.clean(x, at, net(x, at, conds[clip])))[0]


# %%
@lru_cache(None)
def looks(clip, t):
    """Per layer what its heads compare: (q, k, v, places)."""
    seen = {}
    believed(paper.watched(model, lambda layer, *heads: seen.setdefault(layer, heads)), clip, t)
    return [seen[i] for i in sorted(seen)]


@lru_cache(None)
def all_maps(clip, t):
    """Attention maps `l k n n` of all heads."""
    return torch.stack([attention.scores(q, k, at)[0] for q, k, _, at in looks(clip, t)])


def thumbnails(clip, t):
    return torch.nn.functional.avg_pool2d(all_maps(clip, t), 4)


kinds = [["" for _ in range(4)] for _ in range(6)]
maps.board(thumbnails("world", 0.7), kinds, {"": "sky"}, "All heads of `frames`, on a drawn clip that is 70 % noise")

# %% [markdown]
# Some heads stay near the diagonal: they look at their own frame and its neighbours. Some draw many parallel
# diagonals: they look at *their own place* in all frames. Some have bright columns: a few tokens that everybody
# listens to. And some look about everywhere. Is it the same on a film that the model has never seen the like of?

# %%
maps.board(thumbnails("film", 0.7), kinds, {"": "sky"}, "The same heads, on a film")

# %% [markdown]
# ## How few pairs could do?
#
# Sort the weights of a head and add up the largest: that is the best that any choice of pairs can keep, if it knew
# the weights before it computed them. Thin curves are heads; the pattern of a window of two frames to either side
# keeps 29 % of the pairs, and what it keeps of each head's attention is a dot.

# %%
shares = torch.linspace(0.02, 1, 50)
two = paper.Mode("diagonal", 2)  # frames to either side
window, width = paper.kept(two, grid), paper.share(two, grid)


def kept_by(choice, one):
    return (one * choice).sum().item() / len(one)


def best(one):
    ordered = one.flatten().sort(descending=True).values.cumsum(0) / len(one)
    return [ordered[int(s * (ordered.numel() - 1))].item() for s in shares]


# %%
def draw(axes):
    for ax, clip in zip(axes, clips, strict=True):
        for one in all_maps(clip, 0.7).flatten(0, 1):
            ax.plot(100 * shares, [100 * b for b in best(one)], color="#0072B2", lw=0.7, alpha=0.6)
            ax.plot(100 * width, 100 * kept_by(window, one), "o", color="#E69F00", mec="#222222", ms=4)
        ax.set(title=clip, xlabel="pairs computed, %", ylabel="attention kept, %")


alt = "For each head the attention kept by the best choice of pairs, a concave curve, and by a window of frames, a dot below."
plots.figure(draw, (8.2, 3.2), "best choice and window", alt, (1, 2))

# %% [markdown]
# Two thirds of the curves rise steeply: a fifth of the pairs could hold nearly all that these heads listen to. The
# others, most of them in the first and the last layer, look about everywhere. The dots lie far below the curves and
# far apart: one window for all heads serves some of them well and robs others. **So choose a pattern for each head.**
#
# ## The explorer
#
# Sparse-vDiT ([lesson](papers/sparse-vdit.ipynb)) does this once, offline: of full attention, nothing at all, a
# window of frames, a window of places and a stripe of frames, each head gets the one with the least error plus price,
# or stays full if even that exceeds $\varepsilon$. Turn $\varepsilon$, and everything below follows: the modes
# (frames of the thumbnails), the chosen head's map with what is still computed in full colour, the clip that the
# model believes in, and what that costs; on the curve, the point moves (whole clips of four captions, 20 steps each).
# **Click a head** to see its map, or choose it by its layer and number.

# %%
made, header = weights.read("papers/sparse-vdit.safetensors")
tables = [[[paper.Mode(k, w, tuple(c)) for k, w, c in row] for row in table] for table in json.loads(header["tables"])[1]]
error, cost = made["errors"][1], torch.tensor([paper.share(table[0][0], grid) for table in tables])
colours = dict(zip(paper.KINDS, ("black", "sky", "blue", "orange", "purple"), strict=True))
epsilons, shares, scores = made["curve"].clamp(max=50).T.tolist()
long = *torch.randn(3, 1, 1, 4096, 32, generator=torch.Generator().manual_seed(0)), where.grid(16, 16, 16)
seconds = {"full": 1.0, "skip": 0.0}  # beside full attention
for table in tables[2:]:
    plug = paper.Sparse((table[0][0],))
    seconds[table[0][0].kind] = 1 / measure.ratio(lambda: attention.dense(*long), lambda plug=plug: plug(*long), 5).median


# %%
@lru_cache(None)
def chosen(epsilon):
    """The table, its share of the blocks, and the sparse model."""
    choice = paper.search(error, cost, epsilon=epsilon)
    table = paper.assemble(choice, tables)
    return table, cost[choice].mean().item(), paper.sparsify(model, table)


@lru_cache(None)
def dense_clip(clip, t):
    return believed(model, clip, t)


# %%
def price(table, share):
    heads = [mode.kind for row in table for mode in row]
    time = sum(seconds[kind] for kind in heads) / len(heads)
    dense = 4 * 256**2 * 32 * len(heads) / 1e6  # two products of 256 x 256 pairs with 32 channels a head
    return (f"{100 * share:.0f} % of all pairs are computed: {share * dense:.0f} of {dense:.0f} MFLOP; "
            f"with 4,096 tokens {100 * time:.0f} % of the time (measured).")  # fmt: skip


# %%
def explore(clip, noise, epsilon, layer, head):
    table, share, sparse = chosen(epsilon)
    now, mode, query = believed(sparse, clip, noise), table[layer][head], 8 * 16 + 9
    full, kept = all_maps(clip, noise)[layer, head], paper.kept(mode, grid).float()
    lost = 100 * (1 - kept_by(kept, full))
    told = price(table, share), f"Layer {layer}, head {head}: {mode.kind}. {lost:.0f} % of its attention is left out."
    looked = {"what the boxed token asks, frame by frame": maps.volume(full[query], grid, query, kept[query], side=36)}
    score = min(99, psnr(now, dense_clip(clip, noise)).item())
    strips = {"the clip the model believes in, all pairs": dense_clip(clip, noise), f"these pairs: {score:.0f} dB to it": now}
    page = maps.head(f"epsilon {epsilon:.3g}", {"this head's map": maps.square(full, kept, side=200)}, looked, strips, told)
    at = min(range(len(epsilons)), key=lambda i: abs(epsilons[i] - epsilon))
    curve = maps.curve(shares, scores, at, "share of the pairs", "PSNR to the dense clips, dB, at most 50")
    return maps.board(thumbnails(clip, noise), [[m.kind for m in row] for row in table], colours, "",
                      chosen=(layer, head), sides=(page.image, curve), alt=page.alt)  # fmt: skip


# %% tags=["nbval-ignore-output"]
settled = [dict(clip="world", noise=0.7, epsilon=e, layer=4, head=0) for e in (0.15, 0.25, 0.35)]
play.knobs(
    explore, settled=settled, clip=play.Choice(list(clips)), noise=play.Choice([0.7, 0.9, 0.5, 0.3]),
    epsilon=play.FloatRange(0.0, 0.6, 0.25, 0.025), layer=play.IntRange(0, 5, 4), head=play.IntRange(0, 3, 0),
)  # fmt: skip

# %% [markdown]
# ## All of them on one plot
#
# Same captions, same noise, 20 steps; how far is the clip from the dense model's? From the
# [claim](../minivid/claims/sparse_vdit.json), means of eight seeds, with the FLOPs that attention really took
# (*online* and *top blocks* look for their pairs at every call, and pay for it).

# %% tags=["nbval-ignore-output"]
result = claims.read("sparse-vdit")
ways = {"frames": "window of frames", "places": "window of places", "online": "online choice", "searched": "searched",
        "top blocks": "top blocks", "random": "random modes"}  # fmt: skip
curves = {}
for way, name in ways.items():
    arms = [result["arms"][f"{way} ({budget})"]["values"] for budget in ("29 %", "48 %") if f"{way} ({budget})" in result["arms"]]
    curves[name] = [100 * fmean(arm["cost"]) for arm in arms], [fmean(arm["psnr"]) for arm in arms]
show.lines(curves, "attention's FLOPs, % of dense", "PSNR to the dense clip, dB", "Quality and cost")

# %% [markdown]
# Each head its own pattern is worth 3 to 7 dB over one window for all, and which one it is belongs to the head, not
# to the caption. Choosing anew at every call is worth 1 to 2 dB more and costs few FLOPs; but with 4,096 tokens it
# takes 2.6 times as long as dense attention on our processor, where the searched model takes a third. What is fixed
# beforehand can be fast.
#
# ## When the past is in memory
#
# A model that goes on and on can't compute all pairs anew: it keeps the keys and values of the past, and the question becomes
# which of them to *fetch*. [LouisKV](papers/louiskv.ipynb) looks only when the query turns, and then takes whole units of tokens.
# Here on `codes`, which says a film row by row (64 tokens of up to 1,024 may be fetched), beside a clock:

# %% tags=["nbval-ignore-output"]
fetched = claims.read("louiskv")["arms"]
mean = lambda arm, metric: fmean(fetched[arm]["values"][metric])
rules = {"when the query turns": "turns", "each layer by its own limit": "turns, own tau", "by a clock": "stride"}
curves = {name: ([mean(f"{rule}, {n}", "moved") for n in (16, 8, 4, 2)], [mean(f"{rule}, {n}", "kl") for n in (16, 8, 4, 2)])
          for name, rule in rules.items()}  # fmt: skip
curves["at every row"] = [mean("always", "moved")], [mean("always", "kl")]
show.lines(curves, "kilobytes moved for a row", "nats a code from reading all", "When to look back", log="x")

# %% [markdown]
# Reading all of it would move some 1,500 kilobytes a row. In rows of codes a clock does better than turning; in films of chunks,
# as the lesson shows, it is the other way round.
#
# ## And keep it in fewer bits
#
# Whatever is fetched or not, all of the past is *stored*. [VidKV](papers/vidkv.ipynb) keeps keys and values in one or two bits a
# number. Films that read their own past for 19 chunks, and the share of what the judge finds right in them (a dot a seed):

# %% tags=["nbval-ignore-output"]
packed = claims.read("vidkv")["arms"]
names = {"fp16": "fp16", "the paper's: 1.5 / 1.58": "1.5/1.58, groups of 64", "2 bits a token, KIVI's keys": "KIVI 2/2",
         "2 bits, keys before their turn": "2/2, before", "1.5 / 2, centred, before": "ours"}  # fmt: skip
bits = {name: fmean(packed[f"roll: {arm}"]["values"]["bits"]) for name, arm in names.items()}
judged = {f"{name} ({bits[name]:.1f} bits in all)": packed[f"roll: {arm}"]["values"]["judge"] for name, arm in names.items()}
show.bars(judged, "right colour, shape, size, count", "Few bits for the past", digits=2)

# %% [markdown]
# The paper's cache is made for questions, asked once. A film reads again what it wrote: ternary values let it fade. But an eighth
# of the bytes is enough if keys are packed *before* their rotary turn, where each channel stays what it is.

# %% [markdown]
# ## Everything at once, on one film
#
# Three techniques, three costs: patterns save **pairs** (arithmetic), retrieval what is **moved** (bandwidth), few bits
# what is **held** (memory). Do they add up? Films A B A C A B ... that must remember; for each way the three costs, the distance
# to the film with nothing left out, and the colour error of the body ([claim](../minivid/claims/one_film.json), means of three
# seeds).

# %% tags=["nbval-ignore-output"]
film = {name: {metric: fmean(v) for metric, v in arm["values"].items()} for name, arm in claims.read("one_film")["arms"].items()}
rows = ["| | pairs | moved, kB a call | held, kB | PSNR to all of it | sharpness | colour error |", "|---" + "|--:" * 6 + "|"]
for name, m in film.items():
    near = "" if name == "all of it" else f"{m['psnr']:.1f}"
    costs = f"{100 * m['pairs']:.0f} % | {m['moved']:.0f} | {m['held']:.0f}"
    rows.append(f"| {name} | {costs} | {near} | {m['sharp']:.2f} | {m['body']:.3f} |")
Markdown("\n".join(rows))

# %% tags=["nbval-ignore-output"]
worse = {name: m["body"] - film["all of it"]["body"] for name, m in film.items()}
every = ("patterns", "retrieval", "few bits")
parts = {name: every if name == "all three" else [part for part in every if part in name] for name in film}
flat = {}
for name in [name for name in film if len(parts[name]) > 1]:
    flat |= {f"{name}: measured": worse[name], f"{name}: sum of its parts": sum(worse[part] for part in parts[name])}
show.bars(flat, "colour error, above that of all of it", "Do the losses add up?", colours=2)

# %% [markdown]
# **The savings multiply, the losses don't quite add up.** Each column falls by its own technique and stays down whatever stands
# beside it: pairs by patterns (and by retrieval, which leaves few keys to compare with), bytes moved by retrieval, bytes held by
# few bits. Of the losses, that of few bits is hardly to be seen. That of patterns is small and differs from one set of films to
# another more than it is large. Retrieval pays for all: with an eighth of the past at hand a scene keeps its colour, not its
# edges (sharpness), and once a chunk is blurred it is the past of the next. A film that is already blurred has little left to
# spoil: all three together lose less than their sum. (By twos it is twice below the sum and once above: three sets of films see
# no finer rule.)

# %% [markdown]
# ## The papers of this chapter

# %% tags=["nbval-ignore-output"]
asks = {"sparse-vdit": "which fixed pattern does each head follow, and can the rest be skipped for good?",
        "louiskv": "a long film's past is in memory: when must the model look back, and at what?",
        "vidkv": "and if all of the past is kept, can it be kept in one or two bits a number?"}
Markdown(papers.listed(asks))

# %% [markdown]
# ## Where next
#
# * [Sparse-vDiT](papers/sparse-vdit.ipynb): the search, the kernels that make a skipped pair cost nothing, and the claim.
# * [LouisKV](papers/louiskv.ipynb): see what each row of a film asks the past for, and when it turns.
# * [VidKV](papers/vidkv.ipynb): what a key loses in one bit, channel by channel, before and after a Fourier transform.
# * [00 · Start](00_start.ipynb): the same kind of model, from its first line.
