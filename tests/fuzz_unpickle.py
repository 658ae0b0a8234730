"""Reads bombs and mutated checkpoints: `python tests/fuzz_unpickle.py COUNT [SEED]` prints what became of them.

A reader may succeed or raise `RefusedFile`. Anything else ends the process: another error, more than half a gigabyte
of memory and, by an audit hook of Python, any import, execution, process, connection or written file meanwhile.
"""
import codecs
import io
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path
from pickletools import genops

import torch
from edm_pickle import edm_pickle
from hostile_pickles import bombs
from torch import nn

from s4s_nb.files.checkpoint import edm_state, read_checkpoint, read_edm_pickle
from s4s_nb.files.unpickle import RefusedFile

FORBIDDEN = "exec compile import pickle.find_class os. subprocess. socket. shutil. ctypes. marshal. code."
PIECES = [ # valid and hostile instructions
    b"cos\nsystem\n", b"X\2\0\0\0id\x85R", b"cbuiltins\neval\n", b"\x8c\2os\x8c\6system\x93", b"c__builtin__\nset\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ctorch.storage\n_load_from_bytes\n",
    b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n", b"ccollections\nOrderedDict\n)R", b"clib\nThing\n)\x81",
    b"h\0", b"h\1", b"h\2", b"h\3", b"q\0", b"K\0", b"K\1", b"M\xff\xff", b"J\xff\xff\xff\xff",
    *(op + b"\xff\xff\xff\x7f" for op in (b"j", b"r", b"\x8b", b"B", b"X")),
    *(op + b"\xff" * 7 + b"\x7f" for op in (b"\x8a\x08", b"\x8e", b"\x8d", b"\x96", b"\x95")),
    b"X\5\0\0\0state", b"X\x08\0\0\0_modules", b"X\1\0\0\0\xff", b"\x82\1", b"(cos\nsystem\no", b"(ios\nsystem\n",
    b"S'a'\n", b"I1\n", b"P1\n", b"(" * 50, b"\x85" * 50,
    *(bytes([op]) for op in b"QRb\x81\x93}])(t\x85\x86\x87suae\x90\x8fN\x88\x94\x9702.")]
NUMBERS = 0, 1, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1


class Leaf(nn.Module):
    "A parameter, a buffer and a container"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.arange(4.))
        self.register_buffer("b", torch.tensor(2))
        self.enc = nn.ModuleDict(dict(a=nn.Identity()))

def saved(data, **options) -> bytes:
    torch.save(data, f := io.BytesIO(), **options)
    return f.getvalue()

def originals() -> list[bytes]:
    "Small valid files: of EDM, of torch.save in both containers, a plain pickle"
    w = torch.arange(6.).reshape(2, 3)
    contents = dict(state_dict=dict(w=w, tied=w, flag=torch.tensor([True])), epoch=3, rate=[.5, -1, None])
    return [edm_pickle(Leaf(), "Leaf", dict(size=4, mult=[1, 2])), saved(contents),
            saved(contents, _use_new_zipfile_serialization=False), pickle.dumps(dict(a=[1, (2, "b")], c={1}), 4)]


def bytes_mutated(data: bytes, pool: list[bytes], rng: random.Random) -> bytes:
    "One thing wrong, anywhere"
    b = bytearray(data)
    i, j = sorted(rng.randrange(len(b) + 1) for _ in range(2))
    j = min(j, i + rng.choice((1, 4, 30, 300)))
    match rng.randrange(6):
        case 0: b[i:i + 1] = bytes([rng.randrange(256)])
        case 1: b[i:] = b""
        case 2: b[i:i] = b[i:j] * rng.choice((1, 2, 50))
        case 3: b[i:j] = b""
        case 4: b[i:i + 8] = struct.pack("<Q", rng.choice(NUMBERS))[:rng.choice((2, 4, 8))]
        case 5: b[i:i] = rng.choice(PIECES)
    return bytes(b)

@cache
def instructions(data: bytes) -> tuple[bytes]:
    "Pickles, cut between their instructions; what follows them is the last piece"
    ops, f = [], io.BytesIO(data)
    try:
        while True:
            starts = [at for _, _, at in genops(f)] + [f.tell()]
            ops += [data[a:b] for a, b in zip(starts, starts[1:])]
    except ValueError: return *ops, data[sum(map(len, ops)):]

