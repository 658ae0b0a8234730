"""Pipelines of diffusers against our denoisers: tiny networks with random weights, nothing is downloaded.

The witness is the pipeline itself. It runs as users run it, its scheduler notes every network output and the image
that follows from it, and our denoiser must say the same at the same states; our loop must end where it ends.
"""
import copy
import logging
import string
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from s4s_nb.denoise import EpsDenoiser, GuidedDenoiser, VDenoiser, fingerprint, sample_noise
from s4s_nb.files.checks import import_torchvision
from s4s_nb.files.verified import digest
from s4s_nb.grids import time_uniform
from s4s_nb.judging.distance import L2, FeatureDistance
from s4s_nb.learning.coefficients import S4SConfig, s4s
from s4s_nb.learning.pairs import teacher_pairs
from s4s_nb.learning.run import evaluate
from s4s_nb.models.latent import Decoded, Decoder, decoder_of
from s4s_nb.models.networks import forward_mode
from s4s_nb.models.pipelines import (
    from_diffusers,
    pack_tokens,
    read_scheduler,
    token_positions,
    unpack_tokens,
)
from s4s_nb.schedule import FlowSchedule
from s4s_nb.solvers.multistep import ddim, dpm_solver, ipndm

pytestmark = [pytest.mark.filterwarnings(f"ignore::{w}") for w in ("DeprecationWarning", "FutureWarning")]

SD = dict(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1,
          clip_sample=False)
PROMPTS = ["a cat", "two dogs", "rain"]
SEEDS = range(3)


@cache
def diffusers():
    import_torchvision()
    import diffusers
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    return diffusers

# ------------------------------------------------------------------------------------------------------------
# Tiny pipelines
# ------------------------------------------------------------------------------------------------------------

def tokenizer(length=16):
    "Letters are words."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<p>", "</s>", "<u>", *string.ascii_lowercase])},
                                       unk_token="<u>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<p>", eos_token="</s>", unk_token="<u>",
                                   model_max_length=length)

def clip(cls, width=16):
    import transformers
    config = transformers.CLIPTextConfig(vocab_size=29, hidden_size=width, intermediate_size=16, num_hidden_layers=2,
                                         num_attention_heads=2, projection_dim=width, max_position_embeddings=16,
                                         bos_token_id=0, eos_token_id=1)
    return getattr(transformers, cls)(config).eval()

def t5():
    from transformers import T5Config, T5EncoderModel
    return T5EncoderModel(T5Config(vocab_size=29, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()

def autoencoder(**kw):
    return diffusers().AutoencoderKL(block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                                     up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, **kw).eval()

LAYERS = dict(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4)

def text_unet(**kw):
    config = LAYERS | dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=16,
                           up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")) | kw
    return diffusers().UNet2DConditionModel(**config).eval()

def unet(**kw):
    config = LAYERS | dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                           up_block_types=("AttnUpBlock2D", "UpBlock2D")) | kw
    return diffusers().UNet2DModel(**config).eval()

def make_ddpm():
    return diffusers().DDIMPipeline(unet(), diffusers().DDIMScheduler(**SD | dict(beta_schedule="linear")))

def make_sd(**kw):
    return diffusers().StableDiffusionPipeline(
        autoencoder(), clip("CLIPTextModel"), tokenizer(), text_unet(), diffusers().DDIMScheduler(**SD | kw),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)

def make_sd_v(): return make_sd(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")

def make_sdxl():
    unet = text_unet(cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=4,
                     projection_class_embeddings_input_dim=40)
    return diffusers().StableDiffusionXLPipeline(
        autoencoder(latents_mean=[.1] * 4, latents_std=[2.] * 4), clip("CLIPTextModel"),
        clip("CLIPTextModelWithProjection"), tokenizer(), tokenizer(), unet, diffusers().DDIMScheduler(**SD),
        add_watermarker=False)

def make_sd3():
    net = diffusers().SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=8).eval()
    project = lambda: clip("CLIPTextModelWithProjection")
    return diffusers().StableDiffusion3Pipeline(
        net, diffusers().FlowMatchEulerDiscreteScheduler(shift=3.), autoencoder(shift_factor=.06),
        project(), tokenizer(), project(), tokenizer(), t5(), tokenizer())

def make_flux(guidance_embeds=True):
    net = diffusers().FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds)
    return diffusers().FluxPipeline(
        diffusers().FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), autoencoder(shift_factor=.12),
        clip("CLIPTextModel"), tokenizer(), t5(), tokenizer(), net.eval())

