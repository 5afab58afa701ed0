"""How a run is kept: resumed runs and several processes give the same weights; nothing half-made stands."""

import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, make_dataset, ok, run

import data
import runtime

STAGES = {
    "bsn": ("bsn.pt", ["--data", "knee.h5"]),
    "diffusion": ("diffusion.pt", ["--data", "knee.h5", "--cond", "bsn_out.h5"]),
    "distill": ("student.pt", ["--data", "knee.h5", "--target", "bsn_out.h5"]),
}
KNOWN = ["--noise", "gaussian:6/255:0.5"]
WAYS = {  # stages and those of their ways that draw or read something of their own
    **STAGES,
    "diffusion hidden": ("diffusion.pt", [*STAGES["diffusion"][1], "--condition", "hidden"]),
    "diffusion augmented": ("diffusion.pt", [*STAGES["diffusion"][1], "--condition", "augmented", *KNOWN]),
    "distill recorrupted": (
        "student.pt",
        ["--data", "knee.h5", "--target", "recorrupted", "--pred", "bsn_out.h5", *KNOWN],
    ),
}


@pytest.fixture
def folder(made, tmp_path):
    for name in ("knee.h5", "bsn_out.h5"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    return tmp_path


def weights(path):
    state = torch.load(path, weights_only=True)
    return {f"{part}.{k}": v for part in ("model", "ema") for k, v in state[part].items()} | {
        "lr": state["scheduler"]["_last_lr"]
    }


@pytest.mark.parametrize("way", WAYS)
def test_two_and_two_steps_are_four(folder, way):
    """Bit for bit: weights, EMA, learning rate and predictions. No flag but the inputs is repeated to resume."""
    model, inputs = WAYS[way]
    stage, *hidden = way.split()
    if hidden == ["hidden"]:
        ok("bsn", "--data", "knee.h5", "--hidden", *TINY["bsn"], cwd=folder)
    flags = [*inputs, *TINY[stage], "--seed", 7]
    ok(stage, *flags, "--model", "four.pt", *out(stage, "four.h5"), cwd=folder)
    ok(stage, *flags, "--model", model, "--stop-at", 2, *out(stage, "two.h5"), cwd=folder)
    assert not (folder / model).exists() and (folder / f"{model}.part").exists() and not (folder / "two.h5").exists()
    ok(stage, *inputs, "--model", model, "--resume", *out(stage, "two.h5"), cwd=folder)
    assert not (folder / f"{model}.part").exists()
    a, b = weights(folder / "four.pt"), weights(folder / model)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)
    if stage != "diffusion":
        four, two = (data.read_volumes(folder / name, "pred") for name in ("four.h5", "two.h5"))
        assert all(np.array_equal(four[name], two[name]) for name in four)


def out(stage, name):
    return [] if stage == "diffusion" else ["--out", name]


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_one(folder, way):
    """torchrun with two gloo processes, stopped and resumed, gives the weights and predictions of one process."""
    stage, *hidden = way.split()
    if hidden == ["hidden"]:
        ok("bsn", "--data", "knee.h5", "--hidden", *TINY["bsn"], cwd=folder)
    inputs = [*WAYS[way][1], *TINY[stage], "--precision", "float32"]
    ok(stage, *inputs, "--model", "one.pt", *out(stage, "one.h5"), cwd=folder)
    for more in (["--stop-at", 2], ["--resume"]):
        two_processes(stage, *inputs, "--model", "two.pt", *out(stage, "two.h5"), *more, cwd=folder)
        assert (folder / "two.pt.part").exists() == (more[0] == "--stop-at")
    one, two = weights(folder / "one.pt"), weights(folder / "two.pt")
    for k in one:
        if torch.is_tensor(one[k]):
            torch.testing.assert_close(one[k], two[k], rtol=0, atol=1e-5)
    if stage != "diffusion":
        same_predictions(folder / "one.h5", folder / "two.h5")


