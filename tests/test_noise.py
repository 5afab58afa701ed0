"""The noises of Sec. 4.1: power, formulas, correlation, one stored realisation."""

import json

import numpy as np
import pytest
import torch
from conftest import make_dataset, ok

import data
import noise
from lib import crops

CASES = [
    ("gaussian", 6 / 255, lambda x: (6 / 255) ** 2 + 0 * x),
    ("poisson", 200, lambda x: x / 200),
    ("gamma", 100, lambda x: x**2 / 100),
]


@pytest.mark.parametrize("kind, level, variance", CASES)
@pytest.mark.parametrize("intensity", [0.183, 0.7])
def test_mean_and_variance(kind, level, variance, intensity):
    x = np.full((512, 512), intensity)
    n = noise.add(x, kind, level, 0, np.random.default_rng(0)).astype(float) - x
    assert abs(n.mean()) < 5 * np.sqrt(variance(intensity)) / 512
    assert n.var() == pytest.approx(variance(intensity), rel=0.015)


@pytest.mark.parametrize("correlation", [0, 0.5, 1.2])
def test_noisy_psnr_of_the_paper(correlation):
    """Every Gaussian column of Tables 1-2 starts from 32.57 dB: nothing is clipped, and correlation keeps the power."""
    x = np.zeros((300, 300))  # black background: clipping would show here
    psnr = [
        -10 * np.log10(np.mean((noise.add(x, "gaussian", 6 / 255, correlation, np.random.default_rng(s)) - x) ** 2))
        for s in range(8)
    ]
    assert np.mean(psnr) == pytest.approx(32.57, abs=0.03)


@pytest.mark.parametrize(
    "correlation, axis, diagonal",
    [(0, (0, 0, 0), 0), (0.5, (0.130, 0.009, 0), 0.034), (1.2, (0.42, 0.25, 0.106), 0.353)],
)
@pytest.mark.parametrize("kind, level", [("gaussian", 6 / 255), ("poisson", 200), ("gamma", 100)])
def test_neighbour_correlation(kind, level, correlation, axis, diagonal):
    x = np.full((700, 700), 0.4)
    n = noise.add(x, kind, level, correlation, np.random.default_rng(1)).astype(float) - x

    def rho(dy, dx):
        return np.mean(n[: 700 - dy, : 700 - dx] * n[dy:, dx:]) / np.mean(n * n)

    assert [rho(0, k) for k in (1, 2, 3)] == pytest.approx(axis, abs=0.012)
    assert [rho(k, 0) for k in (1, 2, 3)] == pytest.approx(axis, abs=0.012)
    assert rho(1, 1) == pytest.approx(diagonal, abs=0.012)


def test_one_stored_realisation(tmp_path):
    """The same seed gives the same file, another seed another; the fingerprint follows; clean is kept as it was."""
    make_dataset(tmp_path / "clean.h5")
    for seed, out in ((0, "a.h5"), (0, "b.h5"), (1, "c.h5")):
        flags = ["--data", "clean.h5", "--kind", "poisson", "--level", 200, "--seed", seed, "--out", out]
        ok("noise", "add", *flags, cwd=tmp_path)
    a, b, c = (data.read_volumes(tmp_path / f) for f in ("a.h5", "b.h5", "c.h5"))
    assert np.array_equal(a["v0"], b["v0"]) and not np.array_equal(a["v0"], c["v0"])
    assert (
        data.fingerprints(tmp_path / "a.h5")
        == data.fingerprints(tmp_path / "b.h5")
        != data.fingerprints(tmp_path / "c.h5")
    )
    assert np.array_equal(
        data.read_volumes(tmp_path / "a.h5", "clean")["v0"], data.read_volumes(tmp_path / "clean.h5", "clean")["v0"]
    )
    assert data.read_attrs(tmp_path / "a.h5")[0]["noise"] == {"kind": "poisson", "level": 200.0, "correlation": 0}