def make_dit():
    net = diffusers().DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
                                            num_layers=1, sample_size=8).eval()
    return diffusers().DiTPipeline(net, autoencoder(), diffusers().DDIMScheduler(**SD | dict(beta_schedule="linear")))

MAKE = dict(ddpm=make_ddpm, sd=make_sd, sd_v=make_sd_v, sdxl=make_sdxl, sd3=make_sd3, flux=make_flux, dit=make_dit)
TEXT = "sd", "sd_v", "sdxl", "sd3", "flux"
OPTIONS = dict(sd3=dict(max_sequence_length=8), flux=dict(max_sequence_length=8, size=8))

@cache
def pipeline(name, seed=0):
    torch.manual_seed(seed)
    pipe = MAKE[name]()
    pipe.set_progress_bar_config(disable=True)
    for k in ("text_encoder", "text_encoder_2"): # random encoders hardly tell prompts apart
        if (encoder := pipe.components.get(k)) is not None:
            encoder.get_input_embeddings().weight.data.mul_(50)
    if name in ("sd3", "flux"): pipe.transformer.proj_out.weight.data.mul_(5) # and straight lines need no solver
    return pipe

def denoiser_of(name, guidance=None, pipe=None, **kw):
    options = dict(conditions=PROMPTS) if name in TEXT else {}
    return from_diffusers(pipe or pipeline(name), guidance=guidance, **options | OPTIONS.get(name, {}) | kw)

def run_pipeline(name, guidance, rows, n=5):
    "The states (x, t, x_0 by the scheduler) at every network call, the last state and the images."
    pipe, seen = pipeline(name), []
    scheduler, step = pipe.scheduler, pipe.scheduler.step
    def note(output, t, x, **kw):
        result = step(output, t, x, **kw)
        flow = hasattr(scheduler, "sigmas")
        x_0 = x - scheduler.sigmas[scheduler.step_index - 1] * output if flow else result[1]
        seen.append((x, t / 1000 if flow else (t + 1) / 1000, x_0, result[0]))
        return result
    prompts = [PROMPTS[i] for i in rows] if name in TEXT else None
    kw = dict(generator=torch.Generator().manual_seed(0), num_inference_steps=n, output_type="pt")
    if name == "ddpm": kw |= dict(batch_size=len(rows))
    elif name == "dit": kw |= dict(class_labels=rows.tolist(), guidance_scale=guidance or 1.)
    else: kw |= dict(prompt=prompts, guidance_scale=guidance or 1.)
    if name in ("sd3", "flux"): kw |= dict(max_sequence_length=8)
    if name == "flux": kw |= dict(height=16, width=16, guidance_scale=3.5, true_cfg_scale=guidance or 1.,
                                  negative_prompt=[""] * len(rows))
    scheduler.step = note
    try: images = pipe(**kw)[0]
    finally: del scheduler.step
    state = lambda v: unpack_tokens(v, 8, 8) if name == "flux" else v[:len(rows)]
    return [(state(x), t, state(x_0)) for x, t, x_0, _ in seen], state(seen[-1][3]), images

def off(ours, theirs): return ((ours - theirs).abs().max() / theirs.abs().max()).item()

