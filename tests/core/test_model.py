"""The video transformer: contract of the call, text, guidance, causality by blocks."""

from dataclasses import replace

import pytest
import torch

from minivid.core import text
from minivid.core.model import Cond, Guided, VideoModel
from minivid.core.surgery import parts


def make(block=None, seed=0):
    torch.manual_seed(seed)
    model = VideoModel(4, 32, 2, 2, block=block).eval()
    for p in model.parameters():  # every zero-initialised branch is opened, so that nothing passes because it is off
        torch.nn.init.normal_(p, std=0.08) if p.ndim > 1 else None
    return model


def inputs(b=2, f=4, seed=0):
    dice = torch.Generator().manual_seed(seed)
    words = text.tokens(["a red circle moves left", "a small blue square stays still"] * b, 12)[:b]
    return torch.randn(b, 4, f, 4, 6, generator=dice), torch.rand(b, f, generator=dice), Cond(text=words)


def test_shapes_on_any_grid_and_times_per_clip_or_per_frame():
    model = make()
    for f, h, w in ((1, 2, 2), (4, 4, 6), (7, 8, 2)):
        x = torch.randn(2, 4, f, h, w)
        one = model(x, torch.tensor([0.3, 0.8]), Cond())
        assert one.shape == x.shape
        each = torch.tensor([0.3, 0.8])[:, None].expand(2, f)
        assert torch.equal(one, model(x, each, Cond()))


def test_starts_at_zero():
    x, t, cond = inputs()
    assert VideoModel(4, 32, 2, 2)(x, t, cond).abs().max() == 0


def test_batch_independence_and_determinism():
    model, (x, t, cond) = make(), inputs()
    out = model(x, t, cond)
    assert torch.equal(out, model(x, t, cond))
    torch.testing.assert_close(out[1:], model(x[1:], t[1:], Cond(text=cond.text[1:])), atol=1e-5, rtol=1e-5)


def test_every_parameter_gets_a_gradient():
    model, (x, t, cond) = make(), inputs()
    model(x, t, cond).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert not missing


def test_time_text_and_order_matter():
    model, (x, t, cond) = make(), inputs()
    out = model(x, t, cond)
    assert not torch.allclose(out, model(x, 1 - t, cond))
    assert not torch.allclose(out, model(x, t, cond.null()))
    assert not torch.allclose(out, model(x.flip(2), t.flip(1), cond).flip(2))  # rotary places tell frames apart
    swapped = Cond(text=text.tokens(["a red circle moves right", "a small blue square stays still"], 12))
    assert not torch.allclose(out[0], model(x, t, swapped)[0])
    torch.testing.assert_close(out[1], model(x, t, swapped)[1], atol=1e-5, rtol=1e-5)


def test_padding_says_nothing():
    model, (x, t, cond) = make(), inputs()
    longer = torch.cat([cond.text, torch.zeros(2, 4, dtype=torch.long)], 1)
    torch.testing.assert_close(model(x, t, Cond(text=longer)), model(x, t, cond), atol=1e-5, rtol=1e-5)


def test_blocks_see_the_past_only():
    model, (x, t, cond) = make(block=2), inputs(f=6)
    later = torch.cat([x[:, :, :4], x[:, :, 4:] + 1], 2)
    a, b = model(x, t, cond), model(later, t, cond)
    assert torch.equal(a[:, :, :4], b[:, :, :4]) and not torch.allclose(a[:, :, 4:], b[:, :, 4:])
    early = torch.cat([x[:, :, :2] + 1, x[:, :, 2:]], 2)
    assert not torch.allclose(a[:, :, 2:], model(early, t, cond)[:, :, 2:])
    within = x.clone()
    within[:, :, 1] += 1  # inside a block attention goes both ways
    assert not torch.allclose(a[:, :, 0], model(within, t, cond)[:, :, 0])


def test_places_are_relative():
    """Only differences of places count: a block that begins later gives the same."""
    model, (x, t, cond) = make(), inputs()
    torch.testing.assert_close(model(x, t, Cond(cond.text, start=9.0)), model(x, t, cond), atol=1e-4, rtol=1e-4)


