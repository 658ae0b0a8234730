"""What changes the numbers and no shape is read or refused by name; what users try instead gets an answer in words."""
import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipelines import (
    PROMPTS,
    SD,
    denoiser_of,
    diffusers,
    make_dit,
    make_flux,
    make_sd,
    pipeline,
    text_unet,
    unet,
)
from torch import nn

from s4s_nb.denoise import (
    EpsDenoiser,
    VDenoiser,
    X0Denoiser,
    device_of,
    fingerprint,
    sample_noise,
)
from s4s_nb.files.unpickle import RefusedFile
from s4s_nb.models.adm import edm_network
from s4s_nb.models.cards import card_of
from s4s_nb.models.compvis import (
    BETAS,
    PARAMETERIZATIONS,
    UNET,
    alphas_cumprod_of,
    compvis,
    scale_of,
    split_qkv,
    unet_module,
    unet_of,
)
from s4s_nb.models.conditions import LabelledDenoiser, PromptedDenoiser
from s4s_nb.models.latent import Decoder
from s4s_nb.models.pipelines import from_alphas, from_diffusers, read_scheduler
from s4s_nb.models.pretrained import (
    compvis_denoiser,
    latent_denoiser,
    random_parts,
    randomised,
)
from s4s_nb.schedule import FlowSchedule

pytestmark = [pytest.mark.filterwarnings(f"ignore::{w}") for w in ("DeprecationWarning", "FutureWarning")]
LSUN, SD_V1, CLASSES = "lsun_bedroom_smoke", "mscoco_smoke", "imagenet_smoke"

def refused(match, f, *args, kind=ValueError, **kw):
    "Our error, in one line"
    with pytest.raises(kind, match=match) as e: f(*args, **kw)
    assert "\n" not in str(e.value)

# ------------------------------------------------------------------------------------------------------------
# CompVis
# ------------------------------------------------------------------------------------------------------------

def changed(p, **options):
    "A configuration with some options that differ, wherever they belong: model, unet__, first__ or dd__."
    p = copy.deepcopy(p)
    for key, value in options.items():
        part, _, name = key.rpartition("__")
        where = {"": p, "unet": p["unet_config"]["params"], "first": p["first_stage_config"]["params"],
                 "dd": p["first_stage_config"]["params"]["ddconfig"]}[part]
        where[name] = value
    return p

@pytest.mark.parametrize("option", [
    dict(unet__resblock_updown=True), dict(unet__conv_resample=False), dict(unet__num_classes=1000),
    dict(unet__dims=3), dict(unet__n_embed=8), dict(unet__adm_in_channels=4), dict(unet__num_attention_blocks=[1]),
    dict(unet__disable_self_attentions=[True]), dict(unet__widht=3), dict(dd__attn_resolutions=[16]),
    dict(dd__tanh_out=True), dict(dd__resamp_with_conv=False), dict(dd__attn_type="linear"), dict(first__remap="a.npy"),
    dict(parameterization="score"), dict(beta_schedule="exponential"), dict(conditioning_key="concat"),
    dict(scale_by_st=True)])
def test_options_of_compvis_that_would_change_the_numbers_are_refused_by_name(option):
    key, value = [*option.items()][0]
    refused(f"{key.rpartition('__')[2]}={value!r}".replace("[", r"\[").replace("]", r"\]"),
            random_parts, changed(card_of(LSUN)["network"], **option))

@pytest.mark.parametrize("option", [
    dict(unet__dropout=.3), dict(unet__use_fp16=True), dict(unet__use_checkpoint=True), dict(unet__legacy=False),
    dict(monitor="val/loss"), dict(dd__resolution=512), dict(first__lossconfig={}), dict(log_every_t=7)])
def test_harmless_options_change_nothing(option):
    plain, other = (latent_denoiser(random_parts(changed(card_of(LSUN)["network"], **o)), (3, 8, 8)) for o in ({},
        option))
    x = sample_noise(range(2), (3, 8, 8))
    assert torch.equal(plain(x, .5), other(x, .5)) and torch.equal(plain.decode(x), other.decode(x))

