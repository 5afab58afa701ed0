"""Stage 4: the student's networks, NAFNet's local pooling, recorruption."""

import numpy as np
import pytest
import torch
from conftest import TINY, make_dataset, ok, run

import data
import noise
from distill import NAFNet, ResUNet, local_mean, psnr_loss, recorruption_loss


def test_published_size():
    """29.16 M parameters at width 32 with the SIDD depths, for three channels as published and for one."""
    with torch.device("meta"):
        assert sum(p.numel() for p in NAFNet(channels=3).parameters()) == 29_159_715
        assert sum(p.numel() for p in NAFNet().parameters()) == 29_158_561


@pytest.mark.parametrize("network", [NAFNet, ResUNet])
@pytest.mark.parametrize("h, w", [(16, 16), (37, 53), (300, 300)])
def test_residual_and_any_size(h, w, network):
    """Blocks start as the identity; the output is the input plus the outro; any size fits."""
    torch.manual_seed(0)
    net = network(width=8, enc_blocks=(1, 1), middle_blocks=1, dec_blocks=(1, 1))
    x, y = torch.randn(1, 8, 16, 16), torch.rand(1, 1, h, w)
    assert torch.equal(net.middle[0](x.repeat(1, 4, 1, 1)), x.repeat(1, 4, 1, 1))
    correction = net(y) - y
    assert correction.shape == y.shape and correction.abs().max() > 1e-3
    net.outro.weight.data.zero_()
    net.outro.bias.data.fill_(0.25)
    torch.testing.assert_close(net(y), y + 0.25)


def test_levels_must_match():
    with pytest.raises(ValueError, match="number of levels"):
        NAFNet(width=8, enc_blocks=(1, 1), dec_blocks=(1,))


