"""The figures of the notebooks: one look everywhere.

Images are gray on the range of the clean one, errors red and blue on one signed scale, PSNR / SSIM in the titles.
Every function takes {title: values} and shows one figure.
"""

import matplotlib.pyplot as plt
import numpy as np

import evaluate

plt.rcParams.update(
    {
        "figure.dpi": 80,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "image.cmap": "gray",
        "image.interpolation": "nearest",
    }
)


def panels(images, clean, zoom=None, errors=True, scale=None, width=2.2):
    """Images (H,W) side by side; below, the zoom and the errors against `clean`.

    Args: zoom (top, left, side) in pixels, or None; errors: draw image - clean; scale: end of the errors' colours
    (default: three times the deviation of the first image's error).
    """
    low, high = float(clean.min()), float(clean.max())
    scale = scale or 3 * float(np.std(next(iter(images.values())) - clean)) or 1.0
    rows = ["image"] + ["zoom"] * (zoom is not None) + ["error"] * errors
    height, columns = width * clean.shape[0] / clean.shape[1], len(images)
    heights = [width if row == "zoom" else height for row in rows]
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(columns * width + 0.9 * errors, sum(heights) + 0.5),
        squeeze=False,
        height_ratios=heights,
    )
    for column, (title, image) in zip(axes.T, images.items()):
        score = "" if np.array_equal(image, clean) else "\n{:.2f} dB / {:.3f}".format(*evaluate.psnr_ssim(image, clean))
        column[0].set_title(title + score)
        for row, ax in zip(rows, column):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if row == "error":
                shown = ax.imshow(image - clean, cmap="RdBu_r", vmin=-scale, vmax=scale)
            elif row == "zoom":
                top, left, side = zoom
                ax.imshow(image[top : top + side, left : left + side], vmin=low, vmax=high)
                column[0].add_patch(plt.Rectangle((left, top), side, side, fill=False, edgecolor="tab:orange"))
            else:
                ax.imshow(image, vmin=low, vmax=high)
    for ax, row in zip(axes[:, 0], rows):
        ax.set_ylabel(row)
    if errors:
        figure.colorbar(shown, ax=axes[-1], shrink=0.8, label="output - clean")
    plt.show()


def maps(images, scale, label, extent=None, width=2.0, **axes):
    """Maps (H,W) side by side, red and blue from -scale to scale.

    Args: label: of the colour bar. extent: as of imshow, or None for images without ticks. axes: as for Axes.set.
    """
    figure, row = plt.subplots(1, len(images), figsize=(width * len(images) + 0.9, width + 0.4), squeeze=False)
    for ax, (title, image) in zip(row[0], images.items()):
        shown = ax.imshow(image, cmap="RdBu_r", vmin=-scale, vmax=scale, extent=extent)
        ax.set(title=title, **(axes if extent else dict(xticks=[], yticks=[])))
        ax.label_outer()
    figure.colorbar(shown, ax=row, label=label, shrink=0.8)
    plt.show()


def gradients(fields, holes, least):
    """Shares of the largest |gradient|, on a log scale from 10^least to 1; exactly 0 is white, the hole orange.

    Args: fields: {title: |gradient| (n,n) of the output pixel in the middle with respect to each input pixel}.
    holes: {title: (n,n) bool}.
    """
    figure, row = plt.subplots(1, len(fields), figsize=(2.4 * len(fields), 2.6), sharey=True, squeeze=False)
    for ax, (title, field) in zip(row[0], fields.items()):
        offset = np.arange(len(field)) - len(field) // 2
        share = np.log10(np.where(field == 0, np.nan, field / field.max()))
        box = (offset[0] - 0.5, offset[-1] + 0.5, offset[-1] + 0.5, offset[0] - 0.5)
        shown = ax.imshow(share, "viridis", vmin=least, vmax=0, extent=box)
        ax.contour(offset, offset, holes[title], [0.5], colors="tab:orange")
        ax.set(title=title, xlabel="column, pixels", ylabel="row, pixels")
        ax.label_outer()
    figure.colorbar(shown, ax=row, label="log10 |gradient| / largest", shrink=0.9)
    plt.show()


def curves(x, values, levels=None, **axes):
    """Curves over x, and single numbers {label: level} as dotted lines; axes: as for Axes.set."""
    figure, ax = plt.subplots(figsize=(6.5, 2.8))
    for k, (label, y) in enumerate(values.items()):
        ax.plot(x, y, ("o-", "s--")[k % 2] if len(x) < 20 else "-", label=label)
    for (label, level), color in zip((levels or {}).items(), ("k", "tab:gray", "tab:red")):
        ax.axhline(level, color=color, ls=":", label=label)
    ax.set(**axes)
    ax.minorticks_off()
    figure.legend(loc="outside right center")
    plt.show()


def training(losses, levels, **axes):
    """The losses of all steps, in means of a fiftieth of the training, and those of trivial answers, {name: loss}."""
    parts = np.array_split(losses, min(50, len(losses)))
    middles = np.cumsum([len(part) for part in parts]) - len(parts[0]) / 2
    curves(middles, {"network": [part.mean() for part in parts]}, levels, xlabel="training step", ylabel="loss", **axes)


def bars(groups, xlabel, colors=None):
    """Horizontal bars, a panel for each {title: {name: value}}, which share their names. colors: {name: color}."""
    figure, row = plt.subplots(1, len(groups), figsize=(2.6 * len(groups), 2.9), sharey=True, squeeze=False)
    for ax, (title, values) in zip(row[0], groups.items()):
        ax.barh(list(values), list(values.values()), color=[(colors or {}).get(name, "tab:blue") for name in values])
        ax.axvline(0, color="black", lw=0.8)
        ax.set(title=title, xlabel=xlabel)
    row[0, 0].invert_yaxis()
    plt.show()
