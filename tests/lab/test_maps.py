"""Pictures of attention: every weight at its place, what isn't kept is pale, frames and bars say what they are given."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from minivid.lab import maps
from minivid.lab.canvas import DENSITY, PALETTE, rgb

GRID = (3, 2, 4)


def weights(n=24, seed=0):
    x = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
    return x / x.sum(-1, keepdim=True)


def test_a_square_shows_every_weight_and_washes_out_what_is_not_kept():
    x = weights()
    x[3, 7] = 1.0
    kept = torch.ones(24, 24, dtype=torch.bool)
    kept[10:] = False
    plain, washed = maps.square(x, side=48), maps.square(x, kept.float(), 48)
    assert plain.shape == washed.shape == (48 * DENSITY, 48 * DENSITY, 3)
    bright = plain[:: 2 * DENSITY, :: 2 * DENSITY].astype(int)
    assert bright[3, 7].tolist() == [253, 231, 55]  # the end of cividis
    assert np.array_equal(washed[: 20 * DENSITY], plain[: 20 * DENSITY]) and washed[20 * DENSITY :].min() >= 255 * 4 // 5


def test_a_thin_diagonal_survives_shrinking():
    assert (maps.square(torch.eye(512), side=64)[::DENSITY, ::DENSITY, 0].diagonal() > 200).all()


def test_a_volume_has_a_tile_a_frame_and_a_box_at_the_query():
    x = torch.zeros(24)
    x[1 * 8 + 1 * 4 + 2] = 1.0  # frame 1, row 1, column 2
    tiles = maps.volume(x, GRID, query=2 * 8 + 3, side=40)
    assert len(tiles) == 3 and tiles[0].shape == (20 * DENSITY, 40 * DENSITY, 3)
    step, half = 10 * DENSITY, 5 * DENSITY
    assert tiles[1][step + half, 2 * step + half].tolist() == [253, 231, 55]
    assert tiles[2][0, 3 * step].tolist() == [0, 0, 0] and tiles[2][DENSITY, 3 * step + DENSITY].tolist() == [255, 255, 255]
    assert (tiles[0] == tiles[0][0, 0]).all()
    with pytest.raises(ValueError, match="weight for each of 3 x 2 x 4 tokens, got 23"):
        maps.volume(x[1:], GRID, 0)


def test_a_head_on_one_page():
    x, clip = weights(), torch.zeros(3, 4, 32, 32)
    picture = maps.head(
        "layer 0, head 1", {"a": maps.square(x)}, {"one query": maps.volume(x[0], GRID, 0)}, {"clip": clip}, ["half the work"]
    )
    assert picture.alt == "layer 0, head 1. half the work" and picture.width <= 820
    assert Image.open(io.BytesIO(picture.png)).size == picture.image.size


KINDS = [["full", "skip"], ["skip", "stripe"]]
COLOURS = {"full": "black", "skip": "sky", "stripe": "purple"}


def test_a_board_frames_heads_in_the_colours_of_their_kinds():
    x = torch.stack([weights(seed=i) for i in range(4)]).view(2, 2, 24, 24)
    plain = maps.board(x, KINDS, COLOURS, "heads")
    assert plain.alt == "heads: layer 0: full, skip; layer 1: skip, stripe."
    for colour in COLOURS.values():
        assert (np.asarray(plain.image) == rgb(colour)).all(-1).any(), colour
    assert not (np.asarray(plain.image) == rgb(PALETTE["blue"])).all(-1).any()
    bars = {"skip": (1.0, 0.0), "multi-diagonal": (0.2, 0.1)}
    sides = maps.bars(bars, ("error", "price"), 0.4), maps.curve([1, 0.5], [40, 20], 1, "share", "dB")
    full = maps.board(x, KINDS, COLOURS, chosen=(0, 1), sides=sides)
    assert full.width > plain.width and (np.asarray(full.image) == rgb(PALETTE["blue"])).all(-1).any()
    with pytest.raises(ValueError, match="a kind for each"):
        maps.board(x, [["full"]], COLOURS)


def test_a_page_puts_pieces_side_by_side_and_rows_under_one_another():
    one, two = maps.bars({"a": [0.5]}, limit=0.8), maps.curve([1, 2], [3, 4], 0, "x", "y")
    picture = maps.page("caption", [[one, two], [two]], ["a fact"])
    head = maps.page("caption", [], ["a fact"]).image.height
    assert picture.image.size == (one.width + two.width, head + one.height + two.height) and picture.alt == "caption. a fact"
    pixels = np.asarray(picture.image)
    assert np.array_equal(pixels[head : head + one.height, : one.width], np.asarray(one))
    assert np.array_equal(pixels[head + one.height :, : two.width], np.asarray(two))
