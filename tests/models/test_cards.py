"""A model or a data set is one card: saved pipelines, own weights and mixtures become data sets, and nothing else."""
import json
import random

import pytest
import torch
from safetensors.torch import save_file
from test_pipelines import pipeline

from s4s_nb.denoise import fingerprint, sample_noise
from s4s_nb.lab.catalog import SCHEDULES
from s4s_nb.lab.cell import Cell
from s4s_nb.lab.datasets import dataset_of
from s4s_nb.lab.record import agree, identity, run_cell
from s4s_nb.lab.setup import setup_for
from s4s_nb.models.adm import PRECONDITIONING, UNETS, edm_network
from s4s_nb.models.cards import CARDS, card_of, cards
from s4s_nb.models.pipelines import from_diffusers
from s4s_nb.models.pretrained import FORMATS, format_of, load, randomised

pytestmark = [pytest.mark.filterwarnings(f"ignore::{w}") for w in ("DeprecationWarning", "FutureWarning")]
TEACHER = dict(solver="unipc", order=3, grid="uniform", nfe=10)
JUDGED = dict(metric="random", perceptual=.1, teacher=TEACHER)
SMALL = dict(img_resolution=8, img_channels=3, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[4])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A folder of cards of one's own"
    monkeypatch.setenv("S4S_CARDS", str(tmp_path / "cards"))
    (tmp_path / "cards").mkdir()
    yield tmp_path / "cards"

def write(folder, name, **fields): (folder / f"{name}.json").write_text(json.dumps(fields))

def one_cell(name, tmp_path):
    "The record of one cell; it is read back the second time"
    cell = Cell(dataset=name, schedule="uniform", nfe=4, n_eval=16)
    record = run_cell(cell, tmp_path / "out", cache=tmp_path / "cache")
    assert run_cell(cell, tmp_path / "out", cache=tmp_path / "cache") == record
    assert record["key"]["dataset"] == name and record["metrics"]["rmse"]["mean"] > 0
    return record


@pytest.mark.parametrize("name,fields", [
    ("ddpm", {}), ("dit", dict(guidance=2.)),
    ("sd", dict(prompts=["a cat", "two dogs", "rain"], guidance=3., null="fog"))])
def test_a_folder_of_diffusers_is_a_data_set_by_one_card(folder, tmp_path, name, fields):
    pipeline(name).save_pretrained(folder / "saved")
    before = {p for p in folder.iterdir()}
    write(folder, "mine", format="diffusers", pipeline="saved", variant="bh2", edm_grid="t", **fields, **JUDGED)
    assert len({*folder.iterdir()} - before) == 1
    model, setup = load("mine"), setup_for("mine", cache=tmp_path / "cache")
    known = dict(conditions=fields.get("prompts"), guidance=fields.get("guidance"), null=fields.get("null"))
    direct = from_diffusers(pipeline(name), **known)
    x, cond = sample_noise(range(3), model.shape), model.conditions(range(3))
    assert torch.equal(model(x, .5, **cond), direct(x, .5, **cond))
    assert fingerprint(setup.denoiser) == fingerprint(model) == fingerprint(direct)
    assert not any(p.requires_grad for p in model.parameters())
    assert setup.data.guided == (name != "ddpm")
    assert one_cell("mine", tmp_path)["teacher"]["nfe"] == 10

def test_prompts_may_lie_in_a_file(folder):
    pipeline("sd").save_pretrained(folder / "saved")
    (folder / "prompts.txt").write_text("a cat\nrain\n")
    write(folder, "listed", format="diffusers", pipeline=str(folder / "saved"), prompts=["a cat", "rain"])
    write(folder, "filed", format="diffusers", pipeline="saved", prompts="prompts.txt")
    assert fingerprint(load("listed")) == fingerprint(load("filed"))

def test_a_folder_that_holds_no_pipeline_is_named(folder):
    write(folder, "mine", format="diffusers", pipeline="nothing")
    with pytest.raises(FileNotFoundError, match="nothing: no model_index.json; expected a folder"): load("mine")


@pytest.mark.parametrize("unet", UNETS)
@pytest.mark.parametrize("kind", PRECONDITIONING)
def test_weights_of_any_network_are_a_model(folder, kind, unet):
    kwargs = SMALL | dict(model_type=unet)
    net = randomised(lambda: edm_network(kind, kwargs))
    save_file(net.state_dict(), folder / "net.safetensors")
    write(folder, "mine", format="weights", shape=[3, 8, 8], network={"class": kind} | kwargs,
          files=dict(network=dict(path="net.safetensors")))
    x = sample_noise(range(2), (3, 8, 8))
    assert torch.equal(load("mine")(x, torch.tensor(2.)), net(x, torch.full((2,), 2.)))

def test_own_weights_run_with_real_images_of_ones_own(folder, tmp_path):
    "Classes, patches, guidance, half precision."
    kwargs = SMALL | dict(model_type="SongUNet", patch=2, label_dim=3)
    net = randomised(lambda: edm_network("EDMPrecond", kwargs))
    save_file({k: v.half() for k, v in net.state_dict().items()}, folder / "net.safetensors")
    save_file(dict(images=torch.rand(20, 3, 8, 8) * 2 - 1), folder / "images.safetensors")
    files = {part: dict(path=f"{file}.safetensors") for part, file in dict(network="net", images="images").items()}
    write(folder, "mine", format="weights", shape=[3, 8, 8], network=kwargs, files=files, guidance=2., **JUDGED)
    assert load("mine").conditions(range(4))["class_labels"].shape == (4, 3)
    assert one_cell("mine", tmp_path)["real"]["n"] == 20

