"""Stage 5: the student (Sec. 3.6): a plain network from noisy to denoised image, the one that is shipped.

It learns from any prediction (knowledge distillation) or, beyond the paper, from noisy images and a noise model alone:

    --target FILE          distance to the prediction: the paper's way with srds_out.h5
    --target recorrupted   distance to the clean image, estimated without it by recorruption (`recorruption_loss`)
    --target clean         distance to the clean image: the supervised upper bound

    In    knee.h5         volumes/<name>/noisy  (S,H,W) float32, about [0,1]
          srds_out.h5     volumes/<name>/pred   (S,H,W) float32; any prediction file made from knee.h5
    Out   student.pt      checkpoint: weights, EMA, optimizer, step, model arguments
          distill_out.h5  volumes/<name>/pred   (S,H,W) float32: the denoised images

    python distill.py --data knee.h5 --target srds_out.h5                      # trains student.pt, then predicts
    python distill.py --data new.h5 --predict --model student.pt --out new_out.h5
    python distill.py --data knee.h5 --target recorrupted --pred bsn_out.h5    # noise measured with the help of --pred
    python distill.py --data knee.h5 --target recorrupted --init student.pt --model refined.pt --out refined_out.h5

Symbols: y the noisy image (the paper's x'), target the SRDS mean (Eq. 4). Networks, all deterministic:

    --arch nafnet    NAFNet (Chen et al. 2022), the paper's choice; `--preset paper` has its widths, depths, loss and
                     optimizer for SIDD, `--preset nafnet` is as small as `fast`. Its channel attention pools over the
                     whole image; when an image is larger than the training crop it pools over a window of 1.5 crops
                     around each pixel instead (TLC, Chu et al. 2022), so that the statistics stay those of training
    --arch resunet   dense 3x3 convolutions at half resolution, nothing else: what processors are best at. After equal
                     seconds of training it is the better one, and denoises in less than half the time (`--preset fast`)
"""

# ---------------------------------------------------------------------------------------------------------------
# core: needs torch alone; paste it anywhere
# ---------------------------------------------------------------------------------------------------------------
import torch
import torch.nn as nn
import torch.nn.functional as F


def local_mean(x, window):
    """Mean over the window x window pixels around each pixel; at the borders, over the nearest whole window.

    (B,C,H,W) to (B,C,H,W), or (B,C,1,1) where the image is no larger than the window.
    """
    h, w = x.shape[-2:]
    kh, kw = min(window, h), min(window, w)
    if (kh, kw) == (h, w):
        return x.mean((2, 3), keepdim=True)
    sums = F.pad(x.float().cumsum(2).cumsum(3), (1, 0, 1, 0))  # integral image: the cost does not depend on the window
    mean = (sums[..., kh:, kw:] - sums[..., :-kh, kw:] - sums[..., kh:, :-kw] + sums[..., :-kh, :-kw]) / (kh * kw)
    top, left = (kh - 1) // 2, (kw - 1) // 2
    return F.pad(mean, (left, kw - 1 - left, top, kh - 1 - top), mode="replicate").to(x.dtype)


class NAFBlock(nn.Module):
    """Depthwise convolution, gate and channel attention, then gated 1x1s; no other activation. (B,C,H,W) to (B,C,H,W).

    `window` is None while training: attention pools over the whole crop.
    """

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.spatial = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.attention, self.project = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.ffn_in, self.ffn_out = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, width, 1)
        self.beta, self.gamma = nn.Parameter(torch.zeros(width, 1, 1)), nn.Parameter(torch.zeros(width, 1, 1))
        self.window = None

    def forward(self, x):
        u, v = self.spatial(self.expand(self.norm1(x.movedim(1, -1)).movedim(-1, 1))).chunk(2, dim=1)
        u = u * v
        pooled = local_mean(u, self.window) if self.window else u.mean((2, 3), keepdim=True)
        x = x + self.beta * self.project(u * self.attention(pooled))
        u, v = self.ffn_in(self.norm2(x.movedim(1, -1)).movedim(-1, 1)).chunk(2, dim=1)
        return x + self.gamma * self.ffn_out(u * v)


