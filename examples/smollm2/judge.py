"""Asks a chat model the hundred questions of `questions.json`, and says which of its answers are right.

    python examples/smollm2/judge.py pretrained/blt-smollm2-135m --output answers.json
    python examples/smollm2/judge.py SmolLM2-135M-Instruct.Q4_1.gguf --output teacher.json

The model answers greedily, at most 120 bytes. An answer is right if an expected word stands whole in its first sentence.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, set_seed
from transformers.utils import logging

import blt_hf  # noqa: F401 (makes the Auto classes know BLT)


QUESTIONS = Path(__file__).with_name("questions.json")
MAX_BYTES = 120
# A full stop after a single capital letter belongs to a name, such as J. K. Rowling.
_SENTENCE_END = re.compile(r"(?<!\b[A-Z])[.!?](?=\W*\s|\W*$)|\n")


def read_questions() -> list[dict]:
    """Returns the questions: each has `kind`, `question`, a right `answer`, and the `expected` words."""
    return json.loads(QUESTIONS.read_text())


def first_sentence(answer: str) -> str:
    """Returns what stands before the first full stop, question mark, exclamation mark or end of a line."""
    return _SENTENCE_END.split(answer.strip(), maxsplit=1)[0]


def is_right(answer: str, expected: list[str]) -> bool:
    """Tells whether an `expected` word stands whole in the first sentence of `answer`; capitals do not matter."""
    words = "|".join(map(re.escape, expected))
    return re.search(rf"(?<!\w)(?:{words})(?!\w)", first_sentence(answer), re.IGNORECASE) is not None


def cut(text: str, num_bytes: int = MAX_BYTES) -> str:
    """Returns at most the first `num_bytes` bytes of `text`; a character is not cut in two."""
    return text.encode()[:num_bytes].decode(errors="ignore")


def load(name: str):
    """Returns a model in float32 and its tokenizer, from a folder, a name on the Hub, or a file in GGUF."""
    if name.endswith(".gguf"):
        from blt_hf.training.token_models import load_token_model

        return load_token_model(Path(name).parent, gguf_file=Path(name).name)
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(name)


class _LongEnough(StoppingCriteria):
    """Stops when the new text has `num_bytes` bytes, whatever its tokens are."""

    def __init__(self, tokenizer, prompt_length: int, num_bytes: int):
        self.tokenizer, self.prompt_length, self.num_bytes = tokenizer, prompt_length, num_bytes

    def __call__(self, input_ids, scores, **kwargs):
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :])
        enough = [len(text.encode()) >= self.num_bytes for text in texts]
        return torch.tensor(enough, device=input_ids.device)


@torch.no_grad()
def ask(model, tokenizer, question: str, stop_within: int = MAX_BYTES, temperature: float = 0.0) -> tuple[str, bool]:
    """Returns the first 120 bytes of the answer, and whether the model ended it in `stop_within` bytes.

    `temperature`: of sampling; 0: the answer is greedy.
    """
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(model.device)
    length = inputs["input_ids"].shape[1]
    stop = [_LongEnough(tokenizer, length, stop_within)]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    ids = model.generate(**inputs, **sampling, max_new_tokens=stop_within, stopping_criteria=stop)[0, length:]
    ends = model.generation_config.eos_token_id
    stopped = ids[-1].item() in (ends if isinstance(ends, list) else [ends])
    return cut(tokenizer.decode(ids, skip_special_tokens=True)), stopped


def judge(
    model, tokenizer, questions: list[dict], stop_within: int = MAX_BYTES, temperature: float = 0.0
) -> list[dict]:
    """Asks all questions; each result has `question`, `answer`, `right` and `stopped`."""
    results = []
    set_seed(0)
    for entry in questions:
        answer, stopped = ask(model, tokenizer, entry["question"], stop_within, temperature)
        right = is_right(answer, entry["expected"])
        results.append({**entry, "answer": answer, "right": right, "stopped": stopped})
    return results


def count(results: list[dict]) -> dict:
    """Returns how many answers are right, by kind and in all, and how many the model ended by itself."""
    kinds = Counter(result["kind"] for result in results if result["right"])
    return {
        "questions": len(results),
        "right": sum(kinds.values()),
        "stopped": sum(result["stopped"] for result in results),
        "right_by_kind": {kind: kinds[kind] for kind in dict.fromkeys(result["kind"] for result in results)},
    }


def write(results: list[dict], path: Path, model: str) -> None:
    """Writes counts and answers, an answer a line."""
    fields = ("kind", "question", "answer", "right", "stopped")
    lines = ",\n".join(
        "  " + json.dumps({field: result[field] for field in fields}, ensure_ascii=False) for result in results
    )
    head = json.dumps({"model": model, **count(results)}, ensure_ascii=False)
    path.write_text(f'{head[:-1]}, "answers": [\n{lines}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder, name on the Hub, or a file in GGUF")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for counts and answers")
    parser.add_argument("--limit", type=int, help="only so many questions")
    parser.add_argument("--stop-within", type=int, default=MAX_BYTES, help="bytes in which an answer is to end")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0: greedy")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    model, tokenizer = load(arguments.model)
    results = judge(
        model, tokenizer, read_questions()[: arguments.limit], arguments.stop_within, arguments.temperature
    )
    for result in results:
        print("right" if result["right"] else "WRONG", result["question"], repr(result["answer"]))
    write(results, arguments.output, Path(arguments.model).name)
    print(json.dumps(count(results)))


if __name__ == "__main__":
    main()
