"""Rivals: denoisers to compare with, on the same file contract.

    In    knee.h5         volumes/<name>/noisy  (S,H,W) float32, about [0,1]
    Out   nlm_out.h5      volumes/<name>/pred   (S,H,W) float32; so for every --method
          nei2nei.pt      checkpoint of a trained one: weights, EMA, optimizer, step, model arguments

    python baselines.py --data knee.h5 --sigma 6/255 --out nlm_out.h5          # non-local means, noise level known
    python baselines.py --data knee.h5 --out nlm_out.h5                        # level estimated, slice by slice
    python baselines.py --data knee.h5 --noise measured --out nlm_out.h5       # level measured by noise.py
    python baselines.py --data knee.h5 --method tv --out tv_out.h5             # strength chosen without clean images
    python baselines.py --data knee.h5 --method nei2nei --out nei2nei_out.h5   # trains nei2nei.pt, then predicts

Without training, scikit-image's:

    nlm            non-local means (Buades et al. 2005), fast mode, patch 5, distance 6, h = 0.8 sigma as its
                   documentation advises. An unknown level is its wavelet estimate, which takes the noise to be white
    nlm-calibrated, tv, wavelet    non-local means, total variation (Chambolle 2004), wavelet shrinkage (BayesShrink),
                   each of the strength that `calibrate_denoiser` finds for the slice by J-invariance

Trained on the noisy images alone, as their authors mean them:

    noise2self     Batson & Royer 2019: the pixels of a grid are replaced by the mean of their neighbours, and the
                   network learns to predict them; denoising takes a pass for each grid, so that no pixel is seen
    nei2nei        Neighbor2Neighbor (Huang et al. 2021): of two neighbouring pixels in each 2x2 cell one predicts the
                   other, and denoising the subsampled image is held close to subsampling the denoised one

Departure: the noise of each image is made once and kept (Neighbor2Neighbor's code adds fresh noise to clean images at
every step, which no scanner can). `--preset paper` has the published settings, and Neighbor2Neighbor's U-Net
for both; `fast` has the student's network (distill.py), so that ways of training are compared and not networks.
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
        conv = lambda c_in, c_out: nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.LeakyReLU(0.2))  # noqa: E731
        self.intro = conv(channels, width)
        self.downs = nn.ModuleList(conv(width, width) for _ in range(self.LEVELS))
        self.middle = conv(width, width)
        sources = [2 * width, *[3 * width] * (self.LEVELS - 2), 2 * width + channels]
        up = lambda c_in: nn.Sequential(conv(c_in, 2 * width), conv(2 * width, 2 * width))  # noqa: E731
        self.ups = nn.ModuleList(up(c_in) for c_in in sources)
        self.tail = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 1),
            nn.LeakyReLU(0.2),
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

    Args: y (B,C,H,W); first, second: of `neighbors`; weight: their gamma, which grows during the training.
    """
    sub = lambda x, index: x.flatten(2)[..., index]  # noqa: E731
    with torch.no_grad():
        whole = network(y).float()
    difference = 10 * (network(sub(y, first)).float() - sub(y, second))
    expected = 10 * (sub(whole, first) - sub(whole, second))
    return difference.square().mean() + weight * (difference - expected).square().mean()


# ---------------------------------------------------------------------------------------------------------------
# without training
# ---------------------------------------------------------------------------------------------------------------
import warnings

import numpy as np
from skimage.restoration import (
    calibrate_denoiser,
    denoise_nl_means,
    denoise_tv_chambolle,
    denoise_wavelet,
    estimate_sigma,
)
from torch.optim.swa_utils import AveragedModel

import data
import distill
import noise
import runtime


def non_local_means(y, sigma=None):
    """Denoises one slice y (H,W), about [0,1]; sigma is the noise's standard deviation, None to estimate it."""
    sigma = float(estimate_sigma(y)) if sigma is None else sigma
    return denoise_nl_means(y, patch_size=5, patch_distance=6, h=0.8 * sigma, sigma=sigma, fast_mode=True)


