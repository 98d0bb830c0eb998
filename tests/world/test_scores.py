"""Scores against well-known libraries, closed forms and hand values."""

import math

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from sklearn import metrics

from minivid.world import pan, scores


def pair(seed=0, shape=(2, 3, 4, 24, 20)):
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(shape, generator=g) * 2 - 1
    return a, (a + 0.3 * torch.randn(shape, generator=g)).clamp(-1, 1)


def test_psnr():
    a, b = pair()
    from torchmetrics.functional.image import peak_signal_noise_ratio

    for i in range(2):
        expected = peak_signal_noise_ratio(a[i], b[i], data_range=2.0)
        torch.testing.assert_close(scores.psnr(a, b)[i], expected)
    zero = torch.zeros(3, 2, 8, 8)
    assert scores.psnr(zero, zero + 0.2) == pytest.approx(20, abs=1e-4), "an error of a tenth of the range"
    assert scores.psnr(zero, zero) == 100


@pytest.mark.parametrize(("window", "sigma"), [(11, 1.5), (7, 0.9)])
def test_ssim(window, sigma):
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = pair(1)
    ours, edge = scores.ssim(a, b, window, sigma), window // 2
    for i in range(2):
        x, y = a[i].transpose(0, 1), b[i].transpose(0, 1)
        _, full = structural_similarity_index_measure(x, y, sigma=sigma, data_range=2.0, return_full_image=True)
        expected = full[..., edge:-edge, edge:-edge].mean()  # it pads by reflection, we keep whole windows only
        torch.testing.assert_close(ours[i], expected, atol=1e-5, rtol=1e-4)
    assert torch.allclose(scores.ssim(a, a, window), torch.ones(2)) and (ours < 0.95).all()
    with pytest.raises(ValueError, match="odd and at most 20"):
        scores.ssim(a, b, 21)


def test_gradient_psnr_sees_edges_only():
    a, b = pair(2)
    torch.testing.assert_close(scores.gradient_psnr(a * 0.5, a * 0.5 + 0.3), torch.full((2,), 100.0))
    hand = torch.zeros(3, 1, 2, 2)
    other = hand.clone()
    other[:, :, 0, 0] = 1.0  # two of the four differences are wrong by 1
    assert scores.gradient_psnr(hand, other) == pytest.approx(10 * math.log10(4 / 0.5), abs=1e-4)


def test_vde_hand_values():
    falling = [1 - 0.05 * i for i in range(10)]
    assert scores.vde(falling) == pytest.approx(8.25)
    last, second = [1.0] * 9 + [0.5], [1.0, 0.5] + [1.0] * 8
    assert scores.vde(last) == pytest.approx(0.5) and scores.vde(last, log=True) == 0
    assert scores.vde(second) == pytest.approx(4.5)
    assert scores.vde([1.0]) == 0 and scores.vde([0.0, 1.0]) == math.inf and scores.vde([3.0] * 10) == 0
    assert scores.vde([7 * m for m in falling]) == pytest.approx(8.25)
    means = scores.chunk_means(torch.arange(25.0), 10)
    assert means.tolist() == [0.5 + 2 * i for i in range(10)]


def test_frechet(untyped):
    g = np.random.default_rng(0)
    a = torch.from_numpy(g.normal(size=(4000, 5)))
    b = torch.from_numpy(g.normal(size=(4000, 5)) * [1, 2, 1, 1, 0.5] + [0, 0, 3, 0, 0])
    exact = 9 + (2 - 1) ** 2 + (0.5 - 1) ** 2
    assert scores.frechet(a, b) == pytest.approx(exact, rel=0.05)
    assert scores.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert scores.frechet(a[:, :1], b[:, 2:3]) == pytest.approx(9, rel=0.1)
    for wrong, message in ((b[:300], "same n"), (b[:, :4], "features")):
        with pytest.raises(ValueError, match=message):
            scores.frechet(a, wrong)
    with pytest.raises(ValueError, match="n >= 256"):
        scores.frechet(a[:100], b[:100])
    with pytest.raises(ValueError, match="NaN"):
        scores.frechet(a, b * float("nan"))


def test_frechet_against_torchmetrics_formula():
    from torchmetrics.image.fid import _compute_fid

    g = torch.Generator().manual_seed(3)
    mix = torch.randn(6, 6, generator=g, dtype=torch.float64)
    a, b = torch.randn(2, 500, 6, generator=g, dtype=torch.float64)
    b = b @ mix
    expected = _compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert scores.frechet(a, b) == pytest.approx(float(expected), rel=1e-5)