class NAFNet(nn.Module):
    """U-Net of NAFBlocks with a global residual connection (Chen et al. 2022, Sec. 3).

    Args:
        channels: of the image. width: features at the first level, doubled at each next one.
        enc_blocks, middle_blocks, dec_blocks: blocks per level; each level halves the resolution.
    Maps (B,C,H,W) to (B,C,H,W), any H and W >= 16.
    """

    block, patch = NAFBlock, 1  # patch x patch pixels become channels

    def __init__(self, channels=1, width=32, enc_blocks=(2, 2, 4, 8), middle_blocks=12, dec_blocks=(2, 2, 2, 2)):
        super().__init__()
        if len(enc_blocks) != len(dec_blocks):
            raise ValueError(f"enc_blocks {enc_blocks} and dec_blocks {dec_blocks} differ in their number of levels")
        widths = [width * 2**level for level in range(len(enc_blocks) + 1)]
        stack = lambda w, n: nn.Sequential(*(self.block(w) for _ in range(n)))  # noqa: E731
        self.intro = nn.Conv2d(channels * self.patch**2, width, 3, padding=1)
        self.encoders = nn.ModuleList(stack(w, n) for w, n in zip(widths, enc_blocks))
        self.downs = nn.ModuleList(nn.Conv2d(w, 2 * w, 2, stride=2) for w in widths[:-1])
        self.middle = stack(widths[-1], middle_blocks)
        self.ups = nn.ModuleList(nn.Conv2d(w, 2 * w, 1, bias=False) for w in widths[:0:-1])
        self.decoders = nn.ModuleList(stack(w, n) for w, n in zip(widths[-2::-1], dec_blocks))
        self.outro = nn.Conv2d(width, channels * self.patch**2, 3, padding=1)

    def pool_locally(self, crop):
        """From now on pools over 1.5 training crops around each pixel (TLC), not over the whole image. Returns self."""
        levels = [*self.encoders, self.middle, *self.decoders]
        depth = len(self.encoders)
        for k, level in enumerate(levels):
            for block in level:
                block.window = int(1.5 * crop) // 2 ** (depth - abs(depth - k))
        return self

    def forward(self, y):
        h, w = y.shape[-2:]
        unit = self.patch * 2 ** len(self.encoders)
        x = F.pad(y, (0, -w % unit, 0, -h % unit), mode="replicate")
        x = self.intro(F.pixel_unshuffle(x, self.patch))
        skips = []
        for encoder, down in zip(self.encoders, self.downs):
            skips.append(encoder(x))
            x = down(skips[-1])
        x = self.middle(x)
        for up, decoder in zip(self.ups, self.decoders):
            x = decoder(F.pixel_shuffle(up(x), 2) + skips.pop())
        return y + F.pixel_shuffle(self.outro(x), self.patch)[..., :h, :w]