def two_processes(stage, *flags, cwd):
    """Runs a stage under torchrun, two gloo processes; it must succeed. Returns what it printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(ROOT / f"{stage}.py"), *map(str, flags)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def same_predictions(one, two):
    """The same arrays, within 1e-5, of the same volumes."""
    with h5py.File(one) as a, h5py.File(two) as b:
        assert list(a["volumes"]) == list(b["volumes"])
        for name, group in a["volumes"].items():
            assert list(group) == list(b["volumes"][name])
            for key in group:
                np.testing.assert_allclose(group[key][:], b["volumes"][name][key][:], rtol=0, atol=1e-5)


def test_two_processes_share_the_slices(made, tmp_path):
    """srds.py under torchrun: every slice is sampled once, by one of the two, and the file is that of one process."""
    flags = ["--cond", made / "bsn_out.h5", "--model", made / "diffusion.pt", "--steps", 2, "--batch", 1]
    flags += ["--precision", "float32"]
    ok("srds", *flags, "--out", "one.h5", cwd=tmp_path)
    said = two_processes("srds", *flags, "--out", "two.h5", cwd=tmp_path)
    assert said.count("EMA weights") == 1 and said.count("2 volumes") == 1
    same_predictions(tmp_path / "one.h5", tmp_path / "two.h5")


def test_terminated_and_resumed(folder):
    """SIGTERM (SLURM's) ends a step, saves and exits 130; --resume goes on from there."""
    flags = [*STAGES["bsn"][1], *TINY["bsn"], "--steps", 100000]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "bsn.py"), *map(str, flags)], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    while not (folder / "bsn.jsonl").exists():  # made when the loop begins
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert "go on with --resume" in process.communicate(timeout=60)[0] and process.returncode == 130
    step = torch.load(folder / "bsn.pt.part", weights_only=True)["step"]
    assert step > 0 and not (folder / "bsn.pt").exists()
    ok("bsn", *STAGES["bsn"][1], "--resume", "--steps", step + 2, cwd=folder)
    assert torch.load(folder / "bsn.pt", weights_only=True)["step"] == step + 2


def test_resume_with_other_inputs_is_refused(folder, made):
    """Other noisy images, another target, another stage's checkpoint: each has its line."""
    for name in ("bsn.pt", "student.pt", "srds_out.h5"):
        (folder / name).write_bytes((made / name).read_bytes())
    make_dataset(folder / "other.h5", seed=5)
    for stage, flags, says in [
        ("bsn", ["--data", "other.h5"], "bsn.pt was trained with other data as --data: it cannot resume"),
        ("distill", STAGES["distill"][1], "student.pt was trained with other data as --target: it cannot resume"),
        ("bsn", ["--data", "knee.h5", "--model", "student.pt"], "student.pt is a checkpoint of distill, not of bsn"),
    ]:
        done = run(stage, *flags, "--resume", "--steps", 6, cwd=folder)
        assert done.returncode == 2 and says in done.stderr, done.stderr


def test_new_learning_rate_on_resume(folder):
    """Any flag given overrides the checkpoint's."""
    ok("bsn", "--data", "knee.h5", *TINY["bsn"], "--stop-at", 2, cwd=folder)
    ok("bsn", "--data", "knee.h5", "--resume", "--lr", 1e-7, cwd=folder)
    state = torch.load(folder / "bsn.pt", weights_only=True)
    assert state["args"]["lr"] == 1e-7 and state["scheduler"]["base_lrs"] == [1e-7] and state["args"]["batch"] == 2


def test_checkpoint_is_plain_and_complete(made):
    state = runtime.load_checkpoint(made / "diffusion.pt", "diffusion")
    assert state["step"] == 4 and state["args"]["lr"] == 1e-3 and state["extra"]["predict"] == "v"
    assert {"model", "ema", "optimizer", "scheduler", "model_args", "inputs"} <= state.keys()


def test_step_rng_is_counted():
    assert runtime.step_rng(0, 5).random() == runtime.step_rng(0, 5).random() != runtime.step_rng(0, 6).random()
    assert runtime.step_rng(1, 5).random() != runtime.step_rng(0, 5).random()


def test_ema_follows_its_formula():
    """The decay is the smaller of the given one and (1+n)/(10+n)."""
    average, update = [torch.zeros(1)], runtime.ema_update(0.9)
    update(average, [torch.ones(1)], 1)
    assert average[0].item() == pytest.approx(1 - 2 / 11)
    update(average, [torch.ones(1)], 1000)
    assert average[0].item() == pytest.approx(1 - 0.9 * 2 / 11)


@pytest.mark.parametrize("text, value", [("6/255", 6 / 255), ("0.5", 0.5)])
def test_fraction(text, value):
    assert runtime.fraction(text) == value


def test_help_of_every_script(tmp_path):
    for script in ("data", "noise", "bsn", "diffusion", "srds", "distill", "baselines", "evaluate", "denoise", "bench"):
        assert "usage:" in ok(script, "--help", cwd=tmp_path).stdout
