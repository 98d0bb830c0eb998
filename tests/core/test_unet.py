"""A fresh pair is the identity, the image network is the video network without time, and skips match for every legal pruning."""

import pytest
import torch

from minivid.core import noise
from minivid.core.baselines.unet import Pair, UNet
from minivid.core.model import Cond

TEXT = Cond(text=torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]))
SMALL = dict(channels=4, widths=(8, 16, 24), d=16)


def opened(**settings) -> UNet:
    """A small network whose zero-initialised ends were opened."""
    model = UNet(**{**SMALL, **settings}).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model


X, T = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([[0.1, 0.5, 0.9], [0.3, 0.3, 0.3]])


def test_a_fresh_network_says_zero_and_its_pairs_are_the_identity():
    model = UNet(**SMALL)
    assert not model(X, T, TEXT).any()
    pair = Pair((16, 16), 8, 8, True, True)
    x = torch.randn(2, 16, 3, 4, 4)
    assert torch.equal(pair(x, torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.ones(2, 5).bool()), x)


def test_the_image_network_is_the_video_network_without_time():
    video, image = UNet(**SMALL), opened(time=False)
    missing, unknown = video.load_state_dict(image.state_dict(), strict=False)
    assert unknown == [] and missing and all(".attention.time." in k for k in missing)
    torch.testing.assert_close(video(X, T, TEXT), image(X, T, TEXT))  # branches along time begin at zero
    alone = torch.cat([image(X[:, :, i : i + 1], T[:, i : i + 1], TEXT) for i in range(3)], 2)
    torch.testing.assert_close(image(X, T, TEXT), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("time", [True, False])
def test_frames_see_each_other_only_in_the_video_network(time):
    model, other = opened(time=time), X.clone()
    other[:, :, 2] += 1
    same = torch.isclose(model(X, T, TEXT), model(other, T, TEXT), atol=1e-6).flatten(3).all(3).all(1)
    assert same.tolist() == [[not time, not time, False]] * 2


def test_each_frame_has_its_own_time():
    model, t = opened(time=False), T.clone()
    t[0, 1] = 0.6
    changed = (model(X, T, TEXT) != model(X, t, TEXT)).flatten(3).any(3).any(1)
    assert changed.tolist() == [[False, True, False], [False] * 3]
    assert torch.equal(model(X, torch.tensor([0.2, 0.4]), TEXT), model(X, torch.tensor([[0.2] * 3, [0.4] * 3]), TEXT))


def test_words_are_read_and_padding_is_not():
    model = opened()
    told = model(X, T, TEXT)
    assert not torch.allclose(told, model(X, T, TEXT.null()), atol=1e-4)
    longer = Cond(text=torch.cat([TEXT.text, torch.zeros(2, 3, dtype=torch.long)], 1))
    torch.testing.assert_close(told, model(X, T, longer), atol=1e-5, rtol=1e-4)


def test_samples_do_not_touch_each_other():
    model = opened()
    torch.testing.assert_close(model(X, T, TEXT)[:1], model(X[:1], T[:1], Cond(text=TEXT.text[:1])), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mid", [True, False])
@pytest.mark.parametrize("downs", [(2, 2, 2), (1, 2, 1), (2, 1, 2), (0, 2, 1)])
def test_every_legal_pruning_runs(downs, mid):
    ups = [n + 1 for n in reversed(downs)]
    model = opened(downs=downs, ups=ups, mid=mid)
    assert model(X, T, TEXT).shape == X.shape
    assert [len(s) for s in model.downs] == list(downs) and [len(s) for s in model.ups] == ups


def test_a_removed_pair_is_a_pair_of_closed_branches():
    """Leaving out the pair in the middle is what closing its branches is: it keeps the width."""
    full = opened()
    fresh = Pair(full.mid.ends, 16, 16, True, True)
    full.mid.load_state_dict(fresh.state_dict())
    less = opened(mid=False)
    less.load_state_dict({k: v for k, v in full.state_dict().items() if not k.startswith("mid.")})
    torch.testing.assert_close(full(X, T, TEXT), less(X, T, TEXT))


def test_size_and_names():
    video, image = UNet(), UNet(time=False)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert 1.0e6 < count(image) < count(video) < 1.4e6
    names = [n for n, m in video.named_modules() if isinstance(m, Pair)]
    stages = [[f"{side}.{i}.{j}" for i in range(3) for j in range(n)] for side, n in (("downs", 2), ("ups", 3))]
    assert names == [*stages[0], "mid", *stages[1]]


def test_it_trains_and_every_parameter_takes_part():
    model = UNet(4, widths=(8, 16), downs=(1, 1), ups=(2, 2), d=16)
    clean, losses = torch.ones(4, 4, 2, 8, 8), []
    opt, text = torch.optim.Adam(model.parameters(), 3e-3), Cond(text=TEXT.text.repeat(2, 1))
    for i in range(40):
        g = torch.Generator().manual_seed(i)
        eps = torch.randn(clean.shape, generator=g)
        losses.append(noise.loss(model, noise.flow(), clean, noise.logit_normal(4, 2, g), text, eps).mean())
        opt.zero_grad(), losses[-1].backward()
        if i == 10:
            assert [n for n, p in model.named_parameters() if p.grad is None] == []
        opt.step()
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_errors_say_what_is_wrong(untyped):
    with pytest.raises(ValueError, match="one pair more"):
        UNet(downs=(1, 2, 2))
    with pytest.raises(ValueError, match="divisible by 4"):
        UNet(**SMALL)(torch.randn(1, 4, 2, 6, 6), torch.zeros(1), Cond())
    with pytest.raises(ValueError, match="takes 'b 4"):
        UNet(**SMALL)(torch.randn(1, 3, 2, 8, 8), torch.zeros(1), Cond())
    with pytest.raises(ValueError, match="times are"):
        UNet(**SMALL)(X, torch.zeros(2, 5), Cond())
