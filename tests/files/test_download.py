"Downloads against loopback servers that misbehave in one way each; nothing here needs a network."
import errno
import hashlib
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from s4s_nb.files import download
from s4s_nb.files.download import DownloadError, Transient, fetch, read_record, unzipped

BLOB = random.Random(0).randbytes(400_000)
SHA = hashlib.sha256(BLOB).hexdigest()
OTHER = BLOB[::-1]


# ------------------------------------------------------------------------------------------------------------
# The server: `answers` are used up one by one, then every request is answered as it should be
# ------------------------------------------------------------------------------------------------------------

def ranged(h, data, upto=None, validator=True, honest=True):
    "What a good server does; hangs up after `upto` bytes, has no validator, or does not mind that of the client."
    etag, first, asked = f'"{hashlib.md5(data).hexdigest()}"', 0, h.headers["Range"]
    if asked and (not honest or h.headers["If-Range"] in (None, etag)): first = int(asked[6:-1])
    h.send_response(206 if first else 200)
    if first: h.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
    if validator: h.send_header("ETag", etag)
    h.send_header("Content-Length", len(data) - first)
    h.end_headers()
    h.wfile.write(data[first:][:upto])

def answer(status=200, body=b"", **headers):
    "One that is always the same"
    def f(h, data):
        h.send_response(status)
        for k, v in headers.items(): h.send_header(k.replace("_", "-"), v)
        h.end_headers()
        h.wfile.write(body)
    return f

def cut(n, **kw): return lambda h, data: ranged(h, data, n, **kw)
def deaf(h, data): answer(body=data, Content_Length=len(data))(h, data)    # to ranges

def reset(h, data):
    "Breaks the connection without an answer"
    h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    h.connection.close()

class Site:
    def __init__(self):
        self.data, self.asked, self.answers, self.otherwise = BLOB, [], [], ranged
        site = self
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked.append((self.path, self.headers["Range"]))
                (site.answers.pop(0) if site.answers else site.otherwise)(self, site.data)
            def log_message(self, *args): pass
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *args: None       # clients that are killed
        threading.Thread(target=self.server.serve_forever, args=(.02,), daemon=True).start()
        self.root = f"http://127.0.0.1:{self.server.server_port}"
        self.url = f"{self.root}/dir/model.bin"
    @property
    def ranges(self): return [r for _, r in self.asked]


@pytest.fixture
def site(monkeypatch):
    for k in ("S4S_OFFLINE", "HF_HUB_OFFLINE", "S4S_MIRROR", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(k, raising=False)
    monkeypatch.setattr(download, "PAUSES", (0, 0, 0))
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()

@pytest.fixture
def get(site, tmp_path):
    def get(url=site.url, **kw): return fetch(url, cache=tmp_path, progress=False, **kw)
    get.path = tmp_path / "downloads" / "model.bin"
    get.part = tmp_path / "downloads" / "model.bin.part"
    return get


# ------------------------------------------------------------------------------------------------------------
# Once, verified
# ------------------------------------------------------------------------------------------------------------

def test_downloaded_once_and_recorded(site, get):
    assert get() == get() == get.path and get.path.read_bytes() == BLOB
    assert site.asked == [("/dir/model.bin", None)]
    record = read_record(get.path)
    assert (record["url"], record["sha256"], record["size"]) == (site.url, SHA, len(BLOB)) and record["date"]
    assert {p.name for p in get.path.parent.iterdir()} <= {f"model.bin{s}" for s in ("", ".record.json", ".lock")}

def test_hashed_once_per_process(site, get, monkeypatch):
    hashed, real = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda f, name: hashed.append(f.name) or real(f, name))
    for _ in range(3): get(sha256=SHA.upper())
    assert hashed == [str(get.part)]                         # while it was complete, but had no name yet
    os.utime(get.path, (1, 1))
    get()
    assert hashed[1:] == [str(get.path)]

def test_altered_file_is_fetched_again_with_a_warning(site, get):
    get().write_bytes(BLOB[:-1] + b"!")
    os.utime(get.path, (1, 1))
    with pytest.warns(UserWarning, match="damaged or replaced"): assert get().read_bytes() == BLOB
    get.path.write_bytes(b"short")
    with pytest.warns(UserWarning, match="damaged or replaced"): assert get(sha256=SHA).read_bytes() == BLOB

