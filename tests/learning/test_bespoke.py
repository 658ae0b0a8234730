"BNS learns, and goes on where it was stopped."
import pytest
import torch
from learning_cases import VP, Interrupted, data, mixture

from s4s_nb.denoise import RecordingDenoiser
from s4s_nb.grids import time_flow
from s4s_nb.learning.bespoke import BNS, bns, rebased
from s4s_nb.learning.optimise import Adam
from s4s_nb.solvers.multistep import ddim, ipndm


def learned(denoiser, folder=None): # four epochs
    return bns(denoiser, ddim(VP, time_flow(VP, 4)), *data(), Adam(.05, batch=8), 4, folder, progress=False)


def test_an_interrupted_call_can_be_repeated(tmp_path):
    "The moments of Adam are kept: the same bits, with fewer calls."
    calls = RecordingDenoiser(mixture())
    whole = learned(calls, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        learned(Interrupted(mixture(), len(calls.calls) - 6), tmp_path / "stopped")
    again = RecordingDenoiser(mixture())
    out = learned(again, tmp_path / "stopped")
    assert len(again.calls) < len(calls.calls) / 2 and out.history["valid"] == whole.history["valid"]
    assert torch.equal(torch.stack(out.history["theta"]), torch.stack(whole.history["theta"]))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_any_base_is_the_same_solver(n):
    "Forth and back again."
    solver = ipndm(VP, time_flow(VP, n))
    there = rebased(solver, [0] * n)
    back = rebased(there, range(n))
    x = data()[0].x_T.double()
    torch.testing.assert_close(there(mixture(), x), solver(mixture(), x))
    torch.testing.assert_close(back.w[:, :solver.w.shape[1]], solver.w * solver.w_free, rtol=0, atol=1e-9)
    assert len(BNS(VP, solver).theta) == n * (n + 5) // 2
