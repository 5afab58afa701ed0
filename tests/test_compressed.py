"""Noisy images that were stored as JPEG: what the experiment makes, and a short run to its table."""

import numpy as np
from conftest import ok
from test_measure import phantom

import data
from experiments import compressed
from lib import jpeg


def test_compressed(tmp_path):
    """JPEG leaves its grid in the noisy slices and not in the clean ones; the table has every method that was run."""
    x = np.stack(phantom(6, 256)).astype(np.float32)
    with data.write_volumes(tmp_path / "clean.h5", "dataset", "test") as add:
        for split in ("train", "test"):
            add(split, x.shape, ["noisy"], split=split)[0][:] = x
    flags = "a=clean.h5 --quality 75 --methods instant nei2nei --effort 0.002 --noise gaussian:9/255 --out out"
    ok("experiments.compressed", *flags.split(), cwd=tmp_path)
    noisy, clean = (data.read_volumes(tmp_path / "out/a-75.h5", key, "train")["train"] for key in ("noisy", "clean"))
    assert jpeg.jump(list(noisy)) > jpeg.JUMP > jpeg.jump(list(clean))
    assert np.abs(compressed.through_jpeg(x[0], 100) - x[0]).max() < 0.02
    table = (tmp_path / "out/table.md").read_text().splitlines()
    found = [cell.strip() for cell in table[-1].split("|")[1:-1]]
    assert found[0] == "a-75" and found[3:5] == ["", ""] and all("/" in found[k] for k in (1, 2, 5))
    assert float(found[2].split("/")[0]) > float(found[1].split("/")[0]) + 1
