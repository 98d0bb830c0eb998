"""The tokenizer: a clip in, few numbers out, the clip back.

    encode(clip) -> latent      decode(latent) -> clip      between them a bottleneck (z) -> z_q, codes, losses

What is unusual here: time and space are folded into channels *before* the first convolution (pixel-unshuffle), so that all
work is done on a small grid by large matrix products, which is what a CPU is good at; a straight linear path runs beside
the network in both directions and begins as the principal components of the patches, so that the convolutions only learn what
no linear map can do; causality is exact: the first
frame fills a group of its own by repetition, every convolution looks back only, and with a `Stream` that keeps the last
inputs of each convolution any chunk plan gives what one shot gives.

One class is the per-frame tokenizer (`tok-f`, time stride 1) and the causal one (`tok-v`, 4 x 4 x 4); `Pix` is the exact
space-to-depth tokenizer with nothing learnt.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..world import files
from . import fit


def check_clip(clip: Tensor, stride: int) -> None:
    """Raise unless `clip` is a finite float `b 3 f h w` in [-1, 1] whose rows and columns divide by `stride`."""
    files.check_clip(clip, "b c f h w", slack=0.05)
    if clip.shape[3] % stride or clip.shape[4] % stride:
        raise ValueError(f"rows and columns must divide by {stride}, got f h w = {tuple(clip.shape[2:])}")


class Identity(nn.Module):
    """The bottleneck that isn't one: continuous latents, no codes, no losses."""

    def forward(self, z):
        return z, [], {}


class Pix(nn.Module):
    """Exact space-to-depth: `s` x `s` pixels become channels. Nothing is learnt and nothing is lost."""

    causal, streams, time_stride = True, True, 1

    def __init__(self, s: int = 2):
        super().__init__()
        self.space_stride, self.channels, self.bottleneck = s, 3 * s * s, Identity()

    def frames(self, n: int) -> bool:
        return n >= 1

    def latent_shape(self, f: int, h: int, w: int) -> tuple[int, int, int, int]:
        return self.channels, f, h // self.space_stride, w // self.space_stride

    def encode(self, clip, stream=None, generator=None):
        check_clip(clip, self.space_stride)
        return rearrange(clip, "b c f (h p) (w q) -> b (c p q) f h w", p=self.space_stride, q=self.space_stride)

    def decode(self, latent, stream=None):
        return rearrange(latent, "b (c p q) f h w -> b c f (h p) (w q)", p=self.space_stride, q=self.space_stride)


class Stream:
    """What a causal network must remember between two chunks: for every temporal convolution, its last inputs."""

    def __init__(self):
        self.kept: dict[nn.Module, Tensor] = {}

    @property
    def started(self) -> bool:
        return bool(self.kept)


class Norm(nn.Module):
    """Root-mean-square norm over channels at each place: no statistics over time, so streaming stays exact."""

    def __init__(self, c: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(c))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.gain.view(-1, 1, 1)


class TimeConv(nn.Conv2d):
    """A convolution over time alone, 3 taps, on frames `(b f) c h w`. Causal: taps reach back only, and a Stream supplies
    what came before."""

    def __init__(self, c: int, causal: bool = True):
        super().__init__(c, c, (3, 1))
        self.causal = causal

    def forward(self, x, b: int, stream: Stream | None = None):
        h = x.shape[-2]
        x = rearrange(x, "(b f) c h w -> b c f (h w)", b=b)
        if not self.causal:
            x = F.pad(x, (0, 0, 1, 1), mode="replicate")
        else:
            # Before the first frame stands the first frame: a still is a clip that has not moved yet.
            before = stream.kept.get(self) if stream is not None else None
            x = torch.cat([x[:, :, :1].expand(-1, -1, 2, -1) if before is None else before, x], 2)
            if stream is not None:
                stream.kept[self] = x[:, :, -2:]
        return rearrange(super().forward(x), "b c f (h w) -> (b f) c h w", h=h)


class Residual(nn.Module):
    """x + out(time(space(x))): a 3 x 3 convolution in each frame, then, where there is time to look at, one along it."""

    def __init__(self, c: int, time: bool, causal: bool):
        super().__init__()
        self.norm1, self.space = Norm(c), nn.Conv2d(c, c, 3, padding=1)
        self.norm2 = Norm(c)
        self.time = TimeConv(c, causal) if time else None
        self.out = nn.Conv2d(c, c, 1)

    def forward(self, x, b, stream=None):
        y = self.space(F.silu(self.norm1(x)))
        y = F.silu(self.norm2(y))
        if self.time is not None:
            y = F.silu(self.time(y, b, stream))
        return x + self.out(y)


