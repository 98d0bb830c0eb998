"""From captions to clips and films: each sample by itself, the past untouched by the future, clear refusals."""

import pytest
import torch

from minivid.core import sample, weights
from minivid.core.cache import Cache
from minivid.core.model import VideoModel

SHORT = dict(steps=2, guidance=2.0)


@pytest.fixture(scope="module")
def model():
    """A small block-causal model whose zero-initialised gates were opened."""
    torch.manual_seed(0)
    model = VideoModel(channels=4, d=32, depth=2, heads=2, block=2).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.1 * torch.randn(p.shape))
    return model


A, B = ["a red circle", "a blue square", "a green star"], ["a red star", "a red star", "nothing"]


def test_noise_belongs_to_a_sample():
    assert torch.equal(sample.start(3, (2, 1, 2, 2), 7)[:2], sample.start(2, (2, 1, 2, 2), 7))
    assert not torch.equal(*sample.start(2, (2, 1, 2, 2), 7))


def test_a_film_is_the_same_alone_and_among_others(model):
    both = sample.film([A, B], None, Cache(), model=model, **SHORT)
    assert both.shape == (2, 4, 6, 8, 8)
    assert torch.allclose(both[:1], sample.film([A], None, Cache(), model=model, **SHORT), atol=1e-5)


def test_a_later_caption_changes_nothing_before_it(model):
    whole, other = (sample.film([[*A[:2], last]], None, Cache(), model=model, **SHORT) for last in A[1:])
    assert torch.equal(whole[:, :, :4], other[:, :, :4])
    assert (whole[:, :, 4:] - other[:, :, 4:]).abs().max() > 1e-3


def test_a_film_goes_on_from_known_chunks(model):
    whole = sample.film([A], None, Cache(), model=model, **SHORT)
    on = sample.film([A], whole[:, :, :2], Cache(), model=model, **SHORT)
    assert torch.allclose(on, whole, atol=1e-5)
    forgets = sample.film([A], whole[:, :, :2], None, model=model, **SHORT)
    assert torch.equal(forgets[:, :, :2], whole[:, :, :2]) and (forgets - whole).abs().max() > 1e-3


@pytest.mark.parametrize("captions, known", [([A, A[:2]], 0), ([A], 3)])
def test_films_that_do_not_fit_are_refused(model, captions, known):
    with pytest.raises(ValueError, match="as many chunks each"):
        sample.film(captions, torch.zeros(1, 4, known, 8, 8) if known else None, model=model, **SHORT)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(steps=0), "at least one step"),
        (dict(frames=16), r"1 \+ 4k"),
        (dict(size=30), "multiple of 8"),
        (dict(captions=["a red zebra"]), "zebra"),
    ],
)
def test_clips_that_cannot_be_made_are_refused(wrong, message):
    video, tok = VideoModel(channels=10, d=16, depth=1, heads=1), weights.load("tok-v")
    with pytest.raises(ValueError, match=message):
        sample.generate(**{"captions": ["a red circle"], "model": video, "tokenizer": tok, **wrong})
