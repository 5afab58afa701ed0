"""Neighbouring slices: which they are, how they are cropped, and that no stage mistakes their noise for its own."""

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import TINY, ellipses, make_dataset, ok, run
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from test_formats import dicom
from test_measure import phantom

import data
import measure
import noise
from bsn import LGBPN, PUCA
from distill import NAFNet, ResUNet, recorruption_loss, student
from lib import crops, formats
from lib.crops import mean_over_symmetries


def head(slices=16, side=128):
    """A smooth volume (S,H,W) about [0,1]: part of the built-in brain."""
    return formats.brain().slices[40 : 40 + slices, 40 : 40 + side, 30 : 30 + side].astype(np.float32) / 255


def make_volume(path, x, sigma=6 / 255, through=0, split=("train", "test")):
    """A dataset of two volumes, the two halves of x, with Gaussian noise that is blurred through the slices."""
    rng = np.random.default_rng(0)
    n = rng.standard_normal(x.shape)
    if through:
        n = gaussian_filter1d(n, through, axis=0)
    y = (x + sigma * n / n.std()).astype(np.float32)
    half = len(x) // 2
    with data.write_volumes(path, "dataset", "test") as add:
        for name, part, which in zip("ab", (slice(0, half), slice(half, None)), split):
            attrs = dict(split=which, scale=1.0, offset=0.0, source="brain", fingerprint=data.fingerprint(y[part]))
            for array, values in zip(add(name, x[part].shape, ["noisy", "clean"], **attrs), (y[part], x[part])):
                array[:] = values
    return path


@pytest.mark.parametrize("count", [2, 3, 5, 40])
@pytest.mark.parametrize("context", [1, 2, 4])
def test_a_slice_is_never_its_own_neighbour(count, context):
    """Its noise would pass for that of another slice. In the middle of a volume the neighbours are the nearest."""
    for s in range(count):
        found = crops.around(s, count, context)
        assert len(found) == 2 * context + 1 and found[context] == s and (found == s).sum() == 1
        assert 0 <= found.min() and found.max() < count
    if count == 40:
        assert crops.around(20, 40, context).tolist() == list(range(20 - context, 21 + context))
        assert crops.around(1, 40, 2).tolist() == [3, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="a single image has no neighbouring slices"):
        crops.around(0, 1, context)