class ResBlock(nn.Module):
    """Two dense 3x3 convolutions; begins as the identity. (B,C,H,W) to (B,C,H,W)."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x):
        return x + self.second(F.relu(self.first(x)))


class ResUNet(NAFNet):
    """The same U shape of ResBlocks, on 2x2 pixels as channels; width: features at half resolution."""

    block, patch = ResBlock, 2


def mse_loss(x, target):
    """Mean square error in tenths of the range; (B,C,H,W) to a scalar of order 1 (see bsn.blind_spot_loss)."""
    return (10 * (x - target)).square().mean()


def psnr_loss(x, target):
    """Minus the mean PSNR in dB of a batch, range 1 (Chen et al. 2022). x, target (B,C,H,W); returns a scalar."""
    return 10 * torch.log10((x - target).square().mean((1, 2, 3)) + 1e-8).mean()


def recorruption_loss(network, y, z, strength=0.3):
    """Mean square error of network(y) against the *clean* image, in tenths of the range, up to a constant.

    Args: y (B,C,H,W) noisy images; z like y: fresh noise of the same distribution as theirs; strength a.

    Recorruption (Pang et al. 2021): the noises of y + a z and y - z / a are uncorrelated, so that learning the second
    from the first is learning the clean image. Here each z is used with both signs, and what does not depend on the
    network is left out:

        mean of |f(y + az) - y|^2 and |f(y - az) - y|^2, plus z * (f(y + az) - f(y - az)) / a

    The large terms in 1/a cancel, so that a can be small and f sees nearly the noise that it will see in use; for a
    to 0 this is Stein's unbiased risk estimate (SURE). Two evaluations of the network per image.
    """
    plus, minus = network(torch.cat([y + strength * z, y - strength * z])).float().chunk(2)
    correction = (z * (plus - minus)).mean() * (100 / strength)
    return (mse_loss(plus, y) + mse_loss(minus, y)) / 2 + correction


# ---------------------------------------------------------------------------------------------------------------
# train and predict
# ---------------------------------------------------------------------------------------------------------------
import logging
import warnings

import numpy as np
from scipy.ndimage import gaussian_filter
from torch.optim.swa_utils import AveragedModel

import data
import noise
import runtime

LOSSES = {"mse": mse_loss, "psnr": psnr_loss}
NETWORKS = {"nafnet": NAFNet, "resunet": ResUNet}
FAST = dict(
    arch="resunet",
    width=32,
    enc_blocks=[2, 2],
    middle_blocks=2,
    dec_blocks=[2, 2],
    loss="mse",
    strength=0.3,
    beta2=0.99,
    clip=1.0,
    steps=5000,
    batch=2,
    crop=96,
    lr=2e-3,
    ema=0.995,
)
NAF = dict(arch="nafnet", width=16, enc_blocks=[1, 1, 2], middle_blocks=2, dec_blocks=[1, 1, 1], steps=1500, batch=4)
PRESETS = {
    "fast": FAST,
    "nafnet": {**FAST, **NAF},
    # NAFNet's SIDD settings (width 32): 200k steps, AdamW betas (0.9, 0.9), gradient norm at most 0.01.
    "paper": dict(
        arch="nafnet",
        width=32,
        enc_blocks=[2, 2, 4, 8],
        middle_blocks=12,
        dec_blocks=[2, 2, 2, 2],
        loss="psnr",
        strength=0.3,
        beta2=0.9,
        clip=0.01,
        steps=200_000,
        batch=32,
        crop=256,
        lr=1e-3,
        ema=0.999,
    ),
}


def network(arch="nafnet", **arguments):
    """The network that a checkpoint's `model_args` describe."""
    return NETWORKS[arch](**arguments)


