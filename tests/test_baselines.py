"""The rivals: each has the property that its paper stands on, and every method runs as a command."""

import numpy as np
import pytest
import torch
from conftest import TINY, ellipses, make_dataset, ok, run
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle

import data
import distill
import noise
from evaluate import psnr_ssim
from experiments import baselines


def small_network(channels=4):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, channels, 5, padding=2), torch.nn.Tanh(), torch.nn.Conv2d(channels, 1, 5, padding=2)
    ).double()


def test_noise2self_never_sees_the_pixel():
    """The J-invariant prediction of a pixel has no gradient with respect to it, in corners too, for any network."""
    y = torch.rand(1, 1, 12, 13, dtype=torch.double, requires_grad=True)
    out = baselines.noise2self(small_network(), y, 4)
    for i, j in [(0, 0), (5, 7), (11, 12), (0, 12)]:
        (gradient,) = torch.autograd.grad(out[0, 0, i, j], y, retain_graph=True)
        assert gradient[0, 0, i, j] == 0 and (gradient != 0).sum() > 20


def test_noise2self_loss_is_the_true_one_plus_the_noise():
    """Proposition 1 of Batson & Royer: for independent noise |f(y) - y|^2 = |f(y) - x|^2 + |y - x|^2 on average."""
    x = torch.from_numpy(ellipses(np.random.default_rng(0), 4, 256, 256)[:, None]).double()
    y = x + 0.1 * torch.randn(x.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    network = small_network()
    with torch.no_grad():
        found = np.mean([float(baselines.noise2self_loss(network, y, 4, k)) for k in range(16)])
        error = 100 * (baselines.noise2self(network, y, 4) - x).square().mean()
    assert abs(found - float(error) - 100 * float((y - x).square().mean())) < 0.01 * found


def test_neighbours_share_a_side_of_their_cell():
    first, second = baselines.neighbors(64, 49, np.random.default_rng(0))
    assert first.shape == second.shape == (32, 24)
    (r1, c1), (r2, c2) = (np.divmod(index.numpy(), 49) for index in (first, second))
    assert ((r1 // 2 == r2 // 2) & (c1 // 2 == c2 // 2)).all() and (abs(r1 - r2) + abs(c1 - c2) == 1).all()
    assert (r1 // 2 == np.arange(32)[:, None]).all() and (c1 // 2 == np.arange(24)).all()
    kinds, counts = np.unique(np.stack([r1 % 2, c1 % 2, r2 % 2, c2 % 2], -1).reshape(-1, 4), axis=0, return_counts=True)
    assert len(kinds) == 8 and counts.min() > 60  # of 768 / 8 = 96


def test_neighbor2neighbor_loss_pixel_by_pixel():
    """Against Eq. 10 written out as loops."""
    network, y = small_network(), torch.rand(2, 1, 6, 8, dtype=torch.double)
    first, second = baselines.neighbors(6, 8, np.random.default_rng(1))
    with torch.no_grad():
        loss = baselines.neighbor2neighbor_loss(network, y, first, second, 1.7)
        denoised, half = network(y), torch.zeros(2, 1, 3, 4, dtype=torch.double)
        for i, j in np.ndindex(3, 4):
            half[:, :, i, j] = y[:, :, first[i, j] // 8, first[i, j] % 8]
        out, fidelity, regular = network(half), 0, 0
        for b, i, j in np.ndindex(2, 3, 4):
            (r1, c1), (r2, c2) = divmod(int(first[i, j]), 8), divmod(int(second[i, j]), 8)
            d = float(out[b, 0, i, j] - y[b, 0, r2, c2])
            fidelity += d**2
            regular += (d - float(denoised[b, 0, r1, c1] - denoised[b, 0, r2, c2])) ** 2
    assert abs(float(loss) - 100 * (fidelity + 1.7 * regular) / 24) < 1e-5 * float(loss)  # float32 inside


def test_neighbor2neighbor_has_the_supervised_minimum():
    """On a flat image in white noise the mean image has the smallest loss of all flat predictions."""
    y = 0.5 + 0.1 * torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    first, second = baselines.neighbors(128, 128, np.random.default_rng(0))
    levels = np.linspace(0.4, 0.6, 21)
    losses = [
        float(baselines.neighbor2neighbor_loss(lambda z, v=v: torch.full_like(z, v), y, first, second, 1.0))
        for v in levels
    ]
    assert abs(levels[np.argmin(losses)] - 0.5) < 0.011


@pytest.mark.parametrize("h, w", [(16, 16), (37, 53)])
def test_unet_keeps_the_size(h, w):
    assert baselines.N2NUNet(width=4)(torch.rand(2, 1, h, w)).shape == (2, 1, h, w)


def test_calibration_finds_the_strength():
    """Without the clean image it comes within 2 dB of the best strength with it, of strengths 15 dB apart.

    The loss of the J-invariant denoiser is flat near its minimum, which is not quite that of the denoiser itself.
    """
    rng = np.random.default_rng(0)
    x = ellipses(rng, 1, 128, 128)[0]
    y = noise.add(x, "gaussian", 0.05, 0, rng)
    strengths = 0.05 * 2 ** np.arange(-2, 2.5, 0.25)
    best = {
        "tv": max(psnr_ssim(denoise_tv_chambolle(y, weight=2 * s), x)[0] for s in strengths),
        "nlm-calibrated": max(
            psnr_ssim(denoise_nl_means(y, patch_size=5, patch_distance=6, h=s, fast_mode=True), x)[0] for s in strengths
        ),
    }
    for method, score in best.items():
        assert psnr_ssim(baselines.calibrated(method, y), x)[0] > score - 2
    assert psnr_ssim(baselines.calibrated("wavelet", y), x)[0] > psnr_ssim(y, x)[0] + 2


@pytest.mark.parametrize("method", ["noise2self", "nei2nei"])
def test_trains_predicts_and_resumes(tmp_path, method):
    make_dataset(tmp_path / "knee.h5")
    flags = ["--data", "knee.h5", "--method", method, *TINY["distill"]]
    ok("experiments.baselines", *flags, cwd=tmp_path)
    ok("experiments.baselines", *flags, "--stop-at", "2", "--model", "b.pt", "--out", "b.h5", cwd=tmp_path)
    rest = ["--data", "knee.h5", "--method", method, "--resume", "--model", "b.pt", "--out", "b.h5"]
    ok("experiments.baselines", *rest, cwd=tmp_path)
    one, other = (data.read_volumes(tmp_path / name, "pred") for name in (f"{method}_out.h5", "b.h5"))
    assert all((one[name] == other[name]).all() for name in one)
    wrong = run("bsn", "--data", "knee.h5", "--predict", "--model", "b.pt", cwd=tmp_path)
    assert wrong.returncode == 2 and f"a checkpoint of {method}, not of bsn" in wrong.stderr


@pytest.mark.parametrize("method", ["noise2self", "nei2nei"])
def test_published_settings_run(tmp_path, method):
    make_dataset(tmp_path / "knee.h5")
    flags = ["--preset", "paper", "--width", "4", "--steps", "2", "--batch", "1", "--crop", "32"]
    ok("experiments.baselines", "--data", "knee.h5", "--method", method, *flags, cwd=tmp_path)
    ok("experiments.baselines", "--data", "knee.h5", "--method", method, "--resume", "--steps", "3", cwd=tmp_path)


def test_schedules():
    assert [baselines.halved(step, 10) for step in range(11)] == [
        factor for factor in (1, 0.5, 0.25, 0.125, 0.0625) for _ in range(2)
    ] + [0.0625]
    assert baselines.SCHEDULES["constant"](7, 10) == 1


def test_fast_is_the_student_s():
    """Preset `fast` compares ways of training: network, optimizer and number of steps are those of distill.py."""
    for preset in baselines.PRESETS.values():
        own = preset["fast"]
        shared = {k: v for k, v in distill.PRESETS["fast"].items() if k in own and k != "crop"}
        assert len(shared) == 11 and shared == {k: own[k] for k in shared}


def test_wrong_flags_are_refused(tmp_path):
    make_dataset(tmp_path / "knee.h5")
    done = run("experiments.baselines", "--data", "knee.h5", "--method", "tv", "--sigma", "0.1", cwd=tmp_path)
    assert done.returncode == 2 and "--sigma and --noise are for --method nlm" in done.stderr