def calibrated(method, y):
    """Denoises one slice y (H,W) by nlm-calibrated, tv or wavelet; the strength is that of the least J-invariant loss.

    Searched are half octaves around what suits white noise of the estimated level. Only the choice is J-invariant: the
    denoiser that is then used sees every pixel: on the built-in brain that is 39.4 dB for tv, against 32.6 dB.
    """
    sigma = max(float(estimate_sigma(y)), 1e-4)
    strengths = sigma * 2 ** np.arange(-1.5, 2.01, 0.5)
    denoise, parameters = {
        "nlm-calibrated": (
            lambda image, h: denoise_nl_means(image, patch_size=5, patch_distance=6, h=h, sigma=sigma, fast_mode=True),
            {"h": strengths},
        ),
        "tv": (denoise_tv_chambolle, {"weight": 2 * strengths}),
        "wavelet": (denoise_wavelet, {"sigma": strengths, "wavelet": ["db2"], "rescale_sigma": [True]}),
    }[method]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the levels of the wavelet decomposition
        _, (tried, losses) = calibrate_denoiser(y, denoise, parameters, stride=4, extra_output=True)
        return denoise(y, **tried[int(np.argmin(losses))])


# ---------------------------------------------------------------------------------------------------------------
# train and predict
# ---------------------------------------------------------------------------------------------------------------
CLASSICAL = ("nlm", "nlm-calibrated", "tv", "wavelet")
FAST = {k: v for k, v in distill.FAST.items() if k not in ("loss", "strength")} | dict(schedule="cosine")
PUBLISHED = dict(
    arch="n2n",
    width=48,
    enc_blocks=[],
    middle_blocks=0,
    dec_blocks=[],
    beta2=0.999,
    clip=float("inf"),
    ema=0.0,
    batch=4,
    crop=256,
)
PRESETS = {
    "noise2self": {
        "fast": {**FAST, "period": 4},
        # The paper's: one epoch (here of 40,000 images), learning rate 5e-4, MSE; the batch is left open there.
        "paper": {**PUBLISHED, "schedule": "constant", "period": 4, "steps": 10_000, "lr": 5e-4},
    },
    "nei2nei": {
        "fast": {**FAST, "increase": 2.0, "crop": 128},  # subsampled to 64: as many pixels a second as the others
        # 100 epochs, here of 40,000 images, in which the learning rate is halved four times.
        "paper": {**PUBLISHED, "schedule": "halved", "increase": 2.0, "steps": 1_000_000, "lr": 3e-4},
    },
}


def network(arch, width, **shape):
    """The network that a checkpoint's `model_args` describe."""
    return N2NUNet(width=width) if arch == "n2n" else distill.network(arch, width=width, **shape)