def test_black_slice_stays_black():
    """No photons, no noise: Poisson and Gamma noise of zeros is zero, correlated too, and never NaN."""
    for kind in ("poisson", "gamma"):
        assert not noise.add(np.zeros((32, 32)), kind, 100, 1.2, np.random.default_rng(0)).any()


def test_refuses():
    with pytest.raises(ValueError, match="at least 0"):
        noise.add(np.full((8, 8), -0.1), "poisson", 200)
    with pytest.raises(ValueError, match="not positive"):
        noise.add(np.ones((8, 8)), "gaussian", 0)


@pytest.mark.parametrize("kind, level, correlation", [("gaussian", 0.1, 1.2), ("poisson", 200, 0.5), ("gamma", 100, 0)])
def test_sample_is_noise_of_the_model(kind, level, correlation):
    """Variance by intensity and correlation of what is drawn; what is added by `add` is of the model `known`."""
    model = noise.known(kind, level, correlation)
    rng = np.random.default_rng(0)
    x = np.repeat(np.array([0.2, 0.8])[:, None, None], 512, 1).repeat(512, 2)
    for n in (noise.sample(model, x, rng), np.stack([noise.add(s, kind, level, correlation, rng) - s for s in x])):
        assert n.var((1, 2)) == pytest.approx(noise.variance(model, x[:, 0, 0]), rel=0.03)
        for dy, dx in ((0, 1), (1, 0), (1, 1), (0, 2), (3, 0)):
            rho = np.mean(n[:, dy:, dx:] * n[:, : 512 - dy, : 512 - dx]) / np.mean(n * n)
            assert rho == pytest.approx(model["correlation"][noise.REACH + dy][noise.REACH + dx], abs=0.015)


