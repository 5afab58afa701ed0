"""How a run is kept: resumed runs and several processes give the same weights; nothing half-made stands."""

import argparse
import json
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
from lib import runtime, training

STAGES = {
    "bsn": ("bsn.pt", ["--data", "knee.h5"]),
    "diffusion": ("diffusion.pt", ["--data", "knee.h5", "--cond", "bsn_out.h5"]),
    "distill": ("student.pt", ["--data", "knee.h5", "--target", "bsn_out.h5"]),
}
KNOWN = ["--noise", "gaussian:6/255:0.5"]
WAYS = {  # stages and those of their ways that draw or read something of their own
    **STAGES,
    "diffusion hidden": ("diffusion.pt", [*STAGES["diffusion"][1], "--condition", "hidden"]),
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
    """Raw and averaged weights and the learning rate, of the state that a finished training leaves."""
    state = torch.load(f"{path}.part", weights_only=True)
    found = {f"{kind}.{k}": v for kind in ("model", "ema") for k, v in state[kind].items()}
    shipped = torch.load(path, weights_only=True)
    assert all(torch.equal(state["ema"][k], v) for k, v in shipped["ema"].items())
    return found | {"lr": state["scheduler"]["_last_lr"]}


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
        assert (folder / "two.pt").exists() == (more[0] == "--resume")
    one, two = weights(folder / "one.pt"), weights(folder / "two.pt")
    for k in one:
        if torch.is_tensor(one[k]):
            torch.testing.assert_close(one[k], two[k], rtol=0, atol=3e-4)  # 4 steps of Adam move a weight by up to 2e-3
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
    """Flags of the training override the checkpoint's; those of the network must not."""
    ok("bsn", "--data", "knee.h5", *TINY["bsn"], "--stop-at", 2, cwd=folder)
    done = run("bsn", "--data", "knee.h5", "--resume", "--width", 12, cwd=folder)
    assert done.returncode == 2 and "--width 12: bsn.pt was trained with" in done.stderr
    ok("bsn", "--data", "knee.h5", "--resume", "--lr", 1e-7, "--beta2", 0.5, cwd=folder)
    state = torch.load(folder / "bsn.pt", weights_only=True)
    assert state["args"]["lr"] == 1e-7 and state["args"]["batch"] == 2
    whole = torch.load(folder / "bsn.pt.part", weights_only=True)
    assert whole["scheduler"]["base_lrs"] == [1e-7]
    assert whole["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.5)


def test_checkpoint_is_plain_and_complete(made):
    """What is shipped holds what prediction needs; what is needed to train on stands beside it."""
    state = training.load_checkpoint(made / "diffusion.pt", "diffusion")
    assert state["step"] == 4 and state["args"]["lr"] == 5e-4 and state["extra"]["predict"] == "v"
    assert state.keys() == {"stage", "model_args", "extra", "inputs", "step", "args", "ema"}
    whole = training.load_checkpoint(made / "diffusion.pt.part", "diffusion")
    assert whole.keys() - state.keys() == {"model", "optimizer", "scheduler"}
    assert (made / "diffusion.pt").stat().st_size < 0.4 * (made / "diffusion.pt.part").stat().st_size


def test_extended_and_not_without_its_state(folder):
    """More --steps go on from the state beside the checkpoint; without it one line says why they cannot."""
    ok("bsn", "--data", "knee.h5", *TINY["bsn"], cwd=folder)
    ok("bsn", "--data", "knee.h5", "--resume", "--steps", 6, cwd=folder)
    assert torch.load(folder / "bsn.pt", weights_only=True)["step"] == 6
    (folder / "bsn.pt.part").unlink()
    before = (folder / "bsn.pt").read_bytes()
    done = run("bsn", "--data", "knee.h5", "--resume", "--steps", 8, cwd=folder)
    assert done.returncode == 2 and "cannot be extended: the state of its training, bsn.pt.part, is gone" in done.stderr
    ok("bsn", "--data", "knee.h5", "--resume", cwd=folder)  # nothing to do but to predict
    assert torch.load(folder / "bsn.pt", weights_only=True)["step"] == 6 and before == (folder / "bsn.pt").read_bytes()


def test_step_rng_is_counted():
    assert runtime.step_rng(0, 5).random() == runtime.step_rng(0, 5).random() != runtime.step_rng(0, 6).random()
    assert runtime.step_rng(1, 5).random() != runtime.step_rng(0, 5).random()


def test_ema_follows_its_formula():
    """The decay is the smaller of the given one and (1+n)/(10+n); the first step is taken over."""
    average, network = (torch.nn.Linear(1, 1, bias=False).requires_grad_(False) for _ in range(2))
    for weight, count, expected in ((3.0, 0, 3.0), (1.0, 1, 1 + 2 * 2 / 11), (1.0, 1000, 1 + 0.9 * 2 * 2 / 11)):
        network.weight.fill_(weight)
        training.ema_update(average, network, count, 0.9)
        assert average.weight.item() == pytest.approx(expected)


@pytest.mark.parametrize("text, value", [("6/255", 6 / 255), ("0.5", 0.5)])
def test_fraction(text, value):
    assert runtime.fraction(text) == value


def test_help_of_every_script(tmp_path):
    scripts = [path.stem for path in ROOT.glob("*.py")]
    assert len(scripts) == 10
    experiments = [f"experiments.{name}" for name in ("baselines", "bench", "demo", "reproduce")]
    for script in [*scripts, *experiments]:
        assert "usage:" in ok(script, "--help", cwd=tmp_path).stdout


def test_help_shows_the_presets(tmp_path):
    """Each setting is a flag, with its value in every preset."""
    said = " ".join(ok("distill", "--help", cwd=tmp_path).stdout.split())
    assert "peak learning rate (fast: 0.002, nafnet: 0.002, paper: 0.001)" in said
    assert "a of the recorruption (0.3)" in said and "(fast: 2 2, nafnet: 1 1 2, paper: 2 2 4 8)" in said


def watched(losses, tmp_path, trivial=1.0):
    """A run whose loss is what `losses` say, step by step; log lines after each ten steps. Returns the run."""
    network = torch.nn.Linear(1, 1)
    args = argparse.Namespace(steps=len(losses), batch=1, lr=1e-3, ema=0.9, seed=0, device="cpu", precision="float32")
    args.model, args.stop_at = str(tmp_path / "a.pt"), None
    run = training.Training("bsn", args, None, network, model_args={})
    for step in run.steps():
        run.update(network.weight.sum() * 0 + losses[step], torch.tensor(trivial))
    return run


def test_loss_is_compared_with_that_of_the_trivial_answer(tmp_path, monkeypatch, capsys):
    """A network that learns nothing is told of; one that has learned and falls back for good is stopped; others run."""
    monkeypatch.setattr(training, "LOG_EVERY", 0.0)
    watched([0.995] * 150, tmp_path)
    assert "the network has learned nothing: its loss is 0.995, that of the trivial answer 1" in capsys.readouterr().out
    for losses in ([1.0] * 50 + [0.8] * 450, [0.8] * 150 + [1.2] * 100 + [0.8] * 400, [-1.0] * 150):
        watched(losses, tmp_path)
        assert "nothing" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="was 0.8 at step .* the trivial answer, 1: try a lower"):
        watched([0.8] * 150 + [1.0] * 600, tmp_path)
    with pytest.raises(ValueError, match="trivial answer, -32"):
        watched([-36.0] * 150 + [-31.9] * 600, tmp_path, -32.0)


@pytest.mark.parametrize("stage", ["bsn", "diffusion", "distill", "recorrupted"])
def test_every_stage_learns_more_than_the_trivial_answer(stage, made, tmp_path):
    """The loss after a longer run, smoothed, is below that of an output of zero, or of the input."""
    flags = {
        "bsn": ["--data", "knee.h5"],
        "diffusion": ["--data", "knee.h5", "--cond", "bsn_out.h5", "--groups", "4"],
        "distill": ["--data", "knee.h5", "--target", "clean"],
        "recorrupted": ["--data", "knee.h5", "--target", "recorrupted", "--noise", "gaussian:6/255"],
    }[stage]
    script = "distill" if stage == "recorrupted" else stage
    out = [] if stage == "diffusion" else ["--out", tmp_path / "out.h5"]
    steps = ["--steps", 600 if script == "distill" else 250, "--lr", "3e-3", "--batch", 4, "--model", tmp_path / "a.pt"]
    ok(script, *flags, *TINY[script], *steps, *out, cwd=made)
    last = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[-1])
    assert last["trivial"] > 0 and last["smoothed"] < 0.97 * last["trivial"], last
