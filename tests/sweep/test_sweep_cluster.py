"""Sweeps on a Ray cluster: they write what one process writes, whoever dies meanwhile."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import yaml
from helpers.page_commands import blocks, commands
from helpers.sweeps import assert_same_tables, configured, swept, tables

from causalcone.engine.errors import ExperimentError, ModelError
from causalcone.runners.results.folder import ResultError
from causalcone.runners.results.store import Store
from causalcone.runners.sweep.cluster import ray_executor as cluster
from causalcone.runners.sweep.cluster.ray_connection import Share, connected_ray, share
from causalcone.runners.sweep.cluster.ray_executor import executors
from causalcone.runners.sweep.executor import Stop
from causalcone.runners.sweep.stages import FilterStage
from causalcone.runners.sweep.worker import Worker

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

FEW = ("sever=none", "gradients=none", 'edit.methods=["rome","finetune:1"]', 'edit.problems=["error_injection"]')
DEADLY = "edit/error_injection/rome-1/00001"


@pytest.fixture(scope="module")
def whole(file, tmp_path_factory):
    """A sweep of this process alone."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert swept(file, out, *FEW).status == "complete"
    return tables(out)


@pytest.fixture(scope="module")
def two():
    """A cluster with room for two workers, which executors find connected."""
    with connected_ray("local", 2):
        yield
    assert not ray.is_initialized()


def swept_by(file, out, *changes, make=Worker, **options):
    with executors("local", 2, make) as make_executor:
        return swept(file, out, *FEW, *changes, make_executor=make_executor, **options)


def worker_processes(pid=None):
    """Processes of workers below this one, or another."""
    return [each for each in psutil.Process(pid).children(recursive=True) if each.name().startswith("ray::RayWorker")]


def dying(folder, name, times):
    """What makes workers that kill themselves at a unit, so many times altogether."""

    def make(sweep, place):
        class Dying(Worker):
            def run(self, unit):
                deaths = len(list(folder.glob("death*")))
                if unit.name == name and deaths < times:
                    (folder / f"death{deaths}").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().run(unit)

        return Dying(sweep, place)

    return make


def overridden(**methods):
    """What makes workers with methods of their own."""
    return lambda sweep, place: type("Other", (Worker,), methods)(sweep, place)


