"""Exact readings on hand-made paths and, through the judge, on rendered physics."""

import math

import pytest
import torch

from minivid.world import draw, readings, render, truth
from minivid.world.judge import read


def parabola(g=0.2, v=(0.5, -1.0), frames=12):
    t = torch.arange(frames, dtype=torch.float32)
    return torch.stack((v[0] * t, v[1] * t + 0.5 * g * t * t), 1)


def test_paths(untyped):
    path = parabola()
    assert readings.trajectory_error(path, path) == 0
    shifted = path + torch.tensor([3.0, 4.0])
    assert readings.trajectory_error(shifted, path) == pytest.approx(5)
    ends = path.clone()
    ends[0] += 10
    assert readings.trajectory_error(ends, path, inner=True) == 0 and readings.trajectory_error(ends, path) > 1
    line = torch.stack((torch.arange(5.0) * 3, torch.arange(5.0) * 4), 1)
    assert readings.dynamic_degree(line) == pytest.approx(5)
    line[2] = math.nan
    assert readings.dynamic_degree(line) == pytest.approx(5), "a gap is left out"
    with pytest.raises(ValueError, match="one length"):
        readings.trajectory_error(path, path[:3])


def test_gravity():
    assert readings.gravity_residual(parabola(0.2), 0.2) == pytest.approx(0, abs=1e-5)
    assert readings.gravity_residual(parabola(0.3), 0.2) == pytest.approx(0.1, abs=1e-4)


def test_bounce():
    fall = parabola(0.2, (0.5, 1.0), 6)
    at, speed = 5.0, 1.0 + 0.2 * 5
    t = torch.arange(1.0, 6)[:, None]
    after = fall[-1] + torch.tensor([0.5, -0.8 * speed]) * t + 0.5 * torch.tensor([0.0, 0.2]) * t**2
    path = torch.cat((fall, after))
    restitution, slip = readings.bounce(path, at, 0.2)
    assert restitution == pytest.approx(0.8, abs=1e-3) and slip == pytest.approx(0, abs=1e-3)
    assert readings.gravity_residual(path, 0.2, [at]) == pytest.approx(0, abs=1e-4)
    assert readings.gravity_residual(path, 0.2) > 0.1, "unless the touch is left out"
    with pytest.raises(ValueError, match="two frames on either side"):
        readings.bounce(path, 0.0)


def test_penetration():
    a, b = torch.zeros(3, 2), torch.tensor([[5.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    assert readings.penetration(torch.stack((a, b)), torch.tensor([2.0, 2.0])) == pytest.approx(1)
    assert readings.penetration(torch.stack((a, b)), torch.tensor([1.0, 1.0])) == 0


def test_identity():
    rgb = torch.tensor([[1.0, 0, 0]] * 4 + [[math.nan] * 3] * 2 + [[0.0, 1, 0]] * 4)
    assert readings.colour_error(rgb, slice(0, 2), slice(2, 4)) == 0
    assert readings.colour_error(rgb, slice(0, 4), slice(4, 10)) == pytest.approx((2 / 3) ** 0.5)
    assert math.isnan(readings.colour_error(rgb, slice(0, 4), slice(4, 6)))


def test_events():
    true = [(3.0, "left"), (9.0, "grow"), (15.0, "left")]
    assert readings.event_f1(true, true) == 1 and readings.event_f1([], []) == 1 and readings.event_f1([], true) == 0
    assert readings.event_f1([(4.0, "left"), (5.0, "left")], true) == pytest.approx(2 / 5), "one match an event"
    assert readings.order_share(["a", "b", "c"], ["a", "b", "c"]) == 1
    assert readings.order_share(["c", "b", "a"], ["a", "b", "c"]) == 0
    assert readings.order_share(["a", "c"], ["a", "b", "c"]) == pytest.approx(1 / 3)


def test_rendered_gravity_obeys():
    """What the judge reads of a rendered fall obeys the scene's gravity to a few hundredths of a pixel per frame^2."""
    checked = 0
    for i in range(4):
        scene = draw(2, i, "gravity", "all")
        seen, true = read(render(scene, 64, 24)), truth(scene, 64, 24)
        contacts, gravity = [event.start for event in true.contacts], scene.physics.gravity * 64
        assert readings.trajectory_error(seen.bodies[0].path, true.centres[0]) < 0.1
        assert readings.gravity_residual(true.centres[0], gravity, contacts) < 1e-3
        assert readings.gravity_residual(seen.bodies[0].path, gravity, contacts) < 0.1
        checked += len(contacts)
    assert checked > 0
