"The six published models: files of the real formats, small, from a server on this machine, to the end of a run."
import functools
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from compvis_file import LISTS, narrow, narrow_state, write_ckpt
from edm_pickle import write_edm_pickle

from s4s_nb.files.unpickle import RefusedFile
from s4s_nb.judging import fid
from s4s_nb.lab.cell import Cell
from s4s_nb.lab.setup import CellSetup, ranked_teachers, setup_identity
from s4s_nb.lab.sweep import run_grid
from s4s_nb.models.adm import edm_network
from s4s_nb.models.cards import card_of
from s4s_nb.models.compvis import compvis
from s4s_nb.models.pretrained import letter_tokenizer, load, load_edm, randomised

ROOT = Path(__file__).resolve().parents[2]
EDM = "cifar10", "ffhq", "afhqv2"
ALL = (*EDM, *LISTS)
LDM_SHAPE = dict(mscoco=[4, 8, 8], lsun_bedroom=[3, 8, 8], imagenet=[3, 8, 8])


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass
    def log_error(self, *args): pass


def edm_file(folder, name, c):
    "A random network in NVIDIA's format; the entries of the card that describe it"
    kwargs = c["smoke"]["network"]
    net = randomised(lambda: edm_network("EDMPrecond", kwargs), seed=ALL.index(name))
    write_edm_pickle(folder / f"{name}.pkl", net, "EDMPrecond", kwargs)
    return dict(files=dict(network=dict(url=f"{name}.pkl", sha256=None)))

def compvis_file(folder, name, c):
    "A narrow model in CompVis' format, and what belongs to its prompts; the entries of the card that describe it"
    network, entry = narrow(c["network"]), dict(url=f"{name}.ckpt", sha256=None)
    if name == "lsun_bedroom": entry |= dict(url=f"{name}.zip", member="model.ckpt")
    write_ckpt(folder / entry["url"], name, network, entry.get("member"))
    files = dict(network=entry)
    if name == "mscoco":
        letter_tokenizer(folder)
        captions = [dict(image_id=i, caption=f"a photo of thing {i}.") for i in range(110)]
        with zipfile.ZipFile(folder / "annotations.zip", "w") as z:
            z.writestr("annotations/captions_val2014.json", json.dumps(dict(annotations=captions[:64])))
            z.writestr("annotations/captions_train2014.json", json.dumps(dict(annotations=captions[60:])))
        files |= dict(vocabulary=dict(url="vocab.json", sha256=None), merges=dict(url="merges.txt", sha256=None))
        for part, kind in dict(captions="val", training_captions="train").items():
            files[part] = dict(url="annotations.zip", member=f"annotations/captions_{kind}2014.json", sha256=None)
    return dict(files=files, network=network, shape=LDM_SHAPE[name])

@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "A folder of cards whose smoke variants have files on a server of this machine; environment variables to use it"
    files, cards = tmp_path_factory.mktemp("server"), tmp_path_factory.mktemp("cards")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=files))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ALL:
        c = card_of(name)
        c["smoke"] |= edm_file(files, name, c) if name in EDM else compvis_file(files, name, c)
        for entry in c["smoke"]["files"].values():
            entry["url"] = f"http://127.0.0.1:{server.server_address[1]}/{entry['url']}"
        (cards / f"{name}.json").write_text(json.dumps(c))
    yield dict(S4S_CARDS=str(cards), S4S_CACHE=str(tmp_path_factory.mktemp("cache")))
    server.shutdown()

@pytest.fixture
def environment(served, monkeypatch):
    for k, v in served.items(): monkeypatch.setenv(k, v)


@torch.no_grad()
@pytest.mark.parametrize("name", EDM)
def test_edm_files_are_the_networks_that_were_written(environment, name):
    model, kwargs = load(f"{name}_smoke"), card_of(name)["smoke"]["network"]
    net = randomised(lambda: edm_network("EDMPrecond", kwargs), seed=ALL.index(name))
    x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x, torch.tensor(2.)), net(x, torch.full((2,), 2.)))

