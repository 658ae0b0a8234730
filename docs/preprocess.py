"""Copies the notebooks of nbs/ to docs/_src for Sphinx: `#|` directives obeyed, exported code as signature and table
of docments (in full for `#| exports`), Quarto's callouts as MyST's, names in backticks linked. Nothing is executed."""
import ast
import inspect
import json
import os
import re
import shutil
from importlib import import_module
from pathlib import Path
from textwrap import dedent

from fastcore.docments import docments
from readme import INDEX, NBS, ROOMS, ROOT, card, directives, generated, pages, sections, text

REPOSITORY = "https://github.com/s4s-nb/s4s_nb/blob/main"
SRC = ROOT / "docs/_src"
TAGS = {("echo", "false"): "remove-input", ("output", "false"): "remove-output", ("code-fold", "true"): "hide-input"}
HIDDEN = {"hide", "default_exp", "exporti"}
MODULE = re.compile(r"^#\|\s*default_exp\s+(\S+)", re.M)
SYMBOL = re.compile(r"^(?:async )?(?:def|class) ([A-Za-z]\w*)", re.M)
CALLOUT = re.compile(r'^(:{3,})\s*\{\.callout-(\w+)(?:[^}\n]*title="([^"]*)")?[^}\n]*\}', re.M)
PATCH = re.compile(r"^@patch[^\n]*\n(?:@[^\n]*\n)*def (\w+)\(\s*self\s*:\s*([\w.]+)", re.M)


def load(path) -> dict: return json.loads(path.read_text(encoding="utf-8"))


def sources(nb, kind="code"): return [text(c["source"]) for c in nb["cells"] if c["cell_type"] == kind]


def module_of(nb) -> str | None:
    "The module this notebook exports to, e.g. `s4s_nb.solver`."
    found = [m[1] for s in sources(nb) if (m := MODULE.search(s))]
    return f"s4s_nb.{found[0]}" if found else None


def symbols(code: str) -> list[str]:
    "Public functions and classes of an exported cell; a patched method is `Class.method`."
    patched = [(m[2], m[1]) for m in PATCH.finditer(code)]
    names = [n for n in SYMBOL.findall(code) if n not in {p for _, p in patched}]
    return names + [f"{k}.{m}" for k, m in patched if m[0] != "_"]


def symbol_index(notebooks: dict) -> dict[str, str]:
    "name -> full name of every top-level symbol the notebooks export."
    index = {}
    for nb in notebooks.values():
        for source in sources(nb):
            flags, code = directives(source)
            if flags.keys() & {"export", "exports"}:
                index |= {name: f"{module_of(nb)}.{name}" for name in symbols(code)}
    return index


# %% What a reader sees of an exported symbol

def annotation(a) -> str:
    if a in (inspect.Parameter.empty, None, type(None)): return ""
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", a if isinstance(a, str) else inspect.formatannotation(a))


def table(obj) -> str:
    "The docments of a callable as a Markdown table; empty when it has none."
    rows = []
    for name, d in docments(obj, full=True, args_kwargs=True).items():
        if name == "self" or name == "return" and not d.get("docment"): continue
        kind, doc = annotation(d.get("anno")), (d.get("docment") or "").replace("\n", " ").replace("|", "\\|")
        label = "*returns*" if name == "return" else f"`{name}`"
        rows.append((label, f"`{kind}`".replace("|", "\\|") if kind else "", escape(doc)))
    if not any(meaning for _, _, meaning in rows): return ""
    body = "\n".join("| " + " | ".join(r) + " |" for r in rows)
    return f"| argument | type | meaning |\n|---|---|---|\n{body}"


def escape(doc: str) -> str:
    "A plain comment or docstring as Markdown: stars and underscores outside backticks are letters."
    parts = re.split(r"(`[^`]*`)", doc)
    return "".join(p if p.startswith("`") else re.sub(r"([*_<>$\[\]])", r"\\\1", p) for p in parts)