@pytest.mark.parametrize("h, w, window", [(20, 30, 7), (9, 30, 16), (30, 9, 8), (12, 12, 11)])
def test_local_mean(h, w, window):
    """Against average pooling of every window, replicated at the borders."""
    x = torch.randn(2, 3, h, w, dtype=torch.double).float()
    kernel = (min(window, h), min(window, w))
    expected = torch.nn.functional.avg_pool2d(x, kernel, stride=1)
    got = local_mean(x, window)
    top, left = (kernel[0] - 1) // 2, (kernel[1] - 1) // 2
    assert got.shape == x.shape
    torch.testing.assert_close(
        got[..., top : top + expected.shape[2], left : left + expected.shape[3]], expected, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(got[..., 0, 0], expected[..., 0, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[..., -1, -1], expected[..., -1, -1], rtol=1e-4, atol=1e-5)


def test_local_pooling_changes_nothing_at_the_training_size():
    """TLC is the training network on a crop; on a larger image what is far away does not matter any more."""
    torch.manual_seed(0)
    net = NAFNet(width=8, enc_blocks=(1, 1), middle_blocks=1, dec_blocks=(1, 1))
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    small, large = torch.rand(1, 1, 32, 32), torch.rand(1, 1, 32, 160)
    far = large.clone()
    far[..., 120:] += 1
    plain, plain_near, plain_far = net(small), net(large)[..., :32], net(far)[..., :32]
    net.pool_locally(32)
    torch.testing.assert_close(net(small), plain)
    assert (net(far)[..., :32] - net(large)[..., :32]).abs().max() < 1e-5 < (plain_far - plain_near).abs().max()


def test_psnr_loss():
    x = torch.zeros(2, 1, 4, 4)
    assert psnr_loss(x + 6 / 255, x).item() == pytest.approx(-32.57, abs=0.01)


def test_supervised_needs_clean(made, tmp_path):
    """--target clean is the one run that opens clean images: it learns from them, and stops where there are none."""
    flags = ["--data", "knee.h5", "--target", "clean", *TINY["distill"], "--model", "sup.pt", "--out", "sup.h5"]
    ok("distill", *flags, cwd=made)
    assert set(data.read_volumes(made / "sup.h5", "pred")) == {"v0", "v1"}
    ok("distill", *flags, "--preset", "nafnet", cwd=made)
    assert torch.load(made / "sup.pt", weights_only=True)["model_args"]["arch"] == "nafnet"
    make_dataset(tmp_path / "knee.h5", clean=False)
    done = run("distill", *flags, cwd=tmp_path)
    assert done.returncode == 2 and "has no 'clean'" in done.stderr


def test_recorruption_loss_is_the_supervised_loss_without_the_clean_image():
    """For a linear denoiser, averaged over noises: |f(y) - x|^2 up to a constant, for noise correlated or not.

    The constant (s2 of the noise) cancels in the difference of two denoisers, which is what training follows.
    """
    for correlation in (0, 1.2):
        model, rng = noise.known("gaussian", 0.1, correlation), np.random.default_rng(0)
        x = np.repeat(rng.random((1, 1, 16, 16)), 4000, 0).astype(np.float32)
        y, z = (torch.from_numpy(a) for a in (x + noise.sample(model, x, rng), noise.sample(model, x, rng)))
        x = torch.from_numpy(x)
        losses = []
        for a in (0.0, 0.5, 1.0):

            def f(u, a=a):
                return (1 - a) * u + a * torch.nn.functional.avg_pool2d(u, 3, 1, 1)

            # strength 0.01: what the noise has more of in f(y + az) than in f(y) is then below the sampling error
            losses.append((recorruption_loss(f, y, z, 0.01), (10 * (f(y) - x)).square().mean()))
        for k in (1, 2):
            got, want = losses[k][0] - losses[0][0], losses[k][1] - losses[0][1]
            torch.testing.assert_close(got, want, rtol=0.02, atol=0.01)


def test_noises_of_recorruption_are_uncorrelated():
    """y + a z and y - z / a: no correlation of their noises at any offset, within the sampling error.

    The noise n of y is made by `noise.add`, z is drawn from the model: a wrong level or correlation of z shows.
    """
    model, rng = noise.known("gaussian", 1.0, 1.2), np.random.default_rng(0)
    zero = np.zeros((64, 64, 64), np.float32)
    n, z = np.stack([noise.add(x, "gaussian", 1.0, 1.2, rng) for x in zero]), noise.sample(model, zero, rng)
    one, other = n + 0.3 * z, n - z / 0.3
    for dy, dx in ((0, 0), (0, 1), (1, 0), (2, 2)):
        product = one[:, dy:, dx:] * other[:, : 64 - dy, : 64 - dx]
        # the samples are themselves correlated: about 64**2 / 10 independent ones in an image
        assert abs(product.mean()) < 4 * product.std() / np.sqrt(product.size / 10)


def test_recorrupted_training(made, tmp_path):
    """Learns without a target; the model of the noise stands in the checkpoint; resumes with the same bits."""
    flags = ["--data", made / "knee.h5", "--target", "recorrupted", "--noise", "poisson:200:0.5", *TINY["distill"]]
    ok("distill", *flags, "--model", "whole.pt", "--out", "whole.h5", cwd=tmp_path)
    ok("distill", *flags, "--model", "parts.pt", "--out", "parts.h5", "--stop-at", "2", cwd=tmp_path)
    ok("distill", *flags, "--model", "parts.pt", "--out", "parts.h5", "--resume", cwd=tmp_path)
    whole, parts = (torch.load(tmp_path / f, weights_only=True) for f in ("whole.pt", "parts.pt"))
    assert whole["extra"]["noise"]["variance"] == [0, 1 / 200, 0]
    assert all(torch.equal(whole["ema"][k], parts["ema"][k]) for k in whole["ema"])
    refine = ["--pred", made / "bsn_out.h5", "--init", "whole.pt", "--model", "refined.pt", "--out", "refined.h5"]
    refine += ["--lr", 0]
    ok("distill", *flags, *refine, "--split", "test", cwd=tmp_path)
    assert list(data.read_volumes(tmp_path / "refined.h5", "pred")) == ["v1"]
    refined = torch.load(tmp_path / "refined.pt", weights_only=True)["ema"]
    assert all(torch.equal(refined[k], whole["ema"][k]) for k in refined)  # at a learning rate of 0


def test_dark_pixels_learn_what_was_there():
    """Where the noise is not like what is drawn, the loss is the distance to `elsewhere`, whatever y and z are."""
    g = torch.Generator().manual_seed(0)
    y, z, x = torch.randn(3, 2, 1, 16, 16, generator=g)
    bright = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    loss = recorruption_loss(lambda v: v, y, z, 0.3, bright, x)
    assert torch.allclose(loss, 100 * ((y - x).square().mean() + 0.09 * z.square().mean()), rtol=1e-4)
    bright[:, :, :8] = True
    half = recorruption_loss(lambda v: 0 * v, y, z, 0.3, bright, x)
    assert torch.allclose(half, 50 * (y[:, :, :8].square().mean() + x[:, :, 8:].square().mean()), rtol=1e-4)
