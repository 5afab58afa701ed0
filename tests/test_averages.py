"""Repetitions of one scan, averaged before or after they are denoised."""

import numpy as np
from conftest import ellipses, ok

import data
from experiments import averages


def test_means_of_repetitions(tmp_path):
    """The mean of one repetition is TRUTH.h5's noisy image, of more it has less noise; the table has both orders."""
    with data.write_volumes(tmp_path / "clean.h5", "dataset", "test") as add:
        for split in ("train", "test"):
            x = 0.2 + 0.8 * np.repeat(ellipses(np.random.default_rng(0), 2, 96, 96), 6, 0)
            add(split, x.shape, ["noisy"], split=split)[0][:] = x
    ok("experiments.scanner", "--data", "clean.h5", "--repetitions", 2, "--out", "scans", cwd=tmp_path)
    scans = tmp_path / "scans"
    one = averages.write_mean(scans, [1], tmp_path / "one.h5")
    for name, y in data.read_volumes(scans / "TRUTH.h5").items():
        np.testing.assert_allclose(data.read_volumes(one)[name], y, atol=1e-5)
    ok("experiments.averages", "scans", "--counts", 1, 2, "--out", "out", cwd=tmp_path)
    rows = [line.split("|")[1:-1] for line in (tmp_path / "out/table.md").read_text().splitlines()[2:]]
    assert [int(count) for count, *_ in rows] == [1, 2]
    before, denoised, after = ([float(cell.split("/")[0]) for cell in cells] for cells in list(zip(*rows))[1:])
    assert before[1] > before[0] + 2 and denoised[0] == after[0] and min(denoised) > before[0]
