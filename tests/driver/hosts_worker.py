"""Worker of test_two_hosts.py: hosts_worker.py OUT; writes OUT/report.json.

The processes of each host are forked from one with all modules loaded, so that a start takes a second or two.
torchrun's own behaviour is tested with real torchruns.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.hosts import ADDRESSES, NAMES, cut_cable, kill_host, mend_cable, move_to_host, two_hosts

from megatron_bicc import consistency as agreement
from megatron_bicc import device
from megatron_bicc.train import main

PORT = 29511
SETTINGS = [
    "--config",
    "examples/configs/tiny.yaml",
    "parallel.tensor=1",
    "parallel.pipeline=2",
    "parallel.heartbeat_timeout_s=8",
    "train.steps=4",
    "rollout.prompts_per_step=4",
    "evaluation.prompts=2",
    "evaluation.every=2",
    "evaluation.samples=1",
    "checkpoint.every=1",
    "checkpoint.resume=true",
    "monitoring.tensorboard=false",
]


def start(out: Path, rank: int, settings: tuple[str, ...] = (), local_port: int = 0) -> int:
    """Forks process `rank` of two, on a host of its own or, by a port, on this one; returns its id.

    Its stderr goes to OUT.rank.
    """
    child = os.fork()
    if child:
        return child
    status: object = 1
    try:
        os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0"}
        if local_port:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(local_port)}
        else:
            move_to_host(rank)
            os.environ |= {
                "MASTER_ADDR": ADDRESSES[0],
                "MASTER_PORT": str(PORT),
                "GLOO_SOCKET_IFNAME": "eth0",
            }
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(f"{out}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        main([*SETTINGS, f"output_dir={out}", *settings])
        status = 0
    except SystemExit as ended:
        status = ended.code
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(out: Path, children: list[int], seconds: float = 100) -> dict:
    """Exit statuses and stderr of two processes, and the seconds that they took; killed when time is up."""
    begin, statuses = time.monotonic(), {}
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses and (ended := os.waitpid(child, os.WNOHANG))[0]:
                statuses[child] = os.waitstatus_to_exitcode(ended[1])
        if time.monotonic() - begin > seconds:
            for child in set(children) - statuses.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    err = [Path(f"{out}.{rank}").read_text() for rank in range(2)]
    return {
        "status": [statuses[c] for c in children],
        "err": err,
        "seconds": time.monotonic() - begin,
    }


def address(out: Path, host: int) -> str:
    """A host's address as the host itself finds it."""
    child = os.fork()
    if not child:
        move_to_host(host)
        os.environ["MASTER_ADDR"] = ADDRESSES[0]
        out.write_text(device.node_address())
        os._exit(0)
    os.waitpid(child, 0)
    return out.read_text()


def both(out: Path, local_port: int = 0) -> dict:
    """A run of two processes to its end."""
    return wait(out, [start(out, rank, local_port=local_port) for rank in range(2)])


def wait_for_step(out: Path, step: int) -> None:
    """Until the run has finished that step."""
    for _ in range(6000):
        if (out / "metrics.jsonl").exists() and f'"step": {step}' in (out / "metrics.jsonl").read_text():
            return
        time.sleep(0.05)
    raise TimeoutError(f"{out}: step {step} never came")


def cut(out: Path) -> dict:
    """The cable is cut in mid-step; then it is whole again and the run goes on."""
    children = [start(out, rank) for rank in range(2)]
    wait_for_step(out, 2)
    cut_cable()
    found = {"cut": wait(out, children)}
    mend_cable()
    return found | {"cut_resumed": both(out)}


def torchrun(out: Path, host: int) -> subprocess.Popen:
    """A host's torchrun, as a user starts it."""
    command = ["ip", "netns", "exec", NAMES[host], sys.executable, "-W", "ignore"]
    command += [
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--max-restarts",
        "3",
    ]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv-id", "job"]
    command += ["--rdzv-conf", f"is_host={host == 0}", "--local-addr", ADDRESSES[host]]
    command += ["-m", "megatron_bicc.train", *SETTINGS, f"output_dir={out}"]
    with open(f"{out}.torchrun{host}", "a") as log:
        # with its shared store torchrun never tells a host that joins later where to meet
        env = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return subprocess.Popen(command, env=env, stdout=log, stderr=log)


def kill_one_host(out: Path) -> dict:
    """A host dies in mid-run and comes back; torchrun starts the run again."""
    survivor, victim = torchrun(out, 0), torchrun(out, 1)
    wait_for_step(out, 2)
    kill_host(1)
    victim.wait()
    back = torchrun(out, 1)
    statuses = [survivor.wait(timeout=300), back.wait(timeout=100)]
    return {"status": statuses, "err": [Path(f"{out}.torchrun{host}").read_text() for host in range(2)]}


def other_code(out: Path) -> dict:
    """Process 1 has another version of a source file."""
    children = [start(out, 0)]
    copy, own = out.with_name("other_code"), agreement.PACKAGE
    shutil.copytree(own, copy)
    with (copy / "training/learner.py").open("a") as file:
        file.write("# another version\n")
    agreement.PACKAGE = copy
    children.append(start(out, 1))
    agreement.PACKAGE = own
    return wait(out, children)


def other_settings(out: Path) -> dict:
    """Process 1 has another learning rate."""
    return wait(out, [start(out, 0), start(out, 1, ("optimizer.lr=2e-4",))])


def port_taken(out: Path) -> dict:
    """Another program listens where the processes want to meet."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        Path(f"{out}.1").touch()
        port = other.getsockname()[1]
        return wait(out, [start(out, 0, local_port=port)]) | {"port": port}


def free_port() -> int:
    """A port of this host that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    report: dict = {"one_host": both(directory / "one_host", free_port())}
    report["port_taken"] = port_taken(directory / "port_taken")
    with two_hosts():
        report["addresses"] = [address(directory / "address", host) for host in range(2)]
        report["two_hosts"] = both(directory / "two_hosts")
        report |= cut(directory / "cut")
        report["other_code"] = other_code(directory / "other_code_run")
        report["other_settings"] = other_settings(directory / "other_settings")
        report["killed"] = kill_one_host(directory / "killed")
    (directory / "report.json").write_text(json.dumps(report))
