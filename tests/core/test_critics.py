"""Contrast and distribution matching: values known in closed form, gradients as the papers write them."""

import math

import pytest
import torch
import torch.nn.functional as F

from minivid.core.baselines.critics import dmd, everyone, info_nce


def test_info_nce_is_cross_entropy_of_cosines():
    q, t, hard = torch.randn(6, 8), torch.randn(6, 8), torch.randn(6, 3, 8)
    s = F.cosine_similarity(q[:, None], t[None], dim=-1) / 0.1
    h = F.cosine_similarity(q[:, None], hard, dim=-1) / 0.1
    want = [-(s[i, i] - torch.cat([s[i], h[i]]).logsumexp(0)) for i in range(6)]
    torch.testing.assert_close(info_nce(q, t, 0.1, hard), torch.stack(want).mean())
    torch.testing.assert_close(info_nce(q, t, 0.1), F.cross_entropy(s, torch.arange(6)))


@pytest.mark.parametrize("n", [16, 64])
def test_known_values(n):
    """All alike: log n. A simplex: the least value at T = 1. Orthogonal pairs: log(1 + (n - 1) exp(-1 / T)). One pair: 0."""
    same = torch.ones(n, 4)
    assert info_nce(same, same).item() == pytest.approx(math.log(n), abs=1e-5)
    corners = torch.eye(n) - 1 / n
    assert info_nce(corners, corners).item() == pytest.approx(math.log(1 + (n - 1) * math.exp(-1 - 1 / (n - 1))), abs=1e-5)
    assert info_nce(torch.eye(n), torch.eye(n), 0.05).item() == pytest.approx(math.log(1 + (n - 1) * math.exp(-20)), abs=1e-6)
    assert info_nce(torch.randn(1, 4), torch.randn(1, 4)).item() == 0


def test_more_wrong_answers_never_help_and_scale_does_not_count():
    q, t = torch.randn(8, 4), torch.randn(8, 4)
    assert info_nce(q, t, 0.1, t.roll(1, 0)[:, None]) > info_nce(q, t, 0.1)
    torch.testing.assert_close(info_nce(5 * q, t, 0.1), info_nce(q, 3 * t, 0.1))


def test_dmd_is_nothing_when_both_networks_agree():
    x = torch.randn(2, 3, 4, 5, 5, requires_grad=True)
    said = torch.randn(2, 3, 4, 5, 5)
    loss = dmd(x, said, said)
    loss.backward()
    assert loss == 0 and x.grad.abs().max() == 0


def test_dmd_gradient_is_the_difference_of_the_networks():
    """grad / numel, each sample by its own size; nothing reaches the networks; scaling all three changes nothing."""
    x, fake, real = (torch.randn(2, 3, 4, 5, 5, requires_grad=True) for _ in range(3))
    dmd(x, fake, real).backward()
    size = (x - real).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(x.grad, ((fake - real) / size / x.numel()).detach())
    assert fake.grad is None and real.grad is None
    alone = x.detach()[:1].requires_grad_(True)
    dmd(alone, fake[:1], real[:1]).backward()
    torch.testing.assert_close(2 * x.grad[:1], alone.grad)
    torch.testing.assert_close(dmd(2 * x, 2 * fake, 2 * real), dmd(x, fake, real))


def test_dmd_moves_one_gaussian_onto_another():
    """Both networks are the exact posterior means of Gaussians; the generator is a mean and a width."""
    g = torch.Generator().manual_seed(0)
    mean, width = torch.tensor(2.0, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    opt = torch.optim.Adam([mean, width], 0.03)
    told = lambda x, noise, m, s: m + s**2 / (s**2 + noise**2) * (x - m)  # E[clean | noisy] for clean ~ N(m, s^2)
    for _ in range(300):
        x = mean + width * torch.randn(256, 1, generator=g)
        noise = 0.5 + torch.rand(256, 1, generator=g)
        noisy = (x + noise * torch.randn(256, 1, generator=g)).detach()
        opt.zero_grad()
        dmd(x.T, told(noisy, noise, mean, width).T, told(noisy, noise, -1.0, 1.0).T).backward()
        opt.step()
    assert abs(mean.item() + 1) < 0.1 and abs(abs(width.item()) - 1) < 0.1


def test_everyone_is_the_batch_itself_in_one_process():
    x = torch.randn(3, 2)
    assert everyone(x) is x
