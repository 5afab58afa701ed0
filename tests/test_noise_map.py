"""Noise that is stronger in some places than in others: its map, and images that are divided by it."""

import json

import numpy as np
import pytest
import tifffile
import torch
from conftest import ellipses, ok, run
from scipy.ndimage import gaussian_filter
from test_measure import phantom

import data
import distill
import evaluate
import noise
import posterior
from lib import crops, residual

LEVEL = 8 / 255


def uneven(slices=6, h=120, w=136):
    """(clean, noisy, by what factor the noise is stronger than LEVEL), (slices,h,w) float32: strong in the middle."""
    x = gaussian_filter(ellipses(np.random.default_rng(1), slices, h, w), (0.5, 0.7, 0.7)).astype(np.float32)
    rows, columns = np.mgrid[:h, :w]
    g = 0.6 + 1.2 * np.exp(-((rows - h / 2) ** 2 + (columns - w / 2) ** 2) / (0.3 * h) ** 2)
    y = x + LEVEL * g * np.random.default_rng(2).standard_normal(x.shape)
    return x, y.astype(np.float32), np.broadcast_to(g, x.shape).astype(np.float32)


def write(path, x, y):
    with data.write_volumes(path, "dataset", "test") as add:
        noisy, clean = add("v", y.shape, ["noisy", "clean"], split="train", scale=1.0, offset=0.0)
        noisy[:], clean[:] = y, x


def test_enlarge():
    """Constant stays constant, a ramp a ramp between the centres of the outer blocks; a single block is enough."""
    ramp = residual.in_squares(np.broadcast_to(np.arange(40.0)[:, None], (40, 24))[None])[0]
    assert np.allclose(crops.enlarge(ramp, (40, 24))[4:-4], np.arange(4, 36)[:, None])
    assert (crops.enlarge(np.full((1, 1), 3.0), (5, 7)) == 3).all()


def test_in_squares():
    """Blocks at the rim are means over the pixels that there are."""
    v = np.random.default_rng(0).random((2, 19, 16))
    found = residual.in_squares(v)
    assert found.shape == (2, 3, 2) and found[1, 2, 1] == pytest.approx(v[1, 16:, 8:].mean())


@pytest.mark.parametrize("context, level", [(0, LEVEL), (2, LEVEL), (2, 0.6 * LEVEL)])
def test_the_map_is_found(context, level):
    """Of a denoiser that is told one level for all, also one that is too low; where the noise is alike, hardly any."""
    x, y, g = uneven()
    model = noise.known("gaussian", level)
    told = distill.student(f"weights/{'volumes' if context else 'images'}.pt", told=(model, {"": y}))
    blocks = evaluate.noise_map(told.once, y, model)
    found = np.stack([crops.enlarge(b, y.shape[1:]) for b in blocks]) * level / LEVEL
    ratio = found / g
    assert np.mean(np.abs(ratio / np.median(ratio) - 1) < 0.15) > 0.85 and 0.8 < np.median(ratio) < 1.1
    assert evaluate.estimate(told, {"": y}, model, 4)["uneven"] > 0.1
    alike = (x + LEVEL * np.random.default_rng(3).standard_normal(x.shape)).astype(np.float32)
    assert evaluate.estimate(told, {"": alike}, noise.known("gaussian", LEVEL), 4)["uneven"] < 0.08


def test_what_is_left_of_noise_in_the_dark_is_no_map():
    """Poisson noise, and a little of a scanner's own: nearly all noise in the air, nearly none of it elsewhere."""
    x, model = 0.02 + 0.9 * uneven()[0], noise.known("poisson", 200)
    y = x + np.sqrt(noise.variance(model, x) + 0.02**2) * np.random.default_rng(4).standard_normal(x.shape)
    y = y.astype(np.float32)
    told = distill.student("weights/volumes.pt", told=(model, {"": y}))
    assert evaluate.estimate(told, {"": y}, model, 4)["uneven"] < 0.07


def test_texture_counts_little(monkeypatch):
    """A denoiser takes off texture, too: it passes for noise, and must not for noise that is uneven."""
    waves = np.where(np.arange(128) < 96, 0, 0.4) * np.sin(np.arange(128) * np.pi / 2 + 0.4)
    y = (0.5 + waves + 0.05 * np.random.default_rng(0).standard_normal((1, 128, 128))).astype(np.float32)

    def blur(stack):
        return torch.from_numpy(gaussian_filter(stack.numpy(), (0, 0, 0.6, 0.6)))

    def seen():
        return evaluate.estimate(blur, {"": y}, noise.known("gaussian", 0.05), 1)["uneven"]

    found = seen()
    monkeypatch.setattr(residual, "texture", lambda x: np.zeros((1, 16, 16)))
    assert found < 0.8 * seen()


