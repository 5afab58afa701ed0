"""Peers: what other packages' self-supervised training reaches on the same images in the same seconds.

    In    noisy.h5                     volumes/<name>/noisy  (S,H,W) float32, about [0,1]
    Out   FOLDER/METHOD@SECONDS_out.h5   volumes/<name>/pred   (S,H,W) float32, the split that is asked for
          FOLDER/METHOD.json             {"METHOD@SECONDS": {steps, seconds of training and of prediction}}

    peers/bin/python -m experiments.peers --data noisy.h5 --noise gaussian:6/255 --seconds 40 400 --out FOLDER

`peers/` is an environment of its own (experiments/requirements-peers.txt). Every method learns from the noisy images of
the training split. The clock is the processor's: with OMP_NUM_THREADS=1, seconds of one core. One training serves all
budgets: the network is copied when each is spent.

CAREamics (Krull et al. 2019; Hoeck et al. 2022; Broaddus et al. 2020), configured by its own factories with what its
guides use, patches of 64 and batches of 16:

    careamics-n2v, careamics-n2v2     Noise2Void and N2V2, slice by slice
    careamics-n2v3d, careamics-n2v23d the same on volumes, patches of 8 slices
    careamics-structn2v               a square mask of 11 pixels, for noise correlated in all directions

deepinv (Tachella et al.), its losses on its U-Net, Adam 1e-3 (UNSURE 5e-4) as in its examples, on flipped and turned
crops of 64, 16 at a time. Four scales of half the width that it comes with, no batch norm: the best of the variants
that results/budget.md has:

    deepinv-r2r, deepinv-sure         recorruption (Monroy et al. 2025) and Stein's estimate, told the noise
    deepinv-unsure                    Stein's estimate with the level learned (Tachella et al. 2025)
    deepinv-nei2nei                   Neighbor2Neighbor

r2r and sure take noise to be white: where it is not, they are told its level. Nothing here is ours but the loop around
deepinv's losses. r2r, nei2nei and unsure train in bfloat16 autocast, as ours do; the others are worse so
(results/budget.md) and keep float32, as their packages do.
"""

import copy
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

import data
import noise
from lib import runtime

CAREAMICS = {"n2v": {}, "n2v2": {"use_n2v2": True}, "n2v3d": {}, "n2v23d": {"use_n2v2": True}}
CAREAMICS["structn2v"] = {"struct_n2v_axes": "square", "augmentations": []}
DEEPINV = ["r2r", "sure", "unsure", "nei2nei"]
BFLOAT16 = ["r2r", "nei2nei", "unsure"]  # of these
METHODS = [*(f"careamics-{name}" for name in CAREAMICS), *(f"deepinv-{name}" for name in DEEPINV)]


class Clock:
    """Processor seconds since the start, and copies of a network when each budget is spent."""

    def __init__(self, budgets):
        self.left, self.copies, self.steps = sorted(budgets), {}, 0

    def start(self):
        self.began = time.process_time()

    def tick(self, network):
        """To be called after each step; True when all is spent."""
        self.steps += 1
        while self.left and time.process_time() - self.began >= self.left[0]:
            self.copies[self.left.pop(0)] = (copy.deepcopy(network.state_dict()), self.steps)
        return not self.left


def careamics(name, train, clock, args, work):
    """Trains with CAREamics until the clock stops it; returns predict(budget, volume) -> (S,H,W)."""
    from careamics import CAREamist
    from careamics.config.factories import create_advanced_n2v_config
    from lightning.pytorch import Callback

    deep = name.endswith("3d")
    flags = dict(experiment_name=name, data_type="array", axes="ZYX" if deep else "SYX", batch_size=16)
    flags |= dict(patch_size=[8, 64, 64] if deep else [64, 64], num_epochs=10000, num_workers=0, seed=args.seed + 1)
    config = create_advanced_n2v_config(**flags, **CAREAMICS[name])

    class Stop(Callback):
        def on_train_start(self, *_):
            clock.start()

        def on_train_batch_end(self, trainer, module, *_):
            known = set(clock.copies)
            trainer.should_stop = clock.tick(module)
            for budget in set(clock.copies) - known:  # predict() loads a file, its own last one if it is given none
                trainer.save_checkpoint(f"{work}/{budget}.ckpt")

    peer = CAREamist(config, work_dir=work, callbacks=[Stop()], enable_progress_bar=False)
    peer.train(train_data=train)

    def predict(budget, y):
        extra = [(0, -n % 4) for n in y.shape]  # its U-Net halves images twice
        padded = np.pad(y, extra if deep else [(0, 0), *extra[1:]], "symmetric")
        found = peer.predict(pred_data=padded, batch_size=1, checkpoint=f"{work}/{budget}.ckpt")[0][0]
        return np.reshape(found, padded.shape)[tuple(map(slice, y.shape))]

    return predict


