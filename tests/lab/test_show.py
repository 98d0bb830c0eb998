"""Pictures: what a reader without a kernel gets, what is refused, and that nothing moves by itself."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from minivid.lab import canvas, claims, papers, plots, show


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def ball(frames=16, side=32):
    x = torch.full((3, frames, side, side), -0.5)
    for t in range(frames):
        x[0, t, 10:18, t : t + 8] = 1.0
    return x


CLAIM = {
    "slug": "toy",
    "verdict": "partly",
    "arms": {"a": {"values": {"m": [1.0, 2.0]}}, "b": {"values": {"m": [3.0, 4.0]}}},
    "tests": [
        {"kind": "compare", "claim": "more", "metric": "m", "method": "b", "baseline": "a", "counts": True,
         "margin": 1.0, "verdict": "holds", "difference": {"mean": 2.0, "low": 1.0, "high": 3.0}},
        {"kind": "floor", "claim": "floor", "metric": "m", "arm": "a", "at_least": 2, "at_most": None, "counts": False,
         "margin": 2, "verdict": "not reproduced"},
    ],
}  # fmt: skip

PICTURES = {
    "clip 3x16x32x32": lambda: show.clip(ball(), "a red square moves right"),
    "clip 1x17x64x64": lambda: show.clip(rand(1, 17, 64, 64) * 2 - 1),
    "strip 3x16x32x32": lambda: show.strip(ball(), "still"),
    "2 clips: 3x16x32x32, 3x16x32x32": lambda: show.clips([ball(), ball() * 0.9], ["a", "b"], "two", difference=True),
    "2 clips: 3x8x32x32, 3x16x64x64": lambda: show.clips([ball(8), ball(16, 64)]),
    "latent 10x5x8x8": lambda: show.latent(rand(10, 5, 8, 8) * 4 - 2, "latent"),
    "mask 16x32x32": lambda: show.mask(ball()[0] > 0, ball(), "mask"),
    "mask 4x16x16": lambda: show.mask(rand(4, 16, 16)),
    "codebook 64x16": lambda: show.codebook(rand(64, 16), rand(64) > 0.5),
    "codebook 8x1": lambda: show.codebook(rand(8, 1)),
    "codebook 32x3x4x4": lambda: show.codebook(rand(32, 3, 4, 4), rand(32).round(), "patches"),
    "attention 1x80x80": lambda: show.attention(rand(80, 80), 5, "one"),
    "attention 6x24x24": lambda: show.attention(rand(6, 24, 24), caption="six"),
    "attention 1x1200x1200": lambda: show.attention(torch.eye(1200), 10),
    "bars 3": lambda: show.bars({"a": 1, "b": [2, 2.5, 3], "c": 0}, "size (bytes)", "bars"),
    "lines 7": lambda: show.lines({f"s{i}": ([1, 10, 100], [i, 1 + i, 2]) for i in range(7)}, "x", "y", log="x"),
    "claim toy: partly": lambda: show.claim(CLAIM),
}


class Tags(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("text", PICTURES)
def test_every_picture_displays_itself(text):
    picture = PICTURES[text]()
    assert repr(picture) == text
    data = picture._repr_mimebundle_()
    assert data["text/plain"] == text and data.keys() == {"text/plain", "text/html"}, "pixels are stored once"
    shown = Tags(data["text/html"]).found[0][1]
    still = Image.open(io.BytesIO(base64.b64decode(shown["src"].removeprefix("data:image/png;base64,"))))
    assert still.size[0] == canvas.DENSITY * int(shown["width"]) == canvas.DENSITY * picture.width
    assert still.size[0] <= canvas.DENSITY * 830, "wider than a notebook's page, so a browser would shrink and blur it"
    tags = Tags(data["text/html"]).found
    assert {tag for tag, _ in tags} <= {"img", "details", "summary"}
    for tag, attributes in tags:
        assert attributes.keys() <= {"src", "width", "alt"}, "anything else is cut out where a notebook is not trusted"
        assert tag != "img" or (attributes["alt"] and attributes["src"].startswith("data:image/"))
    assert PICTURES[text]().png == picture.png and PICTURES[text]().webp == picture.webp


def test_a_film_starts_folded_and_holds_every_frame():
    picture = show.clip(ball(), fps=4)
    tags = [tag for tag, _ in Tags(picture._html()).found]
    assert tags == ["img", "details", "summary", "img"]
    film = Image.open(io.BytesIO(picture.webp))
    assert film.n_frames == 16 and film.size == (192, 192)
    film.seek(5)
    frame = np.asarray(film.convert("RGB"))[3::6, 3::6]
    assert np.array_equal(frame, canvas.clip_bytes(ball())[5]), "the film must show the clip's own pixels"
    assert show.strip(ball()).webp == b"" == show.clip(ball(1)).webp


def test_a_strip_can_say_what_stands_under_its_frames():
    names = ["t = 0", "t = 0.5", "t = 1"]
    named = show.strip(ball(3), "on the way", labels=names)
    assert named.png != show.strip(ball(3), "on the way").png and all(name in named.alt for name in names)
    with pytest.raises(ValueError, match="shows 3 frames and needs as many labels, got 2"):
        show.strip(ball(3), labels=names[:2])


def test_the_still_shows_the_clips_own_pixels_enlarged_by_a_whole_number():
    picture = show.clip(ball())
    page, pixels = np.asarray(picture.image), canvas.clip_bytes(ball())
    tile = page[6 * 2 : 6 * 2 + 192, 4 * 2 : 4 * 2 + 192]
    assert np.array_equal(tile[3::6, 3::6], pixels[0]) and np.array_equal(tile[::6, ::6], pixels[0])


def test_only_the_encoded_pixels_depend_on_the_pixels():
    """Notebooks are compared as text with everything after ';base64,' cut out; the rest must be the same anywhere."""
    a, b = show.clip(ball(), "a")._html(), show.clip(ball() * 0.9, "a")._html()
    assert a != b and re.sub(";base64,[A-Za-z0-9+/=]+", "", a) == re.sub(";base64,[A-Za-z0-9+/=]+", "", b)


def test_frames_are_picked_evenly_with_both_ends():
    assert canvas.pick(5, 8) == [0, 1, 2, 3, 4]
    assert canvas.pick(64, 8) == [0, 9, 18, 27, 36, 45, 54, 63]


def test_colour_maps_say_what_they_should():
    blue, white, orange = canvas.signed(np.array([-1.0, 0.0, 1.0]), 2.0)
    assert blue[2] > 150 > blue[0] and white.min() > 240 and orange[0] > 150 > orange[2]
    dark, bright = canvas.magnitude(np.array([0.0, 5.0]), 5.0)
    assert dark.sum() < 200 < 400 < bright.sum()
    assert "d62728" not in "".join(canvas.PALETTE.values()).lower()


def test_save(tmp_path):
    picture = show.clip(ball())
    picture.save(tmp_path / "a.png"), picture.save(tmp_path / "a.webp")
    assert (tmp_path / "a.png").read_bytes() == picture.png and (tmp_path / "a.webp").read_bytes() == picture.webp
    with pytest.raises(ValueError, match=r"saved as .png"):
        picture.save(tmp_path / "a.gif")
    with pytest.raises(ValueError, match="film, if it has one"):
        show.strip(ball()).save(tmp_path / "a.webp")


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: show.clip("x"), TypeError, "clip"),
        (lambda: show.clip(torch.zeros(2, 3, 4, 8, 8)), ValueError, r"batch of shape \(2, 3, 4, 8, 8\).*clips\(list"),
        (lambda: show.clip(torch.zeros(3, 8, 8)), ValueError, "axes 'c f h w'"),
        (lambda: show.clip(torch.zeros(16, 3, 8, 8)), ValueError, "1 or 3 channels first"),
        (lambda: show.clip(torch.zeros(3, 0, 8, 8)), ValueError, "axes"),
        (lambda: show.clip(torch.full((3, 1, 8, 8), 200.0)), ValueError, r"must lie in \[-1, 1\], got 200 to 200"),
        (lambda: show.clip(torch.full((3, 1, 8, 8), float("nan"))), ValueError, "NaN or infinite values in 192 of 192"),
        (lambda: show.clips([]), ValueError, "at least one clip"),
        (lambda: show.clips([ball()], ["a", "b"]), ValueError, "as many titles"),
        (lambda: show.clips([ball(), ball(8)], difference=True), ValueError, "two clips of one shape"),
        (lambda: show.mask(rand(4, 8, 8) + 1), ValueError, r"\[0, 1\]"),
        (lambda: show.mask(rand(4, 8, 8), ball()), ValueError, "must agree"),
        (lambda: show.attention(rand(3, 4)), ValueError, "square maps"),
        (lambda: show.attention(rand(9, 9), 2), ValueError, "divides by frames"),
        (lambda: show.codebook(rand(4, 2), rand(5)), ValueError, "4 codes, but there are 5"),
        (lambda: show.bars({"a": float("nan")}, "x"), ValueError, "in: a"),
        (lambda: show.bars({}, "x"), ValueError, "empty dict"),
    ],
)
def test_wrong_input_is_refused_in_a_sentence(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_small_overshoot_of_a_decoder_is_clamped():
    show.clip(ball() * 1.04)


def test_source_is_the_code_itself():
    shown = show.source(show.source, show.strip)
    assert repr(shown).startswith("def source(") and "\n\n\n" not in repr(shown).split("def strip")[0].strip()
    assert shown._repr_mimebundle_()["text/markdown"] == f"```python\n{shown}\n```"


def test_a_logarithmic_axis_is_marked_where_it_can_be_read():
    from minivid.lab.plots import _marks

    assert _marks([64, 256, 1024]) == [64, 256, 1024]
    assert _marks([0.18 * 1.3**i for i in range(12)]) == pytest.approx([0.2, 0.5, 1, 2])


def test_a_verdict_names_every_test_that_counts_and_where_the_paper_differs():
    said, result = show.verdict("simvq").data, claims.read("simvq")
    counting = [test["claim"] for test in result["tests"] if test["counts"]]
    assert counting and all(f"| {claim} | " in said for claim in counting)
    assert said.startswith(f"**{result['verdict']}**") and claims.outcome("simvq") in said
    assert said.endswith(papers.find("simvq").card().differs)


def test_twelve_lines_look_different():
    looks = [plots._look(i) for i in range(12)]
    assert len({look["color"] for look in looks[:6]}) == 6 and len({str(sorted(look.items(), key=str)) for look in looks}) == 12


def test_names_of_lines_stay_in_the_picture():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    series = {f"s{i}": ([0, 1], [0.0, 1.0 + 0.001 * i]) for i in range(9)}
    for xs, ys in series.values():
        ax.plot(xs, ys)
    plots._name_ends(ax, series)
    heights = sorted(text.xy[1] for text in ax.texts)
    assert len(heights) == 9 and heights[-1] <= 1.0 and min(b - a for a, b in zip(heights, heights[1:], strict=False)) > 0.079


def test_a_long_title_is_not_cut_off():
    def at_the_edge(title):
        pixels = np.asarray(plots.figure(lambda ax: ax.set_title(title), (3.0, 2.0), "a title", "Axes.").image.convert("L"))
        return (pixels[:, -3:] < 250).any()

    assert not at_the_edge("a title of many words, " * 3)
    assert at_the_edge("a_title_of_one_word_" * 3)  # the test can see what is cut off
