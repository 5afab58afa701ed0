"""The pictures of lib/report.py: a view (report.view) as planes on a grey and a signed scale, and plots of its noise.

matplotlib and pillow are imported where they are used: a stage that makes no picture does not load them.
"""

import base64
import io
import re
import textwrap

import numpy as np

from lib import crops, residual

DEEP = 8  # slices from which on a volume is shown in three planes
EXPECTED, FOUND = "#3d85c6", "#d97a1f"  # lines of the plots: readable on white and on black
PLANES = {"S": "axial", "I": "axial", "A": "coronal", "P": "coronal", "L": "sagittal", "R": "sagittal"}


def unit(one, array):
    """Numbers of a view's arrays as float32 in [0,1]; what is not finite is 0."""
    values = np.asarray(array, np.float64)
    values = values if one["mapped"] else (values - one["offset"]) / one["scale"]
    return np.nan_to_num(values.astype(np.float32), nan=0, posinf=1, neginf=0)


def gain(one, tools, s):
    """How much stronger than by its law the noise of slice s of a view is, (H,W) or (1,1); found if it may differ."""
    if one["gains"] is None and tools["gains"]:
        one["gains"] = tools["gains"](unit(one, one["y"]))
    return np.ones((1, 1), np.float32) if one["gains"] is None else crops.enlarge(one["gains"][s], one["y"].shape[1:])


def even(one, tools, s, image):
    """The middle of slice s (H,W) in [0,1], divided by `gain`, so that its noise is that of the law."""
    return centre(unit(one, image) / gain(one, tools, s)).astype(np.float32)


def some_slices(count, most):
    """Numbers of at most `most` slices, evenly spaced in the middle two thirds."""
    return np.unique(np.linspace(count / 6, max(count - 1 - count / 6, count / 6), most).round().astype(int))


def centre(image, side=512):
    """The middle of the last two axes, at most `side` pixels each."""
    top, left = ((max(n - side, 0)) // 2 for n in image.shape[-2:])
    return image[..., top : top + side, left : left + side]


def planes(one):
    """[(caption, index into (S,H,W), (letters of rows, columns), (mm of rows, columns))]: what is shown of a view."""
    shape, axes = one["y"].shape, one["axes"] or "???"
    spacing = one["spacing"] or (1.0, 1.0, 1.0)
    out = []
    for axis in range(3 if shape[0] >= DEEP else 1):
        middle = shape[axis] // 2
        rest = [a for a in range(3) if a != axis]
        name = PLANES.get(
            axes[axis], ("slices as stored", "across the slices, rows", "across the slices, columns")[axis]
        )
        caption = f"{name}, {middle + 1} of {shape[axis]}" if shape[axis] > 1 else "image"
        index = tuple(middle if a == axis else slice(None) for a in range(3))
        out.append((caption, index, tuple(axes[a] for a in rest), tuple(spacing[a] for a in rest)))
    return out


def upright(image, letters, spacing):
    """(image, spacing) turned as radiologists look at it: head or front up, the patient's right on the left."""
    order = ["SI", "AP", "RL"]
    height = [next((k for k, pair in enumerate(order) if letter in pair), 3) for letter in letters]
    if 3 in height:
        return image, spacing
    if height[0] > height[1]:
        image, letters, spacing = image.T, letters[::-1], spacing[::-1]
    image = image[::-1] if letters[0] in "SA" else image
    return (image[:, ::-1] if letters[1] in "RA" else image), spacing


def fitted(image, spacing, side):
    """The float image at the size at which it is shown: square pixels, the longer side `side` pixels or fewer."""
    from PIL import Image

    least = min(spacing)
    size = [n * mm / least for n, mm in zip(image.shape, spacing)]
    factor = min(1.0, side / max(size))
    h, w = (max(1, round(n * factor)) for n in size)
    if (h, w) == image.shape:
        return image
    how = Image.Resampling.BOX if h * w < image.size else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(np.ascontiguousarray(image, np.float32)).resize((w, h), how))


