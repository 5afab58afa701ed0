"""Noise measured from noisy images alone: level, form, correlation, blind spot; what must not fool it."""

import io

import numpy as np
import pytest
from conftest import ellipses, ok, run
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom

import data
import measure
import noise
from lib import jpeg


def phantom(slices=12, side=192, seed=0):
    """Ellipses with soft edges and a gentle gradient: some structure everywhere, flat areas of many intensities."""
    images = gaussian_filter(ellipses(np.random.default_rng(seed), slices, side, side), (0, 1, 1))
    return list(0.05 + 0.85 * images + 0.05 * np.linspace(0, 1, side))


@pytest.mark.parametrize("correlation", [0, 0.5, 1.2])
@pytest.mark.parametrize("kind, level", [("gaussian", 6 / 255), ("poisson", 200), ("gamma", 100)])
def test_measured_from_the_images_alone(kind, level, correlation):
    """Level within 6 %, correlation with the neighbours within 0.06, the blind spot that the paper uses, the form."""
    truth, rng = noise.known(kind, level, correlation), np.random.default_rng(1)
    model = measure.measure([noise.add(x, kind, level, correlation, rng) for x in phantom()])
    x = np.array([0.2, 0.4, 0.6])
    off = np.sqrt(noise.variance(model, x) / noise.variance(truth, x)) - 1
    assert np.abs(off).mean() < 0.06, off
    near = slice(noise.REACH - 2, noise.REACH + 3)
    table, true = np.array(model["correlation"]), np.array(truth["correlation"])
    assert np.abs(table - true)[near, near].max() < 0.06
    assert model["blind_spot"] == {0: 1, 0.5: 5, 1.2: 9}[correlation]
    assert noise.form(model) == {"gaussian": "gaussian", "poisson": "poisson-gaussian", "gamma": "gamma"}[kind]


def test_masked_background_does_not_fool_it():
    """Half of each image set to 0, as skull-stripping does: the level is that of the rest."""
    rng = np.random.default_rng(0)
    images = [noise.add(x, "gaussian", 6 / 255, 0, rng) for x in phantom()]
    for image in images:
        image[:, :96] = 0
    model = measure.measure(images)
    assert np.sqrt(noise.variance(model, 0.4)) == pytest.approx(6 / 255, rel=0.06)


def test_rician_background_does_not_fool_it():
    """Magnitudes of complex Gaussian noise: at black the deviation is 0.66 of what it is elsewhere, and is left out."""
    rng, s = np.random.default_rng(0), 12 / 255
    images = []
    for x in phantom():
        x = np.where(x > 0.3, x, 0)
        images.append(np.hypot(x + rng.normal(0, s, x.shape), rng.normal(0, s, x.shape)).astype(np.float32))
    model = measure.measure(images, magnitude=True)
    assert np.sqrt(noise.variance(model, 0.6)) == pytest.approx(s, rel=0.06)


def test_nothing_but_noise():
    """Magnitudes that are noise around one value everywhere: not the air of many coils, for there is no signal."""
    images = list(0.5 + 0.1 * np.random.default_rng(0).standard_normal((8, 200, 200)))
    model = measure.measure(images, magnitude=True)
    assert noise.variance(model, 0.5) == pytest.approx(0.01, rel=0.03) and model["air"] is None


@pytest.mark.parametrize("coils", [4, 16])
def test_many_coils(coils):
    """Root of the sum of squares: the air is no darker than 3 deviations, its noise is weaker and less correlated."""
    rng, s, images = np.random.default_rng(0), 8 / 255, []
    for x in phantom(6):
        k = np.fft.fft(rng.normal(0, s, (2, coils, *x.shape)))
        k[..., 72:120] = 0  # zero-filled lines: noise that is correlated along the rows
        parts = np.fft.ifft(k).real * (4 / 3) ** 0.5
        parts[0, 0] += np.where(x > 0.35, x, 0)
        images.append(np.sqrt(np.square(parts).sum((0, 1))).astype(np.float32))
    model, blind = (measure.measure(images, magnitude=m) for m in (True, False))
    deviation, table = np.sqrt(noise.variance(model, 0.6)), np.array(model["correlation"])
    assert deviation == pytest.approx(s, rel=0.1) and 0.35 > model["dark"] > (2 * coils) ** 0.5 * s
    assert table[6, 7] == pytest.approx(np.sinc(0.75) / np.sinc(0), abs=0.05)
    assert np.sqrt(noise.variance(blind, 0.6)) < 0.85 * deviation


