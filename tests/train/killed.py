"""A run of training that kills itself: python -m tests.train.killed CONFIG MODULE:FUNCTION:CALL.

It dies by SIGKILL where that function of that module is called for the CALLth time, before the call does anything; a
function of a class is written CLASS.FUNCTION.
"""

import importlib
import os
import signal
import sys
from operator import attrgetter

from dualview.train import TrainConfig, train


def kill_at(module: str, function: str, call: int) -> None:
    path, _, name = function.rpartition(".")
    owner = importlib.import_module(module)
    owner = attrgetter(path)(owner) if path else owner
    inner, left = getattr(owner, name), [call]

    def outer(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args, **kwargs)

    setattr(owner, name, outer)


if __name__ == "__main__":
    module, function, call = sys.argv[2].split(":")
    kill_at(module, function, int(call))
    train(TrainConfig.load(sys.argv[1]), resume=True)
