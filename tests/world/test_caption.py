"""Captions: the fixed vocabulary, lengths, what is said and what must not be, chunks, events and attribute vectors."""

import hashlib
from collections import Counter

import pytest
import torch

from minivid.world.caption import (
    ATTRIBUTES,
    FIELDS,
    STYLES,
    WORDS,
    attributes,
    caption,
    captions,
    chunk_caption,
    compose,
    event_captions,
    fields,
)  # fmt: skip
from minivid.world.parts import ALL_MOTIONS, COLOURS, SHAPES, SIZES
from minivid.world.scene import RECIPES, VARIABLE, draw, vary


def test_the_vocabulary_is_append_only():
    assert len(WORDS) == len(set(WORDS)) >= 200
    assert all(word.isalpha() and word.islower() for word in WORDS)
    # Trained weights index these words by place. New words may only be added at the end: then this stays as it is.
    assert hashlib.sha256(" ".join(WORDS[:217]).encode()).hexdigest()[:16] == "f1880fd3f877399a"


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_word_of_every_style_is_in_the_vocabulary(recipe):
    known = set(WORDS)
    for i in range(60):
        scene = draw(11, i, recipe, "all")
        texts = [caption(scene, style) for style in STYLES]
        texts += [text for *_, text in captions(scene, 24)] + [text for *_, text in event_captions(scene)]
        for text in texts:
            words = text.split()
            assert words and text == " ".join(words) and len(words) <= 64
            assert known.issuperset(words), sorted(set(words) - known)


def test_lengths_of_short_captions():
    assert max(len(caption(draw(0, i)).split()) for i in range(600)) <= 16
    assert max(len(caption(draw(0, i, "two")).split()) for i in range(200)) <= 16


def parse(phrase):
    """Colour, shape, size and motion of one body's part of a short caption of base."""
    words = phrase.split()
    (colour,) = [word for word in words if word in COLOURS]
    (shape,) = [word for word in words if word in SHAPES]
    before, after = phrase.split(shape)
    size = [word for word in before.split() if word in SIZES]
    return colour, shape, size[0] if size else "medium", after.split()[1]


def test_short_captions_of_base_tell_each_body_unambiguously():
    grounds = 0
    for i in range(400):
        scene = draw(0, i)
        text = caption(scene)
        said, _, ground = text.partition(" on ")
        grounds += bool(ground)
        found = [parse(phrase) for phrase in said.split(" and ")]
        assert found == [(b.colour, b.shape, b.size, b.motion) for b in scene.bodies]
        assert not ground or scene.background.tone in ground.split()
    assert 40 < grounds < 160


def test_styles_say_what_they_are_for():
    for i in range(100):
        scene = draw(0, i, "two")
        body = scene.bodies[0]
        appearance, motion = caption(scene, "appearance").split(), caption(scene, "motion").split()
        assert body.colour in appearance and body.shape in appearance and not {"moves", "stays"} & set(appearance)
        assert not (set(COLOURS) | set(SHAPES)) & set(motion) and body.motion in motion
        assert {b.colour for b in scene.bodies} <= set(caption(scene, "keywords").split())
        partial = caption(scene, "partial").split()
        assert sum(b.colour in partial for b in scene.bodies) == 1
        dense = caption(scene, "dense")
        assert len(dense.split()) > len(caption(scene, "short").split())
        assert all(f"{b.size} {b.colour} {b.shape}" in dense for b in scene.bodies)
        assert scene.background.tone in dense.split()
    assert tuple(fields(scene)) == FIELDS and len(set(fields(scene).values())) == 9


def test_dense_captions_place_the_bodies():
    for i in range(100):
        scene = draw(1, i, "two")
        a, b = (body.legs[0] for body in scene.bodies)
        where = caption(scene, "dense").split(" one is ")[1].split()[2]
        assert {"left": a.x < b.x, "right": a.x > b.x, "top": a.y < b.y, "bottom": a.y > b.y}[where]


