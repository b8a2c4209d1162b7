"""Tests runs on two simulated hosts: network namespaces, a link between them, and its failures."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import warm
from support.hosts import ADDRESSES, why_not

WORKER = Path(__file__).with_name("hosts_worker.py")
pytestmark = [pytest.mark.skipif(bool(reason := why_not()), reason=reason), pytest.mark.timeout(620)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What hosts_worker.py reports: the directory as "out", and scenario: {"status": [..], "err": [..]}."""
    out = tmp_path_factory.mktemp("hosts")
    done = warm.run([WORKER, out], timeout_s=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "report.json").read_text()) | {"out": out}


def same_run(ours: Path, theirs: Path) -> bool:
    """Whether two runs wrote the same metrics and weights, to the bit; times differ from run to run."""
    records = []
    for out in (ours, theirs):
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        records.append([{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines])
    one, other = (load_file(out / "hf/model.safetensors") for out in (ours, theirs))
    return records[0] == records[1] and all(torch.equal(one[name], other[name]) for name in other)


def test_two_hosts_are_as_good_as_one(found: dict) -> None:
    for name in ("one_host", "two_hosts"):
        assert found[name]["status"] == [0, 0], found[name]["err"]
    assert same_run(found["out"] / "two_hosts", found["out"] / "one_host")


def test_a_host_knows_its_address_on_the_network_of_the_others(found: dict) -> None:
    assert found["addresses"] == list(ADDRESSES)


def test_a_cut_cable_is_named_on_both_sides(found: dict) -> None:
    """In under a minute, without a hang; parallel.heartbeat_timeout_s is 8 here."""
    assert found["cut"]["seconds"] < 60
    here, there = found["cut"]["err"]
    assert "process 1 on host" in here and "is silent for 8 seconds" in here
    assert "the rendezvous store at 10.213.77.1:29511 does not answer for 8 seconds" in there
    assert 0 not in found["cut"]["status"]


def test_the_checkpoint_survives_the_cut(found: dict) -> None:
    assert found["cut_resumed"]["status"] == [0, 0], found["cut_resumed"]["err"]
    assert same_run(found["out"] / "cut", found["out"] / "one_host")


def test_a_host_that_is_killed_comes_back(found: dict) -> None:
    """torchrun starts the run again, and it ends as if nothing had happened."""
    assert found["killed"]["status"] == [0, 0], found["killed"]["err"]
    assert "lost the connection to another process" in found["killed"]["err"][0]
    assert same_run(found["out"] / "killed", found["out"] / "one_host")


def test_a_port_that_is_taken_is_named(found: dict) -> None:
    assert found["port_taken"]["status"] == [2]
    (err, _), port = found["port_taken"]["err"], found["port_taken"]["port"]
    assert f"MASTER_ADDR:MASTER_PORT is 127.0.0.1:{port}; process 0" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("scenario", "what"),
    [
        ("other_code", "code megatron_bicc/training/learner.py: "),
        ("other_settings", "setting optimizer.lr: 0.0001 against 0.0002"),
    ],
)
def test_hosts_that_differ_are_refused(found: dict, scenario: str, what: str) -> None:
    assert found[scenario]["status"] == [2, 2]
    err = found[scenario]["err"][0]
    assert "run different code or settings: " + what in err
    assert "Traceback" not in err
    assert not (found["out"] / scenario / "metrics.jsonl").exists()
