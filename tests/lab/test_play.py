"""Widgets: every knob through its whole range, no drawing twice, and stills for readers without a kernel."""

import io
from datetime import UTC, datetime

import ipywidgets as W
import numpy as np
import pytest
import torch
from PIL import Image

from minivid.lab import maps, play, show
from minivid.lab.play import Choice, FloatRange, IntRange, Toggle
from minivid.world import files

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def make(calls, **more):
    def render(bits, gain, colour, mirror):
        calls.append((bits, gain, colour, mirror))
        x = torch.full((3, 4, 32, 32), -1.0 + bits / 8)
        return show.clip(x, f"{bits} bits, gain {gain:g}, {colour}, {mirror}")

    settled = [{"bits": b, "gain": 1.0, "colour": "red", "mirror": False} for b in (2, 4, 8)]
    knobs = {"bits": IntRange(2, 8, 4), "gain": FloatRange(0, 2, 1.0, 0.5), "colour": Choice(["red", "blue"])}
    return play.knobs(render, **({"settled": settled, "mirror": Toggle()} | knobs | more))


def drive(display):
    """Set every control to its least and greatest value and every option, as a reader might."""
    for control in display.widget.children:
        if isinstance(control, (W.IntSlider, W.FloatSlider)):
            control.value = control.min
            control.value = control.max
        elif isinstance(control, W.Dropdown):
            for _, option in control.options:
                control.value = option
        elif isinstance(control, W.Checkbox):
            control.value = not control.value


def image_of(display):
    return next(child for child in display.widget.children if isinstance(child, W.Image))


def caption_of(display):
    return next(child for child in display.widget.children if isinstance(child, W.Label)).value


def test_every_knob_moves_the_picture_and_nothing_is_drawn_twice():
    calls = []
    display = make(calls)
    drive(display)
    assert caption_of(display).startswith("8 bits, gain 2, blue, True")
    assert len(calls) == len(set(calls))
    bits = next(child for child in display.widget.children if isinstance(child, W.IntSlider))
    before = image_of(display).value
    bits.value = 2
    assert image_of(display).value != before and bytes(image_of(display).value).startswith(b"\x89PNG")
    drawn = len(calls)
    drive(display)
    bits.value = 2
    assert len(calls) <= drawn + 12 and len(calls) == len(set(calls))


def test_a_click_into_the_picture_turns_the_knobs_and_draws_once():
    calls = []

    def render(layer, head, noise):
        calls.append((layer, head, noise))
        few, kinds = torch.rand(2, 3, 8, 8).softmax(-1), [["full"] * 3] * 2
        return maps.board(few, kinds, {"full": "sky"}, f"layer {layer}, head {head}", chosen=(layer, head))

    settled = [{"layer": 0, "head": h, "noise": 1} for h in range(3)]
    display = play.knobs(render, settled=settled, layer=IntRange(0, 1, 0), head=IntRange(0, 2, 0), noise=IntRange(1, 2, 1))
    layer, head, noise, image, caption = display.widget.children
    picture, before, drawn = render(0, 0, 1), bytes(image.value), len(calls)
    for box, what in picture.places.items():
        middle = (box[0] + box[2]) / 2 / picture.width, (box[1] + box[3]) * play.DENSITY / 2 / picture.image.height
        image.place = list(middle)
        assert {"layer": layer.value, "head": head.value} == what
        assert caption.value.startswith(f"layer {layer.value}, head {head.value}")
    assert len(picture.places) == 6 and len(calls) - drawn == 3  # three heads were in the stills
    assert bytes(image.value) != before and noise.value == 1
    image.place = [0.0, 0.0]  # beside all heads: nothing
    assert (layer.value, head.value) == (1, 2)


def test_the_image_has_a_fixed_width_and_the_stills_stand_below():
    display = make([])
    assert image_of(display).layout.width.endswith("px")
    assert "bits = 2" in display.still.alt and "bits = 8" in display.still.alt
    assert Image.open(io.BytesIO(display.still.png)).size[0] <= 2 * 850


