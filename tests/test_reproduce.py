"""The tables: image sets in their exact formats, cells that resume, bold and claims as they should be."""

import json
import shutil

import h5py
import numpy as np
import pytest
from conftest import ROOT, ellipses, ok, run
from test_data import write_dicom
from test_formats import fastmri

import data
from experiments import reproduce, reproduce_data, reproduce_report


def slices(rng, n, h, w):
    return 1e-3 * ellipses(rng, n, h, w)


def test_paper_scale_sets(tmp_path, monkeypatch):
    """fastMRI, M4Raw and SIIM files become 300x300 patches with their own splits; the test set ends at its limit."""
    monkeypatch.setattr(reproduce_data, "FIRST", 3)
    rng = np.random.default_rng(0)
    for split, files in (("train", 2), ("val", 1)):
        for place in ("knee", "brain", "m4raw"):
            (tmp_path / place / f"multicoil_{split}").mkdir(parents=True)
        for k in range(files):
            fastmri(tmp_path / f"knee/multicoil_{split}/file100{k}.h5", slices(rng, 4, 320, 320), "CORPD_FBK")
            fastmri(tmp_path / f"brain/multicoil_{split}/file_brain_AXT2_20{k}.h5", slices(rng, 2, 640, 320), "AXT2")
        fastmri(tmp_path / f"brain/multicoil_{split}/file_brain_AXT1_200.h5", slices(rng, 2, 320, 320), "AXT1")
        x = slices(rng, 2, 64, 64)
        for contrast, n in (("T1", 3), ("FLAIR", 2)):
            for k in range(n):
                y = x + 2e-5 * rng.standard_normal(x.shape)
                fastmri(tmp_path / f"m4raw/multicoil_{split}/2022061003_{contrast}0{k + 1}.h5", y, f"AX{contrast}")
    for split, n in (("train", 2), ("test", 4)):
        for k in range(n):
            folder = tmp_path / "siim" / split / f"study{k}" / "series"
            folder.mkdir(parents=True)
            write_dicom(folder / "image.dcm", rng.integers(0, 4000, (700, 310)), k, inverted=k == 1)
    sets = reproduce_data.available("paper", [tmp_path / "nothing", tmp_path])
    assert list(sets) == ["brain", "knee", "siim", "m4raw-T1", "m4raw-FLAIR", "m4raw6-T1", "m4raw6-FLAIR"]
    shapes = {"knee": (8, 3, 300), "brain": (8, 3, 300), "siim": (4, 6, 300), "m4raw-T1": (2, 2, 64)}
    shapes |= {"m4raw-FLAIR": (2, 2, 64), "m4raw6-T1": (6, 2, 64)}  # of one scan, all three repetitions
    for name, (train, test, side) in shapes.items():
        out = tmp_path / f"{name}.h5"
        reproduce_data.make(name, sets[name], out, tmp_path)
        for split, n in (("train", train), ("test", test)):
            volumes = data.read_volumes(out, "noisy", split)
            assert sum(len(v) for v in volumes.values()) == n
            assert all(v.shape[1:] == (side, side) and v.min() >= 0 and v.max() <= 1 for v in volumes.values())
    noisy, clean = (data.read_volumes(tmp_path / "m4raw-T1.h5", key, "test") for key in ("noisy", "clean"))
    gap = np.std(
        [(noisy[name] - clean[name]) * data.read_attrs(tmp_path / "m4raw-T1.h5")[1][name]["scale"] for name in noisy]
    )
    assert abs(gap / (2e-5 * (2 / 3) ** 0.5) - 1) < 0.05  # the mean of three holds a third of the noise
    (tmp_path / "knee/multicoil_val/file1000.h5").unlink()
    with pytest.raises(ValueError, match="no images of the test split of Knee"):
        reproduce_data.make("knee", sets["knee"], tmp_path / "knee.h5", tmp_path)


def test_small_scale_runs_and_resumes(tmp_path):
    """Table 3 from nothing but a folder, then one method again: the rest stays, to the last digit."""
    rng = np.random.default_rng(0)
    x = ellipses(rng, 30, 96, 96)
    with h5py.File(tmp_path / "m4raw_pairs.h5", "w") as file:
        noisy, *others = (x + 0.03 * rng.standard_normal(x.shape) for _ in range(3))
        for key, values in (("noisy", noisy), ("mean3", (noisy + sum(others)) / 3)):
            file[key] = (255 * values.clip(0, 1)).astype(np.uint8)
    flags = ["--table", "3", "--work", tmp_path / "work", "--data", ".", "--budget", "0.2"]
    ok("experiments.reproduce", *flags, cwd=tmp_path)
    path = tmp_path / "reproduced/m4raw-s0.json"
    first = json.loads(path.read_text())
    assert list(first["methods"]) == ["noisy", *reproduce_data.METHODS[3]] and first["methods"]["noisy"]["n"] == 6
    table = (tmp_path / "reproduced/tables.md").read_text()
    assert "| Neighbor2Neighbor | " in table and "| 4.4 | PSNR above PUCA, real noise | +0.45, +0.28 |" in table
    assert str(tmp_path) not in path.read_text()
    changed = json.loads(path.read_text())
    del changed["methods"]["puca"]
    path.write_text(json.dumps(changed))
    said = ok("experiments.reproduce", *flags, cwd=tmp_path).stdout
    assert "m4raw-s0: puca\n" in said and said.count("m4raw-s0") == 1 and "steps in" not in said
    again = json.loads(path.read_text())
    assert again["methods"]["puca"] == first["methods"]["puca"]
    assert {**again, "methods": None} == {**first, "methods": None}
    wrong = run("experiments.reproduce", *flags[:-1], "0.3", cwd=tmp_path)
    assert wrong.returncode == 2 and "give another --out" in wrong.stderr


