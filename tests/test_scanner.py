"""The simulated scanner: the physics of its noise, and files that are read as M4Raw's and fastMRI's are."""

import json
import math
from argparse import Namespace

import h5py
import numpy as np
import pytest
from conftest import ellipses, ok, run

import data
import noise
from experiments import scanner
from lib.formats import hdf5

ARGS = dict(format="m4raw", coils=4, lines=195 / 256, level=8 / 255, spread=0.0, through=0.5, repetitions=60, seed=0)


@pytest.fixture(scope="module", params=["m4raw", "fastmri"])
def scanned(request):
    """(noisy (R,S,h,w), clean (S,h,w), law {key: (S,h,w)}, mask): many repetitions of two slices, level 8/255."""
    args = Namespace(**ARGS | dict(format=request.param, coils=scanner.COILS[request.param]))
    x = ellipses(np.random.default_rng(1), 2, 64, 64)
    made = list(scanner.scan(x, args, 0))
    law = {key: np.stack([m["law"][key] for m in made]) for key in made[0]["law"]}
    mask = scanner.acquired(64, args.lines, 2 if request.param == "fastmri" else 1)
    return np.stack([m["noisy"] for m in made], 1), np.stack([m["clean"] for m in made]), law, mask


def test_map_is_the_spread_of_repetitions(scanned):
    """In tissue the variance over repetitions is the map squared, and the map varies; in dark places too, by `std`."""
    noisy, clean, law, _ = scanned
    variance, bright = noisy.var(0, ddof=1), clean > 8 * law["sigma"]
    for key, where, within in (
        ("sigma", clean > 15 * law["sigma"], 0.02),
        ("std", bright, 0.02),
        ("std", ~bright, 0.05),
    ):
        ratio = variance[where] / np.square(law[key][where])
        assert abs(ratio.mean() - 1) < within and abs(ratio.std() - (2 / 59) ** 0.5) < 0.03, key
    low, high = np.percentile(law["sigma"], [1, 99])
    head = clean[1] > 0.1 * clean[1].max()
    assert high / low > 1.15
    assert np.isclose(np.square(law["sigma"][1][head]).mean() ** 0.5, 8 / 255 * clean[1].max(), rtol=1e-6)


def test_mean_of_repetitions(scanned):
    """It converges to the clean image in tissue; in air it keeps the bias of magnitudes, which the law knows."""
    noisy, clean, law, _ = scanned
    mean, sigma = noisy.mean(0), law["sigma"]
    bright, air = clean > 20 * sigma, clean < 0.2 * sigma
    assert bright.sum() > 500 and air.sum() > 100
    one, all_of_them = (np.square(((x - clean) / sigma)[bright]).mean() for x in (noisy[0], mean))
    assert abs(one - 1) < 0.05 and 0.9 / 60 < all_of_them < 1.2 / 60 + 0.175**2  # 4 coils: 3.5 sigma / 20 at most
    assert ((mean - clean) / sigma)[air].mean() > 1.1
    for where in (bright, air, ~bright & ~air):
        assert abs(((mean - law["pred"]) / sigma)[where].mean()) < 0.03


