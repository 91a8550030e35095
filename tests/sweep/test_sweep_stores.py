"""Where sweeps can be kept: local folders, and other file systems that Arrow or fsspec know."""

import json
import socket
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from helpers.sweeps import assert_same_tables, swept, tables, write_sweep

from causalcone.runners.results import store as stores
from causalcone.runners.results.folder import ResultError
from causalcone.runners.results.store import Store
from causalcone.runners.sweep.status import status_of

TABLE = pa.table({"x": [1, 2, 3]})


@pytest.fixture(scope="module")
def s3():
    """The address of a bucket on a local server that speaks S3."""
    pytest.importorskip("moto.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    endpoint = f"127.0.0.1:{port}"
    system = pafs.S3FileSystem(
        access_key="key", secret_key="secret", endpoint_override=endpoint, scheme="http", region="us-east-1",
        allow_bucket_creation=True,
    )  # fmt: skip
    try:
        for _ in range(100):
            try:
                system.create_dir("bucket")
                break
            except OSError:
                time.sleep(0.1)
        yield f"s3://key:secret@bucket/{{}}?endpoint_override={endpoint}&scheme=http&region=us-east-1"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(params=["local", "memory", "s3"])
def place(request, tmp_path):
    """An address nobody has used."""
    name = request.node.name.replace("[", "-").replace("]", "")
    if request.param == "local":
        return str(tmp_path / "store")
    if request.param == "memory":
        return f"memory://{name}"
    return request.getfixturevalue("s3").format(name)


def test_files_are_there_as_they_were_written(place, tmp_path):
    store = Store.open(place)
    assert (store.names(), store.read_json("a.json"), store.part("t/p.parquet")) == ([], None, None)
    store.write_table("t/p.parquet", TABLE, {"unit": "u"})
    store.write_json("a.json", {"é": [1]})
    store.write_table("t/deep/q.parquet", TABLE.slice(1), {})
    (tmp_path / "file").write_bytes(b"content")
    store.put("b/file", tmp_path / "file")
    assert store.names() == ["a.json", "b/file", "t/deep/q.parquet", "t/p.parquet"]
    assert store.names("t") == ["t/deep/q.parquet", "t/p.parquet"]
    assert store.read_json("a.json") == {"é": [1]}
    assert (store.part("t/p.parquet").rows, store.part("t/p.parquet").notes) == (3, {"unit": "u"})
    assert store.read_table("t/p.parquet").equals(TABLE)
    with store.as_file("b/file") as file:
        assert file.read_bytes() == b"content"
    store.write_table("t/p.parquet", TABLE.slice(2), {})
    assert store.part("t/p.parquet").rows == 1
    store.delete("t/p.parquet")
    store.delete("t/p.parquet")
    assert (store.exists("t/p.parquet"), store.exists("a.json")) == (False, True)


def test_half_a_file_is_none(place):
    store = Store.open(place)
    store.write_table("p.parquet", TABLE, {})
    with store.as_file("p.parquet") as file:
        content = file.read_bytes()
    store.write_bytes("p.parquet", content[:-5])
    store.write_bytes("a.json", b'{"a": ')
    store.write_bytes("empty.parquet", b"")
    assert [store.part(name) for name in ("p.parquet", "empty.parquet")] == [None, None]
    assert store.read_json("a.json") is None


def test_one_process_at_a_time(place):
    with Store.open(place).locked(), pytest.raises(ResultError, match="at work in"), Store.open(place).locked():
        pass
    with Store.open(place).locked():
        pass


def test_a_lease_that_was_left_ends(monkeypatch):
    store = Store.open("memory://lease")
    store.write_json("sweep.lock", {"id": "x", "host": "far", "process": 7, "time": time.time() - 100})
    with pytest.raises(ResultError, match="process 7 on far is at work"), store.locked():
        pass
    monkeypatch.setattr(stores, "LOCK_SECONDS", 20.0)
    with store.locked():
        assert store.read_json("sweep.lock")["process"] != 7


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    store = Store.open(tmp_path)
    store.write_json("a.json", 1)

    def write(sink):
        sink.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ResultError, match=r"cannot write a.json .*: No space left on device"):
        store._write("a.json", write)
    assert json.loads((tmp_path / "a.json").read_text()) == 1
    assert not list((tmp_path / ".partial").iterdir())


def test_addresses_that_nobody_knows():
    with pytest.raises(ResultError, match="on no file system that is known here"):
        Store.open("gopher://hole/x")


@pytest.mark.slow
def test_a_sweep_in_a_bucket(s3, folder, tmp_path):
    """The same tables as on a disk; it goes on there too."""
    file, local, place = write_sweep(folder), tmp_path / "local", s3.format("study")
    changes = ("trace.states=['mlp:3']", "sever=none", "gradients=none", 'edit.methods=["rome"]', "edit.essence=false")
    swept(file, local, *changes)
    assert swept(file, place, *changes).status == "complete"
    assert status_of(place).status == "complete"
    store, copy = Store.open(place), tmp_path / "copy"
    for name in store.names():
        with store.as_file(name) as found:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(found.read_bytes())
    assert_same_tables(tables(copy), tables(local), 1e-9)
    assert "sweep.lock" not in store.names()
    store.delete("edits/error_injection/rome-1/part-00001.parquet")
    assert swept(file, place, *changes).computed == 1
    assert "going on" in (copy / "sweep.log").read_text() or store.exists("sweep.log")