def test_another_file_on_the_server_is_not_accepted_silently(site, get):
    get().unlink()
    site.data = OTHER
    with pytest.raises(DownloadError, match="The server has another file than on 20.*record.json"): get()
    assert not get.path.exists() and not get.part.exists()
    download.with_ending(get.path, ".record.json").unlink()       # as the message says
    assert get().read_bytes() == OTHER

def test_altered_file_and_another_file_on_the_server(site, get):
    get().write_bytes(b"damaged")
    site.data = OTHER
    with pytest.raises(DownloadError, match="another file"), pytest.warns(UserWarning): get()

def test_wrong_hash_is_never_used_and_a_right_one_is_taken_next_time(site, get):
    site.data = OTHER
    with pytest.raises(DownloadError, match=f"not {SHA}"): get(sha256=SHA)
    assert not get.path.exists() and not get.part.exists() and not read_record(get.path)
    site.data = BLOB
    assert get(sha256=SHA).read_bytes() == BLOB

def test_published_hash_replaces_a_recorded_one(site, get):
    site.data = OTHER
    get()
    site.data = BLOB
    with pytest.warns(UserWarning): assert get(sha256=SHA).read_bytes() == BLOB
    assert read_record(get.path)["sha256"] == SHA

def test_two_addresses_do_not_share_a_name(site, get):
    get()
    with pytest.raises(DownloadError, match="pass another name="): get(f"{site.root}/v2/model.bin")
    with pytest.raises(DownloadError, match="pass another name="): get(f"{site.root}/v2/model.bin", sha256="0" * 64)
    assert get(f"{site.root}/v2/model.bin", name="model2.bin").read_bytes() == BLOB
    assert get(f"{site.root}/v2/model.bin", sha256=SHA) == get.path and len(site.asked) == 2

@pytest.mark.parametrize("text", ["", "[]", '{"url": 1}'])
def test_damaged_record_is_an_error(site, get, text):
    get()
    download.with_ending(get.path, ".record.json").write_text(text)
    with pytest.raises(DownloadError, match="is damaged; delete it"): get()

@pytest.mark.parametrize("kw", [*(dict(name=n) for n in ("../x", ".x", "a/b", "a\\b", "a\0")), dict(sha256="12ab"),
                                dict(url="http://a.org/"), dict(url="http://a.org/%2e%2e")])
def test_wrong_arguments(get, kw):
    with pytest.raises(ValueError, match="expected"): get(**kw)

def test_progress_is_shown_in_bytes(site, tmp_path, capfd):
    fetch(site.url, cache=tmp_path)
    assert "model.bin: 100%" in (shown := capfd.readouterr().err) and "400k/400k" in shown


# ------------------------------------------------------------------------------------------------------------
# Breaks
# ------------------------------------------------------------------------------------------------------------

def test_truncated_download_goes_on(site, get):
    site.answers = [cut(100_000)]
    assert get().read_bytes() == BLOB and site.ranges == [None, "bytes=100000-"]

def test_what_arrived_is_kept_for_the_next_call(site, get):
    site.answers = [cut(100_000)] + 4 * [cut(0)]
    with pytest.raises(Transient, match="100,000 of 400,000 bytes; they are kept"): get()
    assert not get.path.exists() and get.part.stat().st_size == 100_000
    assert get().read_bytes() == BLOB and site.ranges[-1] == "bytes=100000-"

def test_patience_starts_again_when_there_is_progress(site, get):
    site.otherwise = cut(30_000)
    assert get().read_bytes() == BLOB and len(site.asked) == 14

@pytest.mark.parametrize("trouble", [reset, *map(answer, (500, 503, 429, 408))], ids="reset 500 503 429 408".split())
def test_transient_trouble_passes(site, get, trouble):
    site.answers = [trouble]
    assert get().read_bytes() == BLOB and len(site.asked) == 2

