"""ADM against an independent implementation, the `UNet2DModel` of diffusers: same weights, same outputs.

`tests/test_networks.py` compares it with the official one, for which the reference folder must be at hand.
"""
import pytest
import torch

from s4s_nb.files.checks import import_torchvision
from s4s_nb.models.adm import ADMBlock, DhariwalUNet

SMALL = dict(model_channels=128, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,)) # with 4 heads


@pytest.fixture(scope="module")
def theirs():
    "A small network in the configuration that diffusers uses for ImageNet at 64x64, with random weights."
    import_torchvision()
    from diffusers import UNet2DModel
    net = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(128, 256), layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), downsample_type="resnet",
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), upsample_type="resnet", num_class_embeds=5,
        resnet_time_scale_shift="scale_shift", attention_head_dim=64, attn_norm_num_groups=32)
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters(): p.data.normal_(generator=generator).mul_(.5 if p.ndim == 1 else p[0].numel()**-.5)
    return net.eval().requires_grad_(False)


def their_blocks(net):
    "(residual block, attention behind it or None), in the order of ours"
    for b in [*net.down_blocks, net.mid_block, *net.up_blocks]:
        yield from zip(b.resnets, [*getattr(b, "attentions", []), None, None])
        for name in ("downsamplers", "upsamplers"): yield from zip(getattr(b, name, None) or [], [None])


def renamed(resnet, attention, heads: int) -> dict:
    "The weights of such a pair under the names of `ADMBlock`"
    parts = dict(norm0=resnet.norm1, conv0=resnet.conv1, affine=resnet.time_emb_proj, norm1=resnet.norm2,
                 conv1=resnet.conv2, skip=resnet.conv_shortcut)
    if attention: parts |= dict(norm2=attention.group_norm, proj=attention.to_out[0])
    weights = {f"{ours}.{k}": v for ours, layer in parts.items() if layer for k, v in layer.state_dict().items()}
    for k in ("weight", "bias") if attention else (): # three layers become one that interleaves them, head by head
        three = attention.to_q, attention.to_k, attention.to_v
        qkv = [getattr(layer, k).unflatten(0, (heads, -1)) for layer in three]
        weights[f"qkv.{k}"] = torch.stack(qkv, 2).flatten(0, 2)
    return {k: v[..., None, None] if k in ("qkv.weight", "proj.weight") else v for k, v in weights.items()}


def test_adm_is_the_network_that_diffusers_has_for_imagenet(theirs):
    ours = DhariwalUNet(8, 3, label_dim=5, **SMALL).eval().requires_grad_(False)
    blocks = [m for half in (ours.enc, ours.dec) for m in half.values() if isinstance(m, ADMBlock)]
    for block, pair in zip(blocks, their_blocks(theirs), strict=True):
        weights = renamed(*pair, block.heads)
        assert set(weights) == {k for k, _ in block.named_parameters()}
        block.load_state_dict(block.state_dict() | weights)
    time = theirs.time_embedding
    for a, b in ((ours.map_layer0, time.linear_1), (ours.map_layer1, time.linear_2), (ours.out_conv, theirs.conv_out),
                 (ours.enc["8x8_conv"], theirs.conv_in), (ours.out_norm, theirs.conv_norm_out)):
        a.load_state_dict(b.state_dict())
    ours.map_label.weight.copy_(theirs.class_embedding.weight.T)
    x, c, label = torch.randn(2, 3, 8, 8), torch.tensor([.3, -1.2]), torch.tensor([4, 1])
    expected = theirs(x, c, label).sample
    deviation = (ours(x, c, torch.eye(5)[label]) - expected).abs().max()
    assert deviation <= 2e-5 * expected.abs().max() and expected.std() > .1
