"""Moving digits: known class and path, walls, chance, split by scan."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from minivid.world.digits import digits, draw_digits, render_digits, scans


def test_scans_are_scikit_learns_at_twice_the_size():
    images, labels = scans()
    original = torch.from_numpy(load_digits().images).float() / 16
    assert images.shape == (1797, 16, 16) and labels.tolist() == load_digits().target.tolist()
    assert (torch.nn.functional.avg_pool2d(images[:, None], 2)[:, 0] - original).abs().mean() < 0.05


def test_clips_are_pure_functions_of_the_seed_and_know_their_class():
    clip, labels, centres = digits(0, 5, count=2)
    again = digits(0, 5, count=2)
    assert torch.equal(clip, again[0]) and labels == again[1] and torch.equal(centres, again[2])
    assert clip.shape == (3, 16, 32, 32) and clip.min() >= -1 and clip.max() <= 1 and centres.shape == (2, 16, 2)
    drawn = draw_digits(0, 5, 2)
    assert labels == tuple(int(scans()[1][i]) for i in drawn.scans)
    assert {draw_digits(0, i).labels[0] for i in range(100)} == set(range(10))


def test_splits_share_no_scan():
    train = {draw_digits(0, i).scans[0] for i in range(300)}
    held = {draw_digits(0, i, split="held-out").scans[0] for i in range(300)}
    assert max(train) < 1437 <= min(held)


@pytest.mark.parametrize("stochastic", [False, True])
def test_pixels_follow_the_path_and_stay_in_the_frame(stochastic):
    image_mass = scans()[0]
    axis = torch.arange(16) - 7.5
    for i in range(10):
        one = draw_digits(2, i, 1, stochastic)
        clip = (render_digits([one], 32, 24)[0, 0] + 1) / 2
        centres = one.centres(24)[0] * 32
        assert centres.min() > 7.99 and centres.max() < 24.01
        picture = image_mass[one.scans[0]]
        lean = torch.stack([(picture * axis).sum(), (picture * axis[:, None]).sum()]) / picture.sum()  # of the digit itself
        spot = torch.arange(32) + 0.5
        mass = clip.sum((1, 2))
        found = torch.stack([(clip * spot).sum((1, 2)), (clip * spot[:, None]).sum((1, 2))], -1) / mass[:, None]
        assert (found - centres - lean).abs().max() < 0.15


def test_walls_mirror_or_choose_anew():
    for i in range(20):
        for legs in draw_digits(0, i, 2).paths:
            speeds = [np.hypot(leg.vx, leg.vy) for leg in legs]
            assert len(legs) > 2 and np.allclose(speeds, speeds[0])
        for legs in draw_digits(0, i, 2, stochastic=True).paths:
            speeds = [np.hypot(leg.vx, leg.vy) for leg in legs]
            assert np.std(speeds) > 1e-4


def test_two_digits_are_the_brighter_of_each_and_chunks_join():
    pair = draw_digits(1, 3, 2)
    both = render_digits([pair], 32, 16)
    alone = [
        render_digits([type(pair)(pair.seed, (s,), (n,), (p,))], 32, 16)
        for s, n, p in zip(pair.scans, pair.labels, pair.paths, strict=True)
    ]
    assert torch.equal(both, torch.maximum(*alone))
    assert torch.allclose(render_digits([pair], 32, 4, start=8), both[:, :, 8:12], atol=1e-5)


def test_clear_errors():
    with pytest.raises(ValueError, match="1 or 2 digits, got 3"):
        draw_digits(0, 0, 3)
    with pytest.raises(ValueError, match="Unknown split 'all'"):
        draw_digits(0, split="all")
    with pytest.raises(ValueError, match="size >= 8"):
        render_digits([draw_digits(0)], size=4)
