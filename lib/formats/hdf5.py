"""HDF5 files: fastMRI, M4Raw, datasets of this project, plain HDF5.

fastMRI, M4Raw    reconstruction_rss or reconstruction_esc (S,H,W), else the root-sum-of-squares of kspace; attribute
                  `acquisition`; the repetitions of an M4Raw scan differ in the last two digits of their file names
this project      /volumes/<name>/noisy (data.py)
plain             the dataset that `key` names, or the only one of two or three dimensions
"""

import os
import re

import h5py
import numpy as np

from lib.formats.common import Volume, as_type, check_grey, check_size
from lib.runtime import atomic_write, reserve

RECONSTRUCTIONS = ("reconstruction_rss", "reconstruction_esc")
REPETITION = re.compile(r"(.+_(?:FLAIR|T1|T2|GRE))(\d\d)$")


def has_acquisition(path, acquisition):
    """Whether a file is of this acquisition. True for an unreadable file, so that `read` reports what is wrong."""
    try:
        with h5py.File(path, "r") as file:
            found = file.attrs.get("acquisition")
            return (found.decode(errors="replace") if isinstance(found, bytes) else str(found)) == acquisition
    except OSError:
        return True


def image_names(file, path, key):
    """The names of the datasets that are images, or kspace alone. Raises ValueError if it is unclear which they are."""
    if key:
        if key not in file or not isinstance(file[key], h5py.Dataset):
            raise ValueError(f"{path} has no dataset {key!r}, only {', '.join(list(file)[:8])}")
        return [key]
    if isinstance(file.get("volumes"), h5py.Group):
        found = [f"volumes/{name}/noisy" for name in file["volumes"] if "noisy" in file["volumes"][name]]
        if not found:
            raise ValueError(f"{path} has no noisy images: it is a prediction file of this project")
        return found
    found = [name for name in RECONSTRUCTIONS if name in file] or ["kspace"] * ("kspace" in file)
    if found:
        return found

    def visit(name, x):
        if isinstance(x, h5py.Dataset) and x.ndim in (2, 3) and min(x.shape[-2:]) > 1 and x.dtype.kind in "uif":
            found.append(name)

    file.visititems(visit)
    if len(found) != 1:
        raise ValueError(f"{path} holds {len(found)} datasets that may be images, {found[:8]}: name one with --key")
    return found


def read_array(file, path, name):
    """The numbers (S,H,W) of a dataset, checked to lie in this file and to be as large as it says."""
    dataset = file[name]
    if dataset.file.filename != file.filename or dataset.is_virtual or dataset.external:
        raise ValueError(f"{path}: {name!r} lies in another file, which is not followed")
    check_size(path, float(dataset.nbytes), dataset.id.get_storage_size())
    if name == "kspace":
        return root_sum_of_squares(dataset, file)
    check_grey(path, dataset.shape, dataset.dtype)
    return dataset[()].reshape(-1, *dataset.shape[-2:])


def root_sum_of_squares(kspace, file):
    """Magnitude images (S,H,W) float32 of complex k-space (S,[coils,]H,W), cropped to the size named in the header."""
    if kspace.ndim not in (3, 4) or kspace.dtype.kind != "c":
        raise ValueError(f"kspace is {kspace.dtype} of shape {kspace.shape}, not (slices, coils, height, width)")
    h, w = kspace.shape[-2:]
    header = file["ismrmrd_header"][()] if "ismrmrd_header" in file and file["ismrmrd_header"].nbytes < 1 << 24 else b""
    header = header if isinstance(header, bytes) else str(header).encode()
    size = re.search(rb"reconSpace>.*?<(?:\w+:)?x>(\d+)<.*?<(?:\w+:)?y>(\d+)<", header, re.S)
    ch, cw = (min(int(n), m) for n, m in zip(size.groups(), (h, w))) if size else (h, w)
    out = np.empty((len(kspace), ch, cw), np.float32)
    top, left = (h - ch) // 2, (w - cw) // 2
    for s in range(len(kspace)):
        centred = np.fft.ifftshift(kspace[s], axes=(-2, -1))
        coils = np.abs(np.fft.fftshift(np.fft.ifft2(centred, norm="ortho"), axes=(-2, -1)))
        image = np.sqrt(np.square(coils.reshape(-1, h, w)).sum(0))
        out[s] = image[top : top + ch, left : left + cw]
    return out


def read(item):
    """One Volume for each image dataset; if the item asks for a reference, with the mean of repetitions as `clean`."""
    path = item.files[0]
    with open_file(path) as file:
        arrays = {name: read_array(file, path, name) for name in image_names(file, path, item.key)}
    labels = [path.stem] if len(arrays) == 1 else [name.split("/")[-2:][0] for name in arrays]
    volumes = [Volume(label, array, str(path)) for label, array in zip(labels, arrays.values())]
    if item.reference:
        volumes = [volume._replace(clean=mean_of_repetitions(path, item, volume.slices)) for volume in volumes]
    return volumes


def open_file(path):
    """An open h5py.File; PermissionError stays, any other OSError becomes a ValueError that names the file."""
    try:
        return h5py.File(path, "r")
    except PermissionError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read as HDF5, it may be incomplete: {str(error)[:100]}") from None


def mean_of_repetitions(path, item, own):
    """Mean (S,H,W) of all M4Raw repetitions of a scan ("mean", as in the paper) or of all but this one ("others")."""
    match = REPETITION.match(path.stem)
    if not match:
        raise ValueError(f"{path} is not named as an M4Raw repetition is, such as 2022061003_T101.h5")
    others = []
    for other in sorted(path.parent.glob(f"{match[1]}[0-9][0-9].h5")):
        if other != path:
            with open_file(other) as file:
                others.append(read_array(file, other, image_names(file, other, item.key)[0]))
    if not others or any(x.shape != own.shape for x in others):
        raise ValueError(f"{path} has no other repetition of its shape beside it")
    stack = others if item.reference == "others" else [own, *others]
    return np.mean(stack, axis=0, dtype=np.float64)


def write(item, arrays, paths, method):
    """Copies the file with new images. Leaves out k-space, from which the new images cannot be computed."""
    path = item.files[0]
    with open_file(path) as file, atomic_write(paths[0]) as temporary, h5py.File(temporary, "w") as out:
        names = image_names(file, path, item.key)
        reserve(temporary, path.stat().st_size + sum(a.nbytes for a in arrays) + 2**20)
        out.attrs.update(file.attrs)
        for name in file:
            link = file.get(name, getlink=True)
            if isinstance(link, h5py.HardLink) and name != "kspace":
                twin = next((other for other in out if file.get(other) == file[name]), None)
                if twin:  # another name of the same
                    out[name] = out[twin]
                else:
                    file.copy(name, out, expand_external=False)
            elif isinstance(link, h5py.SoftLink):
                out[name] = link
        for name, values in zip(names, arrays):
            if name == "kspace":
                out.create_dataset(RECONSTRUCTIONS[0], data=np.asarray(values, np.float32))
            else:
                out[name][...] = as_type(values, file[name].dtype).reshape(file[name].shape)
            out[name.rpartition("/")[0] or "/"].attrs.pop("fingerprint", None)  # data.py's hash of the noisy images
        out.attrs["denoised_by"] = method
        out.flush()
        size = out.id.get_filesize()
        out.close()
        os.truncate(temporary, size)  # gives back what was reserved but not needed
