"""SAELens and sae_hooks on the same files: do they compute the same features and reconstructions?

    python benchmarks/compare_saelens.py [--env FOLDER]   # makes SAELens' own environment on the first run (2 GB)
    python benchmarks/compare_saelens.py --saes FOLDER    # SAEs that sae_hooks trained instead, a folder each in FOLDER

or run it with an interpreter that has sae_lens and what sae_hooks needs.

Each file is random, of the published shape (widths cut to 4k), made here and served by the tests' loopback Hub. SAELens
reads it with its own loader, sae_hooks with `load_sae`; both encode the same float32 activations on the CPU, and
decode the same features. Columns: average L0; largest difference of encode and decode, relative to the largest value;
(token, feature) pairs that are active in one only, which float32 rounding at a threshold explains in ones and twos.
"""

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import venv
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEER = "sae-lens==6.54.12"
TOKENS, WIDTH = 256, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path(tempfile.gettempdir()) / "sae_hooks-saelens",
                        help="folder for SAELens' environment, made if sae_lens cannot be imported")
    parser.add_argument("--saes", type=Path, help="folder of trained SAEs, as the runs/ of benchmarks/pareto.py")
    args = parser.parse_args()
    if importlib.util.find_spec("sae_lens") is None:
        command = [_interpreter(args.env), __file__, *(["--saes", args.saes] if args.saes else [])]
        sys.exit(subprocess.run(command, check=False).returncode)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    compare(args.saes)


def _interpreter(env: Path) -> Path:
    """The peer's interpreter; torch first and of this version, so that both sides run the same kernels."""
    python = env / "bin" / "python"
    if not python.exists():
        import torch

        venv.create(env, with_pip=True)
        for package in (f"torch=={torch.__version__.partition('+')[0]}", PEER):
            subprocess.run([python, "-m", "pip", "install", "-q", package], check=True)
    return python


def compare(saes: Path | None) -> None:
    import loopback  # before huggingface_hub
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    print(_header(), "" if saes else f"{WIDTH} features, ", "float32", sep="")
    print(f"{'what':58} {'L0':>6} {'encode':>9} {'decode':>9} {'differ':>7}  site")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            made = (published(loopback.HUB), ours(Path(temporary)), theirs(Path(temporary)))
            for case in chain(*made) if saes is None else trained(saes):
                print(_row(*case), flush=True)
    finally:
        loopback.stop()


# --- files as Google published them, read by both -----------------------------------------------------------

def published(hub):
    """(name, SAELens' SAE, ours, activations) for each kind of Gemma Scope and Gemma Scope 2."""
    from sae_lens.loading.pretrained_sae_loaders import (
        gemma_2_sae_huggingface_loader,
        gemma_2_transcoder_huggingface_loader,
        gemma_3_sae_huggingface_loader,
    )

    scope = "layer_12/width_4k/average_l0_82"
    for repo, folder, d_in, loader in [
            ("gemma-scope-2b-pt-res", scope, 2304, gemma_2_sae_huggingface_loader),
            ("gemma-scope-2b-pt-mlp", scope, 2304, gemma_2_sae_huggingface_loader),
            ("gemma-scope-2b-pt-att", scope, 2048, gemma_2_sae_huggingface_loader),
            ("gemma-scope-2b-pt-transcoders", scope, 2304, gemma_2_transcoder_huggingface_loader),
            ("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_44", 2304, gemma_2_sae_huggingface_loader)]:
        _npz(hub.repo(f"google/{repo}").dir / folder / "params.npz", d_in, embedding=folder.startswith("embedding"))
        yield _both(f"google/{repo}", folder, loader, d_in)
    for folder in ("resid_post/layer_7_width_4k_l0_medium", "attn_out/layer_7_width_4k_l0_big",
                   "mlp_out_all/layer_7_width_4k_l0_small", "transcoder/layer_7_width_4k_l0_big",
                   "transcoder/layer_7_width_4k_l0_big_affine"):
        repo = "google/gemma-scope-2-1b-pt"
        _gemma_3(hub.repo(repo).dir / folder, folder)
        yield _both(repo, folder, gemma_3_sae_huggingface_loader, 1152)


