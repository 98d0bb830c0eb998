"""TVT: build a finer VAE inside the latent space of an old one, so that the generator that lives there needn't move.

Paper:   Fine-structure Preserved Real-world Image Super-resolution via Transfer VAE Training (2025), arXiv 2507.20291
Kind:    procedure (how a second VAE is trained), with a compact VAE, an outer stage round a U-Net, and one-step super-resolution
Equal:   an encoder that says what the old one says of the doubled frame has the loss of the first step; an outer stage at its
         start is the U-Net on averages of 2 x 2; LoRA at its start is the frozen network; four quarters make up the latent
Claim:   its 4x VAE keeps digits and lines that the 8x VAE loses (+3 dB); the frozen denoiser errs at most 30 % more on its
         latents than on the old ones, on those of a fresh 4x VAE twice as much; the old decoder reads them at 20 dB
Differs: that the old encoder sees the frame doubled (bicubic), and the losses, are inferred: the abstract alone tells of the two
         steps. L1, squared error, differences of gradients, a small KL; no LPIPS, no GAN; the old encoder's mean, not a draw.
         64 x 64 frames of the world; the first halving folds pixels into channels; widths 32 to 64, groups of 8; a residual
         block ends in a 1 x 1; one pair a side in the outer stage, whose start is ours; a cosine schedule; no captions of tags

A pre-trained generator sees frames through its VAE (E8, D8), which shrinks them 8 times: small letters are gone before it begins.
A fresh 4x VAE keeps them, but says them in numbers that the generator has never met. Transfer VAE training makes the old numbers
the only ones that pay:

    1   D4 learns    D4(E8(up2 x)) = x      E8 is frozen. A frame twice as large gives the old kind of latent on a grid of h/4
    2   E4 learns    D4(E4(x)) = x          D4 is frozen, and decodes well only what looks like the old kind

Then z = 0.18215 E4(x) goes into the generator (a number of the VAE: here one over the spread of its latents). The finer grid has
four times the cells, so one more stage is put round the U-Net, which itself still works at h/8; and one step at a small time
makes the picture: x0 = (z - sqrt(1 - abar) eps) / sqrt(abar).
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..core import fit
from ..core.baselines.lowrank import LoRA
from ..core.baselines.unet import Pair, UNet, per_frame
from ..core.model import Cond, times, words
from ..core.noise import Path
from ..core.surgery import swap
from ..core.tokenizer import check_clip

# --- the compact VAE ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """x + conv(norm(conv(norm(x)))), 3 x 3 and then 1 x 1, in each frame by itself."""

    def __init__(self, c: int):
        super().__init__()
        self.body = nn.Sequential(nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1),
                                  nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, c, 1))  # fmt: skip

    def forward(self, x):
        return x + self.body(x)


class Compact(nn.Module):
    """A VAE of frames: `b 3 f h w` in [-1, 1] <-> latent `b c f h/s w/s`; no middle block, no attention.

    widths: of the levels h/2, h/4 ..., the finest first; s = 2 ** levels
    depths: residual blocks a level, in the encoder and in the decoder
    scale:  what a latent is multiplied with on its way out (SD: 0.18215); `settle` sets it to one over their spread
    """

    time_stride, causal, streams = 1, True, True

    def __init__(self, widths: tuple[int, ...] = (32, 64), depths: tuple[int, int] = (1, 2), channels: int = 4):
        super().__init__()
        self.channels, self.space_stride = channels, 2 ** len(widths)
        blocks = lambda c, n: [Block(c) for _ in range(n)]
        ends = lambda c: [nn.GroupNorm(8, c), nn.SiLU()]
        down = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1), *blocks(widths[0], depths[0])]
        up = [nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, widths[-1], 3, padding=1), *blocks(widths[-1], depths[1])]
        for a, b in zip(widths[:-1], widths[1:], strict=True):
            down += [nn.Conv2d(a, b, 3, 2, 1), *blocks(b, depths[0])]
        for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True):
            up += [nn.Upsample(scale_factor=2), nn.Conv2d(a, b, 3, padding=1), *blocks(b, depths[1])]
        down += [*ends(widths[-1]), nn.Conv2d(widths[-1], 2 * channels, 3, padding=1), nn.Conv2d(2 * channels, 2 * channels, 1)]
        self.encoder = nn.Sequential(*down)
        self.decoder = nn.Sequential(*up, *ends(widths[0]), nn.Conv2d(widths[0], 12, 3, padding=1), nn.PixelShuffle(2))
        self.register_buffer("scale", torch.ones(()))

    def latent_shape(self, f: int, h: int, w: int) -> tuple[int, int, int, int]:
        return self.channels, f, h // self.space_stride, w // self.space_stride

    def frames(self, n: int) -> bool:
        return n >= 1

    def posterior(self, clip: Float[Tensor, "b 3 f h w"]) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of what the encoder says, before the scale."""
        mean, spread = per_frame(self.encoder, clip).chunk(2, 1)
        return mean, spread.clamp(-30, 20)

    def encode(self, clip: Float[Tensor, "b 3 f h w"], stream=None, generator=None) -> Float[Tensor, "b c f h2 w2"]:
        """The posterior's mean, scaled. Raises ValueError or TypeError on a wrong shape, dtype or range."""
        check_clip(clip, self.space_stride)
        return self.scale * self.posterior(clip)[0]

    def pixels(self, latent: Float[Tensor, "b c f h2 w2"]) -> Float[Tensor, "b 3 f h w"]:
        """What the decoder says, not clamped."""
        return per_frame(self.decoder, latent / self.scale)

    def decode(self, latent: Float[Tensor, "b c f h2 w2"], stream=None) -> Float[Tensor, "b 3 f h w"]:
        """Latent -> clip, clamped to [-1, 1]."""
        return self.pixels(latent).clamp(-1, 1)

    @torch.no_grad()
    def settle(self, clips: Float[Tensor, "b 3 f h w"]) -> None:
        """Set the scale so that the latents of these clips have variance 1: one number, as SD's, so channels keep their own."""
        self.scale.copy_(1 / self.posterior(clips)[0].std())


