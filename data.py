"""The files between the stages: one HDF5 schema, splits, crops, tiles; `import` from image files, `show`.

    /volumes/<name>        attrs: split (train|val|test), scale, offset, source, fingerprint
        noisy (S,H,W) f4   what the scanner gave, mapped linearly to about [0,1], never clipped
        clean (S,H,W) f4   optional; opened only by evaluate.py and by a run told --target clean
        pred  (S,H,W) f4   in prediction files, under the same volume names
        std   (S,H,W) f4   optional: per-pixel uncertainty of pred
        gain  (S,H,W) f4   optional: by what factor the noise is stronger there, see noise.py divide
        hidden (S,4,H,W) f4   optional: see bsn.py --hidden
        samples (S,N,H,W) f4  optional: clean images that are possible, see distill.py --samples
    file attrs             format, version, kind (dataset|prediction), stage, args, seed, inputs, noise

original intensity = value * scale + offset. The fingerprint is a hash of a volume's noisy values. A prediction carries
the fingerprint of the volume that it was made from, and every stage that uses the two together checks it.

    python data.py import --source brain --out clean.h5
    python data.py import scans/ more/head.nii.gz --out knee.h5 --split 0.8,0.1,0.1
    python data.py show knee.h5
"""

import collections
import contextlib
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import torch

from lib import files, runtime
from lib.crops import (  # noqa: F401
    around,
    check_crop,
    enlarge,
    evenly,
    least_likeness,
    likeness,
    mean_over_symmetries,
    random_crops,
    read_around,
    rms_difference,
    tiled,
    tiling,
)

FORMAT, VERSION = "diffdenoise", 1
SPLITS = ("train", "val", "test")
ROOM = 1 << 20  # bytes for all that a file holds besides its arrays
IN_MEMORY = 4 << 30  # bytes; larger datasets are read slice by slice
TO_PREDICT = 64 << 20  # the same where every slice is read once
ALIKE = 0.3  # correlation of details from which on neighbouring slices show the same thing


# ---------------------------------------------------------------------------------------------------------------
# the file contract
# ---------------------------------------------------------------------------------------------------------------
class Streamed:
    """An (S,H,W) dataset left on disk: reads, and checks, only what is asked for. title: how errors name it."""

    def __init__(self, dataset, title):
        self.dataset, self.title = dataset, title
        self.shape, self.size, self.dtype = dataset.shape, dataset.size, dataset.dtype

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        return files.check_finite(self.dataset[index], self.title)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype)


def split_of(group):
    return group.attrs.get("split", "train")


