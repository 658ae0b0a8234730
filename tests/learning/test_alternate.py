"The plans of the alternation, and what students they take."
import pytest
from learning_cases import VP, data, learned_by, mixture, parent_at

from s4s_nb.learning.alternate import BOTH, TIMES, alternation, as_student, ld3_plan
from s4s_nb.learning.coefficients import S4SConfig
from s4s_nb.learning.student import COEFFICIENTS, Learnable
from s4s_nb.solvers.multistep import unipc


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("first, parts", [("phi", [COEFFICIENTS, TIMES]), ("steps", [TIMES, COEFFICIENTS])])
def test_alternation_starts_with_ld3_and_takes_turns(first, parts, rounds):
    plan = alternation(S4SConfig(epochs=7), rounds, 3, first)
    assert plan[:2] == ld3_plan(S4SConfig(epochs=7)) and [p.epochs for p in plan] == [7, 7] + [3] * 2 * rounds
    assert [p.parts for p in plan[2:]] == parts * rounds


@pytest.mark.parametrize("options, message", [(dict(first="t"), "'phi' or 'steps'"), (dict(rounds=0), "rounds=0"),
                                              (dict(turn=0), "turn=0")])
def test_impossible_plans_are_refused(options, message):
    with pytest.raises(ValueError, match=message): alternation(S4SConfig(), **options)


def test_given_students_must_have_the_parts():
    given = Learnable(parent_at(4), VP, BOTH)
    assert as_student(given, VP, BOTH) is given
    with pytest.raises(ValueError, match="also needs phi"): as_student(Learnable(parent_at(4), VP, TIMES), VP, BOTH)
    with pytest.raises(ValueError, match="pass it to Learnable"): as_student(given, VP, BOTH, unipc)


@pytest.mark.parametrize("method", ["ld3", "alt", "joint"])
def test_the_given_student_stays_as_it_is(method):
    student = Learnable(parent_at(3), VP, BOTH)
    before = student.theta.detach().clone()
    out = learned_by(method, mixture(), student, *data(), epochs=1)
    assert student.theta.equal(before) and not out.learned.t.equal(student.parent.t)
