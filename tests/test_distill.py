"""Stage 5: NAFNet and its local pooling."""

import pytest
import torch
from conftest import TINY, ok

import data
from distill import NAFNet, local_mean, psnr_loss


def test_published_size():
    """29.16 M parameters at width 32 with the SIDD depths, for three channels as published and for one."""
    with torch.device("meta"):
        assert sum(p.numel() for p in NAFNet(channels=3).parameters()) == 29_159_715
        assert sum(p.numel() for p in NAFNet().parameters()) == 29_158_561


def test_starts_as_the_identity_plus_its_outro_and_takes_any_size():
    torch.manual_seed(0)
    net = NAFNet(width=8, enc_blocks=(1, 1), middle_blocks=1, dec_blocks=(1, 1))
    torch.nn.init.zeros_(net.outro.weight)
    torch.nn.init.zeros_(net.outro.bias)
    for h, w in [(16, 16), (37, 53), (300, 300)]:
        y = torch.rand(1, 1, h, w)
        assert torch.equal(net(y), y)


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


def test_supervised_needs_clean_and_others_never_open_it(made):
    """--target clean is the one run that may use clean images."""
    ok(
        "distill",
        "--data",
        "knee.h5",
        "--target",
        "clean",
        *TINY["distill"],
        "--model",
        "sup.pt",
        "--out",
        "sup.h5",
        cwd=made,
    )
    assert set(data.read_volumes(made / "sup.h5", "pred")) == {"v0", "v1"}
