"""The images of the paper's tables as datasets of data.py's contract: found in folders, imported, split, cut, joined.

Scale paper (Sec. 4.1): 300x300 patches, the sets' own training splits, the first 200 images of validation or test
(fastMRI: slices; SIIM: films, all patches of each):

    FOLDER/knee, FOLDER/brain      fastMRI: multicoil_train, multicoil_val (or singlecoil_...); brain: AXT2 alone
    FOLDER/siim                    SIIM-FISABIO-RSNA COVID-19: train, test, DICOM
    FOLDER/m4raw                   M4Raw: multicoil_train, multicoil_val; the first repetition, against the mean of all

Scale small, minutes on two cores; what is not found is left out, and the built-in brain takes its place:

    FOLDER/brain_t1_dicom          one head, 192 slices, blocks of 80, 10 and 10 %
    FOLDER/chest_xray              the first 60 files normal_*, 512x512: 42, 3 and 15
    FOLDER/m4raw_pairs.h5          `noisy` one repetition, `mean3` the mean of three, (n,256,256) uint8: the first 240
                                   pairs, blocks of 70, 10 and 20 %, against the mean of the other two
"""

from pathlib import Path

import h5py
import numpy as np

import data

MRI = {"gaussian": "6/255", "poisson": "200", "gamma": "100"}
XRAY = {"gaussian": "6/255", "poisson": "700", "gamma": "500"}
LEVELS = {"knee": MRI, "brain": MRI, "siim": XRAY, "head": MRI, "chest": XRAY, "mni": MRI}  # Sec. 4.1
TITLES = {
    "knee": "Knee",
    "brain": "Brain T2w",
    "siim": "Chest X-ray",
    "m4raw-T1": "M4Raw T1w",
    "m4raw-FLAIR": "M4Raw FLAIR",
    "head": "Head T1w",
    "chest": "Chest X-ray",
    "m4raw": "M4Raw pairs",
    "mni": "Built-in brain",
}
FIRST = 200  # images of the test sets of fastMRI and SIIM


def find(name, folders):
    """The first of `folders` that holds `name`, joined with it; None if none does."""
    return next((path for folder in folders if (path := Path(folder) / name).exists()), None)


def available(scale, folders):
    """{dataset: where it lies, or None for the built-in brain} of a scale."""
    if scale == "paper":
        places = {"brain": "brain", "knee": "knee", "siim": "siim", "m4raw-T1": "m4raw", "m4raw-FLAIR": "m4raw"}
    else:
        places = {"head": "brain_t1_dicom", "chest": "chest_xray", "m4raw": "m4raw_pairs.h5"}
    found = {dataset: path for dataset, place in places.items() if (path := find(place, folders))}
    if scale == "small" and not {"head", "chest"} & set(found):
        found = {"mni": None} | found
    return found


def make(dataset, path, out, folder):
    """Writes the dataset as `out`; parts that are made on the way lie in `folder`. Raises ValueError, OSError."""
    if dataset == "mni":
        return data.main(["import", "--source", "brain", "--out", str(out)])
    if dataset == "head":
        return data.main(["import", str(path), "--out", str(out)])
    if dataset == "chest":
        files = sorted(path.glob("normal_*"))[:60]
        if len(files) < 10:
            raise ValueError(f"{path} holds {len(files)} files normal_*: at least 10 are needed")
        return data.main(["import", *map(str, files), "--split", "0.7,0.05,0.25", "--out", str(out)])
    if dataset == "m4raw":
        return pairs(path, out, 240)
    if dataset == "siim":
        sources, flags = (
            {split: sorted((path / split).rglob("*.dcm")) for split in ("train", "test")},
            ["--patch", "300"],
        )
    else:
        contrast = {"brain": "AXT2", "m4raw-T1": "T1", "m4raw-FLAIR": "FLAIR"}.get(dataset)
        pattern = {None: "*.h5", "AXT2": "*AXT2*.h5"}.get(contrast, f"*_{contrast}01.h5")
        kind = "multicoil" if (path / "multicoil_train").exists() else "singlecoil"
        ends = {"train": f"{kind}_train", "test": f"{kind}_val"}
        sources = {split: sorted((path / end).glob(pattern)) for split, end in ends.items()}
        flags = ["--reference", "mean"] if dataset.startswith("m4raw") else ["--patch", "300"]
        flags += ["--acquisition", "AXT2"] if dataset == "brain" else []
    for split, files in sources.items():
        if not files:
            raise ValueError(
                f"{path}: no images of the {split} split of {TITLES[dataset]} (reproduce_data.py says where)"
            )
    if dataset == "siim":
        sources["test"] = sources["test"][:FIRST]
    parts = [(folder / f"{dataset}_{split}.h5", split) for split in sources]
    for part, split in parts:
        data.main(["import", *map(str, sources[split]), "--split", split, *flags, "--out", str(part)])
    join(parts, out, {"test": FIRST} if dataset in ("knee", "brain") else {})
    for part, _ in parts:
        part.unlink()


def join(parts, out, limits):
    """One dataset of several files [(path, split)]; of a split in `limits`, the first so many slices. Streams."""
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
        for split, first, end in (
            ("train", 0, n * 7 // 10),
            ("val", n * 7 // 10, n * 8 // 10),
            ("test", n * 8 // 10, n),
        ):
            y = noisy[first:end]
            attrs = dict(split=split, scale=255.0, offset=0.0, source="M4Raw", fingerprint=data.fingerprint(y))
            arrays = add(f"m4raw_{first:03d}-{end - 1:03d}", y.shape, ["noisy", "clean"], **attrs)
            for array, values in zip(arrays, (y, clean[first:end])):
                array[:] = values