def test_scripts_are_told_in_order():
    for i in range(60):
        scene = draw(0, i, "script")
        told = event_captions(scene)
        assert len(told) == len(scene.events)
        assert [start for start, _, _ in told] == sorted(start for start, _, _ in told)
        for (_, _, text), event in zip(told, scene.events, strict=True):
            assert event.kind == "camera" or scene.bodies[event.body].colour in text
            assert event.kind not in ("move", "recolour") or event.word in text.split()
        assert caption(scene, "partial") in {t.replace("the ", "a ", 1) for *_, t in told} | {t for *_, t in told}


def test_chunks_follow_what_happens_in_them():
    scene = draw(0, 3, "recurrent")
    for start, stop, text in captions(scene, scene.period * 2, 4):
        assert stop - start == 4 and text == chunk_caption(scene, start, 4)
        name = [cut.name for cut in scene.cuts if cut.start <= start % scene.period][-1]
        assert {"A": "first", "B": "second", "C": "third"}[name] in text
        assert not (set(COLOURS) | {"striped", "dotted", "checked", "lined", "numbered"}) & set(text.split())
        seen_before = start >= scene.period or (name == "A" and start >= scene.cuts[1].start)
        assert ("back" in text.split()) == seen_before


def test_chunk_directions_turn_with_the_body():
    said = Counter()
    for i in range(40):
        film = draw(0, i, "recurrent")
        shot, body = film.cuts[0].shot, film.cuts[0].shot.bodies[0]
        said[body.motion] += 1
        words = {text.split()[-1] for *_, text in captions(shot, 120)}
        assert {"left": "right", "right": "left", "up": "down", "down": "up"}[body.motion] in words  # it came back
        assert body.motion in words
    assert len(said) == 4


def test_what_the_recurrent_caption_keeps_to_itself():
    for i in range(100):
        assert not set(COLOURS) & set(caption(draw(0, i, "recurrent"), "short").split())
        assert "behind a bar" in caption(draw(0, i, "occluded"))
        assert not {"left", "right", "up", "down"} & set(caption(draw(0, i, "futures")).split())


def test_composed_queries_name_exactly_the_change():
    scene = next(s for s in (draw(0, i) for i in range(100)) if s.bodies[0].motion == "right" and s.bodies[0].colour == "red")
    assert compose(scene, scene) == "the same object as in the image"
    blue = vary(scene, "colour", value="blue")
    assert compose(scene, blue) == "the same object as in the image but blue"
    left = vary(blue, "motion", value="left")
    assert compose(scene, left) == "the same object as in the image but moving left and blue"
    for field in VARIABLE:
        assert set(compose(scene, vary(scene, field)).split()) <= set(WORDS)


def test_attribute_vectors_have_a_meaningful_cosine():
    assert len(ATTRIBUTES) == len(set(ATTRIBUTES))
    scene = draw(0, 4, "two")
    mine = attributes(scene)
    assert mine.shape == (len(ATTRIBUTES),) and mine.norm() == pytest.approx(1)
    near = torch.stack([attributes(vary(scene, field)) @ mine for field in ("colour", "shape", "size", "motion", "tone")])
    far = torch.stack([attributes(draw(0, i, "two")) @ mine for i in range(5, 105)])
    assert near.max() < 0.999 and near.min() > far.mean() + 0.2
    assert (attributes(vary(scene, "place")) @ mine).item() == pytest.approx(1)
    swapped = vary(vary(scene, "colour", 0, 0, scene.bodies[1].colour), "colour", 0, 1, scene.bodies[0].colour)
    assert attributes(swapped) @ mine < 0.95  # the same words, bound the other way round


def test_clear_errors_and_fixed_names():
    with pytest.raises(ValueError, match="Unknown caption style 'poem'.*short"):
        caption(draw(0), "poem")
    assert set(ALL_MOTIONS) & set(WORDS) >= {"left", "right", "up", "down", "still"}
