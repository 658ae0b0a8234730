"On a published model the budgets are its card's and FID decides; elsewhere nothing is called FID. Made-up records."
from itertools import product
from pathlib import Path

import pytest
from pandas import read_csv

from s4s_nb.lab.cell import METHODS, budgets, published_budget
from s4s_nb.lab.datasets import dataset_of
from s4s_nb.lab.sweep import summary
from s4s_nb.paper.claims import Study, claims, deciding_lines, evaluations, verdicts
from s4s_nb.paper.figures import base_ratios, transfer_table, write_outputs
from s4s_nb.paper.measurements import tables_named
from s4s_nb.paper.report import side_by_side
from s4s_nb.paper.tables import (
    EXPERIMENTS,
    best_lines,
    cells_of,
    fewest_table,
    pairs_for,
    paper_row,
    show,
    study_frame,
)

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = dict(afhqv2=13, cifar10=14, ffhq=15, imagenet=16, lsun_bedroom=17, mscoco=18)


# ----------------------------------------------------------------------------------------------------------------------
# One plan
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, number", PUBLISHED.items())
def test_both_notebooks_plan_the_papers_table(name, number):
    "The same cells whatever they are called, with the evaluations that the paper prints."
    printed = read_csv(ROOT / f"results/paper/table{number}.csv")
    cells = cells_of([f"table{number}"], name)
    assert set(cells) == set(paper_row(name, **budgets(False, name))) == set(cells_of(["full"], name))
    assert {c.nfe for c in cells} == set(printed.nfe) == set(dataset_of(name).nfes)

@pytest.mark.parametrize("name", PUBLISHED)
def test_every_table_has_the_budgets_of_the_card(name):
    "But for what a table varies: pairs in Figure 4 and beside it, the loss in Table 9."
    for experiment in EXPERIMENTS:
        for c in cells_of([experiment], name):
            own = METHODS[c.method].fields | published_budget(name, c.method)
            if experiment in ("figure4", "pairs_of_s4s"): own.pop("n_train", None)
            if "distance" in own: assert c.distance == "perceptual" or experiment == "table9"
            assert all(getattr(c, k) == v for k, v in own.items() if k != "distance"), c
            assert (c.n_eval, c.ranges, c.train_seed or 0) == (dataset_of(name).n_eval, 1, 0)
            assert c.nfe in dataset_of(name).nfes

@pytest.mark.parametrize("name, dataset", [("table13", "digits"), ("table14", "afhqv2"), ("table18", "imagenet"),
                                           ("table16", "mscoco_smoke"), ("table15", "mixture"), ("table17", "ffhq")])
def test_a_table_of_another_data_set_says_whose_it_is(name, dataset):
    (owner,) = [d for d, n in PUBLISHED.items() if f"table{n}" == name]
    for ask in (lambda: tables_named(name, dataset), lambda: cells_of([name], dataset)):
        with pytest.raises(ValueError) as e: ask()
        assert f"is about {owner}, not about {dataset}; expected -p dataset {owner}" in str(e.value)

@pytest.mark.parametrize("wrong", ["table7", "table19", "Table9", "figure5", "table9;table11", "all,tabel3", ""])
def test_an_unknown_table_lists_all_that_exist(wrong):
    with pytest.raises(ValueError) as e: tables_named(wrong, "digits")
    message = str(e.value)
    assert "\n" not in message and message.startswith("tables=")
    assert all(k in message for k in ("all", *EXPERIMENTS, "turns", "figure2", "table13", "table18"))

@pytest.mark.parametrize("names, dataset", [("guidance", "cifar10"), ("table9,transfer", "ffhq"),
                                            ("transfer", "mixture")])
def test_what_needs_guidance_is_refused_without_it(names, dataset):
    with pytest.raises(ValueError, match=f"{dataset} cannot be guided"): tables_named(names, dataset)

def test_variants_have_the_tables_of_their_card():
    assert tables_named("table13,table12", "afhqv2_smoke") == ["table13", "table12"]
    assert cells_of(["table18"], "mscoco_auto") and cells_of(["table12"]) == cells_of(["table4"])


