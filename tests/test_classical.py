"""Rivals without training: what they are told, and what happens without their packages."""

import sys

import numpy as np
import pytest
from conftest import make_dataset, ok, run

import noise
from experiments import classical


@pytest.mark.parametrize("kind, level", [("gaussian", 6 / 255), ("poisson", 200), ("gamma", 100)])
def test_stabilized_noise_has_unit_variance(kind, level):
    """At every intensity; the inverse gives back intensities, on average for Poisson noise (the unbiased inverse)."""
    forward, inverse = classical.stabilize(noise.known(kind, level))
    rng = np.random.default_rng(0)
    for x in (0.2, 0.5, 0.9):
        z = forward(noise.add(np.full((300, 300), x), kind, level, 0, rng).astype(float))
        assert z.std() == pytest.approx(1, rel=0.03)
        assert inverse(z.mean()) == pytest.approx(x, rel=0.008 if kind == "gamma" else 0.003)
    if kind == "poisson":  # less than no photons: a filter may give that where noise is correlated
        np.testing.assert_allclose(inverse(np.array([-1, 0.1, 1.5**0.5])), 0, atol=1e-12)


def test_without_the_package_one_line_says_so(made, tmp_path, monkeypatch):
    for name in classical.METHODS.values():
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="pip install -r experiments/requirements.txt"):
        classical.load("bm3d")
    done = run("experiments.classical", "--data", made / "knee.h5", "--method", "bm4d", cwd=tmp_path)
    assert done.returncode == 2 and "bm4d" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("method", classical.METHODS)
def test_told_the_noise_they_denoise(tmp_path, method):
    """Where they are installed: files of the contract, 2 dB better than the noisy images.

    Not ants: it finds the level by itself, and takes the small squares of these images for noise.
    """
    try:
        classical.load(method)
    except ValueError as reason:
        pytest.skip(str(reason))
    make_dataset(tmp_path / "knee.h5", sizes=((8, 48, 40), (8, 37, 53)))
    flags = ["--data", "knee.h5", "--method", method, "--noise", "gaussian:6/255", "--out", "out.h5"]
    ok("experiments.classical", *flags, cwd=tmp_path)
    said = ok("evaluate", "--data", "knee.h5", "--pred", "x=out.h5", cwd=tmp_path).stdout
    psnr = {line.split("|")[1].strip(): float(line.split("|")[2].split()[0]) for line in said.splitlines()[2:4]}
    assert psnr["x"] > psnr["noisy"] + 2 or method == "ants"