def xray(seed, texture=0.05):
    """An X-ray (256,256) in [0,1]: hardly a flat place where bright, flat where dark."""
    rng = np.random.default_rng(seed)
    r = np.hypot(*np.meshgrid(*2 * [np.linspace(-1, 1, 256)])) + 0.2 * gaussian_filter(rng.normal(0, 1, (256, 256)), 30)
    bright = np.clip(1.2 - r, 0, 1)
    return 0.03 + bright * (0.9 + texture * gaussian_filter(rng.normal(0, 1, (256, 256)), 1))


def test_photons_of_textured_images():
    """Texture at the bright end makes Poisson noise look like Gamma noise, its dark end like the air of coils."""
    rng = np.random.default_rng(0)
    images = [(rng.poisson(700 * xray(s)) / 700).astype(np.float32) for s in range(6)]
    assert measure.without_air(images)[1]  # it is taken for air, at first
    model = measure.measure(images, magnitude=True)
    assert noise.form(model).startswith("poisson") and model["dark"] == 0 and model["air"] is None
    for x in (0.05, 0.2, 0.8):
        assert noise.variance(model, np.array(x)) == pytest.approx(x / 700, rel=0.25)


def test_curve_under_texture():
    """As in X-rays: points right where dark, 12 to 42 % too high where bright, though blocks are alike there."""
    intensity = np.arange(0.04, 1, 0.04)
    texture = np.interp(intensity, [0.3, 0.5, 0.75, 0.98], [0, 0.3, 0.42, 0.12])
    disorder = np.interp(intensity, [0.04, 0.12, 0.3, 0.5, 1], [4.5, 2, 4, 1.8, 1])
    law = measure.fit_levels(intensity, intensity / 700 * (1 + texture), np.full(len(intensity), 450), disorder)
    assert law[2] == 0 and law[1] == pytest.approx(1 / 700, rel=0.2) and law[0] < 2e-5


def test_level_under_texture():
    """The same with white noise: the dark points say that its level is the same everywhere."""
    intensity = np.arange(0.02, 1, 0.042)
    over = np.interp(intensity, [0.2, 0.4, 0.6, 0.85, 0.95], [1.02, 1.3, 1.5, 1.6, 1.45])
    over[-1] = 1.12
    disorder = np.interp(intensity, [0.02, 0.15, 0.32, 0.5, 1], [1.1, 1.6, 2.7, 1.6, 1.2])
    law = measure.fit_levels(intensity, 5.5e-4 * over, np.full(len(intensity), 450), disorder)
    assert noise.form(dict(variance=law)) == "gaussian" and law[0] == pytest.approx(5.5e-4, rel=0.06)


def test_anisotropic_noise():
    """Zero-filled lines of k-space: correlation along one axis only."""
    rng = np.random.default_rng(0)
    images = []
    for x in phantom():
        k = np.fft.fft2(rng.normal(0, 6 / 255, x.shape))
        k[48:144] = 0
        images.append((x + np.fft.ifft2(k).real).astype(np.float32))
    table = np.array(measure.measure(images)["correlation"])
    assert table[noise.REACH + 1, noise.REACH] == pytest.approx(2 / np.pi, abs=0.08)
    assert abs(table[noise.REACH, noise.REACH + 1]) < 0.05


def test_expected_periodogram():
    """The exact mean of `periodogram` for correlated noise, against the mean over many blocks."""
    model = noise.known("gaussian", 1.0, 0.5)
    n = noise.sample(model, np.zeros((400, 64, 64), np.float32), np.random.default_rng(0))
    found = measure.periodogram(measure.in_blocks(n, 8)).mean(0)
    np.testing.assert_allclose(found, measure.expected(np.array(model["correlation"]), 8), atol=0.03, rtol=0.03)


def test_choosing_quiet_blocks_does_not_bias():
    """White noise alone: the 2 % flattest blocks measure the level of all."""
    power = measure.periodogram(np.random.default_rng(0).standard_normal((20000, 16, 16)))
    low = measure.halves(16)[0] < 0.25
    found = measure.flattest(power, power, low, 400)
    assert found[~low].mean() == pytest.approx(1, abs=0.01) and found[low][9:].mean() == pytest.approx(1, abs=0.04)
    _, even = measure.halves(16)
    naive = power[np.argsort(power[:, low].sum(1))[:400]].mean(0)
    assert naive[low & even].mean() < 0.8  # what it would be without the two halves


