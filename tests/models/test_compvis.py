"""CompVis checkpoints: real-size names and shapes, and what the original code computed with small networks.

`tests/golden/compvis` holds the lists of the published files; the small networks are in the folder of that name below
the one GOLDEN_DIR names.
"""
import json

import numpy as np
import pytest
import torch
from golden_data import FOLDER, listed
from safetensors.torch import load_file

from s4s_nb.denoise import EpsDenoiser
from s4s_nb.models.compvis import FIRST_STAGE, UNET, compvis, ema_name, looks_like
from s4s_nb.schedule import DiscreteVPSchedule

FOLDER = FOLDER / "compvis"
TINY = [p.stem for p in FOLDER.glob("tiny_*.json")]
REAL = "sd_v1_4", "lsun_bedrooms_vq4", "cin256_v2_vq4"
TYPES = dict(float32=torch.float32, int32=torch.int32, int64=torch.int64)


def announced(name: str) -> tuple[dict, dict]:
    "All tensors of a published file, without memory, and its configuration"
    m = listed(FOLDER, "param_lists")["models"][name]
    with torch.device("meta"): state = {k: torch.empty(s, dtype=TYPES[t]) for k, (s, t, _) in m["tensors"].items()}
    return {k: v for k, v in state.items() if k != "alphas_cumprod"}, m["model_config"]["params"]

@pytest.mark.parametrize("name", REAL)
def test_every_tensor_of_a_published_file_finds_its_place(name):
    "`compvis` raises unless the translated names and shapes are those of the modules, no more and no less."
    state, params = announced(name)
    model = compvis(state, params)
    sizes = {UNET: model.unet, FIRST_STAGE: model.autoencoder}
    for prefix, module in sizes.items():
        elements = sum(v.numel() for k, v in state.items() if k.startswith(prefix))
        assert sum(v.numel() for v in module.state_dict().values()) == elements
    assert {"sd": "Stable", "ls": "LSUN", "ci": "ImageNet"}[name[:2]] in looks_like(state)

@pytest.mark.parametrize("name", REAL)
def test_names_of_averaged_weights(name):
    found = listed(FOLDER, "ema_name_maps")[name]
    assert len(found) > 300 and all(ema_name(k) == v for k, v in found.items())

@pytest.mark.parametrize("broken", ["another width", "a tensor missing", "a tensor too much", "another model"])
def test_files_that_do_not_fit_are_refused_by_name(broken):
    state, params = announced("lsun_bedrooms_vq4")
    some = "model_ema.diffusion_modelout2weight"
    if broken == "another model": params = announced("cin256_v2_vq4")[1]
    elif broken == "another width": state[some] = torch.empty(3, 7, device="meta")
    elif broken == "a tensor missing": del state[FIRST_STAGE + "decoder.conv_in.weight"]
    else: state[FIRST_STAGE + "decoder.mid.block_1.extra.weight"] = torch.empty(3, device="meta")
    with pytest.raises(ValueError, match="looks like LSUN-Bedrooms"): compvis(state, params)

def test_a_missing_average_is_said_aloud():
    state, params = announced("lsun_bedrooms_vq4")
    plain = {k: v for k, v in state.items() if not k.startswith("model_ema.")}
    with pytest.warns(UserWarning, match="368 of 368 tensors of the U-Net have no moving average"):
        compvis(plain, params)


@pytest.fixture(scope="module", params=TINY)
def tiny(request):
    "A small model of the original classes: parts, inputs and outputs, facts."
    about = json.loads((FOLDER / f"{request.param}.json").read_text())
    params = about["model_config"]["params"]
    if "clip_config" in about: params["cond_stage_config"]["clip_config"] = about["clip_config"]
    with np.load(FOLDER / f"{request.param}_io.npz") as z: io = {k: torch.from_numpy(z[k]) for k in z.files}
    return compvis(load_file(FOLDER / f"{request.param}.safetensors"), params), io, about

def context(model, io, what):
    "The condition that an output was computed with"
    if model.condition is None: return {}
    if torch.is_tensor(model.condition): contexts = model.condition[io["class_labels"], None]
    else: contexts = model.condition(io["clip_input_ids"]).last_hidden_state
    return dict(encoder_hidden_states=contexts[what])

@torch.no_grad()
def test_networks_compute_what_the_originals_did(tiny):
    model, io, about = tiny
    out = model.unet(io["unet_x"], io["unet_timesteps"], **context(model, io, slice(None))).sample
    wanted = io["unet_out_ema" if about["use_ema"] else "unet_out"]
    assert (out - wanted).abs().max() < 1e-4
    image = model.autoencoder.decode(io["decode_latent"] / about["scale_factor"]).sample
    assert (image - io["decode_image"]).abs().max() < 1e-4
    if "clip_last_hidden_state" in io:
        text = model.condition(io["clip_input_ids"]).last_hidden_state
        assert (text - io["clip_last_hidden_state"]).abs().max() < 1e-4
    if "class_embedding" in io: assert torch.equal(model.condition[io["class_labels"], None], io["class_embedding"])
    assert (model.alphas_cumprod[io["ddim_timesteps"]].float() - io["ddim_alphas"]).abs().max() < 1e-6

@torch.no_grad()
def test_sampling_as_the_originals_did(tiny):
    "DDIM with five steps, guided where they guided, by our denoiser."
    model, io, about = tiny
    def net(x, t, **cond): return model.unet(x, t, **cond).sample
    schedule = DiscreteVPSchedule(model.alphas_cumprod)
    denoiser = EpsDenoiser(net, schedule, net_time=lambda t: 1000 * t - 1)
    x, steps = io["sample_x_T"], io["ddim_timesteps"].flip(0).tolist()
    cond, null = context(model, io, slice(0, 2)), context(model, io, slice(-1, None))
    if "clip_uncond_last_hidden_state" in io: null = dict(encoder_hidden_states=io["clip_uncond_last_hidden_state"][:1])
    for t, a, previous in zip(steps, io["ddim_alphas"].flip(0), io["ddim_alphas_prev"].flip(0)):
        now = torch.tensor((t + 1) / 1000, dtype=torch.float64)
        x_0 = denoiser(x, now, **cond)
        if cond:
            scale, unguided = about["guidance_scale"], {k: v.expand_as(cond[k]) for k, v in null.items()}
            x_u = denoiser(x, now, **unguided)
            x_0 = x_u + scale * (x_0 - x_u)
        eps = (x - a.sqrt() * x_0) / (1 - a).sqrt()
        x = previous.sqrt() * x_0 + (1 - previous).sqrt() * eps
    assert (x - io["ddim_eta0_latent"]).abs().max() < 1e-3
    image = model.autoencoder.decode(x[:1] / about["scale_factor"]).sample
    assert (image - io["ddim_eta0_image"]).abs().max() < 1e-3