# ----------------------------------------------------------------------------------------------------------------------
# What decides: whatever is good by RMSE is bad by FID, and the other way round
# ----------------------------------------------------------------------------------------------------------------------

def record(cell, rmse, fid):
    metrics = {k: dict(mean=v, std=None, ranges=[v]) for k, v in dict(rmse=rmse, fd_teacher=rmse, fd_real=fid).items()}
    key = {k: getattr(cell, k) for k in cell.__dataclass_fields__}
    bare = cell == cell.parent_cell()
    return dict(key=key, metrics=metrics | ({} if bare else dict(ratio=dict(mean=rmse, low=rmse, high=rmse))),
                fallback=False, solver="a", teacher=dict(name="UniPC", nfe=20, grid="logsnr"),
                reference=dict(real=50_000, teacher_fd_real=dict(mean=2.03, std=None)),
                provenance=dict(seconds=60., device="a GPU"))

def records_of(dataset):
    "Of everything: S4S-Alt is best by RMSE and worst by FID; parents are worst by RMSE and best by FID."
    worth = dict(parent=1., ld3=.3, s4s_alt=.01)
    cells = cells_of([n for n, e in EXPERIMENTS.items() if not e.guided], dataset)
    return [record(c, (v := worth.get(c.method, .1) / c.nfe), .1 / v / c.nfe**3) for c in cells]

@pytest.fixture(scope="module", params=["cifar10", "imagenet"])
def study(request):
    found = records_of(request.param)
    return request.param, found, study_frame(found)

@pytest.fixture(scope="module")
def digits(): return study_frame(records_of("digits"))

@pytest.mark.parametrize("name", [n for n, e in EXPERIMENTS.items() if not e.guided and e.view is None])
def test_tables_show_fid_first_and_its_best_in_bold(study, digits, name):
    dataset, _, df = study
    text = show(df, EXPERIMENTS[name])
    first, *rest = text.split("\n\n")[1:]
    assert first == "FID:" and "FID ratios:" in rest and "RMSE ratios:" not in rest and "FD to real images" not in text
    table = [[v.strip() for v in line.split("|")[1:-1]] for line in rest[0].splitlines()]
    for column in list(zip(*table))[1:]:
        numbers = {v: float(v.strip("*").split(" ")[0]) for v in column[2:] if v and v != "–"}
        assert {v for v in numbers if "**" in v} == {v for v in numbers if numbers[v] == min(numbers.values())} != set()
    assert "**" not in "".join(rest[1:])
    assert f"NFE {max(dataset_of(dataset).nfes) + 1}" not in text
    plain = show(digits, EXPERIMENTS[name])
    assert "FID" not in plain and "RMSE ratios:" in plain and "FD to the teacher:" in plain

def test_the_best_of_a_group_is_best_by_fid(study, digits):
    _, _, df = study
    by_fid, by_rmse = best_lines(df, "fd_real"), best_lines(df, "rmse")
    assert "**" in by_fid.loc["best classical"].str.cat() and "**" not in by_fid.loc["S4S-Alt"].str.cat()
    assert "**" not in by_rmse.to_string() and "**" in best_lines(digits, "rmse").loc["S4S-Alt"].str.cat()
    lines = {v.split("|")[1].strip(): v for v in fewest_table(df).splitlines()}
    assert "at most 3" in lines["best classical"] or " 3 " in lines["best classical"]   # any is as good as S4S-Alt
    assert "more than" in {v.split("|")[1].strip(): v for v in fewest_table(digits).splitlines()}["best classical"]
    assert "by FID" in show(df, EXPERIMENTS["table4"]) and "by RMSE" in show(digits, EXPERIMENTS["table4"])

