"""Video files: read what PyAV or Pillow decodes into a clip, write a clip as mp4, webp or gif.

What is unusual: a damaged file is an error, not a shorter clip. Decoders end silently at a truncation, so the number of
frames is compared with what the file's header promises. And a file is written beside its name and then moved there, so
a stop at any moment leaves the old file or the new one, never half of one.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

PICTURES = (".webp", ".gif")  # by Pillow, everything else by PyAV; both are imported only when a file is touched


class VideoError(ValueError):
    """A file that is there but cannot be read, or written, as a video; the message says what is wrong with it."""


@dataclass(frozen=True)
class Video:
    """A clip read from a file, and its frames per second."""

    clip: Float[Tensor, "c f h w"]
    fps: float


def check_clip(clip: Tensor, axes: str = "c f h w", slack: float = 1e-3) -> None:
    """Raise unless `clip` is finite, floating, in [-1, 1] (within `slack`), with the named axes and 3 channels."""
    if not isinstance(clip, Tensor):
        raise TypeError(f"A clip is a torch tensor '{axes}', got {type(clip).__name__}: wrap it in torch.as_tensor.")
    names = axes.split()
    if clip.ndim != len(names) or clip.shape[names.index("c")] != 3 or 0 in clip.shape:
        raise ValueError(f"A clip is '{axes}' with c = 3 and no empty axis, got shape {tuple(clip.shape)}.")
    if not clip.is_floating_point():
        raise TypeError(f"A clip is float in [-1, 1], got {clip.dtype}: for bytes use clip.float() / 127.5 - 1.")
    low, high = (float(value) for value in clip.detach().aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("The clip has NaN or infinite values.")
    if low < -1 - slack or high > 1 + slack:
        raise ValueError(f"A clip lies in [-1, 1], got values from {low:.3g} to {high:.3g}: clamp or rescale it.")


def to_clip(pixels: np.ndarray) -> Tensor:
    """Bytes `... f h w c` to a clip `... c f h w` in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, -4))).float().div_(127.5).sub_(1)


def to_bytes(clip: Tensor) -> np.ndarray:
    """A clip `c f h w` to bytes `f h w c`."""
    pixels = clip.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return np.ascontiguousarray(pixels.permute(1, 2, 3, 0).numpy())


def read_video(
    path: str | os.PathLike,
    size: int | None = None,
    frames: int | None = None,
    start: int = 0,
    fps: float | int | None = None,
    partial: bool = False,
) -> Video:
    """Any video file: what PyAV decodes, and animated WebP and GIF.

    size: crop the centre square and average it to size x size; None keeps the picture. fps: take what is on screen
    at this rate; None keeps all. frames, start: how many to keep (None: all) and the first one, counted at that rate.
    Raises FileNotFoundError, or VideoError for a folder, a file that is no video, one without frames or shorter than
    asked, and a truncated one; `partial` keeps what can be read of a truncated file. Frames asked for that come before
    the damage are simply read.
    """
    path = Path(path)
    if start < 0 or any(number is not None and not number > 0 for number in (size, frames, fps)):
        raise ValueError(f"size, frames, fps > 0 and start >= 0 are needed, got {size}, {frames}, {fps} and {start}.")
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.is_dir():
        raise VideoError(f"{path} is a folder, not a video file.")
    if path.stat().st_size == 0:
        raise VideoError(f"{path} is empty (0 bytes).")
    kept: list[np.ndarray] = []
    rate, seen, damage = fps, 0, ""
    try:
        for picture, source in pictures(path) if path.suffix.lower() in PICTURES else _decoded(path):
            rate = fps or source
            while (frames is None or len(kept) < frames) and int((start + len(kept)) * source / rate + 1e-6) == seen:
                kept.append(_squared(picture, size))
            seen += 1
            if len(kept) == frames:
                break
    except _Truncated as cause:
        damage = f"{path} is truncated or damaged: {cause}"
    if seen == 0:
        raise VideoError(damage or f"{path} has no frames.")
    if damage and not partial:
        raise VideoError(f"{damage}, {seen} could be read. Ask for fewer frames, or pass partial=True to keep them.")
    if not kept or (frames is not None and len(kept) < frames and not partial):
        wanted = f"{frames or 1} frames from number {start} at {rate:.3g} frames a second were asked for"
        raise VideoError(f"{path} is too short: {wanted}, it gives {len(kept)} (and has {seen} in all).")
    return Video(to_clip(np.stack(kept)), float(rate))


class _Truncated(Exception):
    """How many frames were promised, as words."""


