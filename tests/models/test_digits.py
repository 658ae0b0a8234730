"""The embedded digits model: is it what its card says, is it good enough to learn solvers for, and is it guarded?"""
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from s4s_nb.denoise import sample_noise
from s4s_nb.grids import time_edm, time_logsnr
from s4s_nb.judging.moments import feature_moments, frechet_distance, paired_rmse, squared_errors
from s4s_nb.learning.pairs import teacher_pairs
from s4s_nb.models.cards import CARDS, card_names, card_of
from s4s_nb.models.digits import CLASSIFIERS, load_features, real_images
from s4s_nb.models.pretrained import load
from s4s_nb.solvers.multistep import ddim, unipc
from s4s_nb.solvers.singlestep import heun

N = 2000
ROOT = Path(__file__).resolve().parents[2]
PARTS = "network", "distance", "metric"


def sample(denoiser, solver, n=N): return teacher_pairs(denoiser, solver, n, seed=0, cache=False, progress=False)

@pytest.fixture(scope="module")
def model(): return load("digits")

@pytest.fixture(scope="module")
def metric(): return load_features("digits", "metric")

@pytest.fixture(scope="module")
def teacher(model):
    "What the teacher of this site makes of seeds 0 ... N-1"
    return sample(model, unipc(model.schedule, time_logsnr(model.schedule, 20), order=3, variant="bh1")).x_0

@pytest.fixture
def copy(tmp_path):
    "The folder of models, to spoil"
    return shutil.copytree(CARDS, tmp_path / "models")


def test_teacher_agrees_with_another_solver(model, teacher, notes):
    "UniPC with 20 evaluations and Heun with 36: two solvers, one exact solution."
    other = sample(model, heun(model.schedule, time_edm(model.schedule, 18))).x_0
    rmse = paired_rmse(squared_errors(teacher, other))
    notes.append(f"digits: teacher against Heun, RMSE {rmse:.4f} (n={N})")
    assert rmse <= .025
    assert rmse == pytest.approx(card_of("digits")["metrics"]["unconditional"]["rmse_heun"], rel=.02)

def test_teacher_makes_digits(teacher, metric, notes):
    real = feature_moments(metric.penultimate, real_images("digits"))
    fd = frechet_distance(feature_moments(metric.penultimate, teacher), real)
    confident = (metric.logits(teacher).softmax(1).amax(1) > .9).float().mean().item()
    notes.append(f"digits: teacher FD to the real digits {fd:.2f}, {confident:.1%} classified with confidence > 0.9")
    assert fd <= 15 and confident >= .95
    counts = metric.logits(teacher).argmax(1).bincount(minlength=10)
    assert counts.min() > N / 20, f"digits are not balanced: {counts.tolist()}"

def test_guidance_follows_the_label(metric):
    "The classifier sees the class that was asked for, and guidance above one does not lose it."
    for w in 1., 2.:
        guided = load("digits", guidance=w)
        pairs = sample(guided, ddim(guided.schedule, time_edm(guided.schedule, 10)), n=300)
        asked = pairs.cond["class_labels"].argmax(1)
        assert (metric.logits(pairs.x_0).argmax(1) == asked).float().mean() > .9

@pytest.mark.parametrize("which", CLASSIFIERS)
def test_classifiers_know_digits_they_never_saw(which):
    images, labels = real_images("digits"), torch.tensor(load_digits().target)
    seed = card_of("digits")["recipe"]["seed"]
    held_out = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:360]
    right = load_features("digits", which).logits(images[held_out]).argmax(1) == labels[held_out]
    assert right.float().mean() >= .99
    assert right.float().mean().item() == pytest.approx(card_of("digits")["metrics"][which]["accuracy"], abs=1e-3)

def test_the_judge_is_not_the_teacher():
    "The two classifiers differ in architecture and in what they see."
    a, b = (load_features("digits", which) for which in ("distance", "metric"))
    assert type(a) is not type(b)
    x = real_images("digits")[:200]
    same = [(f(x) - f(x).mean(0)) @ (f(x) - f(x).mean(0)).T for f in (a.penultimate, b.penultimate)]
    assert torch.corrcoef(torch.stack([s.flatten() for s in same]))[0, 1] < .95