def test_dark_magnitudes_do_not_count():
    """Near black, the noise of magnitudes is weaker: no reason for a map."""
    model, rng = noise.known("gaussian", 1.0) | dict(dark=3.0), np.random.default_rng(0)
    x = np.zeros((1, 96, 96)) + 20 * (np.arange(96) > 48)
    y = np.hypot(x + rng.standard_normal(x.shape), rng.standard_normal(x.shape))
    z = rng.standard_normal(x.shape)
    for known, weak in ((model, False), (model | dict(dark=0.0), True)):
        found = evaluate.found_gain(known, y, np.where(x > 0, x, 1.25), z, 0 * z)
        assert (found[0, :, :4].mean() < 0.8 * found[0, :, 8:].mean()) == weak


def test_places_without_photons_do_not_count():
    """Where pixels are equal to their neighbours there was nothing to measure: such blocks take the gain of others."""
    rng = np.random.default_rng(0)
    noisy = 1 + 2 * rng.standard_normal((1, 96, 96))  # twice as strong as the model says
    z, empty = rng.standard_normal(noisy.shape), np.where(np.arange(96) < 48, 1.0, noisy)
    for y in (noisy, empty):  # a network never gives back quite the same
        x = np.where(y == 1, 1 + 0.3 * rng.standard_normal(y.shape), 1)
        found = residual.gain(y, x, z, 0 * z, np.ones_like(y))
        assert found.mean() == pytest.approx(2, rel=0.1) and found.min() > 1.6


def test_divide_and_multiply(tmp_path):
    """What was divided comes back, under the old fingerprint; the noise model says that it is of divided images."""
    x, y, g = uneven(3)
    write(tmp_path / "a.h5", x, y)
    with data.write_volumes(tmp_path / "map.h5", "prediction", "evaluate", like=tmp_path / "a.h5") as add:
        add("v", g.shape, ["gain"])[0][:] = g
    ok("noise", *"divide --data a.h5 --map map.h5 --out even.h5".split(), cwd=tmp_path)
    even = data.read_volumes(tmp_path / "even.h5")["v"]
    assert np.allclose(even, y / g) and np.allclose(data.read_volumes(tmp_path / "even.h5", "clean")["v"], x / g)
    with data.write_volumes(tmp_path / "p.h5", "prediction", "bsn", like=tmp_path / "even.h5") as add:
        add("v", g.shape, ["pred"])[0][:] = even
    ok("noise", *"multiply --data even.h5 --pred p.h5 --like a.h5 --out out.h5".split(), cwd=tmp_path)
    assert np.allclose(data.read_matching(tmp_path / "out.h5", tmp_path / "a.h5")["v"], y, atol=1e-6)
    ok("measure", *"--data even.h5 --out law.json".split(), cwd=tmp_path)
    assert noise.parse_noise_model(str(tmp_path / "law.json"))["varies"]


def test_volumes_of_other_levels(tmp_path):
    """Alike all over, but 2.5 times as strong as told: the map says so. Together, two volumes are as each by itself."""
    x, *_ = uneven()
    noisy = {
        k: (x + k * LEVEL * np.random.default_rng(3).standard_normal(x.shape)).astype(np.float32) for k in (1, 2.5)
    }
    model = noise.known("gaussian", LEVEL)
    told = distill.student("weights/volumes.pt", told=(model, {"": x}))
    assert np.median(evaluate.noise_map(told.once, noisy[2.5], model)) == pytest.approx(2.5, rel=0.12)
    for folder, which in (("one", [1]), ("other", [2.5]), ("both", [1, 2.5])):
        (tmp_path / folder).mkdir()
        for k in which:
            np.save(tmp_path / folder / f"{k}.npy", noisy[k])
        ok("denoise", folder, "--instant", "--out", f"{folder}_out", cwd=tmp_path)
    for folder, k in (("one", 1), ("other", 2.5)):
        off = [np.load(tmp_path / f"{name}_out/{k}.npy") - x for name in (folder, "both")]
        alone, together = (-10 * np.log10(np.square(o).mean()) for o in off)
        assert together > alone - 0.4


def test_denoise_divides(tmp_path):
    """Folder and dataset: the map is used, for new files as well, and pays at least 0.5 dB."""
    x, y, g = uneven()
    write(tmp_path / "a.h5", x, y)
    np.save(tmp_path / "a.npy", y)
    done = ok("denoise", *"--data a.h5 --out set --instant --context 2".split(), cwd=tmp_path)
    assert "images are divided by its map" in done.stdout and "| denoised |" in done.stdout
    known = json.loads((tmp_path / "set/noise.json").read_text())
    assert known["varies"]
    level = LEVEL * np.sqrt(np.mean(g**2))
    flat = distill.student("weights/volumes.pt", told=(noise.known("gaussian", level), {"": y}))
    rival = [flat(torch.from_numpy(data.read_around(y, s, 2))[None])[0, 0].numpy() for s in range(len(y))]

    def psnr(out):
        return -10 * np.log10(np.mean((out - x) ** 2))

    inside = psnr(data.read_volumes(tmp_path / "set/denoised.h5", "pred")["v"])
    ok("denoise", *"a.npy --out new --model set/student.pt".split(), cwd=tmp_path)
    files = psnr(np.load(tmp_path / "new/a.npy"))
    assert min(inside, files) > psnr(np.stack(rival)) + 0.5 and abs(inside - files) < 0.4