@pytest.mark.parametrize("blur, context", [(0, 0), (1.2, 0), (0, 1)])
def test_deviation_of_the_exact_posterior(blur, context):
    """Gaussian images and noise: the Wiener filter is the posterior mean, and what it leaves unknown is known exactly.

    Fails if the probes are not drawn from the noise model: with white ones it is 40 % off for correlated noise.
    """
    side, rng = 128, np.random.default_rng(0)
    law = noise.known("gaussian", 0.05, blur)
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    prior, n = 0.3 * 0.05**2 / (f + 0.02), 0.05**2 * noise.spectrum(law, side, side)

    def wiener(y):
        own = y[:, y.shape[1] // 2, None].numpy()
        return torch.from_numpy(np.fft.ifft2(np.fft.fft2(own) * prior / (prior + n)).real.astype(np.float32))

    x = np.fft.ifft2(np.fft.fft2(rng.standard_normal((2, 2 * context + 1, side, side))) * np.sqrt(prior)).real
    y = torch.from_numpy((x + noise.sample(law, x, rng)).astype(np.float32))
    mean = wiener(y)
    std = noise.deviation(law, wiener, y, mean, [np.random.default_rng(k) for k in range(2)], probes=8, sigma=8)
    exact = np.sqrt((prior * n / (prior + n)).mean())
    assert float(std.square().mean().sqrt()) == pytest.approx(exact, rel=0.04)
    assert np.sqrt(np.square(mean[:, 0].numpy() - x[:, context]).mean()) == pytest.approx(exact, rel=0.04)
    assert std.shape == (2, 1, side, side) and float(std.std() / std.mean()) < 0.2  # the same everywhere


@pytest.mark.parametrize("blur", [0, 1.2])
def test_samples_of_the_exact_posterior(blur):
    """Gaussian images: samples have the spectrum of clean images, and y - sample the covariance of the noise.

    The posterior mean has neither. Within 10 %, over octaves of frequency; the mean of a pair is the posterior mean.
    """
    side, rng = 128, np.random.default_rng(0)
    law = noise.known("gaussian", 0.05, blur)
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    prior, n = 0.3 * 0.05**2 / (f + 0.02), 0.05**2 * noise.spectrum(law, side, side)

    def wiener(y):
        return np.fft.ifft2(np.fft.fft2(y) * prior / (prior + n)).real

    x = np.fft.ifft2(np.fft.fft2(rng.standard_normal((24, side, side))) * np.sqrt(prior)).real
    y = x + noise.sample(law, x, rng)
    drawn = noise.posterior_samples(law, wiener, y, wiener(y), rng, 2)
    assert drawn.shape == (2, 24, side, side) and np.allclose(drawn.mean(0), wiener(y), atol=1e-5)

    def octaves(v):
        power = (np.abs(np.fft.fft2(v)) ** 2).mean(0)
        return np.array([power[(f >= low) & (f < 2 * low)].mean() for low in (0.06, 0.12, 0.24)])

    assert np.allclose(octaves(drawn[0]) / octaves(x), 1, atol=0.1)
    assert np.allclose(octaves(y - drawn[0]) / octaves(y - x), 1, atol=0.1)
    assert octaves(wiener(y))[-1] < 0.7 * octaves(x)[-1]  # what a wrong sampler, the mean itself, would give


def test_symmetries_of_the_noise():
    """All eight; flips where rows and columns differ; half turns where the diagonals do. Crops are turned so."""
    table = np.zeros((13, 13))
    table[6, 6] = 1
    assert noise.symmetries(noise.make_noise_model([1, 0, 0], table)) == 8
    table[5, 5] = table[7, 7] = 0.3
    assert noise.symmetries(noise.make_noise_model([1, 0, 0], table)) == 2
    image = np.arange(16.0 * 16).reshape(1, 16, 16)
    seen = crops.random_crops([{"": image}], 64, 16, np.random.default_rng(0), symmetries=2)[0].numpy()[:, 0]
    made = {crop.tobytes() for crop in seen}
    assert made == {v.astype(np.float32).tobytes() for v in (image[0], image[0, ::-1, ::-1])}
    y = torch.rand(2, 1, 8, 8)
    ramp = torch.arange(8.0)
    mean = crops.mean_over_symmetries(lambda v: v * ramp, y, 2)
    torch.testing.assert_close(mean, y * 3.5)


@pytest.mark.parametrize(
    "facts",
    [
        dict(correlation=noise.known("gaussian", 1, 1.2)["correlation"], through=(0.2, None)),
        dict(correlation=noise.known("gaussian", 1, 0.5)["correlation"], compressed=True),
        dict(correlation=noise.known("gaussian", 1)["correlation"], dark=0.2, air=[0.1, 0.02], band=[0.5, 0.3]),
    ],
)
def test_a_noise_model_is_read_as_it_was_written(facts, tmp_path):
    made = noise.make_noise_model([0.01, 0.2, 0.3], **facts)
    (tmp_path / "noise.json").write_text(json.dumps(made))
    assert noise.parse_noise_model(str(tmp_path / "noise.json")) == made
    assert made["blind_spot"] == (1 if made["compressed"] or "band" in facts else 9)


def test_a_band_has_sharp_edges():
    """Zero-filled noise is drawn flat up to the end of its band, though the table of its correlation is cut off."""
    lag, end = np.arange(-6, 7), 0.38
    table = np.zeros((13, 13))
    table[6] = np.sinc(2 * end * lag)
    power = noise.spectrum(noise.make_noise_model([1, 0, 0], table, band=(0.5, end)), 64, 96)
    inside = np.abs(np.fft.fftfreq(96)) <= end
    np.testing.assert_allclose(power[:, inside], 1 / inside.mean(), rtol=1e-4)
    assert (power[:, ~inside] == 0).all()
    blurred = noise.spectrum(noise.make_noise_model([1, 0, 0], table), 64, 96)[0, inside]
    assert np.ptp(blurred) > 0.5  # what the cut alone would make of it