class Scale(nn.Module):
    """Unit variance a channel, by fixed numbers. Batch statistics, the usual way, hide the clip's brightness from the decoder
    (the mean of eight clips is mostly their content); so training only leans towards unit variance, and `settle` sets the
    numbers at its end."""

    def __init__(self, c: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(c, 1, 1, 1)), self.register_buffer("std", torch.ones(c, 1, 1, 1))

    def forward(self, z):
        return (z - self.mean) / self.std

    def back(self, z):
        return z * self.std + self.mean

    def lean(self, z):
        """How far the channels of a normalised latent are from mean 0 and variance 1."""
        return z.mean((0, 2, 3, 4)).square().mean() + (z.var((0, 2, 3, 4)) - 1).square().mean()


class Coder(nn.Module):
    """One half of a tokenizer: residual blocks on the fine grid (stride 2) and on the latent grid (stride 4).

    Inside, frames are a part of the batch, `(b f) c h w`: on a CPU a 2-D convolution takes half the time of a flat 3-D one.
    """

    def __init__(
        self, ends: tuple[int, int], up: bool, widths: tuple[int, int], depths: tuple[int, int], time: bool, causal: bool
    ):
        super().__init__()
        block = lambda c: Residual(c, time, causal)
        self.up = up
        first, last = (1, 0) if up else (0, 1)
        self.start = nn.Conv2d(ends[0], widths[first], 3, padding=1)
        self.first = nn.ModuleList(block(widths[first]) for _ in range(depths[first]))
        self.bridge = nn.Conv2d(*((widths[1], 4 * widths[0]) if up else (4 * widths[0], widths[1])), 1)
        self.last = nn.ModuleList(block(widths[last]) for _ in range(depths[last]))
        self.norm = Norm(widths[last])
        self.end = nn.Conv2d(widths[last], ends[1], 3, padding=1)

    def forward(self, x, stream=None):
        b = x.shape[0]
        x = self.start(rearrange(x, "b c f h w -> (b f) c h w"))
        for block in self.first:
            x = block(x, b, stream)
        x = F.pixel_shuffle(self.bridge(x), 2) if self.up else self.bridge(F.pixel_unshuffle(x, 2))
        for block in self.last:
            x = block(x, b, stream)
        return rearrange(self.end(F.silu(self.norm(x))), "(b f) c h w -> b c f h w", b=b)