def test_consistency():
    still = torch.ones(5, 3)
    assert scores.consistency(still) == pytest.approx(1)
    turning = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert scores.consistency(turning) == pytest.approx((0 + 0 + 0 + 1) / 4)
    assert scores.consistency(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == 0, "negative cosines count as none"


def test_content_and_motion_are_apart():
    g = torch.Generator().manual_seed(0)
    frames, path = torch.randn(6, 4, generator=g), torch.stack((torch.arange(6.0), torch.zeros(6)), 1)
    order = torch.tensor([5, 4, 3, 2, 1, 0])
    content, motion = scores.content_and_motion(frames[order], frames, path[order], path)
    assert content == pytest.approx(0, abs=1e-5) and motion == pytest.approx(2)
    content, motion = scores.content_and_motion(frames + 1, frames, path, path)
    assert content > 0.5 and motion == 0


def test_sharpness_falls_with_blur():
    clip = pan("china", 48, 3, (0.0, 0.0))[0]
    kernel = torch.ones(3, 1, 1, 3, 3) / 9
    blurred = torch.nn.functional.conv3d(clip[None], kernel, groups=3, padding=(0, 1, 1))[0]
    inner, soft = clip[..., 2:-2, 2:-2], blurred[..., 2:-2, 2:-2]
    assert scores.sharpness(soft) < 0.6 * scores.sharpness(inner)
    assert scores.laplacian_variance(soft) < 0.3 * scores.laplacian_variance(inner)
    ramp = torch.linspace(-1, 1, 9).expand(3, 1, 8, 9)
    assert scores.laplacian_variance(ramp) == pytest.approx(0, abs=1e-10)
    assert scores.sharpness(ramp) == pytest.approx(0.25**2 * 8 * 8 / (8 * 8 + 7 * 9), rel=1e-4)


def test_laplacian_against_scipy():
    from scipy.ndimage import laplace

    a, _ = pair(4)
    picture = ((a[0, :, 0].mean(0) + 1) / 2).numpy()
    expected = laplace(picture, mode="nearest")[1:-1, 1:-1].var()
    assert scores.laplacian_variance(a[0, :, :1]) == pytest.approx(expected, rel=1e-4)


def test_edge_f1():
    clip, moved, far = (torch.full((3, 1, 16, 16), -1.0) for _ in range(3))
    clip[..., 8:], moved[..., 9:], far[..., 12:] = 1.0, 1.0, 1.0
    assert scores.edge_f1(clip, clip) == 1 and scores.edge_f1(clip, moved) == 1, "one pixel is within reach"
    assert scores.edge_f1(clip, moved, reach=0) < 0.1 and scores.edge_f1(clip, far) < 0.3
    flat = torch.zeros_like(clip)
    assert scores.edge_f1(flat, flat) == 1 and scores.edge_f1(clip, flat) == 0


def test_warp_error():
    clip, flow = pan("flower", 32, 5, (2.0, 1.0), seed=1)
    assert scores.warp_error(clip, flow) < 1e-10
    wrong = scores.warp_error(clip, torch.zeros_like(flow))
    assert wrong > 1e-4
    hidden = torch.zeros(5, 32, 32, dtype=torch.bool)
    assert scores.warp_error(clip, flow * 0, hidden) == 0, "what is not seen does not count"
    both = scores.warp_error(torch.stack((clip, clip)), torch.stack((flow, flow * 0)))
    torch.testing.assert_close(both[1], wrong)


def test_seam_ratio():
    truth = torch.zeros(3, 9, 4, 4)
    even = truth + torch.arange(9.0).view(1, 9, 1, 1) / 20
    assert scores.seam_ratio(even, truth, 3) == pytest.approx(1, abs=1e-3)
    jumps = even + (torch.arange(9) // 3).view(1, 9, 1, 1) / 10
    assert scores.seam_ratio(jumps, None, 3) == pytest.approx(3, abs=1e-3)
    assert scores.seam_ratio(truth, truth, 4) == 1


def test_spectra():
    a, b = pair(5, (3, 2, 16, 16))
    torch.testing.assert_close(scores.power(a).mean(), a.square().mean())
    rings = [4 / 10 ** (scores.band_psnr(a, b, lo, hi) / 10) for lo, hi in ((0, 0.25), (0.25, 0.7), (0.7, 2))]
    torch.testing.assert_close(sum(rings), (a - b).square().mean())
    wave = torch.cos(2 * math.pi * torch.arange(16) * 6 / 16).expand(3, 2, 16, 16)  # 0.75 of Nyquist
    assert scores.high_share(wave) == pytest.approx(1, abs=1e-5)
    spectrum = scores.radial_spectrum(wave, 8)
    assert spectrum.argmax() == 6 and spectrum.shape == (8,)
    assert scores.band_psnr(wave * 0, wave, 0, 0.5) == 100


def test_background():
    plate = torch.zeros(3, 4, 8, 8)
    clip, covered = plate.clone(), torch.zeros(4, 8, 8)
    clip[:, :, :2, :2], covered[:, :2, :2] = 1.0, 1.0
    quality, flicker = scores.background(clip, plate, covered)
    assert (quality == 100).all() and flicker == 0
    clip[:, 1] += 0.2
    quality, flicker = scores.background(clip, plate, covered)
    assert quality.tolist() == pytest.approx([100, 20, 100, 100], abs=1e-3)
    assert flicker == pytest.approx(0.2 * 3**0.5 / 4)


def test_brightness_template_diversity_best_of():
    g = torch.Generator().manual_seed(0)
    data = torch.rand(400, 1, 1, 1, 1, generator=g).expand(400, 3, 1, 4, 4) * 2 - 1
    assert scores.brightness_ratio(data / 2, data) == pytest.approx(0.25)
    mark = torch.randn(3, 8, 8, generator=g)
    clip = mark[:, None].expand(3, 2, 8, 8) * 0.1 + 0.4
    assert scores.template_correlation(clip, mark) == pytest.approx(1, abs=1e-5)
    assert abs(scores.template_correlation(torch.randn(3, 2, 8, 8, generator=g), mark)) < 0.3
    assert scores.diversity(torch.zeros(4, 3, 2, 4, 4)) == 0
    assert scores.diversity(torch.tensor([[0.0, 0.0], [1.0, 1.0]])) == pytest.approx(1)
    truth = torch.zeros(2, 3, 2, 4, 4)
    samples = torch.stack([truth + 0.2, truth + 0.02, truth + 0.6], 1)
    assert scores.best_of(samples, truth).tolist() == pytest.approx([40, 40], abs=1e-3)


def test_codes():
    codes = torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]])
    assert scores.usage(codes, 8) == 0.5 and scores.entropy(codes, 8) == 2 and scores.perplexity(codes, 8) == 4
    assert scores.perplexity(torch.zeros(50, dtype=torch.long), 8) == 1
    with pytest.raises(ValueError, match=r"codes in \[0, 2\]"):
        scores.usage(codes, 3)
    with pytest.raises(ValueError, match="at least 20000"):
        scores.perplexity(codes, 8, least=20000)
    assert scores.bits_per_pixel([(5, 8, 8), (1, 4, 4)], [1024, 16], (17, 32, 32)) == (3200 + 64) / (17 * 1024)


