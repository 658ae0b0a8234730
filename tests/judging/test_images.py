"FID of folders, arrays and loaders: read as they are, or refused by name."
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from s4s_nb.judging import fid as m
from s4s_nb.judging.moments import Moments


class Pooled(nn.Module):
    "In Inception's place: the mean of each of 12 parts."
    mode, sha256, device = "legacy_tensorflow", "0" * 64, "cpu"
    def forward(self, img): return nn.functional.adaptive_avg_pool2d(img.double(), 2).flatten(1)


net = Pooled()
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 10, 8, 3), dtype=np.uint8)
TENSOR = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).contiguous()


def statistics(images, **kw): return m.image_statistics(images, net, progress=False, **kw)


def write(folder, pixels=PIXELS, name="{:03}.png", mode="RGB", **kw):
    for i, v in enumerate(pixels):
        path = folder / name.format(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(v).convert(mode).save(path, kw.get("format", "PNG"))
    return folder


@pytest.fixture(autouse=True)
def strict():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# folders

@pytest.mark.parametrize("name,format", [("{:03}.png", "PNG"), ("{:03}.PNG", "PNG"), ("{:03}.Tiff", "TIFF"),
    ("{:03}.bmp", "BMP"), ("{:03}", "PNG"), ("{:03}.jpg", "PNG"),
    ("cat {0}/é {0}.webp", "PNG"), ("00/1/{:03}.TGA", "TGA"),
    ("{:03}.ppm", "PPM")])
def test_any_name_and_format_is_the_same_set(tmp_path, name, format):
    write(tmp_path, name=name, format=format)
    found, exact = statistics(str(tmp_path)), statistics(TENSOR)
    assert (found.mean - exact.mean).abs().max() < 1e-10 and (found.cov - exact.cov).abs().max() < 1e-8
    assert found.n == 30 and found.resolution == "10x8" and found.source == str(tmp_path)
    assert m.fid(tmp_path, TENSOR, net, progress=False) < 1e-6


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK"])
def test_every_mode_is_read_as_pillow_and_clean_fid_do(tmp_path, mode):
    write(tmp_path, mode=mode, format="TIFF" if mode == "CMYK" else "PNG")
    for path in m.image_files(tmp_path):
        with Image.open(path) as img:
            assert img.mode == mode
            assert np.array_equal(m.read_image(path).permute(1, 2, 0), np.array(img.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_dropped_with_a_warning(tmp_path, mode):
    img = Image.fromarray(PIXELS[0]).convert("RGBA")
    img.putalpha(128)
    if mode == "P":
        img = Image.fromarray(PIXELS[0]).convert("P")
        img.info["transparency"] = img.getpixel((0, 0))
    img.convert(mode).save(tmp_path / "a.png", **({"transparency": img.getpixel((0, 0))} if mode == "P" else {}))
    with pytest.warns(UserWarning, match="a.png: its transparency is dropped"): m.read_image(tmp_path / "a.png")


def text(path): path.write_text("a list of files")
def truncated(path):
    Image.fromarray(PIXELS[0]).resize((400, 400)).resize((8, 10)).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:-40])
def nothing(path): path.write_bytes(b"")
def deep(path): Image.fromarray(PIXELS[0, :, :, 0].astype(np.uint16) * 257).save(path, "PNG")
def floats(path): Image.fromarray(PIXELS[0, :, :, 0].astype(np.float32)).save(path, "TIFF")
def moving(path):
    first, *rest = (Image.fromarray(v) for v in PIXELS[:3])
    first.save(path, "GIF", save_all=True, append_images=rest)
def page(path): path.write_text("<html>404</html>")
def array(path): np.savez(path.open("wb"), a=PIXELS)


@pytest.mark.parametrize("make", [text, truncated, nothing, deep, floats, moving, page, array])
@pytest.mark.parametrize("name", ["010b.png", "zz.JPG", "notes.txt"])
def test_a_file_that_is_no_image_is_refused_by_name(tmp_path, make, name):
    make(write(tmp_path) / name)
    with pytest.raises(ValueError, match=f"{name}: not an image to compute with: it|{name}: not an image.*truncated"):
        statistics(tmp_path)


@pytest.mark.parametrize("shape", [(10, 9), (9, 8), (8, 10), (100, 80)])
@pytest.mark.parametrize("name", ["000a.png", "zzz.png"])
def test_several_sizes_are_refused_and_two_files_named(tmp_path, shape, name):
    write(tmp_path)
    Image.fromarray(np.resize(PIXELS, (*shape, 3))).save(tmp_path / name)
    with pytest.raises(ValueError, match=rf"000.png is 8x10, .*{name} is {shape[1]}x{shape[0]}"): statistics(tmp_path)


def test_folders_without_images(tmp_path):
    (tmp_path / ".DS_Store").write_text("hidden files do not count")
    with pytest.raises(ValueError, match="no images in it"): statistics(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such folder"): m.fid(tmp_path / "a", tmp_path)
    one = write(tmp_path, PIXELS[:1]) / "000.png"
    with pytest.raises(ValueError, match="not a folder"): m.fid(one, tmp_path)
    with pytest.raises(ValueError, match="1 samples"): statistics(tmp_path)


# sets that are no pictures

MASKS = np.random.default_rng(1).integers(0, 2, (30, 10, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("images", [MASKS, MASKS * 0, torch.from_numpy(MASKS).permute(0, 3, 1, 2), MASKS[..., :1]])
def test_masks_of_0_and_1_are_refused(tmp_path, images):
    with pytest.raises(ValueError, match="above 1 of 255: masks"): statistics(images)
    if images.shape[-1] == 3:
        with pytest.raises(ValueError, match="above 1 of 255: masks"): statistics(write(tmp_path, np.array(images)))


@pytest.mark.parametrize("scale,shift", [(255, 0), (200, 20), (1, 7)])
def test_pictures_of_two_levels_are_warned_about(scale, shift):
    with pytest.warns(UserWarning, match="all 30 images have two levels"): statistics(MASKS * scale + shift)


@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (200, 30, 7)])
@pytest.mark.parametrize("where", [0, 13, 29])
def test_images_of_one_colour_are_warned_about_and_the_first_is_named(tmp_path, color, where):
    pixels = PIXELS.copy()
    pixels[where] = color
    with pytest.warns(UserWarning, match=f"1 of 30 .* one colour only, first image {where}"): statistics(pixels)
    with pytest.warns(UserWarning, match=f"1 of 30 images have one colour only, first .*{where:03}.png"):
        statistics(write(tmp_path, pixels))


def test_tensors_of_several_sizes_are_warned_about():
    with pytest.warns(UserWarning, match=r"several sizes: 10x8 \(image 0\), 10x7 \(image 30\)"):
        assert statistics([TENSOR, TENSOR[..., :7]]).resolution is None


# ways to hold images

FLOATS = TENSOR / 127.5 - 1
BYTES = np.frombuffer(PIXELS.tobytes(), np.uint8).reshape(PIXELS.shape)
SAME = dict(
    tensor=TENSOR, floats=FLOATS, double=FLOATS.double(), array=PIXELS, channels_first=TENSOR.numpy(),
    float_array=FLOATS.permute(0, 2, 3, 1).numpy(), readonly=BYTES,
    flipped_twice=PIXELS[::-1][::-1], batches=list(TENSOR.split(7)), arrays=[PIXELS[:11], PIXELS[11:]],
    loader=DataLoader(TensorDataset(FLOATS, torch.arange(30)), batch_size=8),
    single_loader=DataLoader(TensorDataset(FLOATS), batch_size=8), shuffled=DataLoader(TENSOR, 5, shuffle=True),
    dicts=[dict(pixel_values=v, label=[0]) for v in FLOATS.split(9)], tuples=[(v, "cat") for v in TENSOR.split(10)],
    lists=[list(v) for v in TENSOR.split(10)], stacked=TENSOR.reshape(3, 10, 3, 10, 8))


@pytest.mark.parametrize("name", SAME)
def test_the_same_images_give_the_same_statistics(name):
    found, exact = statistics(SAME[name]), statistics(TENSOR)
    assert found.n == 30 and (found.mean - exact.mean).abs().max() < 1e-10
    assert (found.cov - exact.cov).abs().max() < 1e-8


@pytest.mark.parametrize("images", [None, 3, net, nn.Linear(2, 2), object(), b"png", dict(images=TENSOR), [None],
    ["a.png"], [dict(latents=TENSOR)], [[]], [Image.fromarray(PIXELS[0])], [np.array(["a"])],
    Moments(torch.randn(9, 12))])
def test_what_holds_no_images_is_a_clear_error(images):
    for sides in ((images, TENSOR), (TENSOR, images)):
        with pytest.raises(TypeError, match="expected"): m.fid(*sides, net, progress=False)


@pytest.mark.parametrize("images,hint", [
    (TENSOR[0], r"one image is x\[None\]"), (TENSOR.permute(0, 2, 3, 1), r"x.permute\(0, 3, 1, 2\)"),
    (PIXELS[0], r"one image is x\[None\]"), (torch.zeros(2, 4, 8, 8), r"x\[:, :3\]"),
    (TENSOR.long(), "expected torch.uint8"), (TENSOR > 9, "expected torch.uint8"),
    (PIXELS.astype(np.int32), "expected torch.uint8"),
    (PIXELS / 1., "as torch.uint8"), (TENSOR.float(), "as torch.uint8"),
    (FLOATS * float("nan"), "NaN"), (TENSOR[:0], "expected"), ([], "0 images came"),
    (TENSOR[..., :0], "expected"), (torch.zeros(5), "expected"), (FLOATS.to(torch.complex64), "expected torch.uint8")])
def test_what_is_no_batch_of_images_is_refused_with_a_remedy(images, hint):
    with pytest.raises(ValueError, match=hint): statistics(images)


@pytest.mark.parametrize("images,said", [
    ((FLOATS + 1) / 2, r"are these in \[0, 1\]\? Then pass 2 \* x - 1"), (PIXELS / 255, r"are these in \[0, 1\]"),
    (PIXELS.astype(np.float32) / 255, r"are these in \[0, 1\]"), (TENSOR.half() / 255, r"are these in \[0, 1\]"),
    ((TENSOR / 255 - .485) / .229, "normalised by a mean"), ((TENSOR / 255 - .5) / .25, "normalised by a mean"),
    (FLOATS * 1.5, "normalised by a mean"), (TENSOR - 128., "diverged"), (FLOATS * 20, "diverged")])
def test_another_range_is_noticed(images, said):
    with pytest.warns(UserWarning, match=said): statistics(images)


@pytest.mark.parametrize("factor", [1., 1.05, .9])
def test_an_overshoot_is_not(factor): statistics(FLOATS * factor)


def test_no_network_is_fetched_for_what_is_refused(tmp_path, monkeypatch):
    def refuse(*args, **kw): raise AssertionError("fetches")
    monkeypatch.setattr(m, "inception", refuse)
    for bad in (tmp_path, tmp_path / "none", None, net):
        with pytest.raises((ValueError, TypeError, FileNotFoundError)): m.fid(TENSOR, bad)
    one = statistics(TENSOR)
    assert m.fid(one, one) < 1e-6
