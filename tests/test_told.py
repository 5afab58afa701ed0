"""Networks that are told the noise: exact properties, the shipped weights, Stein's estimate, the recipe `tuned`."""

import json

import numpy as np
import pytest
import torch
from conftest import ellipses, make_dataset, ok, run
from scipy.ndimage import gaussian_filter

import data
import denoise
import distill
import evaluate
import noise
from experiments import pretrain
from experiments.baselines import non_local_means
from experiments.dead_leaves import dead_leaves
from lib import formats, runtime


def told(context=1, seed=0):
    """A small ToldResUNet with weights that do something."""
    torch.manual_seed(seed)
    shape = dict(width=8, enc_blocks=[1], middle_blocks=1, dec_blocks=[1])
    network = distill.build_network("told", context=context, **shape).double()
    for p in network.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return network


def test_units_do_not_matter():
    """Images and noise twice as large: the output is twice as large; no noise: the images themselves."""
    network, y = told(), torch.rand(2, 3, 32, 40).double()
    model = noise.make_noise_model([1e-4, 2e-4, 3e-4], noise.known("gaussian", 1, 1.2)["correlation"], through=(0.3, 0))
    law = torch.from_numpy(noise.facts(model, {"": y[0].numpy()}))[None]
    doubled = law.clone()
    doubled[:, :4] *= torch.tensor([4, 2, 1, 2])
    one, two = network(y, law), network(2 * y, doubled)
    assert torch.allclose(two, 2 * one, atol=1e-9) and (one - y[:, 1:2]).abs().max() > 1e-3
    law[:, :4] = 0
    assert torch.equal(network(y, law), y[:, 1:2])
    assert not torch.equal(network(y, doubled), network(y, doubled, gain=2.0))


def test_facts():
    model = noise.known("poisson", 100, 1.2) | dict(through=[0.25, None])
    facts = noise.facts(model, {"a": np.full((3, 20, 20), 0.5), "b": np.full((1, 9, 9), 0.5)})
    table = np.array(model["correlation"])
    beside = [table[6, 7], table[7, 6], table[7, 7], table[6, 8], 0.25]
    assert np.allclose(facts, [0, 0.01, 0, 0.005**0.5, *beside], atol=1e-6)
    assert (noise.facts(noise.parse_noise_model("none"), {"": np.ones((1, 9, 9))})[:4] == 0).all()


@pytest.mark.parametrize(
    "kind, level, blur, through",
    [("gaussian", 0.05, 0, 0), ("gaussian", 0.05, 1.2, 0), ("poisson", 200, 0, 0), ("gaussian", 0.05, 0, 0.5)],
)
def test_estimated_error_is_the_true_one(kind, level, blur, through):
    """A linear denoiser that sees its neighbours, and one that does nothing."""
    rng, x = np.random.default_rng(0), gaussian_filter(ellipses(np.random.default_rng(1), 3, 200, 200), (1, 1, 1))
    model = noise.known(kind, level, blur) | dict(through=[through, 0.0])
    y = torch.from_numpy(x + noise.sample(model, x, rng)[:])[None].float()

    def linear(v):
        smooth = torch.nn.functional.avg_pool2d(v, 3, 1, 1, count_include_pad=False)
        return 0.5 * smooth[:, 1:2] + 0.25 * (v[:, :1] + v[:, 2:])

    true = np.square(linear(y)[0, 0].numpy() - x[1]).mean()
    found, s2, _ = evaluate.estimated_error(*evaluate.probe(linear, y, model, rng), model)
    assert abs(found / true - 1) < 0.08 and abs(s2 / np.square(y[0, 1].numpy() - x[1]).mean() - 1) < 0.08
    same, s2, _ = evaluate.estimated_error(*evaluate.probe(lambda v: v[:, 1:2], y, model, rng), model)
    assert abs(same / s2 - 1) < 0.04
    if through:  # ignored, the noise that goes through the slices would pass for structure
        model = model | dict(through=[0.0, 0.0])
        wrong, *_ = evaluate.estimated_error(*evaluate.probe(linear, y, model, rng), model)
        assert wrong < found * 0.9


