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
import runtime
import srds


def save(fig, path):
    """Writes a PNG of 256 colours, a third of the bytes. Returns its path."""
    with runtime.whole(path) as temporary, io.BytesIO() as full:
        fig.savefig(full, format="png")
        PIL.Image.open(full).convert("RGB").quantize(256).save(temporary, format="png", optimize=True)
    return path


def figure3(out, work, cells, names):
    """Figure 3: for each cell the clean image, and of every method a zoom and the difference from the clean one."""
    shown = ["noisy", "nlm", "nei2nei", "lgbpn", "puca", "paper", "ours", "supervised"]
    files = {"paper": "paper_out.h5", "ours": "recorrupted_out.h5"}
    fig = Figure(figsize=(1.45 * (1 + len(shown)), 3.15 * len(cells)), dpi=80, layout="constrained")
    axes = fig.subplots(2 * len(cells), 1 + len(shown), squeeze=False)
    for row, cell in enumerate(cells):
        dataset = str(work / cell / "noisy.h5")
        clean = data.read_volumes(dataset, "clean", "test")
        name = list(clean)[len(clean) // 2]
        s = clean[name].shape[0] // 2
        x = np.asarray(clean[name][s])
        side = min(96, *(n // 2 for n in x.shape))
        top, left = evaluate.most_detail(x, side)
        window = np.s_[top : top + side, left : left + side]
        look = dict(cmap="gray", vmin=float(x.min()), vmax=float(x.max()))
        axes[2 * row, 0].imshow(x, **look)
        axes[2 * row, 0].add_patch(Rectangle((left, top), side, side, fill=False, edgecolor="tab:orange"))
        axes[2 * row, 0].set_title(f"{cell}\nclean", fontsize=7)
        axes[2 * row + 1, 0].imshow(x[window], **look)
        for column, method in enumerate(shown, 1):
            pred = dataset if method == "noisy" else str(work / cell / files.get(method, f"{method}_out.h5"))
            image = np.asarray(data.read_volumes(pred, "noisy" if method == "noisy" else "pred", "test")[name][s])
            if method == "noisy":
                scale = 3 * float(np.std(image - x))
            axes[2 * row, column].imshow(image[window], **look)
            score = "{:.2f} dB / {:.3f}".format(*evaluate.psnr_ssim(image, x))
            axes[2 * row, column].set_title(f"{names[method].split(',')[0].split(' (')[0]}\n{score}", fontsize=7)
            axes[2 * row + 1, column].imshow((image - x)[window], cmap="RdBu_r", vmin=-scale, vmax=scale)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    return save(fig, out / "figure3.png")


@torch.inference_mode()
def figure4(out, work, cells, names=None, draws=50, steps=25):
    """Figure 4: one test image from many starting noises: one sample, the mean of two, SRDS, the student."""
    folder = work / cells[0]
    clean = data.read_volumes(folder / "noisy.h5", "clean", "test")
    name = next(iter(clean))
    s = clean[name].shape[0] // 2
    x = np.asarray(clean[name][s])
    of = lambda file: np.asarray(data.read_volumes(folder / file, "pred", "test")[name][s])  # noqa: E731
    condition, student = of("bsn_out.h5"), of("paper_out.h5")
    where = runtime.device()
    network, state = runtime.restore(diffusion.UNet, folder / "diffusion.pt", "diffusion", where)
    form, abar = state["extra"], diffusion.alpha_bar(state["extra"]["T"])
    model = diffusion.eps_model(network, abar, form["predict"])
    c = torch.from_numpy(condition)[None, None].to(where)
    singles, pairs = [], []
    for k in range(draws):
        eps = runtime.gaussian(runtime.step_rng(0, k), 1, 1, *x.shape).to(where)
        with runtime.autocast(where):
            mean, half = srds.srds(model, diffusion.scaled(c), eps, abar, steps)
        image = lambda z: diffusion.to_image(z, c, form)[0, 0].float().cpu().numpy()  # noqa: E731
        singles.append(image(mean + half))
        pairs.append(image(mean))
    doubles = [(a + b) / 2 for a, b in zip(singles, [*singles[1:], singles[0]])]
    score = lambda images: [evaluate.psnr_ssim(image, x)[0] for image in images]  # noqa: E731
    fig = Figure(figsize=(9, 6), dpi=80, layout="constrained")
    above, below = fig.subfigures(2, 1, height_ratios=(1, 1.1))
    side = min(96, *(n // 2 for n in x.shape))
    top, left = evaluate.most_detail(x, side)
    window = np.s_[top : top + side, left : left + side]
    shown = {"clean": x, "one sample, $\\epsilon_1$": singles[0], "one sample, $\\epsilon_2$": singles[1],
             "SRDS, $\\pm\\epsilon_1$": pairs[0], "SRDS, $\\pm\\epsilon_2$": pairs[1], "student": student}  # fmt: skip
    for ax, (title, image) in zip(above.subplots(1, len(shown)), shown.items()):
        ax.imshow(image[window], cmap="gray", vmin=float(x.min()), vmax=float(x.max()))
        ax.set(xticks=[], yticks=[])
        ax.set_title(title + ("" if image is x else f"\n{score([image])[0]:.2f} dB"), fontsize=8)
    ax = below.subplots()
    rows = {"one sample": singles, "mean of two, random noises": doubles, "mean of two, $\\pm\\epsilon$ (SRDS)": pairs}
    for (title, images), marker in zip(rows.items(), "ox^"):
        values = score(images)
        label = f"{title}: {np.mean(values):.2f} ± {np.std(values):.2f} dB"
        ax.plot(range(1, draws + 1), values, marker=marker, ms=4, lw=0.8, label=label)
    value = score([student])[0]
    ax.axhline(value, color="tab:red", label=f"student: {value:.2f} dB")
    ax.set(xlabel="draw of the starting noise", ylabel="PSNR, dB")
    ax.spines[["top", "right"]].set_visible(False)
    below.legend(loc="outside lower center", ncols=2, fontsize=8)
    return save(fig, out / "figure4.png")
