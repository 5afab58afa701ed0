"""Stage 1: the blind spot is exactly blind; the published network's size."""

import pytest
import torch
from conftest import TINY, make_dataset, ok

import data
from bsn import LGBPN, PUCA, BlindSpotConv, blind_spot_loss, hide

SMALL = dict(width=8, enc_blocks=(1, 1), middle_blocks=1, dec_blocks=(1, 1))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("blind_spot", [1, 5, 9])
@pytest.mark.parametrize("h, w", [(16, 16), (17, 23), (75, 40), (33, 64)])
def test_exactly_blind(h, w, blind_spot, dense):
    """A changed pixel changes the output by exactly 0 over the whole blind spot, in corners and at borders too.

    Fails if the mask loses a tap, attention pools over all classes, or the reflection moves a pixel to another class.
    """
    torch.manual_seed(0)
    net = PUCA(blind_spot=blind_spot, dense=dense, **SMALL).double()
    for p in net.parameters():  # blocks that start as the identity would prove nothing
        p.data += 0.1 * torch.randn_like(p)
    y = torch.rand(1, 1, h, w, dtype=torch.double)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    with torch.no_grad():
        before = net(y)
        for i, j in [
            (0, 0),
            (0, w - 1),
            (h - 1, 0),
            (h - 1, w - 1),
            (1, w - 2),
            (h // 2, w // 2),
            (h - 3, 2),
            (0, w // 2),
        ]:
            changed = y.clone()
            changed[0, 0, i, j] += 1
            difference = (net(changed) - before).abs()[0, 0]
            hole = (rows - i).abs() + (columns - j).abs() <= (blind_spot - 1) // 2
            assert difference[hole].max() == 0
            assert difference[~hole].max() > 1e-6  # and it does look at the rest


def test_blind_to_its_whole_class():
    """With blind spot 1 no pixel of the same (row, column) parity is seen, as in PUCA; the other three quarters are."""
    torch.manual_seed(0)
    net, y = PUCA(**SMALL).double(), torch.rand(1, 1, 32, 32, dtype=torch.double)
    changed = y.clone()
    changed[0, 0, 12, 7] += 1
    with torch.no_grad():
        difference = (net(changed) - net(y)).abs()[0, 0]
    assert difference[0::2, 1::2].max() == 0
    assert min(difference[0::2, 0::2].max(), difference[1::2, 1::2].max(), difference[1::2, 0::2].max()) > 0


def test_published_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in PUCA().parameters()) == 12_783_105  # 12.78 M


def test_any_size_from_16():
    net = PUCA(**SMALL).eval()
    for h, w in [(16, 16), (300, 300), (16, 75), (252, 101)]:
        assert net(torch.rand(1, 1, h, w)).shape == (1, 1, h, w)


def test_unknown_blind_spot():
    with pytest.raises(ValueError, match="1, 5 or 9, not 3"):
        PUCA(blind_spot=3)


def test_likelihood_finds_the_deviation():
    """The loss "nll" is least where the deviation is that of the errors."""
    torch.manual_seed(0)
    y = 0.5 + 0.03 * torch.randn(4, 1, 64, 64)
    mean = torch.full_like(y, 0.5)
    losses = [
        blind_spot_loss(torch.cat([mean, torch.full_like(y, log)], 1), y, "nll") for log in torch.linspace(-3, 1, 41)
    ]
    best = torch.linspace(-3, 1, 41)[torch.stack(losses).argmin()]
    assert best.exp() / 10 == pytest.approx(0.03, rel=0.06)


def test_deviation_is_blind_and_written(tmp_path):
    torch.manual_seed(0)
    net = PUCA(deviation=True, dense=True, **SMALL).double()
    y = torch.rand(1, 1, 20, 20, dtype=torch.double)
    out, changed = net(y), y.clone()
    changed[..., 7, 9] += 1
    assert out.shape == (1, 2, 20, 20) and torch.equal(net(changed)[..., 7, 9], out[..., 7, 9])
    make_dataset(tmp_path / "knee.h5")
    ok("bsn", "--data", "knee.h5", "--loss", "nll", *TINY["bsn"], cwd=tmp_path)
    assert data.read_volumes(tmp_path / "bsn_out.h5", "std")["v0"].min() > 0


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_hide(stride):
    """Only the class changes, and to values of other pixels."""
    y = torch.rand(1, 1, 17, 24)
    out = hide(y, stride, 1, 0)
    kept = torch.ones(17, 24, dtype=torch.bool)
    kept[1::stride, 0::stride] = False
    assert torch.equal(out[..., kept], y[..., kept]) and not torch.isclose(out[..., ~kept], y[..., ~kept]).any()
    moved = y.clone()
    moved[..., ~kept] += 1
    assert torch.equal(hide(moved, stride, 1, 0), out)


@pytest.mark.parametrize("blind_spot", [1, 5, 9])
@pytest.mark.parametrize("h, w", [(16, 16), (41, 50)])
def test_lgbpn_is_exactly_blind(h, w, blind_spot):
    """The gradient of an output is exactly 0 over its whole diamond, and not just beyond it.

    Fails if a branch keeps to classes nearer than its kernel reaches, or attention looks at all classes.
    """
    torch.manual_seed(0)
    net, radius = LGBPN(width=16, blind_spot=blind_spot, blocks=(2, 2)).double(), (blind_spot - 1) // 2
    y = torch.rand(1, 1, h, w, dtype=torch.double, requires_grad=True)
    out = net(y)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    for i, j in [(0, 0), (h // 2, w // 2), (h - 1, w - 1), (3, w - 4)]:
        (gradient,) = torch.autograd.grad(out[0, 0, i, j], y, retain_graph=True)
        distance = (rows - i).abs() + (columns - j).abs()
        assert (gradient[0, 0][distance <= radius] == 0).all()
        assert (gradient[0, 0][(distance > radius) & (distance < radius + 3)] != 0).any()
        assert (gradient[0, 0][distance > radius + 8] != 0).sum() > 10


def test_lgbpn_as_published():
    """The kernels have the published number of weights that count: 40 of 81, and 108 of the 21x21 taken every second.

    The whole has 4.559 M parameters as published, of which 0.98 M are taps of the wide kernel that never count.
    """
    assert BlindSpotConv(1, 1, 4).mask.sum() == 40 and BlindSpotConv(1, 1, 4, 10, 2).mask.sum() == 108
    with torch.device("meta"):
        ours = sum(p.numel() for p in LGBPN().parameters())
    assert abs(ours + (21**2 - 11**2) * 24 * 128 - 4.559e6) < 0.04e6


def test_every_second_pixel_is_a_dilated_convolution():
    conv, x = BlindSpotConv(3, 5, 4, 10, 2).double(), torch.randn(2, 3, 41, 46, dtype=torch.double)
    dilated = torch.nn.functional.conv2d(x, conv.weight * conv.mask, conv.bias, dilation=2)
    torch.testing.assert_close(conv(x), dilated)


def test_lgbpn_trains_and_resumes(tmp_path):
    """Its checkpoint rebuilds it without a flag; 2 + 2 steps are 4."""
    make_dataset(tmp_path / "knee.h5")
    flags = ["--data", "knee.h5", "--arch", "lgbpn", "--width", "8", "--blocks", "1", "1", "--crop", "32"]
    ok("bsn", *flags, "--steps", "4", "--out", "a.h5", "--model", "a.pt", cwd=tmp_path)
    ok("bsn", *flags, "--steps", "4", "--stop-at", "2", "--out", "b.h5", "--model", "b.pt", cwd=tmp_path)
    ok("bsn", "--data", "knee.h5", "--resume", "--out", "b.h5", "--model", "b.pt", cwd=tmp_path)
    one, other = (data.read_volumes(tmp_path / name, "pred") for name in ("a.h5", "b.h5"))
    assert all((one[name] == other[name]).all() for name in one)
