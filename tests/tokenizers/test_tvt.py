"""TVT: what is frozen stays to the bit, an outer stage and LoRA begin as nothing, quarters, one step and VSD as formulas say."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minivid.core import fit, weights
from minivid.core.baselines.lowrank import LoRA
from minivid.core.baselines.unet import UNet
from minivid.core.model import Cond, Guided
from minivid.core.noise import preserving
from minivid.lab import measure
from minivid.tokenizers import tvt as paper
from minivid.tokenizers.tvt import Compact, Outer

PATH = preserving("noise")


def vae(*widths, seed=0, scale=0.18215):
    torch.manual_seed(seed)
    new = Compact(widths, (1, 1))
    new.scale.fill_(scale)
    return new


def old():
    return vae(8, 16, 16, seed=1).eval().requires_grad_(False)


def clip(b=2, f=1, h=32, w=24, seed=0):
    return torch.rand(b, 3, f, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def unet(seed=0):
    """A small image U-Net whose zero-initialised layers were moved."""
    torch.manual_seed(seed)
    model = UNet(4, (8, 16), (1, 1), (2, 2), time=False, d=16)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn(p.shape))
    return model.eval().requires_grad_(False)


def latent(b=2, f=1, h=8, w=8, seed=0):
    return torch.randn(b, 4, f, h, w, generator=torch.Generator().manual_seed(seed))


def told(b=2):
    return Cond(text=torch.tensor([[5, 6, 7, 0]]).expand(b, -1))


def batches(e8):
    """batches(i) of clips and their old latents."""
    return lambda i: (x := clip(4, h=16, w=16, seed=i), paper.enlarged(e8, x))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


# --- the law of limits --------------------------------------------------------------------------------------------------


def test_an_encoder_that_says_the_old_latents_has_the_loss_of_the_first_step():
    e8, new, x = old(), vae(8, 16), clip()
    z = paper.enlarged(e8, x)
    new.scale.copy_(e8.scale)

    class Same(torch.nn.Module):  # E4 = E8(up2(.)), sure of itself
        def forward(self, frames):
            mean = e8.posterior(paper.up2(frames[:, :, None]))[0][:, :, 0]
            return torch.cat([mean, torch.full_like(mean, -30.0)], 1)

    want = paper.first(new, x, z)
    new.encoder = Same()
    torch.testing.assert_close(paper.second(new, x, fit.draws(0, 0), beta=0.0), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(new.encode(x), z)


@settings(max_examples=10)
@given(h=st.integers(1, 3), w=st.integers(1, 3), f=st.integers(1, 2), text=st.booleans(), seed=st.integers(0, 99))
def test_an_outer_stage_begins_as_the_inner_network_on_averages(h, w, f, text, seed):
    inner, z, t = unet(seed), latent(2, f, 4 * h, 4 * w, seed), torch.tensor([0.2, 0.9])
    cond = told() if text else Cond()
    want = F.interpolate(inner(F.avg_pool3d(z, (1, 2, 2)), t, cond), scale_factor=(1, 2, 2), mode="nearest")
    torch.testing.assert_close(Outer(inner, 16)(z, t, cond), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("outer", [False, True])
def test_lora_begins_as_the_frozen_network_and_merges_into_a_plain_one(outer):
    frozen = Outer(unet(), 16) if outer else unet()
    z, t = latent(), torch.tensor([0.3, 0.6])
    model = paper.adapted(frozen, torch.Generator().manual_seed(0))
    assert torch.equal(model(z, t, told()), frozen(z, t, told()))
    for part in model.modules():
        if isinstance(part, LoRA):
            torch.nn.init.normal_(part.up.weight, std=0.05)
    said, plain = model(z, t, told()), paper.merged(model)
    assert not torch.allclose(said, frozen(z, t, told()), atol=1e-3)
    torch.testing.assert_close(plain(z, t, told()), said, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(part, LoRA) for part in plain.modules())


@given(b=st.integers(1, 3), h=st.integers(1, 4), w=st.integers(1, 4))
def test_quarters_make_up_the_latent_to_the_bit(b, h, w):
    z = latent(b, 2, 2 * h, 2 * w)
    tiles = paper.quarters(z)
    assert tiles.shape == (4 * b, 4, 2, h, w) and torch.equal(paper.whole(tiles), z)
    assert torch.equal(tiles[:4], torch.stack([z[0, ..., i : i + h, j : j + w] for i in (0, h) for j in (0, w)]))


# --- shapes and scales --------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(h=st.integers(1, 3), w=st.integers(1, 3), f=st.integers(1, 3))
def test_the_old_encoder_on_doubled_frames_and_the_new_one_share_a_grid(h, w, f):
    e8, new, x = old(), vae(8, 16), clip(2, f, 8 * h, 8 * w)
    z = paper.enlarged(e8, x)
    assert z.shape == new.encode(x).shape == (2, *new.latent_shape(f, 8 * h, 8 * w)) == (2, 4, f, 2 * h, 2 * w)
    assert new.decode(z).shape == x.shape and new.decode(z).abs().max() <= 1
    assert e8.decode(z).shape == paper.up2(x).shape == (2, 3, f, 16 * h, 16 * w)


def test_doubling_is_bicubic_as_pillow_has_it_and_stays_in_range():
    from PIL import Image

    x = clip(1, 1, 12, 10)
    want = Image.fromarray(x[0, 0, 0].numpy()).resize((20, 24), Image.Resampling.BICUBIC)
    got = paper.up2(x)[0, 0, 0]
    # Pillow's bicubic has a = -0.5, torch's -0.75: nearly the same picture
    assert (got - torch.tensor(np.asarray(want)).clamp(-1, 1)).abs().mean() < 0.05
    assert paper.up2(torch.ones(1, 3, 1, 4, 4)).sub(1).abs().max() < 1e-6 and got.abs().max() <= 1


def test_the_scale_goes_on_in_encode_and_off_in_decode():
    plain, scaled, x = vae(8, 16, scale=1.0), vae(8, 16), clip()
    torch.testing.assert_close(scaled.encode(x), 0.18215 * plain.encode(x))
    torch.testing.assert_close(scaled.decode(scaled.encode(x)), plain.decode(plain.encode(x)), atol=1e-5, rtol=1e-5)
    plain.settle(x)
    assert plain.encode(x).std().item() == pytest.approx(1, rel=1e-4)


def test_every_frame_is_by_itself():
    new, x = vae(8, 16).eval(), clip(1, 3)
    z = new.encode(x)
    torch.testing.assert_close(new.encode(x[:, :, 1:2]), z[:, :, 1:2])
    torch.testing.assert_close(new.decode(z[:, :, 1:2]), new.decode(z)[:, :, 1:2])


def test_a_latent_is_drawn_with_the_spread_that_the_encoder_says():
    new, x = vae(8, 16), clip(1, 1, 8, 8)
    mean, spread = new.posterior(x)
    some = torch.cat([paper.drawn(new, x, fit.draws(0, i))[0] for i in range(400)]) / new.scale
    torch.testing.assert_close(some.mean(0), mean[0], atol=0.25, rtol=0.1)
    torch.testing.assert_close(some.std(0), (spread[0] / 2).exp(), atol=0.02, rtol=0.2)
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(mean, (spread / 2).exp()), normal(0.0, 1.0)).mean()
    torch.testing.assert_close(paper.drawn(new, x, fit.draws(0, 0))[1], want)


def test_it_survives_being_stored(tmp_path):
    new, x = vae(8, 16), clip()
    weights.write(tmp_path / "vae.safetensors", new.state_dict(), {})
    again = weights.fill(vae(8, 16, seed=5, scale=1.0), weights.read(tmp_path / "vae.safetensors")[0], "it")
    assert torch.equal(again.decode(again.encode(x)), new.decode(new.encode(x)))


# --- the two steps ------------------------------------------------------------------------------------------------------


def test_step_one_leaves_the_old_vae_and_step_two_the_decoder_to_the_bit():
    e8, new = old(), vae(8, 16, scale=1.0)
    before, start = state(e8), state(new)
    paper.train(new.decoder, lambda batch, _: paper.first(new, *batch), batches(e8), 3)
    assert not moved(e8, before) and all(name.startswith("decoder") for name in moved(new, start)) and moved(new, start)
    start = state(new)
    paper.train(new.encoder, lambda batch, g: paper.second(new, batch[0], g), batches(e8), 3)
    assert not moved(e8, before) and all(name.startswith("encoder") for name in moved(new, start)) and moved(new, start)


def test_gradients_flow_through_the_frozen_decoder():
    new, x = vae(8, 16), clip()
    new.decoder.requires_grad_(False)
    grads = torch.autograd.grad(paper.second(new, x, fit.draws(0, 0), beta=0.0), list(new.encoder.parameters()))
    assert all(g.isfinite().all() for g in grads) and sum(g.abs().sum() for g in grads) > 0


def test_a_transfer_is_both_steps_in_this_order_with_the_old_scale():
    e8, new = old(), vae(8, 16, scale=1.0)
    by_hand = copy.deepcopy(new)
    paper.transfer(new, e8, batches(e8), 3, seed=4)
    assert new.scale == e8.scale
    by_hand.scale.copy_(e8.scale)
    paper.train(by_hand.decoder, lambda batch, _: paper.first(by_hand, *batch), batches(e8), 3, seed=4)
    decoder = state(by_hand.decoder)
    paper.train(by_hand.encoder, lambda batch, g: paper.second(by_hand, batch[0], g), batches(e8), 3, seed=5)
    assert not moved(by_hand.decoder, decoder) and not moved(new, state(by_hand))


def test_training_lowers_both_losses():
    e8, new = old(), vae(8, 16)
    x, z = batches(e8)(0)
    losses = [paper.first(new, x, z).item()]
    paper.train(new.decoder, lambda batch, _: paper.first(new, *batch), lambda i: (x, z), 120)
    losses += [paper.first(new, x, z).item(), paper.second(new, x, fit.draws(0, 0)).item()]
    paper.train(new.encoder, lambda batch, g: paper.second(new, batch[0], g), lambda i: (x, z), 120)
    losses += [paper.second(new, x, fit.draws(0, 0)).item()]
    assert losses[1] < 0.9 * losses[0] and losses[3] < 0.9 * losses[2]


def test_the_probe_knows_a_perfect_denoiser_and_one_that_says_nothing():
    z = latent(16)
    at = iter((i + 0.5) / 4 for i in range(4))

    def perfect(x, t, cond):
        assert t.shape == (16, 1) and t[0, 0].item() == pytest.approx(next(at))
        return (x - PATH.a(t[0, 0]) * z) / PATH.c(t[0, 0])

    assert paper.probe(perfect, PATH, z, 4).max() < 1e-8
    nothing = paper.probe(lambda x, t, cond: 0 * x, PATH, z, 4)
    assert nothing.shape == (4,) and nothing.sub(1).abs().max() < 0.1
    assert torch.equal(nothing, paper.probe(lambda x, t, cond: 0 * x, PATH, 5 * z, 4))  # the noise doesn't depend on z


# --- one step and the outer stage -----------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(t=st.floats(0.001, 0.95), seed=st.integers(0, 99))
def test_one_step_is_the_formula_and_exact_where_the_noise_is_known(t, seed):
    x0, eps, net = latent(seed=seed).double(), latent(seed=seed + 1).double(), unet().double()
    abar = torch.cos(torch.tensor(t * torch.pi / 2, dtype=torch.float64)) ** 2
    z = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    got = paper.one_step(lambda x, t, cond: eps, PATH, z, t, Cond())
    torch.testing.assert_close(got, x0)
    said = net(z, torch.full((2, 1), t, dtype=torch.float64), Cond())
    want = (z - (1 - abar).sqrt() * said) / abar.sqrt()
    torch.testing.assert_close(paper.one_step(net, PATH, z, t, Cond()), want)


def test_at_the_first_of_a_thousand_times_the_network_corrects_a_little():
    z, net = latent(), unet()
    got = paper.one_step(net, PATH, z, 0.001, Cond())
    said = net(z, torch.full((2, 1), 0.001), Cond())
    assert 0 < (got - z).abs().max() < 0.01 * said.abs().max()


def test_vsd_has_the_gradient_of_its_formula():
    z, noise, t = latent(3).requires_grad_(True), latent(3, seed=1), torch.tensor([[0.3], [0.5], [0.7]])
    teacher, student = Guided(unet(1), 3.0), unet(2)
    loss, g = paper.vsd(z, teacher, student, PATH, t, noise, told(3))
    x = PATH.at(z.detach(), noise, t)
    real, fake = (PATH.clean(x, t, model(x, t, told(3))) for model in (teacher, student))
    want = (fake - real) / torch.stack([(a - b).abs().mean() for a, b in zip(z.detach(), real, strict=True)]).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(g, want)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], want * 2 / z.numel())
    same, nothing = paper.vsd(z, teacher, teacher, PATH, t, noise, told(3))
    assert same == 0 and nothing.abs().sum() == 0


def test_vsd_on_quarters_is_a_gradient_of_the_whole_latent():
    z, noise = latent(1, h=16, w=16).requires_grad_(True), latent(4, seed=1)
    loss, g = paper.vsd(paper.quarters(z), unet(1), unet(2), PATH, torch.full((4, 1), 0.5), noise, Cond())
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], paper.whole(g) * 2 / z.numel())


def test_in_an_adapted_outer_stage_the_old_network_learns_by_lora_alone():
    inner = unet()
    model = paper.adapted(Outer(inner, 16), torch.Generator().manual_seed(0))
    learnt = {name for name, p in model.named_parameters() if p.requires_grad}
    own = {name for name in learnt if not name.startswith("inner.")}
    inside = {name.removeprefix("inner.") for name in learnt - own}
    assert {name.split(".")[0] for name in own} == {"enter", "down", "up", "leave"}
    assert all(".down." in name or ".up." in name or name.split(".")[0] in ("enter", "leave") for name in inside)
    assert {"enter", "leave"} <= {name.split(".")[0] for name in inside}  # they are new: widened
    before, z, t = state(inner), latent(h=16, w=16), torch.tensor([0.3, 0.6])
    model(z, t, told()).sub(z).square().mean().backward()
    assert model.leave.weight.grad.abs().sum() > 0 and not moved(inner, before)
    assert sum(part.down.weight.shape[0] == 4 for part in model.modules() if isinstance(part, LoRA)) > 10


def test_the_outer_stage_saves_arithmetic_on_the_fine_grid():
    inner, z, t = unet(), latent(1, h=64, w=64), torch.tensor([0.5])
    small = F.avg_pool3d(z, (1, 2, 2))
    work = [measure.flops(lambda m=m, x=x: m(x, t, Cond())) for m, x in ((inner, small), (inner, z), (Outer(inner, 8), z))]
    assert work[0] < work[2] < 0.8 * work[1] and work[1] > 4 * work[0]


@pytest.mark.usefixtures("untyped")
def test_refusals():
    with pytest.raises(ValueError, match="divide by 4"):
        vae(8, 16).encode(clip(1, 1, 18, 16))
    with pytest.raises(ValueError, match="divisible by 2"):
        Outer(unet(), 16)(latent(h=6, w=8), torch.tensor([0.5, 0.5]), Cond())
    with pytest.raises(ValueError):
        vae(8, 16).encode(clip() * 3)