def test_crops_with_neighbours():
    """The same place in every slice, turned alike, in both orders; a stack without context gets the slice alone."""
    volume = 1000 * np.arange(6, dtype=np.float32)[:, None, None] + np.arange(24 * 20).reshape(24, 20)
    y, x = data.random_crops([{"v": volume}] * 2, 400, 16, np.random.default_rng(0), contexts=[1, 0])
    assert y.shape == (400, 3, 16, 16) and x.shape == (400, 1, 16, 16) and y[:, 1:2].equal(x)
    below, above = (y[:, k + 1, 0, 0] - y[:, k, 0, 0] for k in (0, 1))
    steps = {(int(d) // 1000, int(e) // 1000) for d, e in zip(below, above)}
    assert steps == {(1, 1), (-1, -1), (-1, 1), (1, -1)}  # up, down, the first slice, the last
    assert ((y[:, 0] - y[:, 1]) % 1000 == 0).all()
    plain = data.random_crops([{"v": volume}], 400, 16, np.random.default_rng(0))[0]
    assert plain.equal(data.random_crops([{"v": volume}], 400, 16, np.random.default_rng(0), contexts=[0])[0])


def test_context_is_chosen_by_likeness(capsys):
    """2 for a volume, noisy or not; 0 for unrelated images, for single ones, and where one of the volumes is single."""
    rng = np.random.default_rng(0)
    volume = head()
    for y in (volume, volume + 0.08 * rng.standard_normal(volume.shape).astype(np.float32)):
        assert data.choose_context("auto", {"v": y}) == 2
    unrelated = ellipses(rng, 12, 96, 96)
    assert data.choose_context("auto", {"v": unrelated}) == 0
    assert data.choose_context("auto", {"v": volume, "w": volume[:1]}, "bsn") == 0
    assert capsys.readouterr().out == "bsn: 0 neighbouring slices on each side (a volume has only 1 slice)\n"
    assert data.choose_context("auto", {"v": volume[:2]}) == 0 and data.choose_context(1, {"v": volume[:2]}) == 1
    with pytest.raises(ValueError, match="--context 2: a volume has 1 slice"):
        data.choose_context(2, {"v": volume[:1]})


def linear(weights):
    """A linear denoiser of (B,5,H,W): a weighted sum of the slices."""
    return lambda y: (y * torch.tensor(weights)[:, None, None]).sum(1, keepdim=True)


@pytest.mark.parametrize("through", [0.0, 0.5])
def test_recorruption_with_neighbours_is_the_supervised_loss(through):
    """For linear denoisers of five slices: |f(y) - x|^2 up to a constant, with independent and with correlated noise.

    Where the noise is correlated through the slices, recorrupting the middle slice alone is wrong, and shows.
    """
    rng = np.random.default_rng(0)
    law = noise.make_noise_model([0.01, 0, 0], np.eye(13)[6][:, None] * np.eye(13)[6], through=[through, through**4])
    x = np.repeat(rng.random((1, 5, 16, 16)), 3000, 0).astype(np.float32)
    n, z = (np.stack([noise.sample(law, stack, rng) for stack in x]) for _ in range(2))
    y, x, z = map(torch.from_numpy, (x + n, x, z))
    candidates = [linear(w) for w in ([0, 0, 1, 0, 0], [0, 0.2, 0.6, 0.2, 0], [0.2] * 5, [0.5, 0, 0, 0, 0.5])]
    true = torch.stack([(10 * (f(y) - x[:, 2:3])).square().mean() for f in candidates])
    joint = torch.stack([recorruption_loss(f, y, z, 0.01) for f in candidates])
    alone = torch.stack([recorruption_loss(f, y, z[:, 2:3], 0.01) for f in candidates])
    torch.testing.assert_close(joint - joint[0], true - true[0], rtol=0.02, atol=0.02)
    if not through:
        torch.testing.assert_close(alone - alone[0], true - true[0], rtol=0.02, atol=0.02)
    else:
        assert (alone - alone[0] - (true - true[0])).abs().max() > 0.1


def test_noise_through_the_slices():
    """Drawn noise has the correlations of the model one and two slices away, its variance, and none beyond."""
    law = noise.make_noise_model([0.01, 0, 0], np.eye(13)[6][:, None] * np.eye(13)[6], through=[0.3, 0.02])
    n = noise.sample(law, np.zeros((8, 300, 300), np.float32), np.random.default_rng(0))
    assert n.std((1, 2)) == pytest.approx(np.full(8, 0.1), rel=0.02)
    for lag, r in ((1, 0.3), (2, 0.02), (3, 0.0)):
        assert np.mean(n[lag:] * n[:-lag]) / 0.01 == pytest.approx(r, abs=0.02)


@pytest.mark.parametrize("blur, law", [(0, [0, 0]), (0.5, [0.26, 0.02]), (1.0, [0.77, 0.36])])
def test_correlation_through_the_slices_is_measured(tmp_path, blur, law):
    """Within 0.05 on a volume whose structure goes on from slice to slice; below that, independent: exactly 0."""
    make_volume(tmp_path / "v.h5", head(32), through=blur, split=("train", "train"))
    found = measure.measure_file(tmp_path / "v.h5")["through"]
    assert found == pytest.approx(law, abs=0.05) and (blur or found == [0, 0])


def test_through_is_unknown_without_neighbours(tmp_path):
    rng = np.random.default_rng(0)
    with data.write_volumes(tmp_path / "v.h5", "dataset", "test") as add:
        for k, x in enumerate(phantom(6)):
            (y,) = add(f"v{k}", (1, *x.shape), ["noisy"], split="train", scale=1.0, offset=0.0, source="phantom")
            y[0] = noise.add(x, "gaussian", 6 / 255, 0, rng)
    found = ok("measure", "--data", "v.h5", "--out", "n.json", cwd=tmp_path).stdout
    assert "one and two slices away unknown unknown" in found
    assert noise.parse_noise_model(str(tmp_path / "n.json"))["through"] == [None, None]


@pytest.mark.parametrize("network", [PUCA, LGBPN])
@pytest.mark.parametrize("hole", ["own", "all"])
@pytest.mark.parametrize("blind_spot", [1, 5, 9])
def test_exactly_blind_with_neighbours(network, hole, blind_spot):
    """The gradient over the hole is exactly 0 in the slice itself, and in its neighbours if they have it too."""
    torch.manual_seed(0)
    small = dict(width=8, blocks=(1, 1)) if network is LGBPN else dict(width=8, enc_blocks=(1,), middle_blocks=1)
    small |= {} if network is LGBPN else dict(dec_blocks=(1,), dense=True)
    net = network(blind_spot=blind_spot, context=2, hole=hole, **small).double()
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    y = torch.rand(1, 5, 33, 40, dtype=torch.double, requires_grad=True)
    out = net(y)
    rows, columns = torch.meshgrid(torch.arange(33), torch.arange(40), indexing="ij")
    assert out.shape == (1, 1, 33, 40)
    for i, j in [(0, 0), (16, 20), (32, 3)]:
        (gradient,) = torch.autograd.grad(out[0, 0, i, j], y, retain_graph=True)
        inside = (rows - i).abs() + (columns - j).abs() <= (blind_spot - 1) // 2
        assert (gradient[0, 2][inside] == 0).all() and (gradient[0, 2][~inside] != 0).any()
        beside = gradient[0, [0, 1, 3, 4]]
        assert (beside[:, inside] == 0).all() if hole == "all" else (beside[:, inside] != 0).any()
        assert (beside[:, ~inside] != 0).any()


def test_mean_over_symmetries():
    """Of a function that commutes with them it is the function; of any other, something that commutes with them."""
    y, blur = torch.rand(2, 3, 20, 28), torch.nn.AvgPool2d(3, 1, 1)
    torch.testing.assert_close(mean_over_symmetries(lambda z: blur(z)[:, :1], y), blur(y)[:, :1])

    def shift(z):
        return z.roll(1, 3)

    once = mean_over_symmetries(shift, y)
    torch.testing.assert_close(mean_over_symmetries(shift, y.transpose(2, 3)), once.transpose(2, 3))
    assert not torch.allclose(once, shift(y))


@pytest.mark.parametrize("network", [NAFNet, ResUNet])
def test_student_starts_from_the_slice_itself(network):
    net = network(width=8, enc_blocks=(1,), middle_blocks=1, dec_blocks=(1,), context=2)
    torch.nn.init.zeros_(net.outro.weight)
    torch.nn.init.zeros_(net.outro.bias)
    y = torch.rand(2, 5, 33, 40)
    assert net(y).equal(y[:, 2:3])


def test_stages_with_neighbours(tmp_path):
    """Every stage trains and predicts with neighbours, remembers how many, resumes, and says what it chose."""
    make_volume(tmp_path / "knee.h5", head(12, 64))
    said = ok("bsn", "--data", "knee.h5", *TINY["bsn"], cwd=tmp_path).stdout
    assert "2 neighbouring slices on each side (details of neighbouring slices correlate by" in said
    ok("diffusion", "--data", "knee.h5", "--cond", "bsn_out.h5", *TINY["diffusion"], cwd=tmp_path)
    ok("srds", "--cond", "bsn_out.h5", "--steps", 2, cwd=tmp_path)
    flags = ["--data", "knee.h5", "--target", "recorrupted", "--noise", "gaussian:6/255", *TINY["distill"]]
    ok("distill", *flags, "--context", 1, "--model", "four.pt", "--out", "four.h5", cwd=tmp_path)
    ok("distill", *flags, "--context", 1, "--model", "two.pt", "--out", "two.h5", "--stop-at", 2, cwd=tmp_path)
    ok("distill", *flags[:6], "--model", "two.pt", "--out", "two.h5", "--resume", cwd=tmp_path)
    four, two = (torch.load(tmp_path / f, weights_only=True) for f in ("four.pt", "two.pt"))
    assert two["model_args"]["context"] == 1 and all(torch.equal(four["ema"][k], two["ema"][k]) for k in four["ema"])
    a, b = (data.read_volumes(tmp_path / f, "pred") for f in ("four.h5", "two.h5"))
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert torch.load(tmp_path / "bsn.pt", weights_only=True)["model_args"]["context"] == 2
    make_dataset(tmp_path / "single.h5", sizes=((1, 48, 40), (1, 37, 53)))
    done = run("distill", "--data", "single.h5", "--predict", "--model", "four.pt", "--out", "x.h5", cwd=tmp_path)
    assert done.returncode == 2 and "a volume has 1 slice: it has no neighbours" in done.stderr
    ok("distill", "--export", "s.onnx", "--model", "four.pt", cwd=tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx")
    assert session.run(None, {"noisy": np.zeros((1, 3, 48, 40), np.float32)})[0].shape == (1, 1, 48, 40)


def test_files_with_neighbours(tmp_path):
    """denoise.py on a volume: the student's output for each slice with its neighbours; a single image is named."""
    x = gaussian_filter(head(8, 112), (0, 1, 1))
    y = x + np.random.default_rng(0).normal(0, 6 / 255, x.shape).astype(np.float32)
    make_volume(tmp_path / "knee.h5", head(12, 64))
    flags = ["--target", "clean", *TINY["distill"], "--steps", 30, "--context", 2]
    ok("distill", "--data", "knee.h5", *flags, cwd=tmp_path)
    (tmp_path / "scans").mkdir()
    np.save(tmp_path / "scans/volume.npy", y)
    np.save(tmp_path / "scans/single.npy", y[0])
    done = run("denoise", "scans", "--out", "clean", "--model", "student.pt", cwd=tmp_path)
    assert done.returncode == 1 and "a single image, and the student sees neighbouring slices" in done.stderr
    denoise, low, high = student(tmp_path / "student.pt"), y.min(), y.max()
    out, scaled = np.load(tmp_path / "clean/volume.npy"), (y - low) / (high - low)
    for s in (0, 4, 7):
        stack = torch.from_numpy(scaled[crops.around(s, 8, 2)])[None]
        expected = denoise(stack)[0, 0].numpy() * (high - low) + low
        np.testing.assert_allclose(out[s], expected, atol=2e-3)
    assert np.std(out - y) > 0.005 and not (tmp_path / "clean/single.npy").exists()


def test_planes_of_a_localizer_are_no_neighbours(tmp_path):
    """A series of three orientations is three volumes; slices follow each other by position, whatever their names."""
    planes = [[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]]
    across = [np.cross(p[:3], p[3:]) for p in planes]
    for k in range(9):
        at = [float(v) for v in across[k % 3] * 5 * ((4 * (k // 3)) % 3)]
        tags = dict(ImageOrientationPatient=planes[k % 3], ImagePositionPatient=at, InstanceNumber=k)
        dicom(tmp_path / f"{k}.dcm", np.full((20, 20), 100 * k, "u2"), k, **tags)
    items, problems = formats.find([tmp_path])
    assert not problems and sorted(len(item.files) for item in items) == [3, 3, 3]
    for item in items:
        numbers = formats.read(item)[0].slices[:, 0, 0] // 100
        assert set(numbers % 3) == {numbers[0] % 3} and list((4 * (numbers // 3)) % 3) == [0, 1, 2]


def test_runs_of_air_do_not_choose():
    """Of a long volume some runs of slices hold air alone: noise, which is not alike, must not decide against it."""
    rng = np.random.default_rng(0)
    head = np.repeat(ellipses(rng, 1, 96, 96), 8, 0) + 0.02 * rng.standard_normal((8, 96, 96))
    air = 0.02 * rng.standard_normal((8, 96, 96))
    assert data.likeness(air) < data.ALIKE < data.likeness(head)
    assert data.choose_context("auto", {"a": air, "b": head}) == 2
    unrelated = ellipses(rng, 8, 96, 96)
    assert data.choose_context("auto", {"a": unrelated, "b": head}) == 0