@pytest.mark.parametrize("said", ["card", "network"])
@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_what_a_network_predicts_is_read_from_card_and_configuration(kind, said):
    card = card_of(LSUN)
    card |= dict(prediction={"eps": "noise"}.get(kind, kind)) if said == "card" else {}
    if said == "network": card |= dict(prediction=None, network=card["network"] | dict(parameterization=kind))
    denoiser = compvis_denoiser(card)
    inner = next(m for m in denoiser.modules() if type(m) in PARAMETERIZATIONS.values())
    x, t = sample_noise(range(2), (3, 8, 8)), torch.tensor(.4, dtype=torch.float64)
    a, s = denoiser.schedule.alpha(t).float(), denoiser.schedule.sigma(t).float()
    with torch.no_grad(): out, x_0 = inner.net(x, torch.full((2,), 399.)), denoiser(x, t)
    by_hand = dict(eps=lambda: (x - s * out) / a, v=lambda: a * x - s * out, x0=lambda: out)[kind]()
    assert torch.allclose(x_0, by_hand, atol=1e-4)

@pytest.mark.parametrize("card, change", [
    (LSUN, dict(prediction="score")), (LSUN, dict(prediction="flow")), ("cifar10_smoke", dict(prediction="noise")),
    ("ffhq_smoke", dict(prediction="v")), ("mixture", dict(prediction="noise"))])
def test_cards_that_say_something_else_than_their_files_are_refused(card, change):
    from s4s_nb.models.pretrained import FORMATS
    c = card_of(card) | change
    refused(f"{card}: prediction=", FORMATS[c["format"]].read, c)

@pytest.mark.parametrize("kind", BETAS)
def test_schedules_of_compvis(kind):
    "By their definitions, and against what a file stores."
    p = dict(timesteps=200, linear_start=1e-3, linear_end=.02, beta_schedule=kind)
    x = np.linspace(0, 1, 200)
    a, b = .001, .02
    if kind == "cosine":
        f = np.cos((np.arange(201) / 200 + .008) / 1.008 * np.pi / 2)**2
        betas = np.minimum(1 - f[1:] / f[:-1], .999)
    else: betas = dict(linear=(a**.5 + x * (b**.5 - a**.5))**2, sqrt_linear=a + x * (b - a),
                       sqrt=(a + x * (b - a))**.5)[kind]
    ours = alphas_cumprod_of({}, p)
    assert np.allclose(ours, np.cumprod(1 - betas), rtol=1e-10)
    stored = dict(alphas_cumprod=ours.float())
    assert torch.equal(alphas_cumprod_of(stored, p), ours)
    for other in set(BETAS) - {kind}:
        refused("another configuration", alphas_cumprod_of, stored, p | dict(beta_schedule=other))
    refused("the file has 200 .* say 100", alphas_cumprod_of, stored, p | dict(timesteps=100))
    assert torch.allclose(alphas_cumprod_of(stored, dict(given_betas=betas.tolist())), ours)

def test_a_measured_scale_of_the_latents_is_used():
    p = card_of(LSUN)["network"]
    assert scale_of(dict(scale_factor=torch.tensor(.3)), p | dict(scale_by_std=True)) == pytest.approx(.3)
    assert scale_of(dict(scale_factor=torch.tensor(.3)), p) == pytest.approx(.3)
    refused("scale_factor=0.18: the file has 0.3", scale_of, dict(scale_factor=torch.tensor(.3)),
        dict(scale_factor=.18))
    refused("scale_by_std=True", scale_of, {}, p | dict(scale_by_std=True))

def attention(x, w, b, heads, new_order):
    "(B, C, L): the two orders in which the original code reads the rows of one convolution"
    rows = w[..., 0] @ x + b[:, None]
    if new_order: q, k, v = (r.unflatten(1, (heads, -1)) for r in rows.chunk(3, 1))
    else: q, k, v = rows.unflatten(1, (heads, 3, -1)).unbind(2)
    return torch.einsum("bhts,bhcs->bhct", (torch.einsum("bhct,bhcs->bhts", q, k) / q.shape[2]**.5).softmax(-1),
        v).flatten(1, 2)

