"Teacher pairs survive NaN and damaged files."
import math
import warnings

import pytest
import torch
from learning_cases import Broken, damages, files, is_one_of, mixture, pairs_of

from s4s_nb.denoise import RecordingDenoiser

# torch's own forward derivatives of attention are scripts, which it deprecates
pytestmark = [pytest.mark.filterwarnings(f"ignore::{w}") for w in ("DeprecationWarning", "FutureWarning")]

@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_the_teacher_is_an_error_that_keeps_what_was_made(value, tmp_path):
    "The seeds are named; chunks before the bad one are on disk and used when the network is well again."
    good = pairs_of(mixture(), 12, 1)
    broken = Broken(mixture(), is_one_of(good.x_T[[9]]), value)
    with pytest.raises(ValueError, match=r"NaN or infinity for 1 of 4 seeds, first \[10\]"):
        pairs_of(broken, 12, 1, chunk=4, cache=tmp_path)
    kept = [p.name for p in files(tmp_path)]
    assert kept == ["1_4.safetensors", "5_4.safetensors"]
    well = RecordingDenoiser(mixture())
    assert torch.equal(pairs_of(well, 12, 1, chunk=4, cache=tmp_path).x_0, good.x_0)
    assert len(well.calls) == 20 # the third chunk only

def test_damaged_pairs_are_made_again(tmp_path):
    "Said in a warning; the same pairs, and nothing else left in the folder."
    def get(): return pairs_of(mixture(), 4, 1, steps=5, chunk=2, cache=tmp_path)
    good = get()
    first, second = names = files(tmp_path)
    whole = (tmp_path / second).read_bytes()
    for damaged in damages(whole):
        (tmp_path / second).write_bytes(damaged)
        with pytest.warns(UserWarning, match=f"{second.name}: this file is .* will be made again"): again = get()
        assert torch.equal(again.x_0, good.x_0) and torch.equal(again.x_T, good.x_T)
        assert files(tmp_path) == names
        with warnings.catch_warnings(action="error"): get()
    (tmp_path / second).write_bytes((tmp_path / first).read_bytes())
    with pytest.warns(UserWarning, match="another recipe"): assert torch.equal(get().x_0, good.x_0)