def _both(repo, folder, loader, d_in):
    import torch
    from sae_lens import SAE

    from sae_hooks.hub import load_sae

    peer = SAE.from_pretrained(repo, folder, converter=loader)
    mine = load_sae(f"{repo}/{folder}")
    scale = d_in**0.5 if folder.startswith("embedding") else 1.0  # embed_tokens' output, and SAELens' hook_embed
    return f"{repo.removeprefix('google/')}/{folder}", peer, mine, torch.randn(TOKENS, d_in) * scale


def _arrays(d_in, seed=0):
    """A decoder of unit rows, its transpose as the encoder, and thresholds that about 80 of 4096 features pass."""
    import numpy as np

    draw = np.random.default_rng(seed)
    W_dec = draw.standard_normal((WIDTH, d_in), dtype=np.float32)
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    return {"W_enc": np.ascontiguousarray(W_dec.T), "W_dec": W_dec,
            "b_enc": draw.standard_normal(WIDTH, dtype=np.float32) * 0.1,
            "b_dec": draw.standard_normal(d_in, dtype=np.float32) * 0.1,
            "threshold": (2.0 + 0.2 * draw.random(WIDTH, dtype=np.float32)).astype(np.float32)}


def _npz(path, d_in, *, embedding):
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = _arrays(d_in)
    if embedding:
        arrays["b_dec"] *= 0  # SAELens leaves b_dec at the scale of the bare rows; sae_hooks scales it as W_dec
    np.savez(path, **arrays)


def _gemma_3(folder, name):
    import json

    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    found = {{"W_enc": "w_enc", "W_dec": "w_dec"}.get(k, k): torch.from_numpy(v) for k, v in _arrays(1152).items()}
    if name.endswith("affine"):
        found["affine_skip_connection"] = torch.randn(1152, 1152) * 0.03
    save_file(found, folder / "params.safetensors")
    layer, kind = "model.layers.7.", name.split("/")[0].removesuffix("_all")
    read = {"resid_post": "output", "attn_out": "self_attn.o_proj.input",
            "transcoder": "pre_feedforward_layernorm.output", "mlp_out": "post_feedforward_layernorm.output"}[kind]
    write = "post_feedforward_layernorm.output" if kind == "transcoder" else read
    (folder / "config.json").write_text(json.dumps({
        "architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "width": WIDTH, "l0": 50, "type": "sae",
        "hf_hook_point_in": layer + read, "hf_hook_point_out": layer + write,
        "affine_connection": name.endswith("affine")}))


# --- folders that sae_hooks wrote, read by SAELens -----------------------------------------------------------