@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("option", [dict(num_heads=4), dict(num_heads=4, num_head_channels=-1),
    dict(num_head_channels=8),
                                    dict(num_heads=1, num_head_channels=8)])
def test_attention_is_divided_as_the_configuration_says(option, new_order):
    "Number of heads or width of one; the older or the newer order."
    from diffusers.models.attention_processor import Attention
    p = card_of(LSUN)["network"]["unet_config"]["params"]
    p = {k: v for k, v in p.items() if k != "num_head_channels"} | option
    net = randomised(lambda: unet_module(p))
    layer = next(m for m in net.modules() if isinstance(m, Attention))
    C, g = layer.to_q.in_features, torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g) for s in ((2, C, 5), (3 * C, C, 1), (3 * C,)))
    number = option["num_heads"] if option.get("num_head_channels", -1) == -1 else C // 8
    how = dict(number=number) if option.get("num_head_channels", -1) == -1 else dict(width=8)
    parts = split_qkv({"a.1.qkv.weight": w, "a.1.qkv.bias": b}, **how, new_order=new_order)
    layer.load_state_dict({k.removeprefix("a.1."): v for k, v in parts.items()}, strict=False)
    layer.to_out[0].weight.data, layer.to_out[0].bias.data = torch.eye(C), torch.zeros(C)
    layer.residual_connection, layer.group_norm = False, None
    assert torch.allclose(layer(x.mT).mT, attention(x, w, b, number, new_order), atol=1e-4)
    assert layer.heads == number

def test_scale_and_shift_by_the_embedding_is_read():
    p = card_of(LSUN)["network"]["unet_config"]["params"]
    plain, shifted = (unet_module(p | dict(use_scale_shift_norm=v)) for v in (False, True))
    name = next(k for k in plain.state_dict() if k.endswith("time_emb_proj.weight"))
    assert shifted.state_dict()[name].shape[0] == 2 * plain.state_dict()[name].shape[0]

def test_tensors_without_a_place_are_not_dropped():
    p = card_of(LSUN)["network"]["unet_config"]["params"]
    extra = {UNET + "label_emb.0.weight": torch.zeros(128, 10)}
    refused("U-Net: .*label_emb.0.weight|do not fit", unet_of, extra, p, False)

@pytest.mark.parametrize("change, match", [
    (dict(cond_stage_config=dict(target="ldm.modules.encoders.modules.BERTEmbedder")), "target='BERTEmbedder'"),
    (dict(cond_stage_config=dict(target="a.FrozenCLIPEmbedder", params=dict(layer="penultimate"))),
    "layer='penultimate'"),
    (dict(cond_stage_config=dict(target="ldm.FrozenOpenCLIPEmbedder")), "target='FrozenOpenCLIPEmbedder'"),
    (dict(unet_config={}), "no unet_config.params"), (dict(first_stage_config="x"), "first_stage_config='x'"),
    (dict(first_stage_config=dict(target="a.VQModel", params={})), "target='VQModel'"),
    (dict(first_stage_config=dict(target="a.AutoencoderKL", params=dict(n_embed=3))), "AutoencoderKL with n_embed")])
def test_other_parts_of_compvis_are_refused_by_class(change, match):
    refused(match, compvis, {}, card_of(LSUN)["network"] | change)

# ------------------------------------------------------------------------------------------------------------
# EDM
# ------------------------------------------------------------------------------------------------------------

EDM = dict(img_resolution=8, img_channels=3, model_type="SongUNet", model_channels=16, channel_mult=[1], num_blocks=1)

@pytest.mark.parametrize("kind, change, match", [
    ("iDDPMPrecond", {}, "class='iDDPMPrecond' is not read: it shows"), ("EDMLoss", {},
    "'EDMLoss' is not read: a loss"),
    ("EDMPrecond", dict(decoder_type="skip"), "decoder_type='skip'"), ("EDMPrecond", dict(encoder_type="skip"),
    "'skip'"),
    ("EDMPrecond", dict(channel_mult_emb=2), "channel_mult_emb"), ("EDMPrecond", dict(embedding_type="zero"), "'zero'"),
    ("VPPrecond", dict(sigma_data=.5), "sigma_data"), ("CTPrecond", {}, "class='CTPrecond'; expected one of")])
