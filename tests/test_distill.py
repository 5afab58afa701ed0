"""Stage 5: NAFNet and its local pooling."""

import pytest
import torch
from conftest import TINY, make_dataset, ok, run

import data
from distill import NAFNet, local_mean, psnr_loss


def test_published_size():
    """29.16 M parameters at width 32 with the SIDD depths, for three channels as published and for one."""
    with torch.device("meta"):
        assert sum(p.numel() for p in NAFNet(channels=3).parameters()) == 29_159_715
        assert sum(p.numel() for p in NAFNet().parameters()) == 29_158_561


@pytest.mark.parametrize("h, w", [(16, 16), (37, 53), (300, 300)])
def test_residual_and_any_size(h, w):
    """Blocks start as the identity (beta = gamma = 0); the output is the input plus the outro; any size fits."""
    torch.manual_seed(0)
    net = NAFNet(width=8, enc_blocks=(1, 1), middle_blocks=1, dec_blocks=(1, 1))
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
    make_dataset(tmp_path / "knee.h5", clean=False)
    done = run("distill", *flags, cwd=tmp_path)
    assert done.returncode == 2 and "has no 'clean'" in done.stderr
