"""bench.py: what it times is what it says, and its sections run."""

import json

import pytest
import torch
from conftest import ok

import bench
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


def test_sections(made, tmp_path):
    flags = ["--preset", "fast", "--repeats", 1, "--data", made / "knee.h5", "--student", made / "student.pt"]
    said = ok("bench", *flags, "--sections", "student", "crops", "losses", "--steps", 1, cwd=tmp_path).stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {row["method"] for row in found["student"]} > {"student", "wavelet"} and "| wavelet |" in said
    assert all(20 < row["psnr"] < 50 and row["ms_512"] > 0 for row in found["student"])
    assert {row["way"] for row in found["crops"]} == {"in memory", "streamed from HDF5", "DataLoader"}
    by_form = {(row["network"], row["form"]): row for row in found["losses"]}
    assert len(by_form) == 12 and found["machine"]["matrix_product_gflop_per_s"]["float32"] > 0