def open_file(path):
    """Opens a file of the contract. Raises ValueError with one reason if it is not one."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an HDF5 file")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} cannot be read, it may be incomplete: {error}") from None
    if not isinstance(file.get("volumes"), h5py.Group) or not len(file["volumes"]):
        raise ValueError(
            f"{path} has no volumes (expected groups /volumes/<name>); `python data.py import` makes such files"
        )
    return file


def read_volumes(path, key="noisy", split=None, memory=IN_MEMORY, names=None):
    """The arrays `key` of a file: {volume name: (S,H,W) float32 array}, of all volumes, one split, or some names.

    Together larger than `memory` bytes, they stay on disk and are read slice by slice as they are indexed.

    Raises:
        ValueError: no such file, not of the contract, no such key or split, wrong shape, NaN, infinite or constant.
    """
    file, found = open_file(path), {}
    for name, group in file["volumes"].items():
        if split not in (None, "all", split_of(group)) or names is not None and name not in names:
            continue
        title = f"{path}: volume {name!r}"
        if key not in group:
            raise ValueError(f"{title} has no {key!r}, only {sorted(group) or 'nothing'}")
        array = group[key]
        if array.ndim != 3 + (key in ("hidden", "samples")) or 0 in array.shape or array.dtype.kind not in "uif":
            raise ValueError(f"{title}: {key!r} is {array.dtype} of shape {array.shape}, not (slices, height, width)")
        if key == "noisy" and min(array.shape[1:]) < 16:
            raise ValueError(f"{title}: slices of {array.shape[1]}x{array.shape[2]} pixels are smaller than 16x16")
        found[name] = Streamed(array, f"{title}: {key!r}")
    if not found:
        raise ValueError(f"{path} has no volume of split {split!r}")
    if sum(4 * np.prod(a.shape, dtype=float) for a in found.values()) > memory:
        return found
    found = {name: np.asarray(a[:], np.float32) for name, a in found.items()}
    file.close()
    for name, array in found.items():
        if key == "noisy" and np.ptp(array) == 0:
            raise ValueError(f"{path}: volume {name!r} is constant ({array.flat[0]:g}): there is nothing to denoise")
    return found


def read_attrs(path):
    """(attributes of the file, {volume name: attributes}); JSON decoded."""
    with open_file(path) as file:
        attrs = {k: json.loads(v) if k in ("args", "inputs", "noise") else v for k, v in file.attrs.items()}
        return attrs, {name: dict(group.attrs) for name, group in file["volumes"].items()}


def to_learn_from(path):
    """The split to learn from: "train", or None, all volumes, if a dataset has no such split."""
    splits = {one.get("split", "train") for one in read_attrs(path)[1].values()}
    return "train" if "train" in splits else None


def fingerprint(array):
    """Hash of an (S,H,W) array's shape and float32 values, read slice by slice."""
    digest = hashlib.blake2b(repr(tuple(array.shape)).encode(), digest_size=8)
    for s in range(array.shape[0]):
        digest.update(np.ascontiguousarray(array[s], np.float32).tobytes())
    return digest.hexdigest()


def fingerprints(path):
    """{volume name: fingerprint of the noisy data it is, or was predicted from}; computed where a file does not say."""
    with open_file(path) as file:
        return {
            name: group.attrs.get("fingerprint") or (fingerprint(group["noisy"]) if "noisy" in group else "unknown")
            for name, group in file["volumes"].items()
        }


def read_matching(path, dataset, key="pred", split=None):
    """Like read_volumes, for a prediction that must have been made from `dataset`, which also says what the splits are.

    Volumes that only one of the two has are left out.

    Raises:
        ValueError: predicted from other data, or shapes that differ; names both files and the volume.
    """
    mine, theirs = fingerprints(path), fingerprints(dataset)
    shared = [name for name in mine if name in theirs]
    if not shared:
        raise ValueError(f"{path} and {dataset} have no volume in common: {sorted(mine)[:3]} and {sorted(theirs)[:3]}")
    with open_file(path) as a, open_file(dataset) as b:
        for name in shared:
            ours, other = a["volumes"][name].get(key), b["volumes"][name].get("noisy")
            if ours is not None and other is not None and ours.shape != other.shape:
                raise ValueError(f"volume {name!r} is {ours.shape} in {path} but {other.shape} in {dataset}")
    wrong = [name for name in shared if mine[name] != theirs[name]]
    if wrong:
        made_from = ", ".join(read_attrs(path)[0].get("inputs", {})) or "unknown data"
        raise ValueError(
            f"{path} was not made from {dataset} but from {made_from}: volume {wrong[0]!r} "
            f"has fingerprint {mine[wrong[0]]} there, {theirs[wrong[0]]} here; {len(wrong)} of {len(shared)} differ"
        )
    with open_file(dataset) as file:
        names = [name for name in shared if split in (None, "all", split_of(file["volumes"][name]))]
    if not names:
        raise ValueError(f"{path} holds no volume of the {split} split of {dataset}")
    return read_volumes(path, key, names=names)


def read_map(path, dataset):
    """{volume: by what factor its noise is stronger than in the mean (S,H,W)}, of a file (.h5) made from the dataset.

    Or of an image, of any format, of the noise's deviation at each pixel of such a volume. Raises ValueError.
    """
    try:
        open_file(path).close()
    except ValueError:
        gains, attrs, found = files.given_map(path), read_attrs(dataset)[1], {}
    else:
        return read_matching(path, dataset, "gain")
    for name, volume in read_volumes(dataset).items():
        (n, h, w), (first, top, left) = volume.shape, attrs[name].get("place", (0, 0, 0))
        blocks = gains(whole := attrs[name].get("whole", volume.shape))[first : first + n]
        found[name] = np.stack([enlarge(one, whole[1:]) for one in blocks])[:, top : top + h, left : left + w]
    return found