def scheduler_of(optimizer, schedule, steps):
    """cosine: as every stage of this project; halved: at 20, 40, 60 and 80 % of the steps; constant."""
    if schedule == "cosine":
        return runtime.warmup_cosine(optimizer, steps)
    halvings = 4 if schedule == "halved" else 0
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** min(halvings, 5 * step // steps))


def train(args, checkpoint=None):
    """Trains noise2self or nei2nei on the noisy images of the train split; writes args.model."""
    where = runtime.device(args.device)
    noisy = data.read_volumes(args.data, "noisy", "train")
    data.check_crop(noisy, args.crop)
    torch.manual_seed(args.seed)
    shape = ("arch", "width", "enc_blocks", "middle_blocks", "dec_blocks")
    model_args = checkpoint["model_args"] if checkpoint else {k: getattr(args, k) for k in shape}
    extra = checkpoint["extra"] if checkpoint else dict(crop=args.crop, period=getattr(args, "period", None))
    model = network(**model_args).to(where, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, args.beta2), weight_decay=0, fused=True)
    scheduler = scheduler_of(optimizer, args.schedule, args.steps)
    ema = AveragedModel(model, multi_avg_fn=runtime.ema_update(args.ema))
    inputs = dict(data=data.fingerprints(args.data))
    run = runtime.Training(args.method, args, checkpoint, model, optimizer, scheduler, ema, model_args, extra, inputs)
    for step in run.steps():
        rng = runtime.step_rng(args.seed, step)
        (y,) = data.random_crops([noisy], args.batch, args.crop, rng, run.rank, run.world)
        y = y.to(where, memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        with runtime.autocast(where, args.precision):
            if args.method == "noise2self":
                loss = noise2self_loss(run.net, y, args.period, int(rng.integers(args.period**2)))
            else:
                first, second = (index.to(where) for index in neighbors(*y.shape[-2:], rng))
                loss = neighbor2neighbor_loss(run.net, y, first, second, args.increase * step / args.steps)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        scheduler.step()
        ema.update_parameters(model)
        run.report(loss)


@torch.inference_mode()
def predict(args):
    """Denoises every volume of args.data (of one split, if asked) and writes args.out."""
    noisy = data.read_volumes(args.data, "noisy", args.split, data.TO_PREDICT)
    if args.method not in CLASSICAL:
        where = runtime.device(args.device)
        model, state = runtime.restore(network, args.model, args.method, where)
        period = state["extra"]["period"]

        def forward(y):
            with runtime.autocast(where, args.precision):
                return model(y.to(where, memory_format=torch.channels_last)).float().cpu()

        def denoise(y, *_):
            return data.tiled(lambda z: noise2self(forward, z, period) if period else forward(z), y, 1024, 256)

    else:
        model_of_noise = noise.given(args.noise, args.data) if args.noise else None

        def one(y):
            if args.method != "nlm":
                return calibrated(args.method, y)
            return non_local_means(y, noise.variance(model_of_noise, y).mean() ** 0.5 if model_of_noise else args.sigma)

        def denoise(y, *_):
            return torch.from_numpy(np.stack([one(image) for image in y[:, 0].numpy()])[:, None].astype(np.float32))

    data.write_predictions(args, args.method, args.data, noisy, denoise)


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
def main(argv=None):
    p = runtime.training_parser(__doc__, PRESETS["nei2nei"], "METHOD.pt")
    p.add_argument("--data", required=True, help="dataset (.h5)")
    p.add_argument("--method", choices=(*CLASSICAL, *PRESETS), default="nlm", help="see above (default nlm)")
    p.add_argument("--sigma", type=runtime.fraction, help="nlm: standard deviation of the noise (default: estimated)")
    p.add_argument("--noise", help="nlm: take sigma, slice by slice, from this noise model, as in posterior.py")
    p.add_argument(
        "--split", choices=(*data.SPLITS, "all"), default="all", help="denoise only this split (default all)"
    )
    p.add_argument("--out", default="METHOD_out.h5", help="prediction to write (default METHOD_out.h5)")
    p.add_argument("--predict", action="store_true", help="only predict, with the trained --model")
    p.add_argument("--period", type=runtime.positive, help="noise2self: pixels between those of a grid (4)")
    p.add_argument("--increase", type=float, help="nei2nei: the regularizer's weight at the end of the training (2)")
    p.add_argument("--arch", choices=("resunet", "nafnet", "n2n"), help="network (fast: resunet; paper: n2n)")
    p.add_argument("--width", type=runtime.positive, help="features at the first level")
    p.add_argument("--enc-blocks", type=int, nargs="+", help="blocks per level on the way down")
    p.add_argument("--middle-blocks", type=int, help="blocks at the lowest level")
    p.add_argument("--dec-blocks", type=int, nargs="+", help="blocks per level on the way up, lowest first")
    p.add_argument("--schedule", choices=("cosine", "halved", "constant"), help="of the learning rate")
    p.add_argument("--beta2", type=float, help="AdamW's second decay")
    p.add_argument("--clip", type=float, help="largest gradient norm")
    p.add_argument("--ema", type=float, help="decay per step of the averaged weights")
    args = p.parse_args(argv)
    args.out = args.out.replace("METHOD", args.method)
    if args.method != "nlm" and (args.sigma or args.noise):
        raise ValueError(f"--sigma and --noise are for --method nlm; {args.method} does without")
    if args.method in CLASSICAL:
        runtime.check_outputs([args.data, args.noise], [args.out])
        return predict(args)
    if args.period == 1:
        raise ValueError("--period 1 hides every pixel at once: 2 is the least")
    args.model = args.model.replace("METHOD", args.method)
    if args.predict:
        runtime.check_outputs([args.data, args.model], [args.out])
    else:
        runtime.check_outputs([args.data], [args.out, args.model])
        train(args, runtime.settle(args, PRESETS[args.method], args.method))
    predict(args)


if __name__ == "__main__":
    runtime.command(main)
