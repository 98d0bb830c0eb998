"""Paths and samplers against closed forms."""

import math

import pytest
import torch

from minivid.core import noise

X = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
EPS = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
END = torch.randn(X.shape, generator=torch.Generator().manual_seed(2))
PATHS = {
    "flow": noise.flow(), "noise": noise.preserving(), "v": noise.preserving("v"),
    "clean": noise.preserving("clean"), "bridge": noise.bridge(END),
}
each = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


@each
def test_the_right_answer_gives_back_the_clean_clip(path):
    t = torch.rand(2, 4) * 0.9 + 0.05
    torch.testing.assert_close(path.clean(path.at(X, EPS, t), t, path.target(X, EPS, t)), X, atol=1e-4, rtol=1e-4)


@each
def test_ends(path):
    torch.testing.assert_close(path.at(X, EPS, torch.zeros(2, 4)), X)
    other = END if path is PATHS["bridge"] else EPS
    torch.testing.assert_close(path.at(X, EPS, torch.ones(2, 4)), other, atol=1e-5, rtol=0)


def test_preserving_preserves_variance():
    p, t = noise.preserving(), torch.linspace(0, 1, 9)
    torch.testing.assert_close(p.a(t) ** 2 + p.c(t) ** 2, torch.ones(9))


def test_euler_on_the_flow_path_is_eulers_rule():
    t, s = torch.full((4,), 0.8), torch.full((4,), 0.6)
    velocity = torch.sin(X)
    predict = lambda x, t: noise.flow().clean(x, t, velocity)
    torch.testing.assert_close(noise.euler(noise.flow(), predict, X, t, s), X - 0.2 * velocity, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["flow", "noise", "v"])
def test_sampling_gaussian_data_gives_its_spread(name):
    """For data N(0, s^2) the ideal network is known: the sample must be the noise times s, and Heun must be nearer than Euler."""
    path, s = PATHS[name], 0.5

    def ideal(x, t, cond):
        t = t[:, None, :, None, None]
        a, c, p, q = (g(t) for g in (path.a, path.c, path.p, path.q))
        return x * (p * a * s**2 + q * c) / (a**2 * s**2 + c**2)

    error = {}
    for step in (noise.euler, noise.heun):
        times = noise.table(25, 4)
        if name == "noise":  # the noise says nothing of the clean clip at the very end, where a = 0
            times = times * 0.995
        x = path.at(torch.zeros_like(EPS), EPS, times[0])
        error[step] = (noise.sample(ideal, path, x, None, times, step) - s * EPS).abs().mean()
    assert error[noise.heun] < error[noise.euler] < 0.05
    fresh = noise.sample(ideal, path, EPS, None, noise.table(25, 4) * 0.995, noise.ancestral, torch.Generator().manual_seed(0))
    assert 0.3 < fresh.std() < 0.6


def test_frames_whose_time_stands_still_are_left_alone():
    times = noise.table(5, 4)
    times[:, 1] = 0.0
    out = noise.sample(lambda x, t, c: torch.cos(x), noise.flow(), X, None, times)
    assert torch.equal(out[:, :, 1], X[:, :, 1]) and not torch.equal(out[:, :, 2], X[:, :, 2])


def test_table_and_shift():
    t = noise.table(4, 2)
    assert t.shape == (5, 2) and t[:, 0].tolist() == [1, 0.75, 0.5, 0.25, 0]
    shifted = noise.table(4, 1, shift=3.0)[:, 0]
    assert math.isclose(shifted[2], 3 * 0.5 / (1 + 2 * 0.5)) and (shifted >= t[:, 0]).all()


def test_training_times_lie_inside_and_are_shared_by_frames():
    t = noise.logit_normal(500, 3, torch.Generator().manual_seed(0))
    assert t.shape == (500, 3) and 0 < t.min() and t.max() < 1 and torch.equal(t[:, 0], t[:, 2])
    assert abs(t.median() - 0.5) < 0.05


def test_loss_is_zero_for_the_right_answer_and_per_sample():
    t = torch.rand(2, 4)
    for path in PATHS.values():
        told = path.target(X, EPS, t)
        wrong = torch.cat([told[:1], told[1:] + 1])
        for says, error in ((told, [0.0, 0.0]), (wrong, [0.0, 1.0])):
            found = noise.loss(lambda x, t, c, says=says: says, path, X, t, None, EPS)
            torch.testing.assert_close(found, torch.tensor(error))