@torch.no_grad()
@pytest.mark.parametrize("name", LISTS)
def test_latent_files_are_the_models_that_were_written(environment, name):
    c = card_of(f"{name}_smoke")
    model, parts = load(f"{name}_smoke", guidance=None if c["guidance"] is None else 1.), None
    parts = compvis(narrow_state(name, c["network"]), c["network"])
    x = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    cond, t = model.conditions([5, 1_000_003]), torch.tensor(.4, dtype=torch.float64)
    context = {}
    if name == "imagenet":
        assert int(cond["condition"][0]) == 5 and int(cond["condition"][1]) < 1000
        context = dict(encoder_hidden_states=parts.condition[cond["condition"], None])
    if name == "mscoco":
        told = model.denoiser.denoiser
        assert told.prompts[int(cond["condition"][0])] == "a photo of thing 5." and int(cond["condition"][1]) >= 64
        texts = [told.prompts[i] for i in cond["condition"]]
        context = dict(encoder_hidden_states=told.encode(texts))
    eps = parts.unet(x, torch.tensor([399., 399.]), **context).sample
    a = parts.alphas_cumprod[399]
    expected = (x - (1 - a).sqrt().float() * eps) / a.sqrt().float()
    assert (model(x, t, **cond) - expected).abs().max() < 1e-4 * expected.abs().max()
    image = parts.autoencoder.decode(x / c["network"].get("scale_factor", 1.)).sample
    assert (model.decode(x) - image).abs().max() < 1e-5 * image.abs().max()

def test_what_was_fetched_once_needs_no_network(environment, monkeypatch):
    load("afhqv2_smoke")
    monkeypatch.setenv("S4S_OFFLINE", "1")
    assert load("afhqv2_smoke").shape == (3, 8, 8)

def test_a_file_of_another_model_is_refused(environment, tmp_path, monkeypatch):
    c = card_of("cifar10")
    c["smoke"]["shape"] = [3, 16, 16]
    (tmp_path / "cifar10.json").write_text(json.dumps(c))
    monkeypatch.setenv("S4S_CARDS", str(tmp_path))
    with pytest.raises(ValueError, match=r"shape \[3, 8, 8\], the card says \[3, 16, 16\]"): load("cifar10_smoke")

def test_a_file_of_your_own(tmp_path):
    kwargs = card_of("cifar10")["smoke"]["network"] | dict(label_dim=3)
    net = randomised(lambda: edm_network("EDMPrecond", kwargs))
    write_edm_pickle(tmp_path / "mine.pkl", net, "EDMPrecond", kwargs)
    model = load_edm(tmp_path / "mine.pkl", guidance=2.)
    cond, x = model.conditions(range(4)), torch.randn(4, 3, 8, 8)
    assert cond["class_labels"].shape == (4, 3) and model(x, torch.tensor(1.), **cond).isfinite().all()
    (tmp_path / "page.pkl").write_text("<!doctype html><html>not found</html>")
    with pytest.raises(RefusedFile): load_edm(tmp_path / "page.pkl")