def test_correlation_in_tissue(scanned):
    noisy, clean, law, mask = scanned
    table = scanner.correlation(mask)
    n, bright = (noisy - noisy.mean(0)) / law["std"] * (60 / 59) ** 0.5, clean > 8 * law["sigma"]
    for dy, dx in ((0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (1, 1)):
        both = bright[:, dy:, dx:] & bright[:, : 64 - dy, : 64 - dx]
        found = (n[..., dy:, dx:] * n[..., : 64 - dy, : 64 - dx])[:, both].mean()
        assert abs(found - table[noise.REACH + dy, noise.REACH + dx]) < 0.05
    assert table[noise.REACH, noise.REACH] == 1 and 0.2 < table[noise.REACH, noise.REACH + 1] < 0.35


def test_the_noise_model_of_a_scan(scanned):
    """Divided by sigma: air has the mean and variance that the model says, tissue its variance; dark is above air."""
    noisy, clean, law, mask = scanned
    model = scanner.noise_model(0.02, mask, [0, 0], [(clean, law)])
    even, air, bright = 0.02 * noisy / law["sigma"], clean < law["sigma"] / 3, clean > 8 * law["sigma"]
    assert model["variance"] == pytest.approx([np.var(even, axis=0)[bright].mean(), 0, 0], rel=0.05)
    assert model["air"][0] == pytest.approx(even[:, air].mean(), rel=0.05)
    assert model["air"][1] == pytest.approx(np.var(even, axis=0)[air].mean(), rel=0.1)
    assert model["air"][0] < model["dark"] and 0.2 < model["band"][1] < 0.5 == model["band"][0]
    assert scanner.noise_model(0.02, mask, [0, 0], [(clean + 1, law)])["air"] is None


def test_correlation_through_slices(scanned):
    noisy, clean, law, _ = scanned
    n = (noisy - noisy.mean(0)) / law["std"] * (60 / 59) ** 0.5
    found = (n[:, 0] * n[:, 1])[:, (clean > 8 * law["sigma"]).all(0)].mean()
    assert abs(found - 2 / 3) < 0.03  # 2 * 0.5 / (1 + 2 * 0.5^2)
    assert sum(w**2 for w in scanner.shares(0.5).values()) == pytest.approx(1) and scanner.shares(0) == {0: 1}


def test_air_of_equal_coils_is_chi_distributed():
    rng, n, sigma = np.random.default_rng(0), 4, 0.7
    everything = np.ones(128, bool)
    measured = scanner.receiver_noise((n, 128, 128), sigma * np.eye(n), everything, rng)
    image = scanner.reconstruct(measured, None, 1)
    mean = sigma * math.sqrt(2) * math.gamma(n + 0.5) / math.gamma(n)
    assert abs(image.mean() / mean - 1) < 0.005
    assert abs(image.var() / (2 * n * sigma**2 - mean**2) - 1) < 0.03
    maps = scanner.coil_maps(n, 128, 128)
    law = scanner.background(np.zeros((128, 128)), 2 * sigma**2 * np.eye(n), maps)
    np.testing.assert_allclose(law["pred"], mean, rtol=1e-9)
    np.testing.assert_allclose(law["std"], math.sqrt(2 * n * sigma**2 - mean**2), rtol=1e-6)
    np.testing.assert_allclose(law["sigma"], sigma)
    one = scanner.background(np.zeros(1), np.array([2 * sigma**2]))  # Rayleigh
    np.testing.assert_allclose([one["pred"][0], one["std"][0]], sigma * np.sqrt([math.pi / 2, 2 - math.pi / 2]))


def test_folded_noise_is_root_two_g_times_that_of_all_lines():
    rng, coils, side = np.random.default_rng(0), 8, 48
    maps, psi = scanner.coil_maps(coils, side, side), scanner.covariance(coils)
    assert np.abs(psi - np.eye(coils)).max() > 0.2 and np.linalg.eigvalsh(psi).min() > 0
    x = maps * ellipses(rng, 1, side, side)[0]
    spread, g = {}, None
    for r in (1, 2):
        weights, variance, g = scanner.unfolding(maps, psi, r)
        mask = scanner.acquired(side, 1.0, r)
        folded = scanner.to_images(scanner.to_kspace(x) * mask)
        recovered = (weights * folded).sum(0) * r
        np.testing.assert_allclose(recovered, (x / maps)[0], atol=1e-6)  # without noise the image itself
        root, images = np.linalg.cholesky(psi), []
        for _ in range(150):
            n = scanner.to_images(scanner.receiver_noise(x.shape, root, mask, rng))
            images.append((weights * n).sum(0) * r)
        spread[r] = np.sqrt(np.mean(np.square(np.abs(images)), 0))
        np.testing.assert_allclose(np.mean(spread[r] ** 2 / (2 * r * variance)), 1, atol=0.01)
    assert g.min() >= 1 - 1e-9 and g.max() > 1.05
    ratio = spread[2] / spread[1] / (np.sqrt(2) * g)
    assert abs(ratio.mean() - 1) < 0.01 and ratio.std() < 0.1


def test_lines_of_m4raw():
    assert np.flatnonzero(scanner.acquired(256, 195 / 256))[[0, -1]].tolist() == [30, 224]
    assert scanner.acquired(197, 1.0).all() and scanner.acquired(64, 195 / 256, 2)[32]
    assert scanner.acquired(64, 1.0, 2).sum() == 32


def test_m4raw_files(tmp_path):
    """As M4Raw's: images follow from k-space, the outer lines are empty, and data.py makes pairs of repetitions."""
    data_file = tmp_path / "clean.h5"
    with data.write_volumes(data_file, "dataset", "test") as add:
        for name, split, rows in (("a", "train", 40), ("b", "test", 32)):
            x = ellipses(np.random.default_rng(rows), 3, rows, 37)
            add(name, x.shape, ["noisy"], split=split)[0][:] = x
    flags = ["--data", "clean.h5", "--repetitions", 3, "--level", "4/255"]
    said = ok("experiments.scanner", *flags, "--out", "m4", cwd=tmp_path).stdout
    assert "6 files -> m4" in said
    names = sorted(path.name for path in (tmp_path / "m4/multicoil_test").iterdir())
    assert names == ["2022061002_T101.h5", "2022061002_T102.h5", "2022061002_T103.h5"]
    with h5py.File(tmp_path / "m4/multicoil_test" / names[0]) as file:
        kspace, images = file["kspace"], file["reconstruction_rss"][:]
        assert kspace.shape == (3, 4, 32, 36) and kspace.dtype == np.complex64 and images.dtype == np.float32
        np.testing.assert_allclose(hdf5.root_sum_of_squares(kspace, file), images, rtol=1e-3, atol=1e-3)
        assert not kspace[..., :3].any() and kspace[..., 18].all()
        assert file.attrs["acquisition"] == "AXT1" and file.attrs["patient_id"] == "2022061002"
        assert np.isclose(file.attrs["max"], images.max()) and b"2022061002_T103" in file["ismrmrd_header"][()]
    ok("data", "import", "m4/multicoil_test", "--reference", "others", "--out", "others.h5", cwd=tmp_path)
    noisy, others = (data.read_volumes(tmp_path / "others.h5", key) for key in ("noisy", "clean"))
    truth = data.read_volumes(tmp_path / "m4/TRUTH.h5", "clean", "test")["2022061002_T101"]
    first = data.read_volumes(tmp_path / "m4/TRUTH.h5", "noisy", "test")["2022061002_T101"]
    np.testing.assert_allclose(noisy["2022061002_T101"], first, atol=1e-5)
    law = {
        key: data.read_matching(tmp_path / "m4/SIGMA.h5", tmp_path / "m4/TRUTH.h5", key)["2022061002_T101"]
        for key in ("std", "pred", "sigma")
    }
    bright = truth > 8 * law["std"]
    error = {"one": first - truth, "others": others["2022061002_T101"] - truth}
    found = {key: np.square(e[bright] / law["std"][bright]).mean() for key, e in error.items()}
    assert abs(found["one"] - 1) < 0.1 and abs(found["others"] - 0.5) < 0.06  # two others: half of the variance
    known = json.loads((tmp_path / "m4/noise.json").read_text())
    assert noise.parse_noise_model(str(tmp_path / "m4/noise.json")) and known["blind_spot"] == 9
    ok("experiments.scanner", *flags, "--out", "again", "--no-kspace", cwd=tmp_path)
    again, before = (data.fingerprints(tmp_path / folder / "TRUTH.h5") for folder in ("again", "m4"))
    assert again == before


def test_fastmri_files(tmp_path):
    x = ellipses(np.random.default_rng(0), 3, 40, 48)
    with data.write_volumes(tmp_path / "clean.h5", "dataset", "test") as add:
        add("a", x.shape, ["clean"], split="test")[0][:] = x
    flags = ["--data", "clean.h5", "--format", "fastmri", "--contrast", "T2", "--repetitions", 1, "--out", "fm"]
    ok("experiments.scanner", *flags, cwd=tmp_path)
    (path,) = (tmp_path / "fm/multicoil_test").glob("file_brain_AXT2_*.h5")
    with h5py.File(path) as file:
        mask = file["mask"][:]
        assert not file["kspace"][..., ~mask].any() and file["kspace"][..., mask].all()
        assert set(np.diff(np.flatnonzero(mask))) == {2} and file.attrs["acquisition"] == "AXT2"
    ok("data", "import", path, "--acquisition", "AXT2", "--out", "one.h5", cwd=tmp_path)
    truth = data.read_volumes(tmp_path / "fm/TRUTH.h5", "clean")
    gap = (
        next(iter(truth.values())) - x * data.read_volumes(tmp_path / "one.h5", "noisy").popitem()[1].mean() / x.mean()
    )
    assert np.abs(gap).mean() < 0.1  # no shading, no folds
    for bad, says in ((["--coils", 1], "two coils or more"), (["--lines", 2], "--lines 2 is not between 0.05 and 1")):
        wrong = run("experiments.scanner", *flags[:-1], "wrong", *bad, cwd=tmp_path)
        assert wrong.returncode == 2 and says in wrong.stderr and not (tmp_path / "wrong").exists()
