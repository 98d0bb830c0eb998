"""ViTok: an autoencoder of two plain transformers, to find out which of its sizes matters: the code, the encoder or the decoder.

Paper:   Learnings from Scaling Visual Tokenizers for Reconstruction and Generation (2025), arXiv 2501.09755
Kind:    part (a tokenizer)
Equal:   without blocks, tubelets of as many channels as numbers are an exact change of basis; without noise the latent is its
         mean; a second stage leaves every latent as it was, to the bit
Claim:   PSNR is a line in log2 E, R^2 > 0.9, whatever the shape of the code; tokens and arithmetic fit less; depth
         of the decoder is worth twice that of the encoder; generation is best at a number of channels between the extremes
Differs: widths of 64, 1 to 4 blocks; frames of 32 x 32; the perceptual term is the difference of gradients (no network that the
         metrics share); SwiGLU, rotary positions of frames, rows and columns with base 100, as our grids have at most a few
         hundred places. Patches are cut and put together by linear layers, which is what convolutions with kernel = stride
         are. The variant with one-dimensional code tokens is left out (the paper finds the same law with it). The critic of the
         second stage is three strided convolutions, not StyleGAN's. The first and last layer begin as principal components
         (`begin`), which saves most of the training. Inferred: everything about sizes, rates and steps here

    L = (T/q) (H/p) (W/p) tokens of c numbers,   E = L c,   compression = 3 T H W / E
    z = mu + sigma eps in training, mu after it          KL = mean over numbers of (mu^2 + sigma^2 - 1 - log sigma^2) / 2
    stage 1   MSE + beta KL + eta gradients              stage 2   the same + hinge critic, decoder only

What is unusual here: of the shape of the latent the network knows two linear layers, so (q, p, c) can be traded freely.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ..core import fit
from ..core.attention import Attention
from ..core.tokenizer import check_clip
from ..core.where import Where, grid
from ..world.scores import gradients

# --- parts --------------------------------------------------------------------------------------------------------------


class GLU(nn.Module):
    """Gated feed-forward: out(silu(gate(x)) value(x)), hidden width 2.67 d."""

    def __init__(self, d: int):
        super().__init__()
        hidden = round(2.67 * d)
        self.gate, self.value, self.out = nn.Linear(d, hidden), nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x):
        return self.out(F.silu(self.gate(x)) * self.value(x))


class Layer(nn.Module):
    """A pre-norm block: full attention (queries, keys, values without bias), gated feed-forward."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.norm1, self.attention, self.norm2, self.feed = nn.LayerNorm(d), Attention(d, heads), nn.LayerNorm(d), GLU(d)
        for name in "qkv":
            setattr(self.attention, name, nn.Linear(d, d, bias=False))

    def forward(self, x: Float[Tensor, "b n d"], where: Where) -> Float[Tensor, "b n d"]:
        x = x + self.attention(self.norm1(x), where)
        return x + self.feed(self.norm2(x))


class Transformer(nn.Module):
    """Blocks and a last norm. `frames`: attention within a frame only."""

    def __init__(self, d: int, depth: int, heads: int, frames: bool = False):
        super().__init__()
        self.blocks, self.norm, self.frames = nn.ModuleList(Layer(d, heads) for _ in range(depth)), nn.LayerNorm(d), frames

    def forward(self, x: Float[Tensor, "b n d"], size: tuple[int, int, int]) -> Float[Tensor, "b n d"]:
        if not self.blocks:
            return x
        b, (f, h, w) = len(x), size
        where = grid(1 if self.frames else f, h, w, device=x.device)
        x = rearrange(x, "b (f p) d -> (b f) p d", f=f) if self.frames else x
        for block in self.blocks:
            x = block(x, where)
        return self.norm(rearrange(x, "(b f) p d -> b (f p) d", b=b))