def pictures(path: Path) -> Iterator[tuple[np.ndarray, float]]:
    """(frame `h w c` in bytes, frames per second) of an animated WebP or GIF."""
    from PIL import Image, ImageSequence, UnidentifiedImageError

    try:
        film = Image.open(path)
    except (UnidentifiedImageError, OSError, SyntaxError) as cause:
        raise VideoError(f"{path} is not a video, or is damaged at its start: {cause}.") from cause
    with film:
        count, seen = getattr(film, "n_frames", 1), 0
        try:
            for frame in ImageSequence.Iterator(film):
                pixels = np.asarray(frame.convert("RGB"))  # decodes, so the duration below is this frame's
                yield pixels, 1000 / (film.info.get("duration") or 100)
                seen += 1
        except (OSError, EOFError, SyntaxError) as cause:
            raise _Truncated(f"of its {count} frames") from cause
    if seen < count:
        raise _Truncated(f"of its {count} frames")


def _decoded(path: Path) -> Iterator[tuple[np.ndarray, float]]:
    """(frame `h w c` in bytes, frames per second) of a file that PyAV decodes."""
    try:
        import av
    except ImportError as cause:
        raise VideoError(f"Reading {path.name} needs PyAV: pip install av. WebP and GIF do not.") from cause
    try:
        container = av.open(str(path))
    except av.FFmpegError as cause:
        raise VideoError(f"{path} is not a video, or is cut off before its index: {cause.strerror}.") from cause
    with container:
        if container.format.name == "tty" or not container.streams.video:
            raise VideoError(f"{path} is not a video ({container.format.long_name}): it has no pictures in it.")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        seen, last, damaged = 0, 0.0, False
        try:
            for frame in container.decode(stream):
                turned = round(frame.rotation / 90)  # phones store upright films lying down
                yield np.rot90(frame.to_ndarray(format="rgb24"), turned), fps
                seen, last, damaged = seen + 1, frame.time or last, damaged or frame.is_corrupt
        except av.FFmpegError as cause:
            raise _Truncated(_promise(container, stream, fps)) from cause
        missing = max(stream.frames - seen, 0)
        if not stream.frames and container.duration and not container.streams.audio:  # sound may outlast the pictures
            missing = int((container.duration / 1e6 - last) * fps) - 1
        if damaged or missing > max(2, 0.02 * seen):
            raise _Truncated(_promise(container, stream, fps))


def _promise(container, stream, fps: float) -> str:
    count = stream.frames or round((container.duration or 0) / 1e6 * fps)
    return f"of its {count} frames" if count else "of an unknown number of frames"


def _squared(picture: np.ndarray, size: int | None) -> np.ndarray:
    """The centre square, averaged (or, where it is smaller, interpolated) to size x size."""
    if size is None:
        return picture
    from PIL import Image

    h, w, _ = picture.shape
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    square = Image.fromarray(picture[top : top + side, left : left + side])
    how = Image.Resampling.BOX if side >= size else Image.Resampling.BILINEAR
    return np.asarray(square.resize((size, size), how))


def write_video(path: str | os.PathLike, clip: Float[Tensor, "c f h w"], fps: float | int = 16) -> Path:
    """Write a clip in [-1, 1] as .mp4, .mkv or .mov (H.264), .webp (lossless) or .gif; give back the path.

    H.264 needs even sides: an odd clip gets its last row or column twice. The file appears whole or not at all.
    Raises ValueError or TypeError for what is no clip, FileNotFoundError for the folder, VideoError for the suffix.
    """
    path = Path(path)
    check_clip(clip)
    if not 0 < fps <= 1000:
        raise ValueError(f"fps lies in (0, 1000], got {fps}.")
    suffix = path.suffix.lower()
    if suffix not in (*PICTURES, ".mp4", ".mkv", ".mov"):
        raise VideoError(f"Cannot write {path.name}: the name must end in .mp4, .mkv, .mov, .webp or .gif.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} into.")
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=suffix, dir=path.parent)
    os.close(handle)
    try:
        (_animate if suffix in PICTURES else _encode)(temporary, to_bytes(clip), float(fps))
        os.chmod(temporary, 0o644)  # mkstemp's are private
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _animate(path: str, pixels: np.ndarray, fps: float) -> None:
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in pixels)
    options = dict(lossless=True, quality=60, method=3) if path.endswith(".webp") else {}
    first.save(path, save_all=True, append_images=rest, duration=max(1, round(1000 / fps)), loop=0, **options)


def _encode(path: str, pixels: np.ndarray, fps: float) -> None:
    try:
        import av
    except ImportError as cause:
        raise VideoError("Writing mp4 needs PyAV: pip install av. Names in .webp or .gif do not.") from cause
    pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), mode="edge")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "15"})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        for frame in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