def encoded(pixels, quality):
    """WebP of uint8 pixels (h,w) or (h,w,3)."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "webp", quality=quality, method=4)
    return buffer.getvalue()


def uri(raw):
    return "data:image/webp;base64," + base64.b64encode(raw).decode()


def size(image):
    """{"width", "height", "enlarged"}, in pixels of the screen: a small image is enlarged by a whole number."""
    factor = max(1, 240 // max(image.shape))
    return dict(width=factor * image.shape[1], height=factor * image.shape[0], enlarged=factor > 1)


def colours(values, limit):
    """Signed values as uint8 RGB: blue below 0, white at 0, red above."""
    from matplotlib import colormaps

    return (255 * colormaps["RdBu_r"](np.clip(values / limit / 2 + 0.5, 0, 1))[..., :3]).round().astype(np.uint8)


def most_detail(x, side):
    """(top, left) of the side x side window of the image x (H,W) that holds the most gradient once it is smoothed."""
    from scipy.ndimage import uniform_filter

    side = min(side, *x.shape)
    sums = np.pad(np.abs(np.gradient(uniform_filter(x, 5))).sum(0), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    window = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    return np.unravel_index(window.argmax(), window.shape)


def pictures(one, deviation, share):
    """What is shown of a view: dict of `planes`, `window` and the ends of the signed scale, all in the file's numbers.

    deviation: of the noise in [0,1], or None: then of what was removed. share: bytes for the pictures.
    """
    side = int(np.clip((share / 9 / 0.4) ** 0.5, 96, 384))
    shown, at = [], planes(one)
    for caption, index, letters, spacing in at:
        pair = [unit(one, one[key][index]) for key in "yx"]
        (y, mm), (x, _) = (upright(image, letters, spacing) for image in pair)
        small = [fitted(image, mm, side) for image in (y, x)]
        scale = max(small[0].shape) / max(n * s / min(mm) for n, s in zip(y.shape, mm))
        shown.append((f"{caption}{f' (at {100 * scale:.0f} % of its size)' if scale < 0.99 else ''}", *small))
        if len(at) == 1 and scale < 0.7:
            top, left = most_detail(x, side)
            window = [image[top : top + side, left : left + side] for image in (y, x)]
            shown.append(("detail at full size, where the image varies most", *window))
    low, high = np.percentile(np.concatenate([x.ravel() for _, _, x in shown]), (0.5, 99.7))
    high = high if high > low else low + 1e-6
    removed = np.concatenate([(y - x).ravel() for _, y, x in shown])
    limit = 4 * (deviation or float(removed.std()) or 1e-6)
    sign = np.sign(one["scale"])  # in MONOCHROME1 the higher number is darker

    def grey(image):
        return (255 * np.clip((image - low) / (high - low), 0, 1)).round().astype(np.uint8)

    for quality in (85, 70, 55, 40, 25, 10):
        sets = [
            [encoded(pixels, quality) for pixels in (grey(y), grey(x), colours(sign * (y - x), limit))]
            for _, y, x in shown
        ]
        if sum(len(raw) for three in sets for raw in three) <= share:
            break
    made = [
        dict(caption=caption, noisy=uri(a), denoised=uri(b), removed=uri(c), **size(y))
        for (caption, y, _), (a, b, c) in zip(shown, sets)
    ]
    ends = sorted(end * one["scale"] + one["offset"] for end in (low, high))
    return dict(planes=made, window=[f"{end:.4g}" for end in ends], limit=f"{limit * abs(one['scale']):.3g}")


def svg(figure):
    """A matplotlib figure as SVG to stand within a page, with the page's own colour of text."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"|\n *', " ", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 sans-serif", text)
    return re.sub(r"#(000000|262626|808080)", "currentColor", text)


