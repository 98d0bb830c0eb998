"""Scenes: pure functions of the seed, held-out combinations, one attribute at a time, and each recipe's own promise."""

from collections import Counter
from dataclasses import FrozenInstanceError, fields, replace
from itertools import islice, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivid.world.films import SCRIPT_FRAMES
from minivid.world.parts import COLOURS, EXTENT, MOTIONS, SHAPES, SIZES, TONES, Body, held_out, states
from minivid.world.physics import hit
from minivid.world.recipes import SPEEDS
from minivid.world.scene import RECIPES, VARIABLE, draw, stream, vary
from minivid.world.truth import truth

ALL = sorted(RECIPES)


def path(body, frames, step=1.0):
    """Exact places of one body, (frames, 2)."""
    state = states([body], np.arange(0, frames, step)[None])
    return np.stack([state.x[0], state.y[0]], -1)


def all_bodies(scene):
    return [body for cut in scene.cuts for body in cut.shot.bodies] or list(scene.bodies)


@pytest.mark.parametrize("recipe", ALL)
def test_drawing_is_a_pure_function_of_the_seed(recipe):
    forward = [draw(3, i, recipe) for i in range(6)]
    assert [draw(3, i, recipe) for i in reversed(range(6))] == forward[::-1]
    assert list(islice(stream(3, recipe), 6)) == forward
    assert forward[0] != draw(4, 0, recipe)
    assert len({hash(scene) for scene in forward}) == 6
    with pytest.raises(FrozenInstanceError):
        forward[0].told = True


def test_splits_of_one_seed_are_different_draws():
    assert len({draw(0, 0, split=split).bodies for split in ("train", "held-out", "all")}) == 3


def test_held_out_combinations_are_balanced():
    combos = [c for c in product(COLOURS, SHAPES, MOTIONS) if held_out(*c)]
    assert len(combos) == 12
    counts = [Counter(c[i] for c in combos) for i in range(3)]
    assert counts[0] == dict.fromkeys(COLOURS, 2) and counts[1] == dict.fromkeys(SHAPES, 3)
    assert counts[2] == dict.fromkeys(MOTIONS[:4], 3)
    for i, j in ((0, 1), (0, 2), (1, 2)):  # no pair of attributes is missing from training
        assert max(Counter((c[i], c[j]) for c in combos).values()) == 1


@pytest.mark.parametrize("recipe", ALL)
def test_splits_keep_their_promise(recipe):
    for i in range(30):
        for body in all_bodies(draw(1, i, recipe, "train")):
            assert not held_out(body.colour, body.shape, body.motion)
        first = draw(1, i, recipe, "held-out").bodies[0]
        assert held_out(first.colour, first.shape, first.motion)


def test_train_scripts_never_show_a_held_out_move():
    for i in range(150):
        scene = draw(0, i, "script")
        colours = [body.colour for body in scene.bodies]
        for event in scene.events:
            if event.kind == "recolour":
                colours[event.body] = event.word
            if event.kind == "move":
                assert not held_out(colours[event.body], scene.bodies[event.body].shape, event.word)


def test_base_has_the_announced_shares():
    scenes = [draw(0, i) for i in range(600)]
    share = np.mean([len(scene.bodies) == 1 for scene in scenes])
    still = np.mean([body.motion == "still" for scene in scenes for body in scene.bodies])
    assert abs(share - 0.6) < 0.06 and abs(still - 0.1) < 0.04
    colours = Counter(scene.bodies[0].colour for scene in scenes)
    assert set(colours) == set(COLOURS) and min(colours.values()) > 50
    assert {scene.background.tone for scene in scenes} == set(TONES)
    speeds = [body.speed for scene in scenes for body in scene.bodies if body.motion != "still"]
    assert 0.0119 < min(speeds) and max(speeds) < 0.0281


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.sampled_from(["base", "two", "many", "textured"]))
@settings(max_examples=60, deadline=None)
def test_simple_bodies_stay_in_view_and_apart(seed, index, recipe):
    scene = draw(seed, index, recipe, "all")
    paths = [path(body, 17) for body in scene.bodies]
    for body, places in zip(scene.bodies, paths, strict=True):
        assert places.min() > body.reach and places.max() < 1 - body.reach
    assert len({body.colour for body in scene.bodies}) == len(scene.bodies)
    for i, j in product(range(len(paths)), repeat=2):
        if i < j:
            gap = np.hypot(*(paths[i] - paths[j]).T)
            assert gap.min() > scene.bodies[i].reach + scene.bodies[j].reach


def test_many_counts_to_four():
    assert [len(draw(0, i, "many").bodies) for i in range(8)] == [1, 2, 3, 4] * 2


# --- vary -----------------------------------------------------------------------------------------------------------


