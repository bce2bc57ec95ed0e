"""Work in several processes of one group.

Those of `in_processes` are forked from this one, which is quick; a command's are torchrun's.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable

from armour_surgery.recover.distributed import Process, distributed

WORLD = 2


def in_torchrun(*arguments: str) -> str:
    """What two processes of a command write to stdout together."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    command = [*torchrun, "-m", "armour_surgery", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_processes(work: Callable[[Process], None], world: int = WORLD) -> None:
    """Run `work` in so many processes of one gloo group; what one of them raises fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    reports = context.SimpleQueue()

    def child(rank: int) -> None:
        os.environ.update(
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        )
        try:
            with distributed("cpu") as process:
                work(process)
            reports.put("")
        except BaseException:
            reports.put(traceback.format_exc())
        os._exit(0)

    children = [context.Process(target=child, args=(rank,)) for rank in range(world)]
    for one in children:
        one.start()
    told = [reports.get() for _ in children]
    for one in children:
        one.join()
    assert not any(told), "\n".join(told)
