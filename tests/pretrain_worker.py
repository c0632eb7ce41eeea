"""Runs `examples/pretrain_distributed.py` in several processes, the last of which is killed. Called by
`test_pretrain_distributed.py`."""

import os
import signal

import pretrain_distributed


def train(kill_at: str, *argv: str) -> None:
    """Until a step, of which the last process does not live to see the end."""
    train_step = pretrain_distributed.Loop.train_step

    def killed_step(loop, step: int, watch: bool):
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1 and step == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(loop, step, watch)

    pretrain_distributed.Loop.train_step = killed_step
    pretrain_distributed.main(argv)