def test_networks_of_edm_are_read_or_refused_by_name(kind, change, match): refused(match, edm_network, kind,
    EDM | change)

def test_a_training_state_is_named_by_both_readers(tmp_path):
    import pickle
    from types import ModuleType
    from unittest.mock import patch

    from edm_pickle import official_modules, wrapped

    from s4s_nb.files.checkpoint import read_checkpoint, read_edm_pickle, to_safetensors
    net = edm_network("EDMPrecond", EDM)
    with patch.dict("sys.modules", official_modules()):
        pickle_module = ModuleType("pickles")
        pickle_module.Pickler = pickle.Pickler
        torch.save(dict(net=wrapped(net, "", "EDMPrecond", EDM), optimizer_state={}),
            tmp_path / "training-state-000.pt",
                   pickle_module=pickle_module)
    for read in (read_checkpoint, read_edm_pickle, lambda p: to_safetensors(p, tmp_path / "out")):
        with pytest.raises(RefusedFile, match="training state of EDM.*network-snapshot-") as e:
            read(tmp_path / "training-state-000.pt")
        assert "read_checkpoint" not in str(e.value)

# ------------------------------------------------------------------------------------------------------------
# Schedulers
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, options, match", [
    ("LCMScheduler", {}, "LCMScheduler belongs to a distilled"), ("TCDScheduler", {}, "TCDScheduler belongs to a"),
    ("FlowMatchLCMScheduler", {}, "FlowMatchLCMScheduler belongs"), ("UnCLIPScheduler", {},
    "UnCLIPScheduler is not known"),
    ("CMStochasticIterativeScheduler", {}, "CMStochasticIterativeScheduler belongs"), ("SCMScheduler", {}, "distilled"),
    ("DDIMScheduler", dict(prediction_typ="v_prediction"),
    "prediction_typ='v_prediction' is an option that is not known"),
    ("PNDMScheduler", dict(rescale_betas_zero_snr=True), "rescale_betas_zero_snr=True: a scheduler of this class"),
    ("PNDMScheduler", dict(lambda_min_clipped=-5.1), "lambda_min_clipped=-5.1: a scheduler of this class"),
    ("FlowMatchEulerDiscreteScheduler", dict(prediction_type="v_prediction"), "prediction_type='v_prediction'"),
    ("DDIMScheduler", dict(predict_epsilon=False), "predict_epsilon=False: expected True"),
    ("DPMSolverMultistepScheduler", dict(lambda_min_clipped=50.), "nothing is left to sample")])
def test_schedulers_that_say_something_else_are_refused(name, options, match):
    refused(match, read_scheduler, dict(_class_name=name) | options)

@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler"])
@pytest.mark.parametrize("lowest", [-5.1, -3., -float("inf")])
def test_a_clipped_log_snr_is_where_sampling_starts(name, lowest):
    found = read_scheduler(dict(_class_name=name, beta_schedule="squaredcos_cap_v2", lambda_min_clipped=lowest))[1]
    assert found.lmbda(found.t_max) == pytest.approx(max(lowest, float(found.lmbda(1.))), abs=1e-6)

@pytest.mark.parametrize("option", [
    dict(timestep_spacing="trailing"), dict(use_karras_sigmas=True), dict(solver_order=3),
    dict(final_sigmas_type="sigma_min"),
    dict(algorithm_type="sde-dpmsolver++"), dict(skip_prk_steps=True), dict(clip_sample=True), dict(thresholding=True)])
def test_options_of_samplers_change_nothing(option):
    plain = dict(_class_name="DPMSolverMultistepScheduler")
    assert repr(read_scheduler(plain | option)[1]) == repr(read_scheduler(plain)[1])

def test_flow_schedulers_belong_to_flow_networks():
    d = diffusers()
    flow, vp = d.FlowMatchEulerDiscreteScheduler(), d.DDIMScheduler()
    for net in (unet(), text_unet(), make_dit().transformer):
        refused(f"{type(net).__name__} with a scheduler of flow matching", from_diffusers, net, scheduler=flow)
    for name in ("sd3", "flux"):
        refused("Transformer2DModel with a scheduler of noise", from_diffusers, pipeline(name), PROMPTS, scheduler=vp,
            size=8)
    refused("scheduler='ddim': expected a scheduler", from_diffusers, unet(), scheduler="ddim")

