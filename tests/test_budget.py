"""Quality after seconds of training: ours, rivals, and the predictions of other packages beside them."""

import json

import numpy as np
import pytest
import torch
from conftest import make_dataset, ok, run

import data
from experiments import peers


def test_cells_scores_and_figure(tmp_path):
    """A cell from clean images; what a peer has put beside it is scored by the call that only makes the table."""
    make_dataset(tmp_path / "clean.h5", sizes=((5, 96, 112), (4, 96, 100)))
    flags = ["a=clean.h5", "--noise", "gaussian:12/255", "--methods", "tuned", "--classic", "nlm", "--seconds", 1]
    ok("experiments.budget", *flags, "--out", "out", cwd=tmp_path)
    cell = tmp_path / "out/a-gaussian-12_255-0"
    found = json.loads((cell / "cell.json").read_text())
    assert set(found) == {"noisy", "nlm", "shipped", "tuned@1", "tuned1@1"}
    spent = {k: v["processor_seconds"] for k, v in json.loads((cell / "stages.json").read_text()).items() if v}
    for name in ("shipped", "tuned@1"):  # with the measuring of the noise, which comes before
        parts = [f"{name}_out.h5", "noise_first.json", "first_out.h5", "noise.json"]
        assert found[name]["seconds"] == pytest.approx(sum(spent[part] for part in parts))
    with data.write_volumes(cell / "peer-a@1_out.h5", "prediction", "peer-a", {}, like=cell / "noisy.h5") as add:
        for name, clean in data.read_volumes(cell / "noisy.h5", "clean", "test").items():
            add(name, clean.shape, ["pred"])[0][:] = clean[:] + np.float32(0.01)
    (cell / "peer-a.json").write_text(json.dumps({"peer-a@1": {"seconds": 7.5}}))
    table = ok("experiments.budget", "--out", "out", cwd=tmp_path).stdout
    again = json.loads((cell / "cell.json").read_text())
    assert again["peer-a@1"]["psnr"] == pytest.approx(40, abs=1e-3) and again["peer-a@1"]["seconds"] == 7.5
    assert again["tuned@1"]["psnr"] == found["tuned@1"]["psnr"]
    assert "| peer-a@1 | **40.00** |" in table
    assert (tmp_path / "out/seconds.png").stat().st_size > 5000


def test_clock_copies_the_network_when_a_budget_is_spent(monkeypatch):
    now, network = [0.0], torch.nn.Linear(1, 1)
    monkeypatch.setattr(peers.time, "process_time", lambda: now[0])
    clock = peers.Clock([4, 2])
    clock.start()
    for step in range(1, 6):
        now[0] = step
        with torch.no_grad():
            network.weight.fill_(step)
        assert clock.tick(network) == (step >= 4)
    assert {budget: (float(state["weight"]), steps) for budget, (state, steps) in clock.copies.items()} == {
        2: (2.0, 2),
        4: (4.0, 4),
    }


def test_predictions_of_a_peer(tmp_path, monkeypatch):
    """A peer sees the noisy training split alone, and what it predicts is written for the test split."""
    path, seen = make_dataset(tmp_path / "d.h5", sizes=((5, 32, 40), (4, 32, 36))), []

    def trainer(_name, train, clock, _args, _work):
        seen.extend(train)
        clock.start()
        while not clock.tick(torch.nn.Linear(1, 1)):
            pass
        return lambda budget, y: y + budget

    monkeypatch.setattr(peers, "deepinv", trainer)
    peers.main(["--data", str(path), "--method", "deepinv-r2r", "--seconds", "1", "--out", str(tmp_path / "out")])
    noisy = {split: data.read_volumes(path, "noisy", split) for split in ("train", "test")}
    for volume, y in zip(seen, noisy["train"].values(), strict=True):
        np.testing.assert_array_equal(volume, y)
    pred = data.read_volumes(tmp_path / "out/deepinv-r2r@1_out.h5", "pred")
    assert pred.keys() == noisy["test"].keys()
    for name in pred:
        np.testing.assert_array_equal(pred[name][:], noisy["test"][name][:] + 1)
    assert json.loads((tmp_path / "out/deepinv-r2r.json").read_text())["deepinv-r2r@1"]["training"] == 1


def test_peers_refuse(tmp_path):
    path = make_dataset(tmp_path / "d.h5", sizes=((5, 32, 40), (4, 32, 36)))
    done = run("experiments.peers", "--data", path, "--method", "careamics-n2v3d", "--out", "out", cwd=tmp_path)
    assert done.returncode == 2 and "8 slices" in done.stderr and not list((tmp_path / "out").iterdir())
