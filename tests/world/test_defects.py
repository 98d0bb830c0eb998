"""Defects and degradations keep their records, do nothing at level 0, and are what they say; statistics see what they should."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn

from minivid.world.defects import (
    DEFECTS,
    apply_chain,
    blur,
    corrupt,
    cosine_basis,
    cut_words,
    degrade,
    draw_chain,
    quantise,
    watermark_bar,
    wrong_words,
)  # fmt: skip
from minivid.world.quality import LIMITS, block_motion, cut_frames, detail, difference_hash, duplicate, noise, quality, reject
from minivid.world.render import batch, render
from minivid.world.scene import draw, vary


@pytest.fixture(scope="module")
def clips():
    """12 clips of 64 px in which something moves."""
    scenes = [draw(0, i, "two") for i in range(60)]
    return list(batch([s for s in scenes if all(b.motion != "still" for b in s.bodies)][:12], 64, 16))


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_is_recorded_reproducible_and_absent_at_level_0(clips, defect):
    clip, other = clips[:2]
    spoilt, record = corrupt(clip, defect, 0.7, 5, other)
    again, _ = corrupt(clip, defect, 0.7, 5, other)
    assert (record.defect, record.level, record.seed) == (defect, 0.7, 5)
    assert spoilt.shape == clip.shape and spoilt.abs().max() <= 1 and torch.equal(spoilt, again)
    assert (spoilt - clip).abs().mean() > 1e-3
    same, none = corrupt(clip, defect, 0.0, 5, other)
    assert torch.equal(same, clip) and none.level == 0
    if record.at:  # up to then nothing has happened
        assert torch.equal(spoilt[:, : record.at], clip[:, : record.at])
    mild = corrupt(clip, defect, 0.2, 5, other)[0]
    if defect not in ("cut", "fade", "frozen", "shuffle", "nearest", "teleport", "static", "jitter"):
        assert (mild - clip).abs().mean() < (spoilt - clip).abs().mean()


def test_defects_are_what_they_say(clips):
    clip, other = clips[:2]

    def at(defect, level=1.0):
        return corrupt(clip, defect, level, 3, other)[0]

    assert torch.equal(at("static"), clip[:, :1].expand_as(clip))
    assert not torch.equal(at("shuffle"), clip)
    frames = {tuple(frame.flatten().tolist()) for frame in at("shuffle").transpose(0, 1)}
    assert frames == {tuple(frame.flatten().tolist()) for frame in clip.transpose(0, 1)}
    cut, record = corrupt(clip, "cut", 1.0, 3, other)
    assert 0 < record.at < 16 and torch.equal(cut[:, record.at :], other[:, record.at :])
    fade, record = corrupt(clip, "fade", 1.0, 3, other)
    assert torch.equal(fade[:, 0], clip[:, 0]) and torch.equal(fade[:, -1], other[:, -1])
    half = corrupt(clip, "frozen", 0.5, 3)
    assert half[1].at == 8 and torch.equal(half[0][:, 8:], clip[:, 7:8].expand(-1, 8, -1, -1))
    assert (at("grey").amax(0) - at("grey").amin(0)).max() < 1e-5
    assert torch.allclose(at("inverted"), -clip)
    blocks = at("nearest").unfold(2, 4, 4).unfold(3, 4, 4)
    assert blocks.std((-1, -2)).max() < 1e-6
    assert (at("constant").std((1, 2, 3)) < 1e-6).all()
    bars = at("bars", 0.5)
    assert (bars == -1).all(0).float().mean() == pytest.approx(0.25)
    moved, record = corrupt(clip, "teleport", 0.5, 3)
    assert torch.allclose(moved[:, record.at].mean((1, 2)), clip[:, record.at].mean((1, 2)), atol=1e-5)
    noisy = corrupt(torch.zeros_like(clip), "noise", 0.2, 3)[0]
    assert noisy.std() == pytest.approx(0.1, rel=0.02)


@given(st.integers(0, 1000), st.floats(0, 1))
@settings(max_examples=12, deadline=None)
def test_chains_are_one_draw_per_clip(seed, level):
    chain = draw_chain(level, seed)
    assert chain == draw_chain(level, seed)
    assert chain.shrink in (1, 2, 4) and 0 <= chain.across <= chain.along <= 1.6 * level and chain.noise <= 0.08
    still = render(vary(draw(0, 0), "light", value="bright"), 32, 1).expand(-1, 4, -1, -1).contiguous()
    poor, record = degrade(still, level, seed)
    assert record == chain and poor.shape == still.shape
    quiet = apply_chain(still, draw_chain(level, seed).__class__(**{**vars(chain), "noise": 0.0}), seed)
    assert torch.equal(quiet[:, 0], quiet[:, 3])  # all frames alike: nothing was drawn per frame but grain


def test_degradation_grows_with_its_level(clips):
    losses = [
        np.mean([float((degrade(c, level, i)[0] - c).square().mean()) for i, c in enumerate(clips)])
        for level in (0.0, 0.2, 0.5, 1.0)
    ]
    assert losses[0] == 0 and losses == sorted(losses) and losses[3] > 3 * losses[1]
    marked = degrade(clips[0], 0.0, 0, watermark=True)[0] - clips[0]
    bar = watermark_bar(64, 64)
    assert marked[:, :, bar == 0].abs().max() == 0 and (marked[:, :, bar == 1] > 0).all()


def test_the_cosine_transform_is_scipys():
    block = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    basis = cosine_basis()
    assert torch.allclose(basis @ basis.T, torch.eye(8), atol=1e-6)
    assert np.allclose(basis @ block @ basis.T, dctn(block.numpy(), norm="ortho"), atol=1e-5)


def test_quantising_is_idempotent_and_fine_steps_change_nothing(clips):
    clip = clips[0][:, :2]
    coarse = quantise(clip, 0.2)
    assert torch.allclose(quantise(coarse, 0.2), coarse, atol=1e-4)
    assert torch.allclose(quantise(clip, 1e-5), clip, atol=1e-3) and torch.equal(quantise(clip, 0.0), clip)
    assert quantise(clip[..., :13, :11], 0.2).shape == (3, 2, 13, 11)


def test_blur_keeps_flat_areas_and_has_its_width():
    flat = torch.full((3, 2, 32, 32), 0.25)
    assert torch.allclose(blur(flat, 2.0), flat, atol=1e-5)
    point = torch.zeros(3, 1, 33, 33)
    point[:, :, 16, 16] = 1
    spread = blur(point, 2.0, 1.0, angle=np.pi / 2)[0, 0]
    axis = torch.arange(33) - 16.0
    assert (spread.sum(1) * axis**2).sum() == pytest.approx(4, rel=0.05)  # along the columns: angle 90 degrees
    assert (spread.sum(0) * axis**2).sum() == pytest.approx(1, rel=0.05)


def test_wrong_words_stay_of_their_kind():
    text = "a small red circle moves left and a blue star moves up"
    assert wrong_words(text, 0.0) == (text, 0)
    worse, count = wrong_words(text, 1.0, 3)
    assert count == 7 and sum(a != b for a, b in zip(text.split(), worse.split(), strict=True)) == 7
    rate = np.mean([wrong_words(text, 0.2, i)[1] / 7 for i in range(300)])
    assert abs(rate - 0.2) < 0.03
    assert cut_words(text, 0.5) == "a small red circle moves left" and cut_words(text, 0.0) == "a"


def test_clean_clips_pass_and_statistics_catch_their_defects(clips):
    assert set(quality(clips[0])) == set(LIMITS)
    clean = [reject(clip) for clip in clips]
    assert sum(map(bool, clean)) <= 1
    sees = {
        "static": "change", "flicker": "flicker", "cut": "cuts", "blur": "detail", "noise": "noise", "bars": "border",
        "over": "clipped", "under": "colour", "grey": "colour", "overlay": "writing", "constant": "sharpness", "random": "noise",
    }  # fmt: skip
    for defect, statistic in sees.items():
        found = [statistic in reject(corrupt(c, defect, 1.0, i, clips[i - 1])[0]) for i, c in enumerate(clips)]
        assert np.mean(found) >= 0.7, (defect, np.mean(found))


def test_cuts_are_found_at_their_frame(clips):
    hits = []
    for i, clip in enumerate(clips):
        assert cut_frames(clip) == []
        cut, record = corrupt(clip, "cut", 1.0, i, clips[i - 1])
        hits.append(cut_frames(cut) == [record.at])
        fade, record = corrupt(clip, "fade", 0.5, i, clips[i - 1])
        hits.append(any(abs(at - record.at - 2.5) <= 3 for at in cut_frames(fade)))
    assert np.mean(hits) > 0.75


def test_hashes_find_the_same_clip_again(clips):
    hashes = [difference_hash(clip) for clip in clips]
    for i, clip in enumerate(clips):
        assert duplicate(hashes[i], difference_hash(corrupt(clip, "duplicate", 0.3, i)[0]))
    others = [duplicate(hashes[i], hashes[j]) for i in range(len(clips)) for j in range(i)]
    assert np.mean(others) < 0.1


def test_noise_and_detail_estimates(clips):
    generator = torch.Generator().manual_seed(0)
    flat = torch.full((4, 64, 64), 0.5)
    for sigma in (0.02, 0.1):
        assert noise(flat + sigma * torch.randn(flat.shape, generator=generator)) == pytest.approx(sigma, rel=0.1)
    wave = torch.arange(64).float()
    assert detail(torch.sin(wave * 2 * np.pi * 4 / 64).expand(1, 64, 64)) < 1e-6
    assert detail(torch.sin(wave * 2 * np.pi * 24 / 64).expand(1, 64, 64)) > 1 - 1e-6


def test_block_motion_finds_a_shift():
    frame = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    vectors, error = block_motion(frame, frame.roll((1, -3), (1, 2)))
    assert (vectors[0, 1:3, 1:3] == -3).all() and (vectors[1, 1:3, 1:3] == 1).all() and error[1:3, 1:3].max() < 1e-3
    still, _ = block_motion(torch.zeros(3, 32, 32), torch.zeros(3, 32, 32))
    assert (still == 0).all()


def test_clear_errors(clips):
    with pytest.raises(ValueError, match="Unknown defect 'mould'.*blur"):
        corrupt(clips[0], "mould")
    with pytest.raises(ValueError, match=r"level in \[0, 1\], got 2.0"):
        corrupt(clips[0], "blur", 2.0)
    with pytest.raises(ValueError, match="pass other="):
        corrupt(clips[0], "cut")
    with pytest.raises(ValueError, match="one clip"):
        corrupt(clips[0][:1], "blur")
    with pytest.raises(ValueError, match="divisible"):
        degrade(clips[0][..., :30, :31], 1.0)
    with pytest.raises(ValueError, match="rate"):
        wrong_words("a", 2.0)
    with pytest.raises(ValueError, match="level"):
        draw_chain(-1.0)
