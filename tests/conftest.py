"""A small data set made on the spot, and a way to run the scripts as a user does."""

import importlib
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

import data
import noise
from lib import runtime

ROOT = Path(__file__).parent.parent

# Networks and runs of a few seconds: flags that every test run shares.
SMALL = "--width 8 --steps 4 --batch 2 --crop 32".split()
TINY = {
    "bsn": [*SMALL, "--enc-blocks", "1", "--middle-blocks", "1"],
    "diffusion": [*SMALL, "--mult", "1", "2", "--blocks", "1"],
    "distill": [*SMALL, "--enc-blocks", "1", "--middle-blocks", "1", "--dec-blocks", "1"],
}


def ellipses(rng, slices, h, w):
    """Overlapping ellipses of random brightness on black, (slices,h,w) in [0,1]."""
    y, x = np.mgrid[:h, :w]
    out = np.zeros((slices, h, w), np.float32)
    for image in out:
        for _ in range(12):
            cy, cx, a, b = rng.uniform(0, h), rng.uniform(0, w), rng.uniform(3, h / 2), rng.uniform(3, w / 2)
            image[((y - cy) / a) ** 2 + ((x - cx) / b) ** 2 < 1] = rng.uniform(0.1, 1)
        image /= image.max()
    return out


def make_dataset(path, seed=0, sizes=((3, 48, 40), (2, 37, 53)), clean=True):
    """A dataset of the contract: a train volume and a test volume of different sizes, Gaussian noise 6/255."""
    rng = np.random.default_rng(seed)
    with data.write_volumes(path, "dataset", "test") as add:
        for k, (size, split) in enumerate(zip(sizes, ("train", "test"))):
            x = ellipses(rng, *size)
            y = np.stack([noise.add(s, "gaussian", 6 / 255, 0, rng) for s in x])
            attrs = dict(split=split, scale=1.0, offset=0.0, source="ellipses", fingerprint=data.fingerprint(y))
            kept = add(f"v{k}", x.shape, ["noisy", "clean"] if clean else ["noisy"], **attrs)
            for array, values in zip(kept, (y, x)):
                array[:] = values
    return path


def collect_refusals(said, folder):
    """Adds the refusals among what was said to the file that REFUSALS names, for results/refusals.md."""
    said = said.replace(f"{folder}/", "").replace(str(folder), ".")
    refusals = [line for line in said.splitlines() if ": error: " in line or ": left out: " in line]
    if refusals and "REFUSALS" in os.environ:
        with open(os.environ["REFUSALS"], "a") as file:
            file.writelines(f"    {line}\n" for line in refusals)


def command(script, *flags):
    """The command line of a script of the project; "experiments.demo" is the module of that name."""
    target = ["-m", script] if "." in script else [str(ROOT / f"{script}.py")]
    return [sys.executable, *target, *map(str, flags)]


def run(script, *flags, cwd, env=None):
    """Runs a script of the project in a folder; returns a CompletedProcess with what it said as text.

    In this process, which has loaded torch already, unless there is an environment to run it in.
    """
    argv = command(script, *flags)
    if env:
        env = {**env, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    else:
        done, out, err = subprocess.CompletedProcess(argv, 0), io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(cwd)
            patch.setattr(sys, "argv", argv[-len(flags) - 1 :] if flags else argv[-1:])
            try:
                runtime.command(importlib.import_module(script).main)
            except SystemExit as ended:
                done.returncode = ended.code or 0
        done.stdout, done.stderr = out.getvalue(), err.getvalue()
    if done.returncode:
        collect_refusals(done.stderr, cwd)
    return done


def ok(script, *flags, cwd, env=None):
    """`run` that must succeed."""
    done = run(script, *flags, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder in which every stage has run once by its plain command: knee.h5, bsn_out.h5, diffusion.pt, ..."""
    folder = tmp_path_factory.mktemp("made")
    make_dataset(folder / "knee.h5")
    ok("bsn", "--data", "knee.h5", *TINY["bsn"], cwd=folder)
    ok("diffusion", "--data", "knee.h5", "--cond", "bsn_out.h5", *TINY["diffusion"], cwd=folder)
    ok("srds", "--cond", "bsn_out.h5", "--steps", "2", cwd=folder)
    ok("distill", "--data", "knee.h5", "--target", "srds_out.h5", *TINY["distill"], cwd=folder)
    ok("experiments.baselines", "--data", "knee.h5", cwd=folder)
    return folder
