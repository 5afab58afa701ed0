"""Metrics against their formulas; the table, JSON and figure of a run."""

import json

import numpy as np
import pytest
from conftest import ellipses, ok
from scipy.ndimage import gaussian_filter

import data
import evaluate
import noise
from experiments import baselines


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
    flags = ["--pred", "bsn_out.h5", "pair=srds_out.h5", "--json", "r.json", "--figure", "r.png"]
    out = ok("evaluate", "--data", "knee.h5", *flags, cwd=made)
    results = json.loads((made / "r.json").read_text())
    assert list(results) == ["noisy", "bsn", "pair"]
    assert set(results["bsn"]) == {"psnr", "psnr_sd", "ssim", "ssim_sd", "leak", "n", "p"}
    assert set(results["bsn"]["p"]) == {"noisy", "pair"}
    assert results["noisy"]["leak"] == pytest.approx(1) and results["noisy"]["n"] == 2
    assert results["noisy"]["psnr"] == pytest.approx(32.57, abs=0.3)
    assert "| pair |" in out.stdout and "data_range 1" in out.stdout
    assert (made / "r.png").read_bytes()[:4] == b"\x89PNG"


def test_report_without_reference(tmp_path):
    """Noise removed, noise left, structure removed, correlated residual: each is told from the others, in words."""
    rng, spec = np.random.default_rng(0), "gaussian:12/255"
    x = gaussian_filter(ellipses(rng, 3, 160, 160), (0, 1, 1))
    y = x + rng.normal(0, 12 / 255, x.shape).astype(np.float32)
    smooth, other = gaussian_filter(y, (0, 3, 3)), x + 0.2 * (y - x)
    with data.write_volumes(tmp_path / "y.h5", "dataset", "test") as add:
        (noisy,) = add("v", y.shape, ["noisy"], split="test", scale=1.0, offset=0.0, source="ellipses")
        noisy[:] = y
    for name, out in (("clean", x), ("left", y + 0.3 * (x - y)), ("smooth", smooth), ("most", other)):
        with data.write_volumes(tmp_path / f"{name}.h5", "prediction", name, like=tmp_path / "y.h5") as add:
            (pred,) = add("v", y.shape, ["pred"])
            pred[:] = out
    preds = ["clean.h5", "left.h5", "smooth.h5", "most.h5"]
    flags = ["--data", "y.h5", "--no-reference", "--noise", spec, "--json", "r.json", "--pred", *preds]
    done = ok("evaluate", *flags, cwd=tmp_path).stdout
    r = json.loads((tmp_path / "r.json").read_text())
    assert r["clean"]["removed"] == pytest.approx(1, abs=0.03) and r["left"]["removed"] == pytest.approx(0.09, abs=0.01)
    assert r["clean"]["correlation error"] < 0.03 and abs(r["clean"]["structure"]) < 0.1
    assert r["smooth"]["structure"] > 0.3 and r["smooth"]["removed"] > 1.3
    lines = {line.split("|")[1].strip(): line for line in done.splitlines() if line.startswith("|")}
    assert "noise and nothing else" in lines["clean"] and "noise is left" in lines["left"]
    assert "noise is left" not in lines["most"] and r["most"]["removed"] == pytest.approx(0.64, abs=0.02)
    assert "not correlated as the noise is" in lines["smooth"] and r["smooth"]["correlation error"] > 0.2
    assert "structure went with it" in lines["smooth"] and "edges" in lines["smooth"]


def test_error_of_a_blind_spot_prediction(tmp_path):
    """J-invariance: |y - pred|^2 less the noise is the error against the clean image that nobody has."""
    rng = np.random.default_rng(0)
    x = ellipses(rng, 2, 128, 128)
    y, pred = x + rng.normal(0, 0.05, x.shape).astype(np.float32), x + rng.normal(0, 0.02, x.shape).astype(np.float32)
    with data.write_volumes(tmp_path / "y.h5", "dataset", "test") as add:
        add("v", y.shape, ["noisy"], split="test", scale=1.0, offset=0.0, source="ellipses")[0][:] = y
    with data.write_volumes(tmp_path / "p.h5", "prediction", "bsn", like=tmp_path / "y.h5") as add:
        add("v", y.shape, ["pred"])[0][:] = pred
    flags = ["--data", "y.h5", "--no-reference", "--noise", "gaussian:0.05", "--pred", "p.h5", "--json", "r.json"]
    ok("evaluate", *flags, cwd=tmp_path)
    assert json.loads((tmp_path / "r.json").read_text())["p"]["error"] == pytest.approx(0.02, rel=0.1)


def test_calibration(tmp_path):
    """Errors drawn with the stated deviation: 68 and 95 % lie within one and two."""
    rng = np.random.default_rng(0)
    x, std = ellipses(rng, 2, 64, 64), np.linspace(0.01, 0.03, 64).astype(np.float32)
    with data.write_volumes(tmp_path / "y.h5", "dataset", "test") as add:
        attrs = dict(split="test", scale=1.0, offset=0.0, source="ellipses")
        for array in add("v", x.shape, ["noisy", "clean"], **attrs):
            array[:] = x
    with data.write_volumes(tmp_path / "p.h5", "prediction", "posterior", like=tmp_path / "y.h5") as add:
        pred, deviation = add("v", x.shape, ["pred", "std"])
        pred[:], deviation[:] = x + std * rng.standard_normal(x.shape), np.broadcast_to(std, x.shape)
    rows = evaluate.calibration(tmp_path / "y.h5", tmp_path / "p.h5", "test")
    assert np.mean([r[2] for r in rows]) == pytest.approx(0.683, abs=0.03)
    assert np.mean([r[3] for r in rows]) == pytest.approx(0.954, abs=0.02)
