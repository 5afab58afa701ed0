"""Each core section runs when it is cut out of its file and pasted elsewhere; so does the README's example."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

BANNER = "# " + "-" * 20
USES = {
    "bsn": "net = PUCA(width=8, enc_blocks=(1,), middle_blocks=1, dec_blocks=(1,))\n"
    "blind_spot_loss(net(torch.rand(1, 1, 20, 17)), torch.rand(1, 1, 20, 17)).backward()\n"
    "LGBPN(width=8, blocks=(1, 1))(torch.rand(1, 1, 20, 17))",
    "baselines": "y, rng = torch.rand(1, 1, 16, 16), __import__('numpy').random.default_rng()\n"
    "net = N2NUNet(width=4)\n"
    "(noise2self_loss(net, y, 4, 3) + neighbor2neighbor_loss(net, y, *neighbors(16, 16, rng), 1)).backward()",
    "diffusion": "y = c = torch.rand(2, 1, 32, 32); t = torch.tensor([1, 2])\n"
    "net = UNet(width=8, mult=(1, 2), blocks=1, attention=(), groups=0)\n"
    "x = to_x(y, c, 'residual', 0.03)\n"
    "diffusion_loss(net, x, scaled(c), alpha_bar(), t, torch.randn_like(x)).backward()\n"
    "assert to_image(x, c, 'residual', 0.03).equal(y)",
    "srds": "x, abar = torch.rand(1, 1, 8, 8), torch.linspace(0.99, 0.01, 10)\n"
    "m, h = srds(lambda x, c, t: x, x, torch.randn_like(x), abar, 5)\n"
    "assert m.abs().max() < 1e-6 < h.abs().max()",
    "distill": "net = NAFNet(width=8, enc_blocks=(1,), middle_blocks=1, dec_blocks=(1,))\n"
    "psnr_loss(net(torch.rand(1, 1, 20, 17)), 0).backward()\n"
    "net = ResUNet(width=8)\n"
    "recorruption_loss(net, torch.rand(1, 1, 20, 17), torch.rand(1, 1, 20, 17)).backward()",
    "noise": "assert add(np.zeros((8, 8)), 'gaussian', 0.1, 0.5).std() > 0.01\n"
    "m = known('poisson', 100); assert variance(m, 0.5) == 0.005; sample(m, np.zeros((8, 8)), np.random.default_rng())",
    "measure": "y = [add(np.full((128, 128), 0.5), 'gaussian', 0.1) for _ in range(4)]\n"
    "m = measure(y); assert abs(variance(m, 0.5) - 0.01) < 0.001",
    "posterior": "assert update(0.5, 0.7, 0.02, 0.01) == 0.6\n"
    "wiener(np.random.randn(20, 30), lambda h, w: np.ones((h, w)))",
}
ALLOWED = {
    "baselines": {"torch"},
    "bsn": {"torch", "einops"},
    "diffusion": {"torch", "einops", "math"},
    "srds": {"torch"},
    "distill": {"torch"},
    "noise": {"numpy", "scipy"},
    "measure": {"numpy", "scipy", "itertools"},
    "posterior": {"numpy", "scipy"},
}


def core(stage):
    """The text between the banner that begins with `# core` and the next banner."""
    folder = ROOT if (ROOT / f"{stage}.py").exists() else ROOT / "experiments"
    lines = (folder / f"{stage}.py").read_text().splitlines()
    banners = [k for k, line in enumerate(lines) if line.startswith(BANNER)]
    start = next(k for k, line in enumerate(lines) if line.startswith("# core"))
    end = next(k for k in banners if k > start + 1)
    return "\n".join(lines[start + 2 : end])


@pytest.mark.parametrize("stage", USES)
def test_core_stands_alone(stage, tmp_path):
    text = core(stage)
    imported = {
        n.name.split(".")[0] for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for n in node.names
    }
    imported |= {node.module.split(".")[0] for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    if stage == "measure":  # stands on the core of noise.py, pasted above it
        line = next(line for line in text.splitlines() if line.startswith("from lib.blocks import"))
        text = text.replace(line, (ROOT / "lib/blocks.py").read_text())
        text = text.replace("from noise import DARK, REACH, make_noise_model, sample, variance\n", core("noise"))
        imported -= {"noise", "lib"}
    assert imported <= ALLOWED[stage]
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"{text}\n{USES[stage]}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_s_example_runs(tmp_path):
    """Its first block of Python, as it stands, from the project's folder."""
    text = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_block_has_one_source():
    """DenseBlock stands in two cores, because each must run alone; the two are the same, word for word."""
    bodies = []
    for stage in ("bsn", "distill"):
        body = [node for node in ast.parse((ROOT / f"{stage}.py").read_text()).body if hasattr(node, "name")]
        bodies.append({node.name: ast.dump(node) for node in body if node.name in ("DenseBlock", "stack")})
    assert len(bodies[0]) == 2 and bodies[0] == bodies[1]
