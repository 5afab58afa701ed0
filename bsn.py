"""Stage 1: blind-spot network. A first estimate x_c of the clean image, from noisy images alone (Sec. 3.4).

Every pixel is predicted from its surroundings and never from itself (J-invariance). If the noise of a pixel is
independent of the noise around it, the noise cannot be predicted, so that learning to predict the *noisy* pixel
(L1 or L2 loss against the input itself) teaches the network the clean one. Architecture after PUCA (Jang et al.
2023): masked convolution, dilated NAF blocks, patch-unshuffle U shape.

    In    knee.h5      volumes/<name>/noisy  (S,H,W) float32, about [0,1], H and W >= 16
    Out   bsn_out.h5   volumes/<name>/pred   (S,H,W) float32, about [0,1]: the condition x_c
                       volumes/<name>/std    with --loss nll: the deviation of y from pred that the network expects
                       volumes/<name>/hidden (S,4,H,W) with --hidden: predictions for diffusion.py --condition hidden
          bsn.pt       checkpoint: weights, EMA, optimizer, step, model arguments

    python bsn.py --data knee.h5                           # trains bsn.pt, then writes bsn_out.h5
    python bsn.py --data other.h5 --predict --model bsn.pt --out other_bsn.h5

Symbols: y the noisy image (the paper's x'), x_c the prediction. Departures from the published PUCA, both exact:
dilation by d is written as an ordinary convolution on the d*d subsampled images (the same arithmetic, and faster),
and channel attention pools each of those images by itself, because pooling over the whole image lets a pixel see
itself. `--preset paper` has the original's widths and depths.

`--arch lgbpn` takes the network of LG-BPN (Wang et al. 2023) instead: a branch of dilated convolutions for detail and
one of channel attention for what lies farther away, made exactly blind in the same way.
"""

# ---------------------------------------------------------------------------------------------------------------
# core: needs torch and einops alone; paste it anywhere
# ---------------------------------------------------------------------------------------------------------------
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange


def deal(x, stride):
    """(B,C,H,W) to an image of each residue class of (row, column) modulo stride, (stride^2 B,C,H/stride,W/stride)."""
    return rearrange(x, "b c (h p) (w q) -> (p q b) c h w", p=stride, q=stride)


def collect(x, stride):
    """The inverse of `deal`."""
    return rearrange(x, "(p q b) c h w -> b c (h p) (w q)", p=stride, q=stride)


class BlindSpotConv(nn.Conv2d):
    """Convolution that cannot see the centre: the weights within |dy| + |dx| <= radius count as zero.

    reach: of the kernel, pixels; by default the smallest that sees past the hole: 1 for radius 0 (one pixel), radius
    above that (LG-BPN's diamond). every: only each second (third, ...) pixel of it has a weight.
    No padding: (B,C,H,W) to (B,width,H-2*reach,W-2*reach).
    """

    def __init__(self, channels, width, radius, reach=None, every=1):
        reach = reach or max(1, radius)
        offset = torch.arange(-reach, reach + 1, every).abs()
        super().__init__(channels, width, kernel_size=len(offset))
        self.register_buffer("mask", (offset[:, None] + offset[None] > radius).float(), persistent=False)
        self.reach, self.every = reach, every

    def forward(self, x):
        weight = self.weight * self.mask
        if self.every == 1:
            return F.conv2d(x, weight, self.bias)
        h, w = x.shape[-2:]
        x = deal(F.pad(x, (0, -w % self.every, 0, -h % self.every)), self.every)
        return collect(F.conv2d(x, weight, self.bias), self.every)[..., : h - 2 * self.reach, : w - 2 * self.reach]


