"Files that must agree with each other: settings, environment, README, notebooks, generated modules."
import ast
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import typing
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from readme import INDEX, LEARN, by_stem, directives, pages, readme

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = pages()
PACKAGE = ROOT / "s4s_nb"
MODULES = sorted(".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("[!_]*.py"))
assert len(NOTEBOOKS) >= 70 and len(MODULES) >= 39, "a glob has gone silently empty"
ROOMS = sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))
FACES = ["solvers", "learning", "models", "judging", "lab", "files", "use"] # offer names of the modules below
HEAVY = "torchvision matplotlib pandas sklearn diffusers transformers lpips cleanfid IPython fastcore nbdev".split()


@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def run(*command, cwd=ROOT):
    "The standard output of a command in a new process, or its error output as the failure."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def cells(path, kind="code"):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c for c in found if c["cell_type"] == kind]


def test_environment_has_the_pins_of_settings(settings):
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pins = next(d["pip"] for d in dependencies if isinstance(d, dict))
    keys = "requirements", "paper_requirements", "dev_requirements"
    assert sorted(pins) == sorted(r for k in keys for r in settings[k].split())
    assert f"python>={settings['min_python']}" in dependencies and "quarto" in dependencies


def test_version_is_the_same_everywhere(settings):
    import s4s_nb
    assert s4s_nb.__version__ == settings["version"]
    assert f"version: {settings['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {settings['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_is_the_index_notebook():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run `make sync`"


RESULTS = ROOT / "results/digits"


def test_readme_shows_the_table_that_the_records_give():
    from s4s_nb.paper.front import front_markdown
    table = front_markdown(RESULTS)
    assert table in (ROOT / "README.md").read_text(encoding="utf-8"), "run `make sync NB=index`"
    assert (RESULTS / "front.md").read_text(encoding="utf-8") == table + "\n"


def test_readme_shows_the_picture_of_the_records():
    from s4s_nb.paper.front import drawn_from, front_frame, front_key
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert shown == ["results/digits/front.png"] and (ROOT / shown[0]).stat().st_size < 200_000
    assert drawn_from(ROOT / shown[0]) == front_key(front_frame(RESULTS)), "delete it and run `make sync NB=index`"
    assert text.index(shown[0]) < 2000, "the picture stands first"


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)}
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)
    assert len(links) > 60
    for link in links:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists() if path else anchor in anchors, link


def test_ideas_of_the_project_come_first():
    assert [len(by_stem(stems, NOTEBOOKS)) > 0 for stems in LEARN.values()] == [True] * 4
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    where = [text.index(f"| {idea} | [") for idea in LEARN]
    assert where == sorted(where) and text.index("<details>") > where[-1]
    assert all(f"]({p.relative_to(ROOT)})" in text for p in NOTEBOOKS if p != INDEX), "a page is not in the list"


def readme_block(start: str) -> str:
    "The Python block of the README with a line that starts so."
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    (found,) = [b for b in blocks if f"\n{start}" in b]
    return found