# ------------------------------------------------------------------------------------------------------------
# What a denoiser says and where a solver ends
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("guidance", [None, 3.])
@pytest.mark.parametrize("name", MAKE)
def test_our_denoiser_is_the_pipeline(name, guidance, notes):
    "Step by step: x_0 at the pipeline's states. End to end: our loop from its start. And its images."
    if name == "ddpm" and guidance: pytest.skip("unconditional")
    denoiser = denoiser_of(name, guidance)
    cond = denoiser.conditions(SEEDS)
    rows = cond.get("condition", torch.zeros(len(SEEDS)))
    states, end, images = run_pipeline(name, guidance, rows)
    with torch.no_grad():
        worst = max(off(denoiser(x, t, **cond), x_0) for x, t, x_0 in states)
        t = torch.stack([t for _, t, _ in states]).double()
        if isinstance(denoiser.schedule, FlowSchedule): # to t = 0 in Euler steps, from t = 1
            solver = dpm_solver(FlowSchedule(0., 1.), torch.cat([t, torch.zeros(1)]), order=1)
        else: solver = ddim(denoiser.schedule, torch.cat([t.mul(1000).round() / 1000, torch.tensor([.001])]))
        apart = off(solver(denoiser, states[0][0], **cond), end)
        shown = off((denoiser.decode(end) / 2 + .5).clamp(0, 1), images)
    notes.append(f"{name}, guidance {guidance}: x_0 {worst:.1e}, end {apart:.1e}, images {shown:.1e}")
    assert worst < 1e-5 and apart < 1e-4 and shown < 1e-5
    assert denoiser.shape == states[0][0].shape[1:] and denoiser.decode(end).shape == images.shape
    if name != "ddpm": # conditions matter, and so does guidance
        other = {k: v.flip(0) for k, v in cond.items()}
        assert off(denoiser(states[0][0], .5, **other), denoiser(states[0][0], .5, **cond)) > 1e-3

@pytest.mark.parametrize("name", MAKE)
def test_every_pipeline_learns(name, notes):
    "Four evaluations, sixteen pairs: better than the parent on noise that neither learning nor selection saw."
    denoiser = denoiser_of(name, 2. if name == "sd" else None)
    schedule = denoiser.schedule
    teacher = ipndm(schedule, time_uniform(schedule, 16))
    pairs = lambda seed: teacher_pairs(denoiser, teacher, 16, seed, chunk=16, cache=False, progress=False)
    parent = ddim(schedule, time_uniform(schedule, 4))
    cfg = S4SConfig(epochs=2, chunk=16, radius=0.)
    learned = s4s(denoiser, parent, pairs(1000), pairs(2000), L2(), cfg, progress=False)
    held_out = pairs(0)
    old, new = (evaluate(denoiser, s, held_out, L2()) for s in (parent, learned.solver))
    notes.append(f"{name}: S4S of {parent.name} at 4 NFE, held out {old**.5:.4f} -> {new**.5:.4f}")
    assert not learned.fallback and new < .9 * old
    assert len(held_out.cond) == (name != "ddpm")

def test_time_may_differ_within_a_batch():
    denoiser, x, t = denoiser_of("sd", 3.), sample_noise(SEEDS, (4, 8, 8)), torch.tensor([.9, .5, .1234])
    cond = denoiser.conditions(SEEDS)
    with torch.no_grad():
        each = [denoiser(x[i:i+1], t[i], **{k: v[i:i+1] for k, v in cond.items()}) for i in SEEDS]
        assert off(denoiser(x, t, **cond), torch.cat(each)) < 1e-5

# ------------------------------------------------------------------------------------------------------------
# Prompts and classes
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, guidance, null, calls", [
    ("sd", None, None, 2), ("sd", 2., None, 3), ("sd", 2., "fog", 3), ("sdxl", 2., None, 2), ("sdxl", 2., "fog", 3),
    ("sd3", 2., None, 3), ("flux", None, None, 2), ("flux", 2., "fog", 3)])