def test_claims_are_decided_by_fid(study):
    "FID comes first, and says the opposite of RMSE; with one run of each cell nothing is decided."
    dataset, records, _ = study
    lines = deciding_lines(verdicts(Study(evaluations(records), variance=1.)))
    assert len(lines) == len(claims())
    decided = lines[lines.verdict.isin(["reproduced", "contradicted", "undecided"])]
    undecided = {"not decided: one run", "not testable here", "shown on its page"}
    undecided.add("not decided: no cell counts") # no solver's file says a radius
    assert set(lines.verdict) - set(decided.verdict) == undecided
    numbers = decided.rule.str.contains("calibration's tolerance") # of the paper: one run is enough
    assert numbers.sum() + 1 == len(decided) and "6 parameters" in decided.quote[~numbers].item() # a count
    table = verdicts(Study(evaluations(records))) # nor these, without the statistics of real images
    lines = deciding_lines(table)
    assert set(lines.verdict) == undecided | {"reproduced"}
    assert "6 parameters" in lines.quote[lines.verdict == "reproduced"].item()
    words = ["uniformly improves the sample quality", "shaded: best overall", "noticeable improvement in FID"]
    for text in words:
        here = table[table.quote.str.contains(text)]
        first, rmse = here.iloc[0], here[here.quality == "RMSE"].iloc[0]
        assert first.quality == "FID" and first.verdict == "not decided: one run" and first.value > 1 > rmse.value, text
    printed = lines[lines.quote.str.contains("13.26 on MS-COCO")]
    assert len(printed) == 2 and (printed.value.notna().sum(), dataset) in ((2, "cifar10"), (1, "imagenet"))

def test_claims_of_other_data_sets_call_nothing_fid():
    table = verdicts(Study(evaluations(records_of("digits"))))
    assert {"RMSE", "FD to the teacher", "FD to real images"} <= set(table.quality)
    assert not any(q.startswith("FID") for q in table.quality[table.value.notna()])

def test_figures_are_drawn_by_fid(study, digits, tmp_path, monkeypatch):
    dataset, _, df = study
    drawn = []
    monkeypatch.setattr("s4s_nb.paper.figures.save_figure", lambda fig, path: drawn.append(fig) or path)
    for name in ("full", "figure4"): write_outputs(name, df, tmp_path)
    words = [{t for ax in fig.axes for t in (ax.get_ylabel(), ax.get_xlabel())} for fig in drawn]
    assert "FID with S4S / without" in words[0] and "FID" in words[1]
    assert (base_ratios(df).stack() > 1).all() and (base_ratios(digits).stack() < 1).all()
    assert drawn[1].axes[0].get_ylabel() == "FID"
    number = PUBLISHED[dataset]
    table, _ = write_outputs(f"table{number}", df, tmp_path)
    assert table.name == f"table{number}.md" and table.read_text().startswith(f"**Table {number} ({dataset})")

def test_a_run_side_by_side_shows_fid_first(study):
    dataset, found, _ = study
    some = [r for r in found if r["key"]["method"] in ("parent", "s4s") and r["key"]["schedule"] == "edm"
            and r["key"]["nfe"] in (4, 6) and r["key"]["parent"] == "ipndm" and r["key"]["order"] == 3
            and r["key"]["distance"] in (None, "perceptual")
            and r["key"]["n_train"] in (None, pairs_for(1, "s4s", dataset))]
    text = side_by_side(some)
    head = [v.strip() for v in text.splitlines()[0].split("|")]
    assert head.index("FID: parent") < head.index("RMSE: parent") and not any("real" in v for v in head)
    assert "lower FID than the parent in 0 of 2 cells" in text and "by Inception" in text
    assert ": FID " in summary(some[0]) and "to real" not in summary(some[0])

def test_transfer_is_by_fid_where_there_is_one():
    values = {("parent", 1.): (1., 2.), ("parent", 4.): (1., 2.), ("s4s", 1.): (.5, 4.), ("s4s", 4.): (.5, 4.)}
    entries = [dict(method=m, learned_at=a, used_at=u, rmse=values[m, a][0]) for m, a, u in
               product(("parent", "s4s"), (1., 4.), (1., 4.))]
    with_fid = [e | dict(fid=values[e["method"], e["learned_at"]][1]) for e in entries]
    assert "RMSE over" in transfer_table(entries) and "0.50" in transfer_table(entries)
    assert "FID over" in transfer_table(with_fid) and "2.00" in transfer_table(with_fid)

@pytest.mark.parametrize("name", ["digits", "mixture", "cifar10_smoke", "mscoco_smoke", "digits_auto"])
def test_only_inception_gives_a_fid(name): assert not dataset_of(name).fid and dataset_of("cifar10_auto").fid
