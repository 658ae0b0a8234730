"""Writes networks of ours as the `.pkl` files of EDM, byte for byte in NVIDIA's format.

Their `torch_utils.persistence` pickles each object and each layer as a call on a dictionary of class name,
attributes and the source code of the whole module; containers of PyTorch are pickled as such. Here the source
code ends the process that executes it. The modules that the file names exist only while it is written.
"""
import pickle
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
from torch import nn

SOURCE = "raise SystemExit('the source code in the file was executed')\n"
OFFICIAL = {"ResampleConv2d": "Conv2d"} # our classes that have another name there


def _reconstruct_persistent_obj(meta): raise SystemExit("a function that the file names was called")

class EasyDict(dict): "NVIDIA's dictionary with attributes"


def official_modules() -> dict[str, ModuleType]:
    "The modules that a file names, as far as it names them"
    named = {"torch_utils.persistence": _reconstruct_persistent_obj, "dnnlib.util": EasyDict}
    modules = {name: ModuleType(name) for path in named for name in (path, path.split(".")[0])}
    for path, thing in named.items():
        thing.__module__ = path
        setattr(modules[path], thing.__name__, thing)
    return modules


class Persistent:
    "An object as the wrapper pickles it"
    def __init__(self, class_name: str, state: dict, source: str):
        self.meta = dict(type="class", version=6, module_src=source, class_name=class_name, state=state)
    def __reduce__(self): return _reconstruct_persistent_obj, (self.meta,), None


def wrapped(module: nn.Module, source: str, class_name: str | None = None, init_kwargs: dict | None = None):
    "This module and those in it, as the wrapper pickles them"
    state = dict(vars(module))
    state["_modules"] = {k: m if m is None else wrapped(m, source) for k, m in module._modules.items()}
    if isinstance(module, nn.ModuleDict):
        container = nn.ModuleDict()
        vars(container).update({k: state[k] for k in vars(container)})
        return container
    name = class_name or OFFICIAL.get(type(module).__name__, type(module).__name__)
    if name == "Conv2d": state["_buffers"] = dict(resample_filter=None) | state["_buffers"]
    if name == "UNetBlock": state["skip_scale"] = np.sqrt(.5)
    return Persistent(name, state | dict(_init_args=(), _init_kwargs=dict(init_kwargs or {})), source)


def edm_pickle(network: nn.Module, class_name: str, init_kwargs: dict, source: str = SOURCE) -> bytes:
    "The bytes of the file; `init_kwargs` are the arguments of the official constructor"
    with patch.dict(sys.modules, official_modules()):
        data = dict(ema=wrapped(network, source, class_name, init_kwargs),
                    loss_fn=Persistent("EDMLoss", dict(P_mean=-1.2, P_std=1.2, sigma_data=.5), source),
                    augment_pipe=Persistent("AugmentPipe", dict(p=.12, xflip=1e8), source),
                    dataset_kwargs=dict(path="images.zip", resolution=32, options=EasyDict(cache=True)))
        return pickle.dumps(data, 4)


def write_edm_pickle(path, network: nn.Module, class_name: str, init_kwargs: dict, source: str = SOURCE):
    "Writes the file"
    Path(path).write_bytes(edm_pickle(network, class_name, init_kwargs, source))