def test_a_caption_a_chunk_reaches_its_own_chunk():
    model, (x, t, cond) = make(block=2), inputs()
    two = torch.stack([cond.text, cond.text.flip(0)], 1)
    out = model(x, t, Cond(text=two))
    same = model(x, t, Cond(text=cond.text[:, None].expand(-1, 2, -1)))
    torch.testing.assert_close(same, model(x, t, cond), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[:, :, :2], same[:, :, :2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out[:, :, 2:], same[:, :, 2:])
    assert torch.equal(Cond(text=two).at(1, 2.0).text, cond.text.flip(0))


def test_guidance():
    model, (x, t, cond) = make(), inputs()
    told, null = model(x, t, cond), model(x, t, cond.null())
    assert torch.equal(Guided(model, 1.0)(x, t, cond), told)
    torch.testing.assert_close(Guided(model, 3.0)(x, t, cond), null + 3 * (told - null), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(Guided(model, 0.0)(x, t, cond), null, atol=1e-5, rtol=1e-5)


def test_guidance_against_something_else_than_the_empty_caption():
    """A negative prompt, or neither the caption nor the given frames: `null` says what the other side is told."""
    model, (x, t, cond) = make(), inputs()
    other = lambda c: replace(c, text=c.text.flip(0))
    told, null = model(x, t, cond), model(x, t, other(cond))
    torch.testing.assert_close(Guided(model, 3.0, other)(x, t, cond), null + 3 * (told - null), atol=1e-4, rtol=1e-4)


def test_rescaled_guidance():
    model, (x, t, cond) = make(), inputs()
    told, plain = model(x, t, cond), Guided(model, 7.0)(x, t, cond)
    assert torch.equal(Guided(model, 7.0, rescale=0.0)(x, t, cond), plain)
    full = Guided(model, 7.0, rescale=1.0)(x, t, cond)
    spread = lambda y: y.flatten(1).std(1)
    torch.testing.assert_close(spread(full), spread(told))
    assert (torch.cosine_similarity(full.flatten(1), plain.flatten(1)) > 1 - 1e-5).all() and (spread(plain) > spread(told)).any()
    torch.testing.assert_close(Guided(model, 7.0, rescale=0.7)(x, t, cond), 0.7 * full + 0.3 * plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(Guided(model, 1.0, rescale=1.0)(x, t, cond), told)


def test_dropped_captions():
    cond = inputs()[2]
    half = cond.drop(torch.tensor([True, False]))
    assert torch.equal(half.text[0], cond.null().text[0]) and torch.equal(half.text[1], cond.text[1])


def test_roles_of_parts():
    found = [role for name, _, role in parts(make()) if name.startswith("trunk")]
    assert all(found.count(role) == 2 for role in ("q", "k", "v", "o", "fc1", "fc2", "block", "cross-q"))


@pytest.mark.usefixtures("untyped")
def test_errors():
    model, (x, t, cond) = make(), inputs()
    with pytest.raises(ValueError, match="'b 4 f h w'"):
        model(x[:, :3], t, cond)
    with pytest.raises(ValueError, match="divisible by 2"):
        model(x[..., :3], t, cond)
    with pytest.raises(ValueError, match="times are"):
        model(x, t[:, :2], cond)


def test_words():
    ids = text.tokens(["A red circle, moves left.", ""], 8)
    assert ids.shape == (2, 8) and ids[1, 0] == text.NULL and (ids[0] > 1).sum() == 5
    with pytest.raises(ValueError, match="'purple'.*nearest known"):
        text.tokens(["a purple circle"])
    with pytest.raises(ValueError, match="at most 3 words, got 5"):
        text.tokens(["a red circle moves left"], 3)


@pytest.mark.usefixtures("untyped")
def test_a_single_string_is_no_list():
    with pytest.raises(TypeError, match="wrap it"):
        text.tokens("a red circle")
