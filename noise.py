"""What noise is: the noises of the paper's Sec. 4.1, added to clean images once and stored.

    gaussian   x + n, n of standard deviation `level`                  the paper: 6/255
    poisson    Poisson(level * x) / level: variance x / level          200 (MRI), 700 (X-ray)
    gamma      x * g, g ~ Gamma(level, rate level), mean 1             100 (MRI), 500 (X-ray)

Correlated noise of parameter s (0.5 or 1.2): one such noise field is blurred by a Gaussian of sigma s pixels and scaled
back to the power it had; a second, independent field of the same kind is added, and the sum divided by sqrt(2).
Nothing is clipped.

    In    clean.h5    volumes/<name>/clean, or `noisy` where there is no clean: the images to add noise to
    Out   knee.h5     volumes/<name>/clean and noisy (S,H,W) float32

    python noise.py add --data clean.h5 --kind gaussian --level 6/255 --seed 0 --out knee.h5
    python noise.py add --data clean.h5 --kind poisson --level 200 --correlation 1.2 --seed 0 --out knee_poisson.h5
"""

# ---------------------------------------------------------------------------------------------------------------
# core: needs numpy and scipy alone; paste it anywhere
# ---------------------------------------------------------------------------------------------------------------
import numpy as np
from scipy.ndimage import gaussian_filter

KINDS = ("gaussian", "poisson", "gamma")


def white(x, kind, level, generator):
    """Noise n of a clean image x, independent from pixel to pixel, so that x + n is the noisy image.

    Args: x (..., H, W), about [0,1]; kind, level: see the module; generator: numpy Generator.
    Raises ValueError for an unknown kind, a level that is not positive, or Poisson noise of negative intensities.
    """
    if kind not in KINDS:
        raise ValueError(f"noise kind {kind!r} is not one of {', '.join(KINDS)}")
    if not level > 0:
        raise ValueError(f"noise level {level:g} is not positive")
    if kind == "gaussian":
        return generator.normal(0, level, x.shape)
    if kind == "gamma":
        return x * (generator.gamma(level, 1 / level, x.shape) - 1)
    if x.min() < 0:
        raise ValueError(f"Poisson noise needs intensities of at least 0; the lowest is {x.min():g}")
    return generator.poisson(level * x) / level - x


def add(x, kind, level, correlation=0, generator=None):
    """A noisy version of the clean image x (H,W), float32, unclipped (Sec. 4.1).

    Args: kind, level: see the module. correlation: sigma of the blur in pixels, 0 for white noise.
    generator: numpy Generator; None draws fresh noise.
    """
    generator = generator or np.random.default_rng()
    x = np.asarray(x, np.float64)
    n = white(x, kind, level, generator)
    if correlation:
        blurred = gaussian_filter(n, correlation, mode="wrap")
        blurred *= np.sqrt(
            np.mean(n**2) / max(np.mean(blurred**2), 1e-30)
        )  # a black slice has no Poisson or Gamma noise
        n = (blurred + white(x, kind, level, generator)) / np.sqrt(2)
    return (x + n).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
def main(argv=None):
    import data
    import runtime

    p = runtime.parser(__doc__)
    q = p.add_subparsers(required=True, dest="command").add_parser("add", help="clean images to a noisy dataset")
    q.add_argument("--data", required=True, help="dataset (.h5) of clean images")
    q.add_argument("--kind", choices=KINDS, default="gaussian")
    q.add_argument(
        "--level",
        type=runtime.fraction,
        required=True,
        help="Gaussian: standard deviation, share of the range, "
        "such as 6/255; Poisson: photons at intensity 1; Gamma: concentration",
    )
    q.add_argument("--correlation", type=float, default=0, help="sigma of the blur in pixels, 0: white (default 0)")
    q.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    q.add_argument("--out", required=True, help="dataset to write (.h5)")
    args = p.parse_args(argv)
    runtime.check_outputs([args.data], [args.out])
    if args.correlation < 0:
        raise ValueError(f"--correlation {args.correlation:g} is negative")
    with data.open_file(args.data) as file:  # `clean` where a volume has it
        keys = {name: "clean" if "clean" in group else "noisy" for name, group in file["volumes"].items()}
    clean = {}
    for key in sorted(set(keys.values())):
        clean.update(data.read_volumes(args.data, key, names=[name for name in keys if keys[name] == key]))
    known = dict(kind=args.kind, level=args.level, correlation=args.correlation)
    with data.write_volumes(args.out, "dataset", "noise", vars(args), like=args.data, noise=known) as new_volume:
        for v, (name, x) in enumerate(sorted(clean.items())):
            kept, noisy = new_volume(name, x.shape, ["clean", "noisy"])
            for s in range(x.shape[0]):
                kept[s] = x[s]
                noisy[s] = add(x[s], args.kind, args.level, args.correlation, runtime.step_rng(args.seed, v, s))
            noisy.parent.attrs["fingerprint"] = data.fingerprint(noisy)


if __name__ == "__main__":
    import runtime

    runtime.command(main)
