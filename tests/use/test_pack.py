"Pack files: every kind of table comes back bit for bit, what is broken is refused in our words."
import json
import random
from dataclasses import replace

import pytest
import torch
from jsonschema import Draft202012Validator

from s4s_nb.denoise import GaussianMixture, RecordingDenoiser
from s4s_nb.grids import time_edm, time_logsnr
from s4s_nb.schedule import EDMSchedule, VPSchedule
from s4s_nb.solver import Solver, exact_solution, from_json, to_json
from s4s_nb.solvers.families import SOLVERS
from s4s_nb.solvers.multistep import ddim, ipndm, unipc
from s4s_nb.solvers.singlestep import heun
from s4s_nb.use.pack import SCHEMA, Pack, about_model, check_pack_fits, pack_from_json, pack_to_json

edm = EDMSchedule()


def some_pack() -> Pack:
    rich = Solver.tabulate(edm, [80., 9., 1., .002], [[1.], [.5, .5], [.9]], c=[[.5, .5], [.4, .3, .3]], base=[0, 0, 2],
                           a=[1, 1, .99], t_eval=[80., 8., 1.1], prediction="data", start_factor=.9, end_factor=1.1,
                           name="rich", meta=dict(errors=dict(ratio=.5)))
    solvers = [rich, ipndm(edm, time_edm(edm, 5)), unipc(edm, time_logsnr(edm, 6)), heun(edm, time_edm(edm, 4))]
    entries = {(s.nfe, w): s for s in solvers for w in (None, 1., 7.5)}
    return Pack(entries, "some", dict(id="a/b", prior_std=80., answers={"null": [.1, -.2]}), dict(method="s4s"))


def test_the_schema_is_a_schema_and_packs_obey_it():
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(json.loads(pack_to_json(some_pack())))


@pytest.mark.parametrize("name", SOLVERS)
def test_every_classical_solver_comes_back_bit_for_bit(name, tmp_path):
    family = SOLVERS[name]
    steps = family.steps(6, family.orders[-1])
    solver = family.make(VPSchedule(), time_logsnr(VPSchedule(), len(steps)), family.orders[-1], steps, "bh1")
    Pack({(solver.nfe, 2.): solver}, name).save(tmp_path / "p.json")
    again = Pack.load(tmp_path / "p.json")
    assert again.solver() == solver and again.guidances == (2.,)


def test_factors_scale_the_start_and_the_end():
    gm = GaussianMixture(edm, [.5, .5], [[1.], [-1.]], [[.3], [.2]])
    x = 80 * torch.tensor([[.3], [-1.2]], dtype=torch.float64)
    plain = ddim(edm, time_edm(edm, 4))
    scaled, calls = replace(plain, start_factor=.5, end_factor=3.), RecordingDenoiser(gm)
    states = {}
    end = scaled(calls, x, lambda n, v: states.update({n: v}))
    assert torch.equal(states[0], .5 * x) and torch.equal(states[4], end) and torch.equal(calls.calls[0][1], .5 * x)
    assert torch.allclose(end, 3 * plain(gm, .5 * x), rtol=1e-12)
    assert from_json(to_json(scaled)) == scaled and '"start_factor": 0.5' in to_json(scaled)
    assert "factor" not in to_json(plain)
    for bad in (0., -1., float("inf"), float("nan")):
        with pytest.raises(ValueError, match="expected a positive number"): replace(plain, end_factor=bad)


def test_an_analytic_first_step_is_a_start_factor():
    "The guess of a first call is the mean of the data where noise is all; a factor on the start replaces the call."
    gm = GaussianMixture(edm, [1.], [[0.]], [[.5]])
    t = torch.tensor([80., 20., 2., .002], dtype=torch.float64)
    full, late = ddim(edm, t), ddim(edm, t[1:])
    first_step = 20 / 80 # of noise prediction with eps = x / sigma, the answer at infinite noise
    x = 80 * torch.tensor([[1.], [-.4]], dtype=torch.float64)
    short = replace(late, start_factor=first_step)
    assert short.nfe == full.nfe - 1 and (short(gm, x) - full(gm, x)).abs().max() < 1e-3
    assert (short(gm, x) - exact_solution(gm, x)).abs().max() < .5


def test_twenty_thousand_mutations_give_our_error_or_a_pack():
    two = dict(list(some_pack().solvers.items())[:2])
    text, rng, refused = pack_to_json(replace(some_pack(), solvers=two)), random.Random(0), 0
    tokens = ["[", "]", "{", "}", ",", ":", '"', "null", "true", "-1", "1e999", "NaN", "9" * 400, '"x"', "[" * 3000,
              "é", "\x00"]
    for _ in range(20_000):
        broken = text
        for _ in range(rng.choice((1, 1, 2, 5))):
            i = rng.randrange(len(broken or ' '))
            match rng.randrange(4):
                case 0: broken = broken[:i] + rng.choice(tokens) + broken[i + 1:]
                case 1: broken = broken[:i] + broken[i + rng.randrange(1, 40):]
                case 2: broken = broken[:i]
                case 3: broken = broken[:i] + broken[(j := rng.randrange(len(broken or ' '))):j + 30] + broken[i:]
        try: pack = pack_from_json(broken, "mutated")
        except ValueError as e:
            assert str(e).startswith(("mutated", "solver", "pack", "some")), e
            refused += 1
        else: assert pack_from_json(pack_to_json(pack)) == pack
    assert refused > 15_000


def test_large_files_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("s4s_nb.use.pack.LARGEST_PACK", 1000)
    some_pack().save(tmp_path / "p.json")
    with pytest.raises(ValueError, match="bytes: expected a pack"): Pack.load(tmp_path / "p.json")


def test_another_schedule_is_refused_and_another_model_warned_of():
    def gm(mean=1., schedule=edm): return GaussianMixture(schedule, [.5, .5], [[mean], [-1.]], [[.3], [.2]])
    pack = Pack({(4, None): ipndm(edm, time_edm(edm, 4))}, "p", about_model(gm(), id="mine"))
    check_pack_fits(pack, gm())
    with pytest.warns(UserWarning, match="answers otherwise .mine"): check_pack_fits(pack, gm(1.05))
    with pytest.raises(ValueError, match="VPSchedule"): check_pack_fits(pack, gm(schedule=VPSchedule()))