def differing(a, b):
    """Names of the attributes in which two scenes differ, as the captions and the eye would count them."""
    out = set()
    for name in ("seed", "recipe", "events", "physics", "occluder", "cuts", "period", "told", "camera", "light"):
        out |= {name} if getattr(a, name) != getattr(b, name) else set()
    ground_a, ground_b = a.background, b.background
    out |= (
        {"tone"}
        if (ground_a.tone, ground_a.first, ground_a.second) != (ground_b.tone, ground_b.first, ground_b.second)
        else set()
    )
    out |= {"ground"} if ground_a.texture != ground_b.texture else set()
    assert len(a.bodies) == len(b.bodies)
    for one, two in zip(a.bodies, b.bodies, strict=True):
        out |= {n for n in ("shape", "texture") if getattr(one, n) != getattr(two, n)}
        groups = {
            "colour": ("red", "green", "blue"), "size": ("radius",), "place": ("x", "y"), "way": ("vx", "vy"),
            "rest": ("start", "ax", "ay", "grow", "angle", "spin", "shown", "walls", "orbit", "omega", "phase"),
        }  # fmt: skip
        for group, names in groups.items():
            changed = any(getattr(p, n) != getattr(q, n) for p, q in zip(one.legs, two.legs, strict=True) for n in names)
            if group == "way" and changed:
                group = "motion" if one.motion != two.motion else "speed"
            out |= {group} if changed else set()
        for name in ("colour", "size", "motion"):
            assert (getattr(one, name) != getattr(two, name)) <= (name in out)
    return out


@given(st.integers(0, 10_000), st.sampled_from(VARIABLE))
@settings(max_examples=100, deadline=None)
def test_vary_changes_exactly_one_attribute(index, field):
    scene = draw(5, index, "base")
    if field == "speed" and scene.bodies[0].motion == "still":
        scene = vary(scene, "motion", 0, value="left")
    other = vary(scene, field, seed=index)
    assert differing(scene, other) == {field}
    assert other == vary(scene, field, seed=index)
    assert other.bodies[1:] == scene.bodies[1:]


def test_vary_takes_a_value_and_another_body():
    scene = next(s for s in stream(0, "two") if s.bodies[1].motion == "up")
    left = vary(scene, "motion", index=1, value="left")
    assert left.bodies[1].motion == "left" and left.bodies[0] == scene.bodies[0]
    assert left.bodies[1].legs[0].vx == pytest.approx(-scene.bodies[1].speed)
    assert (path(left.bodies[1], 1) == path(scene.bodies[1], 1)).all()
    assert vary(scene, "colour", value="cyan").bodies[0].colour == "cyan"


def test_clear_errors():
    scene = draw(0)
    with pytest.raises(ValueError, match="Unknown recipe 'dance'.*base"):
        draw(0, 0, "dance")
    with pytest.raises(ValueError, match="Unknown split 'test'.*held-out"):
        draw(0, 0, split="test")
    with pytest.raises(ValueError, match=">= 0"):
        draw(-1)
    with pytest.raises(ValueError, match="Unknown field 'mood'.*colour"):
        vary(scene, "mood")
    with pytest.raises(ValueError, match="Unknown colour 'pink'.*red"):
        vary(scene, "colour", value="pink")
    with pytest.raises(ValueError, match="body number below"):
        vary(scene, "colour", index=7)
    with pytest.raises(ValueError, match="cuts"):
        vary(draw(0, 0, "cuts"), "colour")
    with pytest.raises(ValueError, match="can't be varied"):
        vary(draw(0, 0, "gravity"), "motion")
    with pytest.raises(ValueError, match="straight mover"):
        vary(draw(0, 0, "futures"), "speed")
    with pytest.raises(ValueError, match="no name"):
        vary(scene, "place", value="left")


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_occluded_bodies_vanish_completely_for_8_to_12_frames():
    """Counted on the pixels: the longest run of frames in which less than a pixel of 96 x 96 can be seen of it."""
    shapes = set()
    for i in range(24):
        scene = draw(0, i, "occluded")
        shapes.add(scene.bodies[0].shape)
        seen = truth(scene, 96, 60).visible[0].sum((-1, -2)) > 1
        first = int((~seen).float().argmax())
        gone = int(seen[first:].float().argmax())
        assert seen[:first].sum() >= 4 and 8 <= gone <= 13, (i, scene.bodies[0].shape, gone)
    assert len(shapes) == 4


def test_gravity_bodies_fall_by_g_and_bounce_by_e():
    for i in range(20):
        scene = draw(0, i, "gravity")
        body, laws = scene.bodies[0], scene.physics
        for old, new, event in zip(body.legs, body.legs[1:], scene.events, strict=False):
            assert new.start == event.start
            s = new.start - old.start
            speed = np.array([old.vx, old.vy + old.ay * s])
            if event.word == "wall":
                continue
            assert event.word == "floor" and speed[1] > 0
            assert new.vy == pytest.approx(-laws.restitution * speed[1]) or (new.vy == 0 and new.ay == 0)
        places = path(body, 100, 0.1)
        deep = EXTENT[body.shape][2] * body.radius
        assert places[:, 1].max() <= 1 - deep + 1e-9
        free = np.diff(path(body, int(scene.events[0].start), 1.0)[:, 1], 2)
        assert np.allclose(free, laws.gravity, atol=1e-9)


