"""Checkpoints and network files: what is in them comes out exactly, and nothing else happens, whatever is in them.

The sample checkpoints lie in `tests/golden/compvis`, or in the folder of that name below the one GOLDEN_DIR names.
"""
import json
import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from edm_pickle import edm_pickle, write_edm_pickle
from hostile_pickles import FOUR, attacks, bombs, edm, legacy, nested, storage, table, tensor, zipped
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from s4s_nb.files.checkpoint import edm_state, read_checkpoint, read_edm_pickle, to_safetensors
from s4s_nb.files.unpickle import Inert, RefusedFile
from s4s_nb.models.networks import EDMPrecond, SongUNet, VPPrecond

TESTS = Path(__file__).parents[1]
SAMPLES = Path(os.environ.get("GOLDEN_DIR") or TESTS / "golden") / "compvis"
SMALL = dict(img_resolution=8, img_channels=3, model_channels=8, channel_mult=[1, 2], num_blocks=1,
             attn_resolutions=[4])
NCSN = dict(embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", resample_filter=[1, 3, 3, 1])


def read_network(path): return edm_state(read_edm_pickle(path)["ema"])

def refused(path, data: bytes, read=None) -> str:
    "What the refusal of these bytes says"
    path.write_bytes(data)
    read = read or (read_network if data[:2] == b"\x80\4" else read_checkpoint)
    with pytest.raises(RefusedFile) as e: read(path)
    return str(e.value)

def refused_network(network) -> str:
    with pytest.raises(RefusedFile) as e: edm_state(network)
    return str(e.value)

def same(found: dict, expected: dict) -> bool:
    "The same names, types, shapes and bits"
    return found.keys() == expected.keys() and all(
        torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in expected.items())

@pytest.fixture
def file(tmp_path): return tmp_path / "file"

@pytest.fixture
def quiet(monkeypatch, tmp_path):
    "Fails if something is run, or written into the working directory"
    def ran(*args, **kwargs): raise SystemExit("something was run")
    for module, name in (os, "system"), (subprocess, "Popen"), (torch, "load"): monkeypatch.setattr(module, name, ran)
    monkeypatch.chdir(tmp_path)
    yield
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# Lightning checkpoints

@pytest.mark.parametrize("name", ["sample_envelope", "sample_envelope_nonzip"])
def test_sample_checkpoints_give_their_tensors(name):
    "Both containers of a Lightning checkpoint that names foreign classes and a GPU"
    found = read_checkpoint(SAMPLES / f"{name}.ckpt")
    assert same(found["state_dict"], load_file(SAMPLES / "sample_envelope_expected.safetensors"))
    assert (found["epoch"], found["global_step"]) == (12, 470000)

def test_foreign_classes_are_names_and_records():
    found = read_checkpoint(SAMPLES / "sample_envelope.ckpt")
    (callback, state), = found["callbacks"].items()
    assert callback == "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    assert isinstance(state["best_model_score"], torch.Tensor)
    rate, = found["lr_schedulers"][0]["_last_lr"]
    assert isinstance(rate, Inert) and rate.name == "numpy.core.multiarray.scalar"

@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_everything_that_torch_saves_comes_back(file, new, protocol):
    kinds = "float32 float64 float16 bfloat16 bool uint8 int8 int16 int32 int64".split()
    tensors = {k: (torch.randn(3, 4) * 3).to(getattr(torch, k)) for k in kinds}
    w = torch.randn(4, 6)
    tensors |= dict(part=w[1:3, ::2], turned=w.T, scalar=torch.tensor(3.), empty=torch.empty(0, 5), tied=w, again=w,
                    weight=nn.Parameter(w[0]))
    torch.save(tensors, file, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    found = read_checkpoint(file)
    assert same(found, tensors) and all(found[k].stride() == v.stride() for k, v in tensors.items())
    assert found["tied"].data_ptr() == found["again"].data_ptr() == found["turned"].data_ptr()

def test_damaged_bits_are_noticed_where_something_refers_to_them(file):
    torch.save(dict(w=torch.ones(5)), file)
    with zipfile.ZipFile(file, "a") as z: z.writestr("file/data/7", bytes(1000))
    assert read_checkpoint(file)["w"].sum() == 5
    assert "CRC" in refused(file, file.read_bytes().replace(b"\x80\x3f", b"\x80\x3e", 1))

@pytest.mark.parametrize("data, found", [
    (legacy(table(storage(0, 4)), FOUR[:8], numel=4), "cut off within a tensor"),
    (legacy(table(storage(0, 4)), FOUR, numel=3), "another size"),
    (legacy(table(storage(0, 4)), FOUR, keys=["5"]), "list of storages"),
    (legacy(table(storage(0, 4)), keys=[[]]), "of type list"),
    (legacy(table(storage(0, 4) + storage(0, 3) + b"\x86"), FOUR), "two types or sizes"),
    (legacy(table(b"N"), endian=False), "little-endian"),
    (zipped(table(storage(0, 4) + storage(0, 3) + b"\x86"), FOUR), "two sizes"),
    (zipped(table(storage(1, 4)), FOUR), "no item named"),
    (zipped(table(storage(0, 3)), FOUR), "another size"),
    (zipped(table(tensor(0, (2, 2), (1,))), FOUR), "does not fit"),
    (zipped(table(b"X\1\0\0\0\xff")), "utf-8"),
    (zipped(table(b"h\5")), "damaged"),
    (zipped(b"\x80\2]."), "holds a list"),
    (zipped(b"\x80\2"), "exhausted")], ids=lambda v: v if isinstance(v, str) else "")
def test_contradictions_are_refused(file, data, found): assert found in refused(file, data)

def test_big_endian_numbers_are_refused(file):
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("a/data.pkl", table(storage(0, 4))), z.writestr("a/data/0", FOUR), z.writestr("a/byteorder", "big")
    assert "big-endian" in refused(file, file.read_bytes())

@pytest.mark.parametrize("names", ["b/data.pkl a/data.pkl", "data.pkl", "a/b/data.pkl", "../data", "a/data.pkl " * 2])
def test_archives_of_another_layout_are_refused(file, names):
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as z:
        warnings.simplefilter("ignore") # a name that occurs twice
        for name in names.split(): z.writestr(name, table(b"N"))
    assert "expected different names, one of them <folder>/data.pkl" in (said := refused(file, file.read_bytes()))
    assert "unpack it first" in said

@pytest.mark.parametrize("name", ["sample_envelope", "sample_envelope_nonzip"])
def test_no_prefix_is_taken_for_the_whole(file, name):
    data = (SAMPLES / f"{name}.ckpt").read_bytes()
    for n in (*range(0, 100, 9), *range(100, len(data), 2999), len(data) - 1): refused(file, data[:n], read_checkpoint)


# EDM networks

@pytest.mark.parametrize("wrapper, options", [
    (EDMPrecond, {}), (VPPrecond, NCSN), (EDMPrecond, dict(label_dim=10, augment_dim=9))])
def test_networks_come_back_exactly(file, wrapper, options):
    "The official nesting, a strict load, the same outputs"
    net = wrapper(SongUNet(**SMALL, **options)).eval().requires_grad_(False)
    write_edm_pickle(file, net, wrapper.__name__, SMALL | options)
    name, kwargs, state = read_network(file)
    assert (name, kwargs) == (wrapper.__name__, SMALL | options)
    again = wrapper(SongUNet(**kwargs)).eval()
    again.load_state_dict(state)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([.1, 9.])
    assert torch.equal(again(x, sigma), net(x, sigma))

def test_the_rest_of_an_edm_file_is_plain(file):
    write_edm_pickle(file, nn.Linear(2, 3), "Linear", {})
    found = read_edm_pickle(file)
    assert found["loss_fn"].name == "EDMLoss" and found["loss_fn"].state["sigma_data"] == .5
    assert found["dataset_kwargs"] == dict(path="images.zip", resolution=32, options=dict(cache=True))
    assert "'EDMLoss' is no network" in refused_network(found["loss_fn"])

def test_buffers_that_are_not_saved_stay_out(file):
    net = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict(dict(a=nn.ReLU())))
    net.register_buffer("kept", torch.ones(2)), net.register_buffer("absent", None)
    net.register_buffer("left", torch.ones(2), persistent=False)
    write_edm_pickle(file, net, "Net", {})
    assert list(read_network(file)[2]) == list(net.state_dict()) == ["kept", "0.weight", "0.bias"]

def test_other_libraries_are_refused_by_name(file):
    assert "it names 'pytorch_lightning.Trainer'" in refused(file, edm(b"cpytorch_lightning\nTrainer\n"))

@pytest.mark.parametrize("change, found", [
    (dict(_init_args=(3,)), "by name"),
    (dict(_init_kwargs={"a": {}}), "by name"),
    (dict(_init_kwargs={"a": [[]]}), "by name"),
    (dict(_init_kwargs=3), "damaged"),
    (dict(_parameters={"w": 1.}), "another type"),
    (dict(_parameters={3: torch.ones(1)}), "strange name"),
    (dict(_buffers={"w" * 2000: torch.ones(1)}), "strange name"),
    (dict(_modules={"a": 3}), "another type"),
    (dict(_modules={"a": Inert("Part")}), "damaged"),
    (dict(_modules={"a" * 2000: Inert("Part")}), "strange name"),
    (dict(_buffers=None), "damaged")], ids=str)
def test_networks_of_another_shape_are_refused(change, found):
    state = dict(_parameters={}, _buffers={}, _modules={}) | change
    said = refused_network(Inert("Net", state=state))
    assert found in said and said.startswith("'Net': refused")

def test_things_that_are_no_network():
    for thing in None, 3, "EDMPrecond", {}, Inert("Net"): assert "no network" in refused_network(thing)

PERSISTENT, LOAD = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n", b"ctorch.storage\n_load_from_bytes\n"

@pytest.mark.parametrize("data, found", [
    (b"\x80\4].", "holds a list"),
    (edm(PERSISTENT + b"}\x85R"), "no class name"),
    (edm(PERSISTENT + b"N\x85R"), "no class name"),
    (edm(storage(0, 4)), "outside of it"),
    (edm(LOAD + b"]\x85R"), "damaged"),
    (edm(nested(b"\x80\2K\1.")), "plain pickle"),
    (edm(nested(legacy(b"\x80\2]."))), "holds a list")], ids=lambda v: v if isinstance(v, str) else "")
def test_edm_files_of_another_shape_are_refused(file, data, found):
    assert found in refused(file, data, read_edm_pickle)


# Hostile and mistaken files

@pytest.mark.parametrize("name", attacks())
def test_nothing_is_run(file, quiet, name):
    data, found = attacks()[name]
    assert found in (said := refused(file, data)) and said.startswith(str(file)), said

@pytest.mark.parametrize("name", bombs())
def test_bombs_are_refused(file, quiet, name):
    data, found = bombs()[name]
    assert re.search(found, said := refused(file, data)) and len(said) < 1000, said

READERS = read_checkpoint, read_edm_pickle, lambda p: to_safetensors(p, "out")

@pytest.mark.parametrize("read", READERS, ids=["checkpoint", "edm", "convert"])
@pytest.mark.parametrize("data, found", [
    (b"", "empty"), (b"<!DOCTYPE html><html>", "web page"), (b"version https://git-lfs.github.com", "Git LFS pointer"),
    (save(dict(w=torch.ones(2))), "safetensors"), (b"\x1f\x8b\x08", "gzip"), (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\x80", "damaged|pickle"), (b"PK\3\4", "damaged|torch.save"), (b"\x80\4\xff", "damaged|pickle")])
def test_mistaken_files_are_explained(file, quiet, data, found, read):
    assert re.search(found, said := refused(file, data, read)) and said.startswith(f"{file}: refused: ")

def test_readers_name_each_other(file):
    assert "read_edm_pickle" in refused(file, edm_pickle(nn.Linear(1, 1), "Linear", {}), read_checkpoint)
    assert "read_checkpoint" in refused(file, zipped(table(storage(0, 4)), FOUR), read_edm_pickle)

def test_a_folder_and_an_absent_file(tmp_path):
    for read in READERS:
        with pytest.raises(RefusedFile, match="is a folder"): read(tmp_path)
        with pytest.raises(FileNotFoundError): read(tmp_path / "absent.ckpt")

def test_twenty_thousand_mutations(notes):
    "And the bombs: only success or a refusal, in little memory, without side effects; see `fuzz_unpickle.py`."
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(TESTS), *sys.path]))
    command = [sys.executable, TESTS / "fuzz_unpickle.py", "20000"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    notes.append(f"20,000 mutated checkpoints: {done.stdout.strip()}")


# Conversion

def test_conversion_keeps_every_bit_and_says_what_it_was(tmp_path, file):
    net, out = EDMPrecond(SongUNet(**SMALL)), tmp_path / "new/x.safetensors"
    write_edm_pickle(file, net, "EDMPrecond", SMALL)
    about = to_safetensors(file, out)
    assert about == dict(kind="EDM network", class_name="EDMPrecond", init_kwargs=json.dumps(SMALL))
    assert same(load_file(out), net.state_dict())
    for name in "sample_envelope", "sample_envelope_nonzip":
        assert to_safetensors(SAMPLES / f"{name}.ckpt", out) == dict(kind="checkpoint")
        assert same(load_file(out), load_file(SAMPLES / "sample_envelope_expected.safetensors"))
    with safe_open(out, "pt") as f: assert f.metadata() == dict(kind="checkpoint")

@pytest.mark.parametrize("level", [lambda t: t, lambda t: dict(state_dict=t, epoch=1)], ids=["bare", "state_dict"])
def test_tied_tensors_are_written_for_each_name(tmp_path, file, level):
    w = torch.randn(6, 4)
    tensors = dict(a=w, b=w, turned=w.T, part=w[2:, 1], empty=torch.empty(0))
    torch.save(level(tensors), file)
    to_safetensors(file, tmp_path / "x.safetensors")
    assert same(load_file(tmp_path / "x.safetensors"), tensors)

def test_a_failed_conversion_leaves_the_old_file(tmp_path, file, monkeypatch):
    out, w = tmp_path / "x.safetensors", torch.randn(1000)
    out.write_bytes(b"old")
    for contents, found in [(dict(epoch=3, note="x"), "it holds 'epoch', 'note'"),
                            ({str(i): w[i:] for i in range(100)}, "many times larger"),
                            ({"\ud800": w}, "cannot hold"), ({"__metadata__": w}, "cannot hold")]:
        torch.save(contents, file)
        assert found in refused(file, file.read_bytes(), lambda p: to_safetensors(p, out))
    def full(*args): raise OSError("disk full")
    monkeypatch.setattr(os, "replace", full)
    torch.save(dict(w=w), file)
    with pytest.raises(OSError, match="disk full"): to_safetensors(file, out)
    assert out.read_bytes() == b"old" and {p.name for p in tmp_path.iterdir()} == {"file", "x.safetensors"}