def test_block_for_a_pipeline_runs_as_it_stands(tmp_path, monkeypatch):
    "With a tiny pipeline in place of the published one, fewer pairs and one epoch."
    import test_pipelines as tiny
    diffusers = tiny.diffusers()
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda name: tiny.pipeline("sd"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("S4S_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    block = readme_block("pipeline = DiffusionPipeline")
    for usual, few in (("n=100", "n=4"), ("S4SConfig()", "S4SConfig(epochs=1)")):
        assert usual in block
        block = block.replace(usual, few)
    exec(block, made := {})
    assert len(made["images"]) == 4 and made["learned"].solver.nfe == 5 and (tmp_path / "ipndm5-sd15.json").exists()


def test_a_solver_of_ones_own_is_six_lines():
    from s4s_nb.solvers.families import SOLVERS
    block = readme_block("SOLVERS[").split("ab2(schedule, time")[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 6
    try:
        exec(block, {})
        assert "ab2" in SOLVERS
    finally: SOLVERS.pop("ab2", None)


def test_every_requirement_is_used(settings):
    "What nothing imports or calls does not stand in the lists."
    commands = {"jupyter", "papermill", "ruff", "mypy", "furo", "myst-nb", "sphinx-mathjax-offline"} # and conf.py
    pins = {"fastgit", "ghapi", "execnb", "pytest-cov", "pytest-xdist", "tabulate", "torchsde",
            "torchdiffeq"} # what others of the list need
    names = {"scikit-learn": "sklearn", "clean-fid": "cleanfid", "pillow": "PIL", "torch-fidelity": "torch_fidelity"}
    files = [p for d in ("s4s_nb", "tests", "docs") for p in (ROOT / d).glob("**/*.py")]
    used, texts = set(), [p.read_text(encoding="utf-8") for p in files]
    texts += ["".join(c["source"]) for path in NOTEBOOKS for c in cells(path)]
    for text in texts: used |= set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.M))
    for k in ("requirements", "paper_requirements", "dev_requirements"):
        for r in settings[k].split():
            name = re.match(r"[\w-]+", r)[0]
            assert name in commands | pins or names.get(name, name) in used, f"{name}: nothing imports it"


def test_what_ships_is_named(settings):
    text = (ROOT / "setup.py").read_text()
    data = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"}]
    patterns = re.findall(r'"([^"]+)"', re.search(r'package_data=\{"s4s_nb": \[(.*?)\]', text, re.S)[1])
    assert len(data) > 10
    for p in data: assert any(p.match(f"s4s_nb/{q}") for q in patterns), f"{p} would not be in the wheel"


def test_help_names_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)$", text, re.M)[1].split()
    for t in targets: assert re.search(rf"^{t}:.*## \S", text, re.M), f"make {t} has no line of help"


def test_continuous_integration_tests_the_oldest_torch_and_the_newest(settings):
    low, high = re.search(r"torch>=([\d.]+),<(\d+\.\d+)", settings["requirements"]).groups()
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    tested = [m["torch"].removesuffix(".*") for m in jobs["torch"]["strategy"]["matrix"]["include"]]
    major, minor = map(int, high.split("."))
    assert tested == [low, f"{major}.{minor - 1}"]
    assert any("make wheel" in str(step) for step in jobs["wheel"]["steps"])


def test_import_loads_nothing_heavy():
    faces = ", ".join(f"s4s_nb.{room}" for room in ROOMS)
    loaded = run(sys.executable, "-c", f"import sys, s4s_nb, {faces}; print(*sys.modules)").split()
    assert not {"torch", "numpy", "scipy", *HEAVY} & set(loaded)


def test_no_module_imports_more_than_the_core_requirements():
    modules = ", ".join(f"s4s_nb.{m}" for m in MODULES if m != "use.scheduler") # a class of diffusers
    loaded = run(sys.executable, "-c", f"import sys, {modules}; print(*sys.modules)").split()
    assert not set(HEAVY) & set(loaded)


def test_lazy_names_resolve():
    import s4s_nb
    top = {m.split(".")[0] for m in MODULES} # modules and rooms
    for name in (*s4s_nb.__all__, *top): assert getattr(s4s_nb, name) is not None and name in dir(s4s_nb)
    assert not set(s4s_nb.__all__) & top, "a name hides a module"
    with pytest.raises(AttributeError, match="s4s_nb has no 'sampler'"): s4s_nb.sampler  # noqa: B018


def test_every_folder_of_the_package_says_in_one_sentence_what_it_is_for():
    assert {*ROOMS} == {p.parent.name for p in PACKAGE.glob("*/*.py")} >= {*FACES, "paper"}
    for room in ROOMS:
        doc = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
        assert doc and "\n" not in doc and doc.endswith(".") and doc.count(". ") == 0


@pytest.mark.parametrize("room", FACES)
def test_second_level_offers_names_and_hides_no_module(room):
    face = importlib.import_module(f"s4s_nb.{room}")
    below = {m.split(".")[1] for m in MODULES if m.startswith(f"{room}.")}
    assert len(face.__all__) >= 3 and not set(face.__all__) & below, "a name hides a module"
    for name in (*face.__all__, *below): assert getattr(face, name) is not None and name in dir(face)
    with pytest.raises(AttributeError, match=f"s4s_nb.{room} has no 'sampler'"): face.sampler  # noqa: B018


@pytest.mark.parametrize("room", ["", *FACES])
def test_type_checkers_see_the_modules_that_names_come_from(room):
    face = importlib.import_module(f"s4s_nb.{room}".rstrip("."))
    homes = {m.module for m in starred(face)}
    assert all(any(hasattr(importlib.import_module(f"{face.__name__}.{m}"), name) for m in homes)
               for name in face.__all__ if name != "__version__")


