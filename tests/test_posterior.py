"""The posterior update, against closed forms and on noise of known power."""

import json

import numpy as np
import pytest
from conftest import ok, run

import data
import noise
import posterior


def test_update_is_the_lmmse_estimate():
    """For x Gaussian around mu with variance v and noise s2: the exact posterior mean, and its exact error."""
    rng = np.random.default_rng(0)
    mu, v, s2 = 0.4, 0.03, 0.02
    x = mu + rng.normal(0, v**0.5, 200_000)
    y = x + rng.normal(0, s2**0.5, x.shape)
    estimate = posterior.update(mu, y, v + s2, s2)
    np.testing.assert_allclose(estimate, (mu * s2 + y * v) / (v + s2), rtol=1e-12, atol=1e-12)
    assert np.mean((estimate - x) ** 2) == pytest.approx(v * s2 / (v + s2), rel=0.02)
    assert s2 * posterior.weight(v + s2, s2) == pytest.approx(v * s2 / (v + s2), rel=1e-12)


def test_update_at_its_ends():
    """Nothing but noise: the prediction. No noise: the noisy value. Less energy than noise: the prediction."""
    assert posterior.update(0.3, 0.9, 0.01, 0.01) == 0.3
    assert posterior.update(0.3, 0.9, 0.01, 0.0) == pytest.approx(0.9)
    assert posterior.update(0.3, 0.9, 0.005, 0.01) == 0.3


@pytest.mark.parametrize("correlation", [0, 1.2])
def test_wiener_knows_the_noise(correlation):
    """Of pure noise of the model hardly anything passes; of a strong signal with no noise everything does."""
    model = noise.known("gaussian", 1.0, correlation)

    def spectrum(h, w):
        return noise.spectrum(model, h, w)

    n = noise.sample(model, np.zeros((97, 110), np.float32), np.random.default_rng(0))
    kept, left = posterior.wiener(n, spectrum)
    assert kept.shape == left.shape == n.shape
    assert np.mean(kept**2) < 0.06 * np.mean(n**2) and left.mean() < 0.2
    strong = 1000 * np.random.default_rng(1).standard_normal(n.shape)
    kept, left = posterior.wiener(strong, spectrum)
    np.testing.assert_allclose(kept, strong, atol=2)
    assert left.mean() > 0.99


def test_wiener_of_correlated_noise_beats_the_scalar_weight():
    """A white signal in correlated noise: the frequencies tell them apart, the energies do not."""
    model = noise.known("gaussian", 1.0, 1.2)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((128, 128))
    y = x + noise.sample(model, np.zeros(x.shape, np.float32), rng)
    zero = np.zeros_like(x)
    errors = [np.mean((posterior.estimate(y, zero, model, v)[0] - x) ** 2) for v in ("energy", "spectrum")]
    assert errors[1] < 0.9 * errors[0] and errors[0] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("kind, level, correlation", [("gaussian", 0.1, 0), ("poisson", 50, 0), ("gaussian", 0.1, 1.2)])
def test_uncertainty_is_calibrated(kind, level, correlation):
    """About 68 and 95 % of clean pixels lie within one and two `std`, for detail that a prediction lacks."""
    rng = np.random.default_rng(0)
    mu = np.full((256, 256), 0.5)
    x = mu + rng.normal(0, 0.07, mu.shape)
    model = noise.known(kind, level, correlation)
    estimate, std = posterior.estimate(noise.add(x, kind, level, correlation, rng), mu, model)
    within = [np.mean(np.abs(estimate - x) < k * std) for k in (1, 2)]
    assert within == pytest.approx([0.683, 0.954], abs=0.06)


def test_places_without_photons_do_not_outweigh_the_others():
    """A prediction is never quite 0 in a black background: by the Poisson noise of such places it would be far off."""
    rng = np.random.default_rng(0)
    x = 0.7 * (np.hypot(*np.mgrid[-64:64, -64:64]) < 40)
    y = noise.add(x, "poisson", 200, 0, rng)
    mu = x + 0.05 * (x > 0) * rng.standard_normal(x.shape) + 1e-3 * rng.standard_normal(x.shape)
    estimate, std = posterior.estimate(y, mu, noise.known("poisson", 200))
    for inside in (x > 0, (x > 0) & (np.hypot(*np.mgrid[-64:64, -64:64]) > 34)):
        before, after = (np.square(v - x)[inside].mean() for v in (mu, estimate))
        assert after < 0.7 * before and after == pytest.approx(np.square(std[inside]).mean(), rel=0.25)


def test_command(made, tmp_path):
    """On any prediction; `std` beside it; the noise model stands in the file; each source of the variance."""
    flags = ["--data", made / "knee.h5", "--noise", "gaussian:6/255", "--out", tmp_path / "out.h5"]
    ok("posterior", *flags, "--pred", made / "bsn_out.h5", cwd=tmp_path)
    mu, out, std = (
        data.read_volumes(path, key)
        for path, key in ((made / "bsn_out.h5", "pred"), (tmp_path / "out.h5", "pred"), (tmp_path / "out.h5", "std"))
    )
    y = data.read_volumes(made / "knee.h5")
    for name in y:
        weight = (out[name] - mu[name]) / np.where(y[name] == mu[name], 1, y[name] - mu[name])
        assert -1e-3 < weight.min() and weight.max() < 1 + 1e-3
        assert 0 <= std[name].min() and std[name].max() <= 6 / 255 + 1e-6
    assert data.read_attrs(tmp_path / "out.h5")[0]["noise"]["variance"] == [(6 / 255) ** 2, 0, 0]
    ok("posterior", *flags, "--pred", made / "srds_out.h5", "--variance", "spread", cwd=tmp_path)
    ok("posterior", *flags, "--pred", made / "bsn_out.h5", "--variance", "spectrum", cwd=tmp_path)


def test_refuses(made, tmp_path):
    flags = ["--data", made / "knee.h5", "--pred", made / "bsn_out.h5", "--out", tmp_path / "out.h5"]
    model = noise.known("gaussian", 0.1)
    (tmp_path / "negative.json").write_text(json.dumps(model | dict(variance=[-1, 0, 0])))
    (tmp_path / "short.json").write_text(json.dumps(model | dict(correlation=[[1.0]])))
    for wrong, words in (
        (["--noise", "gaussian"], "kind:level"),
        (["--noise", "gaussian:-1"], "kind:level"),
        (["--noise", "nowhere.json"], "neither measured"),
        (["--noise", str(made / "knee.h5")], "not a noise model"),
        (["--noise", "gaussian:inf"], "kind:level"),
        (["--noise", "gaussian:0.1:inf"], "kind:level"),
        (["--noise", "negative.json"], "not a noise model"),
        (["--noise", "short.json"], "not a noise model"),
        (["--noise", "gaussian:0.1", "--variance", "predicted"], "no 'std'"),
        ([], "too few blocks"),
    ):
        done = run("posterior", *flags, *wrong, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "out.h5").exists()
