"""bench.py: what it times is what it says, and its sections run."""

import json

import numpy as np
import pytest
import torch
from conftest import ok

import bench
import data
import runtime


@pytest.mark.parametrize("steps", [1, 4])
def test_the_two_samplers_agree(monkeypatch, steps):
    """The loop over the scheduler of `diffusers`, two passes, and ours: the same image from the same network."""
    monkeypatch.setattr(bench, "precision", lambda form, where: runtime.autocast(where, "float32"))
    where, out, network_of = torch.device("cpu"), [], bench.network_of

    def shaken(*args):  # a new network gives 0 for every input
        network, rng = network_of(*args), torch.Generator().manual_seed(1)
        for p in network.parameters():
            p.data += 0.02 * torch.randn(p.shape, generator=rng)
        return network

    monkeypatch.setattr(bench, "network_of", shaken)
    for form in (bench.OURS, bench.SAME):
        torch.manual_seed(0)
        made = bench.sampler("fast", form, steps, where, side=32)
        out.append(made())
    assert out[0].std() > 1e-3
    torch.testing.assert_close(*out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", [bench.OURS, bench.SAME, bench.PLAIN])
def test_training_steps_learn(form):
    """Every form of the student's training step lowers the loss."""
    stacks = [{"x": x} for x in np.random.default_rng(0).random((2, 4, 40, 40), dtype=np.float32)]
    stacks[1]["x"] *= 0.5
    _, step = bench.trainer("fast", "student of `fast`", form, stacks, 2, 32, torch.device("cpu"))
    losses = [step().item() for _ in range(12)]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


def test_sections(made, tmp_path):
    """The student's PSNR is that of its prediction file; sections of another run are kept."""
    flags = ["--preset", "fast", "--repeats", 1, "--data", made / "knee.h5", "--student", made / "student.pt"]
    ok("bench", *flags, "--sections", "crops", cwd=tmp_path)
    said = ok("bench", *flags, "--sections", "student", cwd=tmp_path).stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["method"]: row for row in found["student"]}
    assert "| wavelet |" in said and all(row["ms_512"] > 0 for row in rows.values())
    x, pred = data.read_volumes(made / "knee.h5", "clean", "test"), data.read_volumes(made / "distill_out.h5", "pred")
    mse = [np.square(x["v1"][s] - pred["v1"][s]).mean() for s in range(2)]
    assert rows["student"]["psnr"] == pytest.approx(np.mean(-10 * np.log10(mse)), abs=0.05)
    assert min(rows[name]["psnr"] for name in rows if name != "student") > 30
    assert {row["way"] for row in found["crops"]} == {"in memory", "streamed from HDF5", "DataLoader"}
    assert found["machine"]["matrix_product_gflop_per_s"]["float32"] > 0