def test_guidance_one_is_conditional_and_zero_is_not(model):
    x, seeds = 3 * sample_noise(range(20), (1, 8, 8)), range(20)
    cond = load("digits", guidance=1.).conditions(seeds)
    for t in .002, .5, 80.:
        assert torch.allclose(load("digits", guidance=1.)(x, t, **cond), model(x, t, **cond), atol=1e-5)
        assert torch.allclose(load("digits", guidance=0.)(x, t, **cond), model(x, t), atol=1e-5)

def test_labels_belong_to_seeds_and_not_to_noise():
    guided = load("digits", guidance=2.)
    labels = guided.conditions(range(1000, 3000))["class_labels"]
    assert torch.equal(guided.conditions([2999, 1000])["class_labels"], labels[[-1, 0]])
    assert labels.shape == (2000, 10) and torch.equal(labels.sum(1), torch.ones(2000))
    means = sample_noise(range(1000, 3000), (1, 8, 8)).flatten(1)
    assert torch.corrcoef(torch.cat([labels, means], 1).T)[:10, 10:].abs().max() < .11 # 5 sigma

def test_half_precision_is_what_was_measured():
    c = card_of("digits")
    assert c["metrics"]["rmse_float16"] < 1e-3
    assert all(f["dtype"] == "float16" for f in c["files"].values())


def test_card_describes_the_files():
    for entry in card_of("digits")["files"].values():
        data = (CARDS / entry["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
    assert sum(p.stat().st_size for p in CARDS.iterdir()) <= 2.5e6
    assert {"data", "recipe", "licence", "metrics", "provenance"} <= card_of("digits").keys()

@pytest.mark.parametrize("part", PARTS)
def test_changed_files_are_refused(copy, part):
    path = copy / card_of("digits")["files"][part]["path"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    open_it = (lambda: load("digits", folder=copy)) if part == "network" else (
        lambda: load_features("digits", part, folder=copy))
    with pytest.raises(ValueError, match="refused, its sha256 is .* the model card says"): open_it()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="missing"): open_it()

def test_unknown_names_list_what_exists(copy):
    for wrong in "mnist", "", "../digits", "digits.json":
        with pytest.raises(ValueError, match="model=.*; expected one of: afhqv2, cifar10, digits") as e: load(wrong)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="expected one of: afhqv2, cifar10, digits"): real_images("mnist")
    with pytest.raises(ValueError, match="distance, metric"): load_features("digits", "inception")
    c = json.loads((copy / "digits.json").read_text()) | {"name": "twin"}
    (copy / "twin.json").write_text(json.dumps(c))
    assert {"digits", "twin"} < set(card_names(copy))
    x = sample_noise(range(2), (1, 8, 8))
    assert torch.equal(load("twin", folder=copy)(x, 1.), load("digits")(x, 1.))

def test_training_notebook_runs(tmp_path):
    "A few iterations of everything; the card it writes can be loaded."
    page = "nbs/models/train_digits.ipynb"
    command = "papermill", page, str(tmp_path / "run.ipynb"), "-p", "quick", "True", "-p", "out"
    subprocess.run([Path(sys.executable).parent / command[0], *command[1:], str(tmp_path)], cwd=ROOT, check=True,
                   capture_output=True)
    made, shipped = card_of("digits", tmp_path), card_of("digits")
    assert made.keys() == shipped.keys() and made["metrics"].keys() == shipped["metrics"].keys()
    assert made["network"] == shipped["network"], "the shipped model was not made by this notebook"
    changed = {k for k in made["recipe"] if made["recipe"][k] != shipped["recipe"][k]}
    assert changed == {"iterations"}
    assert load("digits", folder=tmp_path)(torch.zeros(1, 1, 8, 8), 1.).shape == (1, 1, 8, 8)