def test_shipped_networks_are_above_non_local_means():
    """weights/, told the level, on slices of a brain that they have never seen; alone they must be told."""
    x = formats.brain().slices[80:85].astype(np.float32) / 255
    model = noise.known("gaussian", 12 / 255)
    y = np.stack([noise.add(s, "gaussian", 12 / 255, 0, np.random.default_rng(k)) for k, s in enumerate(x)])

    def psnr(image):
        return evaluate.psnr_ssim(image, x[2])[0]

    rival = psnr(non_local_means(y[2], 12 / 255))
    for context, path in denoise.WEIGHTS.items():
        student = distill.student(path, told=(model, {"": y}))
        out = student(torch.from_numpy(data.read_around(y, 2, context))[None])[0, 0].numpy()
        assert student.context == context and psnr(out) > rival + 0.2, (context, psnr(out), rival)
        with pytest.raises(ValueError, match="must be told the noise"):
            distill.student(path)
    sizes = sum(path.stat().st_size for path in denoise.WEIGHTS.values())
    assert sizes <= 10_000_000


def flags(*more):
    return ["--data", "knee.h5", "--out", "out", "--effort", "0.003", *more]


def test_tuned_recipe(tmp_path):
    """Volumes: the estimates of all candidates, the best one's images; started again, nothing is made twice."""
    make_dataset(tmp_path / "knee.h5", sizes=((5, 96, 112), (4, 96, 100)), clean=False)
    done = ok("denoise", *flags("--context", 2), cwd=tmp_path)
    assert "recipe tuned" in done.stdout and done.stdout.count("measure.py --data") == 2
    best = json.loads((tmp_path / "out/best.json").read_text())
    assert set(best) == {"shipped network", "tuned network", "noisy"}
    assert best["shipped network"]["psnr"] > best["noisy"]["psnr"] + 1
    denoised = data.read_matching(tmp_path / "out/denoised.h5", tmp_path / "knee.h5")
    assert {name: a.shape for name, a in denoised.items()} == {"v0": (5, 96, 112), "v1": (4, 96, 100)}
    ok("distill", *"--predict --ensemble 8 --data knee.h5 --model out/student.pt --out again.h5".split(), cwd=tmp_path)
    again = data.read_volumes(tmp_path / "again.h5", "pred")
    assert all((again[name] == denoised[name]).all() for name in again)
    assert "$ python" not in ok("denoise", *flags("--context", 2), cwd=tmp_path).stdout
    instant = ok("denoise", *flags("--context", 2, "--instant"), cwd=tmp_path).stdout
    assert "tuned.pt" not in instant and "kept the shipped network" in instant


def test_images_stay_as_they_are_if_that_is_best(tmp_path, monkeypatch):
    """Whatever the estimate prefers is kept: told that the noisy images are best, the files come back bit for bit."""
    y = ellipses(np.random.default_rng(0), 1, 160, 160)[0] + np.random.default_rng(1).normal(0, 0.02, (160, 160))
    np.save(tmp_path / "a.npy", y.astype(np.float32))
    monkeypatch.setattr(evaluate, "estimate", lambda *_, **__: dict(psnr=30.0, sd=0.0, noisy=34.0, uneven=0.0))
    done = ok("denoise", "a.npy", "--out", "out", "--instant", cwd=tmp_path)
    assert "0 neighbouring slices" in done.stdout and "kept the images as they are" in done.stdout
    assert np.array_equal(np.load(tmp_path / "out/a.npy"), y.astype(np.float32))
    monkeypatch.setattr(evaluate, "estimate", lambda *_, **__: dict(psnr=36.0, sd=0.0, noisy=34.0, uneven=0.0))
    done = ok("denoise", "a.npy", "--out", "other", "--instant", cwd=tmp_path)
    assert "kept the shipped network" in done.stdout and not np.array_equal(np.load(tmp_path / "other/a.npy"), y)


