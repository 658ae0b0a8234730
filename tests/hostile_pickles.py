"""Files that attack whoever opens them, written instruction by instruction.

Each is a pair: the bytes, and a pattern of what the refusal must say.
"""
import io
import pickle
import struct
import zipfile
import zlib
from functools import cache

FOUR = struct.pack("<4f", 1, 2, 3, 4)


def text(s: str) -> bytes: return b"X" + struct.pack("<I", len(s)) + s.encode()
def value(v) -> bytes: return pickle.dumps(v, 2)[2:-1]
def table(v: bytes) -> bytes: return b"\x80\2}" + text("w") + v + b"s."
def edm(v: bytes) -> bytes: return b"\x80\4}" + text("ema") + v + b"s."

def storage(key: int, n: int) -> bytes:
    "Refers to a storage of n numbers"
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(key)) + text("cuda:0") + value(n) + b"tQ"

def tensor(offset, size: tuple, stride: tuple) -> bytes:
    "A view of storage 0, which has four numbers"
    numbers = value(offset) + value(size) + value(stride)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(0, 4) + numbers + b"\x89}tR"

def zipped(data: bytes, *storages: bytes, compress: int = 0) -> bytes:
    "The container of torch.save around a pickle"
    records = {"data.pkl": data, **{f"data/{i}": s for i, s in enumerate(storages)}}
    with zipfile.ZipFile(f := io.BytesIO(), "w", compress) as z:
        for name, content in records.items(): z.writestr(f"a/{name}", content)
    return f.getvalue()

def legacy(data: bytes, *storages: bytes, keys=None, endian=True, numel=None) -> bytes:
    "The older container: five pickles in a row, then each storage with its length"
    start = [0x1950a86a20f9469cfc6c, 1001, dict(protocol_version=1001, little_endian=endian)]
    keys = [str(i) for i in range(len(storages))] if keys is None else keys
    lengths = [struct.pack("<q", len(s) // 4 if numel is None else numel) + s for s in storages]
    return b"".join([*(pickle.dumps(v, 2) for v in start), data, pickle.dumps(keys, 2), *lengths])

def nested(data: bytes) -> bytes:
    "A file within an EDM pickle"
    return b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(data)) + data + b"\x85R"

def module(modules: bytes) -> bytes:
    "A network without tensors whose submodules are given"
    state = b"}(" + text("_parameters") + b"}" + text("_buffers") + b"}" + text("_modules") + modules + b"u"
    meta = b"}(" + text("type") + text("class") + text("class_name") + text("Net") + text("state") + state + b"u"
    return b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n" + meta + b"\x85R"


RUN = dict( # attempts to run something
    system=(b"cposix\nsystem\n" + text("touch pwned") + b"\x85R", "posix.system"),
    system_by_stack=(b"\x8c\2os\x8c\6system\x93" + text("touch pwned") + b"\x85R", "os.system"),
    mentioned=(b"cos\nsystem\n", "os.system"),
    eval=(b"c__builtin__\neval\n" + text("1") + b"\x85R", "builtins.eval"),
    exec=(b"cbuiltins\nexec\n" + text("pass") + b"\x85R", "builtins.exec"),
    getattr=(b"cbuiltins\ngetattr\n)R", "builtins.getattr"),
    dunder_import=(b"cbuiltins\n__import__\n" + text("os") + b"\x85R", "builtins.__import__"),
    popen=(b"csubprocess\nPopen\n]\x85\x81", "subprocess.Popen"),
    partial=(b"cfunctools\npartial\n)R", "functools.partial"),
    torch_load=(b"ctorch.serialization\nload\n)R", "torch.serialization.load"),
    torch_hub=(b"ctorch\nhub.load\n)R", "torch.hub.load"),
    numpy_load=(b"cnumpy\nload\n)R", "numpy.load"),
    other_library=(b"cpip._internal\nmain\n)R", "pip._internal.main"),
    through_a_layer=(b"ctorch.nn.modules.module\nos.system\n)R", "calls the function 'torch.nn.modules.module.os"),
    object_call=(b"(cos\nsystem\n" + text("id") + b"o", "os.system"),
    inst=(b"(" + text("id") + b"ios\nsystem\n", "INST"),
    extension=(b"\x82\1", "EXT1"),
    by_keywords=(b"))}\x92", "NEWOBJ_EX"),
    called_dict=(b"})R", "calls a dict"),
    into_a_tuple=(b")]a", "puts something into a tuple"),
    attributes_of_a_list=(b"]}b", "sets attributes of a list"),
    name_of_a_list=(b"]]\x93", "a name in its pickle is no text"))
PLACES = dict(
    zip=lambda v: zipped(table(v)), legacy=lambda v: legacy(table(v)), edm=edm,
    nested_legacy=lambda v: edm(nested(legacy(b"\x80\2" + v + b"."))),
    nested_zip=lambda v: edm(nested(zipped(b"\x80\2" + v + b"."))))

@cache
def attacks() -> dict[str, tuple[bytes, str]]:
    "Every attempt to run something, in every place of every format"
    return {f"{name}, {place}": (wrap(v), found) for name, (v, found) in RUN.items() for place, wrap in PLACES.items()}


def header(name: bytes, data: bytes, at: int | None = None, skip: int = 0) -> bytes:
    "The entry of a record in a zip archive's list (`at` its place in the file), or before its data (`skip` bytes away)"
    fields = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 33, zlib.crc32(data), len(data), len(data), len(name), skip)
    if at is None: return b"PK\3\4" + fields + name
    return b"PK\1\2\x14\0" + fields + struct.pack("<HHHII", 0, 0, 0, 0, at) + name

