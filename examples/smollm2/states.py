"""Reads the states behind the layers with the token model's head: does the BLT know the answer that it cannot spell?

    python examples/smollm2/states.py blt-smollm2-135m path/to/SmolLM2-135M-Instruct.Q4_1.gguf

Questions are those that the token model answers rightly. Both models read its answer. At each patch of the answer the head
says the next token, once from the token model's state and once from the BLT's.
"""

import argparse
import json
from pathlib import Path

import judge
import torch

from blt_hf.model.patching_blt import PatchingRule
from blt_hf.training.distillation import JointStage
from blt_hf.training.teacher_data import TextRows, collate_teacher_rows, teacher_states
from blt_hf.training.token_models import TokenAlphabet, load_token_model


RESULTS = Path(__file__).parent / "results"
SPECIALS, END = {"<|im_start|>": 261, "<|im_end|>": 262}, "<|endoftext|>"


@torch.no_grad()
def read_answer(blt, token_model, rows: TextRows, index: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the next tokens after each patch from the token `start` on, by the token model and by the BLT."""
    batch = collate_teacher_rows([rows[index]])
    stage = JointStage(blt, state_weight=0.0)
    read = stage.read(batch["input_ids"], batch["attention_mask"])
    made = stage.make_states(read, stage.patch_inputs(read))
    last = batch["patch_last"][0]
    known = (last >= start) & (last + 1 < batch["tokens"].shape[1]) & (batch["patch_tokens"][0, :, 1] > 0)
    expected = teacher_states(token_model, batch["tokens"])[0][0, last[known]]
    found = made[0, : len(last)][known]
    return tuple(
        token_model.get_output_embeddings()(token_model.model.norm(states.to(token_model.dtype))).argmax(dim=-1)
        for states in (expected, found)
    )


def measure(blt, token_model, tokenizer, entries: list[dict], alphabet: TokenAlphabet) -> dict:
    """Counts patches at which both say the same token, and questions for which they say the same at each."""
    texts, starts = [], []
    for entry in entries:
        messages = [{"role": "user", "content": entry["question"]}]
        before = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        starts.append(len(tokenizer(before, add_special_tokens=False)["input_ids"]))  # behind the end token of a row
        texts.append(f"{before}{entry['answer']}")
    rows = TextRows(texts, tokenizer, alphabet, PatchingRule("space"))
    counts, answers = {"patches": 0, "same": 0, "questions": len(entries), "all_same": 0}, []
    for index, start in enumerate(starts):
        expected, found = read_answer(blt, token_model, rows, index, start)
        same = expected == found
        counts["patches"] += len(same)
        counts["same"] += int(same.sum())
        counts["all_same"] += bool(same.all())
        said = [tokenizer.convert_ids_to_tokens(tokens.tolist()) for tokens in (expected, found)]
        answers.append({"question": entries[index]["question"], "token_model": said[0], "blt": said[1]})
    return {**counts, "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blt", help="folder that `blt-hf get smollm2` made")
    parser.add_argument("teacher", type=Path, help="the file in GGUF")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "states.json")
    arguments = parser.parse_args()
    blt, _ = judge.load(arguments.blt)
    token_model, tokenizer = load_token_model(arguments.teacher.parent, gguf_file=arguments.teacher.name)
    known = json.loads((RESULTS / "answers_teacher.json").read_text())["answers"]
    right = [entry for entry in known if entry["right"]]
    figures = measure(blt, token_model.eval(), tokenizer, right, TokenAlphabet.of(tokenizer, SPECIALS, END))
    arguments.output.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    print({name: value for name, value in figures.items() if name != "answers"})


if __name__ == "__main__":
    main()
