"""Figures 3 and 4 of the paper from what reproduce.py left in its --work folder; reproduce_report.py calls them."""

import io

import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure  # without pyplot, which would take over the figures of whoever imports this
from matplotlib.patches import Rectangle

import data
import diffusion
import evaluate
import srds
from lib import panels, runtime, training


def save(fig, path):
    """Writes a PNG of 256 colours, which takes a third of the bytes. Returns its path."""
    with runtime.atomic_write(path) as temporary, io.BytesIO() as full:
        fig.savefig(full, format="png")
        PIL.Image.open(full).convert("RGB").quantize(256).save(temporary, format="png", optimize=True)
    return path


def middle_slice(folder):
    """(volume, slice number, clean image, window of most detail as (top, left, side)) of the test split of a cell."""
    clean = data.read_volumes(folder / "noisy.h5", "clean", "test")
    name = list(clean)[len(clean) // 2]
    s = clean[name].shape[0] // 2
    x = np.asarray(clean[name][s])
    side = min(96, *(n // 2 for n in x.shape))
    return name, s, x, (*panels.most_detail(x, side), side)


def figure3(out, work, cells, names):
    """Figure 3: for each cell the clean image, and of every method a zoom and the difference from the clean one.

    Args: out, work: Paths. cells: names of cells. names: {method: its name in the tables}. Returns the file's path.
    """
    shown = ["noisy", "nlm", "nei2nei", "lgbpn", "puca", "paper", "ours", "default", "supervised"]
    files = {"puca": "bsn_out.h5", "ours": "recorrupted_out.h5"}
    fig = Figure(figsize=(1.45 * (1 + len(shown)), 3.15 * len(cells)), dpi=80, layout="constrained")
    axes = fig.subplots(2 * len(cells), 1 + len(shown), squeeze=False)
    for row, cell in enumerate(cells):
        name, s, x, (top, left, side) = middle_slice(work / cell)
        y = np.asarray(data.read_volumes(work / cell / "noisy.h5", "noisy", "test")[name][s])
        window = np.s_[top : top + side, left : left + side]
        look, scale = dict(cmap="gray", vmin=float(x.min()), vmax=float(x.max())), 3 * float(np.std(y - x))
        above, below = axes[2 * row], axes[2 * row + 1]
        above[0].imshow(x, **look)
        above[0].add_patch(Rectangle((left, top), side, side, fill=False, edgecolor="tab:orange"))
        above[0].set_title(f"{cell}\nclean", fontsize=7)
        below[0].imshow(x[window], **look)
        for column, method in enumerate(shown, 1):
            image = y
            if method != "noisy":
                pred = work / cell / f"{method}_out.h5"
                pred = pred if pred.exists() else work / cell / files.get(method, pred.name)  # what recipes start from
                image = np.asarray(data.read_volumes(pred, "pred", "test")[name][s])
            above[column].imshow(image[window], **look)
            score = "{:.2f} dB / {:.3f}".format(*evaluate.psnr_ssim(image, x))
            above[column].set_title(f"{names[method].split(',')[0].split(' (')[0]}\n{score}", fontsize=7)
            below[column].imshow((image - x)[window], cmap="RdBu_r", vmin=-scale, vmax=scale)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    return save(fig, out / "figure3.png")


@torch.inference_mode()
def draw_samples(checkpoint_path, condition, draws, steps):
    """[(one sample, the SRDS mean)] of one image (H,W) for each of `draws` starting noises."""
    device = runtime.pick_device()
    network, checkpoint = training.load_network(diffusion.UNet, checkpoint_path, "diffusion", device)
    extra = checkpoint["extra"]
    abar = diffusion.alpha_bar(extra["T"])
    eps_model = diffusion.eps_model(network, abar)
    c = torch.from_numpy(condition)[None, None].to(device)
    found = []
    for k in range(draws):
        eps = runtime.gaussian(runtime.step_rng(0, k), *c.shape).to(device)
        with runtime.autocast(device):
            mean, half = srds.srds(eps_model, diffusion.scaled(c), eps, abar, steps)
        images = (diffusion.to_image(x, c, extra["target"], extra["std"]) for x in (mean + half, mean))
        found.append([image[0, 0].float().cpu().numpy() for image in images])
    return found


def figure4(out, work, cells, names=None, draws=50, steps=25):
    """Figure 4: an image of the last cell from many starting noises: one sample, the mean of two, SRDS, the student."""
    folder = work / cells[-1]
    name, s, x, (top, left, side) = middle_slice(folder)
    window = np.s_[top : top + side, left : left + side]
    files = (data.read_volumes(folder / file, "pred", "test") for file in ("bsn_out.h5", "paper_out.h5"))
    condition, student = (np.asarray(volumes[name][s]) for volumes in files)
    singles, pairs = zip(*draw_samples(folder / "diffusion.pt", condition, draws, steps))
    doubles = [(a + b) / 2 for a, b in zip(singles, [*singles[1:], singles[0]])]

    def psnr(image):
        return evaluate.psnr_ssim(image, x)[0]

    fig = Figure(figsize=(9, 6), dpi=80, layout="constrained")
    above, below = fig.subfigures(2, 1, height_ratios=(1, 1.1))
    shown = {"clean": x, "one sample, $\\epsilon_1$": singles[0], "one sample, $\\epsilon_2$": singles[1],
             "SRDS, $\\pm\\epsilon_1$": pairs[0], "SRDS, $\\pm\\epsilon_2$": pairs[1], "student": student}  # fmt: skip
    for ax, (title, image) in zip(above.subplots(1, len(shown)), shown.items()):
        ax.imshow(image[window], cmap="gray", vmin=float(x.min()), vmax=float(x.max()))
        ax.set(xticks=[], yticks=[])
        ax.set_title(title + ("" if image is x else f"\n{psnr(image):.2f} dB"), fontsize=8)
    ax = below.subplots()
    rows = {"one sample": singles, "mean of two, random noises": doubles, "mean of two, $\\pm\\epsilon$ (SRDS)": pairs}
    for (title, images), marker in zip(rows.items(), "ox^"):
        values = [psnr(image) for image in images]
        label = f"{title}: {np.mean(values):.2f} ± {np.std(values):.2f} dB"
        ax.plot(range(1, draws + 1), values, marker=marker, ms=4, lw=0.8, label=label)
    ax.axhline(psnr(student), color="tab:red", label=f"student: {psnr(student):.2f} dB")
    ax.set(xlabel="draw of the starting noise", ylabel="PSNR, dB")
    ax.spines[["top", "right"]].set_visible(False)
    below.legend(loc="outside lower center", ncols=2, fontsize=8)
    return save(fig, out / "figure4.png")
