"AMED-Plugin: its file belongs to one solver, and batches are cut without changing what is learned."
import pytest
import torch
from learning_cases import VP, mixture

from s4s_nb.grids import time_logsnr
from s4s_nb.learning import amed_plugin as module
from s4s_nb.learning.amed_plugin import AMED, AMEDConfig, StepPredictor, amed, load_amed
from s4s_nb.solvers.multistep import ipndm


def learned(seed=0):
    denoiser = mixture()
    denoiser.shape = (3,)
    return amed(denoiser, time_logsnr(VP, 2), ipndm(VP, time_logsnr(VP, 6)), lambda x, t: x, 3,
                AMEDConfig(images=48, batch=12, seed=seed), progress=False)


def test_another_solvers_file_is_refused(tmp_path):
    student, path = learned(), tmp_path / "amed.safetensors"
    student.save(path)
    same = load_amed(path, AMED(VP, student.t, StepPredictor(3), student.features))
    x = torch.randn(5, 3)
    assert torch.equal(same(mixture(), x), student(mixture(), x))
    for other in (AMED(VP, student.t, StepPredictor(3), order=2), AMED(VP, time_logsnr(VP, 3), StepPredictor(3)),
                  AMED(VP, student.t, StepPredictor(3), afs=True)):
        with pytest.warns(UserWarning, match="recipe"), pytest.raises(ValueError, match=r"expected one by AMED\.save"):
            load_amed(path, other)


def test_batches_in_parts(monkeypatch):
    "Five samples at once instead of all: the same gradients, to rounding."
    whole = learned()
    monkeypatch.setattr(module, "batch_size", lambda shape: 5)
    for a, b in zip(whole.predictor.parameters(), learned().predictor.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
