"""Stage 3: DDIM agrees with diffusers and with the exact Gaussian case; SRDS cancels what is odd."""

import json

import diffusers
import h5py
import numpy as np
import pytest
import torch
from conftest import ok, run

import data
from bsn import PUCA, estimator
from diffusion import alpha_bar
from distill import NAFNet, ResUNet
from evaluate import score
from srds import chain, ddim, sampler, srds, timesteps


def gaussian_score(abar, mean, sd):
    """The exact eps of data N(mean, sd^2): linear in x_t."""

    def eps_model(x, c, t):
        a = abar.to(x)[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * sd**2 + 1 - a)

    return eps_model


@pytest.mark.parametrize("steps", [1, 7, 25, 250])
def test_linear_score_pair_equals_zero(steps):
    """For an exact linear score SRDS equals the run from x_T = 0, to 1e-10, and both are the conditional mean.

    Fails if the sign of -eps is dropped: one sample stays 0.2 away.
    """
    abar = alpha_bar(1000, least=0)
    mean, eps = torch.rand(2, 1, 8, 8, dtype=torch.double), torch.randn(2, 1, 8, 8, dtype=torch.double)
    half = torch.full_like(mean, 0.3)
    model = gaussian_score(abar, torch.cat([mean, mean]), 0.2)
    pair, spread = srds(model, half, eps, abar, steps)
    zero = ddim(gaussian_score(abar, mean, 0.2), torch.zeros_like(eps), half, abar, steps)
    torch.testing.assert_close(pair, zero, rtol=0, atol=1e-10)
    torch.testing.assert_close(pair, mean, rtol=0, atol=1e-4)
    single = ddim(gaussian_score(abar, mean, 0.2), eps, half, abar, steps)
    torch.testing.assert_close(single, pair + spread, rtol=0, atol=1e-10)
    assert steps < 25 or (single - mean).std() > 0.1


def test_samples_have_the_data_s_spread():
    """With many steps one sample of N(0.5, 0.2^2) has that mean and spread: fails if the end is not alpha_bar = 1."""
    abar = alpha_bar(1000, least=0)
    x = ddim(
        gaussian_score(abar, 0.5, 0.2),
        torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0), dtype=torch.double),
        None,
        abar,
        1000,
    )
    assert x.mean().item() == pytest.approx(0.5, abs=0.004) and x.std().item() == pytest.approx(0.2, rel=0.02)


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_ddim_agrees_with_diffusers(steps):
    """Same start, dummy model, trailing spacing, to 1e-5."""
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    scheduler.alphas_cumprod = alpha_bar(1000, least=0)  # theirs, in float64 so that only the formula is compared
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.double)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == timesteps(1000, steps)

    def model(x, c, t):
        return torch.tanh(0.5 * x) + 0.1 * torch.cos(t.double() / 100).view(-1, 1, 1, 1)

    x = start = torch.randn(2, 1, 6, 6, dtype=torch.double)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, None, t.expand(2)), t, x).prev_sample
    torch.testing.assert_close(ddim(model, start, None, scheduler.alphas_cumprod, steps), x, rtol=1e-5, atol=1e-5)


def test_pair_is_even_in_its_noise():
    abar, c = alpha_bar(1000), torch.zeros(1, 1, 8, 8)
    eps = torch.randn(1, 1, 8, 8)

    def model(x, c, t):
        return torch.tanh(x) + 0.05 * x**2

    (mean, half), (mean2, half2) = srds(model, c, eps, abar, 5), srds(model, c, -eps, abar, 5)
    torch.testing.assert_close(mean, mean2)
    torch.testing.assert_close(half, -half2)


def test_steps_out_of_range():
    with pytest.raises(ValueError, match="1 to 10"):
        timesteps(10, 11)


def arrays(path, key="pred"):
    with h5py.File(path) as f:
        return {n: g[key][:] for n, g in f["volumes"].items() if key in g}


