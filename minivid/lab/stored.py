"""Any real video through the shared tokenizer: to a small file and back.

A `.mvid` file is a safetensors file: the latent in fp16 (or float32), and a header that says which tokenizer made it
(name and hash), and the size, rate and number of frames to give back. Long videos run through a streaming tokenizer in
chunks of 16 frames, with the same result as in one piece.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minivid.core import weights
from minivid.core.tokenizer import Stream
from minivid.world.files import Video, read_video, write_video
from minivid.world.scores import psnr

CHUNK = 16  # frames at a time: bounds the memory of the features, not of the clip


class StoredError(ValueError):
    """A file that is no `.mvid`, or one that needs another tokenizer; the message says which."""


@dataclass(frozen=True)
class Report:
    """What storing a video cost and kept. Sizes in bytes, times in seconds, PSNR in dB over all frames."""

    frames: int
    height: int
    width: int
    raw_bytes: int
    file_bytes: int
    numbers_ratio: float  # pixel values for one latent value
    psnr: float
    encode_seconds: float
    decode_seconds: float


def encode(
    video: str | Path, out: str | Path, *, size: int | None = 96, frames: int | None = None, start: int = 0,
    tokenizer: str = "tok-v", exact: bool = False,
) -> Report:  # fmt: skip
    """Read a video, write `out`, decode it again and report. `exact` stores float32 in place of fp16.

    size    side of the centred square that is kept, a multiple of 4; None keeps the picture, cut to multiples of 4
    Raises VideoError for what can't be read, FileNotFoundError, WeightsError without the tokenizer.
    """
    source = read_video(video, size=size, frames=frames, start=start)
    model = weights.load(tokenizer)
    clip = _cut(source.clip, model.space_stride)
    began = time.perf_counter()
    latent = _encode(model, clip)
    between = time.perf_counter()
    latent = latent if exact else latent.half()
    header = {
        "kind": "video", "tokenizer": tokenizer, "hash": _hash(tokenizer), "fps": f"{source.fps:g}",
        "frames": str(clip.shape[1]),
    }  # fmt: skip
    weights.write(Path(out), {"latent": latent}, header)
    again = _decode(model, latent.float(), clip.shape[1])
    raw = clip.numel()  # a byte a value
    return Report(
        frames=clip.shape[1], height=clip.shape[2], width=clip.shape[3], raw_bytes=raw,
        file_bytes=Path(out).stat().st_size, numbers_ratio=raw / latent.numel(),
        psnr=float(psnr(again, clip)), encode_seconds=between - began,
        decode_seconds=time.perf_counter() - between,
    )  # fmt: skip


def decode(stored: str | Path, out: str | Path | None = None) -> Video:
    """The video of a `.mvid` file, written to `out` (mp4, mkv, mov, webp or gif) where one is named.

    Raises StoredError when the file was made by other weights than the ones that are here.
    """
    latent, header = _read(stored)
    model = weights.load(header["tokenizer"])
    if header["hash"] != _hash(header["tokenizer"]):
        raise StoredError(
            f"{stored} was encoded by other weights called {header['tokenizer']!r} (hash {header['hash']}, "
            f"here {_hash(header['tokenizer'])}); decode it with the version of minivid that made it."
        )
    video = Video(_decode(model, latent.float(), int(header["frames"])), float(header["fps"]))
    if out is not None:
        write_video(out, video.clip, video.fps)
    return video


def info(stored: str | Path) -> dict[str, Any]:
    """What a `.mvid` file says of itself: tokenizer, frames, rate, shape and type of the latent, bytes."""
    latent, header = _read(stored)
    return {
        "tokenizer": header["tokenizer"], "hash": header["hash"], "frames": int(header["frames"]),
        "fps": float(header["fps"]), "latent": list(latent.shape[1:]), "type": str(latent.dtype).removeprefix("torch."),
        "bytes": Path(stored).stat().st_size,
    }  # fmt: skip


def _read(stored: str | Path) -> tuple[Tensor, dict[str, str]]:
    if not Path(stored).exists():
        raise FileNotFoundError(f"there is no file {stored}.")
    try:
        tensors, header = weights.read(Path(stored))
    except weights.WeightsError as error:
        raise StoredError(f"{stored} is no .mvid file: {error}") from None
    lacking = {"tokenizer", "hash", "fps", "frames"} - header.keys()
    if header.get("kind") != "video" or lacking or "latent" not in tensors:
        raise StoredError(f"{stored} holds {header.get('kind', 'something else')}, not a video made by `encode`.")
    return tensors["latent"], header


def _hash(tokenizer: str) -> str:
    return hashlib.sha256(weights.path_of(tokenizer).read_bytes()).hexdigest()[:16]


def _cut(clip: Tensor, stride: int) -> Tensor:
    """The centre of a clip whose sides are multiples of `stride`."""
    high, wide = (side - side % stride for side in clip.shape[2:])
    if not high or not wide:
        raise ValueError(f"a video needs at least {stride} x {stride} pixels, this one has {tuple(clip.shape[2:])}.")
    y, x = (clip.shape[2] - high) // 2, (clip.shape[3] - wide) // 2
    return clip[:, :, y : y + high, x : x + wide]


def _plan(frames: int, stride: int, streams: bool) -> Iterator[tuple[int, int]]:
    """(start, length) of the chunks of `frames` latent-aligned frames: first 1 + CHUNK, then CHUNK at a time."""
    first = min(frames, 1 + CHUNK) if streams else frames
    yield 0, first
    for begin in range(first, frames, CHUNK - CHUNK % stride):
        yield begin, min(CHUNK - CHUNK % stride, frames - begin)


@torch.no_grad()
def _encode(model: Any, clip: Tensor) -> Tensor:
    frames = clip.shape[1]
    while not model.frames(frames):  # 1 + 4k: the last frame stands still until then
        frames += 1
    clip = F.pad(clip, (0, 0, 0, 0, 0, frames - clip.shape[1]), mode="replicate")
    stream = Stream() if model.streams else None
    plan = list(_plan(frames, model.time_stride, model.streams))
    return torch.cat([model.encode(clip[None, :, a : a + n], stream) for a, n in _bar(plan, "encode")], 2)


@torch.no_grad()
def _decode(model: Any, latent: Tensor, frames: int) -> Tensor:
    stream = Stream() if model.streams else None
    step = 1 + CHUNK // model.time_stride if model.streams else latent.shape[2]
    parts = [model.decode(z, stream) for z in _bar(latent.split(step, 2), "decode")]
    return torch.cat(parts, 2)[0, :, :frames]


def _bar(items: Any, what: str) -> Any:
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, unit="chunk", mininterval=1, leave=False, disable=None if len(items) > 1 else True)