def test_what_a_notebook_stores(monkeypatch):
    published = []
    monkeypatch.setattr("IPython.display.display", lambda *things, **how: published.append((things, how)))
    display = make([])
    display._ipython_display_()
    ((live,), raw), ((still,), _) = published
    assert raw == {"raw": True} and "application/vnd.jupyter.widget-view+json" in live
    assert live["text/plain"] == repr(display) == "knobs mirror, bits, gain, colour"
    assert still is display.still


@pytest.mark.parametrize(
    "more, message",
    [
        ({"settled": []}, "three dicts"),
        ({"settled": [{"bits": 2}] * 3}, "three dicts"),
        ({"settled": [{"bits": 9, "gain": 1.0, "colour": "red", "mirror": False}] * 3}, "settled bits=9"),
        ({"settled": [{"bits": 2, "gain": 1.0, "colour": "pink", "mirror": False}] * 3}, "settled colour='pink'"),
        ({"size": IntRange(1, 2, 1)}, "parameter of render"),
    ],
)
def test_knobs_that_do_not_fit_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        make([], **more)


def test_a_failing_render_is_not_hidden():
    def render(a):
        if a == 3:
            raise RuntimeError("boom")
        return show.clip(torch.zeros(3, 2, 8, 8))

    display = play.knobs(render, a=IntRange(0, 3, 0), settled=[{"a": 0}] * 3)
    with pytest.raises(RuntimeError, match="boom"):
        drive(display)


def test_upload_shows_a_video_and_answers_a_wrong_file_with_a_sentence(tmp_path):

    x = torch.zeros(3, 6, 32, 32)
    x[0] = 0.8
    files.write_video(tmp_path / "x.mp4", x, fps=8)
    seen = []

    def render(clip):
        seen.append(clip)
        return show.clip(clip, "yours" if len(seen) > 1 else "ours")

    display = play.upload(render, torch.zeros(3, 6, 16, 16), size=16, frames=5)
    button, _ = display.widget.children
    assert repr(display) == "upload a video" and display.still.alt.startswith("ours")

    def give(data):
        button.value = ({"name": "x", "type": "video/mp4", "size": len(data), "content": memoryview(data), "last_modified": NOW},)

    for bad in (b"no video at all", b"", (tmp_path / "x.mp4").read_bytes()[:200]):
        give(bad)
        assert caption_of(display).startswith("This file could not be used: x ")
        assert len(display.widget.children) == 2, "no picture for what is no video"
    give((tmp_path / "x.mp4").read_bytes())
    _, image, _ = display.widget.children
    assert seen[-1].shape == (3, 5, 16, 16) and caption_of(display).startswith("yours") and image.value[:4] == b"\x89PNG"


def test_attention_map_starts_in_the_middle_and_has_a_still():
    weights = torch.eye(2 * 3 * 4)
    display = play.attention(weights, 2, 3, 4)
    assert display.widget.query == (1 * 3 + 1) * 4 + 2 and display.widget.grid == [2, 3, 4]
    assert np.array_equal(np.frombuffer(display.widget.weights, np.float32).reshape(24, 24), np.eye(24))
    assert repr(display.still) == "attention 1x24x24"
    with pytest.raises(ValueError, match="2 x 3 x 5 tokens"):
        play.attention(weights, 2, 3, 5)


def test_a_long_page_of_stills_is_stored_in_few_colours():
    noise = torch.rand(3, 4, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    many = play._beside([(f"number {i}", show.clips([noise] * 5)) for i in range(3)], "x")
    few = play._beside([("one", show.strip(noise, frames=2))], "x")
    assert len(many.image.getcolors()) <= 128
    assert Image.open(io.BytesIO(many.png)).mode == "P" and Image.open(io.BytesIO(few.png)).mode == "RGB"
    assert Image.open(io.BytesIO(many.png)).size == many.image.size and many.width == many.image.width // 2
