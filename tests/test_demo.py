"""The demo from end to end with a hundredth of its training, interrupted once; denoise.py on a dataset."""

import json
import os

import pytest
from conftest import make_dataset, ok, run

import data


def test_demo_and_its_resume(tmp_path):
    flags = ["--effort", "0.01", "--slices", 20]
    first = ok("experiments.demo", *flags, cwd=tmp_path).stdout
    results = json.loads((tmp_path / "demo/results.json").read_text())
    assert list(results) == [
        "noisy",
        "non-local means, level known",
        "blind-spot network",
        "one sample, 10 steps",
        "SRDS pair, 10 steps",
        "student of the paper's recipe",
        "shipped network, instant",
        "tuned",
        "supervised",
    ]
    assert abs(results["noisy"]["psnr"] - 32.57) < 0.2 and results["noisy"]["n"] == 2
    assert results["shipped network, instant"]["psnr"] > results["noisy"]["psnr"] + 4
    assert results["SRDS pair, 10 steps"]["psnr"] > results["one sample, 10 steps"]["psnr"]
    assert (tmp_path / "demo/report.png").stat().st_size > 10_000 and "Highest PSNR: " in first
    commands = [line for line in first.splitlines() if line.startswith("$ python")]
    assert len(commands) == 19 and "$ python -m experiments.baselines --data demo/brain.h5 --sigma 6/255" in first
    # Started again, it does nothing but the table; with one output lost, it makes that one and what follows from it.
    stages = json.loads((tmp_path / "demo/stages.json").read_text())
    again = ok("experiments.demo", *flags, cwd=tmp_path).stdout
    assert "bsn:" not in again and "$ python" not in again
    assert json.loads((tmp_path / "demo/stages.json").read_text()) == stages
    (tmp_path / "demo/srds10_out.h5").unlink()
    third = ok("experiments.demo", *flags, cwd=tmp_path).stdout
    made = [line for line in third.splitlines() if line.startswith("$ python")]
    assert len(made) == 1 and "--out demo/srds10_out.h5" in made[0]
    assert json.loads((tmp_path / "demo/results.json").read_text()) == results


def test_denoise_hands_the_demo_over(tmp_path):
    """`denoise.py --demo` is the experiment: its own words, its own refusals, from any folder."""
    done = run("denoise", "--demo", "--rounds", 1, "--device", "cuda:7", cwd=tmp_path, env=os.environ)
    assert done.returncode == 2 and "$ python data.py import --source brain --out demo/clean.h5" in done.stdout
    assert done.stderr.startswith("demo.py: error: --device cuda:7")


COMMANDS = {  # that two rounds print, with what tells them from others
    "scratch": [
        "measure.py --data knee.h5 --out out/noise_first.json",
        "bsn.py --data knee.h5 --blind-spot 1 ",
        "measure.py --data knee.h5 --pred out/bsn_out.h5 --out out/noise.json",
        "posterior.py --data knee.h5 --pred out/bsn_out.h5 --noise out/noise.json",
        "distill.py --data knee.h5 --target recorrupted --pred out/posterior_out.h5 --noise out/noise.json --steps ",
        "distill.py --data knee.h5 --target recorrupted --pred out/recorrupted_out.h5 --noise out/noise_round2.json "
        "--init out/recorrupted.pt ",
    ],
    "paper": [
        "bsn.py --data knee.h5 --blind-spot 1 ",
        "diffusion.py --data knee.h5 --cond out/bsn_out.h5 ",
        "evaluate.py --no-reference --data knee.h5 --split all --noise out/noise_first.json --slices 4 ",
        "srds.py --cond out/bsn_out.h5 --model out/diffusion_",
        "distill.py --data knee.h5 --target out/srds_out.h5 ",
        "diffusion.py --data knee.h5 --cond out/paper_out.h5 ",
    ],
}


@pytest.mark.parametrize("recipe, rounds", [("scratch", 2), ("paper", 2)])
def test_denoise_a_dataset(recipe, rounds, tmp_path):
    """Both recipes, two rounds: the student, the denoised images of every volume, a report; no clean image is there."""
    make_dataset(tmp_path / "knee.h5", sizes=((4, 112, 128), (1, 96, 100)), clean=False)
    flags = ["--data", "knee.h5", "--out", "out", "--recipe", recipe, "--rounds", rounds, "--effort", "0.004"]
    done = ok("denoise", *flags, cwd=tmp_path)
    assert "| denoised |" in done.stdout
    for command in COMMANDS[recipe]:
        assert f"\n$ python {command}" in done.stdout
    denoised = data.read_matching(tmp_path / "out/denoised.h5", tmp_path / "knee.h5")
    assert {name: a.shape for name, a in denoised.items()} == {"v0": (4, 112, 128), "v1": (1, 96, 100)}
    applied = ["--predict", "--ensemble", 8, "--data", "knee.h5", "--model", "out/student.pt", "--out", "again.h5"]
    ok("distill", *applied, cwd=tmp_path)
    again = data.read_volumes(tmp_path / "again.h5", "pred")
    assert all((again[name] == denoised[name]).all() for name in again)
    assert "steps in" not in ok("denoise", *flags, cwd=tmp_path).stdout  # nothing is made twice
