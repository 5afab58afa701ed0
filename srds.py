"""Stage 3: stabilized reverse diffusion sampling (Sec. 3.5, Eqs. 3-4): the mean of the samples from +eps and -eps.

    In    bsn_out.h5    volumes/<name>/pred  (S,H,W) float32: the condition x_c, as diffusion.pt was trained on
          diffusion.pt  checkpoint of diffusion.py; its EMA weights are used
    Out   srds_out.h5   volumes/<name>/pred  (S,H,W) float32: the denoised image (Eq. 4)
                        volumes/<name>/std   half the difference of a pair, or the deviation over several pairs

    python srds.py --cond bsn_out.h5
    python srds.py --cond bsn_out.h5 --mode single --steps 25 --split test --out single_out.h5

Symbols: eps is the starting noise, c the condition x_c, abar the cumulative alpha of Eq. 1, x_t the state.
Sampling is DDIM with eta = 0 (Song et al. 2020; the paper cites [11] and means [37]): the start fixes the result.

    --mode single       one sample, from eps
    --mode independent  mean of two samples from independent noises: what the pair must beat at equal cost
    --mode pair         mean of the samples from eps and -eps: SRDS (default); --pairs K averages K of them
    --mode zero         one run from x_T = 0: equals the pair exactly if the network is linear in x_t

Each slice draws its noise from a generator of its own, so that a result depends on neither batch nor device; --shared
makes the noise of a volume's slices alike.
"""

# ---------------------------------------------------------------------------------------------------------------
# core: needs torch alone; paste it anywhere
# ---------------------------------------------------------------------------------------------------------------
import torch


