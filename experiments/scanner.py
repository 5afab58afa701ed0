"""A scanner: from clean images to k-space of many coils, with its noise, and to files as M4Raw and fastMRI have them.

    In    clean.h5                  volumes/<name>/clean, or `noisy` where there is no clean: images without noise
    Out   FOLDER/multicoil_SPLIT/   a file for each repetition of a scan. M4Raw: 2022061001_T101.h5 ... T106.h5, with
                                    kspace (S,coils,H,W) complex64, reconstruction_rss (S,H,W), ismrmrd_header,
                                    attributes; fastMRI: file_brain_AXT2_201_6002001.h5 ..., and `mask` (W,) of lines
          FOLDER/TRUTH.h5           a dataset: `noisy` the first repetition's magnitude, `clean` the same without noise
          FOLDER/SIGMA.h5           of these volumes, in the units of `noisy`: `std` of the magnitude, its mean `pred`,
                                    and `sigma`, that of the Gaussian noise beneath it
          FOLDER/noise.json         the noise model (noise.py) of images divided by `sigma` and multiplied by its mean
                                    in the head: variance, correlation, the empty band and the law of the air

    python -m experiments.scanner --data clean.h5 --out m4raw/
    python -m experiments.scanner --data clean.h5 --format fastmri --level 4/255 --out fastmri/
    python data.py import m4raw/multicoil_test --reference others --out others.h5

Coil k measures C_k x e^{i phase} + n_k in k-space: C_k smooth and complex, falling off with the distance from the coil,
x the image, n complex Gaussian noise with the covariance psi between the coils (`covariance`), white in k-space. Of the
lines along the last axis only the inner ones are acquired (M4Raw: 195 of 256); zeros stand in for the others.

    m4raw      4 coils, all inner lines. Image: the root-sum-of-squares of the coils. Its shading is in `clean` too
    fastmri    8 coils, every second inner line; the two pixels that fold onto each other are told apart by the coils
               (SENSE, Pruessmann et al. 1999, with the true C and psi). Noise grows by sqrt(2) g, g being 1 to 1.5

What follows of the magnitude M = |s + n|: E n n^H = cov in each pixel (`background`), s = sqrt(sum |s_k|^2).

    in tissue   M is Gaussian around s, with variance sigma^2 = s^H cov s / 2 s^2
    in air      M has a mean and a variance of its own, those of the noncentral chi distribution: exactly for one image
                or equal coils; else of the one with the same mean and variance of M^2, within 2.5 % of std
"""

import json
from pathlib import Path

import h5py
import numpy as np
from scipy.special import gammaln, hyp1f1

import data
import measure
import noise
from lib import files, runtime

COILS = {"m4raw": 4, "fastmri": 8}
LEVEL, LINES = "8/255", "195/256"
UNIT = {"m4raw": 120.0, "fastmri": 4e-4}  # the brightest pixel in numbers of the file
FIRST_STUDY = 2022061001
HEAD = 0.1  # share of the brightest pixel from which on a pixel counts as head
THICKNESS = 0.01  # of a slice, in halves of the field of view


# ---------------------------------------------------------------------------------------------------------------
# what is measured
# ---------------------------------------------------------------------------------------------------------------
def coil_maps(coils, h, w, z=0.0):
    """Sensitivities (coils,h,w), complex, of loops around the field of view; z: height of the slice, -1 to 1.

    They fall off with the distance from the coil and turn their phase along it. The root of the sum of their squares is
    1 in the middle of the slice z = 0, and more at the rim.
    """
    y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")

    def maps(y, x, z):
        out = []
        for k in range(coils):
            angle, height = 2 * np.pi * k / coils + 0.4, 0.35 * (-1) ** k
            dy, dx, dz = y - 1.25 * np.sin(angle), x - 1.25 * np.cos(angle), z - height
            distance = np.sqrt(dy**2 + dx**2 + dz**2)
            out.append((0.6 + distance**2) ** -1.0 * np.exp(1j * (angle + 0.9 * distance + 0.8 * np.arctan2(dy, dx))))
        return np.stack(out)

    centre = maps(np.zeros(1), np.zeros(1), 0.0)
    return maps(y, x, z) / np.sqrt((np.abs(centre) ** 2).sum())


def covariance(coils, seed=0):
    """The noise covariance psi (coils,coils) between the coils, complex Hermitian, with mean 1 on its diagonal.

    Gains differ by about 15 %, and all coils share some noise: correlations of about 0.1 to 0.4.
    """
    rng = runtime.step_rng(seed, 1)
    shared = 0.3 / coils**0.5 * (rng.normal(size=(coils, coils)) + 1j * rng.normal(size=(coils, coils)))
    root = (np.eye(coils) + shared) * np.exp(0.15 * rng.normal(size=(coils, 1)))
    psi = root @ root.conj().T
    return psi * coils / np.trace(psi).real


