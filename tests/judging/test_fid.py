"FID: the protocol's numbers, files nobody should trust, and a small TorchScript network in Inception's place."
import hashlib
import io
import os
import pickle
import sys
import urllib.request
import zipfile
from dataclasses import replace
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from s4s_nb.files.checks import import_torchvision
from s4s_nb.judging import fid as m

LEGACY = "legacy_tensorflow"


class Pooled(nn.Module):
    "Called as FID's Inception: 48 averages and zeros."
    def __init__(self, size: int = 2048):
        super().__init__()
        self.layers, self.size = nn.Identity(), size
    def forward(self, img, return_features: bool = False):
        assert return_features
        return F.pad(F.adaptive_avg_pool2d(img.to(torch.float64), 4).flatten(1), (0, self.size - 48))


class Bomb:
    "Makes a folder when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


def sha256(path): return hashlib.sha256(path.read_bytes()).hexdigest()


def detector(folder, size=2048):
    path = folder / "inception-2015-12-05.pt"
    torch.jit.script(Pooled(size)).save(str(path))
    return path


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = detector(tmp_path_factory.mktemp("net"))
    return m.inception(path, sha256=sha256(path))


@pytest.fixture(scope="module")
def some():
    x = torch.randn(50, 2048, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return m.Statistics(x.mean(0), x.T.cov(), LEGACY, 50, "32x32", "f" * 64, "noise")


def pixels(n, seed=0): return torch.randint(20, 200, (n, 3, 8, 8), dtype=torch.uint8,
                                            generator=torch.Generator().manual_seed(seed))


# pixels

@given(st.floats(-2, 2))
def test_conversions_are_their_formulas(x):
    "In exact arithmetic, for float64 that does not sit on the edge between two levels."
    v = Fraction(x)
    for convert, exact in ((m.rounded, v * Fraction(255, 2) + 128), (m.truncated, (v + 1) / 2 * 255)):
        if abs(exact - round(exact)) < 1e-9: continue
        assert convert(torch.tensor(x, dtype=torch.float64)).item() == min(max(floor(exact), 0), 255)


def test_every_level_has_its_interval():
    k = torch.arange(256, dtype=torch.float64)
    for part in (.01, .5, .99):
        assert torch.equal(m.rounded((k + part - 128) / 127.5).long(), k.long())
        assert torch.equal(m.truncated((k + part) / 127.5 - 1).long(), k.long())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_low_precision_images_are_converted_in_single_precision(dtype):
    x = (torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)
    assert torch.equal(m.uint8_images(x), m.rounded(x if dtype == torch.float64 else x.float()))


@pytest.mark.parametrize("bad", [torch.zeros(3, 8, 8), torch.zeros(2, 8, 8, 3), torch.zeros(2, 4, 8, 8),
                                 torch.zeros(0, 3, 8, 8), torch.full((2, 3, 8, 8), float("inf")),
                                 torch.full((2, 3, 8, 8), float("-inf")), torch.full((2, 3, 8, 8), 200),
                                 torch.full((2, 3, 8, 8), 3.)])
def test_what_is_no_image_is_refused(bad):
    with pytest.raises(ValueError, match=r"expected|solver has failed"): m.uint8_images(bad)


def test_ranges_that_may_be_right_are_warned_about():
    x = torch.rand(2, 3, 8, 8)
    with pytest.warns(UserWarning, match=r"\[0, 1\]"): m.uint8_images(x)
    with pytest.warns(UserWarning, match="diverged"): m.uint8_images(100 * x - 50)


# the network

def test_detector_is_used_as_clean_fid_uses_it(net):
    import_torchvision()
    from cleanfid.features import get_reference_statistics  # noqa: F401  (the module imports)
    from cleanfid.fid import get_batch_features
    x = pixels(5)
    assert np.array_equal(get_batch_features(x, net, "cpu"), net.base(x, return_features=True))
    assert net.mode == LEGACY and not any(p.requires_grad for p in net.parameters())


def test_nothing_is_downloaded_or_taken_from_the_temporary_folder(tmp_path, monkeypatch):
    def refuse(*args, **kw): raise AssertionError("downloads")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    path = detector(tmp_path)
    m.inception(path, sha256=sha256(path))
    with pytest.raises(FileNotFoundError): m.inception(tmp_path / "none" / path.name)


def test_without_a_path_the_verified_file_is_fetched(tmp_path, monkeypatch):
    asked, path = [], detector(tmp_path)
    def fetch(url, sha256=None, cache=None):
        asked.append((url, sha256))
        return path
    monkeypatch.setattr(m, "fetch", fetch)
    with pytest.raises(ValueError, match="refused"): m.inception()
    assert asked == [(m.INCEPTION_URL, m.INCEPTION_SHA256)]


def eager(path): torch.save(dict(w=torch.zeros(2)), path)
def pickled(path): path.write_bytes(pickle.dumps(Bomb(path.parent / "ran")))
def bomb_in_zip(path): torch.save(Bomb(path.parent / "ran"), path)
def empty(path): path.write_bytes(b"")
def page(path): path.write_text("<html>404</html>")
def other_network(path): torch.jit.script(nn.Linear(2, 2)).save(str(path))
def other_size(path): detector(path.parent, 64)


@pytest.mark.parametrize("make", [eager, pickled, bomb_in_zip, empty, page, other_network, other_size])
def test_other_files_are_refused_and_run_nothing(make, tmp_path):
    path = tmp_path / "inception-2015-12-05.pt"
    make(path)
    with pytest.raises(ValueError, match="refused, its sha256"): m.inception(path)
    with pytest.raises(ValueError, match="not TorchScript of FID's Inception"): m.inception(path, sha256=sha256(path))
    assert not (tmp_path / "ran").exists()


def test_missing_clean_fid_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanfid.inception_torchscript", None)
    path = detector(tmp_path)
    with pytest.raises(ImportError, match=r"pip install 's4s_nb\[paper\]'"): m.inception(path, sha256=sha256(path))


# moments

def test_distance_is_clean_fids():
    import_torchvision()
    from cleanfid.fid import frechet_distance
    g = torch.Generator().manual_seed(0)
    def draw(*shape): return torch.randn(*shape, generator=g, dtype=torch.float64)
    for d in (3, 40):
        a, b = (m.Statistics(draw(d), draw(d, 4 * d).cov(), LEGACY) for _ in range(2))
        theirs = frechet_distance(*(v.numpy() for s in (a, b) for v in (s.mean, s.cov)))
        assert abs(m.fid(a, b) - theirs) < 1e-6 * theirs and abs(m.fid(b, a) - theirs) < 1e-6 * theirs


@pytest.mark.parametrize("sizes,chunk", [([60], 1), ([60], 59), ([1, 58, 1], 100), ([20, 30, 10], 7)])
def test_chunks_and_batches_do_not_matter(net, sizes, chunk):
    x = pixels(60)
    f = net(x).double()
    got = m.image_statistics(x[torch.randperm(60)].split(sizes), net, 60, chunk=chunk, progress=False)
    assert (got.mean - f.mean(0)).abs().max() < 1e-10 and got.n == 60
    assert (got.cov - f.T.cov()).abs().max() < 1e-10 * f.T.cov().abs().max()


def test_a_gaussian_of_known_moments_gives_the_closed_form(net):
    "Uniform images: all 48 averages of an image are its level, so only variance and mean of the levels count."
    def levels(values): return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    a, b = (m.image_statistics([levels(v)], net, progress=False) for v in ([10, 20, 30, 40], [110, 130, 150, 170]))
    exact = 48 * (115**2 + np.var([10, 20, 30, 40], ddof=1))   # b: mean 140 instead of 25, twice the spread
    assert abs(m.fid(a, b) - exact) < 1e-7 * exact   # of rank one: the root of a zero eigenvalue keeps half the digits


def test_ranges_merge_to_the_whole(net, some):
    x = pixels(60)
    whole, a, b, c = (m.image_statistics([v], net, progress=False) for v in (x, x[:10], x[10:30], x[30:]))
    for both in (a + b + c, c + (a + b)):
        assert both.n == 60 and (both.mean - whole.mean).abs().max() < 1e-10 and both.detector == net.sha256
        assert (both.cov - whole.cov).abs().max() < 1e-10 * whole.cov.abs().max()
    with pytest.raises(ValueError, match="of noise is not recorded"): replace(some, n=None) + some


def test_images_of_several_sizes_have_no_resolution(net):
    x = pixels(4)
    assert m.image_statistics([x, x[..., :6]], net, progress=False).resolution is None
    with pytest.raises(ValueError, match="1 samples"): m.image_statistics([x[:1]], net, progress=False)


@pytest.mark.parametrize("change", [dict(mode="clean"), dict(resolution="64x64"), dict(detector="0" * 64)])
def test_what_was_made_otherwise_is_not_compared(some, change):
    other = replace(some, **change)
    for use in (m.fid, lambda a, b: a + b):
        with pytest.raises(ValueError, match="cannot be compared"): use(some, other)
    some.check(replace(some, resolution=None, detector=None, n=None))   # not recorded: no contradiction


# files

def test_statistics_come_back_exactly_and_edm_can_read_them(tmp_path, some):
    m.save_statistics(tmp_path / "a.npz", some)
    edm = dict(np.load(tmp_path / "a.npz"))   # as EDM's script does
    assert np.array_equal(edm["mu"], some.mean) and np.array_equal(edm["sigma"], some.cov)
    back = m.load_statistics(tmp_path / "a.npz", LEGACY)
    m.save_statistics(tmp_path / "b.npz", back)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_openai_references_are_read_without_their_images(tmp_path, some):
    path = tmp_path / "VIRTUAL_lsun_bedroom256.npz"
    images = np.array([Bomb(tmp_path / "ran")])   # would run if it were read
    np.savez(path, mu=some.mean.float(), sigma=some.cov.float(), mu_s=np.zeros(2023), arr_0=images)
    found = m.load_statistics(path, LEGACY)
    assert torch.equal(found.mean, some.mean.float().double()) and found.mean.dtype == torch.float64
    assert found.n is None and not (tmp_path / "ran").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, some, monkeypatch):
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")
    def fail(*args): raise OSError("disk full")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError): m.save_statistics(path, some)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