def train(args, checkpoint=None):
    """Trains noisy -> target on the train split; `clean` is opened only for --target clean. Writes args.model."""
    where = runtime.device(args.device)
    noisy = data.read_volumes(args.data, "noisy", "train")
    inputs = dict(data=data.fingerprints(args.data))
    stacks, model_of_noise = [noisy], None
    if args.target == "recorrupted":
        if checkpoint and not checkpoint["extra"].get("noise"):
            raise ValueError(f"{args.model} was not trained by recorruption: it cannot resume so")
        if not args.strength > 0:
            raise ValueError(f"--strength {args.strength:g} is not positive")
        model_of_noise = checkpoint["extra"]["noise"] if checkpoint else noise.given(args.noise, args.data, args.pred)
        runtime.say(f"distill: {noise.summary(model_of_noise)}")
        target = data.read_matching(args.pred, args.data, split="train") if args.pred else None
    elif args.target == "clean":
        target = data.read_volumes(args.data, "clean", "train")
    else:
        target = data.read_matching(args.target, args.data, split="train")
    if target:
        inputs["pred" if model_of_noise else "target"] = {n: data.fingerprint(x) for n, x in target.items()}
        noisy = {name: noisy[name] for name in target}
        stacks = [noisy, target]
    data.check_crop(noisy, args.crop)
    model_args = (
        checkpoint["model_args"]
        if checkpoint
        else {k: getattr(args, k) for k in ("arch", "width", "enc_blocks", "middle_blocks", "dec_blocks")}
    )
    torch.manual_seed(args.seed)
    model = network(**model_args)
    if args.init and not checkpoint:
        started, state = runtime.restore(network, args.init, "distill", "cpu")
        model, model_args = started.train(), state["model_args"]
    model = model.to(where, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, args.beta2), weight_decay=0, fused=True)
    scheduler = runtime.warmup_cosine(optimizer, args.steps)
    ema = AveragedModel(model, multi_avg_fn=runtime.ema_update(args.ema))
    run = runtime.Training(
        "distill",
        args,
        checkpoint,
        model,
        optimizer,
        scheduler,
        ema,
        model_args,
        dict(crop=args.crop, noise=model_of_noise),
        inputs,
    )
    for step in run.steps():
        rng = runtime.step_rng(args.seed, step)
        y, *more = data.random_crops(stacks, args.batch, args.crop, rng, run.rank, run.world)
        if model_of_noise:  # intensities of the clean image: a prediction's, or else a smoothed noisy image's
            means = more[0].numpy() if more else gaussian_filter(y.numpy(), (0, 0, 1.5, 1.5))
            mine = range(run.rank, args.batch, run.world)
            z = [
                noise.sample(model_of_noise, m, runtime.step_rng(args.seed, step, 1, j), crop)
                for j, m, crop in zip(mine, means, y.numpy())
            ]
            more = [torch.from_numpy(np.stack(z))]
        y, x = (z.to(where, memory_format=torch.channels_last) for z in (y, *more))
        optimizer.zero_grad(set_to_none=True)
        with runtime.autocast(where, args.precision):
            if model_of_noise:
                loss = recorruption_loss(run.net, y, x, args.strength)
            else:
                loss = LOSSES[args.loss](run.net(y).float(), x)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        scheduler.step()
        ema.update_parameters(model)
        run.report(loss)