def test_measure_command(made, tmp_path):
    """Prints and writes the model; refuses images too small to tell."""
    rng = np.random.default_rng(0)
    with data.write_volumes(tmp_path / "a.h5", "dataset", "test") as add:
        (y,) = add("v", (12, 192, 192), ["noisy"], split="train", scale=1.0, offset=0.0, source="phantom")
        y[:] = np.stack([noise.add(x, "poisson", 200, 0, rng) for x in phantom()])
    done = ok("measure", "--data", "a.h5", "--out", "noise.json", cwd=tmp_path)
    assert "poisson-gaussian" in done.stdout and "blind spot to use: 1" in done.stdout
    assert measure.load_noise_model(str(tmp_path / "noise.json"))["blind_spot"] == 1
    done = run("measure", "--data", made / "knee.h5", cwd=tmp_path)
    assert done.returncode == 2 and "too few blocks" in done.stderr


@pytest.mark.parametrize("side", [128, 256])
def test_one_image_is_enough(side):
    """A single slice: level within 12 %, and the blind spot."""
    y = noise.add(phantom(1, side)[0], "gaussian", 12 / 255, 0, np.random.default_rng(0))
    model = measure.measure([y])
    assert np.sqrt(noise.variance(model, 0.4)) == pytest.approx(12 / 255, rel=0.12) and model["blind_spot"] == 1


def test_jpeg_is_told_from_images_that_never_were(tmp_path):
    """Stored at quality 75 and read back, the noise of flat areas is gone: it shows, at any crop."""
    rng, images, stored = np.random.default_rng(0), [], []
    for x in phantom(4, 192):
        images.append(noise.add(x, "gaussian", 8 / 255, 0, rng))
        file = io.BytesIO()
        Image.fromarray(np.clip(255 * images[-1], 0, 255).astype(np.uint8)).save(file, "JPEG", quality=75)
        stored.append(np.asarray(Image.open(file), np.float32)[3:, 5:] / 255)
    assert jpeg.jump(stored) > 1.2 and jpeg.jump(images) < 1.02 and jpeg.jump(phantom(4, 192)) < 1.02
    for name, said, stack in (("a.h5", False, images), ("b.h5", True, stored)):
        with data.write_volumes(tmp_path / name, "dataset", "test") as add:
            add("v", np.shape(stack), ["noisy"], split="train")[0][:] = stack
        found = measure.measure_file(tmp_path / name)
        assert found["compressed"] is said and found["blind_spot"] == 1  # also where JPEG has blurred the noise
    for factor in (4 / 3, 1.6, 2):  # interpolated images have a rhythm of their own
        assert jpeg.jump([zoom(x, factor, order=1) for x in images]) < 1.1


def test_zero_filled_lines_have_no_noise():
    """Where k-space was filled with zeros there is none to draw; blurred noise is not taken for it."""
    rng, images = np.random.default_rng(0), []
    for x in phantom(4):
        k = np.fft.fft2(x + rng.normal(0, 6 / 255, x.shape))
        k[:, 72:120] = 0
        images.append(np.fft.ifft2(k).real.astype(np.float32))
    assert measure.band(images) == pytest.approx([0.5, 0.375], abs=0.012)
    for blur in (0, 0.5, 1.2):
        assert measure.band([noise.add(x, "gaussian", 6 / 255, blur, rng) for x in phantom(4)]) == [0.5, 0.5]
    law = noise.known("gaussian", 0.1) | dict(band=[0.5, 0.375])
    power = np.abs(np.fft.fft2(noise.sample(law, np.zeros((40, 96, 96), np.float32), rng))).mean((0, 1))
    assert power[37:60].max() < 1e-3 * power[:36].min()
    assert noise.sample(law, np.zeros((40, 96, 96), np.float32), rng).std() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("end", [0.3, 0.375, 0.45])
def test_the_level_and_correlation_of_zero_filled_noise(end):
    """White within its band: correlation within 0.02, variance within 5 % of the truth (it was 12 to 26 % too low)."""
    rng, images = np.random.default_rng(0), []
    lines = np.abs(np.fft.fftfreq(192)) <= end
    for x in phantom(8):
        n = np.fft.ifft2(np.fft.fft2(rng.standard_normal(x.shape)) * lines).real
        images.append(np.fft.ifft2(np.fft.fft2(x) * lines).real + 6 / 255 * n / n.std())
    model = measure.measure(images)
    assert model["variance"][0] == pytest.approx((6 / 255) ** 2, rel=0.05)
    row = np.array(model["correlation"])[noise.REACH, noise.REACH :]
    np.testing.assert_allclose(row, np.sinc(2 * end * np.arange(noise.REACH + 1)), atol=0.02)


