"""What goes wrong with clips and captions, on purpose: every spoilt clip comes with a record of what was done to it.

`corrupt` makes one named defect. `degrade` is the chain of restoration papers - blur, shrink, noise, block quantisation - with
one draw of parameters per clip, not per frame. Level 0 returns the clip unchanged. No codec is involved: the quantiser is our
own 8 x 8 cosine transform.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, pad

from .caption import WORDS
from .parts import source
from .render import FONT


@dataclass(frozen=True)
class Record:
    """The hidden label of a corrupted clip. `at` is the first frame concerned (0 = all of them)."""

    defect: str
    level: float
    seed: int
    at: int = 0


@dataclass(frozen=True)
class Chain:
    """The hidden parameters of a degraded clip: blur (px along and across an angle), shrink factor, noise, DCT step."""

    level: float
    along: float
    across: float
    angle: float
    shrink: int
    noise: float
    step: float
    watermark: bool = False


def corrupt(
    clip: Float[Tensor, "c f h w"], defect: str, level: float = 1.0, seed: int = 0, other: Tensor | None = None
) -> tuple[Float[Tensor, "c f h w"], Record]:
    """One of DEFECTS at a level in [0, 1], and its record. cut and fade need the `other` clip of the same shape."""
    if defect not in DEFECTS:
        raise ValueError(f"Unknown defect {defect!r}. Use one of: {', '.join(DEFECTS)}.")
    if not 0 <= level <= 1:
        raise ValueError(f"Expected a level in [0, 1], got {level}.")
    if clip.dim() != 4 or len(clip) != 3:
        raise ValueError(f"Expected one clip 3 x frames x height x width, got shape {tuple(clip.shape)}. Loop over a batch.")
    if defect in ("cut", "fade") and (other is None or other.shape != clip.shape):
        raise ValueError(f"The defect {defect!r} joins two clips: pass other=, a clip of shape {tuple(clip.shape)}.")
    if level == 0:
        return clip.clone(), Record(defect, 0.0, seed)
    rng = source(seed, "corrupt", defect)
    spoilt, at = _DEFECTS[defect](clip, level, rng, other)
    return spoilt.clamp(-1, 1), Record(defect, float(level), seed, at)


def _noise(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).float()


def _static(clip, level, rng, other):
    """Slowed down by 1 - level; at 1 the first frame stands."""
    return clip[:, (torch.arange(clip.shape[1]) * (1 - level)).long()], 0


def _frozen(clip, level, rng, other):
    """The last share `level` of the frames repeats the frame before."""
    at = max(1, round(clip.shape[1] * (1 - level)))
    return clip[:, torch.arange(clip.shape[1]).clamp(max=at - 1)], at


def _shuffle(clip, level, rng, other):
    """A share `level` of the frames, two at least, change places."""
    f = clip.shape[1]
    order, moved = np.arange(f), rng.permutation(f)[: max(2, round(level * f))]
    order[moved] = order[np.roll(moved, 1)]
    return clip[:, torch.from_numpy(order)], 0


def _flicker(clip, level, rng, other):
    gain = 1 + 0.4 * level * _noise(rng, (1, clip.shape[1], 1, 1)).clamp(-2, 2)
    return (clip + 1) * gain - 1, 0


def _middle(clip: Tensor, rng: np.random.Generator) -> int:
    """A frame in the middle half of the clip."""
    f = clip.shape[1]
    return int(rng.integers(max(1, f // 4), max(2, f - f // 4)))


def _cut(clip, level, rng, other):
    at = _middle(clip, rng)
    return torch.cat([clip[:, :at], other[:, at:]], 1), at


def _fade(clip, level, rng, other):
    """Over 2 to 8 frames."""
    at, long = _middle(clip, rng), 2 + round(6 * level)
    mix = ((torch.arange(clip.shape[1]) - at + long / 2) / long).clamp(0, 1)[None, :, None, None]
    return torch.lerp(clip, other, mix.expand_as(clip)), max(0, at - long // 2)


def _teleport(clip, level, rng, other):
    """From one frame on everything is shifted by up to half a side."""
    at, (h, w) = _middle(clip, rng), clip.shape[2:]
    turn, reach = 2 * math.pi * rng.random(), 0.5 * level
    shift = round(reach * h * math.sin(turn)) or 1, round(reach * w * math.cos(turn)) or 1
    return torch.cat([clip[:, :at], clip[:, at:].roll(shift, (2, 3))], 1), at


def _jitter(clip, level, rng, other):
    reach = max(1, round(level * clip.shape[-1] / 10))
    shifts = rng.integers(-reach, reach + 1, (clip.shape[1], 2))
    padded = pad(clip, (reach,) * 4, mode="replicate")
    h, w = clip.shape[2:]
    frames = [padded[:, i, reach + y : reach + y + h, reach + x : reach + x + w] for i, (y, x) in enumerate(shifts.tolist())]
    return torch.stack(frames, 1), 0


def _cast(clip, level, rng, other):
    tint = rng.permutation([1.0, 0.5, 0.25])
    gain = 1 + level * (torch.tensor(tint).float() - 1)
    return (clip + 1) * gain[:, None, None, None] - 1, 0


def _blur(clip, level, rng, other):
    return blur(clip, level * clip.shape[-1] / 16), 0


def _grain(clip, level, rng, other):
    return clip + 0.5 * level * _noise(rng, tuple(clip.shape)), 0


def _blocks(clip, level, rng, other):
    return quantise(clip, 0.6 * level), 0


def _bars(clip, level, rng, other):
    """Black, at top and bottom or at both sides; an eighth of the side at level .5."""
    out = clip.clone()
    wide = max(1, round(level * clip.shape[-1] / 4))
    view = out if rng.random() < 0.5 else out.transpose(2, 3)
    view[:, :, :wide] = view[:, :, -wide:] = -1
    return out, 0


def _over(clip, level, rng, other):
    return (clip + 1) * (1 + 2.5 * level) - 1, 0


def _under(clip, level, rng, other):
    return (clip + 1) * (1 - 0.96 * level) - 1, 0


def _grey(clip, level, rng, other):
    return torch.lerp(clip, clip.mean(0, keepdim=True).expand_as(clip), level), 0


def _nearest(clip, level, rng, other):
    """Seen through 2 x 2 (up to level .5) or 4 x 4 pixel blocks, repeated without smoothing."""
    by = 2 if level <= 0.5 else 4
    small = clip[..., by // 2 :: by, by // 2 :: by]
    return small.repeat_interleave(by, -1).repeat_interleave(by, -2)[..., : clip.shape[2], : clip.shape[3]], 0


def _overlay(clip, level, rng, other):
    """A line of writing (5 x 7 digits) across the frame, white with a black rim, opacity `level`."""
    h, w = clip.shape[2:]
    digits = FONT[torch.from_numpy(rng.integers(0, 10, w // 6))]
    line = pad(pad(digits, (0, 1)).permute(1, 0, 2).reshape(7, -1), (1, 1, 1, 1))[:, :w]
    rim = (conv2d(line[None, None], torch.ones(1, 1, 3, 3), padding=1)[0, 0] > 0).float()
    top = int(rng.integers(0, max(1, h - 9)))
    out = clip.clone()
    part = out[:, :, top : top + 9, : line.shape[1]]
    line, rim = line[: part.shape[2]], rim[: part.shape[2]]
    part += level * rim * (2 * line - 1 - part)
    return out, 0


def _duplicate(clip, level, rng, other):
    """The same clip again, recoded: a little noise and a little more light."""
    return clip + level * (0.02 * _noise(rng, tuple(clip.shape)) + 0.02), 0


def _constant(clip, level, rng, other):
    colour = torch.from_numpy(rng.random(3)).float()[:, None, None, None] * 2 - 1
    return torch.lerp(clip, colour.expand_as(clip), level), 0


def _random(clip, level, rng, other):
    return torch.lerp(clip, torch.from_numpy(rng.random(tuple(clip.shape))).float() * 2 - 1, level), 0


def _inverted(clip, level, rng, other):
    return clip * (1 - 2 * level), 0


_DEFECTS: dict[str, Callable] = {
    "static": _static, "frozen": _frozen, "shuffle": _shuffle, "flicker": _flicker, "cut": _cut, "fade": _fade,
    "teleport": _teleport, "jitter": _jitter, "cast": _cast, "blur": _blur, "noise": _grain, "blocks": _blocks, "bars": _bars,
    "over": _over, "under": _under, "grey": _grey, "nearest": _nearest, "overlay": _overlay, "duplicate": _duplicate,
    "constant": _constant, "random": _random, "inverted": _inverted,
}  # fmt: skip
DEFECTS = tuple(_DEFECTS)


def draw_chain(level: float = 1.0, seed: int = 0, watermark: bool = False) -> Chain:
    """One draw of degradation parameters; all grow in proportion to `level`, the shrink factor from 1 to 4."""
    if not 0 <= level <= 1:
        raise ValueError(f"Expected a level in [0, 1], got {level}.")
    rng = source(seed, "degrade")
    along, ratio, angle, grain, step, pick = rng.random(6)
    along = level * (0.4 + 1.2 * along)
    shrink = 1 if level < 0.25 else 2 if pick > level / 2 else 4
    return Chain(
        float(level), along, along * (0.3 + 0.7 * ratio), math.pi * angle, shrink, level * 0.08 * grain,
        level * (0.05 + 0.2 * step), watermark,
    )  # fmt: skip


def degrade(
    clip: Float[Tensor, "c f h w"], level: float = 1.0, seed: int = 0, watermark: bool = False
) -> tuple[Float[Tensor, "c f h w"], Chain]:
    """Blur, shrink, noise, block quantisation, enlarge again (bicubic), watermark: the clip at its own size, and the chain."""
    chain = draw_chain(level, seed, watermark)
    if level == 0 and not watermark:
        return clip.clone(), chain
    return apply_chain(clip, chain, seed), chain


def apply_chain(clip: Float[Tensor, "c f h w"], chain: Chain, seed: int = 0) -> Float[Tensor, "c f h w"]:
    """The degradation `chain` itself; only the grain depends on `seed`."""
    h, w = clip.shape[2:]
    if chain.shrink > 1 and (h % chain.shrink or w % chain.shrink):
        raise ValueError(f"Expected sides divisible by {chain.shrink}, got {h} x {w}. Crop the clip first.")
    out = clip
    if chain.level > 0:
        out = blur(clip, chain.along, chain.across, chain.angle)
        out = avg_pool2d(out, chain.shrink)
        out = out + 2 * chain.noise * _noise(source(seed, "grain"), tuple(out.shape))
        out = quantise(out, chain.step)
        if chain.shrink > 1:
            out = interpolate(out.transpose(0, 1), (h, w), mode="bicubic", align_corners=False).transpose(0, 1)
    if chain.watermark:
        out = torch.lerp(out, torch.ones_like(out), 0.5 * watermark_bar(h, w))
    return out.clamp(-1, 1)


def watermark_bar(h: int, w: int) -> Float[Tensor, "h w"]:
    """Where the watermark lies: a bar at the lower right with gaps like letters; correlate clips with it to find it."""
    mask = torch.zeros(h, w)
    mask[h - h // 6 : h - h // 16, w // 2 : w - w // 16] = 1
    mask[:, w // 2 :: max(3, w // 16)] = 0
    return mask


def blur(
    clip: Float[Tensor, "c f h w"], along: float, across: float | None = None, angle: float = 0.0
) -> Float[Tensor, "c f h w"]:
    """Gaussian blur with standard deviations `along` and `across` (px) of the axis at `angle`; edges are repeated."""
    across = along if across is None else across
    reach = max(1, math.ceil(3 * max(along, across)))
    reach = min(reach, clip.shape[-1] - 1, clip.shape[-2] - 1)
    step = torch.arange(-reach, reach + 1, dtype=torch.float32)
    u = step * math.cos(angle) + step[:, None] * math.sin(angle)
    v = step[:, None] * math.cos(angle) - step * math.sin(angle)
    kernel = torch.exp(-0.5 * ((u / max(along, 1e-3)) ** 2 + (v / max(across, 1e-3)) ** 2))
    kernel = (kernel / kernel.sum()).expand(len(clip), 1, -1, -1)
    out = conv2d(pad(clip.transpose(0, 1), (reach,) * 4, mode="replicate"), kernel, groups=len(clip))
    return out.transpose(0, 1)


def cosine_basis(n: int = 8) -> Float[Tensor, "n n"]:
    """The orthonormal cosine transform (DCT-II) as a matrix: coefficients = basis @ signal."""
    k, x = torch.arange(n, dtype=torch.float32)[:, None], torch.arange(n, dtype=torch.float32) + 0.5
    basis = torch.cos(math.pi / n * k * x) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis


def quantise(clip: Float[Tensor, "c f h w"], step: float) -> Float[Tensor, "c f h w"]:
    """Round the 8 x 8 cosine coefficients of every frame to multiples of step * (1 + (u + v) / 2): high frequencies go first."""
    if step < 1e-6:  # finer than float32 holds
        return clip
    h, w = clip.shape[2:]
    basis, grow = cosine_basis(), torch.arange(8, dtype=torch.float32) / 2
    table = step * (1 + grow[:, None] + grow)
    full = pad(clip, (0, -w % 8, 0, -h % 8), mode="replicate")
    blocks = full.unfold(2, 8, 8).unfold(3, 8, 8)
    coded = ((basis @ blocks @ basis.T) / table).round() * table
    back = (basis.T @ coded @ basis).permute(0, 1, 2, 4, 3, 5).reshape(full.shape)
    return back[..., :h, :w]


def wrong_words(text: str, rate: float, seed: int = 0) -> tuple[str, int]:
    """Replace each word by another of its kind (colour for colour, ...) with probability `rate`: the text and how many changed.

    Words of no kind stay, so that a wrong caption still reads like a caption.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"Expected a rate in [0, 1], got {rate}.")
    rng, words, wrong = source(seed, "words"), text.split(), 0
    for i, word in enumerate(words):
        kind = next((k for k in _KINDS if word in k), None)
        if kind and rng.random() < rate:
            words[i] = str(rng.choice([other for other in kind if other != word]))
            wrong += 1
    return " ".join(words), wrong


_KINDS = (
    ("red", "green", "blue", "yellow", "magenta", "cyan"), ("circle", "square", "triangle", "star"),
    ("left", "right", "up", "down"),
    ("small", "medium", "large"), ("dark", "grey", "light", "brown", "slate", "cream"), ("striped", "checked", "dotted", "plain"),
)  # fmt: skip
assert all(word in WORDS for kind in _KINDS for word in kind)


def cut_words(text: str, keep: float) -> str:
    """The first share `keep` of a caption's words, one at least."""
    words = text.split()
    return " ".join(words[: max(1, round(keep * len(words)))])
