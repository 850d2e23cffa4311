"""Bytes a second, time to the first byte, and memory, of a BLT and of the token model that it was made from."""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from judge import load
from scoring import prompt_ids


def _generate(model, tokenizer, question: str, num_ids: int, options: dict) -> tuple[torch.Tensor, float]:
    """Returns `num_ids` new ids, and the seconds that they took; no end of the turn is among them."""
    ids = torch.tensor([prompt_ids(tokenizer, question)], device=model.device)
    started = time.perf_counter()
    new = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_ids,
        min_new_tokens=num_ids,
        do_sample=False,
        **options,
    )
    return new[0, ids.shape[1] :], time.perf_counter() - started


def write_text(model, tokenizer, question: str, num_bytes: int, **options) -> tuple[int, float]:
    """Answers a question with at least `num_bytes` bytes; returns how many there are, and the seconds that it took."""
    num_ids = num_bytes if model.config.model_type == "blt" else max(num_bytes // 4, 1)
    while True:
        new, seconds = _generate(model, tokenizer, question, num_ids, options)
        written = len(tokenizer.decode(new, skip_special_tokens=True).encode())
        if written >= num_bytes:
            return written, seconds
        num_ids += num_ids // 4 + 1


def measure_speed(pair: dict, questions: list[str], num_bytes: int, say: Callable[[str], None]) -> dict:
    """Measures each question with each model in turn, so that what disturbs the machine disturbs all.

    Args:
        pair: name to model, tokenizer and options of `generate`.
    """
    written, seconds = dict.fromkeys(pair, 0), {name: [] for name in pair}
    first = {name: [] for name in pair}
    rates = {name: [] for name in pair}
    for model, tokenizer, options in pair.values():
        write_text(model, tokenizer, questions[0], 8, **options)
    for index, question in enumerate(questions):
        for name, (model, tokenizer, options) in pair.items():
            first[name].append(_generate(model, tokenizer, question, 1, options)[1])
            num_written, time_taken = write_text(model, tokenizer, question, num_bytes, **options)
            written[name] += num_written
            seconds[name].append(time_taken)
            rates[name].append(num_written / time_taken)
        say(f"{index + 1} of {len(questions)}: " + ", ".join(f"{name} {rates[name][-1]:.0f}" for name in pair))
    return {
        name: {
            "bytes_per_second": written[name] / sum(seconds[name]),
            "median_bytes_per_second": statistics.median(rates[name]),
            "seconds_to_first_byte": statistics.median(first[name]),
            "bytes": written[name],
            "seconds": sum(seconds[name]),
        }
        for name in pair
    }


def measure_memory(name: str, question: str, num_bytes: int) -> dict:
    """Returns megabytes of the weights, and the most that a process of its own has held while it loaded and generated."""
    command = [sys.executable, __file__, name, question, str(num_bytes)]
    told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode:
        raise RuntimeError(f"{name} cannot be measured: {told.stderr[-2000:]}")
    return json.loads(told.stdout.splitlines()[-1])


def peak_memory() -> float:
    """Returns the most megabytes that this process has held since its program began."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    # What `getrusage` says on Linux includes the process that started this one
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024


def main() -> None:
    name, question, num_bytes = sys.argv[1:]
    model, tokenizer = load(name)
    write_text(model, tokenizer, question, int(num_bytes))
    print(json.dumps({"weights_mb": model.get_memory_footprint() / 2**20, "peak_mb": peak_memory()}))


if __name__ == "__main__":
    main()
