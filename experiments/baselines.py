"""Rivals: denoisers to compare with, on the same files as the stages.

    In    knee.h5         volumes/<name>/noisy  (S,H,W) float32, about [0,1]
    Out   nlm_out.h5      volumes/<name>/pred   (S,H,W) float32; METHOD_out.h5 for each --method
          nei2nei.pt      checkpoint of one that trains: EMA weights and model arguments

    python -m experiments.baselines --data knee.h5 --sigma 6/255        # non-local means, noise level known
    python -m experiments.baselines --data knee.h5                      # level estimated, slice by slice
    python -m experiments.baselines --data knee.h5 --noise measured     # level measured as by measure.py
    python -m experiments.baselines --data knee.h5 --method tv          # strength chosen without clean images
    python -m experiments.baselines --data knee.h5 --method nei2nei     # trains nei2nei.pt, then predicts

Without training, by scikit-image:

    nlm            non-local means (Buades et al. 2005), fast mode, patch 5, distance 6, h = 0.8 sigma as its
                   documentation advises. An unknown level is estimated from wavelets, which takes the noise to be white
    nlm-calibrated, tv, wavelet    non-local means, total variation (Chambolle 2004), wavelet shrinkage (BayesShrink),
                   each with the strength that `calibrate_denoiser` finds for the slice by J-invariance

Trained on the noisy images alone, as their authors mean them:

    noise2self     Batson & Royer 2019: the pixels of a grid are replaced by the mean of their neighbours, and the
                   network learns to predict them; denoising takes one pass for each grid, so that no pixel is seen
    nei2nei        Neighbor2Neighbor (Huang et al. 2021): of two neighbouring pixels in each 2x2 cell one predicts the
                   other, and denoising the subsampled image is held close to subsampling the denoised one

One thing differs from the published code: the noise of each image is made once and kept. Neighbor2Neighbor's code adds
fresh noise to clean images at every step, which no scanner can. `--preset paper` has the published settings, and
Neighbor2Neighbor's U-Net for both methods; `fast` has the student's network (distill.py), so that ways of training are
compared and not networks.
"""

# ---------------------------------------------------------------------------------------------------------------
# core: needs torch alone; paste it anywhere
# ---------------------------------------------------------------------------------------------------------------
import torch
import torch.nn as nn
import torch.nn.functional as F


