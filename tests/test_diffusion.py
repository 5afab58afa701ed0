"""Stage 2: schedule, loss, network."""

import diffusers
import pytest
import torch
from conftest import TINY, make_dataset, ok, run

import data
import diffusion
from bsn import PUCA, hide
from diffusion import UNet, alpha_bar, diffusion_loss, eps_model


@pytest.mark.parametrize("T", [50, 1000])
def test_schedule_agrees_with_diffusers(T):
    theirs = diffusers.DDIMScheduler(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    torch.testing.assert_close(alpha_bar(T, least=0).float(), theirs, rtol=1e-5, atol=1e-7)


def test_schedule_ends_in_noise_and_keeps_its_beginning():
    full, kept = alpha_bar(1000, least=0), alpha_bar(1000)
    assert torch.equal(full[: len(kept)], kept)
    assert 0.02 <= kept[-1].sqrt() < 0.025 and full[len(kept)].sqrt() < 0.02
    assert full[0] > 0.999 and (full.diff() < 0).all()


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_loss_is_zero_for_the_truth_and_one_for_one(predict):
    """Eqs. 1-2 from the outside: a network that undoes Eq. 1 has no loss; one that is off by 1 has loss 1."""
    torch.manual_seed(0)
    x0, eps = torch.randn(2, 6, 1, 8, 8)
    abar, t = alpha_bar(1000), torch.tensor([0, 3, 100, 500, 800, 980])
    a = abar.float()[t].view(-1, 1, 1, 1)

    def knows(x_t, c, t, offset=0.0):
        e = (x_t - a.sqrt() * x0) / (1 - a).sqrt()
        return (e - (1 - a).sqrt() * x_t) / a.sqrt() + offset

    def loss(network):
        return diffusion_loss(network, x0, x0, abar, t, eps, predict).item()

    assert loss(knows) == pytest.approx(0, abs=2e-3)
    weight = a.sqrt().mean().item() if predict == "eps" else 1  # an error of v counts sqrt(abar) in eps
    assert loss(lambda *z: knows(*z, offset=1.0)) == pytest.approx(weight, abs=2e-3)
    torch.testing.assert_close(  # and what was trained is what is sampled
        eps_model(knows, abar)(a.sqrt() * x0 + (1 - a).sqrt() * eps, None, t), eps, rtol=0, atol=2e-3
    )


def test_v_and_eps_say_the_same():
    abar, t = alpha_bar(1000), torch.tensor([0, 400, 950])
    x0, eps = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    a = abar.float()[t].view(-1, 1, 1, 1)
    x_t, v = a.sqrt() * x0 + (1 - a).sqrt() * eps, diffusion.velocity(x0, eps, a)
    torch.testing.assert_close(eps_model(lambda *_: v, abar)(x_t, None, t), eps, rtol=1e-4, atol=1e-4)


def test_published_sizes():
    """improved DDPM with one condition channel: 124.05 M at 256 pixels, 92.02 M with its 64-pixel multipliers."""
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet().parameters()) == 124_049_793
        assert sum(p.numel() for p in UNet(mult=(1, 2, 3, 4), attention=(2, 3)).parameters()) == 92_022_273


@pytest.mark.parametrize(
    "kw",
    [
        dict(width=8, mult=(1, 2), blocks=1, attention=(), patch=2, groups=0),
        dict(width=8, mult=(1, 2, 2, 2, 2, 2), blocks=1, attention=(5,), patch=1, groups=4),
    ],
)
def test_any_size_from_16(kw):
    torch.manual_seed(0)
    net = UNet(**kw)
    for p in net.parameters():  # layers that start at zero would hide what the network looks at
        p.data += 0.1 * torch.randn_like(p)
    for h, w in [(16, 16), (17, 16), (37, 53)]:
        x, t = torch.randn(2, 1, h, w), torch.tensor([10, 900])
        out = net(x, x, t)
        assert out.shape == x.shape
        for changed in (net(x, x + 1, t), net(x, x, t + 50)):
            assert (changed - out).abs().max() > 1e-4


