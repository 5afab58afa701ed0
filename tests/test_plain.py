"""What bench.py compares with computes the same: our networks, written as the reference implementations are."""

import numpy as np
import pytest
import torch

import bsn
import diffusion
import distill
from experiments import plain

SMALL = dict(width=8, enc_blocks=(1, 1), middle_blocks=1, dec_blocks=(1, 1))


def shaken(network):
    """The network in float64 with every weight moved: blocks that start as the identity would prove nothing."""
    torch.manual_seed(0)
    for p in network.double().parameters():
        p.data += 0.1 * torch.randn_like(p)
    return network


def same(ours, *inputs, but=()):
    """The same output, and the same gradients of all weights (`but` those named so)."""
    other = plain.plain(ours)
    out, expected = ours(*inputs), other(*inputs)
    torch.testing.assert_close(out, expected)
    out.square().mean().backward()
    expected.square().mean().backward()
    theirs = dict(getattr(other, "ours", other).named_parameters())
    for name, p in ours.named_parameters():
        if not name.endswith(but):
            torch.testing.assert_close(p.grad, theirs[name].grad)


@pytest.mark.parametrize("blind_spot", [1, 5])
@pytest.mark.parametrize("dense", [False, True])
def test_puca(dense, blind_spot):
    """Dilated convolutions on the whole image are ordinary ones on the subsampled images.

    As published, attention pools over the whole image, ours over each of those: here it ignores what it pools.
    """
    ours = shaken(bsn.PUCA(dense=dense, blind_spot=blind_spot, **SMALL))
    for block in ours.modules():
        if isinstance(block, bsn.DABlock):
            block.attention.weight.data.zero_()
    same(ours, torch.rand(2, 1, 33, 40, dtype=torch.double), but=("attention.weight",))


def test_unet():
    ours = shaken(diffusion.UNet(width=8, mult=(1, 2), blocks=1, attention=(1,), groups=4)).float()
    x, c = torch.rand(2, 2, 1, 24, 20)
    same(ours, x, c, torch.tensor([3, 500]))


@pytest.mark.parametrize("network", [distill.NAFNet, distill.ResUNet])
def test_students(network):
    same(shaken(network(**SMALL)), torch.rand(2, 1, 33, 40, dtype=torch.double))


def test_norm_gradient():
    x, w, b = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((2, 3, 4, 5), (3,), (3,)))
    assert torch.autograd.gradcheck(lambda *a: plain.NormFunction.apply(*a, 1e-6), (x, w, b))


def test_crops():
    """Crops of the two stacks match, and come from where they should."""
    volume = np.arange(3 * 20 * 24, dtype=np.float32).reshape(3, 20, 24)
    crops = plain.CropDataset([{"a": volume}, {"a": 2 * volume}], 16, 5)
    for one, other in (crops[k] for k in range(5)):
        assert one.shape == (1, 16, 16) and torch.equal(2 * one, other) and np.isin(one, volume).all()
