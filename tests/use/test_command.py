"The command `s4s`, as a shell runs it."
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from s4s_nb.use.cli import app
from s4s_nb.use.pack import Pack

LEARN = "learn digits --nfe 3 --method s4s --epochs 1 --n-train 4 --n-valid 4 --n-test 4".split()


def run(*args: str): return CliRunner().invoke(app, list(map(str, args)))


def test_help_loads_nothing_large():
    code = ("import sys; from s4s_nb.use.cli import app; sys.argv = ['s4s', '--help']\ntry: app()\nexcept SystemExit: "
            "print(sorted({'torch', 'numpy', 'diffusers', 'scipy'} & {*sys.modules}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packs") / "digits.json"
    done = run(*LEARN, "-o", path)
    assert done.exit_code == 0, done.output
    return path


def test_learn_show_eval_sample(pack, tmp_path):
    assert Pack.load(pack).nfes == (3,)
    shown = run("show", pack, "--nfe", 3, "-o", tmp_path / "show.png").stdout
    assert "w[0]" in shown and "RMSE to the teacher" in shown and (tmp_path / "show.png").stat().st_size > 1000
    table = json.loads(run("show", pack, "--json").stdout)
    assert table[0]["nfe" if "nfe" in table[0] else "t"]
    found = json.loads(run("eval", pack, pack, "--model", "digits", "--n", 6, "--json").stdout)
    assert found[str(pack)]["rmse"] > 0
    done = run("sample", pack, "--model", "digits", "--n", 5, "-o", tmp_path / "s.png", "--json")
    assert json.loads(done.stdout) == dict(picture=str(tmp_path / "s.png"), n=5, nfe=3, guidance=None)


def test_dry_run_learns_nothing(tmp_path):
    done = run(*LEARN, "--dry-run", "--json", "-o", tmp_path / "p.json")
    assert json.loads(done.stdout)["calls"] > 100 and not list(tmp_path.iterdir())


def test_doctor_names_versions():
    said = json.loads(run("doctor", "--json").stdout)
    assert said["s4s_nb"] and said["torch"] and said["trouble"]


@pytest.mark.parametrize(("args", "code", "why"), [
    (["show", "nowhere.json"], 1, "nowhere.json"), (["learn", "digits", "--nfe", "x"], 1, "nfe='x'"),
    (["sample", "PACK", "--model", "digits", "--nfe", "4"], 1, "expected nfe=3"),
    (["eval", "PACK", "--model", "no-such-model"], 1, "no card of that name"),
    (["learn", "digits", "--nfee", "4"], 2, "No such option"), (["show"], 2, "Missing argument")])
def test_errors_are_one_line_and_a_code(pack, args, code, why):
    done = run(*(pack if a == "PACK" else a for a in args))
    assert done.exit_code == code and why in done.output
    if code == 1: assert len(done.stderr.strip().splitlines()[-1:]) == 1 and "Traceback" not in done.output
