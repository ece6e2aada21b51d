"""A stage for `launch.run` in test_sharded.py: several trainings in one group of processes, as
starting a group takes longer than they do."""

import os
import signal

from cai_utils import preference, sft
from cai_utils.experiment import launch, resume
from cai_utils.experiment.files import write_json
from cai_utils.rl import dpo, ppo

TRAINERS = {f"{f.__module__.rpartition('.')[2]}": f
            for f in (sft.finetune, preference.train, ppo.train, dpo.train)}


class Stopped(BaseException):
    """As a kill, but only of one training."""


def several(calls, out_dir):
    """Trains what `calls` say: {"trainer": a name of TRAINERS, "call": its keyword arguments,
    "stop": after so many checkpoints (0: never), "kill": rather all processes}. training.json says
    how many checkpoints each wrote."""
    write, counts = resume.Checkpoints.write, []
    for call in calls:
        written = []

        def counted(self, *arguments, _call=call, _written=written, **more):
            write(self, *arguments, **more)
            _written.append(self)
            if len(_written) == _call["stop"]:
                if _call["kill"]:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise Stopped

        resume.Checkpoints.write = counted
        try:
            TRAINERS[call["trainer"]](**call["call"])
        except Stopped:
            pass
        counts.append(len(written))
        if os.environ["RANK"] == "0":
            write_json(os.path.join(out_dir, "training.json"), {"written": counts})


if __name__ == "__main__":
    launch.main("sharded", "several")