def image_phase(h, w, z, rng):
    """A smooth phase (h,w) in radians, over about a turn; the same rng for all slices of a scan."""
    y, x = np.meshgrid(np.linspace(-1, 1, h), np.linspace(-1, 1, w), indexing="ij")
    terms = [np.ones_like(y), y, x, z * np.ones_like(y), y * x, y**2, x**2]
    return sum(a * term for a, term in zip(rng.normal(0, 0.9, len(terms)), terms))


def acquired(w, lines, undersampling=1):
    """Which of w k-space lines are measured, (w,) bool: the inner share `lines`; of them, every second or all.

    M4Raw has 30 to 224 of 256. The line of frequency 0, number w // 2, is always among them.
    """
    count = max(1, round(lines * w))
    first = w // 2 - count // 2 - (1 if count < w and count % 2 else 0)
    k = np.arange(w)
    return (k >= max(first, 0)) & (k < max(first, 0) + count) & ((k - w // 2) % undersampling == 0)


def to_kspace(images):
    """Centred, orthonormal Fourier transform of images (...,h,w)."""
    axes = (-2, -1)
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(images, axes), norm="ortho"), axes)


def to_images(kspace):
    """The inverse of `to_kspace`."""
    axes = (-2, -1)
    return np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, axes), norm="ortho"), axes)


def receiver_noise(shape, root, mask, rng):
    """Noise in k-space (coils,h,w) complex64 on the acquired lines; root: Cholesky factor of its covariance."""
    n = rng.standard_normal((2, *shape[:2], int(mask.sum())), dtype=np.float32)
    out = np.zeros(shape, np.complex64)
    out[..., mask] = np.tensordot(root.astype(np.complex64), n[0] + 1j * n[1], 1)
    return out


def shares(through):
    """{slices away: weight} of the independent noises that a slice's noise is made of; the squares sum to 1.

    through: share of the two neighbours, as slices that were interpolated have it; 0: each slice has noise of its own.
    """
    weights = {0: 1.0, -1: through, 1: through} if through else {0: 1.0}
    return {apart: weight / (1 + 2 * through**2) ** 0.5 for apart, weight in weights.items()}