class Verbatim(str):
    "A default as it is written in the source."
    __repr__ = str.__str__


def written_defaults(obj) -> dict:
    "name -> default as written: `CARDS` rather than a path of this machine."
    function = obj.__init__ if inspect.isclass(obj) else obj
    try: args = ast.parse(dedent(inspect.getsource(inspect.unwrap(function)))).body[0].args
    except (TypeError, OSError, SyntaxError, AttributeError): return {}
    positional = [*args.posonlyargs, *args.args]
    given = [*zip(reversed(positional), reversed(args.defaults)), *zip(args.kwonlyargs, args.kw_defaults)]
    return {a.arg: Verbatim(ast.unparse(d)) for a, d in given if d is not None}


def signature(obj) -> str:
    "The call, without types: the table below holds them."
    try: sig = inspect.signature(obj)
    except (TypeError, ValueError): return "()"
    written = written_defaults(obj)
    params = [p.replace(annotation=inspect.Parameter.empty, default=written.get(n, p.default))
              for n, p in sig.parameters.items() if n != "self"]
    shown = str(sig.replace(parameters=params, return_annotation=inspect.Signature.empty))
    return shown.replace("<factory>", "...")


def methods(cls) -> list[str]:
    "Public methods that a class defines itself and documents."
    return [n for n, m in vars(cls).items() if n[0] != "_" and inspect.isfunction(m) and m.__doc__]


def own_doc(obj) -> str:
    "The docstring, unless a class merely inherits it."
    return escape(inspect.getdoc(obj) or "") if not inspect.isclass(obj) or vars(obj).get("__doc__") else ""


def documented(module: str, name: str, obj, fence: int = 5) -> str:
    "A Sphinx description of one symbol: signature, docstring, docments, and the methods of a class."
    kind = "class" if inspect.isclass(obj) else "method" if "." in name else "function"
    parts = [f":module: {module}", own_doc(obj), table(obj)]
    if kind == "class": parts += [documented(module, f"{name}.{m}", vars(obj)[m], fence - 1) for m in methods(obj)]
    body = "\n\n".join(p for p in parts if p)
    return f"{'`' * fence}{{py:{kind}}} {name}{signature(obj)}\n{body}\n{'`' * fence}"


def resolve(module: str, name: str):
    "The object behind a module and `Name.method`."
    obj = import_module(module)
    for part in name.split("."): obj = getattr(obj, part)
    return obj


# %% Cells

def callout(m) -> str:
    "`::: {.callout-note}` as `:::{note}`; with a title, as `:::{admonition}`."
    fence, kind, title = m.groups()
    return f"{fence}{{admonition}} {title}\n:class: {kind}" if title else f"{fence}{{{kind}}}"


def pictures(source: str, folder: Path, out: Path | None) -> str:
    "Pictures of the repository are copied beside the pages."
    def link(m):
        path = (folder / m[2]).resolve()
        if out is None or path.is_relative_to(NBS): return m[0]
        (out / "_pictures").mkdir(exist_ok=True)
        shutil.copy(path, out / "_pictures" / path.name)
        return f"![{m[1]}](/_pictures/{path.name})"
    return re.sub(r"!\[([^\]]*)\]\((\.\./[^)\s]+)\)", link, source)


def outward(source: str, folder: Path) -> str:
    "Links to files of the repository that are no pages, as links to its public copy."
    def link(m):
        path = (folder / m[1]).resolve()
        return m[0] if path.is_relative_to(NBS) else f"]({REPOSITORY}/{path.relative_to(ROOT)})"
    return re.sub(r"\]\((\.\./[^)\s#]+)\)", link, source)


def markdown(source: str, index: dict, folder: Path = NBS, out: Path | None = None) -> str:
    "Quarto's callouts become MyST's, files of the repository are linked there, backticked symbols here."
    source = outward(pictures(generated(source), folder, out), folder)
    source = CALLOUT.sub(callout, source)
    fenced = re.split(r"(^```.*?^```[^\n]*$)", source, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else linked(part, index) for part in fenced)