# ------------------------------------------------------------------------------------------------------------
# Pipelines, wrappers, autoencoders
# ------------------------------------------------------------------------------------------------------------

def test_pipelines_that_do_more_are_refused():
    d, parts = diffusers(), pipeline("sd").components
    for name in ("StableDiffusionPAGPipeline", "StableDiffusionSAGPipeline", "LatentConsistencyModelPipeline",
                 "StableDiffusionPanoramaPipeline", "SemanticStableDiffusionPipeline"):
        pipe = object.__new__(getattr(d, name))
        refused(f"{name} is not read: it may do more", from_diffusers, pipe, PROMPTS)
    assert from_diffusers(d.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False),
        PROMPTS).shape == (4, 8, 8)

class PeftModel(nn.Module):
    "PEFT's wrapper, as far as it is seen"
    def __init__(self, net):
        super().__init__()
        self.base_model = net
    def get_base_model(self): return self.base_model

@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, PeftModel,
    lambda m: torch.compile(nn.DataParallel(m)),
                                  lambda m: PeftModel(torch.compile(m))])
def test_wrapped_networks_are_the_same_model(wrap):
    net, scheduler = unet(), diffusers().DDIMScheduler()
    plain, wrapped = from_diffusers(net, scheduler=scheduler), from_diffusers(wrap(net), scheduler=scheduler)
    x = sample_noise(range(2), (3, 8, 8))
    assert fingerprint(plain) == fingerprint(wrapped) and torch.equal(plain(x, .5), wrapped(x, .5))

def test_wrapped_parts_of_a_pipeline_are_the_same_model():
    pipe = make_sd()
    plain = fingerprint(from_diffusers(pipe, PROMPTS))
    pipe.unet, pipe.vae = torch.compile(pipe.unet), torch.compile(pipe.vae)
    assert fingerprint(denoiser := from_diffusers(pipe, PROMPTS)) == plain
    assert denoiser.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)

@pytest.mark.parametrize("model, match", [
    ("org/model", r"from_pretrained\('org/model'\)"), (Path("folder"), "expected a pipeline or a"),
    (nn.Linear, "model is the class Linear"), (None, "NoneType: expected one of UNet2DModel"),
    (dict(a=1), "dict: expected one of UNet2DModel"),
    (X0Denoiser(nn.Identity(), FlowSchedule()), "a denoiser already")])
def test_what_is_no_model_is_answered(model, match): refused(match, from_diffusers, model, PROMPTS)

def test_offloaded_networks_keep_their_conditions_and_names():
    import accelerate
    whole, pipe = denoiser_of("sd", 2.), copy.deepcopy(pipeline("sd"))
    for part in (pipe.unet, pipe.text_encoder, pipe.vae): accelerate.cpu_offload(part, torch.device("cpu"))
    denoiser = denoiser_of("sd", 2., pipe=pipe)
    x, cond = sample_noise(range(2), (4, 8, 8)), whole.conditions(range(2))
    with torch.no_grad(): assert torch.equal(denoiser(x, .5, **cond), whole(x, .5, **cond))
    assert torch.equal(denoiser.decode(x), whole.decode(x)) and device_of(denoiser) == torch.device("cpu")
    assert fingerprint(denoiser) == fingerprint(whole)

class OwnDecoder(nn.Module):
    "Neither config nor type"
    def decode(self, z, return_dict): return z.repeat(1, 1, 2, 2)[:, :3],