def test_m4raw_as_others_measure_it(tmp_path, monkeypatch):
    """Scans of the simulated scanner, as files: single repetitions to train on, the mean of six to compare with."""
    with data.write_volumes(tmp_path / "clean.h5", "dataset", "test") as add:
        for split in ("train", "test"):
            x = ellipses(np.random.default_rng(len(split)), 3, 96, 96)
            add(split, x.shape, ["clean"], split=split)[0][:] = x
    ok("experiments.scanner", "--data", "clean.h5", "--no-kspace", "--out", "sets/m4raw", cwd=tmp_path)
    monkeypatch.setitem(reproduce_data.METHODS, "m4raw", ["supervised", "nlm"])
    flags = ["--table", "m4raw", "--data", "sets", "--budget", "0.2", "--work", "work"]
    ok("experiments.reproduce", *flags, cwd=tmp_path)
    dataset = tmp_path / "work/m4raw6-T1.h5"
    assert len(data.read_volumes(dataset, "noisy", "train")) == 6
    (noisy,), (clean,) = (data.read_volumes(dataset, key, "test").values() for key in ("noisy", "clean"))
    attrs = data.read_attrs(dataset)[1]["test_2022061001_T101"]
    files = sorted((tmp_path / "sets/m4raw/multicoil_test").iterdir())
    images = [h5py.File(path)["reconstruction_rss"][:] for path in files]
    assert len(images) == 6
    np.testing.assert_allclose(noisy * attrs["scale"] + attrs["offset"], images[0], rtol=1e-4)
    np.testing.assert_allclose(clean * attrs["scale"] + attrs["offset"], np.mean(images, 0), rtol=1e-4)
    table = (tmp_path / "reproduced/tables.md").read_text()
    assert "## Table m4raw: single repetitions against the mean of six" in table and "| Supervised | " in table
    assert "| Corruption2Self | 32.77/0.919 | 32.33/0.890 | 32.51/0.876 |" in table and "Table 3" not in table


def test_cells_of_the_paper():
    sets = ["brain", "knee", "siim", "m4raw-T1", "m4raw-FLAIR"]
    count = {table: len(reproduce_data.cells(table, "paper", sets)) for table in range(1, 6)}
    assert count == {1: 6, 2: 6, 3: 2, 4: 3, 5: 6}
    assert reproduce_data.cells(4, "small", ["head", "chest"]) == [
        ("head", "gaussian", 0, 0),
        ("head", "gaussian", 1.2, 0),
    ]
    two = reproduce_data.cells(1, "small", ["head", "chest"], 2)
    assert len(two) == 8 and [seed for *_, seed in two] == 4 * [0] + 4 * [1] and len(set(two)) == 8


def made_up(kind, correlation, seed=0, **psnr):
    """A cell whose methods have these PSNR, slice by slice."""
    methods = {
        name: dict(psnr=np.mean(v), ssim=np.mean(v) / 50, leak=0.1, n=len(v), seconds=1.0, processor_seconds=1.0,
                   slices=dict(psnr=list(v), ssim=[x / 50 for x in v]))
        for name, v in psnr.items()
    }  # fmt: skip
    noise = dict(kind=kind, correlation=correlation)
    return dict(dataset="head", noise=noise, seed=seed, scale="small", budget=75, methods=methods)


def test_bold_where_the_test_says_so():
    """The best self-supervised row is bold if it wins slice by slice, not if it wins on average alone."""
    base = np.linspace(30, 34, 8)
    rows = {m: base - k for k, m in enumerate(reproduce_data.METHODS[1])} | dict(noisy=base, supervised=base + 9)
    rows |= dict(puca=base + 2, nei2nei=base + 2.5)
    clear = reproduce_report.markdown(1, [reproduce_report.Column([made_up("gaussian", 0, **rows)])])
    assert "| Neighbor2Neighbor | **34.50**/**0.690** |" in clear and "| Supervised | 41.00/0.820 |" in clear
    rows["nei2nei"] = base + 2 + np.tile([1, -0.9], 4)
    unclear = reproduce_report.markdown(1, [reproduce_report.Column([made_up("gaussian", 0, **rows)])])
    assert not any("**" in line for line in unclear)