# ---------------------------------------------------------------------------------------------------------------
# reconstruction
# ---------------------------------------------------------------------------------------------------------------
def unfolding(maps, psi, undersampling):
    """SENSE of images whose lines were all acquired, or every second one: (weights, variance, g).

    weights (coils,h,w): the image is the sum of weights * folded coil images, times `undersampling`. variance (h,w): of
    its complex noise, if psi is that of the folded images times `undersampling`. g (h,w): the noise divided by that of
    all lines and by sqrt(undersampling), at least 1.
    """
    coils, h, w = maps.shape
    white = np.linalg.inv(np.linalg.cholesky(psi))
    a = np.tensordot(white, maps, 1).reshape(coils, h, undersampling, w // undersampling)
    a = np.moveaxis(a, 0, -1).swapaxes(1, 2)  # (h,w/r,r,coils): the coil vectors of pixels that fold onto each other
    gram = np.einsum("...ik,...jk->...ij", a.conj(), a)
    inverse = np.linalg.inv(gram)
    weights = np.einsum("...ij,...jk->...ik", inverse, a.conj()) @ white
    own, alone = (np.diagonal(m, axis1=-2, axis2=-1).real for m in (inverse, gram))

    def image(values):  # (h,w/r,r,...) to (h,w,...)
        return values.swapaxes(1, 2).reshape(h, w, *values.shape[3:])

    return np.moveaxis(image(weights), -1, 0), image(own), image(np.sqrt(own * alone))


def reconstruct(kspace, weights, undersampling):
    """The image (h,w) of k-space (coils,h,w): the root-sum-of-squares, or with the weights of `unfolding` |SENSE|."""
    images = to_images(kspace)
    if weights is None:
        return np.sqrt((np.abs(images) ** 2).sum(0))
    return np.abs((weights * images).sum(0) * undersampling)


def chi(s, sigma, n):
    """(mean, standard deviation) of the root of the sum of n squares |s_k + n_k|^2: noncentral chi; n = 1: Rician.

    s: the root of the sum of |s_k|^2; sigma: of the real and of the imaginary part of n_k. Arrays of one shape.
    """
    r = np.asarray(s, np.float64) / sigma
    mean = np.sqrt(2) * np.exp(gammaln(n + 0.5) - gammaln(n)) * hyp1f1(-0.5, n, -np.square(r) / 2)
    return sigma * mean, sigma * np.sqrt(np.maximum(np.square(r) + 2 * n - np.square(mean), 0))


def background(signal, cov, direction=None):
    """The law of the magnitude: {"pred": its mean, "std": its deviation, "sigma": the Gaussian beneath}, (h,w) each.

    signal (h,w): the magnitude without noise. cov: (h,w) the variance of one complex image's noise; or (coils,coils),
    the covariance of many, whose signal points along `direction` (coils,h,w).
    """
    if direction is None:
        sigma = np.sqrt(cov / 2)
        mean, std = chi(signal, sigma, 1.0)
        return dict(pred=mean, std=std, sigma=sigma)
    unit = direction / np.sqrt((np.abs(direction) ** 2).sum(0))
    along = np.einsum("khw,kj,jhw->hw", unit.conj(), cov, unit).real  # of the noise along the signal
    total, square = np.trace(cov).real, (np.abs(cov) ** 2).sum()
    power = np.square(np.asarray(signal, np.float64))
    variance = (2 * power * along + square) / (4 * power + 2 * total)  # mean and variance of M^2 as they are
    mean, std = chi(signal, np.sqrt(variance), total / 2 / variance)
    return dict(pred=mean, std=std, sigma=np.sqrt(along / 2))


def noise_model(level, mask, through, scans):
    """The noise model of scans whose `sigma` is `level` everywhere, or was divided by sigma / level.

    mask (w,): the k-space lines acquired. through: correlation one and two slices away. scans: [(clean, law)] as
    `background` says, in the units of the images; places where `clean` is below a third of sigma are air.
    """
    air = [clean < law["sigma"] / 3 for clean, law in scans]
    mean, std = (
        level * np.concatenate([(law[key] / law["sigma"])[here] for here, (_, law) in zip(air, scans)])
        for key in ("pred", "std")
    )
    air = [float(np.median(mean)), float(np.median(std)) ** 2] if mean.size else None
    lines = np.flatnonzero(mask) - len(mask) // 2
    end = [0.5, min(0.5, np.abs(lines).max() / len(mask))]
    dark = max(3 * level, noise.DARK * air[0] if air else 0)
    return noise.make_noise_model([level**2, 0, 0], correlation(mask), through=through, dark=dark, air=air, band=end)


def correlation(mask):
    """The correlation (13,13) of the noise in tissue, if the k-space lines `mask` (w,) were acquired."""
    w, reach = len(mask), noise.REACH
    frequency, lags = np.flatnonzero(mask) - w // 2, np.arange(-reach, reach + 1)
    table = np.zeros((2 * reach + 1,) * 2)
    table[reach] = np.cos(2 * np.pi * np.outer(lags, frequency) / w).mean(1)
    return table


# ---------------------------------------------------------------------------------------------------------------
# scans
# ---------------------------------------------------------------------------------------------------------------
def scan(x, args, number):
    """Yields, for each slice of the clean images x (S,h,w), a dict: kspace and noisy of each repetition, clean, law.

    number: of the scan, for its phase, level and noise. kspace: [(coils,h,w)]; noisy: [(h,w)]; clean (h,w); law: what
    `background` says; in the units of x.
    """
    count, h, w = x.shape
    undersampling = 2 if args.format == "fastmri" else 1
    mask, psi = acquired(w, args.lines, undersampling), covariance(args.coils, args.seed)
    level = args.level * np.exp(args.spread * runtime.step_rng(args.seed, 2, number).normal())

    def without_noise(s):
        """(kspace, weights of SENSE, clean image, covariance of noise of unit variance, direction) of a slice."""
        z = THICKNESS * (s - (count - 1) / 2)
        maps, phase = coil_maps(args.coils, h, w, z), image_phase(h, w, z, runtime.step_rng(args.seed, 3, number))
        kspace = (to_kspace(maps * x[s] * np.exp(1j * phase)) * mask).astype(np.complex64)
        power = 2 * mask.mean()  # of the noise of a coil image: its real and its imaginary part
        if undersampling == 1:
            return kspace, None, reconstruct(kspace, None, 1), power * psi, maps
        weights, variance, _ = unfolding(maps, psi, undersampling)
        return kspace, weights, reconstruct(kspace, weights, undersampling), power * undersampling**2 * variance, None

    *_, clean, cov, direction = without_noise(count // 2)
    head = clean > HEAD * clean.max()
    unit = level * clean.max() / np.sqrt(np.square(background(clean, cov, direction)["sigma"])[head].mean())
    root = unit * np.linalg.cholesky(psi)
    for s in range(count):
        kspace, weights, clean, cov, direction = without_noise(s)
        measured, images = [], []
        for r in range(args.repetitions):
            n = 0
            for apart, weight in shares(args.through).items():
                rng = runtime.step_rng(args.seed, 4, number, r, s + 1 + apart)
                n += weight * receiver_noise(kspace.shape, root, mask, rng)
            measured.append(kspace + n)
            images.append(reconstruct(measured[-1], weights, undersampling))
        yield dict(kspace=measured, noisy=images, clean=clean, law=background(clean, unit**2 * cov, direction))


def header(shape, mask, names, own):
    """The XML header: sizes, the lines acquired, and the names of the other repetitions."""
    count, _, h, w = shape
    size = f"<ns0:matrixSize><ns0:x>{h}</ns0:x><ns0:y>{w}</ns0:y><ns0:z>1</ns0:z></ns0:matrixSize>"
    spaces = "".join(f"<ns0:{kind}Space>{size}</ns0:{kind}Space>" for kind in ("encoded", "recon"))
    lines = np.flatnonzero(mask)
    limits = f"<ns0:minimum>0</ns0:minimum><ns0:maximum>{lines[-1] - lines[0]}</ns0:maximum>"
    limits += f"<ns0:center>{w // 2 - lines[0]}</ns0:center>"
    limits = f"<ns0:kspace_encoding_step_1>{limits}</ns0:kspace_encoding_step_1>"
    limits += f"<ns0:slice><ns0:minimum>0</ns0:minimum><ns0:maximum>{count - 1}</ns0:maximum></ns0:slice>"
    others = "".join(f"<ns0:MeasurementID>{name}</ns0:MeasurementID>" for name in names if name != own)
    text = f'<?xml version="1.0"?><ns0:ismrmrdHeader xmlns:ns0="http://www.ismrm.org/ISMRMRD"><ns0:encoding>{spaces}'
    text += f"<ns0:encodingLimits>{limits}</ns0:encodingLimits></ns0:encoding><ns0:repetitionInformation>"
    text += f"<ns0:repetitionLabel>{others}</ns0:repetitionLabel></ns0:repetitionInformation></ns0:ismrmrdHeader>"
    return text.encode()


def file_names(args, number):
    """The names of the files of a scan, a repetition each."""
    if args.format == "m4raw":
        return [f"{FIRST_STUDY + number}_{args.contrast}{r + 1:02d}" for r in range(args.repetitions)]
    return [f"file_brain_AX{args.contrast}_{201 + number}_6002{r + 1:03d}" for r in range(args.repetitions)]


def write_scan(x, args, number, folder):
    """Scans x (S,h,w), writes a file for each repetition; returns (name, noisy, clean, law) of the first, (S,h,w)."""
    shape = (len(x), args.coils, *x.shape[1:])
    mask = acquired(shape[-1], args.lines, 2 if args.format == "fastmri" else 1)
    unit, names = UNIT[args.format] / max(float(x.max()), 1e-12), file_names(args, number)
    slices, first, out = scan(x, args, number), [], []
    for name in names:
        file = h5py.File(folder / f"{name}.h5.tmp", "w")
        if args.kspace:
            file.create_dataset("kspace", shape, np.complex64)
        file["ismrmrd_header"] = header(shape, mask, names, name)
        if args.format == "fastmri":
            file["mask"] = mask
        out.append((file, np.empty((len(x), *shape[2:]), np.float32)))
    for s, made in enumerate(slices):
        for (file, images), kspace, noisy in zip(out, made["kspace"], made["noisy"]):
            images[s] = unit * noisy
            if args.kspace:
                file["kspace"][s] = unit * kspace
        first.append([made["clean"], *made["law"].values()])
    for name, (file, images) in zip(names, out):
        file["reconstruction_rss"] = images
        file.attrs.update(acquisition=f"AX{args.contrast}", max=float(images.max()), patient_id=names[0].split("_")[0])
        file.attrs["norm"] = float(np.linalg.norm(images))
        file.close()
        (folder / f"{name}.h5.tmp").rename(folder / f"{name}.h5")
    clean, *law = (unit * np.stack(arrays) for arrays in zip(*first))
    return names[0], out[0][1], clean, dict(zip(made["law"], law))


def read_images(path):
    """{volume: (split, clean images (S,h,w))} of a dataset; the last axis is made even, so that it can be folded.

    Raises ValueError if a middle slice is black: its brightest pixel says what the level means.
    """
    found = {}
    with data.open_file(path) as file:
        for name, group in file["volumes"].items():
            x = np.maximum(group["clean" if "clean" in group else "noisy"][:], 0)
            found[name] = data.split_of(group), x[..., : x.shape[-1] // 2 * 2]
            if not x[len(x) // 2].any():
                raise ValueError(f"{path}: the middle slice of volume {name!r} is black: there is nothing to scan")
    return found


def main(argv=None):
    p = runtime.parser(__doc__)
    p.add_argument("--data", required=True, help="dataset (.h5) of clean images")
    p.add_argument("--out", required=True, help="folder for everything")
    p.add_argument("--format", choices=COILS, default="m4raw", help="see above (default m4raw)")
    p.add_argument("--coils", type=runtime.positive, help="default 4 for m4raw, 8 for fastmri")
    p.add_argument("--contrast", choices=("T1", "T2", "FLAIR"), default="T1", help="in names (default T1)")
    level = "standard deviation of the noise in the head of the middle slice, share of the brightest pixel there"
    p.add_argument("--level", type=runtime.fraction, default=LEVEL, help=f"{level} (default {LEVEL})")
    p.add_argument("--spread", type=float, default=0.0, help="of the level's logarithm between scans (default 0)")
    share = "of the noise of its two neighbours that a slice's noise has in it, as interpolated slices have"
    p.add_argument("--through", type=float, default=0.0, help=f"share {share} (default 0)")
    p.add_argument(
        "--lines", type=runtime.fraction, default=LINES, help=f"share of the lines that is acquired (default {LINES})"
    )
    p.add_argument("--repetitions", type=runtime.positive, default=6, help="of each scan (default 6)")
    p.add_argument("--no-kspace", dest="kspace", action="store_false", help="only images: much smaller files")
    p.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    args = p.parse_args(argv)
    args.coils = args.coils or COILS[args.format]
    for name, low, high in (("level", 1e-6, 1), ("lines", 0.05, 1), ("through", 0, 1), ("spread", 0, 2)):
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"--{name} {getattr(args, name):g} is not between {low:g} and {high:g}")
    if args.format == "fastmri" and args.coils < 2:
        raise ValueError(f"--coils {args.coils}: two pixels that fold onto each other need two coils or more")
    folder, images = Path(args.out), read_images(args.data)
    for split in {split for split, _ in images.values()}:
        (folder / f"multicoil_{split}").mkdir(parents=True, exist_ok=True)
    powers, truth, sigma = [], folder / "TRUTH.h5", folder / "SIGMA.h5"
    with data.write_volumes(truth, "dataset", "scanner", vars(args)) as add_truth:
        scanned = []
        for number, (name, (split, x)) in enumerate(runtime.progress(images.items(), "scanner")):
            title, noisy, clean, law = write_scan(x, args, number, folder / f"multicoil_{split}")
            low, high = files.finite_range(noisy)
            values = ((noisy - low) / (high - low)).astype(np.float32)
            attrs = dict(split=split, scale=high - low, offset=low, source=f"{args.data}: {name}")
            made = add_truth(title, x.shape, ["noisy", "clean"], **attrs, fingerprint=data.fingerprint(values))
            clean = (clean - low) / (high - low)
            made[0][:], made[1][:] = values, clean
            law = {key: ((v - (low if key == "pred" else 0)) / (high - low)).astype("f4") for key, v in law.items()}
            scanned.append((title, clean, law))
            powers.append(np.square(law["sigma"])[clean > HEAD * clean.max()].mean())
    with data.write_volumes(sigma, "prediction", "scanner", vars(args), like=truth) as add:
        for title, _, law in scanned:
            for array, values in zip(add(title, law["std"].shape, list(law)), law.values()):
                array[:] = values
    mask, w = acquired(x.shape[-1], args.lines, 2 if args.format == "fastmri" else 1), shares(args.through)
    through = [w[0] * w.get(1, 0) * 2, w.get(1, 0) ** 2]
    model = noise_model(float(np.mean(powers)) ** 0.5, mask, through, [pair for _, *pair in scanned])
    with runtime.atomic_write(folder / "noise.json") as temporary:
        temporary.write_text(json.dumps(model) + "\n")
    count = len(images) * args.repetitions
    print(f"scanner: {count} files -> {folder}; in the head {measure.summary(model)}", flush=True)


if __name__ == "__main__":
    runtime.command(main)
