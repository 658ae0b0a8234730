"Runs notebooks in place and stores their outputs: `python docs/execute.py [00_multistep ...]`, default the library."
import sys

import nbformat
from nbclient import NotebookClient
from readme import ROOT, directives, pages

SKIP = "skip-execution"


def is_library(nb) -> bool:
    "Executed notebooks are those that export a module, and the index; papermill runs the others."
    return not any("parameters" in c.metadata.get("tags", []) or "skip_exec: true" in c.source for c in nb.cells)


def execute(path):
    "Run one notebook as `nbdev_test` would, and write it back when it ends well."
    nb = nbformat.read(path, 4)
    off = [c for c in nb.cells if c.cell_type == "code" and directives(c.source)[0].get("eval") == "false"]
    for c in off: c.metadata["tags"] = [*c.metadata.get("tags", []), SKIP]
    NotebookClient(nb, timeout=None, record_timing=False, resources={"metadata": {"path": str(path.parent)}}).execute()
    for c in off: c.metadata["tags"].remove(SKIP)
    nbformat.write(nb, path)


def main(names: list[str]):
    known = {p.stem: p for p in pages()}
    if odd := set(names) - set(known): sys.exit(f"no notebook is called {', '.join(sorted(odd))}: {', '.join(known)}")
    for path in [known[n] for n in names] or known.values():
        if names or is_library(nbformat.read(path, 4)):
            print("running", path.relative_to(ROOT), flush=True)
            execute(path)


if __name__ == "__main__": main(sys.argv[1:])
