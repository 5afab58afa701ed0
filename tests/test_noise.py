"""The noises of Sec. 4.1: power, formulas, correlation, one stored realisation."""

import numpy as np
import pytest
from conftest import ellipses, make_dataset, ok, run
from scipy.ndimage import gaussian_filter

import data
import noise

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
        ok(
            "noise",
            "add",
            "--data",
            "clean.h5",
            "--kind",
            "poisson",
            "--level",
            200,
            "--seed",
            seed,
            "--out",
            out,
            cwd=tmp_path,
        )
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


def phantom(slices=12, side=192, seed=0):
    """Ellipses with soft edges and a gentle gradient: some structure everywhere, flat areas of many intensities."""
    images = gaussian_filter(ellipses(np.random.default_rng(seed), slices, side, side), (0, 1, 1))
    return list(0.05 + 0.85 * images + 0.05 * np.linspace(0, 1, side))


@pytest.mark.parametrize("correlation", [0, 0.5, 1.2])
@pytest.mark.parametrize("kind, level", [("gaussian", 6 / 255), ("poisson", 200), ("gamma", 100)])
def test_measured_from_the_images_alone(kind, level, correlation):
    """Level within 6 %, correlation with the neighbours within 0.06, the blind spot that the paper uses, the form."""
    truth, rng = noise.known(kind, level, correlation), np.random.default_rng(1)
    model = noise.measure([noise.add(x, kind, level, correlation, rng) for x in phantom()])
    x = np.array([0.2, 0.4, 0.6])
    off = np.sqrt(noise.variance(model, x) / noise.variance(truth, x)) - 1
    assert np.abs(off).mean() < 0.06, off
    near = slice(noise.REACH - 2, noise.REACH + 3)
    table, true = np.array(model["correlation"]), np.array(truth["correlation"])
    assert np.abs(table - true)[near, near].max() < 0.06
    assert model["blind_spot"] == {0: 1, 0.5: 5, 1.2: 9}[correlation]
    assert model["form"] == {"gaussian": "gaussian", "poisson": "poisson-gaussian", "gamma": "gamma"}[kind]


def test_masked_background_does_not_fool_it():
    """Half of each image set to 0, as skull-stripping does: the level is that of the rest."""
    rng = np.random.default_rng(0)
    images = [noise.add(x, "gaussian", 6 / 255, 0, rng) for x in phantom()]
    for image in images:
        image[:, :96] = 0
    model = noise.measure(images)
    assert np.sqrt(noise.variance(model, 0.4)) == pytest.approx(6 / 255, rel=0.06)


def test_rician_background_does_not_fool_it():
    """Magnitudes of complex Gaussian noise: at black the deviation is 0.66 of what it is elsewhere, and is left out."""
    rng, s = np.random.default_rng(0), 12 / 255
    images = []
    for x in phantom():
        x = np.where(x > 0.3, x, 0)
        images.append(np.hypot(x + rng.normal(0, s, x.shape), rng.normal(0, s, x.shape)).astype(np.float32))
    model = noise.measure(images, magnitude=True)
    assert np.sqrt(noise.variance(model, 0.6)) == pytest.approx(s, rel=0.06)


def test_anisotropic_noise():
    """Zero-filled lines of k-space: correlation along one axis only."""
    rng = np.random.default_rng(0)
    images = []
    for x in phantom():
        k = np.fft.fft2(rng.normal(0, 6 / 255, x.shape))
        k[48:144] = 0
        images.append((x + np.fft.ifft2(k).real).astype(np.float32))
    table = np.array(noise.measure(images)["correlation"])
    assert table[noise.REACH + 1, noise.REACH] == pytest.approx(2 / np.pi, abs=0.08)
    assert abs(table[noise.REACH, noise.REACH + 1]) < 0.05


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


def test_expected_periodogram():
    """The exact mean of `periodogram` for correlated noise, against the mean over many blocks."""
    model = noise.known("gaussian", 1.0, 0.5)
    n = noise.sample(model, np.zeros((400, 64, 64), np.float32), np.random.default_rng(0))
    found = noise.periodogram(noise.in_blocks(n, 8)).mean(0)
    np.testing.assert_allclose(found, noise.expected(np.array(model["correlation"]), 8), atol=0.03, rtol=0.03)


def test_choosing_quiet_blocks_does_not_bias():
    """White noise alone: the 2 % flattest blocks measure the level of all."""
    power = noise.periodogram(np.random.default_rng(0).standard_normal((20000, 16, 16)))
    low = noise.halves(16)[0] < 0.25
    found = noise.flattest(power, power, low, 400)
    assert found[~low].mean() == pytest.approx(1, abs=0.01) and found[low][9:].mean() == pytest.approx(1, abs=0.04)
    _, even = noise.halves(16)
    naive = power[np.argsort(power[:, low].sum(1))[:400]].mean(0)
    assert naive[low & even].mean() < 0.8  # what it would be without the two halves


def test_measure_command(made, tmp_path):
    """Prints and writes the model; refuses images too small to tell."""
    rng = np.random.default_rng(0)
    with data.write_volumes(tmp_path / "a.h5", "dataset", "test") as add:
        (y,) = add("v", (12, 192, 192), ["noisy"], split="train", scale=1.0, offset=0.0, source="phantom")
        y[:] = np.stack([noise.add(x, "poisson", 200, 0, rng) for x in phantom()])
    done = ok("noise", "measure", "--data", "a.h5", "--out", "noise.json", cwd=tmp_path)
    assert "poisson-gaussian" in done.stdout and "blind spot to use: 1" in done.stdout
    assert noise.given(str(tmp_path / "noise.json"))["blind_spot"] == 1
    done = run("noise", "measure", "--data", made / "knee.h5", cwd=tmp_path)
    assert done.returncode == 2 and "too few blocks" in done.stderr


@pytest.mark.parametrize("side", [128, 256])
def test_one_image_is_enough(side):
    """A single slice: level within 12 %, and the blind spot."""
    y = noise.add(phantom(1, side)[0], "gaussian", 12 / 255, 0, np.random.default_rng(0))
    model = noise.measure([y])
    assert np.sqrt(noise.variance(model, 0.4)) == pytest.approx(12 / 255, rel=0.12) and model["blind_spot"] == 1