def test_mutual_information():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(8, (2, 2000), generator=g)
    oracle = metrics.mutual_info_score(a.numpy(), b.numpy()) / math.log(2)
    assert 0.01 < oracle and abs(scores.mutual_information(a, b)) < 0.01, "unrelated labels look related"
    assert scores.mutual_information(a, (a * 3) % 8) == pytest.approx(3, abs=0.05)


def test_rankings():
    g = np.random.default_rng(0)
    values, labels = torch.from_numpy(g.integers(0, 20, 300).astype(np.float32)), torch.from_numpy(g.random(300) < 0.3)
    assert scores.auroc(values, labels) == pytest.approx(metrics.roc_auc_score(labels, values))
    smooth = torch.from_numpy(g.normal(size=300).astype(np.float32))
    expected = metrics.average_precision_score(labels, smooth)
    assert scores.average_precision(smooth, labels) == pytest.approx(expected)
    table = torch.tensor([[0.9, 0.5, 0.1], [0.5, 0.5, 0.5], [0.2, 0.9, 0.3]])
    target = torch.tensor([0, 1, 2])
    assert scores.recall_at(table, target) == pytest.approx(1 / 3), "a constant row is no hit"
    assert scores.recall_at(table, target, 2) == pytest.approx(2 / 3) and scores.recall_at(table, target, 3) == 1
    with pytest.raises(ValueError, match="both labels"):
        scores.auroc(values, labels & False)


def test_iou():
    a, b = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(2, 4, 4, dtype=torch.bool)
    a[0, :2], b[0, 1:3] = True, True
    assert scores.iou(a, b).tolist() == pytest.approx([1 / 3, 1])


def test_bootstrap_is_paired():
    g = torch.Generator().manual_seed(0)
    hard = torch.randn(60, generator=g) * 5
    mean, low, high = scores.bootstrap(hard + 0.2 + 0.1 * torch.randn(60, generator=g) - hard)
    assert low < mean < high and low > 0.1 and high < 0.3
    x = torch.randn(400, generator=g)
    mean, low, high = scores.bootstrap(x)
    assert high - low == pytest.approx(2 * 1.96 * float(x.std()) / 20, rel=0.1)
    assert scores.bootstrap(x) == scores.bootstrap(x)
    with pytest.raises(ValueError, match="finite"):
        scores.bootstrap([1.0, float("nan")])


def test_correlations():
    g = np.random.default_rng(0)
    a = g.normal(size=50)
    b = a**3 + 0.1 * g.normal(size=50)
    assert scores.pearson(a, b) == pytest.approx(scipy_stats.pearsonr(a, b)[0])
    assert scores.spearman(a, b) == pytest.approx(scipy_stats.spearmanr(a, b)[0])
    with pytest.raises(ValueError, match="constant"):
        scores.pearson(a, a * 0)


def test_scores_refuse(untyped):
    a, _ = pair()
    for other, error, message in (
        (a[:, :, :2], ValueError, "one shape"),
        ((a * 127).byte(), TypeError, "uint8"),
        (a * float("nan"), ValueError, "NaN"),
    ):
        with pytest.raises(error, match=message):
            scores.psnr(a, other)
