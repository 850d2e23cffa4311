"""What the child processes of the fault tests do, and the fork server that starts them with everything imported."""

import gc
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from blt_hf import BltForCausalLM, BltTokenizer
from blt_hf.conversion import convert_meta_checkpoint
from helpers.models import tiny_config


torch.set_num_threads(1)
gc.freeze()  # the collector of a fork that looked through what was imported would copy it all


def model_with(seed: int) -> BltForCausalLM:
    """A model of 2 MB, so that there is a time in which its file is half written."""
    torch.manual_seed(seed)
    return BltForCausalLM(tiny_config(encoder_hash_byte_group_vocab=5003)).eval()


def save(started, folder: Path, seed: int, limit: int | None = None) -> None:
    model = model_with(seed)
    if limit is not None:  # files cannot grow beyond this: what a full disk does, for one process only
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    started.set()
    model.save_pretrained(folder)
    BltTokenizer().save_pretrained(folder)


def convert(started, source: Path, target: Path, limit: int | None = None) -> None:
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    started.set()
    convert_meta_checkpoint(source, target, overwrite=True)


def whole_run(checkpoint: str | None, num_steps: int) -> TrainerState | None:
    """The state of a run that was killed after its last step; transformers' `Trainer` would make one step more."""
    path = Path(checkpoint or "", TRAINER_STATE_NAME)
    state = TrainerState.load_from_json(path) if checkpoint and path.is_file() else None
    return state if state is not None and state.global_step >= num_steps else None


def train(started, folder: Path, report: Path, num_steps: int = 8) -> None:
    """Trains, or goes on from the newest checkpoint that can be read; the losses of all steps go to `report`."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(4, 260, (64, 20), generator=generator)]
    options = {"max_steps": num_steps, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4}
    arguments = TrainingArguments(
        folder, **options, report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1e-2, seed=0
    )
    while True:
        torch.manual_seed(0)
        trainer = Trainer(BltForCausalLM(tiny_config()), arguments, train_dataset=rows)
        last = get_last_checkpoint(folder) if folder.is_dir() else None
        started.set()
        try:
            if (state := whole_run(last, num_steps)) is None:
                trainer.train(resume_from_checkpoint=last)
                state = trainer.state
            break
        except Exception as error:
            if last is None:
                raise
            # The newest folder is half written; it says so, and the one before it is whole
            print(f"{last} cannot be read: {error}")
            Path(last).rename(Path(last).with_name(f"broken-{time.time_ns()}"))
    losses = {entry["step"]: entry["loss"] for entry in state.log_history if "loss" in entry}
    report.write_text(json.dumps(losses))


class Children:
    """Starts functions of this module in processes of their own, and kills them if asked to."""

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([__name__])
        # A fork server takes its path from the environment, and says nothing where it cannot import
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path)):
            multiprocessing.forkserver.ensure_running()
        self.random = random.Random(0)

    def run(self, function, *args, kill_after: float | None = None) -> tuple[int, float]:
        """The exit code, which is -9 for a process that was killed, and the seconds that the work took."""
        started = self.context.Event()
        process = self.context.Process(target=function, args=(started, *args))
        process.start()
        assert started.wait(120), "the child did not come to its work"
        begin = time.perf_counter()
        if kill_after is not None:
            process.join(kill_after)
            process.kill()
        process.join(120)
        spent = time.perf_counter() - begin
        assert process.exitcode is not None, "the child did not end"
        return process.exitcode, spent

    def moments(self, duration: float, count: int) -> list[float]:
        """Times of the work at which to kill; a little beyond its end too."""
        return [self.random.uniform(0, 1.1 * duration) for _ in range(count)]