def test_each_distinct_prompt_is_encoded_once(name, guidance, null, calls):
    "Also the null prompt, unless it is zeros, as the config of Stable Diffusion XL has it; and never again."
    pipe, counts = pipeline(name), {}
    encoders = {k: m for k, m in pipe.components.items() if k.startswith("text_encoder")}
    hooks = [m.register_forward_hook(lambda *_, k=k: counts.update({k: counts.get(k, 0) + 1}))
             for k, m in encoders.items()]
    denoiser = denoiser_of(name, guidance, conditions=["a cat", "rain", "a cat"], null=null)
    denoiser(torch.zeros(2, 4, 8, 8), .5, **denoiser.conditions(range(2)))
    for h in hooks: h.remove()
    assert counts == dict.fromkeys(encoders, calls)

def test_repeated_prompts_are_drawn_as_often_as_they_are_listed():
    denoiser = denoiser_of("sd", conditions=["a cat", "rain", "a cat"])
    table = denoiser.encoder_hidden_states
    assert torch.equal(table[0], table[2]) and not torch.equal(table[0], table[1])
    rows = denoiser.conditions(range(600))["condition"]
    assert (rows.bincount() - 200).abs().max() < 4 * (600 * 2 / 9)**.5
    assert torch.equal(denoiser.conditions([599, 5])["condition"], rows[[599, 5]])

def test_encoders_in_training_mode_do_not_drop_out():
    pipe = pipeline("sd3")
    before = denoiser_of("sd3").encoder_hidden_states
    pipe.text_encoder_3.train()
    try:
        assert torch.equal(denoiser_of("sd3").encoder_hidden_states, before)
        assert pipe.text_encoder_3.training
    finally: pipe.text_encoder_3.eval()

def test_null_condition_may_be_given():
    "As a prompt, or as tensors; Stable Diffusion XL's own is zeros."
    denoiser = denoiser_of("sdxl", 2.)
    n = len(PROMPTS)
    assert denoiser.denoiser.encoder_hidden_states[n].eq(0).all() and denoiser.null["condition"].tolist() == [n]
    fog = denoiser_of("sdxl", 2., null="fog").denoiser
    assert torch.equal(fog.encoder_hidden_states[n], denoiser_of("sdxl", conditions="fog").encoder_hidden_states[0])
    null = dict(encoder_hidden_states=torch.ones(1, 16, 32), text_embeds=torch.ones(1, 16))
    assert denoiser_of("sdxl", 2., null=null).denoiser.text_embeds[n].eq(1).all()

def test_sizes_and_guidance_scales_are_told_to_the_networks_that_ask():
    denoiser = denoiser_of("sdxl", size=(4, 12))
    assert denoiser.time_ids.tolist() == [[8, 24, 0, 0, 8, 24]] * 3 and denoiser.shape == (4, 4, 12)
    assert denoiser_of("flux", size=None).shape == (4, 128, 128)
    x, cond = torch.zeros(1, 4, 8, 8), dict(condition=torch.tensor([0]))
    a, b = (denoiser_of("flux", embedded_guidance=w)(x, .5, **cond) for w in (1., 9.))
    assert off(a, b) > 1e-4
    plain = denoiser_of("flux", pipe=make_flux(guidance_embeds=False))
    assert not hasattr(plain, "guidance") and plain(x, .5, **cond).isfinite().all()

def test_classes_of_a_u_net():
    net, scheduler = unet(num_class_embeds=5), diffusers().DDPMScheduler()
    denoiser = from_diffusers(net, scheduler=scheduler)
    x, labels = sample_noise(SEEDS, (3, 8, 8)), torch.tensor([0, 4, 2])
    with torch.no_grad():
        eps = EpsDenoiser(lambda x, t: net(x, t, labels).sample, denoiser.schedule, net_time=lambda t: 1000 * t - 1)
        assert torch.equal(denoiser(x, .5, condition=labels), eps(x, .5))
    assert set(denoiser.conditions(range(99))["condition"].tolist()) == set(range(5))
    with pytest.raises(ValueError, match="UNet2DModel, null: got {}; expected .* named class_labels"):
        from_diffusers(net, scheduler=scheduler, guidance=2.)
    some = dict(class_labels=torch.arange(4))
    guided = from_diffusers(net, some, 2., dict(class_labels=torch.tensor([4])), scheduler)
    assert guided.denoiser.class_labels.tolist() == [0, 1, 2, 3, 4] and guided.null["condition"].tolist() == [4]
    assert set(guided.conditions(range(99))["condition"].tolist()) == set(range(4))

