"""The perfusion run: measures whose value is known, and a short run from repeats to the table."""

import h5py
import numpy as np
import pytest
from conftest import ellipses, ok, run

from experiments import repeats


def made_run(rng, count, sigma, change=0.02, shape=(3, 40, 40)):
    """(noisy, without noise) (T,S,H,W): a head whose odd repeats are `change` darker in every second column."""
    x = 0.3 + 0.5 * ellipses(rng, *shape)
    clean = np.stack([x - change * (t % 2) * (np.arange(shape[-1]) % 2) for t in range(count)])
    return clean + sigma * rng.standard_normal(clean.shape), clean


def test_reference_is_the_mean_of_the_others():
    y, _ = made_run(np.random.default_rng(0), 8, 0.05)
    reference = repeats.others(y)
    np.testing.assert_allclose(reference[2], (y[0] + y[4] + y[6]) / 3)
    np.testing.assert_allclose(reference[7], (y[1] + y[3] + y[5]) / 3)


def test_measures_of_known_runs():
    """Untouched: error of one level, nothing changed. Without noise: its limit. Smoothed over time: what is lost."""
    y, clean = made_run(np.random.default_rng(0), 40, 0.02)
    mask = np.ones(y.shape[1:], bool)
    assert repeats.level(y, mask) == pytest.approx(0.02, rel=0.01)
    untouched, perfect = (repeats.measures(x, y, mask) for x in (y, clean))
    assert (
        untouched["error"] == pytest.approx(1) and untouched["variance"] == 1 and untouched["map"] == pytest.approx(1)
    )
    assert untouched["change"] == 0 and untouched["limit"] == pytest.approx(-10 * np.log10(0.02**2 / 19), abs=0.8)
    assert perfect["brain"] == pytest.approx(untouched["limit"], abs=0.8) and perfect["error"] < 0.1
    assert perfect["difference"] == pytest.approx(100 * 0.01 / clean.mean(), rel=1e-6) and abs(perfect["change"]) < 2
    assert perfect["variance"] < 1e-9 and perfect["halves"] > untouched["halves"] > 0.5
    smoothed = np.repeat(y.mean(0)[None], len(y), 0)
    with np.errstate(invalid="ignore"):  # its map is 0 everywhere
        lost = repeats.measures(smoothed, y, mask)
    assert lost["change"] == pytest.approx(-100) and lost["difference"] == pytest.approx(0, abs=1e-9)


def test_table(tmp_path):
    """Written as NIfTI, denoised by both kinds of methods, measured; a file that stands is not made again."""
    y, _ = made_run(np.random.default_rng(0), 8, 0.03)
    with h5py.File(tmp_path / "repeats.h5", "w") as file:
        file["volumes"] = (2000 * y.clip(0)).astype(np.uint16)
    flags = ["repeats.h5", "--out", "out", "--methods"]
    said = ok("experiments.repeats", *flags, "nlm", "instant", cwd=tmp_path).stdout
    rows = {line.split("|")[1].strip(): line for line in said.splitlines() if line.startswith("| ") and "." in line}
    assert {"untouched", "nlm", "instant"} <= set(rows)
    assert float(rows["nlm"].split("|")[2]) > float(rows["untouched"].split("|")[2]) + 1
    np.testing.assert_array_equal(repeats.read_run(tmp_path / "out/run.nii.gz"), (2000 * y.clip(0)).astype(np.uint16))
    again = ok("experiments.repeats", *flags, "nlm", "--also", "b=out/nlm.nii.gz", cwd=tmp_path).stdout
    assert "nlm: 8 volumes" not in again and "| b |" in again and "A mean of 3 others has 33.3 % of its" in again
    np.save(tmp_path / "x.npy", y)
    wrong = run("experiments.repeats", "x.npy", "--out", "no", cwd=tmp_path)
    assert wrong.returncode == 2 and not (tmp_path / "no").exists()