def test_two_workers_write_what_one_process_writes(file, whole, two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    finished = swept_by(file, "out")
    assert (finished.status, finished.computed) == ("complete", 18)
    assert_same_tables(tables(tmp_path / "out"), whole)
    assert swept_by(file, tmp_path / "out").computed == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_relative_paths_of_the_configuration(file, whole, two, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    names = ("model=model", "facts=full.jsonl", "contexts=contexts.json", "moments.file=moments.safetensors")
    assert swept_by(file, tmp_path / "out", *names).status == "complete"
    assert_same_tables(tables(tmp_path / "out"), whole)


def test_a_dead_worker_is_replaced_and_its_unit_done_again(file, whole, two, tmp_path):
    with pytest.warns(UserWarning, match=f"ended at {DEADLY}, which is done again: Worker unexpectedly exits"):
        finished = swept_by(file, tmp_path / "out", make=dying(tmp_path, DEADLY, 1))
    assert (finished.status, finished.computed) == ("complete", 18)
    assert_same_tables(tables(tmp_path / "out"), whole)


def test_a_unit_that_kills_its_workers_fails_and_the_others_are_there(file, whole, two, tmp_path):
    out = tmp_path / "out"
    with pytest.warns(UserWarning, match="a worker on"):
        finished = swept_by(file, out, make=dying(tmp_path, DEADLY, 99))
    assert len(list(tmp_path.glob("death*"))) == cluster.TRIES
    assert (finished.status, finished.computed) == ("incomplete", 17)
    ((unit, reason),) = [(each.unit.name, each.reason) for each in finished.failed]
    assert unit == DEADLY
    assert reason.startswith("3 workers ended at it, the last on ")
    assert "Worker unexpectedly exits" in reason
    assert "\n" not in reason
    assert swept_by(file, out, retry_failed=True).status == "complete"
    assert_same_tables(tables(out), whole)


def test_no_unit_begins_when_it_is_to_stop(file, two, tmp_path):
    def slow(self, unit):
        time.sleep(0.5)
        return 0.5

    sweep, stop = configured(file, "units.facts=1"), Stop()
    store = Store.open(tmp_path)
    units = FilterStage(sweep, sweep.filter).all_units(6).units
    make = overridden(run=slow)
    with store.locked(), executors("local", 2, make) as make_executor, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster.RayExecutor, "_wait_for_files", lambda self, unit: None)
        executor = make_executor(sweep, str(tmp_path))
        executor.model_info()
        while not all(worker.free for worker in executor._workers):
            for worker in executor._finished():
                executor._note_start(worker)
        run = executor.run(units, stop)
        done = [next(run).unit]
        stop.signal = signal.SIGINT
        done += [outcome.unit for outcome in run]
        assert 1 < len(done) < 4
        left = worker_processes()
        assert len(left) == 2
    assert psutil.wait_procs(left, timeout=10)[1] == []


def test_results_that_cannot_be_written_end_it(file, two, tmp_path):
    def full(self, unit):
        if unit.stage == "trace":
            raise ResultError("cannot write traces: No space left on device")
        return Worker.run(self, unit)

    with pytest.raises(ResultError) as caught:
        swept_by(file, tmp_path / "out", make=overridden(run=full))
    assert str(caught.value) == "cannot write traces: No space left on device"
    assert psutil.wait_procs(worker_processes(), timeout=10)[1] == []


def test_units_that_raise_fail_alone(file, two, tmp_path):
    def broken(self, unit):
        if unit.name == DEADLY:
            raise RuntimeError("the device is on fire")
        return Worker.run(self, unit)

    finished = swept_by(file, tmp_path / "out", make=overridden(run=broken))
    assert [each.reason for each in finished.failed] == ["RuntimeError: the device is on fire"]
    assert "raise RuntimeError" in (tmp_path / "out" / "sweep.log").read_text()


def test_a_model_that_is_not_there(file, two, tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        swept_by(file, tmp_path / "out", f"model={tmp_path / 'nowhere'}")


def test_results_that_are_not_seen_here(file, two, tmp_path, monkeypatch):
    """As of workers that write to a folder of the same name on their own machine."""
    monkeypatch.setattr(cluster, "SEEN_SECONDS", 0.0)
    with pytest.raises(ResultError, match=r"filter/0000. was computed, and its files are not in .* all machines share"):
        swept_by(file, tmp_path / "out", make=overridden(run=lambda self, unit: 0.0))
    elsewhere = str(tmp_path / "elsewhere")
    with pytest.raises(ResultError, match=r"is another folder on .* give a path that all machines share"):
        swept_by(file, tmp_path / "other", make=lambda sweep, place: Worker(sweep, elsewhere))


def test_a_worker_with_another_model_is_sent_away(file, whole, two, tmp_path):
    """It begins when the first one works, which goes on when the other one is not taken any more."""
    works, last = tmp_path / "works", tmp_path / f"begun{cluster.TRIES}"

    def wait_for(path):
        until = time.monotonic() + 120
        while not path.exists():
            assert time.monotonic() < until
            time.sleep(0.1)

    def model_info(self):
        found = Worker.model_info(self)
        for number in itertools.count():
            with suppress(FileExistsError):
                (tmp_path / f"begun{number}").touch(exist_ok=False)
                break
        if number == 0:
            return found
        wait_for(works)
        return dataclasses.replace(found, fingerprint="other")

    def run(self, unit):
        works.touch()
        wait_for(last)
        return Worker.run(self, unit)

    with pytest.warns(UserWarning, match=r"cannot begin, and 1 are left: .* has another model than"):
        finished = swept_by(file, tmp_path / "out", make=overridden(model_info=model_info, run=run))
    assert finished.status == "complete"
    assert_same_tables(tables(tmp_path / "out"), whole)


# --- the command line ---


def command(file, *flags):
    changes = [part for change in FEW for part in ("--set", change)]
    return [sys.executable, "-m", "causalcone", "sweep", str(file), "--out", "out", *changes, *flags]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_ends_takes_its_workers_along_and_goes_on(file, whole, tmp_path, number):
    """Ctrl-C reaches every process of the terminal, SIGTERM and SIGKILL only the driver."""
    arguments = command(file, "--cluster", "local", "--workers", "2")
    first = subprocess.Popen(
        arguments, cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until = time.monotonic() + 120
    while not list((tmp_path / "out").glob("traces/*/part-*")):
        assert time.monotonic() < until
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.05)
    left = worker_processes(first.pid)
    assert len(left) == 2
    if number == signal.SIGINT:
        os.killpg(first.pid, number)
    else:
        os.kill(first.pid, number)
    printed, _ = first.communicate(timeout=60)
    assert first.returncode == (-number if number == signal.SIGKILL else 128 + number), printed
    assert psutil.wait_procs(left, timeout=10)[1] == []
    if number == signal.SIGKILL:
        return
    assert "stopping after what is running now" in printed
    assert "Traceback" not in printed
    again = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr) == (0, "")
    assert "raylet" not in again.stdout
    assert "complete after" in again.stdout
    assert_same_tables(tables(tmp_path / "out"), whole)


def test_the_commands_of_the_page(file, whole, tmp_path, run):
    """Two workers on a cluster that the command starts; a study of its own in place of the page's."""
    found = commands("docs/cluster.md")
    assert len(found) == 3
    for number, arguments in enumerate(found):
        given = [str(file) if each in ("mine.toml", "/data/mine.toml", "hase2023-gptj") else each for each in arguments]
        kept = [each for each in given if not each.startswith(("facts=", "moments.")) and each != "--set"]
        kept[kept.index("--out") + 1] = str(tmp_path / f"out{number}")
        if "--workers" in kept:
            kept[kept.index("--workers") + 1] = "2"
        code, _, error = run(*kept, *[part for change in FEW for part in ("--set", change)])
        assert code == 0, error
        assert_same_tables(tables(tmp_path / f"out{number}"), whole)


def test_scripts_of_the_page_can_be_read(tmp_path):
    script, job = blocks("docs/cluster.md", "bash"), blocks("docs/cluster.md", "yaml")
    (tmp_path / "job.sh").write_text(*script)
    assert subprocess.run(["bash", "-n", "job.sh"], cwd=tmp_path, check=False).returncode == 0
    workers = yaml.safe_load(*job)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert workers[0]["replicas"] == 8


def test_a_cluster_that_does_not_answer(file, tmp_path):
    found = subprocess.run(
        command(file, "--cluster", "127.0.0.1:1"), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert "no Ray cluster can be used at 127.0.0.1:1" in found.stderr
    assert "Traceback" not in found.stderr


def test_ray_is_missing(file, tmp_path, monkeypatch, run):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, error = run("sweep", file, "--out", tmp_path / "out", "--cluster", "local")
    assert (code, "pip install 'causalcone[cluster]'" in error) == (2, True)
    code, _, error = run("sweep", file, "--out", tmp_path / "out", "--workers", "2")
    assert (code, "--workers says how many work on a cluster" in error) == (2, True)


# --- who gets what ---


@pytest.mark.parametrize(
    ("machines", "workers", "device", "expected"),
    [
        ([{"CPU": 2.0}], None, None, Share(1, 2, 0, 1, 1)),
        ([{"CPU": 1.0}], None, None, Share(1, 1, 0, 1, 1)),
        ([{"CPU": 5.0}, {"CPU": 4.0}], None, None, Share(4, 2, 0, 4, 2)),
        ([{"CPU": 1.0}, {"CPU": 1.0}], None, None, Share(2, 1, 0, 2, 1)),
        ([{"CPU": 8.0}], 2, None, Share(2, 4, 0, 2, 2)),
        ([{"CPU": 8.0}, {"CPU": 2.0}], 2, None, Share(2, 4, 0, 2, 2)),
        ([{"CPU": 2.0}], 3, None, Share(3, 1, 0, 2, 2)),
        ([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 8.0}], None, None, Share(4, 4, 1, 4, 4)),
        ([{"CPU": 2.0, "GPU": 4.0}], None, "cuda", Share(4, 0, 1, 4, 4)),
        ([{"CPU": 16.0, "GPU": 4.0}], 2, "cuda:1", Share(2, 4, 1, 4, 4)),
        ([{"CPU": 4.0, "GPU": 4.0}], None, "cpu", Share(2, 2, 0, 2, 2)),
    ],
)
def test_shares_of_a_cluster(machines, workers, device, expected):
    assert share(machines, workers, device) == expected


def test_a_gpu_that_is_nowhere():
    with pytest.raises(ExperimentError, match="device is 'cuda', and no machine of the cluster has a GPU"):
        share([{"CPU": 8.0}], None, "cuda")


def test_without_a_cluster_this_process_computes():
    with executors(None) as make_executor:
        assert make_executor is None
