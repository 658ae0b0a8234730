"""Writes checkpoints of CompVis' format: names and structure of a published model, few channels, random weights."""
import copy
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from golden_data import FOLDER, listed

from s4s_nb.models.compvis import CONDITION, EMA, FIRST_STAGE, UNET, alphas_cumprod_of, ema_name, text_module

LISTS = dict(mscoco="sd_v1_4", lsun_bedroom="lsun_bedrooms_vq4", imagenet="cin256_v2_vq4")
CLIP = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=80, eos_token_id=81, pad_token_id=1)
WIDTH, CONTEXT, CODES = 32, 24, 2048 # narrow


def narrow(params: dict) -> dict:
    "A configuration with few channels; levels, blocks and attention as they are."
    p = copy.deepcopy(params)
    u, f, how = p["unet_config"]["params"], p["first_stage_config"]["params"], p["cond_stage_config"]
    u |= dict(model_channels=WIDTH, image_size=8)
    f["ddconfig"]["ch"] = WIDTH
    if "n_embed" in f: f["n_embed"] = CODES
    if how == "__is_unconditional__": return p
    u["context_dim"] = CONTEXT
    if "params" in how: how["params"]["embed_dim"] = CONTEXT
    else: how["clip_config"] = CLIP | dict(hidden_size=CONTEXT)
    return p

def narrow_state(name: str, params: dict, seed: int = 0) -> OrderedDict:
    "Random tensors under the names of the published file of card `name`; `params` is the narrow configuration."
    wide = listed(FOLDER / "compvis", "param_lists")["models"][LISTS[name]]
    g, state = torch.Generator().manual_seed(seed), OrderedDict()
    p = wide["model_config"]["params"]
    context = p["unet_config"]["params"].get("context_dim")
    units = {UNET: p["unet_config"]["params"]["model_channels"],
             FIRST_STAGE: p["first_stage_config"]["params"]["ddconfig"]["ch"]}
    for k, (shape, kind, _) in wide["tensors"].items():
        unit = next((u for prefix, u in units.items() if k.startswith(prefix)), None)
        if unit is None or kind != "float32": continue
        kept = dict.fromkeys([context], CONTEXT) if k.startswith(UNET) else {}
        small = [kept.get(d, d * WIDTH // unit if d % unit == 0 else d) for d in shape]
        noise = torch.randn(small, generator=g)
        state[k] = noise / noise[0].numel()**.5 if len(small) > 1 else .1 * noise + (not k.endswith("bias"))
    if name == "lsun_bedroom":
        average = {ema_name(k): v + .01 for k, v in state.items() if k.startswith(UNET)}
        state |= average | {EMA + "decay": torch.tensor(.9999), EMA + "num_updates": torch.tensor(7, dtype=torch.int32)}
    if name == "imagenet": state[CONDITION + "embedding.weight"] = torch.randn(1001, CONTEXT, generator=g)
    if name == "mscoco":
        text = text_module(CLIP | dict(hidden_size=CONTEXT)).state_dict()
        state |= {f"{CONDITION}transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
        state[f"{CONDITION}transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["alphas_cumprod"] = alphas_cumprod_of({}, params).float()
    return state

def write_ckpt(path, name: str, params: dict, member: str | None = None) -> None:
    "A file as Lightning wrote it, inside a zip if it is the `member` of one."
    inner = Path(path).with_suffix(".inner") if member else Path(path)
    state = narrow_state(name, params)
    torch.save({"epoch": 3, "global_step": 470, "pytorch-lightning_version": "1.4.2", "state_dict": state}, inner)
    if member:
        with zipfile.ZipFile(path, "w") as z: z.write(inner, member)
        inner.unlink()