def test_a_published_metric_is_inception_and_its_reference(environment, tmp_path, monkeypatch):
    "With a small network in Inception's place; a reference of another mode is refused."
    torch.jit.script(Pooled()).save(str(tmp_path / "inception-2015-12-05.pt"))
    path = tmp_path / "inception-2015-12-05.pt"
    monkeypatch.setattr(fid, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(fid, "fetch", lambda url, sha256=None, cache=None: path)
    c = card_of("cifar10") | dict(name="mine", files=card_of("cifar10_smoke")["files"], shape=[3, 8, 8])
    c["files"]["reference"] = dict(path="reference.npz", mode="legacy_tensorflow", n=99)
    (tmp_path / "mine.json").write_text(json.dumps(c))
    monkeypatch.setenv("S4S_CARDS", str(tmp_path))
    def reference(mode):
        np.savez(tmp_path / "reference.npz", mu=np.zeros(2048), sigma=np.eye(2048), **mode)
        return CellSetup("mine", cache=tmp_path / "cache")
    setup = reference({})
    moments = setup.moments(torch.rand(5, 3, 8, 8) * 2 - 1)
    assert moments.n == 5 and moments.mean.shape == (2048,) and moments.mean[:48].min() > 0
    assert setup.real_reference[1]["n"] == 99 and setup_identity(setup)["perceptual"] == "lpips vgg"
    with pytest.raises(ValueError, match="mode is 'clean'"): _ = reference(dict(mode="clean")).real

class Pooled(torch.nn.Module):
    "In Inception's place"
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Identity()
    def forward(self, img, return_features: bool = False):
        pooled = torch.nn.functional.adaptive_avg_pool2d(img.to(torch.float64), 4).flatten(1)
        return torch.nn.functional.pad(pooled, (0, 2000))

def test_a_card_of_your_own(tmp_path, monkeypatch):
    "The one of the documentation, with a metric that needs no Inception."
    kwargs = card_of("cifar10")["smoke"]["network"]
    write_edm_pickle(tmp_path / "mine.pkl", randomised(lambda: edm_network("EDMPrecond", kwargs)), "EDMPrecond", kwargs)
    entry = dict(network=dict(path="mine.pkl"))
    mine = dict(format="edm", shape=[3, 8, 8], t_range=[.002, 80.], files=entry)
    (tmp_path / "mine.json").write_text(json.dumps(mine | dict(metric="random", perceptual=.1)))
    (tmp_path / "bare.json").write_text(json.dumps(mine))
    monkeypatch.setenv("S4S_CARDS", str(tmp_path))
    setup = CellSetup("mine", cache=tmp_path / "cache")
    assert setup.teacher_choice == ranked_teachers(setup)[0]["teacher"]
    assert setup_identity(setup)["model"]["name"] == "mine"
    with pytest.raises(ValueError, match="part='reference'; expected one of: network"): _ = CellSetup("bare").real
    other = dict(files=dict(network=entry["network"] | dict(sha256="0" * 64)))
    (tmp_path / "mine.json").write_text(json.dumps(mine | other))
    with pytest.raises(ValueError, match="refused, its sha256 is"): load("mine")

def test_a_missing_reference_is_noticed_before_anything_is_fetched(tmp_path, monkeypatch):
    "MS-COCO has none; its card says what to do."
    monkeypatch.setenv("S4S_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("S4S_OFFLINE", "1")
    with pytest.raises(ValueError, match="validation images of the first 30,000 image_ids"):
        run_grid([Cell("mscoco")], tmp_path, progress=False)
    assert not list((tmp_path / "cache").rglob("*.ckpt*"))

def papermill(notebook, folder, served, **values):
    command = [Path(sys.executable).parent / "papermill", ROOT / f"nbs/{notebook}.ipynb", "--no-progress-bar"]
    for k, v in values.items(): command += ["-p", k, str(v)]
    env = os.environ | served | dict(OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

THOROUGH = os.environ.get("SMOKE") == "all"
SMOKED = ALL if THOROUGH else ("afhqv2", "lsun_bedroom")

@pytest.mark.parametrize("name", SMOKED)
def test_a_smoke_run_goes_to_the_end_and_says_what_it_is(served, tmp_path, name):
    "SMOKE=all: every model."
    papermill("experiments", tmp_path, served, dataset=name, smoke=True, solvers="ipndm", schedules="edm", out="here",
              distances="perceptual", n_train=8, n_valid=8, workers=1)
    records = [json.loads(p.read_text()) for p in (tmp_path / "here/records/cells").iterdir()]
    assert len(records) == 2 and all(r["key"]["dataset"] == f"{name}_smoke" for r in records)
    assert all(r["key"]["n_eval"] == 64 and r["metrics"]["rmse"]["mean"] > 0 for r in records)
    assert {p.name for p in (tmp_path / "here").iterdir()} >= {"table.md", "quality.png", "samples.png"}
    assert all("printed" not in r["provenance"] for r in records)

@pytest.mark.parametrize("name", SMOKED)
def test_ablations_run_on_published_models(served, tmp_path, name):
    """A latent model is the random one that everybody gets: the run above reads its file. Alternating against joint
    learning is run on the mixture (tests/paper/test_study.py). SMOKE=all: both here, with the files of every model."""
    tables = "trajectory,turns" if THOROUGH else "trajectory"
    given = served if THOROUGH or name in EDM else dict(S4S_CACHE=served["S4S_CACHE"])
    papermill("ablations", tmp_path, given, dataset=name, smoke=True, tables=tables, out="here", workers=1)
    cells = [json.loads(p.read_text())["key"] for p in (tmp_path / "here/records/cells").iterdir()]
    assert {c["method"] for c in cells} == {"parent", "s4s_r0", "trajectory", "stepwise"}
    assert {c["dataset"] for c in cells} == {f"{name}_smoke"}
    assert (tmp_path / "here/turns.json").exists() == THOROUGH
