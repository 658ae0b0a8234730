"The figures: what they are drawn from, what is on them, and that they can be read."
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from matplotlib.text import Text
from pandas import read_csv
from PIL import Image

from s4s_nb.denoise import sample_noise
from s4s_nb.lab.record import records_folder
from s4s_nb.models.pretrained import load
from s4s_nb.paper.figures import (
    FIGURES,
    SAMPLES,
    command_for,
    plane_of_epochs,
    plane_of_steps,
    quality_of,
    rule_radius,
    sample_titles,
    write_figure,
    write_outputs,
)
from s4s_nb.paper.measurements import MEASUREMENTS
from s4s_nb.paper.report import images_of, panels, save_figure
from s4s_nb.paper.tables import study_frame
from s4s_nb.solver import Solver

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "results/digits"


def found(name): return json.loads((DIGITS / f"{name}.json").read_text())["found"]

@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    "What every figure of the digits is drawn from, read once."
    cache, df = tmp_path_factory.mktemp("cache"), study_frame(DIGITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("s4s_nb.paper.figures.study_frame", lambda out: df)
        return {name: f.find(f.of, DIGITS, "digits", "cpu", cache) for name, f in FIGURES.items()}

@pytest.fixture(scope="module")
def drawn(inputs):
    "name -> (figure, caption)"
    return {name: (f.plot(inputs[name], "digits"), f.text(inputs[name], "digits")) for name, f in FIGURES.items()}

@pytest.mark.parametrize("name", FIGURES)
def test_it_can_be_read_on_a_telephone(drawn, name):
    "Shown 390 pixels wide, letters are at least 9 pixels high; axes say what they are; the file is small."
    fig, _ = drawn[name]
    shown = 390 / fig.get_figwidth() / 72 # pixels a point
    texts = [t for t in fig.findobj(Text) if t.get_text() and t.get_visible()]
    assert texts and min(t.get_fontsize() for t in texts) * shown >= 9
    for ax in fig.axes: assert ax.get_xlabel() or ax.get_ylabel() or ax.get_title()
    assert (DIGITS / f"{name}.png").stat().st_size <= 60_000

@pytest.mark.parametrize("name", FIGURES)
def test_committed_pictures_are_of_the_committed_numbers(drawn, name, tmp_path):
    "But for the edges of letters, which are the font library's."
    save_figure(drawn[name][0], tmp_path / "now.png")
    now, kept = (numpy.asarray(Image.open(p), float) for p in (tmp_path / "now.png", DIGITS / f"{name}.png"))
    assert now.shape == kept.shape and (abs(now - kept).max(-1) > 64).mean() < .01

@pytest.mark.parametrize("name", FIGURES)
def test_same_files_give_the_same_bytes(drawn, inputs, name, tmp_path):
    a = save_figure(drawn[name][0], tmp_path / "a.png").read_bytes()
    b = save_figure(FIGURES[name].plot(inputs[name], "digits"), tmp_path / "b.png").read_bytes()
    assert a == b and all(word not in a for word in (b"matplotlib", b"Matplotlib", b"tEXt", b"tIME"))

def test_other_processes_draw_the_same_bytes(tmp_path):
    "Whatever the order of their sets."
    code = ("import sys; from s4s_nb.paper.figures import FIGURES; from s4s_nb.paper.report import save_figure\n"
            "for n in sys.argv[3:]: save_figure(FIGURES[n].draw(sys.argv[1], 'digits'), f'{sys.argv[2]}/{n}.png')")
    names, found = [n for n, f in FIGURES.items() if f.of in MEASUREMENTS], []
    for seed in "12":
        (out := tmp_path / seed).mkdir()
        subprocess.run([sys.executable, "-c", code, DIGITS, out, *names], check=True,
                       env=os.environ | dict(PYTHONHASHSEED=seed))
        found.append([(out / f"{n}.png").read_bytes() for n in names])
    assert len(names) == 5 and found[0] == found[1]

@pytest.mark.parametrize("name", FIGURES)
def test_what_is_missing_is_named_with_its_command(name, tmp_path):
    for ask in (FIGURES[name].draw, FIGURES[name].caption):
        with pytest.raises(ValueError) as e: ask(tmp_path, "digits")
        assert command_for(FIGURES[name].of, tmp_path, "digits") in str(e.value)
    with pytest.raises(ValueError, match="figure='figure9'; expected one of: figure1"):
        write_figure("figure9", tmp_path, "digits")

def test_damaged_measurements_are_not_drawn(tmp_path):
    (tmp_path / "turns.json").write_text((DIGITS / "turns.json").read_text().replace("0.04296", "0.03296"))
    with pytest.raises(ValueError, match="damaged"): FIGURES["turns"].draw(tmp_path, "digits")

def test_outputs_of_a_measurement_are_its_figures(tmp_path):
    paths = write_outputs("figure2", found("figure2"), tmp_path, "digits")
    assert [p.name for p in paths] == ["figure2a.png", "figure2b.png"]

def test_paths_of_figure_1_start_and_end_where_they_were_measured(drawn):
    fig, text = drawn["figure1"]
    true, *others = found("figure1")
    assert [f["name"] for f in others] == ["iPNDM-3", "S4S", "S4S-Alt"]
    for ax, f in zip(fig.axes, others):
        lines = [line.get_xydata() for line in ax.lines if len(line.get_xydata())]
        assert len(lines) == 2 * len(true["paths"])
        for kind, line in zip([true] * 8 + [f] * 8, lines): assert len(line) == len(kind["t"])
        ends = sorted(line[line[:, 0].argmin(), 1] for line in lines[8:])
        assert ends == pytest.approx(sorted(path[-1] for path in f["paths"]))
        assert f"{f['rmse']:.2g}" in ax.get_title() and f"{f['rmse']:.2g}" in text
        assert ax.get_xlim()[0] > ax.get_xlim()[1] # time runs down to the right

def reference_plane(vectors):
    "By singular values, up to signs."
    centred = vectors - vectors.mean(0)
    _, s, v = numpy.linalg.svd(centred, full_matrices=False)
    return centred @ v[:2].T, s[:2]**2 / (s**2).sum()

def test_figure_2_is_the_plane_of_most_variance(drawn):
    "20 vectors of steps, 19 of 12 coefficients; axes tell the shares."
    w = numpy.array([f["weights"] for f in found("figure2")])
    whole = w.reshape(*w.shape[:2], -1)
    assert (whole != 0).any((0, 1)).sum() == 12 # of 15: three do not exist
    wanted = dict(figure2a=(plane_of_steps, numpy.concatenate([*w[:, -1], w[0, 0]])),
                  figure2b=(plane_of_epochs, numpy.concatenate([whole[0, :1], *whole[:, 1:]])))
    for (name, (plane, vectors)), n in zip(wanted.items(), (20, 19)):
        df, shares = plane(found("figure2"))
        xy, expected = reference_plane(vectors)
        assert len(df) == len(vectors) == n and shares == pytest.approx(expected)
        assert abs(df[["first", "second"]].to_numpy()) == pytest.approx(abs(xy))
        ax = drawn[name][0].axes[0]
        assert f"{shares[0]:.0%}" in ax.get_xlabel() and f"{shares[1]:.0%}" in ax.get_ylabel()
        assert f"{n} vectors" in drawn[name][1]
        assert {t.get_text() for t in ax.get_legend().texts} >= {"seed 0", "seed 1", "seed 2", "iPNDM"}

@pytest.mark.parametrize("name, stage, n", [("figure2a", "step", 5), ("figure2b", "epoch", 7)])
def test_darker_is_earlier(drawn, name, stage, n):
    plane = plane_of_steps if stage == "step" else plane_of_epochs
    df, _ = plane(found("figure2"))
    (points,) = [c for c in drawn[name][0].axes[0].collections if len(c.get_offsets()) == len(df)]
    df["light"] = points.get_facecolors()[:, :3] @ [.299, .587, .114]
    light = df.groupby(stage).light.agg(["min", "max"])
    assert len(light) == n and (light["min"].diff().dropna() > 0).all() and (light["max"] - light["min"] < 1e-9).all()

def test_an_outlier_squeezes_nothing(drawn):
    "Half of the points fill at least a fifth of each axis."
    for name in ("figure2a", "figure2b"):
        ax = drawn[name][0].axes[0]
        points = numpy.ma.getdata(max((c.get_offsets() for c in ax.collections), key=len))
        where = ax.transAxes.inverted().transform(ax.transData.transform(points))
        assert (numpy.ptp(numpy.quantile(where, [.25, .75], axis=0), axis=0) >= .2).all()
        assert (where >= 0).all() and (where <= 1).all()

def test_figure_3_marks_the_radius_of_learning(drawn):
    fig, text = drawn["figure3"]
    assert rule_radius("digits") == pytest.approx(.001 * 64 / 16) # LD3's rule for nine parameters at NFE 4
    assert rule_radius("cifar10") == pytest.approx(.001 * 3072 / 16)
    assert rule_radius("mscoco_auto") == pytest.approx(.001 * 4 * 64**2 / 16) # of the latent
    best = min(found("figure3"), key=lambda f: f["rmse"])
    for ax in fig.axes:
        upright = {line.get_xdata()[0] for line in ax.lines if len(set(line.get_xdata())) == 1}
        assert upright == {rule_radius("digits"), best["r"]} and ax.get_ylabel()
    assert "relax" in fig.axes[0].get_ylabel() and fig.axes[0].get_yscale() == "log"
    assert f"r = {best['r']:g}: {best['rmse']:.3g}" in text and f"{found('figure3')[0]['l_relax']:.2g}" in text

def test_figure_4_has_every_seed(drawn, inputs):
    (fig, text), df = drawn["figure4"], inputs["figure4"]
    df = df[(df.method == "s4s_alt") & (df.nfe == 6) & (df.distance == "l2") & df.guidance.isna()]
    (points,) = [c for c in fig.axes[0].collections if len(c.get_offsets()) > 3]
    shown, wanted = ({(n, round(v, 12)) for n, v in p} for p in (points.get_offsets(), zip(df.n_train, df.rmse)))
    assert shown == wanted
    assert f"{df.train_seed.nunique()} training seeds" in text
    for n, part in df.groupby("n_train"): assert f"{n:.0f} pairs {part.rmse.mean():.3g}" in text

def test_samples_are_of_one_noise_and_say_their_numbers(drawn, inputs):
    "The panels are what the solvers' files make of the noise of the first seeds, without the study's own loop."
    (fig, text), records = drawn["figure5to7"], inputs["figure5to7"].records
    denoiser = load("digits")
    x_T = denoiser.schedule.prior_std * sample_noise(range(24), denoiser.shape)
    assert [r["key"]["method"] for r in records.values()] == ["parent", "ld3_s4s", "s4s_alt"]
    assert {r["key"]["nfe"] for r in records.values()} == {5}
    for ax, r in zip(fig.axes[1:], records.values()):
        with torch.no_grad(): x = Solver.load(records_folder(DIGITS) / r["solver"])(denoiser, x_T).clamp(-1, 1) / 2 + .5
        pixels = torch.as_tensor(numpy.asarray(ax.images[0].get_array(), numpy.float32))
        for i in range(24):
            top, left = 1 + 10 * (i // 6), 1 + 10 * (i % 6)
            torch.testing.assert_close(pixels[top:top + 8, left:left + 8], x[i, 0], rtol=0, atol=1e-4)
        assert f"RMSE {r['metrics']['rmse']['mean']:.3f}" in ax.get_title() and quality_of(r) in text
    assert "teacher, 20 NFE" in fig.axes[0].get_title()

def test_panels_of_published_models_show_fid():
    key, spread = dict(dataset="cifar10", nfe=5), lambda v: dict(mean=v, std=None, ranges=[v])
    record = dict(key=key, metrics=dict(fd_real=spread(20.491), rmse=spread(.1), fd_teacher=spread(3.)),
                  teacher=dict(name="UniPC-3 bh1", grid="logsnr", nfe=20), reference=dict(teacher_fd_real=spread(2.03)))
    titles = sample_titles({"iPNDM, logSNR": record})
    assert titles == [("UniPC-3 bh1, logSNR", "teacher, 20 NFE, FID 2.03"), ("iPNDM, logSNR", "5 NFE, FID 20.49")]

@pytest.mark.parametrize("name, table, fids", [
    ("cifar10", 14, ("20.49", "4.84", "3.73")), ("ffhq", 15, ("16.15", "5.45", "4.62")),
    ("afhqv2", 13, ("5.92", "2.61", "2.56"))])
def test_evaluations_are_those_of_the_printed_captions(name, table, fids):
    "The captions' FIDs stand in the printed tables at these numbers of evaluations."
    df = read_csv(ROOT / f"results/paper/table{table}.csv", dtype=str, keep_default_na=False)
    df = df[df.nfe == str(SAMPLES[name][1])]
    rows = [("Time LogSNR", "iPNDM"), ("LD3", "iPNDM-S4S"), (None, "S4S-Alt")]
    for (schedule, solver), fid in zip(rows, fids):
        here = df[(df.solver == solver) & ((df.schedule == schedule) | (schedule is None))]
        assert here.fid.tolist() == [fid]

def test_turns_begin_with_the_parent_and_mark_ld3(drawn):
    fig, text = drawn["turns"]
    assert [ax.get_title() for ax in fig.axes] == ["NFE 4", "NFE 6"]
    for ax in fig.axes:
        runs = [f for f in found("turns") if f"NFE {f['nfe']}" == ax.get_title()]
        dotted = [line for line in ax.lines if line.get_linestyle() == ":"]
        assert len(dotted) == 1 and len(dotted[0].get_xdata()) == 1 + max(f["ld3_epochs"] for f in runs)
        crosses = [line.get_xydata()[0] for line in ax.lines if line.get_marker() == "X"]
        assert {tuple(p) for p in crosses} == {(0., f["valid"][0]) for f in runs}
    assert all(f"{f['rmse']:.3g}" in text for f in found("turns"))

def test_full_caption_counts_cells(drawn):
    fig, text = drawn["full"]
    assert "in 168 of 168 cells" in text
    assert any("RMSE with S4S / without" == ax.get_xlabel() for ax in fig.axes)

def test_images_of_gives_the_teacher_first(inputs):
    teacher, *made = images_of(inputs["figure5to7"].records, DIGITS, 4, cache=inputs["figure5to7"].cache)
    assert len(made) == 3 and all(x.shape == teacher.shape == (4, 1, 8, 8) for x in made)
    errors = [(x - teacher).square().mean() for x in made]
    assert errors[0] > errors[1] and errors[0] > errors[2]

def test_no_picture_is_wider_than_a_page(tmp_path):
    fig, _ = panels(1, 9)
    assert Image.open(save_figure(fig, tmp_path / "wide.png")).size[0] <= 480