def test_refusals(tmp_path):
    make_dataset(tmp_path / "knee.h5", clean=False)
    for more in (["--instant", "--recipe", "paper"], ["--instant", "--recipe", "scratch"]):
        done = run("denoise", *flags(*more), cwd=tmp_path)
        assert done.returncode == 2 and "--instant is for the recipe tuned" in done.stderr
    done = run("distill", "--data", "knee.h5", "--target", "clean", "--arch", "told", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_synthetic_volumes():
    one, same, other = (dead_leaves(runtime.step_rng(k), 5, 64) for k in (0, 0, 1))
    assert one.shape == (5, 64, 64) and one.dtype == np.float32 and (one == same).all() and (one != other).any()
    for volume in (one, other):
        assert volume.min() >= 0 and volume.max() <= 1 and volume.std() > 0.02
        assert np.corrcoef(volume[1].ravel(), volume[2].ravel())[0, 1] > 0.5  # a volume, not a stack of images
    for k in range(50):
        model = pretrain.random_law(runtime.step_rng(k))
        y = noise.sample(model, one[:, :32, :32], runtime.step_rng(k))
        assert np.isfinite(y).all() and 1 / 255 < noise.facts(model, {"": one})[3] < 60 / 255


def small_volume(rng):
    return dead_leaves(rng, 5, 48)


def test_pretraining_learns_and_its_weights_change_context(tmp_path, monkeypatch):
    """The loss ends below that of the trivial answer (0, the noisy image); one for single images takes it over."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "dead_leaves", small_volume)
    monkeypatch.setattr(pretrain.Volumes.__init__, "__defaults__", (small_volume,))
    small = ["--width", "16", "--crop", "32", "--batch", "8", "--lr", "0.003"]
    pretrain.main([*small, "--steps", "150", "--model", "a.pt"])
    last = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[-1])
    assert last["smoothed"] < last["trivial"] - 0.03
    pretrain.main([*small, "--steps", "0", "--model", "b.pt", "--context", "0", "--init", "a.pt"])
    wide, flat = (torch.load(f, weights_only=True)["ema"]["intro.weight"] for f in ("a.pt", "b.pt"))
    assert flat.shape[1] == wide.shape[1] - 16 and torch.equal(flat[:, :4], wide[:, 8:12])
    assert torch.equal(flat[:, 4:], wide[:, 20:])


def test_samples_and_std_of_a_student(tmp_path):
    """--samples N: N clean images that are possible, with pred and std; the same again with the same seed."""
    make_dataset(tmp_path / "knee.h5", sizes=((4, 64, 80), (3, 64, 72)))
    flags = ["--data", "knee.h5", "--predict", "--model", denoise.WEIGHTS[2], "--split", "test"]
    for name in ("a.h5", "b.h5"):
        ok("distill", *flags, "--noise", "gaussian:6/255", "--samples", 3, "--out", name, cwd=tmp_path)
    drawn, again = (data.read_volumes(tmp_path / name, "samples")["v1"] for name in ("a.h5", "b.h5"))
    pred, std = (data.read_volumes(tmp_path / "a.h5", key)["v1"] for key in ("pred", "std"))
    assert drawn.shape == (3, 3, 64, 72) and np.array_equal(drawn, again)
    assert np.allclose(drawn[:, :2].mean(1), pred, atol=1e-5)
    ratio = np.sqrt(np.square(drawn[:, 0] - pred).mean() / np.square(std).mean())
    assert 0.7 < ratio < 1.3
    untold = run("distill", *flags, "--samples", 3, cwd=tmp_path)
    assert untold.returncode == 2 and "must be told the noise" in untold.stderr


def test_some_single_images_are_sums_as_xrays_are_and_volumes_never(monkeypatch):
    one, other = np.full((5, 32, 32), 0.3, np.float32), np.full((5, 32, 32), 0.3, np.float32)
    one[:, :, 16:], other[:, 16:] = 0.9, 0.9

    def levels(share, context):  # of the clean images
        monkeypatch.setattr(pretrain, "LAYERED", share)
        made = [pretrain.random_crop([one, other], context, 32, runtime.step_rng(k))[1] for k in range(20)]
        assert all(x.shape == (1, 32, 32) and x.dtype == np.float32 for x in made)
        return made, max(len(np.unique(x)) for x in made)

    xrays, several = levels(1, 0)
    assert several > 2  # the edges of both shine through
    assert all(x.min() == 0 and x.max() < 1 + 1e-6 for x in xrays)
    assert abs(np.median([x.max() for x in xrays]) - 1) < 1e-6  # less where layers cancel each other
    assert levels(0, 0)[1] == 2 and levels(1, 2)[1] == 2


def test_samples_are_drawn_in_float32(monkeypatch):
    """bfloat16 would add noise of its own to derivatives: it is for the mean, whatever the processor has."""
    y, law = np.random.default_rng(0).random((6, 32, 32)).astype(np.float32), noise.known("gaussian", 0.05)
    student, plain, asked = distill.student("weights/volumes.pt", told=(law, {"": y})), runtime.autocast, []
    monkeypatch.setattr(runtime, "autocast", lambda device, precision="auto": asked.append(precision) or plain(device))
    student.alone(y)
    assert set(asked) == {"auto"}
    asked.clear()
    student.draw(y, y, np.random.default_rng(0), 2)
    assert set(asked) == {"float32"}
