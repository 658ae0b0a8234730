"The ball of the relaxed objective."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4s_nb.learning.relax import project_ball, relax_radius


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_projection_is_the_nearest_point(seed, radius):
    "No point of the ball is nearer; projecting again changes nothing."
    draw = torch.Generator().manual_seed(seed)
    x, center, other = torch.randn(3, 4, 3, 2, dtype=torch.float64, generator=draw) * 10
    p = project_ball(x, center, radius)
    rival = project_ball(other, center, radius)
    distance = lambda a: (a - x).flatten(1).norm(dim=1)
    assert ((p - center).flatten(1).norm(dim=1) <= radius + 1e-12).all()
    assert (distance(p) <= distance(rival) + 1e-12).all()
    torch.testing.assert_close(project_ball(p, center, radius), p)


@pytest.mark.parametrize("m", [1, 9, 40])
def test_radius_is_a_power_law(m):
    assert relax_radius(4 * m, 64) == pytest.approx(relax_radius(m, 64) / 32)
    assert relax_radius(m, 640) == pytest.approx(10 * relax_radius(m, 64))