class N2NUNet(nn.Module):
    """The U-Net of Noise2Noise (Lehtinen et al. 2018) as Neighbor2Neighbor has it: 5 poolings, LeakyReLU 0.2.

    Maps (B,C,H,W) to (B,C,H,W), any H and W. width: features everywhere on the way down, twice as many on the way up.
    """

    LEVELS = 5

    def __init__(self, channels=1, width=48):
        super().__init__()

        def conv(c_in, c_out):
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.LeakyReLU(0.2))

        self.intro = conv(channels, width)
        self.downs = nn.ModuleList(conv(width, width) for _ in range(self.LEVELS))
        self.middle = conv(width, width)
        sources = [2 * width, *[3 * width] * (self.LEVELS - 2), 2 * width + channels]
        self.ups = nn.ModuleList(nn.Sequential(conv(n, 2 * width), conv(2 * width, 2 * width)) for n in sources)
        self.tail = nn.Sequential(
            *(nn.Conv2d(2 * width, 2 * width, 1), nn.LeakyReLU(0.2)),
            *(nn.Conv2d(2 * width, 2 * width, 1), nn.LeakyReLU(0.2)),
            nn.Conv2d(2 * width, channels, 1),
        )

    def forward(self, y):
        h, w = y.shape[-2:]
        unit = 2**self.LEVELS
        x = F.pad(y, (0, -w % unit, 0, -h % unit), mode="replicate")
        skips, x = [x], self.intro(x)
        for down in self.downs:
            x = F.max_pool2d(down(x), 2)
            skips.append(x)
        x = self.middle(skips.pop())
        for up in self.ups:
            x = up(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
        return self.tail(x)[..., :h, :w]


def masked(y, period, k):
    """(y with every pixel of the k-th grid replaced by its neighbours' mean, the grid (H,W) as 0 and 1). y (B,C,H,W).

    The grid has one pixel in each period x period, k from 0 to period^2 - 1; of the eight neighbours, those across
    corners count half (Noise2Self's "interpolate"). Beyond a border the image is mirrored.
    """
    kernel = torch.tensor([[0.5, 1, 0.5], [1, 0, 1], [0.5, 1, 0.5]], dtype=y.dtype, device=y.device) / 6
    mean = F.conv2d(F.pad(y, 4 * (1,), mode="reflect").flatten(0, 1)[:, None], kernel[None, None]).view_as(y)
    grid = torch.zeros(y.shape[-2:], dtype=y.dtype, device=y.device)
    grid[k // period :: period, k % period :: period] = 1
    return torch.where(grid > 0, mean, y), grid


def noise2self_loss(network, y, period, k):
    """Mean square error, in tenths of the range, on the pixels of the k-th grid, which the network does not see."""
    seen, grid = masked(y, period, k)
    return ((10 * (network(seen).float() - y)).square() * grid).sum() / (grid.sum() * y.shape[0] * y.shape[1])


def noise2self(network, y, period):
    """The J-invariant prediction: each pixel from the pass in which its grid was hidden. (B,C,H,W) to (B,C,H,W)."""
    out = torch.zeros_like(y)
    for k in range(period**2):
        seen, grid = masked(y, period, k)
        out += network(seen).float() * grid
    return out


def neighbors(h, w, generator):
    """Two random subsamplings of (H,W): flat indices (h/2, w/2) of two neighbouring pixels of each 2x2 cell.

    generator: numpy Generator. The 8 ordered pairs of pixels with a common side are equally likely.
    """
    pairs = torch.tensor([(0, 1), (0, w), (1, 0), (1, w + 1), (w, 0), (w, w + 1), (w + 1, 1), (w + 1, w)])
    corner = torch.arange(0, h - h % 2, 2)[:, None] * w + torch.arange(0, w - w % 2, 2)
    chosen = pairs[torch.from_numpy(generator.integers(8, size=tuple(corner.shape)))]
    return corner + chosen[..., 0], corner + chosen[..., 1]


def neighbor2neighbor_loss(network, y, first, second, weight):
    """Neighbor2Neighbor's loss (Huang et al. 2021, Eq. 10), in tenths of the range: fidelity + weight * regularizer.

    Args: y (B,C,H,W); first, second: what `neighbors` returns; weight: their gamma, which grows during the training.
    """

    def subsample(x, index):
        return x.flatten(2)[..., index]

    with torch.no_grad():
        denoised = network(y).float()
    difference = 10 * (network(subsample(y, first)).float() - subsample(y, second))
    expected = 10 * (subsample(denoised, first) - subsample(denoised, second))
    return difference.square().mean() + weight * (difference - expected).square().mean()


# ---------------------------------------------------------------------------------------------------------------
# without training
# ---------------------------------------------------------------------------------------------------------------
import warnings
from functools import partial

import numpy as np
from skimage import restoration

import data
import distill
import measure
import noise
from lib import runtime, training

CLASSICAL = ("nlm", "nlm-calibrated", "tv", "wavelet")


def non_local_means(y, sigma=None):
    """Denoises one slice y (H,W), about [0,1]; sigma is the noise's standard deviation, None to estimate it."""
    sigma = float(restoration.estimate_sigma(y)) if sigma is None else sigma
    return restoration.denoise_nl_means(y, patch_size=5, patch_distance=6, h=0.8 * sigma, sigma=sigma, fast_mode=True)


def calibrated(method, y):
    """Denoises one slice y (H,W) by nlm-calibrated, tv or wavelet; the strength is that of the least J-invariant loss.

    The strengths tried are half octaves around what suits white noise of the estimated level. Only the choice is
    J-invariant. The denoiser that is then used sees every pixel: for tv on the built-in brain, 39.4 dB against 32.6 dB.
    """
    sigma = max(float(restoration.estimate_sigma(y)), 1e-4)
    strengths = sigma * 2 ** np.arange(-1.5, 2.01, 0.5)
    nlm = partial(restoration.denoise_nl_means, patch_size=5, patch_distance=6, sigma=sigma, fast_mode=True)
    denoise, parameters = {
        "nlm-calibrated": (nlm, {"h": strengths}),
        "tv": (restoration.denoise_tv_chambolle, {"weight": 2 * strengths}),
        "wavelet": (restoration.denoise_wavelet, {"sigma": strengths, "wavelet": ["db2"], "rescale_sigma": [True]}),
    }[method]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the levels of the wavelet decomposition
        _, (tried, losses) = restoration.calibrate_denoiser(y, denoise, parameters, stride=4, extra_output=True)
        return denoise(y, **tried[int(np.argmin(losses))])


# ---------------------------------------------------------------------------------------------------------------
# train and predict
# ---------------------------------------------------------------------------------------------------------------
PRESET_NAMES = ("fast", "paper")
NOISE2SELF_SETTINGS = {  # what it sets, its value in fast: distill.py's, in paper: Neighbor2Neighbor's network for both
    "arch": ("network", "resunet", "n2n"),
    "width": ("features at the first level", 32, 48),
    "enc_blocks": ("blocks at each level on the way down, but for n2n", [2, 2], []),
    "middle_blocks": ("blocks at the lowest level, but for n2n", 2, 0),
    "dec_blocks": ("blocks at each level on the way up, lowest first, but for n2n", [2, 2], []),
    "steps": ("optimizer steps", 5000, 10_000),  # paper: one epoch, here of 40,000 images
    "batch": ("crops per step, over all processes together", 2, 4),  # paper: left open by Noise2Self
    "crop": ("side of the square training crops, pixels", 96, 256),
    "lr": ("peak learning rate", 2e-3, 5e-4),
    "schedule": ("of the learning rate", "cosine", "constant"),
    "beta2": ("AdamW's second decay", 0.99, 0.999),
    "clip": ("largest gradient norm", 0.3, float("inf")),
    "ema": ("decay per step of the averaged weights", 0.995, 0.0),
    "period": ("noise2self: pixels from one of a grid to the next", 4, 4),
}
NEI2NEI_SETTINGS = {  # the same for Neighbor2Neighbor
    **{k: v for k, v in NOISE2SELF_SETTINGS.items() if k != "period"},
    "steps": ("optimizer steps of nei2nei; noise2self in paper: 10000", 5000, 1_000_000),  # 100 epochs of 40,000
    "crop": ("side of the crops of nei2nei; noise2self in fast: 96", 128, 256),  # fast: subsampled to 64
    "lr": ("peak learning rate of nei2nei; noise2self in paper: 0.0005", 2e-3, 3e-4),
    "schedule": ("of nei2nei's learning rate; noise2self in paper: constant", "cosine", "halved"),
    "increase": ("nei2nei: the regularizer's weight at the end of the training", 2.0, 2.0),
}
PRESETS = {
    "noise2self": training.presets(PRESET_NAMES, NOISE2SELF_SETTINGS),
    "nei2nei": training.presets(PRESET_NAMES, NEI2NEI_SETTINGS),
}
SHAPE = ("arch", "width", "enc_blocks", "middle_blocks", "dec_blocks")
NETWORKS = (*distill.NETWORKS, "n2n")


def halved(step, steps):
    """Halves the learning rate after 20, 40, 60 and 80 % of the steps."""
    return 0.5 ** min(4, 5 * step // steps)


SCHEDULES = {"cosine": training.warmup_cosine, "halved": halved, "constant": lambda step, steps: 1.0}


def build_network(arch, width, **shape):
    """The network that the `model_args` of a checkpoint describe."""
    return N2NUNet(width=width) if arch == "n2n" else distill.build_network(arch, width=width, **shape)


def train(args, checkpoint=None):
    """Trains noise2self or nei2nei on the noisy images of the train split; writes args.model."""
    noisy = data.read_volumes(args.data, "noisy", "train")
    data.check_crop(noisy, args.crop)
    torch.manual_seed(args.seed)
    model_args = checkpoint["model_args"] if checkpoint else {k: getattr(args, k) for k in SHAPE}
    extra = checkpoint["extra"] if checkpoint else dict(crop=args.crop, period=args.period)
    saved = dict(model_args=model_args, extra=extra, inputs=dict(data=data.fingerprints(args.data)))
    network, schedule = build_network(**model_args), SCHEDULES[args.schedule]
    run = training.Training(args.method, args, checkpoint, network, **saved, schedule=schedule)
    for step in run.steps():
        rng = run.rng(step)
        (y,) = run.to_device(*data.random_crops([noisy], args.batch, args.crop, rng, run.rank, run.world))
        with run.autocast():
            if args.method == "noise2self":
                loss = noise2self_loss(run.net, y, args.period, int(rng.integers(args.period**2)))
            else:
                first, second = (index.to(run.device) for index in neighbors(*y.shape[-2:], rng))
                loss = neighbor2neighbor_loss(run.net, y, first, second, args.increase * step / args.steps)
        run.update(loss)


def trained_denoiser(args):
    """What args.model has learned: callable, (B,1,H,W) noisy to denoised, on the CPU."""
    device = runtime.pick_device(args.device)
    network, checkpoint = training.load_network(build_network, args.model, args.method, device)
    period = checkpoint["extra"]["period"]

    def forward(y):
        with runtime.autocast(device, args.precision):
            return network(y.to(device, memory_format=torch.channels_last)).float().cpu()

    denoise_tile = partial(noise2self, forward, period=period) if period else forward
    return lambda y: data.tiled(denoise_tile, y, 1024, 256)


def classical_denoiser(args):
    """A method that needs no training: callable, (B,1,H,W) noisy to denoised."""
    noise_model = measure.load_noise_model(args.noise, args.data) if args.noise else None

    def denoise_slice(y):
        if args.method != "nlm":
            return calibrated(args.method, y)
        return non_local_means(y, noise.variance(noise_model, y).mean() ** 0.5 if noise_model else args.sigma)

    return lambda y: torch.from_numpy(np.stack([[denoise_slice(image)] for image in y[:, 0].numpy()]))


@torch.inference_mode()
def predict(args, noisy):
    """Denoises volumes {name: (S,H,W)} of args.data and writes args.out."""
    denoise = classical_denoiser(args) if args.method in CLASSICAL else trained_denoiser(args)
    data.write_predictions(args, args.method, args.data, noisy, lambda y, *_: denoise(y))


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
def main(argv=None):
    choices = dict(arch=NETWORKS, schedule=SCHEDULES)
    flags = {**NOISE2SELF_SETTINGS, **NEI2NEI_SETTINGS}
    p = training.training_parser(__doc__, PRESET_NAMES, flags, choices, "METHOD.pt")
    p.add_argument("--data", required=True, help="dataset (.h5)")
    p.add_argument("--method", choices=(*CLASSICAL, *PRESETS), default="nlm", help="see above (default nlm)")
    p.add_argument("--sigma", type=runtime.fraction, help="nlm: standard deviation of the noise (default: estimated)")
    p.add_argument("--noise", help="nlm: sigma of each slice from a noise model, named as for posterior.py")
    training.prediction_flags(p, "METHOD_out.h5")
    args = p.parse_args(argv)
    args.out, args.model = (name.replace("METHOD", args.method) for name in (args.out, args.model))
    if args.method != "nlm" and (args.sigma or args.noise):
        raise ValueError(f"--sigma and --noise are for --method nlm; {args.method} does without")
    noisy = data.read_volumes(args.data, "noisy", args.split, data.TO_PREDICT)  # or refused, before it trains
    if args.method in CLASSICAL:
        runtime.check_outputs([args.data, args.noise], [args.out])
        return predict(args, noisy)
    if args.period == 1:
        raise ValueError("--period 1 hides every pixel at once: 2 is the least")
    training.check_outputs(args, [args.data])
    if not args.predict:
        train(args, training.resolve_args(args, PRESETS[args.method], args.method))
    predict(args, noisy)


if __name__ == "__main__":
    runtime.command(main)
