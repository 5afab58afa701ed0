"""What the paper's tables compare, on which images: methods and cells; image sets found, imported, split, cut, joined.

A cell is one image set with one noise and one seed of the training.

Scale paper (Sec. 4.1): 300x300 patches, the sets' own training splits, the first 200 images of validation or test
(fastMRI: slices; SIIM: films, all patches of each):

    FOLDER/knee, FOLDER/brain      fastMRI: multicoil_train, multicoil_val (or singlecoil_...); brain: AXT2 alone
    FOLDER/siim                    SIIM-FISABIO-RSNA COVID-19: train, test, DICOM
    FOLDER/m4raw                   M4Raw: multicoil_train, multicoil_val; the first repetition, against the mean of all

Scale small, for minutes on two cores. Sets that are not found are left out; the built-in brain is always there:

    FOLDER/brain_t1_dicom          one head, 192 slices, blocks of 80, 10 and 10 %
    FOLDER/t2w_volume.nii.gz       a T2w head, 60 slices, the same blocks
    FOLDER/chest_xray              the first 60 files normal_*, 512x512: 42, 3 and 15
    FOLDER/m4raw_pairs.h5          `noisy` one repetition, `mean3` the mean of three, (n,256,256) uint8: the first 240
                                   pairs, blocks of 70, 10 and 20 %, against the mean of the other two

Table m4raw, at either scale: M4Raw as Corruption2Self (Tu et al., ICLR 2025) measures it. Of FOLDER/m4raw, every
repetition in multicoil_train is an image to train on, by itself; the first in multicoil_test, or else in multicoil_val,
is denoised and compared with the mean of all, of which a scan of the test set has six.
"""

from pathlib import Path

import h5py
import numpy as np

import data
import noise

RIVALS = ["supervised", "nlm", "lgbpn", "puca", "nei2nei", "paper", "posterior", "ours", "default"]
TOLD = ["bm3d", "bm4d"]  # the true noise; not everywhere
METHODS = {  # {table: methods, as reproduce.py names them}
    1: [*TOLD, *RIVALS[:2], "nlm-calibrated", "tv", "wavelet", "noise2self", *RIVALS[2:]],
    2: [*TOLD, *RIVALS],
    3: RIVALS,
    4: ["paper", "paper-2", "paper-3", "ours", "ours-2", "ours-3"],
    5: ["nlm", "puca", "single", "srds", "kd-single", "paper", "single25", "srds25"],
    "m4raw": ["supervised", "nlm", "noise2self", "nei2nei", "puca", "paper", "posterior", "ours", "default"],
}
CORRELATIONS = (0.5, 1.2)
MRI = {"gaussian": "6/255", "poisson": "200", "gamma": "100"}
XRAY = {"gaussian": "6/255", "poisson": "700", "gamma": "500"}
LEVELS = {"knee": MRI, "brain": MRI, "siim": XRAY, "head": MRI, "t2w": MRI, "chest": XRAY, "mni": MRI}  # Sec. 4.1
TITLES = {
    "knee": "Knee", "brain": "Brain T2w", "siim": "Chest X-ray", "m4raw-T1": "M4Raw T1w",
    "m4raw-FLAIR": "M4Raw FLAIR", "head": "Head T1w", "t2w": "Head T2w", "chest": "Chest X-ray", "m4raw": "M4Raw pairs",
    "mni": "Built-in brain", "m4raw6-T1": "T1w", "m4raw6-T2": "T2w", "m4raw6-FLAIR": "FLAIR",
}  # fmt: skip
FLAT = ("siim", "chest")  # single images
FIRST = 200  # images of the test sets of fastMRI and SIIM


# ---------------------------------------------------------------------------------------------------------------
# cells
# ---------------------------------------------------------------------------------------------------------------
def cells(table, scale, sets, seeds=1):
    """[(image set, kind of noise, correlation, seed)] of a table; kind None: the images have noise of their own.

    seeds: so many for each image set and noise, seed by seed; Table 5 has two at least.
    """
    return [(*cell, seed) for seed in range(max(seeds, 1 + (table == 5))) for cell in columns(table, scale, sets)]


def columns(table, scale, sets):
    """[(image set, kind of noise, correlation)] of a table."""
    synthetic = [name for name in sets if not name.startswith("m4raw")]
    if table in (3, "m4raw"):
        own = [name for name in sets if name.startswith("m4raw") and name.startswith("m4raw6") == (table == "m4raw")]
        return [(name, None, 0) for name in own]
    if not synthetic:
        return []
    first = "knee" if scale == "paper" else synthetic[0]
    if table == 1:
        return [(name, kind, 0) for name in synthetic for kind in noise.KINDS[:2]]
    if table == 2:
        return [(first, kind, correlation) for kind in noise.KINDS for correlation in CORRELATIONS]
    correlations = (0, 1.2) if (table, scale) == (4, "small") else (0, *CORRELATIONS)
    return [(first, "gaussian", correlation) for correlation in correlations]


def name_of(dataset, kind, correlation, seed):
    """The name of a cell's files."""
    return "-".join([dataset, *([kind] if kind else []), *([f"{correlation:g}"] if correlation else []), f"s{seed}"])


def key_of(cell):
    """(image set, kind of noise, correlation) of a cell as its JSON has it."""
    return cell["dataset"], cell["noise"]["kind"], cell["noise"]["correlation"]


# ---------------------------------------------------------------------------------------------------------------
# image sets
# ---------------------------------------------------------------------------------------------------------------


