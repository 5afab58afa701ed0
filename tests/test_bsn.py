"""Stage 1: the blind spot is exactly blind; the published network's size."""

import pytest
import torch

from bsn import PUCA

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