def shared_records(n: int, data: bytes) -> bytes:
    "A zip archive of n records that are the same bytes: each extra field covers the headers that follow"
    names = [b"a/data/%d" % i for i in range(n)]
    pickled = table(b"](" + b"".join(storage(i, len(data) // 4) for i in range(n)) + b"e")
    file = header(b"a/data.pkl", pickled) + pickled
    entries = header(b"a/data.pkl", pickled, at=0)
    for i, name in enumerate(names):
        entries += header(name, data, at=len(file))
        file += header(name, data, skip=sum(30 + len(k) for k in names[i + 1:]))
    end = struct.pack("<HHHHIIH", 0, 0, n + 1, n + 1, len(entries), len(file + data), 0)
    return file + data + entries + b"PK\5\6" + end

@cache
def bombs() -> dict[str, tuple[bytes, str]]:
    "Small files that ask for much memory or much time"
    doubled = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) # a tuple of twice the one before, sixty times
    family, loop = module(b"}"), module(b"}q\1") + b"q\2h\1" + text("a") + b"h\2s"
    for i in range(40): family = module(b"}(" + text("a") + family + b"q%c" % i + text("b") + b"h%cu" % i)
    blob = legacy(b"\x80\2" + storage(0, 25_000) + b".", bytes(100_000))
    again = b"](" + nested(blob)[:-2] + b"q\2\x85R" + b"ctorch.storage\n_load_from_bytes\nh\2\x85R" * 1000 + b"e"
    huge, colliding = b"\x80\2" + storage(0, 10**12) + b".", [value(i << 32) for i in range(6000)]
    return {
        "a storage of 10^12 elements": (zipped(table(storage(0, 10**12)), FOUR), "another size"),
        "a storage of 10^12 elements, legacy": (legacy(table(storage(0, 10**12)), FOUR), "more memory"),
        "a storage of 10^12 elements, nested": (edm(nested(legacy(huge, FOUR))), "more memory"),
        "a storage of 2^2000 elements": (legacy(table(storage(0, 2**2000)), FOUR), "more memory"),
        "a storage of -4 elements": (zipped(table(storage(0, -4)), FOUR), "no storage"),
        "bytes of 2^63": (edm(b"\x8e" + b"\xff" * 7 + b"\x7f"), "bytes8"),
        "text of 2^31": (edm(b"X\xff\xff\xff\x7f"), "unicodestring4"),
        "an integer of 2^31 bytes": (edm(b"\x8b\xff\xff\xff\x7f"), "long4"),
        "a thousand names of a megabyte": (zipped(table(
            text("m" * 10**6) + b"q\1(" + b"h\1h\1\x93" * 1000 + b"t")), "more than 500 letters"),
        "a bytearray": (edm(b"\x96\4" + bytes(7) + b"abcd"), "BYTEARRAY8"),
        "a key that takes 2^60 steps to hash": (edm(b"}" + doubled + b"Ns"), "key is of type tuple"),
        "a key nested a hundred thousand deep": (edm(b"})" + b"\x85" * 100_000 + b"Ns"), "key is of type tuple"),
        "colliding keys": (edm(b"}(" + b"N".join([*colliding, b"N"]) + b"u"), "five thousand keys"),
        "colliding members": (edm(b"\x8f(" + b"".join(colliding) + b"\x90"), "five thousand keys"),
        "a million instructions": (edm(b"]" * 1_000_000), "instructions"),
        "one number a billion times": (zipped(table(tensor(0, (10**9,), (0,))), FOUR), "does not fit"),
        "an offset past the end": (zipped(table(tensor(4, (1,), (1,))), FOUR), "does not fit"),
        "a negative size": (zipped(table(tensor(0, (-4,), (1,))), FOUR), "does not fit"),
        "a negative stride": (zipped(table(tensor(3, (4,), (-1,))), FOUR), "does not fit"),
        "sizes that overflow": (zipped(table(tensor(0, (2**33, 2**33), (1, 1))), FOUR), "does not fit"),
        "ten thousand dimensions": (zipped(table(tensor(0, (1,) * 10**4, (1,) * 10**4)), FOUR), "does not fit"),
        "a nested file a thousand times": (edm(again), "more memory"),
        "a thousand records of the same bytes": (shared_records(1000, bytes(10**6)), "more memory|Overlapped"),
        "a compressed archive": (zipped(table(storage(0, 10**6)), bytes(4 * 10**6), compress=8), "compressed"),
        "a gzip file": (zlib.compress(bytes(10**6), wbits=31), "gzip"),
        "modules in each other, forty deep": (edm(family), "instructions or parts"),
        "a module in itself": (b"\x80\4" + loop + b"}" + text("ema") + b"h\2s.", "strange name"),
        "tuples in each other": (edm(doubled), "tuple is no network"),
        "lists twenty thousand deep": (edm(b"]" * 20_000 + b"a" * 19_999), "list is no network"),
    }