class Tokenizer(nn.Module):
    """Clip `b 3 f h w` <-> latent `b c f' h/4 w/4`, unit variance a channel, f' = 1 + (f - 1) / time_stride.

    time_stride: 1 (per frame: no layer looks across time) or 4 (causal unless causal=False)
    bottleneck:  what stands between encoder and decoder; its `lookup(codes)` gives the latent of stored codes
    noise:       standard deviation added to the latent in training, so that the decoder forgives small errors of a generator
    """

    space_stride = 4

    def __init__(self, channels: int = 10, time_stride: int = 4, widths=(48, 96), depths=(2, 3), causal: bool = True,
                 bottleneck: nn.Module | None = None, noise: float = 0.05):
        super().__init__()
        self.channels, self.time_stride, self.causal, self.noise = channels, time_stride, causal, noise
        self.streams = causal
        time, folded = time_stride > 1, 3 * 4 * time_stride
        self.encoder = Coder((folded, channels), False, tuple(widths), tuple(depths), time, causal)
        self.decoder = Coder((channels, folded), True, tuple(widths), tuple(depths), time, causal)
        self.direct_in, self.direct_out = nn.Linear(48 * time_stride, channels), nn.Linear(channels, 48 * time_stride)
        for end in (self.encoder.end, self.decoder.end):  # at first the linear path speaks alone
            nn.init.zeros_(end.weight), nn.init.zeros_(end.bias)
        self.bottleneck = bottleneck or Identity()
        self.scale = Scale(channels)

    def frames(self, n: int) -> bool:
        """Whether a clip of n frames is legal: 1 + a multiple of the time stride."""
        return n >= 1 and (n - 1) % self.time_stride == 0

    def latent_shape(self, f: int, h: int, w: int) -> tuple[int, int, int, int]:
        """Shape `c f h w` of the latent of an f x h x w clip."""
        return self.channels, 1 + (f - 1) // self.time_stride, h // 4, w // 4

    @torch.no_grad()
    def begin(self, clips: Float[Tensor, "b 3 f h w"]) -> None:
        """Set the linear path to the principal components of the patches of these clips, scaled to unit variance."""
        patches = self._patches(self._whole(clips, None)).flatten(0, 3)
        mean = patches.mean(0)
        value, vector = torch.linalg.eigh((patches - mean).T.double().cov())
        spread = value[-self.channels :].flip(0).sqrt().float()
        basis = vector[:, -self.channels :].flip(1).float()
        self.direct_in.weight.copy_((basis / spread).T), self.direct_in.bias.copy_(-mean @ (basis / spread))
        self.direct_out.weight.copy_(basis * spread), self.direct_out.bias.copy_(mean)

    @torch.no_grad()
    def settle(self, clips: Float[Tensor, "b 3 f h w"]) -> None:
        """Set the scale so that the latents of these clips have mean 0 and variance 1 a channel. The clips drawn don't change,
        but with a bottleneck that rounds: there the scale stays at 1."""
        if not isinstance(self.bottleneck, Identity):
            return
        z = self.scale.back(self.features(clips))
        self.scale.mean.copy_(z.mean((0, 2, 3, 4)).view(-1, 1, 1, 1)), self.scale.std.copy_(z.std((0, 2, 3, 4)).view(-1, 1, 1, 1))

    def _patches(self, clip):
        return rearrange(clip, "b c (f t) (h p) (w q) -> b f h w (c t p q)", t=self.time_stride, p=4, q=4)

    def _whole(self, clip, stream):
        """The clip with its first frame repeated to fill a group, unless the stream has already begun."""
        r = self.time_stride
        if stream is None or not stream.started:
            if not self.frames(clip.shape[2]):
                raise ValueError(f"this tokenizer takes 1 + {r}k frames (1, {1 + r}, {1 + 4 * r}, ...), got {clip.shape[2]}")
            return torch.cat([clip[:, :, :1].expand(-1, -1, r - 1, -1, -1), clip], 2)
        if clip.shape[2] % r:
            raise ValueError(f"later chunks of a stream have a multiple of {r} frames, got {clip.shape[2]}")
        return clip

    def features(self, clip: Tensor, stream: Stream | None = None) -> Tensor:
        """What the encoder says before the bottleneck, normalised: `b c f' h/4 w/4`."""
        clip = self._whole(clip, stream)
        straight = rearrange(self.direct_in(self._patches(clip)), "b f h w c -> b c f h w")
        folded = rearrange(clip, "b c (f t) (h p) (w q) -> b (c t p q) f h w", t=self.time_stride, p=2, q=2)
        return self.scale(straight + self.encoder(folded, stream))

    def encode(self, clip: Float[Tensor, "b 3 f h w"], stream: Stream | None = None, generator=None) -> Tensor:
        """Clip in [-1, 1] -> latent. With a `stream`: the first chunk has 1 + 4k frames, later ones 4k.

        Raises ValueError or TypeError on a wrong shape, dtype or range, on NaN, or on an illegal number of frames.
        """
        check_clip(clip, 4)
        return self.bottleneck(self.features(clip, stream))[0]

    def decode(self, latent: Float[Tensor, "b c f h w"], stream: Stream | None = None) -> Tensor:
        """Latent -> clip `b 3 f h w`, clamped to [-1, 1]."""
        if latent.ndim != 5 or latent.shape[1] != self.channels:
            raise ValueError(f"a latent of this tokenizer is 'b {self.channels} f h w', got {tuple(latent.shape)}")
        fresh = stream is None or not stream.started
        return self._pixels(latent, stream, fresh).clamp(-1, 1)

    def _pixels(self, z, stream, fresh):
        t, z = self.time_stride, self.scale.back(z)
        y = rearrange(self.decoder(z, stream), "b (c t p q) f h w -> b c (f t) (h p) (w q)", t=t, p=2, q=2)
        straight = self.direct_out(rearrange(z, "b c f h w -> b f h w c"))
        y = y + rearrange(straight, "b f h w (c t p q) -> b c (f t) (h p) (w q)", t=t, p=4, q=4)
        return y[:, :, t - 1 :] if fresh else y

    def forward(self, clip, generator=None):
        """The training pass: clip -> (reconstruction, codes, losses), with latent noise and no clamp."""
        features = self.features(clip)
        z, codes, losses = self.bottleneck(features)
        losses = {**losses, "lean": 0.01 * self.scale.lean(features)}
        if self.training and self.noise:
            draw = torch.randn if generator is None else fit.normal  # one draw a sample, however many processes share them
            z = z + self.noise * draw(*z.shape, generator=generator).to(z)
        return self._pixels(z, None, True), codes, losses