def ours(folder):
    """(name, SAELens' SAE, ours, activations) for what save_pretrained writes, and for the SAE of the demo."""
    import torch
    from sae_lens import SAE as Peer

    from sae_hooks.hub import load_sae, save_pretrained
    from sae_hooks.sae import SAE

    t = {name: torch.from_numpy(array) for name, array in _arrays(576).items()}
    site, other = "model.layers.7.output", "model.layers.7.mlp.output"
    plain = (t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"])
    made = {
        "jumprelu": SAE(*plain, threshold=t["threshold"], site=site),
        "jumprelu in bfloat16": SAE(*plain, threshold=t["threshold"], site=site).to(torch.bfloat16),
        "relu": SAE(*plain, threshold=torch.zeros(WIDTH), site=site),
        "topk": SAE(*plain, k=40, site=site),
        "transcoder": SAE(*plain, threshold=t["threshold"], site="model.layers.7.mlp.input", site_out=other),
        "transcoder with skip": SAE(*plain, threshold=t["threshold"], W_skip=torch.randn(576, 576) * 0.03,
                                    site="model.layers.7.mlp.input", site_out=other),
        "self_attn.o_proj.input": SAE(*plain, threshold=t["threshold"], site="model.layers.7.self_attn.o_proj.input"),
    }
    for name, sae in made.items():
        path = save_pretrained(sae, folder / name.replace(" ", "-"))
        yield f"written by sae_hooks: {name}", Peer.load_from_disk(path), sae.float(), torch.randn(TOKENS, 576)
    demo = ROOT / "examples" / "sae-smollm2-135m"
    if (demo / "cfg.json").exists():
        mine = load_sae(demo).float()
        x = torch.randn(TOKENS, mine.d_in) * mine.metadata.get("typical_norm", 24.0) / mine.d_in**0.5
        yield "written by sae_hooks: the demo's, for SmolLM2-135M", Peer.load_from_disk(demo), mine, x


def trained(folder):
    """(name, SAELens' SAE, ours, activations) for each SAE in a folder, on activations of the norm that it knows."""
    import torch
    from sae_lens import SAE as Peer

    from sae_hooks.hub import load_sae

    for path in sorted(config.parent for config in folder.glob("*/cfg.json")):
        mine = load_sae(path).float()
        x = torch.randn(TOKENS, mine.d_in) * mine.metadata["typical_norm"] / mine.d_in**0.5 + mine.b_dec
        yield path.name, Peer.load_from_disk(path), mine, x


# --- folders that SAELens wrote, read by sae_hooks -----------------------------------------------------------

def theirs(folder):
    """(name, SAELens' SAE, ours, activations) for every architecture that SAELens writes and sae_hooks reads."""
    import torch
    from sae_lens import saes

    from sae_hooks.hub import load_sae

    for name, kind, settings in [
            ("standard", "StandardSAE", {"apply_b_dec_to_input": False}),
            ("standard, b_dec subtracted", "StandardSAE", {"apply_b_dec_to_input": True}),
            ("gated, b_dec subtracted", "GatedSAE", {"apply_b_dec_to_input": True}),
            ("jumprelu, b_dec subtracted", "JumpReLUSAE", {"apply_b_dec_to_input": True}),
            ("topk", "TopKSAE", {"apply_b_dec_to_input": False, "k": 40}),
            ("topk, b_dec subtracted, rescaled by norms", "TopKSAE",
             {"apply_b_dec_to_input": True, "k": 40, "rescale_acts_by_decoder_norm": True}),
            ("transcoder", "Transcoder", {"d_out": 320}), ("skip transcoder", "SkipTranscoder", {"d_out": 320}),
            ("jumprelu skip transcoder", "JumpReLUSkipTranscoder", {"d_out": 320})]:
        config = getattr(saes, kind + "Config")(d_in=576, d_sae=WIDTH, **{"apply_b_dec_to_input": False} | settings)
        config.metadata.hook_name = "blocks.7.hook_resid_post"
        config.metadata.hook_name_out = "blocks.8.hook_resid_post"
        peer = getattr(saes, kind)(config)
        for parameter_name, parameter in peer.named_parameters():
            spread = {"W_enc": 0.05, "W_dec": 0.05, "W_skip": 0.03, "threshold": 0.5}.get(parameter_name, 0.2)
            parameter.data = torch.randn_like(parameter) * spread
            if parameter_name == "threshold":
                parameter.data = parameter.data.abs() + 1.5
        path = folder / ("peer-" + name.replace(" ", "-"))
        peer.save_model(path)
        yield f"written by SAELens: {name}", peer, load_sae(path), torch.randn(TOKENS, 576)


# --- the comparison ------------------------------------------------------------------------------------------

def _row(name, peer, mine, x):
    import torch

    heads = x.reshape(TOKENS, 4, -1) if peer.cfg.reshape_activations == "hook_z" else x
    with torch.no_grad():
        theirs_acts, acts = peer.encode(heads), mine.encode(x)
        wide = _widened(mine)
        truth = wide.encode(x.double())
        x_hat = peer.decode(theirs_acts).reshape(TOKENS, -1)
        if hasattr(peer, "W_skip"):
            x_hat = peer(heads).reshape(TOKENS, -1)
        decoded = mine.decode(theirs_acts) + mine.skip(x)
    differ = int(((theirs_acts > 0) != (acts > 0)).sum())
    rounded = int(((truth > 0) != (acts > 0)).sum())
    both = (theirs_acts > 0) & (acts > 0)
    encode = float(((theirs_acts - acts) * both).abs().max() / theirs_acts.abs().max())
    decode = float((x_hat - decoded).abs().max() / x_hat.abs().max())
    assert encode < 1e-5, name
    assert decode < 1e-5, name
    assert differ <= 3 + rounded, name
    l0 = float((acts > 0).sum(1).float().mean())
    return f"{name[:58]:58} {l0:6.1f} {encode:9.1e} {decode:9.1e} {differ:7d}  {mine.site}"


def _widened(sae):
    import copy

    return copy.deepcopy(sae).double()


def _header():
    import sae_lens
    import torch
    import transformers

    cpu = f"{os.cpu_count()}-core {'AVX2' if 'avx2' in _cpu_flags() else ''} CPU".replace("  ", " ")
    return (f"SAELens {sae_lens.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
            f"Python {platform.python_version()}, {cpu}; {TOKENS} random tokens, ")


def _cpu_flags():
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