# ------------------------------------------------------------------------------------------------------------
# What is left as it was, and how caches tell models apart
# ------------------------------------------------------------------------------------------------------------

def snapshot(pipe):
    parts = {k: m for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    modes = {k: [m.training for m in part.modules()] for k, part in parts.items()}
    kinds = {k: [(p.requires_grad, p.dtype, p.device, p.grad is None) for p in part.parameters()]
             for k, part in parts.items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for part in parts.values() for m in part.modules()]
    scheduler = {k: str(v) for k, v in vars(pipe.scheduler).items()}
    return modes, kinds, hooks, scheduler, dict(pipe.config), {k: digest(m.state_dict()) for k, m in parts.items()}

@pytest.mark.parametrize("name", MAKE)
def test_the_pipeline_stays_as_it_was(name):
    "After reading it, sampling, decoding and learning: modes, gradients, types, hooks, scheduler, configs, weights."
    pipe = pipeline(name)
    part = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    part.train()
    next(part.parameters()).requires_grad_(False)
    denoiser_of(name)   # transformers puts hooks of its own on a text encoder when it first encodes
    try:
        before = snapshot(pipe)
        denoiser = denoiser_of(name, None if name == "ddpm" else 2.)
        teacher, parent = (ddim(denoiser.schedule, time_uniform(denoiser.schedule, n)) for n in (3, 2))
        pairs, more = (teacher_pairs(denoiser, teacher, 4, seed, cache=False, progress=False) for seed in (0, 9))
        s4s(denoiser, parent, pairs, more, L2(), S4SConfig(epochs=1), progress=False)
        denoiser.decode(pairs.x_0)
        assert snapshot(pipe) == before
    finally:
        part.eval()
        next(part.parameters()).requires_grad_(True)

def test_fingerprints():
    "The same pipeline read again is the same model; another prompt, scale, size, config or weight is another."
    same = [fingerprint(denoiser_of("sd", 2.)) for _ in range(2)]
    v = make_sd(prediction_type="v_prediction")
    v.unet.load_state_dict(pipeline("sd").unet.state_dict())
    v.text_encoder.load_state_dict(pipeline("sd").text_encoder.state_dict())
    flipped = text_unet(flip_sin_to_cos=False)
    flipped.load_state_dict(pipeline("sd").unet.state_dict())
    other = pipeline("sd").components | dict(unet=flipped)
    others = [denoiser_of("sd", 3.), denoiser_of("sd"), *(denoiser_of("sd", 2., **kw) for kw in (
        dict(null="fog"), dict(size=16), dict(conditions=["a cat"]), dict(pipe=v), dict(pipe=pipeline("sd", 1)),
        dict(pipe=type(pipeline("sd"))(**other, requires_safety_checker=False))))]
    assert same[0] == same[1] and len({*same, *map(fingerprint, others)}) == 1 + len(others)
    assert not any("vae" in k for k in denoiser_of("sd").state_dict())

@pytest.mark.parametrize("name", ["sd_v", "flux", "dit"])
def test_half_precision_stays_inside(name):
    "States and answers in float32, close to those of the network in float32; times are not rounded."
    full, pipe = denoiser_of(name), pipeline(name)
    half = copy.deepcopy(pipe.unet if hasattr(pipe, "unet") else pipe.transformer).to(torch.bfloat16)
    denoiser = from_diffusers(half, {k: getattr(full, k) for k in full.names}, scheduler=pipe.scheduler, size=8)
    x, cond, seen = sample_noise(SEEDS, (4, 8, 8)), full.conditions(SEEDS), []
    def note(module, args, kw): seen.append((args[0].dtype, (kw["timestep"] if "timestep" in kw else args[1]).dtype))
    half.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad(): a, b = full(x, .3, **cond), denoiser(x, .3, **cond)
    assert b.dtype == torch.float32 and 0 < off(b, a) < .05
    assert seen == [(torch.bfloat16, torch.float32)]
    assert all(getattr(denoiser, k).dtype == torch.bfloat16 for k in full.names if k != "class_labels")

# ------------------------------------------------------------------------------------------------------------
# By hand, other autoencoders, images as targets
# ------------------------------------------------------------------------------------------------------------

def test_parts_put_together_by_hand():
    "Network, config of a scheduler, autoencoder, embeddings: the same denoiser as the pipeline's."
    pipe, whole = pipeline("sd_v"), denoiser_of("sd_v", 3.)
    rows = whole.denoiser.encoder_hidden_states
    config = dict(pipe.scheduler.config) | dict(_class_name="PNDMScheduler", skip_prk_steps=True)
    hand = from_diffusers(pipe.unet, dict(encoder_hidden_states=rows[:3]), 3., dict(encoder_hidden_states=rows[3:]),
                          config, pipe.vae)
    x, cond = sample_noise(SEEDS, hand.shape), hand.conditions(SEEDS)
    with torch.no_grad(): assert torch.equal(hand(x, .4, **cond), whole(x, .4, **cond))
    assert torch.equal(hand.decode(x), whole.decode(x)) and fingerprint(hand) == fingerprint(whole)
    assert isinstance(hand, GuidedDenoiser) and decoder_of(hand).vae is pipe.vae
    without = from_diffusers(pipe.unet, dict(encoder_hidden_states=rows[:3]), scheduler=pipe.scheduler)
    assert torch.equal(without.decode(x), x)

def test_autoencoders():
    "With shift; with means and deviations per channel; quantised (LDM): as each pipeline decodes."
    z = sample_noise(SEEDS, (4, 8, 8))
    with torch.no_grad():
        vae = autoencoder(latents_mean=[1., 2., 3., 4.], latents_std=[.5, 1., 2., 4.], scaling_factor=.3)
        by_hand = z * torch.tensor([.5, 1., 2., 4.]).reshape(4, 1, 1) / .3 + torch.arange(1., 5).reshape(4, 1, 1)
        assert torch.allclose(Decoder(vae)(z), vae.decode(by_hand).sample, atol=1e-5)
        vq = diffusers().VQModel(block_out_channels=(4,), norm_num_groups=2, num_vq_embeddings=8, scaling_factor=.5)
        ldm = diffusers().LDMPipeline(vq.eval(), unet(), diffusers().DDIMScheduler(**SD))
        denoiser = from_diffusers(ldm)
        assert torch.equal(denoiser.decode(z[:, :3]), vq.decode(z[:, :3] / .5).sample)
    assert denoiser.conditions(SEEDS) == {} and denoiser.shape == (3, 8, 8)

def test_a_decoder_that_overflows_is_named():
    vae = autoencoder()
    vae.decoder.conv_out.bias.data[0] = float("inf")
    latent = from_diffusers(unet(in_channels=4, out_channels=4), scheduler=diffusers().DDIMScheduler(), vae=vae)
    with pytest.raises(ValueError, match="gave NaN or infinity.*float32"): latent.decode(torch.zeros(1, 4, 8, 8))

class Features(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)
    def forward(self, x): return [self.conv(x).tanh()]

def test_a_solver_learns_from_decoded_images(tmp_path):
    "Gradients, quotients and forward mode through the decoder; checkpoints know decoder and distance."
    denoiser = denoiser_of("sd")
    schedule, distance = denoiser.schedule, Decoded(denoiser, FeatureDistance(Features()), chunk=3)
    teacher, parent = (ddim(schedule, time_uniform(schedule, n)) for n in (12, 3))
    pairs = teacher_pairs(denoiser, teacher, 12, 0, cache=False, progress=False)
    learned = s4s(denoiser, parent, pairs[:4], pairs[4:8], distance, S4SConfig(epochs=1), tmp_path, progress=False)
    old, new = (evaluate(denoiser, s, pairs[8:], distance) for s in (parent, learned.solver))
    assert new < old and len(list(tmp_path.glob("learn_*"))) == 1
    assert learned.solver.meta["distance"] == "decoded-featuredistance"
    x, y, v = pairs.x_0[:4], distance.target(pairs.x_0[4:8]), sample_noise(range(4), (4, 8, 8))
    slope = forward_mode(lambda x: distance.residual(x, y), (x,), (v,))[1]
    with torch.no_grad(): quotient = (distance.residual(x + .01 * v, y) - distance.residual(x - .01 * v, y)) / .02
    assert off(slope, quotient) < 1e-2
    same = Decoded(decoder_of(denoiser), distance.distance)
    assert distance.recipe() == same.recipe() != Decoded(Decoder(autoencoder()), distance.distance).recipe()
    with pytest.raises(ValueError): distance(x, y[:2])

def test_packing_is_the_pipeline_s():
    pipe, x = diffusers().FluxPipeline, sample_noise(SEEDS, (4, 6, 10))
    assert torch.equal(pack_tokens(x), pipe._pack_latents(x, 3, 4, 6, 10))
    assert torch.equal(unpack_tokens(pack_tokens(x), 6, 10), x)
    assert torch.equal(token_positions(6, 10), pipe._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32))