def tiling(state, memory):
    """(side, overlap) of tiles, pixels, multiples of 32: a network takes a third of `memory` bytes, if that is enough.

    The overlap is two training crops: NAFNet's attention has a window of 1.5 crops, and the features reach beyond.
    """
    factor = {"nafnet": 50, "resunet": 10}[state["model_args"].get("arch", "nafnet")]  # measured, float32
    bytes_per_pixel = factor * state["model_args"]["width"]
    overlap = -(-2 * state["extra"]["crop"] // 32) * 32
    return max(2 * overlap + 128, int((memory / 3 / bytes_per_pixel) ** 0.5) // 32 * 32), overlap


def student(path, device="auto", precision="auto", memory=2 << 30):
    """The denoiser that a checkpoint holds: callable, (B,1,H,W) noisy to (B,1,H,W) denoised, both on the CPU.

    Large images go through in tiles such that a run takes about `memory` bytes above what it started with.
    """
    where = runtime.device(device)
    model, state = runtime.restore(network, path, "distill", where)
    if not isinstance(state.get("extra", {}).get("crop"), int):
        raise ValueError(f"{path} does not say on what crops it was trained")
    model.pool_locally(state["extra"]["crop"])
    side, overlap = tiling(state, memory)

    def forward(y):
        with runtime.autocast(where, precision):
            return model(y.to(where, memory_format=torch.channels_last)).float().cpu()

    @torch.inference_mode()
    def denoise(y):
        return data.tiled(forward, y, side, overlap)

    return denoise


def predict(args):
    """Writes the student's output for every volume of args.data, with the EMA weights of args.model, to args.out."""
    denoise = student(args.model, args.device, args.precision)
    noisy = data.read_volumes(args.data, "noisy", args.split, data.TO_PREDICT)
    data.write_predictions(args, "distill", args.data, noisy, lambda y, *_: denoise(y))


def export(path, out):
    """Writes the student of a checkpoint as ONNX: `noisy` to `denoised`, float32 (B,1,H,W) from 16x16 up."""
    try:
        import onnxscript  # noqa: F401  what torch.onnx writes with
    except ImportError:
        raise ValueError("--export needs the package onnxscript: pip install onnxscript") from None
    model, state = runtime.restore(network, path, "distill", "cpu")
    crop = state["extra"]["crop"]
    model = model.pool_locally(crop).to(memory_format=torch.contiguous_format)
    y = torch.rand(2, 1, 2 * crop + 8, 2 * crop + 40)  # larger than the window of the attention
    logging.disable(logging.WARNING)  # torch tells of packages that it could use
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            free = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
            program = torch.export.export(model, (y,), dynamic_shapes=(free,))
            names = dict(input_names=["noisy"], output_names=["denoised"])
            made = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    finally:
        logging.disable(logging.NOTSET)
    with runtime.whole(out) as temporary:
        made.save(temporary)
    print(f"distill: {path} -> {out}", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
def main(argv=None):
    p = runtime.training_parser(__doc__, PRESETS, "student.pt")
    p.add_argument("--data", help="dataset (.h5)")
    p.add_argument("--target", help="prediction file (.h5) to learn from; `recorrupted`; or `clean`: the upper bound")
    p.add_argument(
        "--noise", default="measured", help="with --target recorrupted, as in posterior.py (default measured)"
    )
    p.add_argument("--pred", help="with --target recorrupted: prediction file (.h5), for measuring and for intensities")
    p.add_argument("--init", help="start from the weights of this student (.pt)")
    p.add_argument("--arch", choices=NETWORKS, help="see above (fast: resunet; nafnet and paper: nafnet)")
    p.add_argument("--loss", choices=LOSSES, help="distance to a given target")
    p.add_argument("--strength", type=float, help="a of the recorruption (fast: 0.3)")
    p.add_argument("--out", default="distill_out.h5", help="prediction to write (default distill_out.h5)")
    p.add_argument("--predict", action="store_true", help="only predict, with the trained --model")
    p.add_argument("--export", metavar="FILE", help="only write the trained --model as ONNX (.onnx)")
    p.add_argument(
        "--split", choices=(*data.SPLITS, "all"), default="all", help="predict only this split (default all)"
    )
    p.add_argument("--width", type=runtime.positive, help="features at the first level")
    p.add_argument("--enc-blocks", type=int, nargs="+", help="blocks per level on the way down")
    p.add_argument("--middle-blocks", type=int, help="blocks at the lowest level")
    p.add_argument("--dec-blocks", type=int, nargs="+", help="blocks per level on the way up, lowest first")
    p.add_argument("--beta2", type=float, help="AdamW's second decay")
    p.add_argument("--clip", type=float, help="largest gradient norm")
    p.add_argument("--ema", type=float, help="decay per step of the averaged weights")
    args = p.parse_args(argv)
    if args.export:
        runtime.check_outputs([args.model], [args.export])
        return export(args.model, args.export)
    if not args.data:
        raise ValueError("--data is needed, but for --export")
    if args.predict:
        runtime.check_outputs([args.data, args.model], [args.out])
    else:
        runtime.check_outputs([args.data, args.target, args.pred, args.init], [args.out, args.model])
    if not args.predict:
        if not args.target:
            raise ValueError("--target is needed for training: a prediction file, recorrupted, or clean")
        train(args, runtime.settle(args, PRESETS, "distill"))
    predict(args)


if __name__ == "__main__":
    runtime.command(main)
