"""The experiments on volumes, each with almost no training."""

import json

import numpy as np
from conftest import ellipses, make_dataset, ok

import data


def test_table_of_volumes(tmp_path):
    """Clean images to a table: the shipped network, tuned and new students, with and without the symmetries."""
    make_dataset(tmp_path / "clean.h5", sizes=((5, 96, 112), (4, 96, 100)))
    methods = ["--methods", "nlm", "instant", "tuned", "scratch0", "supervised2"]
    flags = ["a=clean.h5", "--noise", "gaussian:12/255", *methods, "--steps", 2, "--out", "out"]
    done = ok("experiments.volumes", *flags, cwd=tmp_path)
    cell = json.loads((tmp_path / "out/a-gaussian-12_255/cell.json").read_text())
    pairs = [name + end for name in methods[2:] for end in ("", "+")]
    assert set(cell) == {"noisy", "nlm", *pairs}
    assert cell["instant"]["psnr"] > cell["noisy"]["psnr"] + 2 and cell["instant+"]["psnr"] > cell["instant"]["psnr"]
    for name in methods[2:]:
        assert abs(cell[name]["told"] - cell[name]["pooled"]) < 0.5, name  # estimated without the clean images
    again = ok("experiments.volumes", "--out", "out", cwd=tmp_path).stdout  # only the table
    assert "| tuned+ |" in again and again.strip() in done.stdout


def test_context_experiments(tmp_path):
    make_dataset(tmp_path / "clean.h5", sizes=((5, 96, 112), (4, 96, 100)))
    (tmp_path / "out").mkdir()
    through = ["through", "--data", "clean.h5", "--out", "out", "--steps", 2]
    assert "| ignored |" in ok("experiments.context", *through, cwd=tmp_path).stdout
    preds = ["--data", "out/noisy.h5", "--pred", "A=out/joint_out.h5", "--figure", "planes.png"]
    assert "| A |" in ok("experiments.context", "stripes", *preds, cwd=tmp_path).stdout
    assert (tmp_path / "planes.png").stat().st_size > 5000
    np.save(tmp_path / "one.npy", np.random.default_rng(0).random((64, 64)))
    rows = ok("experiments.context", "auto", "one.npy", cwd=tmp_path).stdout.splitlines()
    assert rows[2] == "| one.npy | one | 1x64x64 |  | 0 |"
    assert ok("experiments.context", "cost", "--repeats", 1, cwd=tmp_path).stdout.count("%") == 6


def test_uncertainty_and_ranks(tmp_path):
    """Tables from a cell: coverage, spectrum, lesions; and which of two students Stein's estimate names."""
    x = ellipses(np.random.default_rng(0), 6, 96, 112)
    with data.write_volumes(tmp_path / "clean.h5", "dataset", "test") as add:
        add("a", x.shape, ["clean"], split="test")[0][:] = x
        add("b", x.shape, ["clean"], split="train")[0][:] = x[::-1]
    flags = ["a=clean.h5", "--methods", "instant", "tuned", "--steps", 2, "--out", "out"]
    ok("experiments.volumes", *flags, cwd=tmp_path)
    cell = "out/a-gaussian-6_255"
    ok("experiments.uncertainty", cell, "--figure", "u.png", "--out", "u.md", cwd=tmp_path)
    found = json.loads((tmp_path / "u.json").read_text())["a-gaussian-6_255"]
    assert len(found["coverage"]) == 4 and found["lesions"]["lesions"] > 10
    assert found["variance"]["student"] < found["variance"]["sample"] < 1.2
    assert (tmp_path / "u.png").stat().st_size > 5000
    said = ok("experiments.stein", cell, "--block", 1, "--out", "s.md", cwd=tmp_path).stdout
    assert "| a-gaussian-6_255 | tuned |" in said and (tmp_path / "s.json").exists()