# ------------------------------------------------------------------------------------------------------------
# What is refused
# ------------------------------------------------------------------------------------------------------------

def refused(match, *args, **kw):
    with pytest.raises(ValueError, match=match) as e: from_diffusers(*args, **kw)
    assert "\n" not in str(e.value)

def test_other_models_are_refused_by_name():
    d = diffusers()
    scheduler = d.DDIMScheduler()
    pixart = d.PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=4, num_layers=1, sample_size=8,
                                        cross_attention_dim=8, caption_channels=8, norm_num_groups=4)
    refused("PixArtTransformer2DModel: expected one of UNet2DModel, ", pixart, scheduler=scheduler)
    refused("UNet2DConditionModel with in_channels=9: and out_channels=4: .*inpainting", text_unet(in_channels=9),
            scheduler=scheduler)
    for key, value in dict(time_cond_proj_dim=4, class_embed_type="timestep", num_class_embeds=7,
                           encoder_hid_dim_type="text_proj").items():
        net = text_unet(**{key: value}, **dict(encoder_hid_dim=16) if "hid" in key else {})
        refused(f"UNet2DConditionModel with {key}=.*: expected None", net, scheduler=scheduler)
    refused("UNet2DModel with time_embedding_type='fourier'", unet(time_embedding_type="fourier"), scheduler=scheduler)
    refused("UNet2DModel alone: pass scheduler=", unet())
    refused("UNet2DModel with sample_size=None: pass size=", unet(sample_size=None), scheduler=scheduler)
    refused("size=7: expected multiples of 2", make_flux(), conditions=PROMPTS, size=7)
    refused("has a controlnet", SimpleNamespace(components=dict(unet=unet(), controlnet=1)))
    refused("has no `unet` or `transformer`: prior", SimpleNamespace(components=dict(prior=1)))