def test_autoencoders_of_other_classes():
    net, scheduler, d = unet(in_channels=4, out_channels=4), diffusers().DDIMScheduler(), diffusers()
    x = sample_noise(range(2), (4, 8, 8))
    assert from_diffusers(net, scheduler=scheduler, vae=OwnDecoder()).decode(x).shape == (2, 3, 16, 16)
    small = dict(latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(4, 8),
        decoder_block_out_channels=(4, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()))
    deep = d.AutoencoderDC(**small).eval()
    sd = make_sd()
    denoiser = from_diffusers(sd, PROMPTS, vae=deep)
    assert denoiser.decode(x).shape[1] == 3
    noisy = object.__new__(d.ConsistencyDecoderVAE)
    nn.Module.__init__(noisy)
    refused("ConsistencyDecoderVAE draws its images at random", from_diffusers, sd, PROMPTS, vae=noisy)
    refused("vae of type str", from_diffusers, sd, PROMPTS, vae="stabilityai/vae")
    refused("vae of type Linear", Decoder, nn.Linear(1, 1))

# ------------------------------------------------------------------------------------------------------------
# Conditions and sizes
# ------------------------------------------------------------------------------------------------------------

ROWS = dict(encoder_hidden_states=torch.ones(2, 16, 16))

@pytest.mark.parametrize("given, match", [
    (dict(encoder_hidden_states=torch.ones(16, 16)), r"shape \(16, 16\): expected \(n, tokens, width\)"),
    (dict(encoder_hidden_states=torch.ones(2, 16, 12)), "with width 16"), ([1, 2], "1 is no prompt"),
    (dict(encoder_hidden_states="a cat"), "expected a tensor"), (torch.ones(2, 16, 16), "conditions of type Tensor"),
    (dict(encoder_hidden_states=[["a"]]), "expected a tensor"), (7, "conditions of type int"), (["a", None],
    "None is no prompt"),
    (dict(encoder_hidden_states=torch.ones(0, 16, 16)), "expected"), (dict(promt=torch.ones(2, 16, 16)),
    "named encoder_hidden")])
def test_other_conditions_get_an_answer(given, match): refused(match, from_diffusers, pipeline("sd"), given)

@pytest.mark.parametrize("null, match", [
    (dict(encoder_hidden_states=torch.ones(1, 8, 16)), r"expected \(1, 16, 16\): one row"),
    (dict(encoder_hidden_states=torch.ones(2, 16, 16)), "expected .1, 16, 16.: one row"),
    (dict(encoder_hidden_states=torch.ones(16, 16)), r"shape \(16, 16\)"), ("ugly",
    "null='ugly': the conditions are tensors"),
    (dict(encoder_hidden_states=torch.ones(1, 16, 3)), "with width 16")])
def test_other_null_conditions_get_an_answer(null, match): refused(match, from_diffusers, pipeline("sd"), ROWS, 2.,
    null)

def test_lists_and_arrays_are_tensors():
    a = from_diffusers(pipeline("sd"), dict(encoder_hidden_states=np.ones((2, 16, 16))))
    b = from_diffusers(pipeline("sd"), dict(encoder_hidden_states=np.ones((2, 16, 16)).tolist()))
    assert fingerprint(a) == fingerprint(b) == fingerprint(from_diffusers(pipeline("sd"), ROWS))

def test_words_of_diffusers_mean_ours():
    ours = denoiser_of("sd", 3., null="fog")
    theirs = from_diffusers(pipeline("sd"), prompt=PROMPTS, guidance_scale=3., negative_prompt="fog")
    assert fingerprint(ours) == fingerprint(theirs) == fingerprint(denoiser_of("sd", 3., null=["fog"] * 3))
    for options, match in [
            (dict(guidance=2., guidance_scale=3.), "guidance= and guidance_scale=, which mean the same"),
            (dict(num_inference_steps=5), "the grid of a solver"), (dict(height=512), "pass size="),
            (dict(promts=1), "got promts=, which neither"), (dict(do_classifier_free_guidance=True),
            "expected guidance="),
            (dict(prompt_embeds=1), "expected conditions="), (dict(generator=1), "own seed")]:
        refused(match, from_diffusers, pipeline("sd"), PROMPTS, kind=TypeError, **options)
    for wrong in ("7.5", float("nan"), True): refused("guidance=.*expected a number", denoiser_of, "sd", wrong)
    refused("null=.'a', 'b'.: expected one negative prompt", denoiser_of, "sd", 2., null=["a", "b"])

