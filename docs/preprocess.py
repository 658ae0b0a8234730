"""Copies the notebooks of nbs/ to docs/_src for Sphinx: `#|` directives obeyed, exported code as signature and table
of docments (in full for `#| exports`), Quarto's callouts as MyST's, names in backticks linked. Nothing is executed."""
import ast
import inspect
import json
import re
import shutil
from importlib import import_module
from pathlib import Path
from textwrap import dedent

from fastcore.docments import docments
from readme import INDEX, NBS, ROOT, directives, pages, text

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


def outward(source: str, folder: Path) -> str:
    "Links to files of the repository that are no pages, as links to its public copy."
    def link(m):
        path = (folder / m[1]).resolve()
        return m[0] if path.is_relative_to(NBS) else f"]({REPOSITORY}/{path.relative_to(ROOT)})"
    return re.sub(r"\]\((\.\./[^)\s#]+)\)", link, source)


def markdown(source: str, index: dict, folder: Path = NBS) -> str:
    "Quarto's callouts become MyST's, files of the repository are linked there, backticked symbols here."
    source = outward(source, folder)
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


def summary(source: str, names: list[str]) -> str:
    "What the bar above a folded cell says."
    imports = all(re.match(r"(from |import |\s|\)|#|$)", line) for line in source.split("\n"))
    return "Imports" if imports else "Source" if names else "Definitions"


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
    return [code_cell(cell, source, *[tag for flag, tag in TAGS.items() if flags.get(flag[0]) == flag[1]])]


def page(nb: dict, index: dict, outputs: bool = True, folder: Path = NBS) -> dict:
    "One notebook, ready for MyST-NB."
    cells, module = [], module_of(nb)
    for i, c in enumerate(nb["cells"]):
        if c["cell_type"] == "markdown":
            source = text(c["source"])
            cells.append(markdown_cell(markdown(opening(source) if i == 0 else source, index, folder)))
        elif c["cell_type"] == "code":
            cells += code(c if outputs else c | {"outputs": []}, module)
    for i, c in enumerate(cells): c["id"] = f"cell-{i}"
    return nb | {"cells": cells}


# %% The site

def contents(names: list[str]) -> str:
    "The table of contents, room by room."
    rooms = ["", "files", "judging", "models", "solvers", "learning", "lab", "paper", "results"]
    found = {room: [n for n in names if n.rpartition("/")[0] == room and n != INDEX.stem] for room in rooms}
    groups = [(room or "First", pages) for room, pages in found.items()] + [("Reference", ["All names <genindex>"])]
    return "\n\n".join("```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(pages) + "\n```"
                       for caption, pages in groups if pages)


def main(out=SRC):
    "Write the folder `out` anew."
    notebooks = {p.relative_to(NBS).with_suffix("").as_posix(): load(p) for p in pages()}
    index = symbol_index(notebooks)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name, nb in notebooks.items():
        thin = any("parameters" in c["metadata"].get("tags", []) for c in nb["cells"])
        ready = page(nb, index, outputs=not thin, folder=(NBS / name).parent)
        if name == INDEX.stem: ready["cells"].append(markdown_cell(contents(list(notebooks))) | {"id": "contents"})
        (path := out / f"{name}.ipynb").parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(ready), encoding="utf-8")


if __name__ == "__main__": main()