def available(scale, folders):
    """{image set: its path in one of the folders, or None for the built-in brain} of a scale."""
    if scale == "paper":
        places = {"brain": "brain", "knee": "knee", "siim": "siim", "m4raw-T1": "m4raw", "m4raw-FLAIR": "m4raw"}
    else:
        places = {"head": "brain_t1_dicom", "t2w": "t2w_volume.nii.gz", "chest": "chest_xray"}
        places |= {"m4raw": "m4raw_pairs.h5"}
    found = {}
    for dataset, place in places.items():
        paths = [path for path in (Path(folder) / place for folder in folders) if path.exists()]
        if paths:
            found[dataset] = paths[0]
    if scale == "small":
        found["mni"] = None
    for path in (Path(folder) / "m4raw" for folder in folders):
        for name in ("m4raw6-T1", "m4raw6-T2", "m4raw6-FLAIR"):
            if name not in found and any(path.glob(f"multicoil_train/*_{name[7:]}01.h5")):
                found[name] = path
    return found


def make(dataset, path, out, folder):
    """Writes the image set that lies at `path` as the dataset `out`; intermediate files go to `folder`.

    Raises ValueError, OSError if images are missing or cannot be read.
    """
    if dataset in ("mni", "head", "t2w"):
        return data.main(["import", *(["--source", "brain"] if path is None else [str(path)]), "--out", str(out)])
    if dataset == "chest":
        files = sorted(path.glob("normal_*"))[:60]
        if len(files) < 10:
            raise ValueError(f"{path} holds {len(files)} files normal_*: at least 10 are needed")
        return data.main(["import", *map(str, files), "--split", "0.7,0.05,0.25", "--out", str(out)])
    if dataset == "m4raw":
        return pairs(path, out, 240)
    sources, flags = paper_sources(dataset, path)
    for split, files in sources.items():
        if not files:
            missing = f"no images of the {split} split of {TITLES[dataset]}"
            raise ValueError(f"{path}: {missing} (reproduce_data.py says how folders are named)")
    parts = [(folder / f"{dataset}_{split}.h5", split) for split in sources]
    for part, split in parts:
        data.main(["import", *map(str, sources[split]), "--split", split, *flags, "--out", str(part)])
    join(parts, out, {"test": FIRST} if dataset in ("knee", "brain") else {})
    for part, _ in parts:
        part.unlink()


def paper_sources(dataset, path):
    """({split: image files}, flags for importing them) of an image set of the scale of the paper."""
    if dataset == "siim":
        sources = {split: sorted((path / split).rglob("*.dcm")) for split in ("train", "test")}
        return {**sources, "test": sources["test"][:FIRST]}, ["--patch", "300"]
    if dataset.startswith("m4raw6"):
        test = "multicoil_test" if (path / "multicoil_test").exists() else "multicoil_val"
        patterns = {"train": f"multicoil_train/*_{dataset[7:]}[0-9][0-9].h5", "test": f"{test}/*_{dataset[7:]}01.h5"}
        return {split: sorted(path.glob(pattern)) for split, pattern in patterns.items()}, ["--reference", "mean"]
    pattern = {"knee": "*.h5", "brain": "*AXT2*.h5", "m4raw-T1": "*_T101.h5", "m4raw-FLAIR": "*_FLAIR01.h5"}[dataset]
    kind = "multicoil" if (path / "multicoil_train").exists() else "singlecoil"
    folders = {"train": f"{kind}_train", "test": f"{kind}_val"}
    flags = ["--reference", "mean"] if dataset.startswith("m4raw") else ["--patch", "300"]
    flags += ["--acquisition", "AXT2"] if dataset == "brain" else []
    return {split: sorted((path / folder).glob(pattern)) for split, folder in folders.items()}, flags


def join(parts, out, limits):
    """Writes one dataset from several files [(path, split)], slice by slice; limits: {split: most slices of it}."""
    with data.write_volumes(out, "dataset", "reproduce") as add:
        for path, split in parts:
            left, attrs = limits.get(split, np.inf), data.read_attrs(path)[1]
            with data.open_file(path) as file:
                for name, group in file["volumes"].items():
                    n = int(min(left, group["noisy"].shape[0]))
                    if n == 0:
                        break
                    left -= n
                    kept = {**attrs[name], "split": split, "fingerprint": data.fingerprint(group["noisy"][:n])}
                    written = add(f"{split}_{name}", (n, *group["noisy"].shape[1:]), list(group), **kept)
                    for key, array in zip(group, written):
                        for s in range(n):
                            array[s] = group[key][s]


def pairs(path, out, count=None, reference="others"):
    """A dataset of real pairs: `noisy` one repetition, `clean` the mean of the other two ("others") or of all ("mean").

    Neighbouring indices are neighbouring slices: the splits are contiguous blocks of 70, 10 and 20 %.
    """
    with h5py.File(path) as file:
        if not {"noisy", "mean3"} <= set(file):
            raise ValueError(f"{path} holds {sorted(file)}, not `noisy` and `mean3`")
        noisy, mean3 = (file[key][:count].astype("f4") / 255 for key in ("noisy", "mean3"))
    n, clean = len(noisy), (3 * mean3 - noisy) / 2 if reference == "others" else mean3
    with data.write_volumes(out, "dataset", "m4raw_pairs") as add:
        blocks = ("train", 0, n * 7 // 10), ("val", n * 7 // 10, n * 8 // 10), ("test", n * 8 // 10, n)
        for split, first, end in blocks:
            y = noisy[first:end]
            attrs = dict(split=split, scale=255.0, offset=0.0, source="M4Raw", fingerprint=data.fingerprint(y))
            arrays = add(f"m4raw_{first:03d}-{end - 1:03d}", y.shape, ["noisy", "clean"], **attrs)
            for array, values in zip(arrays, (y, clean[first:end])):
                array[:] = values
