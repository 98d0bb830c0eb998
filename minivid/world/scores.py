"""How near, how sharp, how steady: scores of clips, each a pure function with its definition, units and direction.

What is unusual: no score is averaged over clips. Every function that compares clips gives one value *a clip*, so that
two methods can be compared on the same clips (`bootstrap` of the differences), which needs far fewer of them. Scores
of numbers, feature sets and codes live in `stats` and are handed on here, so that one name serves.

Clips are float in [-1, 1], so the peak is 2. `*b` stands for any leading axes, none included.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .stats import (  # noqa: F401  handed on
    auroc,
    average_precision,
    bits_per_pixel,
    bootstrap,
    chunk_means,
    entropy,
    frechet,
    iou,
    mutual_information,
    pearson,
    perplexity,
    recall_at,
    spearman,
    usage,
    vde,
)  # fmt: skip

PEAK = 2.0
_MOST = 100.0  # dB; what equal clips get, so that means stay finite


def same(a: Tensor, b: Tensor) -> None:
    """Raise unless both are floating clips of one shape `... c f h w`, without NaN."""
    if a.shape != b.shape or a.ndim < 4:
        raise ValueError(f"Expected two clips of one shape '... c f h w', got {tuple(a.shape)} and {tuple(b.shape)}.")
    for clip in (a, b):
        if not clip.is_floating_point():
            raise TypeError(f"A clip is float in [-1, 1], got {clip.dtype}: for bytes use clip.float() / 127.5 - 1.")
        if not torch.isfinite(clip).all():
            raise ValueError("A clip has NaN or infinite values, so it has no score.")


def decibel(mse: Tensor, peak: float = PEAK) -> Tensor:
    """Mean squared error to dB; at most 100, which is what zero gives."""
    return (10 * torch.log10(peak**2 / mse.clamp(min=peak**2 * 10 ** (-_MOST / 10)))).clamp(max=_MOST)


def psnr(a: Float[Tensor, "*b c f h w"], b: Float[Tensor, "*b c f h w"]) -> Float[Tensor, "*b"]:
    """Peak signal-to-noise ratio in dB, higher is nearer: 10 log10(2^2 / mean squared error)."""
    same(a, b)
    return decibel((a - b).square().mean((-4, -3, -2, -1)))


def ssim(
    a: Float[Tensor, "*b c f h w"], b: Float[Tensor, "*b c f h w"], window: int = 11, sigma: float = 1.5
) -> Float[Tensor, "*b"]:
    """Structural similarity in [-1, 1], 1 is equal (Wang et al. 2004): Gaussian window, whole windows only, mean over
    all.

    window: 7 to 11 px, odd. Frames and channels are compared one by one.
    """
    same(a, b)
    if window % 2 == 0 or not 1 < window <= min(a.shape[-2:]):
        raise ValueError(f"The window is odd and at most {min(a.shape[-2:])} px here, got {window}.")
    lead = a.shape[:-4]
    x, y = (clip.flatten(0, -3)[:, None] for clip in (a, b))
    steps = torch.arange(window, dtype=a.dtype, device=a.device) - window // 2
    bell = torch.exp(-steps.square() / (2 * sigma**2))
    bell = bell / bell.sum()

    def blur(image):
        return F.conv2d(F.conv2d(image, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1))

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return value.view(*lead, -1).mean(-1)


def gradients(clip: Float[Tensor, "*b c f h w"]) -> tuple[Tensor, Tensor]:
    """Differences to the right and to the lower neighbour."""
    return clip[..., :, 1:] - clip[..., :, :-1], clip[..., 1:, :] - clip[..., :-1, :]


def gradient_psnr(a: Float[Tensor, "*b c f h w"], b: Float[Tensor, "*b c f h w"]) -> Float[Tensor, "*b"]:
    """PSNR (dB, peak 2) of the neighbour differences, both directions: blind to brightness, strict on edges."""
    same(a, b)
    errors = [(p - q).square().flatten(len(a.shape) - 4) for p, q in zip(gradients(a), gradients(b), strict=True)]
    return decibel(torch.cat(errors, -1).mean(-1))


def sharpness(clip: Float[Tensor, "*b c f h w"]) -> Float[Tensor, "*b"]:
    """Gradient energy: mean square of the neighbour differences. Report sharpness(x) / sharpness(truth), ideal 1."""
    return torch.cat([g.square().flatten(clip.ndim - 4) for g in gradients(clip)], -1).mean(-1)


def grey(clip: Float[Tensor, "*b c f h w"]) -> Float[Tensor, "*b f h w"]:
    """Mean of the channels in [0, 1]."""
    return (clip.mean(-4) + 1) / 2


def laplacian_variance(clip: Float[Tensor, "*b c f h w"]) -> Float[Tensor, "*b"]:
    """Variance over a frame of the five-point Laplacian of the grey picture in [0, 1], mean over frames; low is
    blurred.
    """
    g = grey(clip)
    inner = g[..., 1:-1, 1:-1]
    around = g[..., :-2, 1:-1] + g[..., 2:, 1:-1] + g[..., 1:-1, :-2] + g[..., 1:-1, 2:]
    return (around - 4 * inner).flatten(-2).var(-1, correction=0).mean(-1)


def edge_f1(
    a: Float[Tensor, "*b c f h w"], b: Float[Tensor, "*b c f h w"], threshold: float = 0.1, reach: int = 1
) -> Float[Tensor, "*b"]:
    """F1 in [0, 1] of the edges of a against those of b (grey steps above `threshold` of the range, matched within
    `reach` px).

    1 where neither has an edge.
    """
    same(a, b)
    x, y = _edges(a, threshold), _edges(b, threshold)
    near = [F.max_pool2d(e.flatten(0, -3)[:, None], 2 * reach + 1, 1, reach).view(e.shape) for e in (x, y)]
    dims = (-3, -2, -1)
    found, wanted = x.sum(dims), y.sum(dims)
    precision = (x * near[1]).sum(dims) / found.clamp(min=1)
    recall = (y * near[0]).sum(dims) / wanted.clamp(min=1)
    score = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return torch.where(found + wanted == 0, torch.ones_like(score), score)


def _edges(clip: Tensor, threshold: float) -> Tensor:
    g = grey(clip)
    right, down = g[..., :-1, 1:] - g[..., :-1, :-1], g[..., 1:, :-1] - g[..., :-1, :-1]
    return (torch.hypot(right, down) > threshold).float()


def warp_error(
    clip: Float[Tensor, "*b c f h w"], flow: Float[Tensor, "*b xy f h w"], seen: Bool[Tensor, "*b f h w"] | None = None
) -> Float[Tensor, "*b"]:
    """Mean squared difference between each frame and the next one fetched along the *exact* forward flow (px); 0 is
    steady.

    flow: where each pixel's point is in the next frame (the last frame's is not used); seen: where that is so and
    uncovered. Blur lowers it: never report it without sharpness.
    """
    lead, (c, f, h, w) = clip.shape[:-4], clip.shape[-4:]
    if f < 2 or flow.shape[-4:] != (2, f, h, w):
        raise ValueError(f"A warp needs two frames and flow '2 f h w', got {(*clip.shape,)}, {(*flow.shape,)}.")
    flow = flow.reshape(-1, 2, f, h, w)[:, :, :-1].transpose(1, 2)
    x = flow[:, :, 0] + torch.arange(w, device=clip.device)
    y = flow[:, :, 1] + torch.arange(h, device=clip.device)[:, None]
    grid = torch.stack((2 * x / max(w - 1, 1) - 1, 2 * y / max(h - 1, 1) - 1), -1).flatten(0, 1)
    frames = clip.reshape(-1, c, f, h, w).transpose(1, 2)
    fetched = F.grid_sample(frames[:, 1:].flatten(0, 1), grid.to(clip.dtype), align_corners=True, padding_mode="border")
    error = (fetched - frames[:, :-1].flatten(0, 1)).square().mean(1)
    inside = (grid.abs() <= 1).all(-1)
    if seen is not None:
        inside &= seen.reshape(-1, f, h, w)[:, :-1].flatten(0, 1)
    total = (error * inside).view(-1, (f - 1) * h * w).sum(1) / inside.view(-1, (f - 1) * h * w).sum(1).clamp(min=1)
    return total.view(lead)


def seam_ratio(
    clip: Float[Tensor, "*b c f h w"], truth: Float[Tensor, "*b c f h w"] | None, chunk: int
) -> Float[Tensor, "*b"]:
    """Error of the frame-to-frame difference at the borders of chunks of `chunk` frames over the same inside; ideal 1.

    Without a truth the differences themselves are compared. 1 where there is no error at all.
    """
    f = clip.shape[-3]
    if not 1 < chunk < f:
        raise ValueError(f"chunk lies between 2 and {f - 1} for {f} frames, got {chunk}.")
    step = clip[..., 1:, :, :] - clip[..., :-1, :, :]
    if truth is not None:
        same(clip, truth)
        step = step - (truth[..., 1:, :, :] - truth[..., :-1, :, :])
    error = step.abs().mean((-4, -2, -1))
    border = torch.arange(1, f, device=clip.device) % chunk == 0
    at, inside = error[..., border].mean(-1), error[..., ~border].mean(-1)
    return torch.where(at + inside < 1e-9, torch.ones_like(at), at / inside.clamp(min=1e-9))


def radius(h: int, w: int) -> Float[Tensor, "h w"]:
    """Spatial frequency of each entry of an fft2, as a share of the Nyquist frequency (corners reach 1.41)."""
    return 2 * torch.hypot(torch.fft.fftfreq(h)[:, None], torch.fft.fftfreq(w)[None])


def power(clip: Float[Tensor, "*b c f h w"]) -> Float[Tensor, "*b h w"]:
    """Mean power of each spatial frequency over channels and frames; its mean is the mean square of the clip
    (Parseval).
    """
    return torch.fft.fft2(clip, norm="ortho").abs().square().mean((-4, -3))


def band_psnr(
    a: Float[Tensor, "*b c f h w"], b: Float[Tensor, "*b c f h w"], low: float | int = 0, high: float | int = 0.25
) -> Float[Tensor, "*b"]:
    """PSNR (dB, peak 2) of the error that lies in the ring low <= radius < high (shares of Nyquist; high = 2 takes
    corners).

    The squared errors of rings that tile the plane add up to the whole squared error.
    """
    same(a, b)
    r = radius(*a.shape[-2:]).to(a.device)
    return decibel((power(a - b) * ((r >= low) & (r < high))).mean((-2, -1)))


def radial_spectrum(clip: Float[Tensor, "*b c f h w"], bins: int = 16) -> Float[Tensor, "*b r"]:
    """Mean power in `bins` rings of equal width from 0 to Nyquist; corners beyond are left out."""
    p, r = power(clip), radius(*clip.shape[-2:]).to(clip.device)
    index = (r * bins).long().flatten()
    keep = index < bins
    hot = F.one_hot(index[keep], bins).to(p.dtype)
    return p.flatten(-2)[..., keep] @ hot / hot.sum(0).clamp(min=1)


def high_share(error: Float[Tensor, "*b c f h w"]) -> Float[Tensor, "*b"]:
    """Share in [0, 1] of an error's energy above half the Nyquist frequency."""
    p, r = power(error), radius(*error.shape[-2:]).to(error.device)
    return (p * (r > 0.5)).sum((-2, -1)) / p.sum((-2, -1)).clamp(min=1e-20)