def test_x_and_image_are_inverse():
    y, c = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4)
    for target in ("image", "residual"):
        x = diffusion.to_x(y, c, target, 0.03)
        torch.testing.assert_close(diffusion.to_image(x, c, target, 0.03), y)
        one = diffusion.to_x(y + diffusion.unit(target, 0.03), c, target, 0.03) - x
        torch.testing.assert_close(one, torch.ones_like(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blind_spot", [1, 5, 9])
def test_a_hidden_condition_knows_nothing_of_the_hidden_pixels(blind_spot):
    """The loss on a class does not change at all with the noisy values of that class, but through what is diffused."""
    torch.manual_seed(0)
    bsn = PUCA(width=8, enc_blocks=(1,), middle_blocks=1, dec_blocks=(1,), dense=True, blind_spot=blind_spot).double()
    net = UNet(width=8, mult=(1, 2), blocks=1, attention=(), groups=0)
    for p in [*bsn.parameters(), *net.parameters()]:
        p.data += 0.1 * torch.randn_like(p)
    x0, eps, y = (torch.randn(1, 1, 24, 31) for _ in range(3))
    y = y.double()
    row, column = 1, bsn.stride - 1
    mask = torch.zeros_like(y)
    mask[..., row :: bsn.stride, column :: bsn.stride] = 1
    losses = {}
    with torch.no_grad():
        for name, noisy in (("before", y), ("after", y + mask * torch.randn_like(y))):
            for kind, seen in (("hidden", hide(noisy, bsn.stride, row, column)), ("plain", noisy)):
                t = torch.tensor([300])
                losses[kind, name] = diffusion_loss(
                    net, x0, bsn(seen).float(), alpha_bar(), t, eps, "v", mask.float()
                ).item()
    assert losses["hidden", "before"] == losses["hidden", "after"]
    assert losses["plain", "before"] != losses["plain", "after"]


def test_mask_counts_only_its_pixels():
    x0, eps, t = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([5, 500])
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :3] = 1

    def net(x, c, t):
        return torch.zeros_like(x)

    whole = [diffusion_loss(net, x0, x0, alpha_bar(), t, eps, "v", m) for m in (None, mask, 1 - mask)]
    share = mask.mean()
    torch.testing.assert_close(whole[1] * share + whole[2] * (1 - share), whole[0])


def test_hidden_command(tmp_path):
    """Every blind spot's hidden pixels; each pair has noise of its own."""
    make_dataset(tmp_path / "knee.h5")
    for blind_spot in (1, 9):
        ok("bsn", "--data", "knee.h5", "--hidden", "--blind-spot", blind_spot, *TINY["bsn"], cwd=tmp_path)
        flags = ["--data", "knee.h5", "--cond", "bsn_out.h5", *TINY["diffusion"]]
        ok("diffusion", *flags, "--condition", "hidden", cwd=tmp_path)
        classes = diffusion.read_hidden(tmp_path / "bsn_out.h5", ["v0"])
        seen = sum(masks["v0"].sum() for _, masks in classes)
        assert len(classes) == 4 and seen == pytest.approx(classes[0][1]["v0"].size * {1: 1, 9: 4 / 64}[blind_spot])
        if blind_spot == 1:  # a hidden pixel is predicted from the same surroundings but for the other hidden ones
            plain = data.read_volumes(tmp_path / "bsn_out.h5", "pred", names=["v0"])["v0"]
            assert 0 < max(abs(c["v0"] - plain).max() for c, _ in classes) < 0.5
    for mode in ("pair", "zero", "single", "independent"):
        ok("srds", "--cond", "bsn_out.h5", "--mode", mode, "--out", f"{mode}.h5", cwd=tmp_path)
    ok("srds", "--cond", "bsn_out.h5", "--pairs", 2, "--out", "pairs.h5", cwd=tmp_path)
    one, two = (data.read_volumes(tmp_path / f, "pred")["v0"] for f in ("pair.h5", "pairs.h5"))
    assert 0 < abs(one - two).max()
    ok("bsn", "--data", "knee.h5", "--out", "plain.h5", *TINY["bsn"], cwd=tmp_path)
    done = run("diffusion", *flags, "--cond", "plain.h5", "--condition", "hidden", cwd=tmp_path)
    assert done.returncode == 2 and "no 'hidden'" in done.stderr


def test_a_condition_that_is_the_noisy_image_is_refused(made, tmp_path):
    """Nothing is left to diffuse: one line, before any training."""
    with data.write_volumes(tmp_path / "same.h5", "prediction", "test", like=made / "knee.h5") as add:
        for name, y in data.read_volumes(made / "knee.h5").items():
            add(name, y.shape, ["pred"])[0][:] = y
    flags = ["--data", made / "knee.h5", "--cond", "same.h5", *TINY["diffusion"]]
    done = run("diffusion", *flags, cwd=tmp_path)
    assert (
        done.returncode == 2 and "holds the noisy images of" in done.stderr and not (tmp_path / "diffusion.pt").exists()
    )


def test_snapshots(made, tmp_path):
    """Checkpoints on the way, the last of which is the model itself; each can be sampled."""
    flags = ["--data", made / "knee.h5", "--cond", made / "bsn_out.h5", *TINY["diffusion"], "--snapshots", 2]
    ok("diffusion", *flags, "--model", "a.pt", cwd=tmp_path)
    half, whole, model = (
        torch.load(tmp_path / name, weights_only=True) for name in ("a_1_of_2.pt", "a_2_of_2.pt", "a.pt")
    )
    assert (half["step"], whole["step"]) == (2, 4) and "optimizer" not in half
    key = "intro.weight"
    assert torch.equal(whole["ema"][key], model["ema"][key]) and not torch.equal(half["ema"][key], whole["ema"][key])
    ok("srds", "--cond", made / "bsn_out.h5", "--model", "a_1_of_2.pt", "--out", "half.h5", cwd=tmp_path)


def test_width_must_be_a_multiple_of_the_groups():
    with pytest.raises(ValueError, match="width 20 is not a multiple of the 8 groups"):
        UNet(width=20, mult=(1,), groups=8, attention=())