def test_clip_skip_is_what_the_pipeline_would_take():
    pipe = pipeline("sd")
    denoiser = denoiser_of("sd", 2., clip_skip=1)
    ids = pipe.tokenizer(PROMPTS, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        encoder = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
        wanted = encoder.final_layer_norm(pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-2])
    assert torch.allclose(denoiser.denoiser.encoder_hidden_states[:3], wanted, atol=1e-5)
    assert "text_model" not in vars(pipe.text_encoder)
    refused("encode_prompt of 'a cat' with .'clip_skip': 99", denoiser_of, "sd", clip_skip=99)

def test_numbers_that_one_side_was_given_count_for_both():
    rows = dict(encoder_hidden_states=torch.ones(2, 16, 32), text_embeds=torch.ones(2, 16))
    null = {k: torch.zeros_like(v[:1]) for k, v in rows.items()}
    ids = torch.tensor([[32., 32, 0, 0, 16, 16]])
    told = from_diffusers(pipeline("sdxl"), rows | dict(time_ids=ids.expand(2, -1)), 2., null).denoiser.time_ids
    also = from_diffusers(pipeline("sdxl"), rows, 2., null | dict(time_ids=ids)).denoiser.time_ids
    assert told.tolist() == also.tolist() == ids.expand(3, -1).tolist()
    refused("null: has no time_ids", from_diffusers, pipeline("sdxl"),
            rows | dict(time_ids=torch.cat([ids, 2 * ids])), 2., null)
    pipe = pipeline("sdxl")
    refused("addition_embed_type='text_time': .* pass vae=", from_diffusers, pipe.unet, rows, scheduler=pipe.scheduler)

def test_the_class_that_means_none_is_not_drawn():
    net, scheduler = unet(num_class_embeds=5), diffusers().DDPMScheduler()
    for null in (4, [4], dict(class_labels=torch.tensor([4])), torch.tensor([4])):
        guided = from_diffusers(net, None, 2., null, scheduler)
        assert set(guided.conditions(range(200))["condition"].tolist()) == {0, 1, 2, 3}
        assert guided.denoiser.class_labels.tolist() == [0, 1, 2, 3, 4]
    assert from_diffusers(net, [1, 3], scheduler=scheduler).class_labels.tolist() == [1, 3]
    for wrong in ([-1], [5], [.5], torch.tensor([True])):
        refused("class_labels=.*expected whole numbers from 0 to 4", from_diffusers, net, wrong, scheduler=scheduler)
    refused("class_labels='dog'|expected", from_diffusers, net, "dog", scheduler=scheduler)
    refused("from 0 to 1000", from_diffusers, pipeline("dit"), [1001])

@pytest.mark.parametrize("condition, match", [
    (None, "expected a tensor with a row for each of the 2"), (torch.tensor([-1, 0]), r"condition=\[-1, 0\]: expected"),
    (torch.tensor([3, 0]), "from 0 to 2"), (torch.tensor([0, 1, 2]), "3 rows, the batch 2"), (["a red boat"] * 2,
    "expected a"),
    (torch.tensor([0., 1.]), "expected a whole number"), (0, "condition=0: expected a tensor"), (torch.tensor(0),
    "expected")])
def test_a_call_is_told_rows_of_the_table(condition, match):
    denoiser, x = denoiser_of("sd"), torch.zeros(2, 4, 8, 8)
    refused(match, denoiser, x, .5, **{} if condition is None else dict(condition=condition))
    prompted = PromptedDenoiser(X0Denoiser(nn.Identity(), FlowSchedule()), None, ["a"], ["b"])
    refused(match, prompted, x, .5, **{} if condition is None else dict(condition=condition))

def test_a_checked_condition_that_changes_is_checked_again():
    denoiser, x, rows = denoiser_of("sd"), torch.zeros(1, 4, 8, 8), torch.tensor([0])
    denoiser(x, .5, condition=rows)
    rows[0] = -1
    refused(r"condition=\[-1\]", denoiser, x, .5, condition=rows)

def test_class_conditional_networks_are_told_a_class():
    net = LabelledDenoiser(X0Denoiser(lambda x, t, class_labels: x, FlowSchedule()), 3)
    x = torch.zeros(4, 1)
    refused("class_labels=None: expected a tensor", net, x, .5)
    refused("class_labels has 2 rows, the batch 4", net, x, .5, class_labels=torch.eye(3)[:2])
    assert net(x, .5, class_labels=torch.zeros(1, 3)).shape == x.shape