def test_one_name_is_defined_in_one_module():
    homes = {}
    for path in PACKAGE.rglob("[!_]*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                homes.setdefault(node.name, set()).add(path.relative_to(PACKAGE).as_posix())
    assert len(homes) > 500
    assert not {name: found for name, found in homes.items() if len(found) > 1}


def starred(module) -> list:
    "The star imports under `if TYPE_CHECKING` of a module."
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    return [node for block in tree.body if isinstance(block, ast.If) for node in block.body]


def public_names() -> list:
    "What the package and its second level offer, each once: (id, object)."
    faces = [importlib.import_module(f"s4s_nb.{room}".rstrip(".")) for room in ("", *FACES)]
    found = {f"{v.__module__}.{n}": v for f in faces for n in f.__all__ if callable(v := getattr(f, n))}
    return sorted(found.items())


@pytest.mark.parametrize("name, obj", public_names(), ids=lambda v: v if isinstance(v, str) else "")
def test_types_of_public_names_resolve(name, obj):
    "Annotations are types that exist."
    methods = [m for n, m in vars(obj).items() if inspect.isfunction(m)] if inspect.isclass(obj) else []
    for each in (obj, *methods): assert isinstance(typing.get_type_hints(each), dict)


def test_type_checker_knows_the_public_names(tmp_path):
    "mypy, without the libraries: names have types, and a name that is not offered is an error."
    assert (PACKAGE / "py.typed").exists()
    faces = [importlib.import_module(f"s4s_nb.{room}".rstrip(".")) for room in ("", *FACES)]
    lines = [f"from {m.__name__} import {n} as {n}" for m in faces for n in m.__all__ if n != "__version__"]
    user = tmp_path / "user.py"
    user.write_text("\n".join([*lines, "reveal_type(s4s)", "import s4s_nb", "s4s_nb.sampler"]))
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--ignore-missing-imports",
               "--no-site-packages", "--cache-dir", str(tmp_path / "cache"), str(user)]
    env = os.environ | dict(MYPYPATH=str(ROOT))
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if " error: " in line]
    assert len(errors) == 1 and 'no attribute "sampler"' in errors[0], done.stdout + done.stderr
    assert "denoiser: s4s_nb.denoise.Denoiser" in done.stdout and "-> s4s_nb.learning" in done.stdout, done.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_opens_with_title_and_one_line(path):
    first = "".join(cells(path, "markdown")[0]["source"])
    assert re.match(r"# \S.*\n\n> \S.*(\n|$)", first)


PARAMETER = r"\s+\**\w+(:[^=#]+)?(=[^#]*)?,\s*#" # on a line of its own, with its word: documentation, not code

@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_has_no_error_and_no_long_export(path):
    for c in cells(path):
        source = "".join(c["source"])
        assert not any(o["output_type"] == "error" for o in c["outputs"])
        if re.match(r"#\|\s*exports?\b", source):
            lines = [s for s in source.split("\n") if s.strip() and not re.match(f"#\\||{PARAMETER}", s)]
            assert len(lines) <= 40, f"an exported cell of {len(lines)} lines: split it\n{source[:200]}"


def test_imports_stand_in_cells_of_their_own():
    "nbdev's documentation step runs exported cells and imports, nothing else."
    for path in NOTEBOOKS:
        found = [directives("".join(c["source"])) for c in cells(path)]
        if not any("export" in flags or "exports" in flags for flags, _ in found): continue
        for flags, code in found:
            if flags.keys() & {"export", "exports", "default_exp"} or flags.get("eval") == "false": continue
            kinds = {isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(code).body}
            assert len(kinds) < 2, f"{path.name}: imports and other code share a cell\n{code[:200]}"


def test_clean_and_export_leave_no_diff(tmp_path):
    "Done on a copy, so that it says the same in a clean and in a dirty tree."
    for name in ("nbs", "s4s_nb"): shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for command in ("nbdev_clean", "nbdev_export"): run(Path(sys.executable).parent / command, cwd=tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.suffix in {".py", ".ipynb"} and ".ipynb_checkpoints" not in p.parts]
    changed = [str(p.relative_to(tmp_path)) for p in files
               if not (o := ROOT / p.relative_to(tmp_path)).exists() or o.read_bytes() != p.read_bytes()]
    assert not changed, "run `make sync` and commit the result"
