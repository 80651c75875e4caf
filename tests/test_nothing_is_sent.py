"""No command contacts another machine, or writes anything outside the folders that it was given but known caches.

Commands run in processes of their own, with an empty home folder, with Python's sockets and name look-ups recorded,
and, where the system allows it, in a network namespace that has a loopback device alone. Native code that reports use
cannot be recorded like that; it is noticed by the device id and the queue that it writes below the home folder.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
# Imported by every Python process: brings up the loopback device of a new namespace, and records what leaves it.
RECORDER = """
import fcntl, os, socket, struct, sys

if os.environ.get("IN_NAMESPACE"):
    with socket.socket() as any_socket:  # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x41))

log = open(os.environ["RECORD"], "a", buffering=1)

def record(what, target):
    log.write(f"{what} {target!r}\\n")

def is_local(host):
    return host is None or str(host) in ("", "127.0.0.1", "::1", "localhost", "0.0.0.0")

def recorded(function, host_of):
    def call(*arguments, **options):
        if not is_local(host_of(arguments)):
            record(function.__name__, arguments)
        return function(*arguments, **options)
    return call

def address_of(arguments):
    return arguments[-1][0] if isinstance(arguments[-1], tuple) else None  # a path is a UNIX socket

class RecordedSocket(socket.socket):
    def connect(self, address):
        return recorded(super().connect, address_of)(address)

    def connect_ex(self, address):
        return recorded(super().connect_ex, address_of)(address)

    def sendto(self, *arguments):
        return recorded(super().sendto, address_of)(*arguments)

CHANGES = {"os.rename": 2, "os.remove": 1, "os.mkdir": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2}

def is_allowed(path):
    path = os.path.abspath(os.fsdecode(path))
    for each in os.environ["MAY_WRITE"].split(":"):
        folder, name = os.path.split(each)
        if path == each or path.startswith((each + "/", f"{folder}/.{name}.")):  # the last is a temporary file
            return True
    return False

def watch(event, arguments):
    count = CHANGES.get(event, 0)
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        count = 1
    for path in arguments[:count]:
        is_there = event in ("open", "os.mkdir") and os.path.isdir(path)  # a trial file, a folder made if needed
        if isinstance(path, str | bytes) and not is_there and not is_allowed(path):
            record("writes", os.fsdecode(path))

sys.addaudithook(watch)
socket.socket = RecordedSocket
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
    setattr(socket, name, recorded(getattr(socket, name), lambda arguments: arguments[0]))
"""
TRAIN_TEST_EXPORT = """
import huggingface_hub, tensorboard, timm
import models.export, search_photos, test_sketchy_ext_zeroshot, train_sketchy_ext

network = "--model test_convnext --input_size 32 --workers 0 --device cpu".split()
short = "--finetune none --epochs 1 --warmup_epochs 0 --batch_size 30 --max_steps 1 --no_validation".split()
train_sketchy_ext.main([*network, *short, "--data_root", "data", "-s", "run"])
test_sketchy_ext_zeroshot.main([*network, "--mode", "1", "--data_root", "data", "--resume_dir", "run"])
for name in ("s.onnx", "s.safetensors"):
    models.export.main(["run/checkpoint.pth.tar", "--to", name])
search_photos.main("index album --index of_torch --checkpoint run/checkpoint.pth.tar --workers 0".split())
"""
SEARCH = """
import http.client, re, signal, subprocess, sys
import search_photos

search_photos.main("index album --checkpoint s.onnx --workers 0".split())
search_photos.main("find sketch.png".split())
page = subprocess.Popen(
    [sys.executable, "-m", "search_photos", "page", "--port", "0"], stdout=subprocess.PIPE, text=True
)
port = re.search(r"http://127\\.0\\.0\\.1:(\\d+)/", page.stdout.readline())[1]
connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
connection.request("POST", "/find", open("sketch.png", "rb").read())
assert connection.getresponse().status == 200
connection.close()
page.send_signal(signal.SIGINT)
assert page.wait() == 130
"""
MILVUS = """
import search_photos

milvus = "--engine milvus --uri photos.db".split()
search_photos.main(["index", *milvus])
search_photos.main(["find", "sketch.png", "--checkpoint", "s.onnx", *milvus])
"""


# What the commands may write: what they are given as folders and files, and caches that docs/search.md names.
GIVEN = (
    "run",
    "of_torch",
    "photo_index",
    "photos.db",
    "s.onnx",
    "s.safetensors",
    "found.png",
    ".tmp",
    ".home/.cache/matplotlib",
)


def leaves_behind(code, folder):
    """Run Python `code` in `folder`; returns what left the machine or was written elsewhere, and files below home."""
    home, patch, record, temporary = (folder / f".{name}" for name in ("home", "patch", "record", "tmp"))
    for each in (home, patch, temporary):
        shutil.rmtree(each, ignore_errors=True)
        each.mkdir()
    for each in (".cache/matplotlib", ".config/matplotlib"):  # as they are where matplotlib has been used
        (home / each).mkdir(parents=True)
    record.write_text("")
    (patch / "sitecustomize.py").write_text(RECORDER)
    environment = {
        "HOME": str(home), "PYTHONPATH": f"{patch}:{ROOT}", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1",
        "RECORD": str(record), "MAY_WRITE": ":".join([*(str(folder / name) for name in GIVEN), "/dev/null"]),
        "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    isolated = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*isolated, "true"], capture_output=True).returncode:
        isolated = []  # not Linux, or not allowed
    else:
        environment["IN_NAMESPACE"] = "1"
    done = subprocess.run([*isolated, sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    files = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    font_cache = {name for name in files if name.startswith((".cache/matplotlib/fontlist-", ".config/matplotlib/"))}
    return record.read_text(), files - font_cache


@pytest.fixture(scope="module")
def folder(miniature, tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    (folder / "data").symlink_to(miniature)
    for number in range(5):
        (folder / "album").mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (40 * number, 90, 200)).save(folder / f"album/{number}.png")
    image = Image.new("RGB", (80, 80), "white")
    ImageDraw.Draw(image).line([(10, 10), (70, 40), (20, 70)], fill="black", width=3)
    image.save(folder / "sketch.png")
    return folder


def test_what_is_sent_or_written_is_noticed(tmp_path):
    code = """
import os, socket
open(os.path.expanduser("~/deviceid"), "w").close()
os.mkdir("elsewhere")
for call in (lambda: socket.create_connection(("192.0.2.1", 9), timeout=0), lambda: socket.getaddrinfo("host", 80)):
    try:
        call()
    except OSError:
        pass
"""
    record, files = leaves_behind(code, tmp_path)
    assert "writes 'elsewhere'\n" in record and f"writes '{tmp_path}/.home/deviceid'\n" in record
    assert "getaddrinfo ('192.0.2.1'" in record and "getaddrinfo ('host'" in record and "connect (" in record
    assert files == {"deviceid"}


def test_no_command_sends_anything(folder):
    for code in (TRAIN_TEST_EXPORT, SEARCH, MILVUS):
        assert leaves_behind(code, folder) == ("", set())