def pickle_mutated(data: bytes, pool: list[bytes], rng: random.Random) -> bytes:
    "One to four instructions changed, or the file that one of them holds"
    ops = [*instructions(data)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        i, j = rng.randrange(len(ops)), rng.randrange(len(ops))
        match rng.randrange(7):
            case 0: ops[i:i] = [rng.choice(PIECES)]
            case 1: ops[i] = rng.choice(PIECES)
            case 2: ops[i] = rng.choice(pool)
            case 3: ops[i], ops[j] = ops[j], ops[i]
            case 4: ops[i:i] = ops[j:j + 5] * rng.choice((1, 1, 20))
            case 5 if len(ops) > 1: del ops[i]
            case 6 if nested := [k for k, op in enumerate(ops) if op[:1] == b"B" and len(op) > 50]:
                k = rng.choice(nested)
                content = rng.choice((pickle_mutated, bytes_mutated))(ops[k][5:], pool, rng)
                ops[k] = b"B" + struct.pack("<I", len(content)) + content
    return b"".join(ops)

def zip_mutated(data: bytes, pool: list[bytes], rng: random.Random) -> bytes:
    "A valid archive with another pickle, another record or other names"
    with zipfile.ZipFile(io.BytesIO(data)) as z: records = {n: z.read(n) for n in z.namelist()}
    name = "archive/data.pkl" if rng.random() < .8 else rng.choice(list(records))
    mutated = pickle_mutated if name.endswith("pkl") else bytes_mutated
    records[name] = mutated(records[name], pool, rng)
    if rng.random() < .1: records[rng.choice(("../../x", "/etc/x", "b/data.pkl", name + "x"))] = records.pop(name)
    with zipfile.ZipFile(f := io.BytesIO(), "w", compression=rng.choice((0,) * 9 + (8,))) as z:
        for n, content in records.items(): z.writestr(n, content)
    return f.getvalue()


watching = False

def audit(event: str, args):
    "Ends the process if something happens that reading a file must not cause"
    global watching
    writes = event == "open" and args[1] not in ("r", "rb", None)
    if watching and (writes or event.startswith(tuple(FORBIDDEN.split()))):
        watching = False
        print("forbidden:", event, repr(args)[:300], flush=True)
        raise SystemExit(3)

def outcome(path: Path) -> str:
    "What a reader makes of the file"
    global watching
    with open(path, "rb") as f: edm = f.read(2) == b"\x80\x04"
    watching = True
    try: edm_state(read_edm_pickle(path)["ema"]) if edm else read_checkpoint(path)
    except RefusedFile as e:
        return "damaged" if "damaged, cut off" in str(e) else "refused"
    except KeyError: return "no ema"
    finally: watching = False
    return "read"


def main(count: int, seed: int = 0) -> dict:
    "Outcomes of this many mutated files"
    rng, files, outcomes, slowest = random.Random(seed), originals(), Counter(), 0
    edm, archive, legacy, _ = files
    pool = [op for data in files for op in instructions(data)[:-1]]
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None # a disk would be most of the time
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        path = Path(folder) / "file"
        for data in files: path.write_bytes(data), outcome(path)
        for name in "cp437", "raw_unicode_escape": codecs.lookup(name) # zipfile and pickletools import them when needed
        sys.addaudithook(audit)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
        for name, (data, _) in bombs().items():
            path.write_bytes(data)
            assert outcome(path) != "read", name
        for _ in range(count):
            match rng.randrange(8):
                case 0: data = bytes_mutated(rng.choice(files), pool, rng)
                case 1 | 2 | 3: data = pickle_mutated(edm, pool, rng)
                case 4 | 5: data = pickle_mutated(legacy, pool, rng)
                case 6 | 7: data = zip_mutated(archive, pool, rng)
            path.write_bytes(data)
            start = time.monotonic()
            outcomes[outcome(path)] += 1
            slowest = max(slowest, time.monotonic() - start)
    return dict(outcomes) | dict(slowest_ms=round(1e3 * slowest))


if __name__ == "__main__": print(main(*map(int, sys.argv[1:])))
