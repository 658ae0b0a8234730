"torchvision beside a torch it was not built for: told with the remedy, whoever tried to import it first."
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPERATOR = """import torch
import torchvision.extension
@torch.library.register_fake("torchvision::{0}")
def meta(dets, scores, iou_threshold): return dets
"""


@pytest.fixture
def unfit(tmp_path):
    "A package laid out as torchvision is, whose compiled operators were never loaded"
    def make(operator="nms", text=OPERATOR):
        package = tmp_path / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text("from .extension import _HAS_OPS\nfrom torchvision import _meta\n")
        (package / "extension.py").write_text("_HAS_OPS = False\n")
        (package / "_meta.py").write_text(text.format(operator))
        return tmp_path
    return make


def run(folder, code):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(folder), str(ROOT)]))
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


FIRST = "from s4s_nb.files.checks import import_torchvision\n"
TRIED = """try: import torchvision
except RuntimeError as e: assert "does not exist" in str(e), e
"""


@pytest.mark.parametrize("operator", ["nms", "qnms"])
@pytest.mark.parametrize("before", ["", TRIED, TRIED + "try: import torchvision\nexcept Exception: pass\n"])
def test_it_is_mended_with_a_warning_whoever_tried_first(unfit, operator, before):
    check = "assert import_torchvision() is import_torchvision()._meta.torchvision"
    done = run(unfit(operator), before + FIRST + check)
    assert done.returncode == 0, done.stderr
    for said in ("does not fit torch", f"torchvision::{operator} does not exist", "`import diffusers`", "pip install"):
        assert done.stderr.count(said) == 1, done.stderr


@pytest.mark.parametrize("text,error", [
    ("raise RuntimeError('out of memory')", "RuntimeError: out of memory"),
    ("import a_module_of_torchvision", "ModuleNotFoundError: No module named 'a_module_of_torchvision'")])
def test_other_faults_are_shown_as_they_are(unfit, text, error):
    done = run(unfit(text=text), FIRST + "import_torchvision()")
    assert done.returncode and done.stderr.strip().endswith(error) and "does not fit" not in done.stderr


def test_a_missing_torchvision_is_told_with_the_remedy(tmp_path):
    hide = """import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision": raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Without())
"""
    done = run(tmp_path, hide + FIRST + "import_torchvision()")
    assert done.stderr.strip().endswith("torchvision is missing: pip install 's4s_nb[paper]'"), done.stderr
