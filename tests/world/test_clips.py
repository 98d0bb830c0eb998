"""Real clips: what is bundled, the split, exact pans; files of every kind, whole, damaged and wrong."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minivid.world import VideoError, clips, natural, natural_crops, pan, photograph, read_video, write_video
from minivid.world.clips import DATA, SPLIT


def ramp(frames=12, height=48, width=64):
    """A clip in which every frame is known: a bright bar moves 4 px a frame over a grey ramp."""
    clip = torch.linspace(-0.5, 0.5, height)[None, None, :, None].repeat(3, frames, 1, width)
    for i in range(frames):
        clip[:, i, :, 4 * i : 4 * i + 8] = 0.9
    return clip


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", ramp(48), fps=12)


@pytest.mark.parametrize(("name", "shape"), [("bunny", (64, 96, 160)), ("city", (64, 96, 160)), ("cut", (24, 96, 96))])
def test_bundled(name, shape):
    clip = natural(name)
    assert clip.shape == (3, *shape) and clip.min() >= -1 and clip.max() <= 1
    steps = (clip[:, 1:] - clip[:, :-1]).abs().mean((0, 2, 3))
    assert steps.min() > 0.01, "every frame differs from the one before"
    cut = steps > 4 * steps.median()
    assert cut.nonzero().flatten().tolist() == ([11] if name == "cut" else []), "only `cut` has a cut"


def test_bundled_files_are_small_and_attributed():
    files = sorted(DATA.glob("*.webp"))
    assert sum(file.stat().st_size for file in files) <= 4.5e6
    text = (DATA / "ATTRIBUTION.md").read_text()
    assert all(file.name in text for file in files) and "Blender Foundation | www.bigbuckbunny.org" in text


def test_bundled_needs_no_av(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)  # importing it now fails
    clips._bundled.cache_clear()
    clip = natural("cut")
    assert torch.equal(read_video(write_video(tmp_path / "a.webp", clip)).clip, clip)
    with pytest.raises(VideoError, match="pip install av"):
        write_video(tmp_path / "a.mp4", clip)


def test_crops_are_a_function_of_the_seed():
    a, b, c = (natural_crops(4, 32, 5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert natural_crops(2, 64, 17).shape == (2, 3, 17, 64, 64)
    assert natural_crops(1, 96, 64).shape == (1, 3, 64, 96, 96)
    assert natural_crops(1, 64, 64, "held-out").shape == (1, 3, 64, 64, 64)


def test_crops_keep_to_their_side():
    """Every held-out crop is found in the right columns; no training crop at full size reaches them."""
    whole = {name: natural(name) for name in ("bunny", "city")}
    for crop in natural_crops(6, 48, 1, "held-out", seed=3):
        assert any(_found(crop, film[:, :, :, SPLIT:]) for film in whole.values())
    inside = 0
    for crop in natural_crops(12, 64, 1, "train", seed=4):
        both = (crop, crop.flip(-1))
        assert not any(_found(c, film[..., SPLIT - 63 :]) for c in both for film in whole.values())
        inside += any(_found(c, film[..., :SPLIT]) for c in both for film in whole.values())
    assert inside >= 6, "the rest are pans of photographs"


def _found(crop, film):
    """Is the one-frame crop somewhere in the film? Looks for its first row's corner pixels first, for speed."""
    size = crop.shape[-1]
    h, w = film.shape[2] - size + 1, film.shape[3] - size + 1
    if w < 1:
        return False
    corner = torch.ones(film.shape[1], h, w, dtype=torch.bool)
    for y, x in ((0, 0), (0, size - 1), (size - 1, 0), (size - 1, size - 1)):
        corner &= (film[:, :, y : y + h, x : x + w] == crop[:, 0, y, x].view(3, 1, 1, 1)).all(0)
    places = corner.nonzero().tolist()
    return any(torch.equal(film[:, f, y : y + size, x : x + size], crop[:, 0]) for f, y, x in places)


def test_pan_moves_by_its_flow():
    clip, flow = pan("china", 48, 5, (2.0, -1.0), seed=5)
    assert clip.shape == (3, 5, 48, 48) and flow.shape == (2, 5, 48, 48)
    assert (flow[0] == 2).all() and (flow[1] == -1).all()
    torch.testing.assert_close(clip[:, 1, :-1, 2:], clip[:, 0, 1:, :-2], atol=1e-5, rtol=0)


def test_pan_is_exact_between_pixels():
    """On a linear ramp the mean over any window is the ramp at its middle, so a shift of .25 px is seen exactly."""
    ramp = torch.linspace(-1, 1, 200).expand(3, 100, 200)
    clip, _ = pan(ramp, 16, 9, (0.25, 0.0), seed=0, zoom_out=2)
    step = -0.25 * 2 * 2 / 199
    torch.testing.assert_close(clip[:, 1:] - clip[:, :-1], torch.full((3, 8, 16, 16), step), atol=1e-5, rtol=0)


def test_pan_at_whole_pixels_is_a_block_mean():
    photo = photograph("flower")
    clip, _ = pan(photo[:, :64, :64], 32, 1, (0.0, 0.0), zoom_out=2)
    expected = torch.nn.functional.avg_pool2d(photo[:, :64, :64], 2)
    torch.testing.assert_close(clip[:, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: natural("dog"), "bundled clips are: bunny, city, cut"),
        (lambda: natural_crops(1, 64, 17, "test"), "train or held-out"),
        (lambda: natural_crops(1, 80, 17, "held-out"), "size <= 64"),
        (lambda: photograph("cat"), "china, flower"),
        (lambda: pan("china", 64, 100, (4.0, 0.0)), "fewer frames"),
    ],
)
def test_clear_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webp", ".gif"])
def test_round_trip(tmp_path, suffix):
    clip = ramp()
    video = read_video(write_video(tmp_path / f"a{suffix}", clip, fps=12))
    assert video.clip.shape == clip.shape and video.fps == pytest.approx(12, rel=0.05)
    error = (video.clip - clip).abs()
    assert error.mean() < 0.02
    if suffix == ".webp":
        assert error.max() <= 1 / 255 + 1e-6
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_odd_sides_are_padded(tmp_path):
    video = read_video(write_video(tmp_path / "odd.mp4", ramp(4, 33, 47)))
    assert video.clip.shape == (3, 4, 34, 48)