def background(
    clip: Float[Tensor, "*b c f h w"], plate: Float[Tensor, "*b c f h w"], covered: Float[Tensor, "*b f h w"]
) -> tuple[Float[Tensor, "*b f"], Float[Tensor, "*b"]]:
    """(PSNR in dB a frame against the true plate where nothing covers it; flicker = std over time of pixels never
    covered).

    covered: coverage by objects in [0, 1]; pixels above .01 are left out. Flicker is relative to the plate's own
    motion.
    """
    same(clip, plate)
    free = (covered <= 0.01).unsqueeze(-4).to(clip.dtype)
    share = free.mean((-4, -2, -1)).clamp(min=1e-6)
    mse = ((clip - plate).square() * free).mean((-4, -2, -1)) / share
    always = free.amin(-3)
    wobble = (clip - plate).std(-3, correction=0)
    return decibel(mse), (wobble * always).mean((-3, -2, -1)) / always.mean((-3, -2, -1)).clamp(min=1e-6)


def brightness_ratio(clips: Float[Tensor, "b c f h w"], data: Float[Tensor, "n c f h w"]) -> float:
    """Variance of the clips' mean brightness over that of the data's; ideal 1, a model stuck at mid grey gives 0."""
    ours, theirs = (x.mean((1, 2, 3, 4)).var(correction=1) for x in (clips, data))
    return float(ours / theirs.clamp(min=1e-12))