def test_claims():
    """A difference that the images agree on decides about a claim, but only the paper's scale can refute one."""
    x, mixed = np.linspace(30, 31, 8), np.tile([1.0, -0.9], 4)
    rows = dict(nlm=x, puca=x + 1, single=x, srds=x + 2, single25=x, srds25=x + mixed)
    runs = [
        made_up("gaussian", c, seed, **rows, **{"kd-single": x + (1 if c else -1)}, paper=x + 1.5)
        for c in (0, 0.5)
        for seed in (0, 1)
    ]
    for column in (cols := reproduce_report.columns(runs, 5)):
        assert len(column.runs) == 2
    lines = "\n".join(reproduce_report.claims({5: cols}))
    assert "| SRDS gains over one sample | +2.39, +1.85, +3.45 | +2.00, +2.00 | seen |" in lines
    assert "| the same with 25 steps |  | +0.05, +0.05 | 0 for, 0 against, of 2 |" in lines
    against = "| distillation gains over SRDS | +0.15, +0.26, +0.36 | -0.50, -0.50 | "
    assert f"{against}not seen at this budget |" in lines and "refuted" not in lines
    assert "| without SRDS distillation loses | -0.33, -0.98, -0.89 | -1.00, +1.00 | 1 for, 1 against, of 2 |" in lines
    for cell in runs:
        cell["scale"] = "paper"
    lines = "\n".join(reproduce_report.claims({5: cols}))
    assert f"{against}refuted |" in lines and "not seen" not in lines


def test_gains_over_image_sets():
    """Mean and standard error over the sets of a kind of noise, and of how many; BM4D has no single images."""
    base = np.linspace(30, 34, 8)
    cells = [made_up("gaussian", 0, noisy=base, nlm=base + k, bm4d=base + 5) for k in (1, 2, 6)]
    del cells[2]["methods"]["bm4d"]
    lines = reproduce_report.over_sets([reproduce_report.Column([cell]) for cell in cells])
    error = np.std([1, 2, 6], ddof=1) / 3**0.5
    assert f"| Non-local means, level measured | +3.00 ± {error:.2f} (3) |" in lines
    assert "| BM4D (3D), told | +5.00 ± 0.00 (2) |" in lines and not any("PUCA" in line for line in lines)


def test_seeds():
    """Where a column has two, a table has their mean, and says by how much they differ."""
    x = np.linspace(30, 34, 8)
    rows = {method: x for method in ("noisy", *reproduce_data.METHODS[2])}
    runs = [made_up("gaussian", 0.5, seed, **{**rows, "puca": x + seed / 2}) for seed in (0, 1)]
    runs.append(made_up("poisson", 0.5, **rows))
    lines = "\n".join(reproduce_report.markdown(2, reproduce_report.columns(runs, 2)))
    assert "| PUCA | **32.25**/**0.645** | 32.00/0.640 |" in lines
    assert "seeds of the training: 2, 1, column by column; the same method differs by at most 0.50 dB" in lines


def test_partial_cells_claim_nothing():
    """Where a rival has not run yet, nothing is bold and no claim about the best is made; other budgets do not mix."""
    base = np.linspace(30, 34, 12)
    run = made_up("gaussian", 0, noisy=base, supervised=base + 9, nlm=base + 1, puca=base + 2, paper=base + 3)
    cols = reproduce_report.columns([run], 1)
    assert "**" not in "\n".join(reproduce_report.markdown(1, cols))
    lines = "\n".join(reproduce_report.claims({1: cols}))
    assert "PSNR about 4 dB above noisy" in lines and "highest SSIM" not in lines
    assert reproduce_report.columns([run], 4) == []


def test_the_paper_s_tables_are_read():
    """Five tables, every row as long as its head."""
    assert list(reproduce_report.PAPER) == [1, 2, 3, 4, 5]
    for _, heads, rows in reproduce_report.PAPER.values():
        assert len(rows) >= 4 and all(len(numbers) == heads.count("|") + 1 for numbers in rows.values())


def test_committed_cells_make_the_committed_tables(tmp_path):
    """The cells of results/reproduce are readable, and the tables are what they say."""
    for path in (ROOT / "results/reproduce").glob("*.json"):
        shutil.copy(path, tmp_path)
    said = ok("experiments.reproduce", "--table", "none", "--out", ".", "--work", "work", cwd=tmp_path).stdout
    assert f"{len(list(tmp_path.glob('*-s*.json')))} cells -> tables.md" in said
    assert (tmp_path / "tables.md").read_text() == (ROOT / "results/reproduce/tables.md").read_text()


def test_of_several_processes_one_has_the_cell(tmp_path):
    with reproduce.alone(tmp_path / "lock", wait=False) as mine:
        with reproduce.alone(tmp_path / "lock", wait=False) as also:
            assert mine and not also
    with reproduce.alone(tmp_path / "lock") as mine:
        assert mine


def test_wrong_use_is_refused(tmp_path):
    done = run("experiments.reproduce", "--table", "none", cwd=tmp_path)
    assert done.returncode == 2 and "reproduced holds no cell" in done.stderr
    done = run("experiments.reproduce", "--budget", "0", cwd=tmp_path)
    assert done.returncode == 2 and "--budget 0 is not positive" in done.stderr
    done = run("experiments.reproduce", "--scale", "paper", "--data", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and "--data nowhere: no image set of scale paper" in done.stderr