class DABlock(nn.Module):
    """PUCA's dilated attention block on (B,C,H,W), the dilation already dealt out to the batch; see PUCA."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.spatial = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.attention = nn.Conv2d(width, width, 1)
        self.project = nn.Conv2d(width, width, 1)
        self.ffn_in, self.ffn_out = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(width, width, 1)
        self.beta, self.gamma = (nn.Parameter(torch.ones(width, 1, 1)) for _ in range(2))  # ones, as in PUCA

    def forward(self, x):
        u, v = self.spatial(self.expand(self.norm1(x.movedim(1, -1)).movedim(-1, 1))).chunk(2, dim=1)
        u = u * v
        x = x + self.beta * self.project(u * self.attention(u.mean((2, 3), keepdim=True)))
        u, v = self.ffn_in(self.norm2(x.movedim(1, -1)).movedim(-1, 1)).chunk(2, dim=1)
        return x + self.gamma * self.ffn_out(u * v)


class DenseBlock(nn.Module):
    """Residual block of two dense 3x3 convolutions on (B,C,H,W): on a CPU, more quality per second than DABlock."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x):
        return x + self.second(F.relu(self.first(x)))


class PUCA(nn.Module):
    """Blind-spot U-Net: the output at a pixel does not depend on any input pixel of the blind spot around it.

    After the masked convolution the features are dealt out to stride*stride images, one for each residue class of
    (row, column) modulo the stride, and everything later stays within a class. A feature of class p has seen only
    pixels outside the hole around it, and the members of a class lie too far apart to fill each other's holes, so
    the hole is exact, borders included.

    Args:
        channels: image channels. width: features at the first level, doubled at each next one.
        blind_spot: diameter of the hole in pixels: 1 (white noise), 5 or 9 (correlated noise).
        enc_blocks, middle_blocks, dec_blocks: blocks per level; each level halves the resolution.
        dense: DenseBlocks, and a tail that sees the masked convolution's features too, instead of PUCA's DABlocks.
        deviation: predict the logarithm of the deviation of y, in tenths of the range, as C more channels.
    Maps (B,C,H,W) to (B,C,H,W) or (B,2C,H,W), any H and W >= 16. Source: Jang et al. 2023; the paper's Sec. 3.4.
    """

    def __init__(
        self,
        channels=1,
        width=128,
        blind_spot=1,
        enc_blocks=(3, 4),
        middle_blocks=4,
        dec_blocks=(4, 3),
        dense=False,
        deviation=False,
    ):
        super().__init__()
        if width % 2:
            raise ValueError(f"width {width} is odd: every level takes half of it")
        if blind_spot not in (1, 5, 9):
            raise ValueError(f"blind_spot is 1, 5 or 9, not {blind_spot}")
        outputs = channels * (1 + deviation)
        radius = (blind_spot - 1) // 2
        self.reach, self.stride = max(1, radius), 2 * max(1, radius)
        block = DenseBlock if dense else DABlock
        stack = lambda w, n: nn.Sequential(*(block(w) for _ in range(n)))  # noqa: E731
        widths = [width * 2**level for level in range(len(enc_blocks) + 1)]
        conv1 = lambda c_in, c_out: nn.Conv2d(c_in, c_out, 1)  # noqa: E731
        if dense:
            self.blind = BlindSpotConv(channels, width, radius)
            self.tail = nn.Sequential(conv1(2 * width, width), nn.ReLU(), conv1(width, outputs))
        else:
            self.blind = nn.Sequential(
                conv1(channels, width), BlindSpotConv(width, width, radius), conv1(width, width), conv1(width, width)
            )
            self.tail = nn.Sequential(
                conv1(width, width),
                conv1(width, width),
                conv1(width, width // 2),
                conv1(width // 2, width // 2),
                conv1(width // 2, outputs),
            )
        self.encoders = nn.ModuleList(stack(w, n) for w, n in zip(widths, enc_blocks))
        self.downs = nn.ModuleList(conv1(w, w // 2) for w in widths[:-1])
        self.middle = stack(widths[-1], middle_blocks)
        self.ups = nn.ModuleList(conv1(w, 2 * w) for w in widths[:0:-1])
        self.decoders = nn.ModuleList(stack(w, n) for w, n in zip(widths[-2::-1], dec_blocks))
        self.dense = dense

    def forward(self, y):
        h, w = y.shape[-2:]
        unit, before = self.stride * 2 ** len(self.encoders), self.stride * 2
        pad = (before, unit - (w + before) % unit, before, unit - (h + before) % unit)
        # Reflection keeps the class of a pixel modulo 2 (the mirror image of -k is k), not modulo 4 or 8.
        x = F.pad(y, pad, mode="reflect") if self.stride == 2 else F.pad(y, pad)
        x = self.blind(F.pad(x, 4 * (self.reach,)))
        x = seen = deal(x, self.stride)
        skips = []
        for encoder, down in zip(self.encoders, self.downs):
            skips.append(encoder(x))
            x = F.pixel_unshuffle(down(skips[-1]), 2)  # PUCA's patch-unshuffle, on images that are subsampled already
        x = self.middle(x)
        for up, decoder in zip(self.ups, self.decoders):
            x = decoder(F.pixel_shuffle(up(x), 2) + skips.pop())
        x = self.tail(torch.cat([x, seen], 1) if self.dense else x)
        return collect(x, self.stride)[..., before : before + h, before : before + w]


class ChannelAttentionBlock(nn.Module):
    """Restormer's block: attention between channels, then a gated feed-forward, both with depthwise 3x3 convolutions.

    (B,C,H,W) to (B,C,H,W). Zamir et al. 2022; LG-BPN's dilated transformer block once the dilation is dealt out.
    """

    def __init__(self, width, heads=2):
        super().__init__()
        hidden = int(2.66 * width)
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.project = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        self.qkv_spatial = nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.ffn_in, self.ffn_out = nn.Conv2d(width, 2 * hidden, 1), nn.Conv2d(hidden, width, 1)
        self.ffn_spatial = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.heads = heads

    def forward(self, x):
        h = x.shape[-2]
        qkv = self.qkv_spatial(self.qkv(self.norm1(x.movedim(1, -1)).movedim(-1, 1)))
        q, k, v = rearrange(qkv, "b (three n c) h w -> three b n c (h w)", three=3, n=self.heads)
        similar = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        mixed = (self.temperature * similar).softmax(-1) @ v
        x = x + self.project(rearrange(mixed, "b n c (h w) -> b (n c) h w", h=h))
        u, v = self.ffn_spatial(self.ffn_in(self.norm2(x.movedim(1, -1)).movedim(-1, 1))).chunk(2, dim=1)
        return x + self.ffn_out(F.gelu(u) * v)


class DilatedBlock(nn.Module):
    """LG-BPN's residual block of the local branch, the dilation already dealt out. (B,C,H,W) to (B,C,H,W)."""

    def __init__(self, width):
        super().__init__()
        self.spatial, self.mix = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.mix(F.relu(self.spatial(x)))


class LGBPN(nn.Module):
    """Blind-spot network of a local and a global branch (Wang et al. 2023), the hole a diamond as in PUCA above.

    Local: a masked convolution of 9x9 pixels, then dilated blocks. Global: one of 21x21 pixels, each second one, then
    channel attention. Each branch works within residue classes that lie so far apart that no member's kernel reaches
    into another's hole: 8 and 15 pixels, as published. The attention, too, looks at one class alone: over the whole
    image, as published, it would leak a little. Left out: what the published code does at test time alone (taps moved
    closer, and the mean over outputs of which a share was replaced by noisy pixels), which gives up the blind spot.

    Args: channels, blind_spot, deviation: as in PUCA. width: features. blocks: of the local and the global branch.
    Maps (B,C,H,W) to (B,C,H,W) or (B,2C,H,W), any H and W >= 16.
    """

    BRANCHES = ((4, 1, 8), (10, 2, 15))  # local, global: reach of the kernel, every how many pixels, stride of classes

    def __init__(self, channels=1, width=128, blind_spot=9, blocks=(9, 6), deviation=False):
        super().__init__()
        if blind_spot not in (1, 5, 9):
            raise ValueError(f"blind_spot is 1, 5 or 9, not {blind_spot}")
        if width % 2:
            raise ValueError(f"width {width} is odd: attention has two heads")
        radius = (blind_spot - 1) // 2
        self.stride = self.BRANCHES[0][2]
        conv1 = lambda c_in, c_out: nn.Conv2d(c_in, c_out, 1)  # noqa: E731
        self.head = nn.Sequential(conv1(channels, 24), nn.ReLU())
        self.blind = nn.ModuleList(BlindSpotConv(24, width, radius, reach, every) for reach, every, _ in self.BRANCHES)
        self.near = nn.Sequential(
            *(nn.ReLU(), conv1(width, width), nn.ReLU(), conv1(width, width), nn.ReLU()),
            *(DilatedBlock(width) for _ in range(blocks[0])),
            *(conv1(width, width), nn.ReLU()),
        )
        self.wide = nn.Sequential(
            *(nn.ReLU(), conv1(width, width)),
            *(ChannelAttentionBlock(width) for _ in range(blocks[1])),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.tail = nn.Sequential(
            *(conv1(2 * width, width), nn.ReLU(), conv1(width, width // 2), nn.ReLU()),
            *(conv1(width // 2, width // 2), nn.ReLU(), conv1(width // 2, channels * (1 + deviation))),
        )

    def forward(self, y):
        h, w = y.shape[-2:]
        branches = []
        for blind, body, (reach, _, stride) in zip(self.blind, (self.near, self.wide), self.BRANCHES):
            x = F.pad(y, (0, -w % stride, 0, -h % stride))  # zeros: a mirror image could show a pixel to itself
            x = blind(self.head(F.pad(x, 4 * (reach,))))
            branches.append(collect(body(deal(x, stride)), stride)[..., :h, :w])
        return self.tail(torch.cat(branches, 1))


def blind_spot_loss(prediction, y, kind="l2"):
    """Distance of a blind-spot prediction from the noisy image y (B,C,H,W) itself; a scalar.

    "l1" is PUCA's; "l2" has the conditional mean as its minimum; "nll", for predictions (B,2C,H,W) with a deviation, is
    the Gaussian negative log-likelihood (Laine et al. 2019). Errors count in tenths of the range: squares of numbers
    near 0.02 have gradients so small that Adam's epsilon, and a clipped norm, lose their meaning.
    """
    if kind == "nll":
        mean, log_deviation = prediction.chunk(2, dim=1)
        log_deviation = log_deviation.clamp(min=-5)  # black background without noise would send it to minus infinity
        return (0.5 * (10 * (mean - y)).square() * torch.exp(-2 * log_deviation) + log_deviation).mean()
    error = 10 * (prediction - y)
    return error.abs().mean() if kind == "l1" else error.square().mean()


def hide(y, stride, row, column):
    """y (B,C,H,W) with the pixels of one class, row and column modulo stride, replaced by their surroundings.

    A replaced pixel is the mean of four others in its row and column, stride / 2 + 1 pixels away (1 for stride 2), of
    their mirror images beyond a border.
    """
    h, w = y.shape[-2:]
    away = max(1, stride // 2 + (stride > 2))
    around = F.pad(y, 4 * (away,), mode="reflect")
    inner_y, inner_x = slice(away, away + h), slice(away, away + w)
    mean = around[..., :h, inner_x] + around[..., 2 * away :, inner_x]
    mean = (mean + around[..., inner_y, :w] + around[..., inner_y, 2 * away :]) / 4
    out = y.clone()
    out[..., row::stride, column::stride] = mean[..., row::stride, column::stride]
    return out


# ---------------------------------------------------------------------------------------------------------------
# train and predict
# ---------------------------------------------------------------------------------------------------------------
import argparse

import numpy as np
from torch.optim.swa_utils import AveragedModel

import data
import runtime

PRESETS = {
    "fast": dict(
        arch="puca",
        blind_spot=1,
        width=32,
        enc_blocks=[2],
        middle_blocks=2,
        dense=True,
        loss="l2",
        beta2=0.99,
        steps=1500,
        batch=2,
        crop=96,
        lr=2e-3,
        ema=0.995,
    ),
    # Widths, depths, loss and learning rate of the published PUCA; about its number of images seen.
    "paper": dict(
        arch="puca",
        blind_spot=1,
        width=128,
        enc_blocks=[3, 4],
        middle_blocks=4,
        dense=False,
        loss="l1",
        beta2=0.999,
        steps=200_000,
        batch=2,
        crop=256,
        lr=1e-4,
        ema=0.999,
    ),
}
LGBPN_PRESETS = {
    "fast": {
        **{k: v for k, v in PRESETS["fast"].items() if k in ("loss", "beta2", "batch", "lr", "ema")},
        **dict(arch="lgbpn", blind_spot=1, width=32, blocks=[3, 2], steps=1000, crop=90),
    },
    # As published for SIDD: 20 epochs of its patches.
    "paper": dict(
        arch="lgbpn",
        blind_spot=9,
        width=128,
        blocks=[9, 6],
        loss="l1",
        beta2=0.999,
        steps=60_000,
        batch=8,
        crop=120,
        lr=1e-4,
        ema=0.999,
    ),
}
NETWORKS = {"puca": PUCA, "lgbpn": LGBPN}
SHAPE = {
    "puca": ("width", "blind_spot", "enc_blocks", "middle_blocks", "dense"),
    "lgbpn": ("width", "blind_spot", "blocks"),
}


def network(arch="puca", **arguments):
    """The network that a checkpoint's `model_args` describe."""
    return NETWORKS[arch](**arguments)


def train(args, checkpoint=None):
    """Trains on the noisy images of the train split (self-supervised); writes args.model."""
    where = runtime.device(args.device)
    noisy = data.read_volumes(args.data, "noisy", "train")
    data.check_crop(noisy, args.crop)
    if checkpoint and (args.loss == "nll") != checkpoint["model_args"].get("deviation", False):
        raise ValueError(f"{args.model} was trained with another --loss than {args.loss}: it cannot resume")
    torch.manual_seed(args.seed)
    if checkpoint:
        model_args = checkpoint["model_args"]
    else:
        model_args = {k: getattr(args, k) for k in ("arch", *SHAPE[args.arch])} | dict(deviation=args.loss == "nll")
        if args.arch == "puca":
            model_args["dec_blocks"] = args.enc_blocks[::-1]
    model = network(**model_args).to(where, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, args.beta2), weight_decay=0, fused=True)
    scheduler = runtime.warmup_cosine(optimizer, args.steps)
    ema = AveragedModel(model, multi_avg_fn=runtime.ema_update(args.ema))
    run = runtime.Training(
        "bsn",
        args,
        checkpoint,
        model,
        optimizer,
        scheduler,
        ema,
        model_args,
        inputs=dict(data=data.fingerprints(args.data)),
    )
    for step in run.steps():
        (y,) = data.random_crops([noisy], args.batch, args.crop, runtime.step_rng(args.seed, step), run.rank, run.world)
        y = y.to(where, memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        with runtime.autocast(where, args.precision):
            loss = blind_spot_loss(run.net(y).float(), y, args.loss)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        ema.update_parameters(model)
        run.report(loss)


HIDDEN = 4  # classes of pixels hidden in turn in each slice: all of stride 2, a share of those of strides 4 and 8


def hidden_offsets(rows, stride):
    """Which classes, (row, column) modulo stride, are hidden in the slices `rows`: (4, slices, 2) integers."""
    k = (np.arange(rows.start, rows.stop)[None] * HIDDEN + np.arange(HIDDEN)[:, None]) * 13 % stride**2
    return np.stack([k // stride, k % stride], -1)


@torch.inference_mode()
def predict(args):
    """Writes the prediction for every volume of args.data, with the EMA weights of args.model, to args.out."""
    where = runtime.device(args.device)
    model, _ = runtime.restore(network, args.model, "bsn", where)

    deviation = model.tail[-1].out_channels == 2
    stride = model.stride

    def forward(y):
        with runtime.autocast(where, args.precision):
            out = model(y.to(where, memory_format=torch.channels_last)).float().cpu()
        return torch.cat([out[:, :1], out[:, 1:].clamp(min=-5).exp() / 10], 1)

    def denoise(y):
        return data.tiled(forward, y, 1024, 256)

    def with_hidden(y, name, rows):
        offsets = hidden_offsets(rows, stride)
        hidden = [denoise(torch.cat([hide(one[None], stride, *at) for one, at in zip(y, k)]))[:, :1] for k in offsets]
        return torch.cat([denoise(y), *hidden], 1)

    keys = ["pred", "std"] if deviation else ["pred"]
    noisy = data.read_volumes(args.data, "noisy", args.split, data.TO_PREDICT)
    if not args.hidden:
        return data.write_predictions(args, "bsn", args.data, noisy, lambda y, *_: denoise(y), keys)
    period = hidden_offsets(slice(0, stride**2 // HIDDEN), stride).transpose(1, 0, 2)  # then they repeat
    attrs = dict(hidden_stride=stride, hidden_offsets=period)
    if stride > 2:
        runtime.say("bsn: note: only the pixel is hidden, not the neighbours whose noise tells of its own")
    data.write_predictions(args, "bsn", args.data, noisy, with_hidden, [*keys, ("hidden", HIDDEN)], attrs)


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
def main(argv=None):
    p = runtime.training_parser(__doc__, PRESETS, "bsn.pt")
    p.add_argument("--data", required=True, help="dataset (.h5)")
    p.add_argument("--out", default="bsn_out.h5", help="prediction to write (default bsn_out.h5)")
    p.add_argument("--predict", action="store_true", help="only predict, with the trained --model")
    p.add_argument(
        "--split", choices=(*data.SPLITS, "all"), default="all", help="predict only this split (default all)"
    )
    p.add_argument(
        "--blind-spot",
        type=int,
        choices=(1, 5, 9),
        help="diameter of the hole, pixels: 1 for white noise (default), 5 or 9 for noise blurred by 0.5 or 1.2 pixels",
    )
    p.add_argument("--arch", choices=NETWORKS, help="see above (default puca)")
    p.add_argument("--width", type=runtime.positive, help="features at the first level")
    p.add_argument(
        "--blocks", type=runtime.positive, nargs=2, metavar=("LOCAL", "GLOBAL"), help="lgbpn: blocks of its branches"
    )
    p.add_argument(
        "--enc-blocks", type=runtime.positive, nargs="+", help="blocks per level on the way down, and up in reverse"
    )
    p.add_argument("--middle-blocks", type=runtime.positive, help="blocks at the lowest level")
    p.add_argument("--dense", action=argparse.BooleanOptionalAction, default=None, help="dense blocks, not PUCA's")
    p.add_argument(
        "--loss", choices=("l1", "l2", "nll"), help="between prediction and noisy pixel; nll also learns std"
    )
    p.add_argument("--hidden", action="store_true", help="also predict with pixels hidden in turn")
    p.add_argument("--beta2", type=float, help="AdamW's second decay")
    p.add_argument("--ema", type=float, help="decay per step of the averaged weights")
    args = p.parse_args(argv)
    if args.predict:
        runtime.check_outputs([args.data, args.model], [args.out])
    else:
        runtime.check_outputs([args.data], [args.out, args.model])
    if not args.predict:
        train(args, runtime.settle(args, LGBPN_PRESETS if args.arch == "lgbpn" else PRESETS, "bsn"))
    predict(args)


if __name__ == "__main__":
    runtime.command(main)
