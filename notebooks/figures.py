"""The figures of the notebooks: one look everywhere.

Images are gray on the range of the clean one, errors red and blue on one signed scale, PSNR / SSIM in the titles.
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
    """Shows {title: image (H,W)} side by side; below, the zoom and the errors against `clean`.

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
