"""Pixels against the truth: centres, masks, flow, tracks, plates, chunks, light and textures."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import grid_sample

from minivid.world.parts import COLOURS, SHAPES, TEXTURES, Background, Body, Camera, Leg, Scene, Texture
from minivid.world.render import batch, render
from minivid.world.scene import RECIPES, draw, vary
from minivid.world.truth import truth

ALL = sorted(RECIPES)


def lone(shape="circle", x=0.5, y=0.5, radius=0.16, **leg):
    """A white body of one leg on black ground."""
    body = Body("red", shape, "medium", "still", (Leg(x=x, y=y, radius=radius, **leg),))
    return Scene((0, 0), "base", (body,), Background("dark", Texture(), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)))


def warp(clip, flow):
    """Bilinear look-up of c f h w frames at pixel + flow (2 f h w)."""
    _, f, h, w = clip.shape
    rows, columns = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    grid = torch.stack([(columns + flow[0]) * 2 / w - 1, (rows + flow[1]) * 2 / h - 1], -1)
    return grid_sample(clip.transpose(0, 1), grid, align_corners=False, padding_mode="border").transpose(0, 1)


@pytest.mark.parametrize("recipe", ALL)
@pytest.mark.parametrize("size", [16, 32])
def test_shape_range_and_batch(recipe, size):
    scenes = [draw(2, i, recipe) for i in range(5)]
    clips = batch(scenes, size, frames=5, start=3)
    assert clips.shape == (5, 3, 5, size, size) and clips.dtype == torch.float32 and clips.is_contiguous()
    assert clips.min() >= -1 and clips.max() <= 1
    for i, scene in enumerate(scenes):  # no clip depends on its neighbours in the batch
        assert torch.allclose(clips[i], render(scene, size, 5, 3), atol=1e-6)


@pytest.mark.parametrize("recipe", ALL)
def test_chunks_equal_the_slice_of_the_film(recipe):
    scene = draw(1, 1, recipe)
    film = render(scene, 32, 120)
    for start, frames in ((0, 1), (7, 17), (100, 4), (119, 1)):
        assert torch.allclose(film[:, start : start + frames], render(scene, 32, frames, start), atol=1e-6)
    mixed = batch([scene, scene], 32, 4, start=[100, 3])
    assert torch.allclose(mixed[0], film[:, 100:104], atol=1e-6) and torch.allclose(mixed[1], film[:, 3:7], atol=1e-6)


def test_far_away_frames_cost_nothing_and_still_move():
    scene = draw(0, 0, "recurrent")
    late = render(scene, 32, 8, start=1_000_000)
    assert torch.isfinite(late).all() and (late[:, 1:] - late[:, :-1]).abs().max() > 0.1


@given(
    st.sampled_from(SHAPES), st.floats(0.3, 0.7), st.floats(0.3, 0.7), st.sampled_from([0.13, 0.17, 0.22]),
    st.sampled_from([0.0, 0.4, 2.0]), st.sampled_from([32, 64]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_the_drawn_body_is_where_it_should_be(shape, x, y, radius, angle, size):
    light = (render(lone(shape, x, y, radius, angle=angle), size, 1)[0, 0] + 1) / 2
    spot = torch.arange(size) + 0.5
    centre = torch.stack([(light * spot).sum(), (light * spot[:, None]).sum()]) / light.sum()
    assert (centre / size * 32 - torch.tensor([x, y]) * 32).norm() < 0.15  # px at 32
    area = {
        "circle": np.pi * 0.93**2,
        "square": 4 * 0.9**2,
        "triangle": 0.75 * 3**0.5 * 1.25**2,
        "star": 5 * 1.22 * 0.56 * np.sin(np.pi / 5),
    }
    assert float(light.sum()) / size**2 == pytest.approx(area[shape] * radius**2, rel=0.05)


def test_shapes_are_told_apart_by_their_pixels():
    masks = torch.stack([render(lone(shape, radius=0.13), 32, 1)[0, 0] for shape in SHAPES])
    for i in range(4):
        for j in range(i):
            assert ((masks[i] - masks[j]).abs() > 1).sum() >= 8  # at least 8 pixels swap sides even when small


@pytest.mark.parametrize("recipe", ALL)
def test_truth_has_the_centres_of_the_pixels(recipe):
    close = 0
    for i in range(6):
        scene = draw(0, i, recipe)
        found = truth(scene, 32, 16)
        spot = torch.arange(32) + 0.5
        mass = found.full.sum((2, 3))
        x, y = ((found.full * s).sum((2, 3)) / mass.clamp(min=1e-6) for s in (spot, spot[:, None]))
        border = torch.cat([found.full[..., 0, :], found.full[..., -1, :], found.full[..., 0], found.full[..., -1]], -1)
        whole = (mass > 10) & (border.amax(-1) == 0)
        error = torch.hypot(x - found.centres[..., 0], y - found.centres[..., 1])[whole]
        close += whole.sum()
        assert not len(error) or error.max() < 0.15
        assert torch.allclose(found.velocity[:, :-1], found.centres[:, 1:] - found.centres[:, :-1], atol=1e-4)
    assert close > 50


@pytest.mark.parametrize("recipe", ALL)
def test_plate_masks_and_pixels_agree(recipe):
    for i in range(4):
        scene = draw(1, i, recipe)
        clip, found = render(scene, 32, 16), truth(scene, 32, 16)
        empty = (found.full.sum(0) == 0) & (found.order == -1)
        if scene.cuts and scene.cuts[-1].fade:
            empty &= (found.shot == found.shot.mode().values)[:, None, None] & ~fading(scene, 16)[:, None, None]
        if scene.occluder is not None:
            empty &= (clip - found.plate).abs().amax(0) < 2  # the bar's own soft edge is neither
            inside = torch.nn.functional.max_pool2d((found.order == len(found.bodies)).float(), 3, 1, 1) > 0
            empty &= ~inside
        assert empty.float().mean() > 0.2
        assert ((clip - found.plate).abs().amax(0)[empty] < 1e-5).all()
        assert (found.visible <= found.full + 1e-6).all() and (found.visible.sum(0) <= 1 + 1e-5).all()
        for k in range(len(found.bodies)):  # order says who is nearest, visible says how much of the pixel is left
            assert (found.visible[k][found.order == k] > 0.3).all()
            assert (found.order[found.visible[k] > 0.95] == k).all()


def fading(scene, frames):
    out = torch.zeros(frames, dtype=torch.bool)
    for cut in scene.cuts[1:]:
        out[max(cut.start - cut.fade, 0) : cut.start + 1] = True
    return out


@pytest.mark.parametrize(
    "recipe", ["base", "textured", "camera", "varied", "script", "gravity", "collide", "recurrent", "occluded"]
)
def test_warping_by_the_exact_flow_gives_the_neighbour_frame(recipe):
    worst, still = [], []
    for i in range(8):
        scene = draw(0, i, recipe)
        clip, found = render(scene, 64, 17, 8), truth(scene, 64, 17, 8)
        for flow, seen, a, b in (
            (found.forward[:, :-1], found.forward_seen[:-1], clip[:, :-1], clip[:, 1:]),
            (found.backward[:, 1:], found.backward_seen[1:], clip[:, 1:], clip[:, :-1]),
        ):
            inner = torch.nn.functional.avg_pool2d((found.full.amax(0) > 0).float(), 1)
            assert inner.shape == (17, 64, 64)
            error = (warp(b, flow) - a).abs().mean(0)[seen]
            worst.append(float(error.mean()))
            still.append(float((b - a).abs().mean(0)[seen].mean()))
        assert found.forward_seen.float().mean() > 0.75 or recipe == "recurrent"
    assert np.mean(worst) < 0.02
    assert np.mean(worst) < 0.8 * np.mean(still)  # and better than to copy the frame


def test_flow_of_simple_motions_is_what_arithmetic_says():
    scene = lone("square", 0.5, 0.5, vx=2 / 32)
    found = truth(scene, 32, 2)
    inside = found.order[0] == 0
    assert torch.allclose(found.forward[:, 0][:, inside], torch.tensor([[2.0], [0.0]]), atol=1e-5)
    assert torch.allclose(found.backward[:, 0][:, inside], torch.tensor([[-2.0], [0.0]]), atol=1e-5)
    assert found.forward[:, 0][:, ~inside].abs().max() < 1e-5
    covered = (found.order[0] == -1) & (found.order[1] == 0)
    assert covered.sum() > 10 and not found.forward_seen[0][covered].any()
    pan = Scene((0, 0), "camera", scene.bodies, scene.background, Camera("right", vx=1 / 32))
    assert truth(pan, 32, 2).forward[0, 0][~inside].sub(-1).abs().max() < 1e-4
    spin = truth(lone("square", spin=0.1), 32, 2)
    row, column = 12, 14  # a point of the body: turned by .1 rad about (16, 16), clockwise on screen
    p = np.array([column + 0.5 - 16, row + 0.5 - 16])
    turned = np.array([[np.cos(0.1), -np.sin(0.1)], [np.sin(0.1), np.cos(0.1)]]) @ p
    assert np.allclose(spin.forward[:, 0, row, column], turned - p, atol=1e-4)


def test_tracks_follow_surfaces_and_know_when_they_are_hidden():
    scene = draw(0, 3, "occluded")
    found = truth(scene, 64, 80, 0, grid=64)
    assert found.tracks.shape == (4096, 80, 2) and found.tracks_seen[:, 0].all()
    start = found.tracks[:, 0].long()
    owner = found.order[0, start[:, 1], start[:, 0]]
    for n in torch.nonzero(owner == 0)[:, 0].tolist():
        shift = found.tracks[n] - found.tracks[n, 0]
        assert torch.allclose(shift, found.centres[0] - found.centres[0, 0], atol=1e-3)
        hidden = int((~found.tracks_seen[n]).int().argmax())
        assert hidden > 0 and found.tracks_seen[n, hidden:].any()  # behind the bar and out again
    ground = owner == -1
    assert (found.tracks[ground] - found.tracks[ground][:, :1]).abs().max() < 1e-3


def test_occlusion_leaves_full_masks_but_no_visible_ones():
    scene = draw(0, 5, "occluded")
    found = truth(scene, 32, 60)
    hidden = (found.full.sum((2, 3)) > 10) & (found.visible.sum((2, 3)) < 0.05)
    assert 8 <= hidden.sum()
    clip = render(scene, 32, 60)
    frame = int(hidden[0].int().argmax())
    colour = torch.tensor(COLOURS[scene.bodies[0].colour]) * 2 - 1
    assert ((clip[:, frame] - colour[:, None, None]).abs().amax(0) < 0.3).sum() == 0


def test_depth_order_later_bodies_are_in_front():
    back, front = (lone("square", x).bodies[0] for x in (0.45, 0.55))
    red = Body("red", "square", "medium", "still", (back.legs[0]._replace(red=0.9, green=0.1, blue=0.1),))
    scene = Scene((0, 0), "two", (red, front))
    found, clip = truth(scene, 32, 1), render(scene, 32, 1)
    both = (found.full[:, 0] == 1).all(0)
    assert both.sum() > 20 and (found.order[0][both] == 1).all() and (clip[:, 0][:, both] == 1).all()
    assert found.visible[0, 0][both].max() == 0


def test_shots_change_where_the_truth_says():
    for i in range(12):
        scene = draw(0, i, "cuts")
        clip, found = render(scene, 32, 16), truth(scene, 32, 16)
        jumps = (clip[:, 1:] - clip[:, :-1]).abs().mean((0, 2, 3))
        changed = (found.shot[1:] != found.shot[:-1]).nonzero()[:, 0].tolist()
        assert changed and len([e for e in found.events if e.kind in ("cut", "fade")]) >= 1
        if not scene.cuts[1].fade:
            assert changed == [cut.start - 1 for cut in scene.cuts[1:] if cut.start < 16]
            assert all(jumps[f] > 4 * jumps.median() for f in changed)
        assert not found.forward_seen[changed].any()


def test_contacts_are_part_of_the_truth():
    found = truth(draw(0, 0, "collide"), 32, 16)
    assert [event.word for event in found.contacts] == ["other"]
    gap = (found.centres[0] - found.centres[1]).norm(dim=-1)
    assert abs(int(gap.argmin()) - found.contacts[0].start) <= 1
    assert truth(draw(0, 0, "gravity"), 32, 8).physics.gravity > 0


def test_colours_are_saturated_and_grounds_are_not():
    def saturation(rgb):
        return (rgb.amax(0) - rgb.amin(0)) / rgb.amax(0).clamp(min=0.05)

    for i in range(60):
        found = truth(draw(0, i, "textured"), 32, 1)
        assert saturation((found.plate + 1) / 2).max() < 0.35
    for colour in COLOURS.values():
        assert saturation(torch.tensor(colour)) > 0.8


@pytest.mark.parametrize("kind", [kind for kind in TEXTURES if kind != "plain"])
def test_every_texture_shows_on_bodies_and_moves_with_them(kind):
    plain = lone("square", 0.4, 0.5, 0.21, vx=4 / 64, red=0.9, green=0.1, blue=0.1)
    body = vary(plain, "texture", value=kind).bodies[0]
    scene = Scene((0, 0), "textured", (body,), plain.background)
    clip = render(scene, 64, 2)
    assert (clip - render(plain, 64, 2)).abs().max() > 0.1
    inside = slice(20, 44), slice(16, 36)
    moved = slice(20, 44), slice(20, 40)
    assert torch.allclose(clip[:, 0, *inside], clip[:, 1, *moved], atol=1e-4)
    ground = Scene((0, 0), "base", plain.bodies, Background("grey", Texture(kind, 0.2), (0.4, 0.4, 0.4), (0.6, 0.6, 0.6)))
    assert truth(ground, 64, 1).plate.std() > 0.01


def test_light_scales_all_colours():
    scene = draw(0, 0)
    dim, plain = render(vary(scene, "light", value="dim")), render(scene)
    assert torch.allclose((dim + 1) / 2, (plain + 1) / 2 * 0.3, atol=1e-5)
    spot = render(vary(scene, "light", value="spot"))
    assert (spot[..., 0, 0] < plain[..., 0, 0] - 0.05).all() and torch.allclose(spot[..., 16, 16], plain[..., 16, 16], atol=0.01)


def test_a_larger_render_averages_to_the_smaller():
    scenes = [draw(0, i) for i in range(6)]
    small = torch.nn.functional.avg_pool3d(batch(scenes, 64, 4), (1, 2, 2))
    assert (small - batch(scenes, 32, 4)).abs().mean() < 0.02


def test_clear_errors():
    scene = draw(0)
    with pytest.raises(ValueError, match="size >= 8 pixels, got 4"):
        render(scene, size=4)
    with pytest.raises(ValueError, match="frames >= 1, got 0"):
        render(scene, frames=0)
    with pytest.raises(ValueError, match="start >= 0, got -3"):
        render(scene, start=-3)
    with pytest.raises(ValueError, match="at least one scene"):
        batch([])
    with pytest.raises(ValueError, match="grid >= 1"):
        truth(scene, grid=0)
