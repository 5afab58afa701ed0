"""bench.py: what it times is what it says, and its sections run."""

import json

import numpy as np
import pytest
import torch
from conftest import make_dataset, ok

import data
from experiments import bench, bench_variants
from lib import runtime


@pytest.mark.parametrize("steps", [1, 4])
def test_the_two_samplers_agree(monkeypatch, steps):
    """The loop over the scheduler of `diffusers`, two passes, and ours: the same image from the same network."""
    build, out = bench_variants.build, []

    def shaken(*args):  # a new network gives 0 for every input
        network, rng = build(*args), torch.Generator().manual_seed(1)
        for p in network.parameters():
            p.data += 0.02 * torch.randn(p.shape, generator=rng)
        return network

    monkeypatch.setattr(bench_variants, "build", shaken)
    monkeypatch.setattr(bench_variants, "autocast", lambda variant, device: runtime.autocast(device, "float32"))
    for variant in (bench_variants.OURS, bench_variants.SAME):
        torch.manual_seed(0)
        out.append(bench_variants.sampler("fast", variant, steps, torch.device("cpu"), side=32)())
    assert out[0].std() > 1e-3
    torch.testing.assert_close(*out, rtol=1e-2, atol=1e-2)  # group norms magnify rounding


@pytest.mark.parametrize("variant", [bench_variants.OURS, bench_variants.SAME, bench_variants.PLAIN])
def test_training_steps_learn(variant):
    """Every variant of the student's training step lowers the loss."""
    stacks = [{"x": x} for x in np.random.default_rng(0).random((2, 4, 40, 40), dtype=np.float32)]
    stacks[1]["x"] *= 0.5
    name, device = bench_variants.STUDENT, torch.device("cpu")
    _, step = bench_variants.trainer("fast", name, variant, stacks, 2, 32, device)
    losses = [step().item() for _ in range(12)]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


def test_operations_of_a_convolution():
    """One 3x3 convolution of 4 to 8 channels: two operations for each weight and pixel."""
    conv = torch.nn.Conv2d(4, 8, 3, padding=1)
    assert bench.operations(lambda: conv(torch.rand(1, 4, 10, 10))) * 1e9 == 2 * 4 * 8 * 9 * 100


def test_sections(made, tmp_path):
    """The student's PSNR is that of its prediction file; sections of another run are kept."""
    flags = ["--preset", "fast", "--repeats", 1, "--data", made / "knee.h5", "--student", made / "student.pt"]
    ok("experiments.bench", *flags, "--sections", "crops", cwd=tmp_path)
    said = ok("experiments.bench", *flags, "--sections", "student", cwd=tmp_path).stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["method"]: row for row in found["student"]}
    assert "| wavelet |" in said and all(row["ms_512"] > 0 for row in rows.values())
    applied = ["--predict", "--data", made / "knee.h5", "--model", made / "student.pt", "--out", "out.h5"]
    ok("distill", *applied, cwd=tmp_path)
    x, pred = data.read_volumes(made / "knee.h5", "clean", "test"), data.read_volumes(tmp_path / "out.h5", "pred")
    mse = [np.square(x["v1"][s] - pred["v1"][s]).mean() for s in range(2)]
    assert rows["student"]["psnr"] == pytest.approx(np.mean(-10 * np.log10(mse)), abs=0.05)
    assert min(rows[name]["psnr"] for name in rows if name != "student") > 30
    assert {row["way"] for row in found["crops"]} == {"in memory", "streamed from HDF5", "DataLoader"}
    assert found["machine"]["matrix_product_gflop_per_s"]["float32"] > 0


def test_gpu_and_curves_run_on_a_cpu(tmp_path):
    """The same code with another device: tests, and a curve with its estimate, table and figure."""
    make_dataset(tmp_path / "knee.h5")
    small = ["--parts", "tests", "curves", "--tests", "tests/test_house.py", "--at", 2, 4, "--device", "cpu"]
    small += ["--data", "knee.h5"]
    tiny = ["--width", 8, "--mult", 1, 2, "--crop", 32, "--blocks", 1]
    ok("experiments.gpu", "--out", "g.json", *small, "--bsn", "--steps 2 --width 8", "--", *tiny, cwd=tmp_path)
    found = json.loads((tmp_path / "g.json").read_text())
    points = found["curves"]["points"]
    assert torch.load(tmp_path / "g/bsn.pt", weights_only=True)["step"] == 2  # --bsn was heard
    assert found["tests"]["passed"] and [p["step"] for p in points] == [2, 4]
    assert all(abs(p["estimated"] - p["pair"]) < 0.5 for p in points) and points[0]["mix"] > 32
    assert "| step |" in (tmp_path / "g/curves.md").read_text()
    ok("experiments.curves", "--out", "g", "--figure", "c.png", cwd=tmp_path)
    assert (tmp_path / "c.png").stat().st_size > 5000