def test_collisions_keep_momentum_and_energy_and_never_penetrate():
    for i in range(0, 30):
        scene = draw(0, i, "collide")
        touch = [event.start for event in scene.events if event.word == "other" and event.start < 16]
        assert bool(touch) == (i % 2 == 0)
        a, b = (path(body, 60, 0.25) for body in scene.bodies)
        least = 2 * EXTENT["circle"][0] * SIZES["small"]
        assert np.hypot(*(a - b).T).min() > least - 1e-9
        if not touch:
            continue
        at = np.array([[touch[0] - 1e-6, touch[0] + 1e-6]] * 2)
        state = states(scene.bodies, at)
        speed = np.stack([state.vx, state.vy], -1)  # bodies x (before, after) x 2
        assert np.allclose(speed[:, 0].sum(0), speed[:, 1].sum(0))
        assert np.allclose((speed[:, 0] ** 2).sum(), (speed[:, 1] ** 2).sum())
        gap = np.hypot(state.x[0] - state.x[1], state.y[0] - state.y[1])
        assert np.allclose(gap, least, atol=1e-5)


@given(st.floats(0.15, 0.85), st.floats(-0.05, 0.05), st.floats(0.001, 0.01))
@settings(max_examples=80, deadline=None)
def test_hit_is_the_first_crossing(p, v, a):
    time = hit(p, v, a, 0.1, 0.9)
    s = np.linspace(0, 200, 40_001)
    outside = (p + v * s + 0.5 * a * s * s > 0.9) | (p + v * s + 0.5 * a * s * s < 0.1)
    assert abs(s[outside.argmax()] - time) < 1e-2 or abs(min(p + v * s + 0.5 * a * s * s) - 0.1) < 1e-6


def test_futures_branch_at_every_wall():
    turned = []
    for i in range(30):
        body = draw(0, i, "futures").bodies[0]
        places = path(body, 400, 0.5)
        assert places.min() > 0 and places.max() < 1
        assert len(body.legs) > 5
        turned += [np.hypot(leg.vx, leg.vy) for leg in body.legs[1:]]
    assert np.std(turned) > 0.004  # the new speed is random too


def test_bridges_share_both_ends_and_nothing_between():
    scenes = [draw(7, i, "bridge") for i in range(40)]
    paths = np.stack([path(scene.bodies[0], 18) for scene in scenes])
    assert np.abs(paths[:, 0] - paths[0, 0]).max() < 1e-12 and np.abs(paths[:, 15:] - paths[0, 15]).max() < 1e-9
    assert paths[:, 7].std(0).min() > 0.03
    assert len({(s.bodies[0].colour, s.bodies[0].shape, s.background) for s in scenes}) == 1
    fine = path(scenes[0].bodies[0], 15, 0.01)
    assert np.abs(np.diff(fine, 2, axis=0)).max() < 1e-4  # no kink, where the parabolas meet


def test_speed_ladder_has_its_rungs():
    rungs = [draw(0, i, "speed").camera for i in range(6)]
    assert [np.hypot(lens.vx, lens.vy) * 32 for lens in rungs] == pytest.approx(SPEEDS)


def test_scripts_have_2_to_12_events_in_order_and_in_view():
    counts = Counter()
    for i in range(150):
        scene = draw(0, i, "script")
        counts[len(scene.events)] += 1
        starts = [event.start for event in scene.events]
        assert starts == sorted(starts) and len(set(starts)) == len(starts)
        assert all(event.start <= event.stop <= SCRIPT_FRAMES for event in scene.events)
        for body in scene.bodies:
            assert 0 < path(body, SCRIPT_FRAMES).min() and path(body, SCRIPT_FRAMES).max() < 1
            assert [leg.start for leg in body.legs] == sorted(leg.start for leg in body.legs)
    assert set(counts) == set(range(2, 13))


def test_recurrent_films_return_to_a_and_look_alikes_differ_once():
    for i in range(30):
        film = draw(0, i, "recurrent")
        assert [cut.name for cut in film.cuts] == list("ABAC")
        assert film.cuts[0].shot is film.cuts[2].shot or film.cuts[0].shot == film.cuts[2].shot
        edges = [cut.start for cut in film.cuts] + [film.period]
        assert all(a % 4 == 0 and 8 <= b - a <= 16 for a, b in zip(edges, edges[1:], strict=False))
        if i % 2:
            a, c = film.cuts[0].shot, film.cuts[3].shot
            body_a, body_c = a.bodies[0], c.bodies[0]
            same_look = replace(body_c, colour=body_a.colour, legs=body_a.legs) == body_a
            changes = [a.background != c.background, body_a.texture != body_c.texture, body_a.colour != body_c.colour]
            assert sum(changes) == 1 and (same_look or changes[1])


def test_bodies_are_plain_records():
    assert {field.name for field in fields(Body)} == {"colour", "shape", "size", "motion", "legs", "texture"}
