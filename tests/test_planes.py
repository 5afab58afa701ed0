"""A student over volumes in three planes: exact for trivial denoisers, weighed by Stein's estimate, and better."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ok
from scipy.ndimage import gaussian_filter

import data
import denoise
import distill
import noise
from lib import planes, training


def blobs(shape=(20, 48, 56), seed=0):
    """A smooth volume with structure alike in all directions, about [0,1]."""
    x = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2.5)
    return ((x > 0.02) * 0.5 + 0.25 + x).astype(np.float32)


def test_planes_of_the_identity_are_the_volume():
    y = np.random.default_rng(0).random((5, 20, 33), np.float32)
    middle = lambda stacks: stacks[:, 2:3]  # noqa: E731
    for axis in range(3):
        np.testing.assert_array_equal(planes.across(middle, y, axis, 2)[0], y)
    student = SimpleNamespace(context=2)
    planes.equip(student, lambda axis: middle, 0.5, memory=1 << 30)
    np.testing.assert_array_equal(student.beside(y), y)
    assert student.planes == 0.5
    planes.equip(student, lambda axis: middle, 0.5, memory=y.size)
    assert student.beside(y) is None  # more memory than there is
    both = planes.across(lambda s: torch.cat([s[:, 2:3], s[:, 1:2]], 1), y, 0, 2)
    np.testing.assert_array_equal(both[1][1:], y[:-1])


@pytest.mark.parametrize("weight, most", [(0.25, 1 << 30), (0.25, 0), (0, 1 << 30)])
def test_a_whole_volume_as_it_is_written(weight, most):
    """`whole`, from which samples are drawn, and `mixed`, which files are made of, are the same image."""
    y = np.random.default_rng(0).random((5, 20, 33), np.float32)
    student = lambda v: torch.cat([v[:, 2:3], v[:, 1:2]], 1)  # noqa: E731
    student.context = 2
    planes.equip(student, lambda axis: lambda v: v[:, 2:3] + axis, weight, memory=most)
    found, image = planes.whole(student, y), planes.mixed(student, {"": y})
    stacks = torch.from_numpy(np.stack([data.read_around(y, s, 2) for s in range(5)]))
    np.testing.assert_allclose(found.swapaxes(0, 1), image(stacks, "", np.s_[:]).numpy(), atol=1e-6)
    np.testing.assert_allclose(found[0], y + weight * (1.5 if most else 0), atol=1e-6)


def test_the_noise_of_turned_slices():
    """Drawn with the law, looked at across rows and columns: the correlations are those that `turned` says."""
    table = np.zeros((13, 13))
    rows, columns = np.array([0, 0.1, 0.5, 1, 0.5, 0.1, 0]), np.array([0, 0, 0.2, 1, 0.2, 0, 0])
    table[3:10, 3:10] = np.outer(rows, columns)
    law = noise.make_noise_model([1, 0, 0], table, through=(0.3, 0.0))
    n = noise.sample(law, np.zeros((96, 128, 128), np.float32), np.random.default_rng(0))
    for axis in (1, 2):
        told, lying = planes.turned(law, axis), np.moveaxis(n, axis, 0)
        at = noise.REACH
        seen = [
            np.mean(lying[1:] * lying[:-1]),
            np.mean(lying[:, 1:] * lying[:, :-1]),
            np.mean(lying[..., 1:] * lying[..., :-1]),
            np.mean(lying[:, 1:, 1:] * lying[:, :-1, :-1]),
        ]
        r = np.asarray(told["correlation"])
        expected = [told["through"][0], r[at + 1, at], r[at, at + 1], r[at + 1, at + 1]]
        np.testing.assert_allclose(np.array(seen) / n.var(), expected, atol=0.02)


def test_the_weight_is_the_best_one():
    """Two smoothings of a noisy volume: Stein's estimate finds their best mix, and its error, without the clean one."""
    x, rng = blobs((24, 96, 96)), np.random.default_rng(1)
    y = x + rng.normal(0, 0.1, x.shape).astype(np.float32)
    single, others = (functools.partial(gaussian_filter, sigma=s) for s in ((0, 1.2, 1.2), (1.5, 0.5, 0.5)))
    z = rng.normal(0, 0.1, x.shape).astype(np.float32)
    w, before, after = planes.best_weight([planes.weigh(single, others, y, z, np.full(x.shape, 0.01))])
    errors = [np.mean(np.square((1 - v) * single(y) + v * others(y) - x)) for v in (0, w, *np.linspace(0, 1, 21))]
    assert 0.1 < w < 0.9 and errors[1] <= min(errors[2:]) * 1.01
    np.testing.assert_allclose([before, after], errors[:2], rtol=0.03)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("planes"), np.random.default_rng(2)
    x = np.stack([blobs((20, 64, 72), seed) for seed in (0, 1)])
    y = x + rng.normal(0, 0.08, x.shape)
    low, high = y[1].min(), y[1].max()  # so that a file of the second is mapped to what the dataset holds
    with data.write_volumes(folder / "d.h5", "dataset", "test") as add:
        for k, split in enumerate(("train", "test")):
            for array, v in zip(add(split, x[k].shape, ["clean", "noisy"], split=split), (x[k], y[k])):
                array[:] = (v - low) / (high - low)
    return folder, 0.08 / (high - low)