def test_other_schedulers_are_refused_by_key():
    d, flow = diffusers(), dict(_class_name="DPMSolverMultistepScheduler", prediction_type="flow_prediction")
    backwards = d.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    for match, scheduler in {
            "with rescale_betas_zero_snr=True: at alpha = 0": d.DDIMScheduler(rescale_betas_zero_snr=True),
            "DDIMScheduler with prediction_type='x': expected one of epsilon": d.DDIMScheduler(prediction_type="x"),
            "EDMEulerScheduler: no alphas_cumprod": d.EDMEulerScheduler(),
            "ScoreSdeVeScheduler with prediction_type=None": d.ScoreSdeVeScheduler(),
            "timestep_type='continuous'": d.EulerDiscreteScheduler(timestep_type="continuous"),
            "FlowMatchEulerDiscreteScheduler with invert_sigmas=True": backwards,
            "use_flow_sigmas=False: contradicts prediction_type='flow_prediction'": flow,
            "_class_name='AutoencoderKL': expected a scheduler": dict(_class_name="AutoencoderKL")}.items():
        refused(match, unet(), scheduler=scheduler)
    wrapper, schedule, N = read_scheduler(flow | dict(use_flow_sigmas=True))
    assert isinstance(schedule, FlowSchedule) and N == 1000