def test_redirection_is_followed_and_the_range_with_it(site, get):
    site.answers = [answer(302, Location="/x"), cut(100_000), answer(302, Location="/y")]
    assert get().read_bytes() == BLOB
    assert site.asked[1::2] == [("/x", None), ("/y", "bytes=100000-")] and read_record(get.path)["url"] == site.url

def test_transient_trouble_that_stays_is_an_error(site, get):
    site.otherwise = answer(503)
    with pytest.raises(Transient, match="503 Service Unavailable: try later.*by hand: .*model.bin"): get()
    assert len(site.asked) == 4

def test_silence_is_not_waited_for_forever(site, get, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", .2)
    done = threading.Event()
    def silent(h, data):
        h.send_response(200)
        h.send_header("Content-Length", len(data))
        h.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        h.end_headers()
        h.wfile.write(data[:1 << 16])
        done.wait(20)
    site.answers = [lambda h, data: done.wait(20), silent]
    assert get().read_bytes() == BLOB and site.ranges == [None, None, "bytes=65536-"]
    done.set()

@pytest.mark.parametrize("code, hint", [(404, "may have moved"), (403, "login"), (401, "login"), (410, "check")])
def test_refusals_are_final(site, get, code, hint):
    site.otherwise = answer(code)
    with pytest.raises(DownloadError, match=hint) as e: get()
    assert len(site.asked) == 1 and not isinstance(e.value, Transient) and str(get.path) in str(e.value)

@pytest.mark.parametrize("trouble, match", [
    (answer(200, b"<html>", Content_Type="text/html; charset=utf-8"), "web page.*moved, or want a login"),
    (answer(200, Content_Length=0), "empty file"), (answer(204), "unexpected status 204"),
    (answer(200, BLOB), "does not say how long"), (answer(302, Location="file:///etc/passwd"), "302")],
    ids="page empty status length redirect".split())
def test_answers_that_are_not_the_file(site, get, trouble, match):
    site.otherwise = trouble
    with pytest.raises(DownloadError, match=match): get()
    assert len(site.asked) == 1 and not get.path.exists() and not get.part.exists()

def test_page_is_fetched_where_a_page_is_meant(site, get):
    site.otherwise = answer(200, b"<html>", Content_Type="text/html", Content_Length=6)
    assert get(f"{site.root}/page.html").read_bytes() == b"<html>"

def test_secure_address_may_not_lead_to_an_insecure_one():
    headers = SimpleNamespace(get_content_type=lambda: "application/zip")
    r = SimpleNamespace(headers=headers, url="http://b.org/x.zip", status=200, length=1)
    assert "insecure" in download.why_suspicious("https://a.org/x.zip", r, Path("x.zip"))
    assert not download.why_suspicious("http://a.org/x.zip", r, Path("x.zip"))

def test_length_may_be_missing_when_the_hash_is_known_or_the_end_is_marked(site, get):
    site.answers = [answer(200, BLOB)]
    assert get(sha256=SHA).read_bytes() == BLOB
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in (BLOB[:300_000], BLOB[300_000:], b""))
    for h in ("", "2"):
        site.answers = [answer(200, chunked[:len(chunked) - 10 * len(h)], Transfer_Encoding="chunked")]
        assert get(name=f"chunked{h}").read_bytes() == BLOB
    assert len(site.asked) == 4                              # one more for the broken one