def test_weights_that_do_not_fit_are_refused(folder):
    net = edm_network("EDMPrecond", SMALL | dict(model_type="SongUNet"))
    save_file(net.state_dict(), folder / "net.safetensors")
    common = dict(format="weights", shape=[3, 8, 8], files=dict(network=dict(path="net.safetensors")))
    write(folder, "wider", network=SMALL | dict(model_type="SongUNet", model_channels=32), **common)
    write(folder, "other", network=SMALL | dict(model_type="Transformer"), **common)
    with pytest.raises(ValueError, match="wider: the weights do not fit EDMPrecond"): load("wider")
    with pytest.raises(ValueError, match="model_type='Transformer'; expected one of: SongUNet"): load("other")


def test_what_a_card_says_reaches_the_grids_and_the_record(folder, tmp_path):
    peaks = dict(weights=[.5, .5], means=[[-1.], [1.]], stds=[[.2], [.3]])
    mixture = dict(format="mixture", shape=[1, 1, 1], network=peaks)
    times = [80., 20., 1., .1, .002]
    write(folder, "mine", dmn={"4": times}, dmn_variant="authors", **mixture, **JUDGED)
    setup = setup_for("mine", cache=tmp_path)
    assert SCHEDULES["dmn"](setup, 4).tolist() == times
    write(folder, "other", dmn={"4": [80., 20.001, 1., .1, .002]}, **mixture, **JUDGED)
    said, other = (identity(Cell(name, "dmn"), setup_for(name, cache=tmp_path))["parent"] for name in ("mine", "other"))
    assert agree(said, said) and not agree(said, other)

@pytest.mark.parametrize("ending", ["", "_auto"])
def test_endings_change_no_grid_and_no_budget(ending):
    "The grids of DMN are those of the card, whoever chose the teacher."
    plain, other = dataset_of("digits"), dataset_of(f"digits{ending}")
    assert (other.dmn_grids, other.budgets) == (plain.dmn_grids, plain.budgets)
    assert other.teacher == ("auto" if ending else plain.teacher)

@pytest.mark.parametrize("change,message", [
    (dict(promts=["a"]), "mine.json: unknown 'promts'; expected fields: "),
    (dict(prompts=["a"]), "unknown 'prompts'"),   # of another format
    (dict(format="onnx"), "mine.json: format='onnx'; expected one of: weights, edm, compvis, diffusers, mixture"),
    (dict(shape=None), "needs shape; this one has no shape"),
    (dict(metric="lpips"), "metric='lpips'; expected one of: inception, classifier, random"),
    (dict(metric="inception"), "would train with the network that judges")])
def test_wrong_cards_are_refused_by_name(folder, change, message):
    card = dict(format="mixture", shape=[1, 1, 1], metric="random", perceptual=.1) | change
    write(folder, "mine", **{k: v for k, v in card.items() if v is not None})
    with pytest.raises(ValueError, match=message): dataset_of("mine")

def test_a_file_that_is_no_card_is_named(folder):
    (folder / "mine.json").write_text("{")
    with pytest.raises(ValueError, match="mine.json: expected a JSON object"): load("mine")

@pytest.mark.parametrize("name", sorted(cards()))
def test_the_cards_of_the_package_are_understood(name):
    card = card_of(name)
    assert {"title", "licence", "data"} <= card.keys() and format_of(card) in FORMATS.values()
    assert dataset_of(name).published == ("paper" in card) == (card["format"] in ("edm", "compvis"))


# ---- cards that were written badly -----------------------------------------------------------------------------------
def changed(value, rng):
    "JSON with one thing replaced, doubled or gone, at any depth."
    odd = [None, True, -1, 0, 1e999, 10**30, "x", "", [], {}, [[]], {"a": 1}, -.5, "\x00", [1, "x"], 10**400]
    if isinstance(value, dict) and value and rng.random() < .9:
        k = rng.choice(sorted(value))
        rest = {a: b for a, b in value.items() if a != k}
        return rng.choice([value | {k: changed(value[k], rng)}] * 8 + [rest, rest | {k + "x": value[k]}])
    if isinstance(value, list) and value and rng.random() < .7:
        i = rng.randrange(len(value))
        return rng.choice([value[:i] + [changed(value[i], rng)] + value[i+1:], value[:i], value + value])
    return rng.choice(odd)

def test_ten_thousand_mutated_cards(folder):
    "A data set and, where nothing is fetched, a model; or our error."
    rng, read, loaded = random.Random(0), 0, 0
    own = dict(format="mixture", shape=[1, 1, 1], t_range=[.01, 50.], **JUDGED, network=dict(
        weights=[.5, .5], means=[[-1.], [1.]], stds=[[.2], [.3]]), dmn={"2": [50., 1., .01]}, n_eval=64)
    known = [own] * 3 + [json.loads((CARDS / f"{name}.json").read_text()) for name in ("digits", "cifar10", "mscoco")]
    for _ in range(10_000):
        c = rng.choice(known)
        for _ in range(rng.randint(1, 2)): c = changed(c, rng)
        text = json.dumps(c)
        if rng.random() < .2: text = text[:rng.randrange(len(text))]
        (folder / "mine.json").write_text(text)
        try:
            dataset_of("mine")
            read += 1
            loaded += isinstance(c, dict) and c.get("format") == "mixture" and load("mine") is not None
        except (ValueError, FileNotFoundError) as e: assert str(folder) in str(e) or "mine" in str(e), (c, e)
    assert 100 < loaded < read < 10_000