def linked(md: str, index: dict) -> str:
    def link(m): return f"{{py:obj}}`{m[1]} <{index[m[1]]}>`" if m[1] in index else m[0]
    def line(s): return s if s.startswith("#") else re.sub(r"(?<![`\w}\[])`([\w.]+)`(?![`\]])", link, s)
    return "\n".join(line(s) for s in md.split("\n"))


def opening(source: str) -> str:
    "Title, subtitle, promise; nbdev's `- key: value` front matter goes."
    source = re.sub(r"^- [\w-]+: [^\n]*\n?", "", source, flags=re.M)
    return re.sub(r"^> ([^\n]+)$", r"{.subtitle}\n\1", source, count=1, flags=re.M)


def markdown_cell(source: str) -> dict: return {"cell_type": "markdown", "metadata": {}, "source": source}


def code_cell(cell: dict, code: str, *tags: str, prompt: str = "Code") -> dict:
    "The cell with MyST-NB's tags."
    style = {"code_prompt_show": prompt, "code_prompt_hide": prompt}
    return cell | {"source": code, "metadata": {"tags": list(tags), "mystnb": style}}


def is_imports(source: str) -> bool:
    "Whether a cell does nothing but import."
    try: return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body)
    except SyntaxError: return False # a magic command


def summary(source: str, names: list[str]) -> str:
    "What the bar above a folded cell says."
    return "Imports" if is_imports(source) else "Source" if names else "Definitions"


def code(cell: dict, module: str | None) -> list[dict]:
    "The cells that stand for one code cell."
    flags, source = directives(text(cell["source"]))
    if flags.keys() & HIDDEN or flags.get("include") == "false" or not source: return []
    names = symbols(source) if module else []
    if "exports" in flags:
        classes = [(n, c) for n in names if inspect.isclass(c := resolve(module, n))]
        names = names + [f"{n}.{m}" for n, c in classes for m in methods(c)]
        anchors = "".join(f"```{{exported}} {module} {n}\n```\n" for n in names)
        return ([markdown_cell(anchors)] if anchors else []) + [code_cell(cell, source)]
    if "export" in flags:
        described = [markdown_cell(documented(module, n, resolve(module, n))) for n in names]
        return described + [code_cell(cell, source, "hide-input", prompt=summary(source, names))]
    if module and is_imports(source) and not cell["outputs"]:
        return [code_cell(cell, source, "hide-input", prompt="Imports")]
    return [code_cell(cell, source, *[tag for flag, tag in TAGS.items() if flags.get(flag[0]) == flag[1]])]


PROGRAM = """:::{{admonition}} This page is a program
:class: tip
papermill runs it, and it is kept without outputs; its code is folded at the end. What such programs found: {}.
:::"""


def program(nb: dict, folder: Path) -> dict:
    "A notebook with parameters: what it is, where its results are, and its code, folded."
    cells = [c | {"outputs": []} if c["cell_type"] == "code" else c for c in nb["cells"]]
    results = [(card(p)[0], Path(os.path.relpath(p, folder)).as_posix()) for p in sections()[0].get("Results", [])]
    cells.insert(1, markdown_cell(PROGRAM.format(", ".join(f"[{title}]({path})" for title, path in results))))
    return nb | {"cells": cells}


def is_program(nb: dict) -> bool: return any("parameters" in c["metadata"].get("tags", []) for c in nb["cells"])


def folded(cells: list[dict]) -> list[dict]:
    "All code of a program behind one quiet line, at its end; headings that have nothing but code below them go."
    prose = [c for c in cells if c["cell_type"] == "markdown" and not re.fullmatch(r"#+ [^\n]+", c["source"].strip())]
    source = "\n\n".join(c["source"] for c in cells if c["cell_type"] == "code")
    return [*prose, code_cell(dict(cell_type="code", execution_count=None, outputs=[]), source, "hide-input")]