MU, SIGMA = np.zeros(2048), np.eye(2048)


def with_entry(i, j, value):
    out = SIGMA.copy()
    out[i, j] = value
    return out


@pytest.mark.parametrize("arrays,message", [
    (dict(mu=MU), "expected an .npz with mu and sigma"),
    (dict(mu=MU[:64], sigma=SIGMA[:64, :64]), "expected \\(2048,\\)"),
    (dict(mu=MU[None], sigma=SIGMA), "expected \\(2048,\\)"),
    (dict(mu=MU * float("nan"), sigma=SIGMA), "NaN or infinity"),
    (dict(mu=MU, sigma=with_entry(3, 3, np.inf)), "NaN or infinity"),
    (dict(mu=MU, sigma=with_entry(0, 1, .5)), "not symmetric"),
    (dict(mu=MU, sigma=with_entry(5, 5, -1)), "negative variance"),
    (dict(mu=MU + 1j, sigma=SIGMA), "not a file of statistics"),
    (dict(mu=np.array(["0"] * 2048), sigma=SIGMA), "not a file of statistics"),
    (dict(mu=MU, sigma=SIGMA, mode="inception"), "expected one of: legacy_tensorflow, clean"),
    (dict(mu=MU, sigma=SIGMA, mode="clean"), "its mode is 'clean', not 'legacy_tensorflow'"),
    (dict(mu=MU, sigma=SIGMA, n=np.array([1, 2])), "not a file of statistics")])
def test_arrays_that_are_no_statistics_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message): m.load_statistics(tmp_path / "a.npz", LEGACY)


def test_files_that_are_no_statistics_are_refused_and_run_nothing(tmp_path, some):
    m.save_statistics(good := tmp_path / "good.npz", some)
    np.save(array := io.BytesIO(), MU)
    np.savez(objects := io.BytesIO(), mu=np.array([Bomb(tmp_path / "ran")]), sigma=SIGMA)
    whole = good.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    bad = tmp_path / "bad.npz"
    for data in (b"", b"<html>", pickle.dumps(Bomb(tmp_path / "ran")), array.getvalue(), objects.getvalue(),
                 bytes(flipped), whole[:100], whole[:len(whole) // 2], whole[:-10]):
        bad.write_bytes(data)
        with pytest.raises(ValueError, match="not a file of statistics"): m.load_statistics(bad, LEGACY)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError): m.load_statistics(tmp_path / "absent.npz")


def test_a_zip_that_is_no_npz_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as z: z.writestr("mu", "text")
    with pytest.raises(ValueError, match="not a file of statistics"): m.load_statistics(tmp_path / "a.npz", LEGACY)
