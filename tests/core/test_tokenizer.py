"""The tokenizer contract: shapes, exact streaming, causality, refusal of bad clips."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivid.core import fit
from minivid.core.baselines.vq import FSQ
from minivid.core.tokenizer import Pix, Stream, Tokenizer


def make(**kw):
    torch.manual_seed(0)
    tok = Tokenizer(channels=4, widths=(8, 16), depths=(1, 1), **kw).eval()
    for end in (tok.encoder.end, tok.decoder.end):  # they begin at 0, and a network that says nothing passes any test
        torch.nn.init.normal_(end.weight, std=0.1)
    return tok


MEMBERS = {
    "per frame": make(time_stride=1),
    "causal": make(time_stride=4),
    "both ways": make(time_stride=4, causal=False),
    "codes": make(time_stride=1, bottleneck=FSQ((4, 4, 4, 4))),
    "pix": Pix(2),
}
each = pytest.mark.parametrize("tok", MEMBERS.values(), ids=MEMBERS)


def clip(f=9, side=16, b=2, seed=0):
    return torch.rand(b, 3, f, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@each
def test_shapes_and_any_size(tok):
    for f, h, w in ((9, 16, 16), (5, 24, 8), (1, 32, 32)):
        x = torch.rand(2, 3, f, h, w) * 2 - 1
        z = tok.encode(x)
        assert z.shape == (2, *tok.latent_shape(f, h, w))
        assert tok.decode(z).shape == x.shape


@each
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_any_chunk_plan_equals_one_shot(tok, cuts):
    """What streams gives in chunks of any plan what one shot gives, encoded and decoded."""
    if not tok.streams:
        with pytest.raises(ValueError):
            tok.encode(clip(8))
        return
    r = tok.time_stride
    x = clip(1 + r * sum(cuts))
    whole = tok.encode(x)
    there, back = Stream(), Stream()
    pieces = x.split([1 + r * cuts[0], *(r * n for n in cuts[1:])], 2)
    parts = [tok.encode(p, stream=there) for p in pieces]
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([tok.decode(p, stream=back) for p in parts], 2), tok.decode(whole), atol=1e-5, rtol=0)


@each
def test_causal_means_the_future_changes_nothing(tok):
    x = clip()
    later = torch.cat([x[:, :, :5], clip(seed=1)[:, :, 5:]], 2)
    a, b = tok.encode(x), tok.encode(later)
    known = tok.latent_shape(5, 16, 16)[1]
    assert torch.equal(a[:, :, :known], b[:, :, :known]) == tok.causal
    assert not torch.equal(a[:, :, known:], b[:, :, known:])


def test_pix_is_exact():
    x = clip()
    assert torch.equal(Pix(4).decode(Pix(4).encode(x)), x)


def test_codes_round_trip_through_indices():
    tok = MEMBERS["codes"]
    z, codes, _ = tok.bottleneck(tok.features(clip()))
    index = codes[0].index
    assert index.shape == z[:, 0].shape and index.min() >= 0 and index.max() < tok.bottleneck.size
    assert torch.equal(tok.bottleneck.lookup(codes), z)


@each
def test_batch_independence_and_gradient(tok):
    x = clip(5)
    torch.testing.assert_close(tok.encode(x)[:1], tok.encode(x[:1]), atol=1e-5, rtol=0)
    x.requires_grad_(True)
    tok.decode(tok.encode(x)).sum().backward()
    assert x.grad.abs().sum() > 0


def test_the_linear_path_begins_at_the_principal_components():
    """Before any training the tokenizer draws what the first components of scikit-learn's PCA draw, and its latents are white."""
    from sklearn.decomposition import PCA

    tok = Tokenizer(channels=4).eval()
    x = clip(9, 32, 8)
    x = torch.nn.functional.avg_pool3d(x, 3, 1, 1)  # something with structure
    tok.begin(x)
    patches = tok._patches(tok._whole(x, None))
    pca = PCA(4, svd_solver="full").fit(patches.flatten(0, 3).numpy())
    flat = patches[:, 1:].flatten(0, 3).numpy()
    want = torch.from_numpy(pca.inverse_transform(pca.transform(flat))).float().clamp(-1, 1)
    drawn = tok._patches(tok.decode(tok.encode(x))[:, :, 1:]).flatten(0, 3)
    torch.testing.assert_close(drawn, want, atol=1e-3, rtol=0)
    z = tok.encode(x)
    assert z.mean((0, 2, 3, 4)).abs().max() < 0.1 and (z.std((0, 2, 3, 4)) - 1).abs().max() < 0.1


def test_settling_gives_unit_variance_and_changes_no_clip():
    tok, x = make(time_stride=4), clip(9, 16, 16)
    before = tok.decode(tok.encode(x))
    tok.settle(x)
    z = tok.encode(x)
    assert z.mean((0, 2, 3, 4)).abs().max() < 1e-4 and (z.std((0, 2, 3, 4)) - 1).abs().max() < 1e-4
    torch.testing.assert_close(tok.decode(z), before, atol=1e-4, rtol=0)


def test_two_processes_draw_the_noise_of_one():
    """The law of `fit`: every process draws for the whole batch and takes its share."""
    tok, x = make(time_stride=4, noise=0.5).train(), clip(5, 16, 1).expand(4, -1, -1, -1, -1)

    def back(rows, rank, world):
        g = fit.draws(0, 3)
        g.rank, g.world = rank, world
        return tok(rows, g)[0]

    whole = back(x, 0, 1)
    assert (whole[0] - whole[1]).abs().max() > 0.01  # there is noise, and each sample has its own
    torch.testing.assert_close(torch.cat([back(x[:2], 0, 2), back(x[2:], 1, 2)]), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad, error, says", [
    (torch.zeros(3, 5, 16, 16), ValueError, "b c f h w"),
    (torch.zeros(1, 4, 5, 16, 16), ValueError, "c = 3"),
    (torch.zeros(1, 3, 5, 16, 16, dtype=torch.uint8), TypeError, "uint8"),
    (torch.full((1, 3, 5, 16, 16), 200.0), ValueError, "200"),
    (torch.full((1, 3, 5, 16, 16), torch.nan), ValueError, "NaN"),
    (torch.zeros(1, 3, 5, 18, 16), ValueError, "divide by 4"),
    (torch.zeros(1, 3, 6, 16, 16), ValueError, "1 \\+ 4k"),
])
@pytest.mark.usefixtures("untyped")
def test_bad_clips_are_refused_in_words(bad, error, says):
    with pytest.raises(error, match=says):
        MEMBERS["causal"].encode(bad)


@pytest.mark.usefixtures("untyped")
def test_bad_latent_is_refused():
    with pytest.raises(ValueError, match="'b 4 f h w', got"):
        MEMBERS["causal"].decode(torch.zeros(1, 5, 2, 4, 4))
