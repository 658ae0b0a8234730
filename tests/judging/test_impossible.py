"What no features can have has no Fréchet distance; small sets have one with a warning."
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import s4s_nb
from s4s_nb.judging import fid as m
from s4s_nb.judging.moments import Moments, check_covariance, frechet_distance

LEGACY = "legacy_tensorflow"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(cov, mean=None):
    return m.Statistics(torch.zeros(len(cov)).double() if mean is None else mean, cov, LEGACY)


GOOD = draw(40, 8).T.cov()


def entry(i, j, value, symmetric=True):
    out = GOOD.clone()
    out[i, j] = value
    if symmetric: out[j, i] = value
    return out


IMPOSSIBLE = dict(
    correlation_above_one=entry(0, 1, 50.),
    correlation_just_above_one=entry(2, 3, 1.01 * (GOOD[2, 2] * GOOD[3, 3]).sqrt().item()),
    negative_variance=entry(4, 4, -1e-3),
    negated=-GOOD,
    shifted=GOOD - 1.1 * torch.linalg.eigvalsh(GOOD)[0] * torch.eye(8).double(),
    difference=draw(40, 8, seed=1).T.cov() - GOOD,
    product=GOOD @ draw(40, 8, seed=1).T.cov(),
    triangle=GOOD.triu(),
    one_entry=entry(1, 6, GOOD[1, 6].item() + .01, symmetric=False),
    nan=entry(3, 3, float("nan")),
    nan_off_the_diagonal=entry(0, 7, float("nan")),
    infinite=entry(5, 5, float("inf")),
    scaled_to_nothing=-1e-30 * GOOD,
    root_of_another=torch.linalg.cholesky(GOOD))


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_covariance_is_refused_on_either_side(name):
    bad, good = statistics(IMPOSSIBLE[name]), statistics(GOOD)
    for sides in ((bad, good), (good, bad), (bad, bad)):
        for distance in (m.fid, frechet_distance_of, m.published_fid):
            with pytest.raises(ValueError, match="negative eigenvalue|not symmetric|NaN or infinity"): distance(*sides)


def frechet_distance_of(a, b):
    def moments(s):
        out = Moments(torch.zeros(2, 8))
        out.n, out.mean, out.scatter = 100, s.mean, s.cov * 99
        return out
    return frechet_distance(moments(a), moments(b))


@pytest.mark.parametrize("mean", [[float("nan")] * 8, [float("inf")] + [0.] * 7])
def test_an_impossible_mean_is_refused(mean):
    with pytest.raises(ValueError, match="NaN or infinity"): m.fid(
        statistics(GOOD, torch.tensor(mean).double()), statistics(GOOD))
    with pytest.raises(ValueError, match="expected \\(D,\\) and \\(D, D\\)"): check_covariance(torch.zeros(7), GOOD)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(2, 30), st.integers(0, 10**6), st.floats(-6, 6), st.sampled_from(["32", "64"]))
def test_no_covariance_of_features_is_refused(d, n, seed, scale, bits):
    "Singular or not, large or small, computed or stored in single precision"
    cov = Moments(draw(n, d, seed=seed) * 10**scale + draw(d, seed=seed + 1)).cov
    if bits == "32": cov = cov.float().double()
    check_covariance(torch.zeros(d), cov)
    check_covariance(torch.zeros(d), (cov + cov.T) / 2)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 10), st.integers(0, 10**6), st.floats(1e-4, 10))
def test_any_direction_of_negative_variance_is_refused(d, seed, share):
    q, values = torch.linalg.qr(draw(d, d, seed=seed))[0], draw(d, seed=seed + 1).abs()
    values[seed % d] = -share * values.max()
    with pytest.raises(ValueError, match="negative eigenvalue"):
        bad = q * values @ q.T
        check_covariance(torch.zeros(d), (bad + bad.T) / 2)


# small sets