def test_unknown_host_and_refused_connection(site, get, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as s: port = s.getsockname()[1]
    with pytest.raises(DownloadError, match="refused.*Is there a network.*S4S_MIRROR.*by hand"): get(f"http://127.0.0.1:{port}/x")
    def unknown(*args, **kw): raise socket.gaierror(-2, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(DownloadError, match="Name or service not known.*Is there a network"): get("http://unknown.invalid/x")

@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://a.org/x", "model.bin", "http://a.org:port/x", "http://a.org/\u00e9"])
def test_other_addresses_are_refused(get, url):
    with pytest.raises(DownloadError): get(url)


# ------------------------------------------------------------------------------------------------------------
# Two versions are never glued together
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("honest", [True, False], ids=["server minds If-Range", "server ignores If-Range"])
@pytest.mark.parametrize("new", [OTHER, BLOB + b"longer"], ids=["same size", "other size"])
def test_file_that_changed_on_the_server_is_fetched_whole(site, get, honest, new):
    def changed(h, data):
        site.data = new
        ranged(h, new, honest=honest)
    site.answers = [cut(100_000), changed]
    assert get().read_bytes() == new
    assert site.ranges == [None, "bytes=100000-"] + [None] * (not honest)

@pytest.mark.parametrize("where", ["5-399999/400000", "100000-399999/400001", "100000-399999/*", "nonsense"])
def test_wrong_content_range_starts_over(site, get, where):
    headers = dict(ETag=f'"{hashlib.md5(BLOB).hexdigest()}"', Content_Range=f"bytes {where}", Content_Length=300_000)
    site.answers = [cut(100_000), answer(206, BLOB[:300_000], **headers)]
    assert get().read_bytes() == BLOB and site.ranges == [None, "bytes=100000-", None]

@pytest.mark.parametrize("sha256", [None, SHA])
def test_without_a_validator_only_a_known_hash_allows_to_go_on(site, get, sha256):
    site.answers = [cut(100_000, validator=False)]
    assert get(sha256=sha256).read_bytes() == BLOB
    assert site.ranges == [None, "bytes=100000-" if sha256 else None]

def test_weak_tag_is_no_validator_but_a_date_is():
    assert download.validator({"ETag": 'W/"1"', "Last-Modified": "yesterday"}) == "yesterday"
    assert download.validator({"ETag": 'W/"1"'}) is None

def test_part_of_another_address_is_not_continued(site, get, monkeypatch):
    site.answers = [cut(100_000)] + 4 * [cut(0)]
    with pytest.raises(Transient): get()
    monkeypatch.setenv("S4S_MIRROR", f"{site.root}/dir={site.root}/mirror")
    assert get().read_bytes() == BLOB and site.asked[-1] == ("/mirror/model.bin", None)

def test_server_that_ignores_ranges_starts_over(site, get):
    site.answers = [cut(100_000)]
    site.otherwise = deaf
    assert get().read_bytes() == BLOB and site.ranges == [None, "bytes=100000-"]

def test_server_that_ignores_ranges_and_never_finishes_is_given_up(site, get):
    site.otherwise = lambda h, data: answer(body=data[:100_000], Content_Length=len(data))(h, data)
    with pytest.raises(Transient, match="100,000 of 400,000"): get()
    assert len(site.asked) == 4

def test_range_that_cannot_be_satisfied_starts_over(site, get):
    site.answers = [cut(100_000), answer(416)]
    assert get().read_bytes() == BLOB and site.ranges == [None, "bytes=100000-", None]

@pytest.mark.parametrize("spoil", [lambda part, note: part.write_bytes(BLOB + b"more"),
                                   lambda part, note: note.write_text("[]"), lambda part, note: note.unlink()],
                         ids=["too long", "damaged note", "no note"])
def test_odd_part_is_dropped(site, get, spoil):
    site.answers = [cut(100_000)] + 4 * [cut(0)]
    with pytest.raises(Transient): get()
    spoil(get.part, download.with_ending(get.part, ".json"))
    assert get().read_bytes() == BLOB and site.ranges[-1] is None

def test_complete_part_is_not_asked_for_again(site, get):
    get.part.parent.mkdir()
    download.complete_part(site.url, get.path, False, False)      # and here the process dies
    assert get().read_bytes() == BLOB and len(site.asked) == 1


# ------------------------------------------------------------------------------------------------------------
# Processes
# ------------------------------------------------------------------------------------------------------------

def process(site, cache):
    "A process that fetches the file"
    code = ("import sys; from s4s_nb.files.download import fetch; "
            "print(fetch(sys.argv[1], cache=sys.argv[2], progress=False))")
    return subprocess.Popen([sys.executable, "-c", code, site.url, str(cache)], stdout=subprocess.PIPE, text=True)

def test_killed_download_is_finished_by_the_next_call(site, get, tmp_path):
    dead = threading.Event()
    def half(h, data):
        h.send_response(200)
        h.send_header("Content-Length", len(data))
        h.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
        h.end_headers()
        h.wfile.write(data[:200_000])
        dead.wait(60)
    site.answers = [half]
    p = process(site, tmp_path)
    while p.poll() is None and not (get.part.exists() and get.part.stat().st_size >= 3 << 16): time.sleep(.01)
    p.kill()
    p.communicate()
    dead.set()
    assert p.returncode == -9 and get().read_bytes() == BLOB
    assert site.ranges == [None, f"bytes={3 << 16}-"]

def test_processes_at_once_share_one_download(site, get, tmp_path):
    both = threading.Event()
    def slow(h, data):
        both.wait(60)
        ranged(h, data)
    site.otherwise = slow
    other = process(site, tmp_path)
    while other.poll() is None and not site.asked: time.sleep(.01)
    threading.Timer(.5, both.set).start()                    # by then this process waits for the other one
    assert get().read_bytes() == BLOB and other.communicate()[0].strip() == str(get.path)
    assert len(site.asked) == 1


# ------------------------------------------------------------------------------------------------------------
# The machine
# ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def shared():
    "A folder that everybody can look into"
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)

@contextmanager
def unprivileged():
    "As somebody who may not write everywhere"
    if root := os.geteuid() == 0: os.seteuid(65534)
    try: yield
    finally:
        if root: os.seteuid(0)

def test_read_only_cache(site, shared):
    path = fetch(site.url, cache=shared, progress=False)
    for p in (shared, path.parent): p.chmod(0o555)
    with unprivileged():
        assert fetch(site.url, cache=shared, progress=False) == path         # what is there can be used
        for cache in (shared, shared / "new"):
            with pytest.raises(DownloadError, match="Permission denied.*S4S_CACHE"):
                fetch(f"{site.root}/b", cache=cache)
    assert len(site.asked) == 1
    for p in (shared, path.parent): p.chmod(0o755)

def test_cache_that_is_no_folder(site, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match="Not a directory.*S4S_CACHE"): fetch(site.url, cache=tmp_path / "file")

def test_full_disk_is_noticed_before(site, get, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=1000))
        with pytest.raises(DownloadError, match="400,000 bytes are needed, 1,000 are free.*S4S_CACHE"): get()
    assert get().read_bytes() == BLOB