def deepinv(name, train, clock, args, _work):
    """Trains deepinv's U-Net with one of its losses; returns what `careamics` does."""
    import deepinv as dinv

    noise_model = noise.parse_noise_model(args.noise)
    gain, level = noise_model["variance"][1], noise.facts(noise_model, dict(enumerate(train)))[3]
    law = dinv.physics.PoissonNoise(gain) if gain else dinv.physics.GaussianNoise(level)
    physics, rng = dinv.physics.Denoising(law), np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    network = dinv.models.UNet(1, 1, channels_per_scale=[32, 64, 128, 256], batch_norm=False)
    model = dinv.models.ArtifactRemoval(network)
    if name == "r2r":
        loss = dinv.loss.R2RLoss(noise_model=law)
        model = loss.adapt_model(model)
    elif name == "sure":
        loss = dinv.loss.SurePoissonLoss(gain) if gain else dinv.loss.SureGaussianLoss(level)
    elif name == "unsure":
        loss = dinv.loss.SureGaussianLoss(0.05, unsure=True)
    else:
        loss = dinv.loss.Neighbor2Neighbor()
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-4 if name == "unsure" else 1e-3)
    slices = [image for volume in train for image in volume]
    side = min(64, *(n for image in slices for n in image.shape))

    def crop():
        image = slices[rng.integers(len(slices))]
        i, j = (rng.integers(n - side + 1) for n in image.shape)
        return np.rot90(image[i : i + side, j : j + side], rng.integers(4))[:: rng.choice([1, -1])]

    clock.start()
    model.train()
    spent = False
    while not spent:
        y = torch.from_numpy(np.stack([crop() for _ in range(16)])[:, None])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name in BFLOAT16):
            x = model(y, physics, **({"update_parameters": True} if name == "r2r" else {}))
            value = loss(x_net=x, y=y, physics=physics, model=model).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        spent = clock.tick(network)
    model.eval()

    def predict(budget, volume):
        network.load_state_dict(clock.copies[budget][0])
        with torch.no_grad():
            return np.stack([model(torch.from_numpy(y)[None, None], physics)[0, 0].numpy() for y in volume])

    return predict


def run(method, args):
    """Trains a method and writes its predictions at every budget, and its record."""
    package, _, name = method.partition("-")
    noisy = {split: data.read_volumes(args.data, "noisy", split) for split in ("train", args.split)}
    train, test = ([np.asarray(v[:]) for v in noisy[split].values()] for split in ("train", args.split))
    if name.endswith("3d") and min(map(len, train)) < 8:
        raise ValueError(f"--method {method}: volumes of {args.data} have fewer than 8 slices")
    record, clock = {}, Clock(args.seconds)
    with tempfile.TemporaryDirectory() as work:
        predict = (careamics if package == "careamics" else deepinv)(name, train, clock, args, work)
        for budget, (_, steps) in clock.copies.items():
            began, title = time.process_time(), f"{method}@{budget}"
            predictions = [predict(budget, y) for y in test]
            seconds = round(budget + time.process_time() - began, 1)
            record[title] = dict(steps=steps, training=budget, seconds=seconds)
            out, flags = str(Path(args.out) / f"{title}_out.h5"), vars(args) | {"method": method, "steps": steps}
            with data.write_volumes(out, "prediction", method, flags, like=args.data) as add:
                for key, pred in zip(noisy[args.split], predictions, strict=True):
                    add(key, pred.shape, ["pred"])[0][:] = pred
            print(f"{title}: {steps} steps -> {out}", flush=True)
    (Path(args.out) / f"{method}.json").write_text(json.dumps(record, indent=1) + "\n")


def main(argv=None):
    p = runtime.parser(__doc__)
    p.add_argument("--data", required=True, help="dataset (.h5)")
    p.add_argument("--method", nargs="+", choices=METHODS, default=METHODS, help="default all")
    p.add_argument("--noise", default="gaussian:6/255", help="kind:level[:correlation], the truth, for those told it")
    p.add_argument("--seconds", nargs="+", type=int, default=[40, 400], help="of training (default 40 and 400)")
    p.add_argument("--split", choices=data.SPLITS, default="test", help="what is predicted (default test)")
    p.add_argument("--seed", type=int, default=0, help="default 0")
    p.add_argument("--out", required=True, help="folder for the predictions")
    args = p.parse_args(argv)
    runtime.check_outputs([args.data], [])
    Path(args.out).mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    for method in args.method:
        run(method, args)


if __name__ == "__main__":
    runtime.command(main)