def test_shipped_network_in_three_planes(volumes):
    """Better than one plane by the truth, as promised; kept in the checkpoint; the same over files."""
    volumes, level = volumes
    flags = ["--target", "recorrupted", "--noise", f"gaussian:{level}", "--init", denoise.WEIGHTS[2], "--crop", 64]
    flags += ["--steps", 0, "--ensemble", 1, "--data", "d.h5"]
    ok("distill", *flags, "--model", "one.pt", "--out", "one.h5", cwd=volumes)
    said = ok("distill", *flags, "--planes", "--model", "three.pt", "--out", "three.h5", cwd=volumes).stdout
    clean = data.read_volumes(volumes / "d.h5", "clean")

    def errors(path):
        return {k: np.mean(np.square(v[:] - clean[k][:])) for k, v in data.read_volumes(path, "pred").items()}

    one, three = (data.read_volumes(volumes / f"{name}.h5", "pred")["test"][:] for name in ("one", "three"))
    student = distill.student(volumes / "three.pt")
    mixed = (1 - student.planes) * one + student.planes * student.beside(data.read_volumes(volumes / "d.h5")["test"])
    np.testing.assert_allclose(three, mixed, atol=1e-4)
    assert training.fingerprint(volumes / "one.pt") != training.fingerprint(volumes / "three.pt")
    mse = {name: errors(volumes / f"{name}.h5") for name in ("one", "three")}
    for name in clean:
        assert mse["three"][name] < 0.93 * mse["one"][name]
    promised = float(said.partition("estimated PSNR ")[2].split()[2])
    assert abs(promised + 10 * np.log10(mse["three"]["train"])) < 0.5
    ok("distill", "--data", "d.h5", "--predict", "--model", "three.pt", "--out", "again.h5", cwd=volumes)
    again = data.read_volumes(volumes / "again.h5", "pred")
    noisy = data.read_volumes(volumes / "d.h5", "noisy")
    np.save(volumes / "file.npy", noisy["test"][:])
    ok("denoise", "file.npy", "--model", "three.pt", "--out", "clean", cwd=volumes)
    files = np.load(volumes / "clean/file.npy")
    for name, volume in data.read_volumes(volumes / "three.h5", "pred").items():
        np.testing.assert_array_equal(again[name][:], volume[:])
    np.testing.assert_allclose(files, data.read_volumes(volumes / "three.h5", "pred")["test"][:], atol=2e-3)


def test_other_planes_are_told_how_the_noise_lies_in_them(volumes):
    """Correlated along rows alone: what a student makes of each plane is what one told the turned law makes of it."""
    y, table = {"test": data.read_volumes(volumes[0] / "d.h5")["test"]}, np.zeros((13, 13))
    table[6, 4:9] = 0.2, 0.6, 1, 0.6, 0.2
    law = noise.make_noise_model([0.003, 0, 0], table)
    told = [(law, y), *((planes.turned(law, axis), y) for axis in (1, 2))]
    here, *turned = (distill.student(denoise.WEIGHTS[2], told=known) for known in told)
    each = [planes.across(f, y["test"], axis, 2)[0] for axis, f in enumerate(turned, 1)]
    np.testing.assert_allclose(here.beside(y["test"]), sum(each) / 2, atol=1e-4)
    untold = planes.across(here.once, y["test"], 2, 2)[0]  # of columns, along which the noise is correlated
    assert np.abs(untold - each[1]).max() > 0.01


def test_single_images_have_one_plane(volumes):
    flags = ["--target", "recorrupted", "--noise", "gaussian:0.08", "--context", 0, "--steps", 1, "--crop", 64]
    flags += ["--data", "d.h5", "--planes", "--model", "zero.pt", "--out", "zero.h5"]
    assert "one plane" in ok("distill", *flags, cwd=volumes[0]).stdout