def test_full_disk_while_writing_keeps_what_fitted(site, get, monkeypatch):
    class Full:
        def __init__(self, *args): self.f, self.room = open(*args), 200_000
        def __enter__(self): return self
        def __exit__(self, *args): self.f.close()
        def write(self, data):
            self.room -= len(data)
            if self.room < 0: raise OSError(errno.ENOSPC, "No space left on device")
            return self.f.write(data)
    with monkeypatch.context() as m:
        m.setattr(download, "open", Full, raising=False)
        with pytest.raises(DownloadError, match="No space left on device.*S4S_CACHE"): get()
    assert not get.path.exists() and len(site.asked) == 1
    assert get().read_bytes() == BLOB and site.ranges[-1] == f"bytes={3 << 16}-"

@pytest.mark.parametrize("variable", ["S4S_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_never_asks(site, get, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(DownloadError, match=f"model.bin is missing, and {variable} forbids.*{site.url}"): get()
    get.path.parent.mkdir()
    get.path.write_bytes(OTHER[1:])
    with pytest.raises(DownloadError, match="not the right file"): get(sha256=SHA)
    get.path.write_bytes(BLOB)                               # by hand
    assert get() == get(sha256=SHA) == get.path and read_record(get.path)["url"] == site.url
    get.path.write_bytes(b"altered")
    with pytest.raises(DownloadError, match="not the right file"): get()
    assert not site.asked

def test_mirror_is_asked_instead(site, get, monkeypatch):
    monkeypatch.setenv("S4S_MIRROR", f"https://other.org=https://x.org, https://published.org/a={site.root}/b")
    assert get("https://published.org/a/model.bin").read_bytes() == BLOB and site.asked == [("/b/model.bin", None)]
    assert read_record(get.path)["url"] == "https://published.org/a/model.bin"
    monkeypatch.setenv("S4S_MIRROR", f"{site.root}=file://")
    with pytest.raises(DownloadError, match="begins with https://"): get(name="new")
    monkeypatch.setenv("S4S_MIRROR", site.root)
    with pytest.raises(DownloadError, match="expected https://from=https://to"): get(name="new")

def test_proxy_is_asked_for_the_address(site, get, monkeypatch):
    monkeypatch.setenv("http_proxy", site.root)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert get("http://published.invalid/model.bin").read_bytes() == BLOB
    assert site.asked == [("http://published.invalid/model.bin", None)]


# ------------------------------------------------------------------------------------------------------------
# Archives
# ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "weights.zip"
    def write(members=(("run/model.ckpt", BLOB),), mode="w"):
        with zipfile.ZipFile(path, mode, zipfile.ZIP_DEFLATED) as z:
            for name, data in members: z.writestr(name, data)
    write()
    return SimpleNamespace(path=path, write=write, out=tmp_path / "weights.zip.run_model.ckpt")

def test_member_is_extracted_once(archive, monkeypatch):
    assert unzipped(archive.path, "run/model.ckpt") == archive.out and archive.out.read_bytes() == BLOB
    with monkeypatch.context() as m:
        m.setattr(download, "extract", None)
        assert unzipped(str(archive.path), "run/model.ckpt") == archive.out
    assert not archive.out.with_name(archive.out.name + ".part").exists()

def test_altered_member_or_another_archive_is_extracted_again(archive):
    unzipped(archive.path, "run/model.ckpt").write_bytes(b"altered")
    with pytest.warns(UserWarning, match="extracted again"): unzipped(archive.path, "run/model.ckpt")
    assert archive.out.read_bytes() == BLOB
    archive.write([("run/model.ckpt", OTHER + b"longer")])
    with pytest.warns(UserWarning, match="extracted again"): unzipped(archive.path, "run/model.ckpt")
    assert archive.out.read_bytes() == OTHER + b"longer"

@pytest.mark.parametrize("name", ["model.ckpt", "run", "nothing"])
def test_absent_member(archive, name):
    with pytest.raises(DownloadError, match=f"'{name}' is not in it"): unzipped(archive.path, name)

@pytest.mark.parametrize("name", ["../../model.ckpt", "..\\model.ckpt"])
def test_member_that_points_elsewhere(archive, name):
    archive.write([(name, BLOB)])
    with pytest.raises(ValueError, match="plain file name"): unzipped(archive.path, name)

@pytest.mark.parametrize("name", ["/tmp/model.ckpt", "a/../../model.ckpt"])
def test_member_cannot_choose_its_folder(archive, name):
    archive.write([(name, BLOB)])
    out = unzipped(archive.path, name)
    assert out.parent == archive.path.parent and out.read_bytes() == BLOB

def spoiled(archive, what):
    data = bytearray(archive.path.read_bytes())
    directory = data.rindex(b"PK\x01\x02")
    if what == "size": data[directory + 24:directory + 28] = struct.pack("<I", 1000)       # less than there is
    if what == "crc": data[directory + 16] ^= 1
    if what == "encrypted": data[directory + 8] |= 1
    if what == "method": data[directory + 10] = 77
    if what == "contents": data[50:60] = bytes(10)
    if what == "cut": data = data[:-100]
    archive.path.write_bytes(data)

@pytest.mark.parametrize("what", "size crc encrypted method contents cut".split())
def test_damaged_archive_leaves_nothing(archive, what):
    archive.write([("run/model.ckpt", b"compressible " * 1000)])
    spoiled(archive, what)
    with pytest.raises(DownloadError, match="cannot be read"): unzipped(archive.path, "run/model.ckpt")
    assert not {p.name for p in archive.path.parent.iterdir()} - {"weights.zip", f"{archive.out.name}.lock"}

def test_archive_that_promises_more_than_the_disk_holds(archive, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match="400,000 bytes are needed"): unzipped(archive.path, "run/model.ckpt")
    with pytest.raises(DownloadError, match="No such file"): unzipped(archive.path.with_name("none.zip"), "model.ckpt")