def template_correlation(clip: Float[Tensor, "*b c f h w"], template: Float[Tensor, "c h w"]) -> Float[Tensor, "*b"]:
    """Pearson correlation in [-1, 1] of each frame with a template (a watermark), mean over frames."""
    x = clip.transpose(-4, -3).flatten(-3)
    t = template.flatten()
    x, t = x - x.mean(-1, keepdim=True), t - t.mean()
    return (x @ t / (x.norm(dim=-1) * t.norm()).clamp(min=1e-12)).mean(-1)


def diversity(samples: Float[Tensor, "n *rest"]) -> float:
    """Mean over pairs of the root mean square difference of n samples (clips or features); 0 is one sample n times."""
    if samples.shape[0] < 2:
        raise ValueError("Diversity needs at least two samples.")
    flat = samples.flatten(1)
    return float(torch.pdist(flat).mean() / math.sqrt(flat.shape[1]))


def best_of(samples: Float[Tensor, "*b n c f h w"], truth: Float[Tensor, "*b c f h w"]) -> Float[Tensor, "*b"]:
    """PSNR (dB) of the nearest of n samples; it grows with n, so n is part of the number."""
    return psnr(samples, truth.unsqueeze(-5).expand_as(samples)).amax(-1)


def consistency(features: Float[Tensor, "*b f d"]) -> Float[Tensor, "*b"]:
    """Mean over frames i >= 2 of (max(0, cos(f_i, f_{i-1})) + max(0, cos(f_i, f_1))) / 2, in [0, 1] (VBench's subject
    score).
    """
    if features.shape[-2] < 2:
        raise ValueError("Consistency needs at least two frames.")
    unit = F.normalize(features, dim=-1)
    before = (unit[..., 1:, :] * unit[..., :-1, :]).sum(-1).clamp(min=0)
    first = (unit[..., 1:, :] * unit[..., :1, :]).sum(-1).clamp(min=0)
    return ((before + first) / 2).mean(-1)


def content_and_motion(
    ours: Float[Tensor, "f d"],
    theirs: Float[Tensor, "f d"],
    path: Float[Tensor, "f xy"],
    true_path: Float[Tensor, "f xy"],
) -> tuple[float, float]:
    """(C, M): the mean distance of frame features after the best re-ordering of frames, so blind to order; and the mean
    error of the displacement per frame, in the path's units. VDMini's split of "what is shown" from "how it moves"."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(ours, theirs)
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    steps = (path[1:] - path[:-1]) - (true_path[1:] - true_path[:-1])
    return float(cost[torch.as_tensor(rows), torch.as_tensor(columns)].mean()), float(steps.norm(dim=-1).mean())