def textured(rng, shape=(6, 96, 96)):
    """A volume that is nowhere flat: what looks at one image takes its texture for noise."""
    x = gaussian_filter(rng.standard_normal(shape), (1, 0.7, 0.7))
    return (0.5 + 0.25 * gaussian_filter(rng.standard_normal(shape), (1, 8, 8)) * 40 + 0.1 * x / x.std()).clip(0.1, 1)


def write_repeats(path, volumes, scales):
    with data.write_volumes(path, "dataset", "test") as add:
        for k, (volume, scale) in enumerate(zip(volumes, scales)):
            add(f"run_{k:03d}", volume.shape, ["noisy"], split="train", scale=scale, offset=0.0)[0][:] = volume / scale


def test_a_prediction_that_holds_some_of_the_noise():
    """Where it is flattest there is less noise than elsewhere: the correlation must not be looked for there alone."""
    law, rng = noise.known("gaussian", 0.03, 1.2), np.random.default_rng(0)
    x = np.stack(phantom(6)).astype(np.float32)
    n = noise.sample(law, x, rng)
    found = measure.measure_correlation(list(x + n), list(x + 0.3 * gaussian_filter(n, (0, 2, 2))))
    assert np.abs(found - np.asarray(law["correlation"]))[4:9, 4:9].max() < 0.035


def test_what_slices_share_is_looked_for_between_edges():
    """The same phantom of sharp edges in every slice, independent noise: few blocks with edges must not decide."""
    from skimage.data import shepp_logan_phantom

    x = shepp_logan_phantom()[::2, ::2]
    y = (x + 0.03 * np.random.default_rng(0).standard_normal((8, *x.shape))).astype(np.float32)
    known = measure.measure(list(y))
    assert known["variance"][0] == pytest.approx(0.03**2, rel=0.1)
    assert abs(measure.blocks.shared_through([y], known["correlation"], 1)) < 0.1


def test_repeats_tell_the_noise(tmp_path):
    """Labels and controls in turn, each scaled by itself: the noise is what differs between every second one."""
    rng = np.random.default_rng(0)
    x, label = textured(rng), 0.03 * textured(rng)
    runs = [x + (k % 2) * label + rng.normal(0, 0.01, x.shape) for k in range(6)]
    write_repeats(tmp_path / "d.h5", runs, scales=[1 + 0.1 * k for k in range(6)])
    found = measure.measure_file(tmp_path / "d.h5")
    level = np.sqrt(noise.variance(found, np.array([0.3, 0.5])))
    assert np.all(np.abs(level / 0.01 - 1) < 0.3)  # in units of the first, whose scale is 1; the others differ by 50 %
    table = np.array(found["correlation"])
    assert np.abs(table).sum() - 1 < 0.1 and found["through"] == [0, 0]
    write_repeats(tmp_path / "one.h5", runs[:1], [1])
    alone = measure.measure_file(tmp_path / "one.h5")
    assert noise.variance(alone, 0.4) > 4 * noise.variance(found, 0.4)  # from one alone, texture is noise


def test_what_is_no_repeat(tmp_path):
    """Copies, but for rounding; and one filtered copy among other images: neither tells the noise."""
    rng = np.random.default_rng(0)
    y = textured(rng) + rng.normal(0, 0.01, (6, 96, 96))
    others = [textured(rng) + rng.normal(0, 0.01, y.shape) for _ in range(3)]
    sets = dict(one=[y], copies=[y + rng.normal(0, 1e-4, y.shape) for _ in range(3)])
    for name, volumes in sets.items():
        write_repeats(tmp_path / f"{name}.h5", volumes, [1] * len(volumes))
    one, copies = (noise.variance(measure.measure_file(tmp_path / f"{name}.h5"), 0.4) for name in sets)
    assert abs(copies / one - 1) < 0.2
    filtered = dict(enumerate([y, gaussian_filter(y, (0, 0.3, 0.3)), *others]))
    assert data.likeness(np.stack([filtered[0][3], filtered[1][3]])) > measure.SAME
    assert measure.differences(filtered, {k: {} for k in filtered}, {}) is None
    assert measure.differences({k: filtered[k] for k in (0, 1)}, {0: {}, 1: {}}, {}) is not None
