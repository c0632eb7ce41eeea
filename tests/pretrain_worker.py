"""Runs `examples/pretrain_distributed.py` as torchrun does, in processes forked after the imports, which take longest.
Called by `test_pretrain_distributed.py`; prints the exit codes."""

import argparse
import json
import multiprocessing
import os
import signal
import socket

import pretrain_distributed


def train(rank: int, count: int, port: int, kill_at: int | None, argv: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train_step = pretrain_distributed.Loop.train_step

    def killed_step(loop, step: int, watch: bool):
        if rank == count - 1 and step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(loop, step, watch)

    pretrain_distributed.Loop.train_step = killed_step
    pretrain_distributed.main(argv)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--kill-at", type=int)
    args, argv = parser.parse_known_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    started = [
        fork.Process(target=train, args=(rank, args.processes, port, args.kill_at, argv))
        for rank in range(args.processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    print(json.dumps([process.exitcode for process in started]))


if __name__ == "__main__":
    main()
