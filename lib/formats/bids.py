"""BIDS: where a derivative of a NIfTI file goes, what it is called, and the JSON beside it (bids-specification 1.10).

sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz       becomes, under another folder,
sub-01/ses-a/anat/sub-01_ses-a_desc-denoised_T1w.nii.gz and .json, and there is one dataset_description.json
"""

import json
import os
import re
from pathlib import Path

from lib.runtime import RELEASE, atomic_write

VERSION = "1.10.0"
NAME = re.compile(r"(sub-[0-9a-zA-Z]+(?:_[a-zA-Z]+-[0-9a-zA-Z+]+)*)_([0-9a-zA-Z]+)(\.nii(?:\.gz)?)$")
TYPES = ("anat", "func", "dwi", "perf", "fmap", "pet")
PHASES = re.compile(r"_part-(phase|real|imag)_|_(phase[12]?|phasediff|fieldmap)\.nii")
NOT_RAW = ("derivatives", "sourcedata", "code", "stimuli")  # folders of a dataset that hold no raw images

SAYS = {  # Description of each derivative
    "denoised": "The image, denoised",
    "removed": "What was taken away: noisy less denoised",
    "std": "Standard deviation of what is left unknown",
    "noise": "Standard deviation of the noise",
    "sample": "One of several clean images that are as likely as each other",
}


def is_raw(path, source):
    """Whether a file in the folder `source` may be a raw image of a BIDS dataset, and not something derived."""
    return not set(NOT_RAW) & set(path.relative_to(source).parts[:-1])


def root_of(path):
    """The dataset that a file belongs to: the folder with dataset_description.json, or else the one above sub-..."""
    for folder in path.parents:
        if (folder / "dataset_description.json").is_file():
            return folder
    above = [folder.parent for folder in path.parents if re.fullmatch("sub-[0-9a-zA-Z]+", folder.name)]
    return above[-1] if above else path.parent


def name_parts(path):
    """(entities {key: value}, suffix, ending) of the name of a file. Raises ValueError if BIDS has no such name."""
    match = NAME.match(path.name)
    if not match:
        raise ValueError(f"{path} is not named as BIDS names a NIfTI image, such as sub-01_T1w.nii.gz")
    return dict(part.split("-", 1) for part in match[1].split("_")), match[2], match[3]


def output(item, folder, what="denoised"):
    """The path under `folder` of a derivative of an item, as desc-<what>. Raises ValueError if its name is not BIDS."""
    path = item.files[0]
    entities, name, ending = name_parts(path)
    if PHASES.search(path.name):
        raise ValueError(f"{path} is left alone, its name says that it holds phases or fields, no image")
    if path.parent.name not in TYPES:
        raise ValueError(f"{path} does not lie in a folder of BIDS with images ({', '.join(TYPES)})")
    before = entities.pop("desc", "")  # of an input that is a derivative itself
    label = before + (what.capitalize() if before else what)
    stem = "_".join(f"{key}-{value}" for key, value in (*entities.items(), ("desc", re.sub("[^0-9a-zA-Z]", "", label))))
    places = [f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities]
    return Path(folder, *places, path.parent.name, f"{stem}_{name}{ending}")


def sidecar(path):
    """The path of the JSON file beside a NIfTI file."""
    return path.with_name(re.sub(r"\.nii(\.gz)?$", ".json", path.name))


def metadata(path):
    """What the JSON files of its dataset say of an image: all that apply by BIDS's inheritance, the nearest last."""
    entities, name, _ = name_parts(path)
    root, found = root_of(path), {}
    for folder in reversed([f for f in path.parents if f == root or root in f.parents]):
        near = [*folder.glob(f"*_{name}.json"), *folder.glob(f"{name}.json")]
        for file in sorted(near, key=lambda p: (p.name.count("_"), p.name)):
            own = [part.split("-", 1) for part in file.stem.split("_")[:-1]]
            if all(len(part) == 2 and entities.get(part[0]) == part[1] for part in own):
                try:
                    found |= json.loads(file.read_text())
                except (OSError, ValueError, TypeError) as error:
                    raise ValueError(f"{file} cannot be read as JSON: {error}") from None
    return found


def write_sidecar(item, path, root, what, told):
    """Writes the JSON file `path` of a derivative of an item: what the input's says, where it comes from, and `told`.

    what: it holds, such as "denoised". root: the folder of the derivatives. SkullStripped, which BIDS requires here, is
    false if the input does not say it: denoising strips nothing.
    """
    source = item.files[0]
    link = links([item], root)
    uri = f"bids:{next(iter(link))}:{source.resolve().relative_to(root_of(source.resolve())).as_posix()}"
    own = {"Description": SAYS.get(what.rstrip("0123456789"), what), "Sources": [uri], **told}
    write_json(path, {"SkullStripped": False, **metadata(source), **own})


def links(items, root):
    """{name: relative path} of the datasets that the items belong to, by which Sources name them."""
    roots = sorted({root_of(item.files[0].resolve()) for item in items})
    paths = [Path(os.path.relpath(place, root.resolve())).as_posix() for place in roots]
    return {re.sub("[^0-9a-zA-Z]", "", path) or "raw": path for path in paths}


def check(root):
    """Raises ValueError if the folder of the derivatives is another dataset already, such as the raw one."""
    path = root / "dataset_description.json"
    if path.exists() and "DiffDenoise" not in path.read_text(errors="replace"):
        raise ValueError(f"--out {root} is another dataset: give a new folder, such as {root}/derivatives/diffdenoise")


def describe(items, root):
    """Writes dataset_description.json of the derivatives of these items; links of an earlier run stay.

    And .bidsignore, so that validators pass over our work folder and page.
    """
    path, found = root / "dataset_description.json", links(items, root)
    if path.exists():
        found = json.loads(path.read_text()).get("DatasetLinks", {}) | found
    sources = []
    for place in sorted(found.values()):
        original = root / place / "dataset_description.json"
        about = json.loads(original.read_text()) if original.is_file() else {}
        sources.append({"DOI": about["DatasetDOI"]} if about.get("DatasetDOI") else {"URL": place})
    made = dict(Name="Denoised images", BIDSVersion=VERSION, DatasetType="derivative")
    made |= dict(GeneratedBy=[dict(Name="DiffDenoise", Version=RELEASE)], SourceDatasets=sources, DatasetLinks=found)
    write_json(path, made)
    if not (root / ".bidsignore").exists():
        (root / ".bidsignore").write_text("diffdenoise\ndiffdenoise/**\nreport*.html\n")


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
