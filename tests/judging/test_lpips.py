"LPIPS: its backbone comes as every other file does, and is the package's own network."
import hashlib
import sys
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch

from s4s_nb.files.checks import import_torchvision
from s4s_nb.files.download import DownloadError
from s4s_nb.judging import distance as m

NETS = "vgg", "alex", "squeeze"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "Files of the published names and layout, with random convolutions: folder, and what it should give"
    models, folder, found = import_torchvision().models, tmp_path_factory.mktemp("published"), {}
    for net, make in dict(alex=models.alexnet, squeeze=models.squeezenet1_1).items():
        torch.manual_seed(1)
        weights = {k: v for k, v in make(weights=None).state_dict().items() if k.startswith("features.")}
        path = folder / m.BACKBONES[net][0]
        torch.save(weights, path, _use_new_zipfile_serialization=net == "alex")   # both layouts
        found[net] = path.name, hashlib.sha256(path.read_bytes()).hexdigest()
    return folder, found


@pytest.fixture
def alone(tmp_path, monkeypatch, published):
    "No file of torchvision's, an empty cache, and the hashes of the files above"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("S4S_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(m, "BACKBONES", m.BACKBONES | published[1])
    def refuse(*args, **kw): raise AssertionError("torchvision downloads")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    return tmp_path


@pytest.fixture
def mirror(published, monkeypatch):
    handler = partial(SimpleHTTPRequestHandler, directory=published[0])
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("S4S_MIRROR", f"{m.TORCHVISION}=http://127.0.0.1:{server.server_port}/")
    yield
    server.shutdown()


def images(): return torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("variable", ["S4S_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_says_which_file_and_where_it_belongs(alone, monkeypatch, net, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(DownloadError, match=rf"{m.BACKBONES[net][0]} is missing, and {variable} forbids") as e:
        m.LPIPS(net)(*images())
    assert m.TORCHVISION in str(e.value) and str(alone / "cache") in str(e.value)


def test_without_a_network_it_is_our_error(alone, monkeypatch):
    monkeypatch.setenv("S4S_MIRROR", f"{m.TORCHVISION}=http://127.0.0.1:9/")
    with pytest.raises(DownloadError, match="no connection"): m.LPIPS("squeeze")(*images())


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_mirror_and_cache_hold_and_the_number_is_the_packages(alone, mirror, published, monkeypatch, net):
    a, b = images()
    d = m.LPIPS(net)
    state = torch.get_rng_state()
    ours = d(a, b)
    assert torch.equal(torch.get_rng_state(), state)   # learning draws what it would have drawn
    name = m.BACKBONES[net][0]
    assert (alone / "cache" / "downloads" / name).is_file()
    monkeypatch.setenv("S4S_OFFLINE", "1")
    assert torch.equal(m.LPIPS(net)(a, b), ours)        # from the cache
    with pytest.raises(DownloadError): m.LPIPS(net, cache=alone / "other")(a, b)
    from lpips import LPIPS as Theirs
    weights = torch.load(published[0] / name)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lax(torch.nn.Module.load_state_dict))
    for module in ("alexnet", "squeezenet"):
        monkeypatch.setattr(f"torchvision.models.{module}.load_state_dict_from_url", lambda *v, **kw: weights,
                            raising=False)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *v, **kw: weights)
    theirs = Theirs(net=net, verbose=False)(a, b).flatten()
    assert torch.allclose(ours, theirs, rtol=1e-4) and (d(a, a) == 0).all()


def lax(load):
    "Files above have no classifier"
    def call(self, state, strict=True, **kw): return load(self, state, strict=False, **kw)
    return call


def test_what_torchvision_already_has_is_used_if_it_is_right(alone, published, monkeypatch):
    monkeypatch.setenv("S4S_OFFLINE", "1")
    name = m.BACKBONES["alex"][0]
    there = alone / "torch" / "hub" / "checkpoints" / name
    there.parent.mkdir(parents=True)
    there.write_bytes((published[0] / name).read_bytes())
    assert m.backbone_file("alex") == there and m.LPIPS("alex")(*images()).min() > 0
    there.write_bytes(b"half of it")
    with pytest.raises(DownloadError, match="is missing"): m.backbone_file("alex")


def test_a_changed_file_is_not_believed(alone, mirror, monkeypatch):
    monkeypatch.setattr(m, "BACKBONES", m.BACKBONES | dict(alex=(m.BACKBONES["alex"][0], "0" * 64)))
    with pytest.raises(DownloadError, match="the sha256 is"): m.LPIPS("alex")(*images())


def test_random_backbones_need_no_file_and_the_cache_is_no_part_of_the_recipe(alone, monkeypatch):
    monkeypatch.setenv("S4S_OFFLINE", "1")
    d = m.LPIPS("squeeze", pnet_rand=True)
    assert d(*images()).shape == (3,) and m.LPIPS(cache="a").recipe() == m.LPIPS().recipe()


@pytest.mark.parametrize("missing", ["lpips", "torchvision"])
def test_a_missing_package_is_named(alone, mirror, monkeypatch, missing):
    for k in [k for k in sys.modules if k.split(".")[0] == missing]: monkeypatch.delitem(sys.modules, k)
    if missing == "torchvision": monkeypatch.setattr(sys, "meta_path", [Without(missing), *sys.meta_path])
    else: monkeypatch.setitem(sys.modules, missing, None)
    with warnings.catch_warnings(), pytest.raises(ImportError, match=r"pip install 's4s_nb\[paper\]'"):
        m.LPIPS("alex").build("cpu")


class Without:
    "An import system in which a package is missing"
    def __init__(self, name): self.name = name
    def find_spec(self, name, path=None, target=None):
        if name == self.name: raise ModuleNotFoundError(f"No module named {name!r}", name=name)
