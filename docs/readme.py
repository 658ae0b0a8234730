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
    if c["cell_type"] == "markdown": return [text(c["source"]).strip()]
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