def kl(mean: Tensor, log_variance: Tensor) -> Float[Tensor, ""]:
    """Divergence from the unit normal in nats, mean over all numbers of the code (not their sum)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


# --- the tokenizer ------------------------------------------------------------------------------------------------------


class ViTok(nn.Module):
    """A tokenizer: `encode(clip, generator) -> latent`, `decode(latent) -> clip`.

    q, p, c: frames and pixels of a tubelet, channels of its code.  depth: blocks of the encoder and of the decoder
    frames:  attention sees one frame (of tubelets) at a time
    """

    causal, streams = False, False

    def __init__(self, q: int = 4, p: int = 8, c: int = 16, d: int = 64, depth: tuple[int, int] = (2, 2), heads: int = 2,
                 frames: bool = False):
        super().__init__()
        self.time_stride, self.space_stride, self.channels = q, p, c
        numbers = 3 * q * p * p
        self.embed, self.encoder = nn.Linear(numbers, d), Transformer(d, depth[0], heads, frames)
        self.code, self.read = nn.Linear(d, 2 * c), nn.Linear(c, d)
        self.decoder, self.unembed = Transformer(d, depth[1], heads, frames), nn.Linear(d, numbers)

    @torch.no_grad()
    def begin(self, clips: Float[Tensor, "b 3 f h w"]) -> None:
        """The first and the last layer become the principal components of the clips' tubelets: without that, large ones need many
        thousand steps to be seen at all."""
        q, p = self.time_stride, self.space_stride
        x = rearrange(clips, "b c (f q) (h p) (w r) -> (b f h w) (c q p r)", q=q, p=p, r=p)
        mean, n = x.mean(0), min(x.shape[1], self.embed.out_features)
        basis = torch.linalg.eigh((x - mean).T @ (x - mean)).eigenvectors.flip(1)[:, :n]
        scale = ((x - mean) @ basis).std()
        for layer in (self.embed, self.unembed):
            layer.weight.zero_(), layer.bias.zero_()
        self.embed.weight[:n], self.embed.bias[:n] = basis.T / scale, -(mean @ basis) / scale
        self.unembed.weight[:, :n] = basis * scale
        self.unembed.bias.copy_(mean)

    def frames(self, n: int) -> bool:
        return n >= 1 and n % self.time_stride == 0

    def latent_shape(self, f: int, h: int, w: int) -> tuple[int, int, int, int]:
        return self.channels, f // self.time_stride, h // self.space_stride, w // self.space_stride

    def moments(self, clip: Float[Tensor, "b 3 f h w"]) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (within [-30, 20]) of the code, each in the latent's shape."""
        check_clip(clip, self.space_stride)
        if clip.shape[2] % self.time_stride:
            raise ValueError(f"frames must divide by {self.time_stride}, got f h w = {tuple(clip.shape[2:])}")
        q, p, (_, f, h, w) = self.time_stride, self.space_stride, self.latent_shape(*clip.shape[2:])
        x = self.embed(rearrange(clip, "b c (f q) (h p) (w r) -> b (f h w) (c q p r)", q=q, p=p, r=p))
        both = self.code(self.encoder(x, (f, h, w)))
        mean, log_variance = rearrange(both, "b (f h w) c -> b c f h w", f=f, h=h).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, clip: Float[Tensor, "b 3 f h w"], stream=None, generator=None) -> Float[Tensor, "b c t y x"]:
        """The mean; with a generator, a draw."""
        mean, log_variance = self.moments(clip)
        return mean if generator is None else drawn(mean, log_variance, generator)

    def decode(self, latent: Float[Tensor, "b c t y x"], stream=None) -> Float[Tensor, "b 3 f h w"]:
        size = tuple(latent.shape[2:])
        x = self.decoder(self.read(rearrange(latent, "b c f h w -> b (f h w) c")), size)
        return rearrange(self.unembed(x), "b (f h w) (c q p r) -> b c (f q) (h p) (w r)", f=size[0], h=size[1], c=3,
                         q=self.time_stride, p=self.space_stride)  # fmt: skip

    def numbers(self, f: int, h: int, w: int) -> int:
        """E: numbers in the code of a clip."""
        c, *size = self.latent_shape(f, h, w)
        return c * size[0] * size[1] * size[2]

    def freeze(self) -> list[nn.Parameter]:
        """For the second stage: all up to the code stays as it is. Returns what is left to learn."""
        for part in (self.embed, self.encoder, self.code):
            part.requires_grad_(False)
        return [p for part in (self.read, self.decoder, self.unembed) for p in part.parameters()]


def drawn(mean: Tensor, log_variance: Tensor, generator: torch.Generator) -> Tensor:
    return mean + (0.5 * log_variance).exp() * fit.normal(*mean.shape, generator=generator)


# --- training -----------------------------------------------------------------------------------------------------------


def gradient_difference(a: Float[Tensor, "b c f h w"], b: Float[Tensor, "b c f h w"]) -> Float[Tensor, ""]:
    """Mean size of the difference between the two clips' gradients: a wrong edge costs, a wrong brightness doesn't."""
    (ax, ay), (bx, by) = gradients(a), gradients(b)
    return (ax - bx).abs().mean() + (ay - by).abs().mean()


def loss(model: ViTok, clip: Float[Tensor, "b 3 f h w"], generator, beta: float = 1e-3, eta: float = 1.0,
         perceptual: Callable = gradient_difference) -> dict[str, Tensor]:
    """Stage 1: "loss" is MSE + beta KL + eta perceptual; the three parts beside it."""
    mean, log_variance = model.moments(clip)
    back = model.decode(drawn(mean, log_variance, generator))
    parts = {"mse": (back - clip).square().mean(), "kl": kl(mean, log_variance), "perceptual": perceptual(back, clip)}
    return {"loss": parts["mse"] + beta * parts["kl"] + eta * parts["perceptual"]} | parts


class Critic(nn.Sequential):
    """Clip -> one number for each patch: does it look true?"""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96)):
        layers, c = [], 3
        for w in widths:
            layers += [nn.Conv3d(c, w, (3, 4, 4), (1, 2, 2), 1), nn.LeakyReLU(0.2)]
            c = w
        super().__init__(*layers, nn.Conv3d(c, 1, 1))


def second(model: ViTok, critic: nn.Module, clip: Float[Tensor, "b 3 f h w"], ramp: float, weight: float = 0.1,
           eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """Stage 2: the decoder's loss, and the critic's (hinge). ramp: 0 to 1, the share of the critic's word so far."""
    with torch.no_grad():
        z = model.encode(clip)
    back = model.decode(z)
    for p in critic.parameters():
        p.requires_grad_(False)
    ours = (back - clip).square().mean() + eta * gradient_difference(back, clip) - ramp * weight * critic(back).mean()
    for p in critic.parameters():
        p.requires_grad_(True)
    theirs = F.relu(1 - critic(clip)).mean() + F.relu(1 + critic(back.detach())).mean()
    return ours, theirs
