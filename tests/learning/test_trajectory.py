"Matching the trajectory of short and of corrected solvers."
import pytest
import torch
from learning_cases import MATCHING, OPTIMIZERS, assert_whole, data, learned_by, mixture, parent_at

from s4s_nb.judging.distance import L2
from s4s_nb.learning.student import with_corrector
from s4s_nb.learning.trajectory import match_trajectory
from s4s_nb.solvers.multistep import ipndm, unipc

# torch's own forward derivatives of attention are scripts, which it deprecates
pytestmark = [pytest.mark.filterwarnings(f"ignore::{w}") for w in ("DeprecationWarning", "FutureWarning")]

@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", MATCHING)
@pytest.mark.parametrize("nfe", [1, 2])
def test_trajectory_of_one_and_two_steps(nfe, method, optimizer):
    "Defined at one step too: there, the trajectory is its end."
    out = learned_by(method, mixture(), parent_at(nfe), *data(), optimizer, radius=0.)
    assert_whole(out, nfe)
    if nfe == 1 and method == "trajectory":
        plain = learned_by("s4s", mixture(), parent_at(nfe), *data(), optimizer, radius=0.)
        torch.testing.assert_close(out.learned.w, plain.learned.w)

@pytest.mark.parametrize("make", [unipc, lambda s, t: with_corrector(ipndm(s, t))])
@pytest.mark.parametrize("stepwise", [False, True])
def test_trajectory_of_a_corrected_solver_is_refused(stepwise, make):
    with pytest.raises(ValueError, match="has a corrector"):
        match_trajectory(mixture(), parent_at(4, make), *data(), L2(), stepwise=stepwise, progress=False)
