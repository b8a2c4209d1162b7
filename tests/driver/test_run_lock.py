"""Tests that one run at a time uses a directory: refusals, takeovers, races."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_bicc import run_lock
from megatron_bicc.errors import UserError
from megatron_bicc.run_lock import FILE, RunLock

REPOSITORY = Path(__file__).parents[2]
BEAT_S, SILENCE_S = 0.05, 0.6
HOLDER = """
import sys
from pathlib import Path
from megatron_bicc import run_lock
run_lock.BEAT_S = 3600  # the main thread is to find out
run_lock.hold(sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
run_lock.check()
(Path(sys.argv[1]) / "metrics.jsonl").touch()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "GRACE_S", 0.2)


@pytest.fixture
def locks(tmp_path: Path) -> Iterator[list[RunLock]]:
    """Two newcomers to one directory."""
    both = [RunLock(tmp_path, BEAT_S, SILENCE_S) for _ in range(2)]
    yield both
    for lock in both:
        lock.release()


def leave(directory: Path, **changes: object) -> Path:
    """The lock of a run with this process's id and these changes."""
    holder = replace(RunLock(directory)._own, **changes)
    (directory / FILE).write_text(json.dumps(asdict(holder) | {"count": 1}))
    return directory / FILE


def holder_in(directory: Path) -> subprocess.Popen:
    """A process that holds the lock, and at a line on its stdin wants to write."""
    command = [sys.executable, "-c", HOLDER, str(directory)]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    pipe = subprocess.PIPE
    started = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert started.stdout.readline() == "held\n"
    return started


def test_a_run_on_this_host_is_named_and_its_death_frees_the_directory_at_once(
    tmp_path: Path, locks: list[RunLock]
) -> None:
    started = holder_in(tmp_path)
    named = f"{tmp_path} is in use by process {started.pid} on host {os.uname().nodename}, which .* since 20"
    with pytest.raises(UserError, match=named):
        locks[0].acquire()
    with pytest.raises(UserError, match=named):
        run_lock.refuse_if_alive(str(tmp_path))
    # suspended is not dead
    started.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match=named):
        locks[0].acquire()
    started.kill()
    os.waitid(os.P_PID, started.pid, os.WEXITED | os.WNOWAIT)  # leaves it a zombie
    begin = time.monotonic()
    run_lock.refuse_if_alive(str(tmp_path))
    locks[0].acquire()
    assert time.monotonic() - begin < run_lock.SILENCE_S / 2
    started.communicate()


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "other"},
        {"machine": "other boot"},
        {"machine": ""},
    ],
)
def test_elsewhere_the_count_tells(changes: dict, tmp_path: Path, locks: list[RunLock]) -> None:
    """On another host, after a restart, in another container: even if there is a process of that id here."""
    path, stop = leave(tmp_path, **changes), threading.Event()

    def count() -> None:
        for number in range(2, 1000):
            if stop.wait(3 * BEAT_S):
                return
            path.write_text(json.dumps(json.loads(path.read_text()) | {"count": number}))

    thread = threading.Thread(target=count)
    thread.start()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on host"):
        locks[0].acquire()
    stop.set()
    thread.join()
    begin = time.monotonic()
    locks[0].acquire()
    assert time.monotonic() - begin >= SILENCE_S
    with pytest.raises(UserError, match="in use by"):
        locks[1].acquire()


@pytest.mark.parametrize("text", ["", "{", '{"pid": 1}', "[]", "null"])
def test_a_lock_that_power_failed_on_is_taken_over(text: str, tmp_path: Path, locks: list[RunLock]) -> None:
    (tmp_path / FILE).write_text(text)
    locks[0].acquire()


@pytest.mark.parametrize("changes", [{"start": 1}, {"pid": 2**22 + 1}], ids=["id-used-again", "no-such-id"])
def test_a_process_of_this_host_that_ended_is_no_run(
    changes: dict, tmp_path: Path, locks: list[RunLock]
) -> None:
    leave(tmp_path, **changes)
    begin = time.monotonic()
    locks[0].acquire()
    assert time.monotonic() - begin < SILENCE_S


@pytest.mark.parametrize("changes", [{"start": 1}, {"host": "other"}])
def test_of_many_newcomers_one_gets_it(changes: dict, tmp_path: Path) -> None:
    """All at once: most have seen the old lock left behind before the first takes it over."""
    for number in range(2):
        directory = tmp_path / str(number)
        directory.mkdir()
        leave(directory, **changes)
        go, end = time.monotonic() + 0.3, tmp_path / f"end_{number}"
        children = {fork_newcomer(directory, go, end) for _ in range(8)}
        statuses, deadline = [], time.monotonic() + 60
        # the one that holds the lock lives until the others have ended: they may take it over from a dead one
        while len(statuses) < 8 and time.monotonic() < deadline:
            if len(statuses) == 7:
                end.touch()
            for child in list(children):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    children.remove(child)
                    statuses.append(os.waitstatus_to_exitcode(status))
            time.sleep(0.01)
        end.touch()
        statuses += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(statuses) == [0] + 7 * [2]
        assert [path.name for path in directory.iterdir()] == [FILE]


def fork_newcomer(directory: Path, go: float, end: Path) -> int:
    """Forks a process that acquires the lock at time `go`; returns its id.

    Its status is 0 if it gets the lock and still has it when the file `end` is there.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        time.sleep(max(0, go - time.monotonic()))
        lock = RunLock(directory, BEAT_S, SILENCE_S)
        with contextlib.redirect_stderr(None):
            lock.acquire()
        while not end.exists():
            time.sleep(0.02)
        lock.check()
        status = 0
    except UserError:
        status = 2
    finally:
        os._exit(status)


def test_a_run_whose_lock_was_taken_writes_nothing_more(tmp_path: Path) -> None:
    started = holder_in(tmp_path)
    # written aside and renamed, as a newcomer does
    draft = tmp_path / "draft"
    draft.write_text(json.dumps(asdict(replace(RunLock(tmp_path)._own, host="other", pid=77)) | {"count": 1}))
    draft.rename(tmp_path / FILE)
    _, err = started.communicate("write\n", timeout=20)
    assert started.returncode == run_lock.EXIT_STATUS
    assert f"{tmp_path} was taken over by process 77 on host other" in err
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert '"other"' in (tmp_path / FILE).read_text()


def test_the_lock_goes_with_its_run_and_comes_back_if_deleted(tmp_path: Path) -> None:
    started = holder_in(tmp_path)
    (tmp_path / FILE).unlink()
    _, err = started.communicate("write\n", timeout=20)
    assert (started.returncode, err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_count_moves_while_the_lock_is_held(tmp_path: Path, locks: list[RunLock]) -> None:
    locks[0].acquire()
    counts = set()
    for _ in range(20):
        counts.add(json.loads((tmp_path / FILE).read_text())["count"])
        time.sleep(BEAT_S)
    assert len(counts) > 3
    locks[0].release()
    assert not (tmp_path / FILE).exists()


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"/file/run cannot be written: Not a directory$"):
        run_lock.hold(str(tmp_path / "file/run"))
