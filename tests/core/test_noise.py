"""Paths and samplers against closed forms."""

import math

import pytest
import torch

from minivid.core import noise
from minivid.core.model import Cond, VideoModel

X = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
EPS = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
END = torch.randn(X.shape, generator=torch.Generator().manual_seed(2))
PATHS = {
    "flow": noise.flow(), "noise": noise.preserving(), "v": noise.preserving("v"),
    "clean": noise.preserving("clean"), "bridge": noise.bridge(END),
}
FLOW, T = PATHS["flow"], torch.tensor([[0.1, 0.5, 0.9, 0.3], [0.4, 0.4, 0.4, 0.4]])
each = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def ideal(path, spread=0.5, mean=0.3):
    """The network that was trained to the end on clean ~ N(mean, spread^2), noise ~ N(0, 1): what it says is known."""

    def model(x, t, cond, cache=None):
        s = t[:, None, :, None, None]
        a, c = path.a(s), path.c(s)
        rest = (x - path.b(s) * path.end - a * mean) / (a**2 * spread**2 + c**2)
        return path.p(s) * (mean + a * spread**2 * rest) + path.q(s) * c * rest

    return model


@each
def test_other_end(path):
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
    model = ideal(path, s, 0)
    error = {}
    for step in (noise.euler, noise.heun):
        times = noise.table(25, 4)
        if name == "noise":  # the noise says nothing of the clean clip at the very end, where a = 0
            times = times * 0.995
        x = path.at(torch.zeros_like(EPS), EPS, times[0])
        error[step] = (noise.sample(model, path, x, None, times, step) - s * EPS).abs().mean()
    assert error[noise.heun] < error[noise.euler] < 0.05
    fresh = noise.sample(model, path, EPS, None, noise.table(25, 4) * 0.995, noise.ancestral, torch.Generator().manual_seed(0))
    assert 0.3 < fresh.std() < 0.6


BOTH = [("flow", "v"), ("v", "flow"), ("noise", "flow"), ("clean", "v"), ("flow", "bridge"), ("bridge", "flow")]
pairs = pytest.mark.parametrize("trained, serves", BOTH)


@pairs
def test_a_network_of_one_path_says_on_another_what_that_path_s_own_says(trained, serves):
    have, want = PATHS[trained], PATHS[serves]
    t = torch.rand(2, 4) * 0.9 + 0.05
    x = want.at(X, EPS, t)
    torch.testing.assert_close(noise.Matched(ideal(have), have, want)(x, t, None), ideal(want)(x, t, None), atol=1e-4, rtol=1e-4)


@pairs
def test_matched_times_have_the_same_signal_to_noise(trained, serves):
    have, want = PATHS[trained], PATHS[serves]
    t = torch.linspace(0.02, 0.98, 17).double()
    s = noise.match(t, have, want)
    torch.testing.assert_close(want.a(s) * have.c(t), want.c(s) * have.a(t), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(noise.match(s, want, have), t, atol=1e-9, rtol=0)


def test_matched_times_in_closed_form():
    t = torch.linspace(0, 1, 11)
    torch.testing.assert_close(noise.match(t, noise.preserving(), noise.flow()), 1 / (1 + 1 / torch.tan(t * math.pi / 2)))
    assert noise.match(t, noise.flow(), noise.preserving())[[0, -1]].tolist() == [0, 1]


def test_a_network_serves_its_own_path():
    model = ideal(FLOW)
    torch.testing.assert_close(noise.Matched(model, FLOW, FLOW)(X, T, None), model(X, T, None), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained, serves", BOTH[:4])
@pytest.mark.parametrize("step", [noise.euler, noise.heun])
@pytest.mark.parametrize("kind", ["ideal", "VideoModel"])
def test_sampling_through_the_wrapper_is_sampling_natively(trained, serves, step, kind):
    """The same noise, the same signal-to-noise ratios, the same steps: the sample agrees, whoever walks."""
    have, want = PATHS[trained], PATHS[serves]
    model, cond = ideal(have), None
    if kind == "VideoModel":
        model, cond = VideoModel(3, 32, 2, 2, patch=1).double(), Cond(text=torch.tensor([[5, 6, 0], [7, 8, 9]]))
        model.requires_grad_(False)
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    times = 0.99 * noise.table(8, 4).double()  # at t = 1 the path "noise" says nothing of the clean clip
    x = X.double()
    native = noise.sample(model, have, x, cond, times, step)
    a, c, s = have.a(times[0]), have.c(times[0]), noise.match(times, have, want)
    scale = ((want.a(s[0]) ** 2 + want.c(s[0]) ** 2) / (a**2 + c**2)).sqrt()  # a clip on its way is longer or shorter there
    served = noise.sample(noise.Matched(model, have, want), want, x * scale[:, None, None], cond, s, step)
    torch.testing.assert_close(served, native, atol=1e-5, rtol=1e-5)


def test_the_wrapper_hands_the_gradient_and_the_cache_on():
    seen = []

    def model(x, t, cond, cache):
        seen.append((cond, cache))
        return x * 2

    x = X.clone().requires_grad_(True)
    noise.Matched(model, FLOW, PATHS["v"])(x, torch.tensor([0.2, 0.7]), "told", "held").sum().backward()
    assert seen == [("told", "held")] and x.grad.abs().min() > 0


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