def plot(panels, width=6.4, height=2.3):
    """SVG of panels side by side; a panel: dict of title, x, y (labels), and lines [(x, y, colour, label)],
    table (of correlations) or map."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=72, layout="none")
    bottom, top = 0.55 / height, 1 - 0.3 / height  # a fixed layout: finding one takes as long as all the rest
    figure.subplots_adjust(0.09, bottom, 0.98, top, wspace=0.28)
    for ax, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels):
        ax.set_title(panel["title"], fontsize=9)
        ax.tick_params(labelsize=8)
        if "table" in panel:
            reach = len(panel["table"]) // 2
            ends = (-reach - 0.5, reach + 0.5)
            shown = ax.imshow(panel["table"], cmap="RdBu_r", vmin=-1, vmax=1, extent=(*ends, *ends[::-1]))
            figure.colorbar(shown, ax=ax).ax.tick_params(labelsize=8)
        if "map" in panel:
            figure.colorbar(ax.imshow(panel["map"], cmap="viridis"), ax=ax).ax.tick_params(labelsize=8)
            ax.set(xticks=[], yticks=[])
        for x, y, colour, label in panel.get("lines", ()):
            ax.plot(x, y, color=colour, label=label, linewidth=1.6)
        if "lines" in panel:
            ax.set_ylim(0)
            ax.spines[["top", "right"]].set_visible(False)
            if len(panel["lines"]) > 1:
                ax.legend(fontsize=8, frameon=False)
        ax.set_xlabel(panel["x"], fontsize=8)
        ax.set_ylabel(panel["y"], fontsize=8)
    return svg(figure)


def residual_plot(one, tools):
    """SVG: histogram and spectrum of what was removed from three slices, beside those of the noise; None if neither."""
    counts, curves = np.zeros(len(residual.EDGES) - 1), []
    for s in some_slices(one["y"].shape[0], 3):
        r, noisy = tools["residual"](*(even(one, tools, s, one[key][s]) for key in "yx"))
        counts += np.histogram(np.clip(r[noisy], -4.99, 4.99), residual.EDGES)[0]
        curves.append(tools["spectra"](r, noisy))
    curves = [c for c in curves if len(c[0])]
    if not counts.sum() or not curves:
        return None
    at, step = (residual.EDGES[1:] + residual.EDGES[:-1]) / 2, residual.EDGES[1] - residual.EDGES[0]
    normal = np.exp(-np.square(at) / 2) / np.sqrt(2 * np.pi)
    power, expected = (np.mean([c[k] for c in curves], 0) for k in (1, 2))
    histogram = dict(title="how often", x="removed, in standard deviations of the noise", y="share per unit")
    histogram["lines"] = [(at, normal, EXPECTED, "noise"), (at, counts / counts.sum() / step, FOUND, "removed")]
    rings = dict(title="by size of detail (coarse to fine)", x="cycles per pixel", y="power")
    rings["lines"] = [(curves[0][0], expected, EXPECTED, "noise"), (curves[0][0], power, FOUND, "removed")]
    shown = [histogram, rings]
    if one["gains"] is not None:
        shown.append(dict(title="where noise is stronger", x="", y="", map=one["gains"][len(one["gains"]) // 2]))
    return plot(shown, width=3.2 * len(shown))


def law_plot(tools):
    """SVG: the deviation of the noise at each intensity, and its correlation with the pixels around."""
    x = np.linspace(0, 1, 60)
    level = dict(
        title="standard deviation of the noise", x="intensity (0 and 1: ends of a volume)", y="share of the range"
    )
    level["lines"] = [(x, tools["deviation"](x), FOUND, "law")]
    beside = dict(title="correlation with the pixels around", x="pixels", y="pixels", table=tools["correlation"])
    return plot([level, beside], height=2.6)


def side_by_side(images, scores, title):
    """Figure of {name: image (H,W)}, "clean" and "noisy" first: whole, a zoom, the error on one signed scale below.

    scores: {name: words} for the titles.
    """
    from matplotlib.figure import Figure  # without pyplot: in a notebook that would turn off its figures
    from matplotlib.patches import Rectangle

    x = images["clean"]
    low, high, scale = float(x.min()), float(x.max()), 3 * float(np.std(images["noisy"] - x))
    side = min(64, *(n // 2 for n in x.shape))
    top, left = most_detail(x, side)
    fig = Figure(figsize=(2.3 * len(images), 8), dpi=80, layout="constrained")
    axes = fig.subplots(3, len(images), squeeze=False)
    for column, (name, image) in zip(axes.T, images.items()):
        column[0].imshow(image, cmap="gray", vmin=low, vmax=high)
        column[0].add_patch(Rectangle((left, top), side, side, fill=False, edgecolor="tab:orange"))
        column[0].set_title(textwrap.fill(name, 26) + scores.get(name, ""), fontsize=8)
        column[1].imshow(image[top : top + side, left : left + side], cmap="gray", vmin=low, vmax=high)
        shown = column[2].imshow(image - x, cmap="RdBu_r", vmin=-scale, vmax=scale)
        for ax in column:
            ax.set(xticks=[], yticks=[])
    for ax, label in zip(axes[:, 0], ("image", "zoom", "error")):
        ax.set_ylabel(label)
    fig.colorbar(shown, ax=axes, location="bottom", shrink=0.3, aspect=40, pad=0.01, label="error: output - clean")
    fig.suptitle(title, fontsize=9)
    return fig