@pytest.mark.parametrize("n,d", [(2, 8), (8, 8), (5, 64), (100, 128), (3, 3)])
def test_fewer_images_than_features_are_warned_about_with_n_and_the_rank(n, d):
    few, many = Moments(draw(n, d)), Moments(draw(3 * d, d, seed=1))
    for sides in ((few, many), (many, few)):
        with pytest.warns(UserWarning, match=rf"n = {n} images for {d} features: .* rank {n - 1} of {d}"):
            frechet_distance(*sides)
    s = m.Statistics(few.mean, few.cov, LEGACY)   # n is not recorded
    with pytest.warns(UserWarning, match=f"not recorded for {d} features: .* rank {n - 1} of {d}"):
        m.fid(s, m.Statistics(many.mean, many.cov, LEGACY, many.n))


@pytest.mark.parametrize("n,d", [(9, 8), (65, 64), (500, 16)])
def test_enough_images_are_not(n, d):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(Moments(draw(n, d)), Moments(draw(n, d, seed=1)))
        dead = draw(n, d) * (torch.arange(d) > 0)   # a feature that never varies is the network's, not the set's
        frechet_distance(Moments(dead), Moments(dead))


def test_one_image_many_times_is_warned_about():
    same = Moments(draw(1, 8).expand(100, -1))
    with pytest.warns(UserWarning, match="one image, many times"): frechet_distance(same, Moments(draw(100, 8)))


# three programs

@pytest.mark.parametrize("d,n,seed", [(4, 50, 0), (16, 100, 1), (48, 1000, 2), (128, 300, 3), (64, 66, 4)])
def test_three_programs_agree(d, n, seed):
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
    f, g = draw(n, d, seed=seed) @ draw(d, d, seed=9) + .1, draw(n, d, seed=seed + 1) @ draw(d, d, seed=8)
    a, b = (m.Statistics(v.mean(0), v.T.cov(), LEGACY, n) for v in (f, g))
    found = m.published_fid(a, b)
    other = fid_statistics_to_metric(*(dict(mu=s.mean.numpy(), sigma=s.cov.numpy()) for s in (a, b)), verbose=False)
    assert abs(found["fid"] - m.fid(a, b)) < 1e-7 * found["fid"] and found["check"] == m.fid(a, b)
    assert abs(found["fid"] - other[KEY_METRIC_FID]) < 1e-7 * found["fid"]


def test_a_published_number_names_the_program_and_its_version():
    from importlib.metadata import version
    found = m.published_fid(*(m.Statistics(draw(8, seed=s), GOOD, LEGACY, n) for s, n in ((0, 500), (1, 400))))
    assert found["program"] == f"clean-fid {version('clean-fid')}" and found["n"] == [500, 400]
    assert found["mode"] == LEGACY


def test_clean_fid_that_cannot_or_does_not_agree_is_told(monkeypatch):
    a, b = (m.Statistics(draw(8, seed=s), GOOD, LEGACY, 500) for s in (0, 1))
    def saying(do): monkeypatch.setattr(m, "clean_fid", lambda: (do, "clean-fid 0"))
    saying(lambda *v: 1.)
    with pytest.warns(UserWarning, match="clean-fid 0 says 1, eigenvalues .* do not publish it"): m.published_fid(a, b)
    saying(lambda *v: float("nan"))
    with pytest.warns(UserWarning, match="do not publish it"): m.published_fid(a, b)
    def imaginary(*v): raise ValueError("Imaginary component 3")
    saying(imaginary)
    with pytest.raises(ValueError, match="cannot compute this .*enough images"): m.published_fid(a, b)
    def newer(*v): raise TypeError("sqrtm() got an unexpected keyword argument 'disp'")
    saying(newer)
    with pytest.raises(ImportError, match=r"does not fit scipy .*pip install 's4s_nb\[paper\]'"): m.published_fid(a, b)


def test_published_fid_without_clean_fid_says_what_to_install(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "cleanfid.fid", None)
    s = m.Statistics(draw(8), GOOD, LEGACY, 500)
    with pytest.raises(ImportError, match=r"pip install 's4s_nb\[paper\]'"): m.published_fid(s, s)
    assert m.fid(s, s) < 1e-6   # ours needs no other package


def test_squared_errors_are_offered_beside_what_needs_them():
    x, y = draw(3, 2), draw(3, 2, seed=1)
    assert s4s_nb.paired_rmse(s4s_nb.squared_errors(x, y)) == pytest.approx((x - y).square().mean().sqrt().item())
