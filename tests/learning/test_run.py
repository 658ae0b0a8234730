"What a run remembers and reports."
import math
import warnings

import pytest
import torch
from learning_cases import VP, Interrupted, data, files, learned_by, mixture, over_methods, parent_at

from s4s_nb.denoise import RecordingDenoiser
from s4s_nb.judging.distance import L2
from s4s_nb.learning.alternate import BOTH
from s4s_nb.learning.coefficients import S4SConfig
from s4s_nb.learning.run import conclude, new_run
from s4s_nb.learning.student import Learnable

# torch's own forward derivatives of attention are scripts, which it deprecates
pytestmark = [pytest.mark.filterwarnings(f"ignore::{w}") for w in ("DeprecationWarning", "FutureWarning")]

def test_report_leaves_out_nan():
    "One epoch was NaN on validation, the next was not: the one that counts is chosen, and shown."
    run = new_run(mixture(), Learnable(parent_at(4)), data()[0], L2(), S4SConfig())
    run.history |= dict(valid=[.3, math.nan, .2], theta=[run.theta] * 3)
    out = conclude(run, "S4S")
    assert out.epoch == 2 and "0.3 -> 0.2" in repr(out) and not out.fallback

@over_methods
def test_damaged_checkpoint_is_made_again(method, tmp_path):
    "A run whose checkpoint is damaged starts afresh, with the same end."
    def run(): return learned_by(method, mixture(), parent_at(3), *data(), epochs=2, checkpoint=tmp_path)
    good = run()
    name, = files(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for damaged in (whole[:-1], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]):
        (tmp_path / name).write_bytes(damaged)
        with pytest.warns(UserWarning, match="will be made again"): again = run()
        assert again.history["valid"] == good.history["valid"] and again.solver == good.solver
        assert files(tmp_path) == [name]
    with warnings.catch_warnings(action="error"): assert run().history["valid"] == good.history["valid"]


@over_methods
def test_an_interrupted_call_can_be_repeated(method, tmp_path):
    "Stopped by hand, in a notebook say, and called again with the same objects: goes on, and ends the same."
    def run(denoiser, student, folder):
        return learned_by(method, denoiser, student, *data(), epochs=2, checkpoint=folder)
    make = lambda: Learnable(parent_at(3), VP, BOTH)
    calls = RecordingDenoiser(mixture())
    whole, student = run(calls, make(), tmp_path / "whole"), make()
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(mixture(), len(calls.calls) * 3 // 4), student, tmp_path / "stopped")
    again = RecordingDenoiser(mixture())
    out = run(again, student, tmp_path / "stopped")
    assert len(again.calls) < len(calls.calls) * 3 // 4
    assert torch.equal(torch.stack(out.history["theta"]), torch.stack(whole.history["theta"]))
    assert out.history["valid"] == whole.history["valid"] and out.solver == whole.solver
