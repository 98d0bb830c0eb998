"""Pictures of codebooks at work: what is said agrees with what is drawn, films are small, wrong input is refused."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from minivid.lab import books


def looks(k=6, n=20, steps=3, used=2, d=2, seed=0):
    dice = torch.Generator().manual_seed(seed)
    table, x = torch.randn(k, d, generator=dice), torch.randn(n, d, generator=dice)
    age = lambda i: torch.cat([torch.zeros(used), torch.full((k - used,), i + 1.0)])
    return [SimpleNamespace(step=10 * i, x=x, table=table + i, age=age(i)) for i in range(steps)]


def test_it_says_what_it_shows_at_each_look():
    both = {"one": looks(), "other": looks(used=5, seed=1)}
    last, first = books.picture(both), books.picture(both, 0)
    assert last.alt == "Step 20. Codes in use: one 2 of 6, other 5 of 6." and first.alt.startswith("Step 0.")
    assert repr(last) == "codebooks one, other" and last.image.size == first.image.size
    assert last.png != first.png and last.png == books.picture(both).png
    assert books.picture({"one": looks()}).width < last.width


def test_a_film_shows_every_look_and_only_where_asked():
    both = {"one": looks(), "other": looks(seed=1)}
    assert books.picture(both).webp == b"" == books.picture(both, 0, film=True).webp
    film = books.picture(both, film=True)
    assert len(film._film()) == 3 and 1_000 < len(film.webp) < 60_000
    assert len(books.picture({"one": looks(steps=40)}, film=True)._film()) == books.FRAMES


def test_a_picture_of_few_colours_is_stored_as_such_and_unchanged():
    both = {"one": looks(), "other": looks(used=5, seed=1)}
    picture = books.picture(both)
    read = Image.open(io.BytesIO(picture.png))
    assert read.mode == "P" and np.array_equal(np.asarray(read.convert("RGB")), np.asarray(picture.image))
    assert len(picture.png) < 60_000


def test_refusals():
    with pytest.raises(ValueError, match="got none"):
        books.picture({})
    with pytest.raises(ValueError, match="got 3 of one, 2 of other"):
        books.picture({"one": looks(), "other": looks(steps=2)})
    with pytest.raises(ValueError, match="with d = 2"):
        books.picture({"one": looks(d=3)})