def test_size_frames_start_fps(film):
    square = read_video(film, size=24, frames=5, start=3).clip
    assert square.shape == (3, 5, 24, 24)
    expected = torch.nn.functional.avg_pool2d(ramp(48)[:, 3:8, :, 8:56], 2)
    assert (square - expected).abs().mean() < 0.02
    half = read_video(film, fps=6)
    assert half.fps == 6 and half.clip.shape[1] == 24
    whole = read_video(film).clip
    torch.testing.assert_close(half.clip[:, 0], whole[:, 0], atol=0.01, rtol=0)
    assert read_video(film, fps=24).clip.shape[1] == 96


def test_a_turned_film_is_shown_upright(tmp_path):
    """A phone writes "turn by a quarter, clockwise" into the track's matrix, which lies in the file as nine numbers."""
    data = write_video(tmp_path / "a.mp4", ramp(3)).read_bytes()
    plain = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    turned = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000)
    at = data.rindex(plain)
    (tmp_path / "b.mp4").write_bytes(data[:at] + turned + data[at + len(plain) :])
    upright = read_video(tmp_path / "b.mp4").clip
    assert upright.shape == (3, 3, 64, 48)
    assert (upright - ramp(3).rot90(-1, (-2, -1))).abs().mean() < 0.02


def test_whole_bunny_through_av(tmp_path):
    clip = natural("bunny")[:, :16]
    assert (read_video(write_video(tmp_path / "b.mp4", clip)).clip - clip).abs().mean() < 0.05


def test_truncated_files_say_so(film, tmp_path):
    data = film.read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) // 2])  # its index is at the end, so nothing can be read
    with pytest.raises(VideoError, match="not a video, or is cut off before its index"):
        read_video(tmp_path / "half.mp4")
    matroska = write_video(tmp_path / "whole.mkv", natural("bunny")[:, :32], fps=12)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(matroska.read_bytes()[: matroska.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"truncated or damaged: of its 32 frames, \d+ could be read"):
        read_video(cut)
    assert 3 < read_video(cut, partial=True).clip.shape[1] < 32
    assert read_video(cut, frames=3).clip.shape[1] == 3, "what comes before the damage can be read"


def test_truncated_webp(tmp_path):
    whole = write_video(tmp_path / "a.webp", natural("bunny")[:, :8])
    cut = tmp_path / "b.webp"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(VideoError, match="truncated|damaged"):
        read_video(cut)


def test_files_that_are_no_videos(tmp_path, film):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_video(tmp_path / "nothing.mp4")
    with pytest.raises(VideoError, match="is a folder"):
        read_video(tmp_path)
    wrong = {"text.mp4": b"this is no video\n" * 50, "text.txt": b"hello\n" * 400, "text.gif": b"GIF?" * 99}
    for name, data in wrong.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(VideoError, match="is not a video"):
            read_video(tmp_path / name)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError, match="is empty"):
        read_video(tmp_path / "empty.mp4")
    with pytest.raises(VideoError, match="too short: 20 frames from number 40 .* gives 8"):
        read_video(film, frames=20, start=40)
    with pytest.raises(ValueError, match="size, frames, fps > 0"):
        read_video(film, frames=0)


def test_video_without_frames(tmp_path):
    import av

    with av.open(str(tmp_path / "none.avi"), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        container.start_encoding()
    with pytest.raises(VideoError, match="no frames|is not a video"):
        read_video(tmp_path / "none.avi")


def test_sound_is_not_a_video(tmp_path):
    import av

    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="has no pictures"):
        read_video(tmp_path / "sound.wav")


@pytest.mark.parametrize(
    ("clip", "error", "message"),
    [
        (torch.zeros(3, 4, 8), ValueError, "got shape"),
        (torch.zeros(1, 4, 8, 8), ValueError, "c = 3"),
        (torch.zeros(3, 0, 8, 8), ValueError, "no empty axis"),
        (torch.zeros(3, 4, 8, 8, dtype=torch.uint8), TypeError, "uint8"),
        (torch.full((3, 4, 8, 8), 2.0), ValueError, "from 2 to 2"),
        (torch.full((3, 4, 8, 8), float("nan")), ValueError, "NaN"),
        (np.zeros((3, 4, 8, 8)), TypeError, "ndarray"),
    ],
)
def test_write_refuses_what_is_no_clip(tmp_path, untyped, clip, error, message):
    with pytest.raises(error, match=message):
        write_video(tmp_path / "a.mp4", clip)
    assert not list(tmp_path.iterdir())


def test_write_is_whole_or_nothing(tmp_path, monkeypatch):
    target = write_video(tmp_path / "a.webp", ramp(3))
    before = target.read_bytes()
    monkeypatch.setattr(Image.Image, "save", lambda self, path, **_: (Path(path).write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        write_video(target, ramp(4))
    assert target.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.webp"]


def test_write_refuses_names(tmp_path):
    with pytest.raises(VideoError, match="must end in"):
        write_video(tmp_path / "a.png", ramp(2))
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_video(tmp_path / "x" / "a.mp4", ramp(2))
    with pytest.raises(ValueError, match="fps"):
        write_video(tmp_path / "a.mp4", ramp(2), fps=0)