def timesteps(T, steps):
    """`steps` timesteps from T-1 down, evenly spaced ("trailing": sampling begins at the last that was trained).

    Raises ValueError unless there are 1 to T of them.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} sampling steps: there are 1 to {T} timesteps")
    return [round(T - i * T / steps) - 1 for i in range(steps)]


def ddim(eps_model, x_T, c, abar, steps):
    """DDIM sampling, eta = 0, from x_T (B,C,H,W) at the last timestep to abar = 1; no clipping. Returns X (B,C,H,W).

    Args:
        eps_model: any callable (x_t, c, t (B,)) to eps (B,C,H,W). c: condition, passed on to it. abar: (T,).
    Raises ValueError as `timesteps` does. Source: Song et al. 2020, Eq. 12 with sigma = 0.
    """
    x, ts = x_T, timesteps(len(abar), steps)
    for t, following in zip(ts, [*ts[1:], None]):
        a, a_next = float(abar[t]), 1.0 if following is None else float(abar[following])
        eps = eps_model(x, c, torch.full((len(x),), t, device=x.device))
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        x = a_next**0.5 * x0 + (1 - a_next) ** 0.5 * eps
    return x


def srds(eps_model, c, eps, abar, steps):
    """Stabilized sampling (Eqs. 3-4): DDIM from eps and from -eps, in one batch.

    Returns (mean, half_difference), both (B,C,H,W): the even and the odd part of the sampler in its starting noise.
    """
    plus, minus = ddim(eps_model, torch.cat([eps, -eps]), torch.cat([c, c]), abar, steps).chunk(2)
    return (plus + minus) / 2, (plus - minus) / 2


# ---------------------------------------------------------------------------------------------------------------
# predict
# ---------------------------------------------------------------------------------------------------------------
import zlib

import data
import diffusion
from lib import runtime, training

MODES = ("single", "independent", "pair", "zero")


def sample(eps_model, c, noise, abar, mode, pairs, steps):
    """(mean, std or None) of X for a batch of conditions c (B,C,H,W); noise(k): the k-th starting noise (B,1,H,W)."""
    if mode == "zero":
        return ddim(eps_model, torch.zeros_like(c[:, :1]), c, abar, steps), None
    if mode == "single":
        return ddim(eps_model, noise(0), c, abar, steps), None
    if mode == "independent":
        one, other = ddim(eps_model, torch.cat([noise(0), noise(1)]), torch.cat([c, c]), abar, steps).chunk(2)
        return (one + other) / 2, None
    means, halves = zip(*(srds(eps_model, c, noise(k), abar, steps) for k in range(pairs)))
    mean = torch.stack(means).mean(0)
    spread = torch.cat([torch.stack(means) - mean + s * torch.stack(halves) for s in (1, -1)])  # of all 2K samples
    return mean, spread.square().mean(0).sqrt()


def warn_of_other_data(args, checkpoint):
    """Says so if the conditions were not made from the noisy images that the model was trained on."""
    trained_on, given = checkpoint["inputs"].get("data", {}), data.fingerprints(args.cond)
    changed = [name for name in given if given[name] != trained_on.get(name, given[name])]
    if changed:
        runtime.print_once(f"srds: note: volume {changed[0]!r} of {args.cond} is not what {args.model} was trained on")


def sampler(path, mode="pair", pairs=1, steps=None, device="auto", precision="auto"):
    """The sampler of a checkpoint: callable (c, noise) to (B,1,H,W) images about [0,1], or (B,2,H,W) with their std.

    c (B,2k+1,H,W): conditions; noise(k): the k-th starting noise (B,1,H,W). Attributes: context k, steps, checkpoint.
    Raises ValueError for a checkpoint that cannot be sampled, or a number of steps that there is not.
    """
    device = runtime.pick_device(device)
    network, checkpoint = training.load_network(diffusion.UNet, path, "diffusion", device)
    extra, context = checkpoint["extra"], checkpoint["model_args"].get("context", 0)
    abar, steps = diffusion.alpha_bar(extra["T"]), steps or extra["sampling_steps"]
    timesteps(len(abar), steps)
    eps_model, target, std = diffusion.eps_model(network, abar), extra["target"], extra["std"]

    @torch.inference_mode()
    def draw(c, noise):
        c = c.to(device)
        with runtime.autocast(device, precision):
            c_x, start = diffusion.scaled(c), lambda k: noise(k).to(device)
            mean, spread = sample(eps_model, c_x, start, abar, mode, pairs, steps)
        mean = diffusion.to_image(mean, c[:, context, None], target, std)
        return mean if spread is None else torch.cat([mean, spread * diffusion.unit(target, std)], 1)

    draw.context, draw.steps, draw.checkpoint = context, steps, checkpoint
    return draw


def chain(estimate, draw, seed=0):
    """Blind-spot network and sampler as one denoiser: callable, (B,2k+1,H,W) noisy to (B,1,H,W).

    estimate: of bsn.estimator; draw: of `sampler`. The starting noise is the same in every call: the result is a
    function of the noisy image alone, whose error Stein's estimate tells (evaluate.estimate).
    """
    inner = 2 * estimate.context + 1

    def denoise(y):
        views = [y[:, k : k + inner] for k in range(2 * draw.context + 1)]
        c = torch.cat([estimate(view)[:, :1] for view in views], 1)
        return draw(c, lambda k: starting_noise([(seed, 0, j, k) for j in range(len(y))], c.shape[2:]))[:, :1].cpu()

    denoise.context = estimate.context + draw.context
    return denoise


def starting_noise(seeds, size):
    """Standard normal (B,1,H,W), each image from a generator of its own."""
    return torch.stack([runtime.gaussian(runtime.step_rng(*seed), 1, *size) for seed in seeds])


def predict(args):
    """Samples every slice of args.cond (of one split, if asked) and writes args.out."""
    draw = sampler(args.model, args.mode, args.pairs, args.steps, args.device, args.precision)
    conditions = data.read_volumes(args.cond, "pred", args.split, data.TO_PREDICT)
    data.choose_context(draw.context, conditions)
    warn_of_other_data(args, draw.checkpoint)
    step = draw.checkpoint["step"]
    runtime.print_once(f"srds: EMA weights of {args.model}, step {step}; {args.mode}, {draw.steps} steps")

    def sample_batch(c, name, rows):
        first, numbers = zlib.crc32(name.encode()), range(rows.start, rows.stop)

        def noise(k):  # of all slices the same part, and of each its own
            own = starting_noise([(args.seed, first, s, k) for s in numbers], c.shape[2:])
            common = starting_noise([(args.seed, first, 0, k, 1)], c.shape[2:])
            return (1 - args.shared) ** 0.5 * own + args.shared**0.5 * common if args.shared else own

        return draw(c, noise)

    keep = dict(keys=["pred", "std"] if args.mode == "pair" else ["pred"], batch=args.batch, context=draw.context)
    data.write_predictions(args, "srds", args.cond, conditions, sample_batch, **keep)


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
def main(argv=None):
    p = runtime.network_parser(__doc__)
    p.add_argument("--cond", required=True, help="prediction file (.h5): the condition x_c of every slice")
    p.add_argument("--model", default="diffusion.pt", help="checkpoint of diffusion.py (default diffusion.pt)")
    p.add_argument("--out", default="srds_out.h5", help="prediction to write (default srds_out.h5)")
    p.add_argument("--mode", choices=MODES, default="pair", help="default pair: SRDS")
    p.add_argument("--pairs", type=runtime.positive, default=1, help="pairs to average (default 1, as the paper)")
    p.add_argument("--steps", type=runtime.positive, help="DDIM steps (default: the preset the model was trained with)")
    said = "correlation of the starting noise between the slices of a volume, 0 to 1"
    p.add_argument("--shared", type=runtime.fraction, default=0, help=f"{said} (default 0)")
    p.add_argument("--split", choices=(*data.SPLITS, "all"), default="all", help="sample only this split (default all)")
    p.add_argument("--batch", type=runtime.positive, default=4, help="slices at a time; pairs double them (default 4)")
    args = p.parse_args(argv)
    if not 0 <= args.shared <= 1:
        raise ValueError(f"--shared {args.shared:g} is not from 0 to 1")
    runtime.check_outputs([args.cond, args.model], [args.out])
    predict(args)


if __name__ == "__main__":
    runtime.command(main)