def test_other_conditions_are_refused():
    refused("DDIMPipeline has no text encoder for prompts", pipeline("ddpm"), ["a cat"])
    refused("UNet2DModel, conditions: got .*'a'.*named nothing", pipeline("ddpm"), dict(a=torch.zeros(1)))
    refused("guidance=2.0: UNet2DModel has no conditions", pipeline("ddpm"), guidance=2.)
    refused("UNet2DConditionModel, conditions: got {}; .* named encoder_hidden_states", pipeline("sd"))
    refused("no prompts", pipeline("sd"), [])
    with pytest.raises(TypeError, match="got promts: without prompts nothing"):
        from_diffusers(pipeline("dit"), promts=PROMPTS)
    rows = dict(encoder_hidden_states=torch.zeros(2, 16, 32), text_embeds=torch.zeros(3, 16))
    refused("'text_embeds': .3, 16.*with equal n", pipeline("sdxl"), rows)
    rows["text_embeds"] = torch.zeros(2, 12)
    refused("projection_class_embeddings_input_dim=40: .* 36 numbers; is it a refiner", pipeline("sdxl"), rows)
    refused("SD3Transformer2DModel, null: got {}", pipeline("sd3"), dict(
        encoder_hidden_states=torch.zeros(2, 8, 32), pooled_projections=torch.zeros(2, 32)), 2.)

def test_zero_terminal_snr_begins_one_time_earlier():
    "v-prediction at alpha = 0 is left out, and every other time is where it was."
    d = diffusers()
    rescaled = dict(SD, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    net, scheduler = unet(), d.DDIMScheduler(**rescaled)
    denoiser, x = from_diffusers(net, scheduler=scheduler), sample_noise(SEEDS, (3, 8, 8))
    assert isinstance(denoiser, VDenoiser) and scheduler.alphas_cumprod[-1] < 1e-6
    scheduler.set_timesteps(1000)
    with torch.no_grad():
        for n in (998, 500, 0):
            x_0 = scheduler.step(net(x, n).sample, n, x).pred_original_sample
            assert off(denoiser(x, (n + 1) / 999), x_0) < 1e-5

@pytest.mark.parametrize("n", [1, 2, 4, 10])
def test_zero_terminal_snr_from_its_last_time(n):
    "DDIM from noise alone to the clean image, as diffusers' trailing times go; one time later is another sampler."
    scheduler = diffusers().DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012, clip_sample=False,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    net = pipeline("ddpm").unet
    scheduler.set_timesteps(n)
    x = sample_noise(range(2), (net.config.in_channels, 8, 8))
    t = [(int(v) + 1) / 1000 for v in scheduler.timesteps] + [0.]
    expected = x
    with torch.no_grad():
        for v in scheduler.timesteps: expected = scheduler.step(net(expected, v).sample, v, expected).prev_sample
    denoiser = from_diffusers(net, scheduler=scheduler, terminal=True, size=8)
    assert (dpm_solver(denoiser.schedule, t, 1)(denoiser, x) - expected).abs().max() < 1e-5
    with pytest.raises(ValueError, match="noise prediction from alpha=1e-06"): ddim(denoiser.schedule, t)
    with pytest.raises(ValueError, match="terminal=True: alpha is not 0"):
        from_diffusers(net, scheduler=diffusers().DDIMScheduler(), terminal=True)
