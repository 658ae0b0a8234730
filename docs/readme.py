"README.md from nbs/index.ipynb and its stored outputs: `python docs/readme.py` writes it, `readme()` returns it."
import json
import os.path
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
INDEX = NBS / "index.ipynb"
HEADER = "<!-- Written by `make sync` from nbs/index.ipynb: edit the notebook. -->\n\n"


def pages() -> list[Path]:
    "The notebooks of the site, room by room; their names are unique."
    found = sorted(p for p in NBS.rglob("*.ipynb") if not {c[0] for c in p.relative_to(NBS).parts} & {".", "_"})
    if len({p.stem for p in found}) < len(found): raise ValueError("two notebooks have one name")
    return found


# what a reader should meet first: idea of the project -> stems of its pages, without their numbers
LEARN = {"Exponential integrator": ("solver",), "Solver families": ("families",),
         "Relaxed objective": ("relax", "coefficients", "global_and_relaxed"),
         "Alternating optimisation": ("alternate",)}
PAPER = ("lines", "errata") # of the paper, beside the results
USE = ("learn", "scheduler", "k_diffusion", "only_the_file", "command", "experiments", "ablations", "tables")
ROOMS = {"": "Notation and first objects", "solvers": "Solvers, derived", "learning": "Learning, in detail",
         "models": "Models",
         "use": "In other programs", "judging": "Judging", "lab": "Experiments", "paper": "The paper's tables",
         "theory": "Theory", "files": "Files"}


def bare(path: Path) -> str: return re.sub(r"^\d+[a-z]*_", "", path.stem)


def room_of(path: Path) -> str:
    "The folder of a page below nbs/."
    return path.relative_to(NBS).parent.as_posix().replace(".", "")


def by_stem(stems, found: list[Path]) -> list[Path]:
    "Pages by their stems without numbers; a page without a number goes before one with the same name."
    same = {s: [p for p in found if bare(p) == s] for s in stems}
    return [p for s, pages in same.items() for p in [q for q in pages if q.stem == s] or pages]


def sections(found: list[Path] | None = None) -> tuple[dict, dict]:
    "Caption -> pages: those that stand open in this order, and the rest, room by room. Each page is in one place."
    rest = [p for p in found or pages() if p != INDEX]
    first = {"Results": [p for p in rest if room_of(p) == "results"] + by_stem(PAPER, rest),
             "Learn": by_stem(sum(LEARN.values(), ()), rest),
             "Use": by_stem(USE, rest)}
    first |= {"Solvers": by_stem(("atlas",), rest), "Extend": by_stem(("extending",), rest)}
    taken = sum(first.values(), [])
    left = {room: [p for p in rest if room_of(p) == room and p not in taken] for room in {*map(room_of, rest)}}
    order = [*ROOMS, *sorted(left.keys() - ROOMS.keys())]
    return ({k: v for k, v in first.items() if v},
            {ROOMS.get(room, room.capitalize()): left[room] for room in order if left.get(room)})


def card(path: Path) -> tuple[str, str]:
    "Title and one line of a page, as it says them itself."
    opening = text(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    return re.search(r"^# (.+)$", opening, re.M)[1], re.search(r"^> (.+)$", opening, re.M)[1]


def row(path: Path) -> str:
    title, line = card(path)
    return f"[{title}]({path.relative_to(NBS).as_posix()}) | {line}"


def learn_table() -> str:
    "The pages that stand first, by idea."
    found = pages()
    lines = [f"| {idea if i == 0 else ''} | {row(p)} |" for idea, stems in LEARN.items()
             for i, p in enumerate(by_stem(stems, found))]
    return "\n".join(["| idea | page | what it says |", "|---|---|---|", *lines])


def all_pages() -> str:
    "Every page, by group, folded."
    first, rest = sections()
    lines = [f"| {caption if i == 0 else ''} | {row(p)} |" for caption, group in (first | rest).items()
             for i, p in enumerate(group)]
    table = "\n".join(["| | page | what it says |", "|---|---|---|", *lines])
    return f"<details>\n<summary>All {len(lines)} pages</summary>\n\n{table}\n\n</details>"


GENERATED = {"<!-- learn -->": learn_table, "<!-- pages -->": all_pages}


def generated(md: str) -> str:
    "Markdown with its marks replaced by what they stand for."
    for mark, make in GENERATED.items():
        if mark in md: md = md.replace(mark, make())
    return md


def text(lines) -> str: return lines if isinstance(lines, str) else "".join(lines)


def directives(source: str) -> tuple[dict, str]:
    "The `#| name: value` lines that open a code cell, and the code below them."
    lines, found = source.split("\n"), {}
    while lines and (m := re.match(r"\s*#\|\s*([\w-]+):?\s*(.*?)\s*$", lines[0])):
        found[m[1]] = m[2]
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def output(out: dict) -> str:
    "One stored output as Markdown; pictures are left to the site."
    if out["output_type"] == "stream":
        return "" if out["name"] == "stderr" else f"```text\n{text(out['text']).rstrip()}\n```"
    data = out.get("data", {})
    if "text/markdown" in data: return text(data["text/markdown"]).strip()
    if any(kind.startswith("image/") for kind in data): return ""
    return f"```text\n{text(data.get('text/plain', '')).rstrip()}\n```"


def cell(c: dict) -> list[str]:
    "The Markdown blocks of one cell."
    if c["cell_type"] == "markdown": return [generated(text(c["source"]).strip())]
    if c["cell_type"] != "code": return []
    flags, code = directives(text(c["source"]))
    if "hide" in flags or not code: return []
    shown = [] if flags.get("echo") == "false" else [f"```python\n{code}\n```"]
    return shown + [output(o) for o in c["outputs"]]


def links(md: str) -> str:
    "Relative links of the index notebook, as seen from the root of the repository."
    return re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)\)", lambda m: f"]({os.path.normpath('nbs/' + m[1])})", md)


def readme(path: Path = INDEX) -> str:
    "The text of README.md."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    blocks = [block for c in cells for block in cell(c) if block]
    return HEADER + links("\n\n".join(blocks)) + "\n"


if __name__ == "__main__": (ROOT / "README.md").write_text(readme(), encoding="utf-8")
