"The site: what the preprocessor makes of a cell, and the whole build, in which a warning is an error."
import re
import subprocess
import sys
from pathlib import Path

import preprocess as p
import pytest
from readme import INDEX, card, pages, sections

ROOT = Path(__file__).resolve().parent.parent


def code_cell(source): return {"cell_type": "code", "metadata": {}, "source": source, "outputs": []}


def test_directives_decide_what_is_shown():
    assert p.code(code_cell("#| hide\nsecret = 1"), None) == []
    assert p.code(code_cell("#| default_exp solver"), None) == []
    (quiet,) = p.code(code_cell("#| echo: false\n1 + 1"), None)
    assert quiet["source"] == "1 + 1" and quiet["metadata"]["tags"] == ["remove-input"]


def test_exported_code_is_described_and_folded():
    source = "#| export\ndef as_double(\n    v, # number\n): pass"
    described, folded = p.code(code_cell(source), "s4s_nb.schedule")
    assert "{py:function} as_double(v)" in described["source"]
    assert re.search(r"\| `v` \|.*\| number", described["source"])
    assert folded["metadata"]["tags"] == ["hide-input"]


def test_defaults_are_shown_as_written():
    source = "#| export\ndef card_names(folder=CARDS): pass"
    described, _ = p.code(code_cell(source), "s4s_nb.models.cards")
    assert "folder=CARDS" in described["source"] and str(ROOT) not in described["source"]


def test_exports_shows_its_source_and_is_a_target():
    anchor, shown = p.code(code_cell("#| exports\nclass EDMSchedule: pass"), "s4s_nb.schedule")
    assert "{exported} s4s_nb.schedule EDMSchedule" in anchor["source"]
    assert shown["metadata"]["tags"] == []


def test_markdown_for_myst():
    index = {"Solver": "s4s_nb.solver.Solver"}
    assert p.markdown("a `Solver` and `x`", index) == "a {py:obj}`Solver <s4s_nb.solver.Solver>` and `x`"
    assert p.markdown("```\n`Solver`\n```", index) == "```\n`Solver`\n```"
    assert p.markdown("::: {.callout-tip}\nx\n:::", {}) == ":::{tip}\nx\n:::"
    assert p.markdown('::: {.callout-note title="Why"}\nx\n:::', {}) == ":::{admonition} Why\n:class: note\nx\n:::"
    assert p.opening("# T\n\n> one line\n\n- skip_exec: true\n") == "# T\n\n{.subtitle}\none line\n\n"


def test_pages_are_linked_as_pages_and_files_where_they_are_published():
    folder = p.NBS / "solvers"
    assert p.outward("[a](../00_schedule.ipynb) [b](01_singlestep.ipynb#x)", folder) \
        == "[a](../00_schedule.ipynb) [b](01_singlestep.ipynb#x)"
    assert p.outward("[c](../../LICENSE)", folder) == f"[c]({p.REPOSITORY}/LICENSE)"


def test_imports_and_programs_are_folded(tmp_path):
    only_imports = code_cell("from pathlib import Path\nimport torch")
    (cell,) = p.code(only_imports, "s4s_nb.solver")
    assert cell["metadata"]["tags"] == ["hide-input"] and cell["metadata"]["mystnb"]["code_prompt_show"] == "Imports"
    experiments = next(f for f in pages() if f.stem == "experiments")
    cells = p.page(p.load(experiments), {}, experiments.parent)["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert len(code) == 1 and code[0]["metadata"]["tags"] == ["hide-input"] and cells[-1] is code[0]
    assert "results/digits_study.ipynb" in cells[1]["source"], "says where its results are"


def test_every_page_stands_in_one_place_and_results_come_first():
    first, rest = sections()
    found = [page for group in (first | rest).values() for page in group]
    assert sorted(found) == sorted(f for f in pages() if f != INDEX)
    assert [*first][:3] == ["Results", "Learn", "Use"] and [*rest][-1] == "Files"
    assert sum(map(len, first.values())) + len(rest) <= 30, "the sidebar is too long to read"
    for page in found: assert all(card(page))


def test_pictures_of_the_repository_are_copied(tmp_path):
    source = p.markdown("![a b](../results/digits/front.png)", {}, p.NBS, tmp_path)
    assert source == "![a b](/_pictures/front.png)" and (tmp_path / "_pictures/front.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    p.main(folder / "src")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(ROOT / "docs")]
    done = subprocess.run([*command, str(folder / "src"), str(folder / "html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_site_builds_and_needs_no_network(site):
    for path in pages():
        html = (site / path.relative_to(ROOT / "nbs").with_suffix(".html")).read_text(encoding="utf-8")
        remote = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?://[^\"]+)\"", html)
        assert not remote, f"{path.stem} loads {remote}"
        assert str(ROOT) not in html, f"{path.stem} shows a path of this machine"
    assert (site / "_static/tex-svg.js").stat().st_size > 1e6


def test_links_between_pages_stay_inside_and_lead_somewhere(site):
    "A page of ours is never linked as an outside page."
    count = 0
    for path in pages():
        html = site / path.relative_to(p.NBS).with_suffix(".html")
        for href in re.findall(r'<a [^>]*href="([^"]+)"', html.read_text(encoding="utf-8")):
            assert not re.match(rf"{re.escape(p.REPOSITORY)}/[^?]*\.ipynb(#.*)?$", href), f"{path.stem} links {href}"
            if re.match(r"[a-z]+:", href) or href.startswith("#"): continue
            assert (html.parent / href.split("#")[0]).exists(), f"{path.stem} links {href}, which is not there"
            count += 1
    assert count > 1000


def test_pages_load_mathjax_only_where_there_is_math(site):
    kinds = set()
    for path in site.rglob("*.html"):
        html = path.read_text(encoding="utf-8")
        kinds.add(math := 'class="math' in html)
        assert ("tex-svg" in html) == math, path.name
    assert kinds == {True, False}


def test_names_of_the_second_level_are_documented(site):
    html = (site / "_groups/names.html").read_text(encoding="utf-8")
    for name in ("s4s_nb.solvers", "s4s_nb.learning"): assert f"<h2>{name}" in html
    for target in ("multistep.html#s4s_nb.solvers.multistep.ddim", "#s4s_nb.solver.Solver"): assert target in html


def test_search_and_index_know_the_symbols(site):
    index = (site / "genindex.html").read_text(encoding="utf-8")
    for name in ("ddim", "Solver", "interpolate"): assert f"{name}" in index
    assert "ddim" in (site / "searchindex.js").read_text(encoding="utf-8")
