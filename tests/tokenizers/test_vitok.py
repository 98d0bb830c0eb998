"""ViTok: a change of basis at its limit, E as the paper counts it, a code that is drawn, a second stage that leaves it alone."""

import pytest
import torch
from einops import rearrange
from torch import nn

from minivid.core import fit
from minivid.tokenizers.vitok import Critic, Layer, Transformer, ViTok, drawn, gradient_difference, kl, loss, second


def clip(f=8, side=16, b=2, seed=0):
    return torch.rand(b, 3, f, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- tubelets -----------------------------------------------------------------------------------------------------------


def test_without_blocks_an_orthogonal_basis_gives_the_clip_back():
    q, p = 2, 4
    n = 3 * q * p * p
    tok = ViTok(q, p, n, d=n, depth=(0, 0))
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        one, two = torch.eye(n), torch.eye(2 * n, n)
        for layer, weight in ((tok.embed, basis), (tok.code, two), (tok.read, one), (tok.unembed, basis.T)):
            layer.weight.copy_(weight)
            layer.bias.zero_()
    x = clip()
    z = tok.encode(x)
    assert z.shape == (2, *tok.latent_shape(8, 16, 16)) and not torch.allclose(z.flatten(), x.flatten())
    torch.testing.assert_close(tok.decode(z), x, atol=1e-5, rtol=0)


def test_cutting_is_a_convolution_whose_kernel_is_its_stride():
    tok, x = ViTok(4, 8, 3, d=16, depth=(0, 0)), clip()
    conv = nn.Conv3d(3, 16, (4, 8, 8), (4, 8, 8))
    with torch.no_grad():
        conv.weight.copy_(tok.embed.weight.view(16, 3, 4, 8, 8))
        conv.bias.copy_(tok.embed.bias)
    expected = tok.code(rearrange(conv(x), "b d f h w -> b f h w d"))[..., :3]
    torch.testing.assert_close(tok.encode(x), rearrange(expected, "b f h w c -> b c f h w"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("q", "p", "c", "numbers"), [(4, 8, 16, 16384), (8, 8, 32, 16384), (4, 16, 16, 4096)])
def test_numbers_in_the_code(q, p, c, numbers):
    assert ViTok(q, p, c).numbers(16, 128, 128) == numbers


def test_compression_of_the_card():
    assert 3 * 16 * 128 * 128 / ViTok(4, 8, 16).numbers(16, 128, 128) == 48


def test_bad_clips():
    with pytest.raises(ValueError, match="frames must divide by 4"):
        ViTok().encode(clip(6))
    with pytest.raises(ValueError, match="rows and columns must divide by 8"):
        ViTok().encode(clip(8, 12))
    assert ViTok().frames(8) and not ViTok().frames(6)


def test_it_begins_with_the_principal_components_of_tubelets():
    tok, x = ViTok(2, 4, 4, d=20), torch.cat([clip(8, 16, 8), clip(8, 16, 8, 1).cumsum(-1) / 4]).clamp(-1, 1)
    tok.begin(x)
    flat = rearrange(x, "b c (f q) (h p) (w r) -> (b f h w) (c q p r)", q=2, p=4, r=4)
    centred = flat - flat.mean(0)
    u, s, v = torch.linalg.svd(centred, full_matrices=False)
    best = (u[:, :20] * s[:20]) @ v[:20] + flat.mean(0)
    torch.testing.assert_close(tok.unembed(tok.embed(flat)), best, atol=1e-4, rtol=0)
    assert abs(tok.embed(flat).std() - 1) < 0.05
    wide = ViTok(1, 2, 4, d=20)  # more channels than numbers: nothing is lost
    wide.begin(x)
    flat = rearrange(x, "b c f (h p) (w r) -> (b f h w) (c p r)", p=2, r=2)
    torch.testing.assert_close(wide.unembed(wide.embed(flat)), flat, atol=1e-4, rtol=0)


# --- transformers -------------------------------------------------------------------------------------------------------


def test_parameters_of_a_block():
    d = 48
    hidden = round(2.67 * d)
    feed = 2 * (d * hidden + hidden) + hidden * d + d
    assert sum(p.numel() for p in Layer(d, 2).parameters()) == 3 * d * d + d * d + d + feed + 4 * d


def test_places_are_differences_and_without_them_order_means_nothing():
    net, x = Transformer(32, 2, 2), torch.randn(1, 12, 32)
    mixed = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(net(x[:, mixed], (3, 2, 2)), net(x, (3, 2, 2))[:, mixed], atol=1e-3)
    layer = net.blocks[0].attention
    with torch.no_grad():
        for block in net.blocks:
            block.attention.freq.zero_()
    torch.testing.assert_close(net(x[:, mixed], (3, 2, 2)), net(x, (3, 2, 2))[:, mixed], atol=1e-5, rtol=1e-5)
    assert layer.q.bias is None and layer.k.bias is None and layer.v.bias is None


def test_frames_by_themselves_see_nothing_else():
    tok, x = ViTok(1, 8, 4, frames=True), clip(4).requires_grad_()
    z = tok.encode(x)
    (grad,) = torch.autograd.grad(z[:, :, 1].square().sum(), x)
    assert (grad[:, :, 1].abs().sum() > 0) and grad[:, :, [0, 2, 3]].abs().sum() == 0
    full = ViTok(1, 8, 4).encode(x)
    (grad,) = torch.autograd.grad(full[:, :, 1].square().sum(), x)
    assert (grad.abs().sum((0, 1, 3, 4)) > 0).all()


# --- the code -----------------------------------------------------------------------------------------------------------


def test_kl_is_zero_for_the_unit_normal_alone_and_does_not_count_numbers():
    zero = torch.zeros(2, 4, 1, 3, 3)
    assert kl(zero, zero) == 0
    assert kl(zero + 0.1, zero) > 0 and kl(zero, zero + 0.1) > 0 and kl(zero, zero - 0.1) > 0
    large = torch.zeros(1, 64, 2, 8, 8)
    torch.testing.assert_close(kl(zero + 0.5, zero - 1), kl(large + 0.5, large - 1))
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(0.5, torch.tensor(-0.5).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(kl(zero + 0.5, zero - 1), exact)


def test_a_code_is_its_mean_or_a_draw():
    tok, x = ViTok(d=32), clip()
    assert torch.equal(tok.encode(x), tok.encode(x))
    with torch.no_grad():
        mean, log_variance = tok.moments(x)
        many = torch.stack([tok.encode(x, generator=fit.draws(0, i)) for i in range(600)])
    sd = (0.5 * log_variance).exp()
    assert ((many.mean(0) - mean).abs() < 5 * sd / 600**0.5).all()
    torch.testing.assert_close(many.var(0).mean(), log_variance.exp().mean(), rtol=0.05, atol=0)


def test_log_variance_is_clamped():
    tok = ViTok(d=32)
    with torch.no_grad():
        tok.code.bias[tok.channels :] = 1000
    assert tok.moments(clip())[1].max() == 20
    with torch.no_grad():
        tok.code.bias[tok.channels :] = -1000
    assert tok.moments(clip())[1].min() == -30


# --- training -----------------------------------------------------------------------------------------------------------


def test_all_terms_of_the_loss_count():
    tok, x = ViTok(d=32), clip()
    found = loss(tok, x, fit.draws(0, 0), beta=0.3, eta=2.0)
    torch.testing.assert_close(found["loss"], found["mse"] + 0.3 * found["kl"] + 2.0 * found["perceptual"])
    assert min(found.values()) > 0
    assert gradient_difference(x, x + 0.3).abs() < 1e-6 < gradient_difference(x, x.flip(-1))


def test_it_learns():
    torch.manual_seed(0)
    tok = ViTok(4, 8, 16, d=32, depth=(1, 1))
    adam, x, values = torch.optim.AdamW(tok.parameters(), 3e-3), clip(8, 16, 4) * 0.1 + 0.5, []
    for i in range(40):
        found = loss(tok, x, fit.draws(0, i))
        adam.zero_grad()
        found["loss"].backward()
        adam.step()
        values.append(found["loss"].item())
    assert values[-1] < 0.5 * values[0]


def test_the_second_stage_leaves_every_latent_as_it_was():
    torch.manual_seed(0)
    tok, critic, x = ViTok(4, 8, 8, d=32, depth=(1, 1)), Critic((8, 16)), clip()
    before, decoded = tok.encode(x), tok.decode(tok.encode(x)).detach()
    adam, other = torch.optim.Adam(tok.freeze(), 1e-2), torch.optim.Adam(critic.parameters(), 1e-2)
    frozen = [p for part in (tok.embed, tok.encoder, tok.code) for p in part.parameters()]
    for i in range(3):
        ours, theirs = second(tok, critic, x, i / 2)
        adam.zero_grad()
        other.zero_grad()
        ours.backward()
        assert all(p.grad is None for p in [*frozen, *critic.parameters()])
        theirs.backward()
        assert all(p.grad is not None for p in critic.parameters())
        adam.step(), other.step()
    assert torch.equal(tok.encode(x), before) and not torch.equal(tok.decode(before), decoded)
    assert all(p.grad is None for p in frozen)


def test_the_critic_is_heard_as_far_as_it_has_come():
    tok, critic, x = ViTok(4, 8, 8, d=32, depth=(1, 1)), Critic((8, 16)), clip()
    none, half, whole = (second(tok, critic, x, ramp)[0] for ramp in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half - none, (whole - none) / 2, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(none - whole, 0.1 * critic(tok.decode(tok.encode(x))).mean(), atol=1e-6, rtol=1e-4)


def test_drawing_needs_no_gradient_from_the_dice():
    mean, spread = torch.zeros(1, 2, 1, 1, 1, requires_grad=True), torch.zeros(1, 2, 1, 1, 1, requires_grad=True)
    a, b = drawn(mean, spread, fit.draws(3, 0)), drawn(mean, spread, fit.draws(3, 0))
    assert torch.equal(a, b)
    a.sum().backward()
    assert torch.equal(mean.grad, torch.ones_like(mean)) and torch.allclose(spread.grad, 0.5 * a.detach())
