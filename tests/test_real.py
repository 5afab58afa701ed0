"""The tables of scanner noise: measures whose value is known, and a cell from nothing to a table."""

import json

import numpy as np
import pytest
from conftest import ellipses, ok, run

import data
import noise
from experiments import real


def test_agreement_and_bias():
    true = np.full((2, 10, 10), 0.02)
    measured, mask = true * 1.05, np.ones(true.shape, bool)
    measured[0, :2], mask[1, 0] = 0.04, False
    found = real.agreement(measured, true, mask)
    assert found["within"] == pytest.approx(170 / 190) and found["median"] == pytest.approx(1.05)
    assert found["low"] == pytest.approx(1.05) and found["high"] == pytest.approx(2)
    clean = np.linspace(0, 1, 200).reshape(true.shape)
    head, air, dark = real.masks(clean, true)
    assert clean[air].max() < 0.01 and clean[dark].min() >= 0.02 and clean[dark].max() < 0.06 < clean[head].min() + 1e-9
    x = clean + 0.5 * true * air - 0.25 * true * dark
    np.testing.assert_allclose(real.bias(x, clean, air, dark, 0.02), (0.5, -0.25))
    assert np.isnan(real.bias(x, clean, air, dark & False)[1])


def test_agreement_of_noise_models(tmp_path):
    """A model that is 5 % too high, and correlated where the truth is not."""
    clean, sigma = np.full((3, 32, 32), 0.5), 0.02
    for name, kind, keys in (("t.h5", "dataset", ["noisy", "clean"]), ("s.h5", "prediction", ["pred", "sigma"])):
        like = tmp_path / "t.h5" if kind == "prediction" else None
        with data.write_volumes(tmp_path / name, kind, "test", like=like) as add:
            first, second = add("a", clean.shape, keys, split="test")
            first[:] = clean + 0.01 * np.arange(32)
            second[:] = sigma if like else clean
    table = np.zeros((13, 13))
    table[6, 6], table[6, 7] = 1, 0.1
    measured = noise.make_noise_model([(1.05 * sigma) ** 2, 0, 0], table, through=[0.2, 0.0])
    true = noise.known("gaussian", sigma)
    found = real.noise_agreement(measured, {}, true, tmp_path / "t.h5", tmp_path / "s.h5")
    np.testing.assert_allclose([found["median"], found["within"]], [1.05, 1], rtol=1e-5)
    gains = {"a": np.full(clean.shape, 1 / 1.05)}
    with_map = real.noise_agreement(measured, gains, true, tmp_path / "t.h5", tmp_path / "s.h5")
    assert with_map["median"] == pytest.approx(1)
    assert found["correlation"] == pytest.approx(0.1) and found["through"] == pytest.approx(0.2)


def test_cell(tmp_path):
    """Scans, methods, table; again, nothing is run; a method more is added to what was there."""
    with data.write_volumes(tmp_path / "clean.h5", "dataset", "test") as add:
        for k, split in enumerate(("train", "test")):
            x = ellipses(np.random.default_rng(k), 5, 96, 96)
            add(split, x.shape, ["clean"], split=split)[0][:] = x
    made = ["--data", "clean.h5", "--repetitions", 1, "--no-kspace", "--out", "scans"]
    ok("experiments.scanner", *made, cwd=tmp_path)
    flags = ["a=scans", "--steps", 2, "--out", "out", "--methods"]
    said = ok("experiments.real", *flags, "nlm", "nei2nei", "instant", "instant_told", cwd=tmp_path).stdout
    cell = json.loads((tmp_path / "out/a/cell.json").read_text())
    made = {"noisy", "nlm", "nei2nei", "instant", "instant, corrected", "instant_told", "instant_told+"}
    assert set(cell["methods"]) == made and "median" in cell["noise"]
    assert 0 < cell["methods"]["instant, corrected"]["air"] < 0.5 * cell["methods"]["instant"]["air"]
    assert cell["methods"]["nlm"]["head"] > cell["methods"]["noisy"]["head"] + 0.5
    assert cell["methods"]["noisy"]["expected"] > cell["methods"]["noisy"]["psnr"]  # air is brighter than black
    assert "## a" in said and "| instant_told+ |" in said
    again = ok("experiments.real", *flags, "nlm", "supervised2", cwd=tmp_path).stdout
    assert "--method nei2nei" not in again and "| nei2nei |" in again and "| supervised2 |" in again
    assert again.split("## a")[1] == (tmp_path / "out/table.md").read_text().split("## a")[1] + "\n"
    wrong = run("experiments.real", "a=nowhere", "--out", "no", cwd=tmp_path)
    assert wrong.returncode == 2 and "TRUTH.h5, SIGMA.h5, noise.json" in wrong.stderr
    assert not (tmp_path / "no").exists()
