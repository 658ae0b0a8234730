"""Our networks against the official ones: same outputs for the same weights, same parameter names and shapes.

The numbers are in `tests/golden/edm_networks`, or in the folder of that name below the one GOLDEN_DIR names.
"""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_data import listed

from s4s_nb.models.adm import ADM_CONFIGS, DhariwalUNet, adm_unet
from s4s_nb.models.networks import SONG_CONFIGS, EDMPrecond, SongUNet, VEPrecond, VPPrecond, song_unet

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parents[1] / "golden")) / "edm_networks"
TOLERANCE = 1e-4 # |ours - theirs| <= TOLERANCE * max(1, |theirs|), float32
PUBLISHED = {"cifar10_uncond_vp (ddpmpp)": "cifar10", "cifar10_cond_vp (ddpmpp)": "cifar10-cond",
             "cifar10_uncond_ve (ncsnpp)": "cifar10-ve", "ffhq64_uncond_vp (ddpmpp)": "ffhq",
             "ffhq64_uncond_ve (ncsnpp)": "ffhq-ve", "afhqv2_uncond_vp (ddpmpp)": "afhqv2",
             "imagenet64_cond_adm": "imagenet64"}


def arrays(name: str) -> dict[str, torch.Tensor]:
    "All arrays of NAME.npz; half precision becomes float32"
    with np.load(FOLDER / f"{name}.npz") as z: t = {k: torch.from_numpy(z[k]) for k in z.files}
    return {k: v.float() if v.is_floating_point() else v for k, v in t.items()}

def build(config: dict) -> EDMPrecond:
    "The network of this configuration"
    kwargs = dict(config["network_kwargs"])
    assert kwargs.pop("decoder_type", "standard") == "standard"
    family = dict(SongUNet=SongUNet, DhariwalUNet=DhariwalUNet)[kwargs.pop("model_type")]
    return EDMPrecond(family(**kwargs)).eval().requires_grad_(False)

def deviation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    "max |ours - theirs| / max(1, |theirs|), at the pixels that are stored"
    ours = ours[..., ::ours.shape[-1] // theirs.shape[-1], ::ours.shape[-1] // theirs.shape[-1]]
    assert ours.shape == theirs.shape and ours.isfinite().all()
    return ((ours - theirs).abs() / theirs.abs().clamp(min=1)).max().item()


@pytest.mark.parametrize("name", listed(FOLDER, "configs"))
def test_outputs(name):
    net, io = build(listed(FOLDER, "configs")[name]), arrays(f"{name}.io")
    net.load_state_dict(arrays(f"{name}.state"))
    x, sigma = io.pop("x"), io.pop("sigma")
    labels, augment = io.pop("labels_onehot_argmax", None), io.pop("augment_labels", None)
    if labels is not None: labels = F.one_hot(labels, net.model.map_label.in_features).float()
    c_in, c_noise = 1 / (.25 + sigma**2).sqrt(), sigma.log() / 4
    outputs = {"D": lambda: net(x, sigma, labels),
               "F": lambda: net.model(x * c_in[:, None, None, None], c_noise, labels),
               "D_labels_none": lambda: net(x, sigma),
               "D_augment": lambda: net(x, sigma, labels, augment_labels=augment),
               "D_VPPrecond": lambda: VPPrecond(net.model)(x, sigma),
               "D_VEPrecond": lambda: VEPrecond(net.model)(x, sigma)}
    assert {"D", "F"} <= set(io) <= set(outputs)
    for key, theirs in io.items(): assert deviation(outputs[key](), theirs) <= TOLERANCE, key


@pytest.mark.parametrize("name", listed(FOLDER, "full_param_lists"))
def test_parameter_names_and_shapes(name):
    "As the published checkpoints have them, in their order; for the arguments stored and for our short name."
    stored = listed(FOLDER, "full_param_lists")[name]
    short = PUBLISHED[name]
    named = adm_unet if short in ADM_CONFIGS else song_unet
    with torch.device("meta"): nets = build(stored), EDMPrecond(named(short))
    for net in nets:
        assert [(k, list(p.shape)) for k, p in net.named_parameters()] == list(stored["parameters"].items())
        assert [(k, list(b.shape)) for k, b in net.named_buffers()] == list(stored["buffers"].items())
        assert sum(p.numel() for p in net.parameters()) == stored["n_params"]


def test_every_published_configuration_is_covered():
    assert set(listed(FOLDER, "full_param_lists")) == set(PUBLISHED)
    assert set(PUBLISHED.values()) == {*SONG_CONFIGS, *ADM_CONFIGS}
