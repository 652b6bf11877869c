"""Two nodes on one machine: torchrun --nnodes=1:2, of which one is killed and joins again.

python tests/campaign/nodes.py [--shard=fsdp] [--seed=0]

Each node is a torchrun in a network namespace of its own (root is needed; without, both are on the
loopback), with one process; they meet over TCP. The second is killed with all its processes, the
first goes on alone from last.pt, the second comes back and joins. What is left at the end must be
as near to an undisturbed run of two processes as one of one process is, within a factor of 3: both
add numbers up in another order, and 120 steps of this small run enlarge that.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from kills import CASES, make_data
from ranks import furthest, left_over, weights_gap, workers

SPACES = ("gosling-a", "gosling-b")
ADDRESSES = {True: ("10.99.0.1", "10.99.0.2"), False: ("127.0.0.1", "127.0.0.1")}


def make_namespaces():
    """Two network namespaces with a cable between them -> whether that is allowed."""
    commands = [f"ip netns add {space}" for space in SPACES]
    commands.append(
        f"ip link add name va netns {SPACES[0]} type veth peer name vb netns {SPACES[1]}"
    )
    for space, link, address in zip(SPACES, ("va", "vb"), ADDRESSES[True], strict=True):
        commands += [
            f"ip -n {space} addr add {address}/24 dev {link}",
            f"ip -n {space} link set {link} up",
            f"ip -n {space} link set lo up",
        ]
    for command in commands:
        if subprocess.run(command.split(), capture_output=True).returncode:
            return False
    return True


def remove_namespaces():
    for space in SPACES:
        subprocess.run(["ip", "netns", "del", space], capture_output=True)


def node(number, in_spaces, words, log):
    """One node's torchrun -> the process, with a group of its own."""
    space = ["ip", "netns", "exec", SPACES[number]] if in_spaces else []
    # Without it torch 2.13 does not tell a node that joins later where the first one's store is.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    if in_spaces:
        env["GLOO_SOCKET_IFNAME"] = ("va", "vb")[number]
    line = [*space, sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2"]
    line += ["--nproc_per_node=1", "--max-restarts=9", "--rdzv_backend=c10d", "--rdzv_id=gosling"]
    line += [
        f"--rdzv_endpoint={ADDRESSES[in_spaces][0]}:29400",
        f"--rdzv_conf=is_host={1 - number}",
    ]
    line += [f"--local_addr={ADDRESSES[in_spaces][number]}"]
    with open(log, "a") as out:
        return subprocess.Popen([*line, *words], cwd=ROOT, env=env, stdout=out, stderr=out)


def wait_for(what, seconds=300):
    until = time.monotonic() + seconds
    while not what():
        if time.monotonic() > until:
            sys.exit("it does not happen")
        time.sleep(0.1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shard", default="none", choices=["none", "fsdp"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, rng = Path(tempfile.mkdtemp(prefix="gosling-nodes-")), random.Random(args.seed)
    make_data(folder)
    in_spaces = os.geteuid() == 0 and make_namespaces()
    print("two network namespaces" if in_spaces else "two agents on the loopback", flush=True)
    words = CASES["sft"].replace("W/", f"{folder}/").split()
    words += ["--max_steps=120", "--eval_every=0", "--lr=1e-4", "--lr_final=1e-5"]
    words += ["--adam_eps=1e-4", f"--shard={args.shard}"]
    words += ["--resume=auto", "--hang_minutes=0.2"]
    whole, alone, out = folder / "whole", folder / "alone", folder / "out"
    for nproc, place in ((2, whole), (1, alone)):
        line = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={nproc}"]
        line += ["--master_port=29401", *words, f"--out_dir={place}"]
        with open(place.with_suffix(".log"), "w") as log:
            subprocess.run(line, cwd=ROOT, stdout=log, stderr=log, check=True)
    words.append(f"--out_dir={out}")
    logs = [folder / "a.log", folder / "b.log"]
    first = node(0, in_spaces, words, logs[0])
    time.sleep(1)
    second = node(1, in_spaces, words, logs[1])
    try:
        wait_for(lambda: furthest(out) >= rng.randint(15, 30))
        for pid in [second.pid, *workers(second)]:  # workers have sessions of their own
            os.kill(pid, signal.SIGKILL)
        second.wait()
        at = furthest(out)
        print(f"second node killed at step {at}", flush=True)
        wait_for(lambda: furthest(out) >= at + 10)
        print(f"the first alone is at step {furthest(out)}", flush=True)
        second = node(1, in_spaces, words, logs[1])
        ends = [first.wait(600), second.wait(600)]
    finally:
        for process in (first, second):
            if process.poll() is None:
                for pid in [process.pid, *workers(process)]:
                    os.kill(pid, signal.SIGKILL)
        remove_namespaces()
    sizes = [text.count("cpu x 2") for text in (log.read_text() for log in logs)]
    gap, limit, left = weights_gap(whole, out), 3 * weights_gap(whole, alone), left_over(folder)
    print(f"ends {ends}, times in a world of 2 {sizes}, left {left}")
    print(f"largest difference of a weight {gap:.1e}, allowed {limit:.1e}")
    is_good = ends == [0, 0] and gap < limit and not left
    if is_good:
        shutil.rmtree(folder)
    else:
        print(f"look at {folder}")
    sys.exit(int(not is_good))


if __name__ == "__main__":
    main()