@pytest.mark.parametrize("name, size, match", [
    ("sd", 512, "not of the image in pixels"), ("sd", (256, 64), "in pixels"), ("sdxl", 1024, "in pixels"),
    ("dit", (8, 4), "expected a square"), ("dit", 7, "multiples of 2"), ("ddpm", 7, "multiples of 2"), ("sd", -8,
    "from 1 to"),
    ("sd", 0, "from 1 to"), ("sd", "8", "size='8'"), ("sd", (8, 8, 8), "expected a side"), ("sd", 8.5, "whole number"),
    ("sd3", 24, "at most 16"), ("flux", 9, "multiples of 2")])
def test_sizes_that_do_not_fit_are_refused_when_the_model_is_made(name, size, match):
    refused(match, denoiser_of, name, size=size)

@pytest.mark.parametrize("name, size", [("sd", (4, 12)), ("sd", 16), ("ddpm", np.int64(16)), ("dit", 16), ("sd3", (4,
    8)),
                                        ("flux", (4, 8)), ("ddpm", (4, 8))])
def test_sizes_that_fit_run(name, size):
    denoiser = denoiser_of(name, size=size)
    x = sample_noise(range(1), denoiser.shape)
    with torch.no_grad(): assert denoiser(x, .5, **denoiser.conditions([0])).shape == x.shape

# ------------------------------------------------------------------------------------------------------------
# Times, tables
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, steps", [(torch.bfloat16, "3.9"), (torch.float16, "0.49"), (torch.float32, None)])
def test_a_network_that_rounds_its_times_says_so(dtype, steps):
    pipe, whole = make_flux(), denoiser_of("flux")
    net = pipe.transformer.to(dtype)
    rows = {k: getattr(whole, k) for k in whole.names}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from_diffusers(net, rows, scheduler=pipe.scheduler, size=8)
    said = [str(w.message) for w in caught if w.category is UserWarning and "rounds its own time" in str(w.message)]
    assert len(said) == (steps is not None) and all(f"steps of {steps} " in s and "float32" in s for s in said)

@pytest.mark.parametrize("prediction, wrapper", [("epsilon", EpsDenoiser), ("v_prediction", VDenoiser), ("sample",
    X0Denoiser),
                                                 ("eps", EpsDenoiser), ("v", VDenoiser), ("x0", X0Denoiser)])
@pytest.mark.parametrize("N", [50, 300, 1000])
def test_a_table_of_alphas_is_a_model(prediction, wrapper, N):
    kind = dict(eps="epsilon", v="v_prediction", x0="sample").get(prediction, prediction)
    scheduler, net = diffusers().DDIMScheduler(**SD, num_train_timesteps=N, prediction_type=kind), unet()
    whole = from_diffusers(net, scheduler=scheduler)
    shown = []
    def call(x, n):
        shown.append(n.tolist())
        return net(x, n).sample
    hand = from_alphas(call, scheduler.alphas_cumprod, prediction, (3, 8, 8))
    x, s = sample_noise(range(1), (3, 8, 8)), hand.schedule
    assert type(hand) is wrapper and (s.t_min, s.t_max) == (1 / N, 1.)
    with torch.no_grad():
        for t in (s.t_max, s.t_min, .5): assert torch.equal(hand(x, t), whole(x, t))
    assert shown[0] == [N - 1] and shown[1] == pytest.approx([0], abs=1e-4)

def test_other_tables_are_refused():
    a = diffusers().DDIMScheduler(**SD).alphas_cumprod
    refused("prediction='score'; expected one of", from_alphas, None, a, "score")
    for wrong in (a.flip(0), a[None], a * 0 + 1): refused("expected a strictly decreasing", from_alphas, None, wrong)
    refused("at alpha = 0 no image", from_alphas, None, torch.cat([a, torch.zeros(1)]))
    assert from_alphas(torch.nn.Identity(), torch.cat([a, torch.zeros(1)]), "v").schedule.N == 1000