def test_signal_of_magnitudes():
    """What the mean of the magnitude of several coils says of the signal: from the air's two numbers alone."""
    rng, s = np.random.default_rng(0), 0.05
    for coils in (1, 4, 16):
        signal = np.repeat(np.array([0, 1, 2, 4, 8, 20]) * s, 200_000).reshape(6, -1)
        parts = rng.normal(0, s, (2 * coils, *signal.shape))
        parts[0] += signal
        magnitude = np.sqrt(np.square(parts).sum(0))
        mean, air = magnitude.mean(1), (magnitude[0].mean(), magnitude[0].var())
        law = noise.known("gaussian", s) | dict(air=air)
        found = posterior.signal(mean, noise.variance(law, mean), air)
        assert found[0] < 0.15 * s and np.abs(found[3:] - signal[3:, 0]).max() < 0.15 * s
        assert (np.abs(found - signal[:, 0]) < 0.5 * np.maximum(mean - signal[:, 0], 0.1 * s)).all()


def test_bias_correct_and_map_of_files(tmp_path):
    """Four coils on a dark ground: black comes out black, and <name>_noise has the deviation; refused without air."""
    rng, s = np.random.default_rng(0), 60.0
    x = np.stack(phantom(6, 160))
    x = np.where(x > 0.35, 2500 * x, 0)
    parts = rng.normal(0, s, (8, *x.shape))
    parts[0] += x
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/a.npy", np.sqrt(np.square(parts).sum(0)).astype(np.float32))
    flags = ["in", "--instant", "--noise-map-out", "--out"]
    ok("denoise", *flags, "plain", cwd=tmp_path)
    ok("denoise", *flags, "corrected", "--bias-correct", cwd=tmp_path)
    air, tissue = x == 0, x > 1000
    plain, corrected = (np.load(tmp_path / name / "a.npy") for name in ("plain", "corrected"))
    assert np.median(plain[air]) > 2.3 * s and np.median(corrected[air]) < 1.2 * s
    assert abs(np.mean((corrected - x)[tissue])) < abs(np.mean((plain - x)[tissue])) < 0.3 * s
    level = tifffile.imread(tmp_path / "corrected/a.npy_noise.tif")
    assert level.shape == x.shape and np.median(level[tissue]) == pytest.approx(s, rel=0.2)
    np.save(tmp_path / "in/a.npy", (x + rng.normal(0, s, x.shape)).astype(np.float32))
    refused = run("denoise", *flags, "no", "--bias-correct", cwd=tmp_path)
    assert refused.returncode == 2 and "--bias-correct: the noise model knows no air" in refused.stderr


def test_given_map(tmp_path):
    """A map from elsewhere is as good as the true one; of another shape, or of nothing, it is refused in one line."""
    x, y, g = uneven()
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/a.npy", y)
    for name, image in (("sigma", 50 * g), ("other", g[:, :60]), ("none", 0 * g)):
        np.save(tmp_path / f"{name}.npy", image)
    ok("denoise", *"in --instant --out plain".split(), cwd=tmp_path)
    done = ok("denoise", *"in --instant --noise-map sigma.npy --out given".split(), cwd=tmp_path)
    assert "images are divided by its map" in done.stdout
    plain, given = (np.square(np.load(tmp_path / name / "a.npy") - x).mean() for name in ("plain", "given"))
    assert given < 1.05 * plain
    ok("data", *"import in --split train --out in.h5".split(), cwd=tmp_path)
    ok("noise", *"divide --data in.h5 --map sigma.npy --out even.h5".split(), cwd=tmp_path)
    made = (data.read_volumes(tmp_path / name / "even.h5", "gain") for name in ("", "given/diffdenoise"))
    np.testing.assert_array_equal(*(next(iter(found.values())) for found in made))
    missing = run("noise", *"divide --data in.h5 --map gone.npy --out no.h5".split(), cwd=tmp_path)
    assert missing.returncode == 2 and "gone.npy does not exist" in missing.stderr
    for name, says in (("other", "6x60x136, the images are 6x120x136"), ("none", "no deviation is above 0")):
        refused = run("denoise", *f"in --instant --noise-map {name}.npy --out no".split(), cwd=tmp_path)
        assert refused.returncode == 2 and says in refused.stderr and refused.stderr.count("\n") == 1