def test_result_does_not_depend_on_the_batch(made):
    """Networks whose every weight is random, in float32: slice by slice or all at once, to 1e-5."""
    torch.manual_seed(0)
    state = torch.load(made / "diffusion.pt", weights_only=True)
    for w in state["ema"].values():
        w += 0.05 * torch.randn_like(w)
    torch.save(state, made / "random.pt")
    for batch in (1, 3):
        flags = ["--steps", 3, "--precision", "float32", "--batch", batch, "--out", f"batch{batch}.h5"]
        ok("srds", "--cond", "bsn_out.h5", "--model", "random.pt", *flags, cwd=made)
    a, b = arrays(made / "batch1.h5"), arrays(made / "batch3.h5")
    for name in a:
        assert a[name].std() > 0.01
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("network", [PUCA, NAFNet, ResUNet])
def test_networks_do_not_depend_on_the_batch(network):
    torch.manual_seed(0)
    net, y = network(width=8, enc_blocks=(1,), middle_blocks=1, dec_blocks=(1,)).eval(), torch.rand(3, 1, 40, 33)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    with torch.inference_mode():
        torch.testing.assert_close(net(y), torch.cat([net(one) for one in y.split(1)]), rtol=0, atol=1e-5)


def test_modes(made):
    """Every mode writes what it says; the pair has its std, and its noise differs from slice to slice."""
    for mode in ("single", "independent", "zero", "pair"):
        flags = ["--mode", mode, "--pairs", 2, "--steps", 2, "--split", "test", "--out", f"{mode}.h5"]
        ok("srds", "--cond", "bsn_out.h5", *flags, cwd=made)
        assert list(arrays(made / f"{mode}.h5")) == ["v1"]
    assert not arrays(made / "zero.h5", "std") and not arrays(made / "single.h5", "std")
    std = arrays(made / "pair.h5", "std")["v1"]
    assert (std >= 0).all() and std.mean() > 1e-3 and not np.array_equal(std[0], std[1])


def test_chain_is_what_the_files_hold_and_its_error_can_be_estimated(made, tmp_path):
    """bsn.pt+diffusion.pt as one denoiser: a function of the noisy image; its estimated PSNR is near the true one."""
    denoise = chain(estimator(made / "bsn.pt"), sampler(made / "diffusion.pt"))
    y = torch.rand(2, 2 * denoise.context + 1, 40, 48)
    assert torch.equal(denoise(y), denoise(y)) and denoise(y).shape == (2, 1, 40, 48)
    flags = ["--data", made / "knee.h5", "--noise", "gaussian:6/255", "--json", tmp_path / "found.json"]
    model = f"pair={made / 'bsn.pt'}+{made / 'diffusion.pt'}"
    ok("evaluate", "--no-reference", *flags, "--model", model, cwd=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())["pair"]
    true = score(made / "knee.h5", made / "srds_out.h5", "test")["psnr"]
    assert abs(found["psnr"] + 10 * np.log10(np.mean(10 ** (-true / 10)))) < 0.5


def test_shared_starting_noise(made, tmp_path):
    """--shared 1: slices with the same condition get the same sample; 0: not; anything outside is refused."""
    same = tmp_path / "same.h5"
    with data.write_volumes(same, "prediction", "test", like=made / "bsn_out.h5") as add:
        (pred,) = add("v0", (3, 48, 40), ["pred"])
        pred[:] = data.read_volumes(made / "bsn_out.h5", "pred")["v0"][:1]
    flags = ["--cond", "same.h5", "--model", made / "diffusion.pt", "--mode", "single"]
    for share, out in ((1, "one.h5"), (0, "own.h5")):
        ok("srds", *flags, "--shared", share, "--out", out, cwd=tmp_path)
    one, own = (data.read_volumes(tmp_path / name, "pred")["v0"] for name in ("one.h5", "own.h5"))
    assert np.allclose(one[0], one[2], atol=1e-5) and not np.allclose(own[0], own[2], atol=1e-2)
    assert "--shared 2 is not from 0 to 1" in run("srds", *flags, "--shared", 2, cwd=tmp_path).stderr
