"Students of any order and with constraints, learned."
import pytest
import torch
from learning_cases import OPTIMIZERS, VP, assert_whole, data, learned_by, mixture, over_optimizers, parent_at

from s4s_nb.judging.distance import L2
from s4s_nb.learning.alternate import BOTH, TIMES, s4s_alt
from s4s_nb.learning.coefficients import S4SConfig
from s4s_nb.learning.student import Learnable
from s4s_nb.solvers.multistep import ddim, ipndm, unipc

# torch's own forward derivatives of attention are scripts, which it deprecates
pytestmark = [pytest.mark.filterwarnings(f"ignore::{w}") for w in ("DeprecationWarning", "FutureWarning")]

@pytest.mark.parametrize("make", [ipndm, unipc])
def test_order_above_the_number_of_calls(make):
    "Order 6 at four calls: every row reaches back to the first output, the parent's weights first."
    train, valid = data()
    student = Learnable(parent_at(4, make), order=6)
    start = student()
    assert start.w.shape == (4, 4) and start.w_free.sum(1).tolist() == [1, 2, 3, 4]
    a, b = start(mixture(), train.x_T), parent_at(4, make)(mixture(), train.x_T)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    out = learned_by("s4s", mixture(), student, train, valid, epochs=10, radius=0.)
    narrow = learned_by("s4s", mixture(), parent_at(4, make), train, valid, epochs=10, radius=0.)
    assert_whole(out, 4)
    assert student.parent.n_free > narrow.parent.n_free and out.learned.w[3, 3] != 0
    assert out.history["train"][-1] < 1.01 * narrow.history["train"][-1] # it can do what the narrow one can

@over_optimizers
@pytest.mark.parametrize("student", [
    lambda: Learnable(parent_at(4, ddim), consistent=True), # a row of one weight whose sum is fixed
    lambda: Learnable(parent_at(4), VP, TIMES), # no coefficients, and S4S learns only those
], ids=["fixed", "times"])
def test_nothing_to_learn_is_an_error(student, optimizer):
    with pytest.raises(ValueError, match="nothing to learn|no parameters"):
        learned_by("s4s", mixture(), student(), *data(), optimizer)

@over_optimizers
@pytest.mark.parametrize("first", ["phi", "steps"])
def test_constraints_last(first, optimizer):
    "Shared and consistent rows, learned in either order: sums stay 1, equal rows stay equal, and yet it gains."
    student = Learnable(parent_at(6), VP, BOTH, shared=True, consistent=True)
    cfg = S4SConfig(epochs=2, optimizer=OPTIMIZERS[optimizer])
    out = s4s_alt(mixture(), student, *data(), L2(), cfg, rounds=1, turn=2, first=first, progress=False)
    w = student.at(out.history["theta"][-1]).w
    torch.testing.assert_close(w.sum(1), student.parent.w.sum(1), rtol=0, atol=1e-12)
    assert not torch.equal(w, student.parent.w) and not out.fallback
    for n in (3, 4, 5): torch.testing.assert_close(w[n], w[2], rtol=0, atol=0) # iPNDM-3: all rows from the third on
    which = [p % 2 for p in out.history["phase"]]
    moved = torch.stack(out.history["theta"]).diff(dim=0)[:, student.index(("phi",))].abs().sum(1) > 0
    later = [(w, bool(m)) for w, m, p in zip(which, moved, out.history["phase"]) if p >= 2]
    assert {m for w, m in later if w == (first == "phi")} == {False} # phases of times leave coefficients alone