def page(nb: dict, index: dict, folder: Path = NBS, out: Path | None = None) -> dict:
    "One notebook, ready for MyST-NB."
    thin, cells, module = is_program(nb), [], module_of(nb)
    if thin: nb = program(nb, folder)
    for i, c in enumerate(nb["cells"]):
        if c["cell_type"] == "markdown":
            source = text(c["source"])
            cells.append(markdown_cell(markdown(opening(source) if i == 0 else source, index, folder, out)))
        elif c["cell_type"] == "code": cells += code(c, module)
    if thin: cells = folded(cells)
    for i, c in enumerate(cells): c["id"] = f"cell-{i}"
    return nb | {"cells": cells}


# %% The site

def toctree(caption: str, entries: list[str], hidden: bool = True) -> str:
    options = ([":hidden:"] if hidden else []) + ([f":caption: {caption}"] if caption else [])
    return "\n".join(["```{toctree}", *options, "", *entries, "```"])


def name_of(path: Path) -> str: return "/" + path.relative_to(NBS).with_suffix("").as_posix()


def contents() -> str:
    "The sidebar: results, what to learn, what to use; below, one line for each of the other groups, which open."
    first, rest = sections()
    groups = [toctree(caption, [name_of(p) for p in found]) for caption, found in first.items()]
    inner = [f"/_groups/{slug(caption)}" for caption in rest]
    names = toctree("Reference", ["/_groups/names", "All names <genindex>"])
    return "\n\n".join([*groups, toctree("In detail", inner), names])


def slug(caption: str) -> str: return re.sub(r"\W+", "_", caption.lower()).strip("_")


def purpose(room: str) -> str:
    "What a folder of the package is for, in its own words."
    return escape(import_module(f"s4s_nb.{room}").__doc__) if room and (ROOT / "s4s_nb" / room).is_dir() else ""


def group_page(caption: str, found: list[Path]) -> str:
    "A page that lists the pages of a group, each with its line."
    room = next((room for room, name in ROOMS.items() if name == caption), "")
    lines = [f"| [{title}]({name_of(p)}.ipynb) | {line} |" for p in found for title, line in [card(p)]]
    table = "\n".join(["| page | what it says |", "|---|---|", *lines])
    return "\n\n".join([f"# {caption}", purpose(room), table, toctree("", [name_of(p) for p in found])]) + "\n"


def names_page(index: dict) -> str:
    "The names that the package and its second level offer, linked to where they are described."
    parts = ["# Names by package", "What `from s4s_nb import ...` offers, and below it the second level."]
    for room in ("", "solvers", "learning", "models", "judging", "lab"):
        face = import_module(f"s4s_nb.{room}".rstrip("."))
        names = [n for n in face.__all__ if n in index]
        plain = [f"`{n}`" for n in face.__all__ if n not in index and n[0] != "_"]
        parts += [f"## {face.__name__}", purpose(room), ", ".join([linked(f"`{n}`", index) for n in names] + plain)]
    return "\n\n".join(p for p in parts if p) + "\n"


def main(out=SRC):
    "Write the folder `out` anew."
    notebooks = {p.relative_to(NBS).with_suffix("").as_posix(): load(p) for p in pages()}
    index = symbol_index(notebooks)
    shutil.rmtree(out, ignore_errors=True)
    (out / "_groups").mkdir(parents=True)
    for name, nb in notebooks.items():
        ready = page(nb, index, (NBS / name).parent, out)
        if name == INDEX.stem: ready["cells"].append(markdown_cell(contents()) | {"id": "contents"})
        (path := out / f"{name}.ipynb").parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(ready), encoding="utf-8")
    for caption, found in sections()[1].items():
        (out / "_groups" / f"{slug(caption)}.md").write_text(group_page(caption, found), encoding="utf-8")
    (out / "_groups/names.md").write_text(names_page(index), encoding="utf-8")


if __name__ == "__main__": main()