# --- transfer -----------------------------------------------------------------------------------------------------------


def up2(clip: Float[Tensor, "b 3 f h w"]) -> Float[Tensor, "b 3 f 2*h 2*w"]:
    """Twice as large, bicubic."""
    return per_frame(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False), clip).clamp(-1, 1)


def enlarged(old: Compact, clip: Float[Tensor, "b 3 f h w"]) -> Float[Tensor, "b c f h2 w2"]:
    """E8(up2 x): the old kind of latent, on the grid of a VAE that shrinks half as much."""
    return old.encode(up2(clip))


def error(back: Float[Tensor, "b 3 f h w"], clip: Float[Tensor, "b 3 f h w"]) -> Float[Tensor, ""]:
    """L1, squared error and L1 of the differences of neighbouring pixels, weighted as in this package's tokenizers."""
    gap = back - clip
    return gap.abs().mean() + 10 * gap.square().mean() + 0.3 * (gap.diff(dim=-1).abs().mean() + gap.diff(dim=-2).abs().mean())


def drawn(vae: Compact, clip: Float[Tensor, "b 3 f h w"], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A latent drawn from the posterior, scaled, and the mean of its KL divergence from a standard normal."""
    mean, spread = vae.posterior(clip)
    kl = 0.5 * (mean.square() + spread.exp() - 1 - spread).mean()
    return vae.scale * (mean + (spread / 2).exp() * fit.normal(*mean.shape, generator=generator)), kl


def first(new: Compact, clip: Tensor, z: Tensor) -> Float[Tensor, ""]:
    """The loss of step 1: D4 reads the old encoder's latents z of the doubled clip."""
    return error(new.pixels(z), clip)


def second(new: Compact, clip: Tensor, generator: torch.Generator, beta: float = 1e-4) -> Float[Tensor, ""]:
    """The loss of step 2: E4 says what D4 can read. It is also that of training a VAE as usual."""
    z, kl = drawn(new, clip, generator)
    return error(new.pixels(z), clip) + beta * kl


def train(learns: nn.Module, loss: Callable, batches: Callable, steps: int, rate: float = 4e-3, seed: int = 0) -> None:
    """Adam on a cosine for the parameters of `learns`, and for no others, whatever else the loss runs through.

    loss: `loss(batch, generator)`
    """
    adam = torch.optim.Adam(learns.parameters(), rate, (0.9, 0.99), fused=True)

    def step(state, batch, generator):
        adam.param_groups[0]["lr"] = rate * fit.cosine(state.i, steps)
        value = loss(batch, generator)
        grads = torch.autograd.grad(value, list(learns.parameters()), allow_unused=True)
        for p, grad in zip(learns.parameters(), grads, strict=True):
            p.grad = torch.zeros_like(p) if grad is None else grad
        fit.average(learns)
        nn.utils.clip_grad_norm_(learns.parameters(), 1.0)
        adam.step()
        return {"loss": value}

    fit.fit(step, fit.State({"model": learns, "adam": adam}), batches, steps, seed)


def transfer(new: Compact, old: Compact, batches: Callable, steps: int, seed: int = 0) -> None:
    """Both steps, `steps` each. batches(i): a clip and `enlarged(old, clip)`, which the first step reads."""
    new.scale.copy_(old.scale)
    train(new.decoder, lambda batch, _: first(new, *batch), batches, steps, seed=seed)
    train(new.encoder, lambda batch, generator: second(new, batch[0], generator), batches, steps, seed=seed + 1)


@torch.no_grad()
def probe(model: Callable, path: Path, z: Float[Tensor, "b c f h w"], levels: int = 10, seed: int = 0) -> Float[Tensor, "levels"]:
    """The denoiser's mean squared error on these latents at evenly spread times; the same noise for the same shapes and seed."""
    dice, found = torch.Generator().manual_seed(seed), []
    for i in range(levels):
        t, noise = torch.full((len(z), z.shape[2]), (i + 0.5) / levels), torch.randn(z.shape, generator=dice)
        found.append((model(path.at(z, noise, t), t, Cond()) - path.target(z, noise, t)).square().mean())
    return torch.stack(found)


# --- the generator on the finer grid ------------------------------------------------------------------------------------


def widened(conv: nn.Conv2d, ends: tuple[int, int]) -> nn.Conv2d:
    """A convolution with more channels at its ends that hears and says nothing on the new ones yet."""
    wide = nn.Conv2d(*ends, conv.kernel_size, conv.stride, conv.padding)
    nn.init.zeros_(wide.weight), nn.init.zeros_(wide.bias)
    with torch.no_grad():
        wide.weight[: conv.out_channels, : conv.in_channels] = conv.weight
        wide.bias[: conv.out_channels] = conv.bias
    return wide


class Outer(nn.Module):
    """A U-Net inside one more stage: `model(x, t, cond, cache=None)` at twice its grid, most work at its own.

    d channels come and go on the fine grid, with a skip across; at first it says `inner(pool2 x)`, doubled.
    """

    def __init__(self, inner: UNet, d: int = 32):
        super().__init__()
        c, time = inner.channels, inner.time.fc2.out_features
        self.channels, self.inner = c, copy.deepcopy(inner)
        self.inner.enter, self.inner.leave, self.inner.channels = (
            widened(inner.enter, (d, inner.enter.out_channels)), widened(inner.leave, (inner.leave.in_channels, d)), d
        )  # fmt: skip
        self.enter, self.leave = nn.Conv2d(c, d, 3, padding=1), nn.Conv2d(d, c, 3, padding=1)
        self.down, self.up = Pair((d, d), time, time, False, False), Pair((2 * d, d), time, time, False, False)
        with torch.no_grad():
            nn.init.zeros_(self.leave.weight), nn.init.zeros_(self.leave.bias)
            nn.init.zeros_(self.enter.weight[:c]), nn.init.zeros_(self.enter.bias[:c])
            nn.init.zeros_(self.up.residual.enter.weight), nn.init.zeros_(self.up.residual.enter.bias)
            for conv, n in ((self.enter, c), (self.leave, c), (self.up.residual.enter, d)):
                i, middle = torch.arange(n), conv.kernel_size[0] // 2
                conv.weight[i, i, middle, middle] = 1.0

    def forward(self, x: Float[Tensor, "b c f h w"], t: Tensor, cond: Cond, cache=None) -> Float[Tensor, "b c f h w"]:
        time = self.inner.time(times(t, x))
        text, mask = words(self.inner.text, cond)
        if text is not None:
            text, mask = text.flatten(1, 2), mask.flatten(1)
        skip = self.down(per_frame(self.enter, x), time, text, mask)
        y = self.inner(F.avg_pool3d(skip, (1, 2, 2)), t, cond)
        y = F.interpolate(y, scale_factor=(1, 2, 2), mode="nearest")
        return per_frame(self.leave, self.up(torch.cat([y, skip], 1), time, text, mask))


def adapted(model: nn.Module, generator: torch.Generator, rank: int = 4) -> nn.Module:
    """A copy with LoRA beside every layer of the U-Net's stages; nothing else of the U-Net learns, all of an outer stage does."""
    model = copy.deepcopy(model)
    unet, root = (model.inner, "inner.") if isinstance(model, Outer) else (model, "")
    unet.requires_grad_(False)
    if root:
        unet.enter.requires_grad_(True), unet.leave.requires_grad_(True)
    inside = tuple(f"{root}{part}." for part in ("downs", "lower", "mid", "ups"))
    old = {name: layer for name, layer in model.named_modules()
           if name.startswith(inside) and isinstance(layer, (nn.Linear, nn.Conv2d))}  # fmt: skip
    return swap(model, {name: LoRA(layer, rank, generator) for name, layer in old.items()})


def merged(model: nn.Module) -> nn.Module:
    """The same with plain layers."""
    return swap(model, {name: part.merge() for name, part in model.named_modules() if isinstance(part, LoRA)})


# --- one step -----------------------------------------------------------------------------------------------------------


def one_step(model: Callable, path: Path, z: Float[Tensor, "b c f h w"], t: float, cond: Cond) -> Float[Tensor, "b c f h w"]:
    """The clean latent as one call at time t implies it: the generator as a corrector of a latent that is nearly clean."""
    at = torch.full((len(z), z.shape[2]), t, dtype=z.dtype, device=z.device)
    return path.clean(z, at, model(z, at, cond))


def quarters(z: Float[Tensor, "b c f h w"]) -> Float[Tensor, "4*b c f h/2 w/2"]:
    """Four tiles, of the size that a teacher knows."""
    return rearrange(z, "b c f (p h) (q w) -> (b p q) c f h w", p=2, q=2)


def whole(tiles: Float[Tensor, "b4 c f h w"]) -> Float[Tensor, "b4/4 c f 2*h 2*w"]:
    """The latent of which `quarters` made these."""
    return rearrange(tiles, "(b p q) c f h w -> b c f (p h) (q w)", p=2, q=2)


def vsd(
    z: Float[Tensor, "b c f h w"], teacher: Callable, student: Callable, path: Path, t: Tensor, noise: Tensor, cond: Cond
) -> tuple[Float[Tensor, ""], Float[Tensor, "b c f h w"]]:
    """Variational score distillation: a loss whose gradient in z is 2 g / numel, and g itself.

    g = (x0_fake - x0_real) / mean |z - x0_real|, the mean over a sample
    teacher: the frozen generator (under guidance: `core.model.Guided`), says x0_real; student: follows what is made, x0_fake
    t:       `b f`, for SD's schedule within [0.25, 0.75]
    """
    with torch.no_grad():
        x = path.at(z, noise, t)
        real, fake = (path.clean(x, t, model(x, t, cond)) for model in (teacher, student))
        g = (fake - real) / (z - real).abs().mean((1, 2, 3, 4), keepdim=True).clamp_min(1e-6)
    return F.mse_loss(z, (z - g).detach()), g
