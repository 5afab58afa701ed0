"""Images with a masked background (skull-stripped): where y is one value there is no noise, whatever the model says."""

import numpy as np
import pydicom
import pytest
import torch
from conftest import ellipses
from scipy.ndimage import gaussian_filter
from test_formats import dicom, stack, there, through  # noqa: F401  there: a fixture

import data
import evaluate
import noise
from lib import formats, planes

LAW = noise.known("gaussian", 12 / 255)


@pytest.fixture(scope="module")
def masked():
    """(clean, noisy) (8,96,96) float32, 0 outside of a disc, and the disc."""
    disc = np.broadcast_to(np.hypot(*(np.mgrid[:96, :96] - 47.5)) < 34, (8, 96, 96))
    x = gaussian_filter(ellipses(np.random.default_rng(0), 8, 96, 96), (0.5, 0.7, 0.7)).astype(np.float32) * disc
    return x, x + disc * noise.sample(LAW, x, np.random.default_rng(1)), disc


def smoothed(y):
    """A denoiser: blurs slices and keeps the background as it is."""
    return np.where(noise.constant(y), y, gaussian_filter(y, 0.8, axes=(-2, -1)))


def test_constant(masked):
    """Exactly the background, saturated areas too; neither noise nor areas thinner than 3 pixels."""
    _, y, disc = masked
    assert np.array_equal(noise.constant(y), ~disc)
    y = y.copy()
    y[:, 40:45, 40:43], y[:, 50:60, 50:52] = 1, 1
    found = noise.constant(y) & disc
    assert found[:, 40:45, 40:43].all() and found.sum() == 8 * 15


def test_noise_is_drawn_where_there_is_some(masked):
    """None in the background, all of it in the image, also at its rim."""
    x, y, disc = masked
    z = noise.sample(LAW, x, np.random.default_rng(2), y)
    assert not z[~disc].any()
    rim = disc & (gaussian_filter(disc.astype(float), (0, 1, 1)) < 0.9)
    assert np.std(z[rim]) == pytest.approx(12 / 255, rel=0.05)
    assert np.std(noise.sample(LAW, 0 * x, np.random.default_rng(2), y - x)[rim]) == pytest.approx(12 / 255, rel=0.05)


def test_stein_estimates(masked):
    """Of one plane (evaluate.py) and of the planes of a volume (lib/planes.py): the true error, within 0.5 dB."""
    x, y, disc = masked
    true = -10 * np.log10(np.mean((smoothed(y) - x) ** 2))
    found = evaluate.estimate(lambda v: torch.from_numpy(smoothed(v.numpy())), {"": y}, LAW, 8)
    assert found["psnr"] == pytest.approx(true, abs=0.5)
    assert found["noisy"] == pytest.approx(-10 * np.log10(np.mean((y - x) ** 2)), abs=0.2)
    z, s2 = noise.sample(LAW, x, np.random.default_rng(3), y), noise.local_variance(LAW, smoothed(y), y)
    error, *_, count = planes.weigh(smoothed, smoothed, y, z, s2)
    assert count == disc.sum() and -10 * np.log10(error * disc.mean()) == pytest.approx(true, abs=0.5)


def test_error_of_a_blind_spot_prediction(masked, tmp_path):
    """evaluate.py --no-reference: what differs from the noisy image more than noise does; x is off by 0.03 here."""
    x, y, disc = masked
    with data.write_volumes(tmp_path / "y.h5", "dataset", "test") as add:
        (noisy,) = add("v", y.shape, ["noisy"], split="test", scale=1.0, offset=0.0)
        noisy[:] = y
    with data.write_volumes(tmp_path / "p.h5", "prediction", "bsn", like=tmp_path / "y.h5") as add:
        (pred,) = add("v", y.shape, ["pred"])
        pred[:] = x + 0.03 * disc
    volumes = data.read_volumes(tmp_path / "y.h5", "noisy", "test")
    found = evaluate.measure_without_reference(volumes, tmp_path / "y.h5", tmp_path / "p.h5", "test", LAW)
    assert found["error"] == pytest.approx(0.03 * disc.mean() ** 0.5, rel=0.1)
    assert found["removed"] == pytest.approx(1 + (0.03 * 255 / 12) ** 2, rel=0.05)


@pytest.mark.parametrize("value", [-2000, -32768])
def test_padding_stays(there, value):  # noqa: F811
    """Pixels outside the field of view, marked by PixelPaddingValue, come out as they were, and do not count."""
    raw = np.abs(stack("i2") // 8)
    inside = raw[:, 4:].astype(int)
    raw[:, :4] = value
    for s in range(5):
        dicom(there / "in" / f"{s}.dcm", raw[s], s, 16, PixelPaddingValue=value)
    through(there, lambda y: y + 0.1)
    out = pydicom.dcmread(there / "out" / "2.dcm").pixel_array
    assert (out[:4] == value).all()
    assert np.abs(out[4:] - inside[2] - 0.1 * np.ptp(inside)).max() <= 1
    unsigned = pydicom.Dataset()
    unsigned.add_new(0x00280120, "US", 65536 + value)  # as some scanners write it for signed pixels
    assert (formats.module_of("dicom").padding(unsigned, raw) == (raw == value)).all()
