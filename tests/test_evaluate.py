"""Metrics against their formulas; the table, JSON and figure of a run."""

import json

import numpy as np
import pytest
from conftest import ok

import baselines
import evaluate
import noise


def test_psnr_is_not_clipped_and_has_range_one():
    x = np.zeros((64, 64))
    y = noise.add(x, "gaussian", 6 / 255, 0, np.random.default_rng(0))
    psnr, ssim = evaluate.psnr_ssim(y, x.astype(np.float32))
    assert psnr == pytest.approx(-10 * np.log10(np.mean(y.astype(float) ** 2)), abs=1e-4) and 0 < ssim < 1


def test_leak():
    """0 for the clean image, 1 for the noisy one, w for a mixture; errors unrelated to the noise do not move it."""
    rng = np.random.default_rng(0)
    x, n = rng.random((50, 64, 64)), 0.02 * rng.standard_normal((50, 64, 64))
    assert evaluate.leak(x, x, x + n) == 0 and evaluate.leak(x + n, x, x + n) == pytest.approx(1)
    assert evaluate.leak(x + 0.3 * n + 0.02 * rng.standard_normal(n.shape), x, x + n) == pytest.approx(0.3, abs=0.01)


def test_non_local_means_denoises():
    x = np.kron(np.array([[0.2, 0.8], [0.6, 0.4]]), np.ones((32, 32)))
    y = noise.add(x, "gaussian", 6 / 255, 0, np.random.default_rng(0))
    for sigma in (6 / 255, None):
        assert evaluate.psnr_ssim(baselines.non_local_means(y, sigma), x)[0] > evaluate.psnr_ssim(y, x)[0] + 6


def test_comparisons():
    """A constant gap is significant, no gap is not."""
    rng = np.random.default_rng(0)
    a = rng.normal(30, 1, 20)
    p = evaluate.comparisons({"a": {"psnr": a}, "b": {"psnr": a}, "c": {"psnr": a + 0.1}})
    assert p["a", "b"] == 1 and p["a", "c"] == p["b", "c"] < 0.001


def test_command(made):
    out = ok(
        "evaluate",
        "--data",
        "knee.h5",
        "--pred",
        "bsn_out.h5",
        "pair=srds_out.h5",
        "--json",
        "r.json",
        "--figure",
        "r.png",
        cwd=made,
    )
    results = json.loads((made / "r.json").read_text())
    assert list(results) == ["noisy", "bsn", "pair"]
    assert set(results["bsn"]) == {"psnr", "psnr_sd", "ssim", "ssim_sd", "leak", "n", "p"}
    assert set(results["bsn"]["p"]) == {"noisy", "pair"}
    assert results["noisy"]["leak"] == pytest.approx(1) and results["noisy"]["n"] == 2
    assert results["noisy"]["psnr"] == pytest.approx(32.57, abs=0.3)
    assert "| pair |" in out.stdout and "data_range 1" in out.stdout
    assert (made / "r.png").read_bytes()[:4] == b"\x89PNG"