@contextlib.contextmanager
def write_volumes(path, kind, stage, args=None, like=None, noise=None):
    """A new file of the contract, which takes its name only when the block ends without error.

    Yields `add(name, shape, keys, **attrs)`, which adds an empty volume and returns its datasets in the order of
    `keys`, to be filled slice by slice; a key (name, n) makes n images of each slice, (S,n,H,W).

    Args:
        kind: "dataset" or "prediction". stage: the program that writes. args: its flags, with `seed`.
        like: the file it is made from; what its volumes say of themselves (split, scale, offset, source, fingerprint)
            is taken over, and `inputs` says which dataset that was. noise: what is known of the noise, a dict.
    """
    known, volumes = read_attrs(like) if like else ({}, {})
    inputs = known.get("inputs", {})
    if like:  # a volume that carries no fingerprint of its own gets one here
        marks = fingerprints(like)
        volumes = {name: {**volumes[name], "fingerprint": mark} for name, mark in marks.items()}
        if known.get("kind") != "prediction":
            inputs = {Path(like).name: hashlib.blake2b("".join(marks.values()).encode(), digest_size=8).hexdigest()}
    claimed = ROOM
    with runtime.atomic_write(path) as temporary:
        with h5py.File(temporary, "w") as file:
            runtime.reserve(temporary, claimed)
            plain = (int, float, bool, list, type(None))
            flags = {k: v if isinstance(v, plain) else str(v) for k, v in (args or {}).items()}
            file.attrs.update(format=FORMAT, version=VERSION, kind=kind, stage=stage)
            file.attrs.update(seed=int(flags.get("seed") or 0), args=json.dumps(flags), inputs=json.dumps(inputs))
            file.attrs["noise"] = json.dumps(noise or known.get("noise", {}))
            group_of_all = file.create_group("volumes")

            def add(name, shape, keys, **attrs):
                nonlocal claimed
                group = group_of_all.create_group(name)
                taken = {k: v for k, v in volumes.get(name, {}).items() if not k.startswith("hidden")}
                group.attrs.update({**taken, **attrs})
                chunks = (1, *(min(128, n) for n in shape[1:]))
                out = []
                for key in keys:
                    key, channels = (key, ()) if isinstance(key, str) else (key[0], key[1:])
                    sizes, pieces = (shape[0], *channels, *shape[1:]), (1, *(1 for _ in channels), *chunks[1:])
                    claimed += 4 * int(np.prod([-(-n // c) * c + 1 for n, c in zip(sizes, pieces)], dtype=float))
                    out.append(group.create_dataset(key, sizes, np.float32, chunks=pieces))
                runtime.reserve(temporary, claimed)
                return out

            yield add
            file.flush()
            size = file.id.get_filesize()
        os.truncate(temporary, size)


def choose_context(text, volumes, stage=None):
    """How many slices on each side --context means: a number, or `auto`: 2 for volumes {name: (S,H,W)}, else 0.

    stage: whose choice it is; `auto` says what it chose, and why. Raises ValueError if neighbours are asked for and a
    volume has none.
    """
    fewest = min(volume.shape[0] for volume in volumes.values())
    if text != "auto":
        if text and fewest < 2:
            raise ValueError(f"--context {text}: a volume has {fewest} slice: it has no neighbours")
        return text
    if fewest < 3:
        context, why = 0, f"a volume has only {fewest} slice{'s' * (fewest > 1)}"
    else:
        alike = least_likeness(itertools.islice(volumes.values(), 16))
        context, why = 2 if alike > ALIKE else 0, f"details of neighbouring slices correlate by {alike:.2f}"
        why += "" if context else ": they are not of one volume"
    if stage:
        runtime.print_once(f"{stage}: {context} neighbouring slices on each side ({why})")
    return context


# ---------------------------------------------------------------------------------------------------------------
# predictions
# ---------------------------------------------------------------------------------------------------------------
def by_content(path, dataset):
    """The predictions of a file by what they were made from: callable, (S,H,W) noisy to (S,H,W), None if not there."""
    names, found = {digest: name for name, digest in fingerprints(dataset).items()}, read_matching(path, dataset)
    return lambda noisy: found.get(names.get(fingerprint(noisy)))


def write_predictions(args, stage, like, volumes, predict, keys=("pred",), attrs=None, batch=4, context=0):
    """Writes to args.out what `predict` makes of every slice of `volumes` {name: (S,H,W)}, read from the file `like`.

    predict: callable (x (b,2 context + 1,H,W) float32 on the CPU, the slices with their neighbours; volume name; rows:
    slice of slice numbers) to (b,n,H,W): one image for each of `keys`; a last key (name, n) takes n images. attrs:
    attributes for each volume. Several processes share the batches; rank 0 writes.
    """

    def work(item):
        name, rows = item
        x = np.stack([read_around(volumes[name], s, context) for s in range(rows.start, rows.stop)])
        return predict(torch.from_numpy(np.asarray(x, np.float32)), name, rows).cpu().numpy()

    items = [
        (name, slice(s, min(s + batch, volume.shape[0])))
        for name, volume in volumes.items()
        for s in range(0, volume.shape[0], batch)
    ]
    results = runtime.map_over_ranks(work, items, stage)
    if runtime.processes()[0]:
        collections.deque(results, 0)
        return
    with write_volumes(args.out, "prediction", stage, vars(args), like=like) as new_volume:
        for (name, rows), out in results:
            if rows.start == 0:
                arrays = new_volume(name, volumes[name].shape, keys, **(attrs or {}))
            for k, array in enumerate(arrays):
                array[rows] = out[:, k] if array.ndim == 3 else out[:, k:]
    print(f"{stage}: {len(volumes)} volumes -> {args.out}", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# image files to datasets
# ---------------------------------------------------------------------------------------------------------------
def split_shares(split):
    """(train, val, test) shares of --split: a name, or three numbers that sum to 1. Raises ValueError."""
    if split in SPLITS:
        return [float(split == s) for s in SPLITS]
    try:
        shares = [float(s) for s in split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"--split {split}: give train, val, test, or three shares that sum to 1, such as 0.8,0.1,0.1")
    return shares


def held_out(count, shares):
    """How many of `count` things are for val and test: at least one each, unless there are fewer than three in all."""
    return [max(1, round(count * share)) if share and (count >= 3 or share == 1) else 0 for share in shares[1:]]


def blocks(count, shares):
    """Splits `count` consecutive slices into contiguous blocks: [(split, first, end)], val and test in the middle.

    The middle of a volume is the most like the rest of it; its ends often hold little but background.
    """
    val, test = (max(n, 2) if n else 0 for n in held_out(count, shares))  # a slice alone has no neighbours
    test = test if shares[0] else count - val
    first = (count - val - test) // 2 if val + test else 0
    edges = [("train", 0, first), ("val", first, first + val), ("test", first + val, first + val + test)]
    return [b for b in [*edges, ("train", first + val + test, count)] if b[1] < b[2]]


def write_dataset(path, volumes, shares, args, patch=None):
    """Writes formats.Volumes as a dataset file, each mapped to [0,1] by its own minimum and maximum.

    Whole volumes go to the splits where there are ten or more, or too few slices to divide; else blocks of slices. Once
    there are ten, one volume at a time is in memory. patch: cut slices into patches of this side, pixels.
    Raises ValueError if there is no volume.
    """
    few = list(itertools.islice(volumes, 10))
    if not few:
        raise ValueError("no image that can be trained on: damaged, constant, or smaller than 16x16")
    entire = len(few) == 10 or min(len(v.slices) for v in few) < 10
    names, groups = set(), []
    with write_volumes(path, "dataset", "import", args) as add:
        for volume in itertools.chain(few, volumes):
            name = plain = volume.name.replace("/", "_")
            number = 2
            while name in names:
                name, number = f"{plain}-{number}", number + 1
            names.add(name)
            values, scale, offset = files.normalize(volume)
            arrays = dict(noisy=values)
            if volume.clean is not None:
                arrays["clean"] = ((volume.clean - offset) / scale).astype(np.float32)
            for split, first, end in [("train", 0, len(values))] if entire else blocks(len(values), shares):
                block = name if entire or end - first == len(values) else f"{name}_{first:03d}-{end - 1:03d}"
                stacks = [files.patches(a[first:end], patch) for a in arrays.values()]
                attrs = dict(split=split, scale=scale, offset=offset, source=volume.source)
                attrs |= dict(whole=volume.whole, place=volume.place) if volume.place else {}
                written = add(block, stacks[0].shape, list(arrays), **attrs, fingerprint=fingerprint(stacks[0]))
                for array, stack in zip(written, stacks):
                    array[:] = stack
                groups.append(written[0].parent)
        if entire:  # only now is it known how many there are
            val, test = held_out(len(groups), shares)
            counts = (len(groups) - val - test, val, test)
            for group, split in zip(groups, [s for s, n in zip(SPLITS, counts) for _ in range(n)]):
                group.attrs["split"] = split


# ---------------------------------------------------------------------------------------------------------------
# command: import, show
# ---------------------------------------------------------------------------------------------------------------
def show(args):
    """Prints what a file holds, a line per volume."""
    attrs, volumes = read_attrs(args.file)
    print(json.dumps(attrs, indent=1, default=str))
    with open_file(args.file) as file:
        for name, group in file["volumes"].items():
            arrays = ", ".join(f"{key} {tuple(a.shape)}" for key, a in group.items())
            print(f"{name}: {arrays}, split {volumes[name].get('split')}, source {volumes[name].get('source')}")


def import_images(args):
    """Reads image files and writes them as a dataset; what cannot be read is left out. Returns the exit code."""
    shares = split_shares(args.split)
    options = args.key, args.acquisition, args.reference, args.source == "brain", args.slices
    volumes, problems = files.read_sources(args.sources, *options, written=args.out)
    first = next(volumes, None)
    if first is None:
        raise ValueError(problems[0])
    write_dataset(args.out, itertools.chain([first], volumes), shares, vars(args), args.patch)
    for problem in problems:
        print(f"data.py: left out: {problem}", file=sys.stderr)
    return 1 if problems else 0


def main(argv=None):
    p = runtime.parser(__doc__)
    commands = p.add_subparsers(required=True, dest="command")
    q = commands.add_parser("import", help="image files to a dataset")
    q.add_argument("sources", nargs="*", help=f"{files.KINDS} files, or folders of them")
    q.add_argument("--source", choices=["brain"], help="the built-in brain: MNI152 T1, axial slices")
    q.add_argument("--out", required=True, help="dataset to write (.h5)")
    shares = "train, val or test for all; or three shares, by volume from 10 volumes up, else by blocks of slices"
    q.add_argument("--split", default="0.8,0.1,0.1", help=f"{shares} (default 0.8,0.1,0.1)")
    q.add_argument("--key", help="dataset in plain HDF5 files that hold more than one")
    q.add_argument("--acquisition", help="only HDF5 files (fastMRI, M4Raw) with this attribute, such as AXT2")
    means = "the mean of all repetitions (the paper), or of the others alone, as `clean`"
    q.add_argument("--reference", choices=["mean", "others"], help=f"M4Raw: {means}")
    q.add_argument("--slices", type=runtime.positive, help="only so many slices in the middle of each volume")
    patch = "cut slices into whole patches of this side, pixels (the paper: 300)"
    q.add_argument("--patch", type=runtime.positive, help=patch)
    q = commands.add_parser("show", help="what a file holds")
    q.add_argument("file")
    args = p.parse_args(argv)
    if args.__dict__.pop("command") == "show":
        return show(args)
    runtime.check_outputs(args.sources, [args.out])
    return import_images(args)


if __name__ == "__main__":
    runtime.command(main)
