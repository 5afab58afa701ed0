"""Stage 5: knowledge distillation (Sec. 3.6): a plain network from noisy to denoised image, the one that is shipped.

    In    knee.h5         volumes/<name>/noisy  (S,H,W) float32, about [0,1]
          srds_out.h5     volumes/<name>/pred   (S,H,W) float32; any prediction file made from knee.h5
    Out   student.pt      checkpoint: weights, EMA, optimizer, step, model arguments
          distill_out.h5  volumes/<name>/pred   (S,H,W) float32: the denoised images

    python distill.py --data knee.h5 --target srds_out.h5                      # trains student.pt, then predicts
    python distill.py --data new.h5 --predict --model student.pt --out new_out.h5
    python distill.py --data knee.h5 --target clean --model supervised.pt      # the supervised upper bound

Symbols: y the noisy image (the paper's x'), target the SRDS mean (Eq. 4). The network is NAFNet (Chen et al. 2022), the
paper's choice; `--preset paper` has its widths, depths, loss and optimizer for SIDD. It is deterministic. Its channel
attention pools over the whole image; when an image is larger than the training crop it pools over a window of 1.5 crops
around each pixel instead (TLC, Chu et al. 2022), so that the statistics stay those of training.
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

    def __init__(self, channels=1, width=32, enc_blocks=(2, 2, 4, 8), middle_blocks=12, dec_blocks=(2, 2, 2, 2)):
        super().__init__()
        if len(enc_blocks) != len(dec_blocks):
            raise ValueError(f"enc_blocks {enc_blocks} and dec_blocks {dec_blocks} differ in their number of levels")
        widths = [width * 2**level for level in range(len(enc_blocks) + 1)]
        stack = lambda w, n: nn.Sequential(*(NAFBlock(w) for _ in range(n)))  # noqa: E731
        self.intro = nn.Conv2d(channels, width, 3, padding=1)
        self.encoders = nn.ModuleList(stack(w, n) for w, n in zip(widths, enc_blocks))
        self.downs = nn.ModuleList(nn.Conv2d(w, 2 * w, 2, stride=2) for w in widths[:-1])
        self.middle = stack(widths[-1], middle_blocks)
        self.ups = nn.ModuleList(nn.Conv2d(w, 2 * w, 1, bias=False) for w in widths[:0:-1])
        self.decoders = nn.ModuleList(stack(w, n) for w, n in zip(widths[-2::-1], dec_blocks))
        self.outro = nn.Conv2d(width, channels, 3, padding=1)

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
        unit = 2 ** len(self.encoders)
        x = self.intro(F.pad(y, (0, -w % unit, 0, -h % unit), mode="replicate"))
        skips = []
        for encoder, down in zip(self.encoders, self.downs):
            skips.append(encoder(x))
            x = down(skips[-1])
        x = self.middle(x)
        for up, decoder in zip(self.ups, self.decoders):
            x = decoder(F.pixel_shuffle(up(x), 2) + skips.pop())
        return y + self.outro(x)[..., :h, :w]


def psnr_loss(x, target):
    """Minus the mean PSNR in dB of a batch, range 1 (Chen et al. 2022). x, target (B,C,H,W); returns a scalar."""
    return 10 * torch.log10((x - target).square().mean((1, 2, 3)) + 1e-8).mean()


# ---------------------------------------------------------------------------------------------------------------
# train and predict
# ---------------------------------------------------------------------------------------------------------------
from torch.optim.swa_utils import AveragedModel

import data
import runtime

PRESETS = {
    "fast": dict(
        width=16,
        enc_blocks=[1, 1, 2],
        middle_blocks=2,
        dec_blocks=[1, 1, 1],
        beta2=0.99,
        clip=1.0,
        steps=1500,
        batch=4,
        crop=96,
        lr=2e-3,
        ema=0.995,
    ),
    # NAFNet's SIDD settings (width 32): 200k steps, AdamW betas (0.9, 0.9), gradient norm at most 0.01.
    "paper": dict(
        width=32,
        enc_blocks=[2, 2, 4, 8],
        middle_blocks=12,
        dec_blocks=[2, 2, 2, 2],
        beta2=0.9,
        clip=0.01,
        steps=200_000,
        batch=32,
        crop=256,
        lr=1e-3,
        ema=0.999,
    ),
}


def train(args, checkpoint=None):
    """Trains noisy -> target on the train split; `clean` is opened only for --target clean. Writes args.model."""
    where = runtime.device(args.device)
    noisy = data.read_volumes(args.data, "noisy", "train")
    if args.target == "clean":
        target = data.read_volumes(args.data, "clean", "train")
    else:
        target = data.read_matching(args.target, args.data, split="train")
    inputs = dict(data=data.fingerprints(args.data), target={n: data.fingerprint(x) for n, x in target.items()})
    noisy = {name: noisy[name] for name in target}
    data.check_crop(noisy, args.crop)
    model_args = (
        checkpoint["model_args"]
        if checkpoint
        else {k: getattr(args, k) for k in ("width", "enc_blocks", "middle_blocks", "dec_blocks")}
    )
    torch.manual_seed(args.seed)
    model = NAFNet(**model_args).to(where, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, args.beta2), weight_decay=0)
    scheduler = runtime.warmup_cosine(optimizer, args.steps)
    ema = AveragedModel(model, multi_avg_fn=runtime.ema_update(args.ema))
    run = runtime.Training(
        "distill", args, checkpoint, model, optimizer, scheduler, ema, model_args, dict(crop=args.crop), inputs
    )
    for step in run.steps():
        rng = runtime.step_rng(args.seed, step)
        y, x = data.random_crops([noisy, target], args.batch, args.crop, rng, run.rank, run.world)
        y, x = (z.to(where, memory_format=torch.channels_last) for z in (y, x))
        optimizer.zero_grad(set_to_none=True)
        with runtime.autocast(where, args.precision):
            loss = psnr_loss(run.net(y).float(), x)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        scheduler.step()
        ema.update_parameters(model)
        run.report(loss)


@torch.inference_mode()
def predict(args):
    """Writes the student's output for every volume of args.data, with the EMA weights of args.model, to args.out."""
    where = runtime.device(args.device)
    model, state = runtime.restore(NAFNet, args.model, "distill", where)
    model.pool_locally(state["extra"]["crop"])

    def denoise(y):
        with runtime.autocast(where, args.precision):
            return model(y.to(where, memory_format=torch.channels_last)).float().cpu()

    data.predict_volumes(args, "distill", denoise)


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
def main(argv=None):
    p = runtime.training_parser(__doc__, PRESETS, "student.pt")
    p.add_argument("--data", required=True, help="dataset (.h5)")
    p.add_argument("--target", help="prediction file (.h5) to learn from, or `clean`: the supervised upper bound")
    p.add_argument("--out", default="distill_out.h5", help="prediction to write (default distill_out.h5)")
    p.add_argument("--predict", action="store_true", help="only predict, with the trained --model")
    p.add_argument("--width", type=runtime.positive, help="features at the first level")
    p.add_argument("--enc-blocks", type=int, nargs="+", help="blocks per level on the way down")
    p.add_argument("--middle-blocks", type=int, help="blocks at the lowest level")
    p.add_argument("--dec-blocks", type=int, nargs="+", help="blocks per level on the way up, lowest first")
    p.add_argument("--beta2", type=float, help="AdamW's second decay")
    p.add_argument("--clip", type=float, help="largest gradient norm")
    p.add_argument("--ema", type=float, help="decay per step of the averaged weights")
    args = p.parse_args(argv)
    if args.predict:
        runtime.check_outputs([args.data, args.model], [args.out])
    else:
        runtime.check_outputs([args.data, args.target], [args.out, args.model])
    if not args.predict:
        if not args.target:
            raise ValueError("--target is needed for training: a prediction file, or clean")
        train(args, runtime.settle(args, PRESETS, "distill"))
    if runtime.leave_others():
        predict(args)


if __name__ == "__main__":
    runtime.command(main)
