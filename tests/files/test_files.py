"""Atomic writes, locks, leases, and errors of buckets in one line."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest

from metaembed_jax import files
from metaembed_jax.checkpoints import lease
from metaembed_jax.checkpoints.frozen import BASE, fits, is_kept, keep, read_kept
from metaembed_jax.checkpoints.runs import RunCheckpoints
from metaembed_jax.checkpoints.workdir import COMMITTED, has_checkpoints
from metaembed_jax.errors import UserError
from metaembed_jax.evaluation.evaluate_checkpoint import evaluate_checkpoint
from metaembed_jax.evaluation.mmeb import evaluator as mmeb
from metaembed_jax.flags import run_main
from metaembed_jax.mesh import make_mesh
from metaembed_jax.model import MetaEmbed
from metaembed_jax.sharding import named_sharding
from metaembed_jax.training.loop import train
from metaembed_jax.training.metrics import MetricsWriter
from tests.files.emulator import BUCKET


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path, bucket):
    return tmp_path if request.param == "disk" else files.any_path(f"{BUCKET}/{tmp_path.name}")


def test_a_file_is_replaced_whole_or_kept(folder):
    path = folder / "new" / "a.json"
    files.write_json(path, {"a": "text→image", "half of a pair": "\udc80"})
    assert files.read_json(path) == {"a": "text→image", "half of a pair": "\udc80"}
    with pytest.raises(KeyError), files.replacing(path) as file:
        file.write(b"half")
        raise KeyError
    assert files.read_json(path)["a"] == "text→image"
    with files.replacing(path) as file:
        file.write(b"[1]")
    with pytest.raises(UserError, match=r"a.json holds a list, not an object"):
        files.read_json(path)
    with pytest.raises(UserError, match=r"none.json cannot be read"):
        files.read_json(folder / "none.json")
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


def test_a_folder_is_replaced_whole_or_kept(folder):
    path = folder / "model"
    for content in (b"old", b"new"):
        with files.new_folder(path) as scratch:
            for name in ("README.md", "config.json", "a.bin", "sub/b.bin"):
                (scratch / name).parent.mkdir(exist_ok=True)
                (scratch / name).write_bytes(content)
            (scratch / f"{content.decode()}.bin").write_bytes(content)
    with pytest.raises(KeyError), files.new_folder(path) as scratch:
        raise KeyError
    assert sorted(entry.name for entry in path.iterdir()) == ["README.md", "a.bin", "config.json", "new.bin", "sub"]
    assert (path / "sub" / "b.bin").read_bytes() == b"new"


def test_what_is_no_file_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("", ".", "..", "/", "folder", "pipe"):
        with pytest.raises(UserError, match="it is a folder or a device"):
            files.write_bytes(files.any_path(name), b"x")
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_after_a_kill_of_a_process_with_the_same_id(tmp_path):
    torn = tmp_path / f".model.{os.getpid()}{files.PART}"
    torn.mkdir()
    (torn / "torn.bin").touch()
    with files.new_folder(tmp_path / "model") as scratch:
        (scratch / "a.bin").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "a.bin"]


def test_the_cache_is_at_an_absolute_path():
    assert files.cache_folder({"XDG_CACHE_HOME": "/x"}) == files.Path("/x/metaembed_jax")
    for relative in ("", "x", "gs://b/x"):
        assert files.cache_folder({"XDG_CACHE_HOME": relative}) == files.Path.home() / ".cache" / "metaembed_jax"


def test_what_makes_a_folder_a_model_is_uploaded_last(bucket, tmp_path, monkeypatch):
    names = ["README.md", "a.bin", "adapter_config.json", "config.json", "z.bin"]
    for name in names:
        (tmp_path / name).touch()
    sent, system = [], files.bucket_file_system()
    monkeypatch.setattr(system, "put_file", lambda path, goal: sent.append(goal.rpartition("/")[2]))
    files.upload(tmp_path, files.any_path(f"{BUCKET}/order"))
    assert sent == ["a.bin", "z.bin", "adapter_config.json", "config.json", "README.md"]


def test_lines_in_a_bucket_are_there_before_a_checkpoint_is(bucket):
    run = files.any_path(f"{BUCKET}/lines")

    def steps():
        return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_bytes().splitlines()]

    writer = MetricsWriter(run, 0, 10)
    for step in range(1, 5):
        writer.write(step, {"loss": 1.0})
    writer.flush()
    writer.write(5, {"loss": 1.0})
    assert steps() == [1, 2, 3, 4]  # where a kill would find it
    resumed = MetricsWriter(run, 3, 10)
    resumed.write(4, {"loss": 2.0})
    resumed.close()
    assert steps() == [1, 2, 3, 4]


def test_one_run_in_a_folder(folder, small_config):
    with short_leases(), lease.held(folder):
        with pytest.raises(UserError, match=rf"{folder.name} is being written by another run") as refused:
            train(small_config, folder)
        assert "\n" not in str(refused.value)
    with lease.held(folder):
        pass


@contextlib.contextmanager
def short_leases():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "RENEW", 0.2)
        patch.setattr(lease, "EXPIRE", 3.0)
        yield


def test_a_lease_is_renewed_and_expires(bucket, monkeypatch, capsys):
    run = files.any_path(f"{BUCKET}/leased")
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    holder = {"token": "a", "host": "elsewhere", "pid": int(dead.stdout), "machine": lease._machine()}
    with short_leases():
        files.write_bytes(run / "lock", json.dumps(holder).encode())
        with lease.held(run):  # a process of this machine that is gone
            assert capsys.readouterr().out == ""
        files.write_bytes(run / "lock", json.dumps(holder | {"machine": "another"}).encode())
        began = time.monotonic()
        with lease.held(run):
            assert time.monotonic() - began > 1
            assert f"by process {holder['pid']} of elsewhere; waiting up to" in capsys.readouterr().out
            with pytest.raises(UserError, match=f"another run, process {os.getpid()} of"), lease.held(run):
                pass
        lost = threading.Event()
        monkeypatch.setattr(os, "_exit", lambda code: lost.set())
        with lease.held(run):
            files.write_bytes(run / "lock", json.dumps(holder).encode())
            assert lost.wait(10)
        assert f"was taken over by process {holder['pid']} of elsewhere" in capsys.readouterr().err
    assert (run / "lock").exists()  # the other one's


def test_frozen_weights_are_kept_whole(bucket):
    run, mesh = files.any_path(f"{BUCKET}/frozen"), make_mesh(data=2, fsdp=4)
    kernel = jax.device_put(np.arange(64, dtype=np.float32).reshape(8, 8), named_sharding(mesh, ("embed", None)))
    frozen = {"backbone": {"kernel": kernel, "int8": kernel.astype("int8")}}
    files.write_bytes(run / BASE / "d" / "left_by_a_kill", b"x")
    assert not is_kept(run)
    keep(run, frozen)
    assert is_kept(run)
    other = make_mesh(data=1, fsdp=8)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named_sharding(other, ("embed", None))), frozen
    )
    assert fits(run / BASE, abstract)
    read = read_kept(run / BASE, abstract)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(read), jax.device_get(frozen))
    assert not fits(run / BASE, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "bfloat16"), abstract))
    files.write_bytes(run / BASE / "manifest.ocdbt", b"torn")
    with pytest.raises(UserError, match=r"frozen/base cannot be read .*remove it to read the base again"):
        read_kept(run / BASE, abstract)


class Refusing(BaseHTTPRequestHandler):
    """A bucket that answers reads with `reading`, and writes with 403."""

    reading = 200

    def do_GET(self):
        self.answer(404 if self.reading == 200 and "/o/" in self.path else self.reading)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(403)

    def answer(self, code):
        content = json.dumps({} if code == 200 else {"error": {"code": code, "message": "user has no\nstorage.objects access"}})
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_):
        pass


def test_vectors_of_a_benchmark_are_kept_in_a_bucket(bucket):
    class Model:
        calls = 0

        def encode_share(self, items, side, budget, progress):
            self.calls += 1
            return np.arange(3), np.full((3, budget, 2), self.calls, np.float32)

    model, cache = Model(), files.any_path(f"{BUCKET}/eval/mmeb/embeddings/task-key")
    first, again = (mmeb._encode(model, [], "query", 4, cache, False) for _ in range(2))
    assert model.calls == 1 and np.array_equal(first[1], again[1]) and again[1].shape == (3, 4, 2)
    assert [path.name for path in cache.parent.iterdir()] == ["task-key-query-0-of-1.npz"]


def test_what_is_wrong_with_a_bucket_is_one_line(bucket, small_config, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"gs://bucket/nothing is neither a run .* nor a Hugging Face model"):
        MetaEmbed.from_pretrained(f"{BUCKET}/nothing")
    nowhere = files.any_path("gs://none/run")
    for use in (lambda: train(small_config, nowhere), lambda: evaluate_checkpoint(small_config, nowhere, nowhere / "eval", None)):
        with pytest.raises(UserError, match=r"gs://none: no such bucket"):
            use()
    import gcsfs

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    system = gcsfs.GCSFileSystem(
        endpoint_url=f"http://127.0.0.1:{server.server_port}", token="anon", cache_timeout=0, skip_instance_cache=True
    )
    monkeypatch.setattr(files, "bucket_file_system", lambda: system)
    run = files.any_path(f"{BUCKET}/unwritable")
    files.check_bucket(run)
    for write in (lambda: lease.held(run).__enter__(), lambda: files.write_bytes(run / "a", b"")):
        with pytest.raises(UserError, match=r"cannot write gs://bucket/unwritable.*access is denied .*role Storage") as refused:
            write()
        assert "\n" not in str(refused.value)
    for code in (401, 403):
        monkeypatch.setattr(Refusing, "reading", code)
        with pytest.raises(UserError, match=r"gs://bucket: access is denied .*gcloud auth application-default login") as refused:
            train(small_config, run)
        assert "\n" not in str(refused.value)
        with pytest.raises(SystemExit):
            run_main(lambda argv: system.ls("gs://bucket/run"))  # where no line of ours expects it
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: gs://: access is denied")
    server.shutdown()


def test_torn_checkpoints_in_a_bucket(bucket):
    run = files.any_path(f"{BUCKET}/torn")
    files.write_json(run / "run.json", {})
    kernel = jax.device_put(np.arange(8, dtype=np.float32), named_sharding(make_mesh(), (None,)))
    abstract = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=kernel.sharding)

    def save(step):
        checkpoints = RunCheckpoints(run, keep=3)
        checkpoints.save(step, {"kernel": kernel + step}, {"m": kernel}, None)
        checkpoints.close()

    def restored(expected):
        checkpoints, lines = RunCheckpoints(run, keep=3), []
        step, parameters, _ = checkpoints.restore_latest({"kernel": abstract}, {"m": abstract}, lines.append)
        checkpoints.set_aside_after(step)
        checkpoints.close()
        assert step == expected and np.array_equal(parameters["kernel"], np.arange(8) + step)
        return lines

    save(1)
    (run / "checkpoints" / "1" / COMMITTED).unlink()  # killed before the last write
    assert not has_checkpoints(run)
    save(1)
    save(2)
    assert has_checkpoints(run) and restored(2) == []
    for path in files.bucket_file_system().find(f"{run}/checkpoints/2/parameters"):
        if "/d/" in path:
            files.write_bytes(files.any_path(f"gs://{path}"), b"damaged")
    (line,) = restored(1)
    assert "checkpoints/2 cannot be read" in line
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "2.unreadable"]
