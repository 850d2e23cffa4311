"""Other words in the place of words: rows for the stages of `distillation` that show each word of a vocabulary often.

Text holds few words often and most words seldom. Here a part of the words of a text is exchanged for words that are drawn
from the token model's vocabulary, a token each. The encoder reads the new words. For the decoder, the state behind which a
word comes is moved so that the token model's own head says the new word.
"""

import re

import torch
from torch import Tensor, nn

from ..model.patching_blt import BYTE_OFFSET, PatchingRule, find_patch_ends
from .teacher_data import KEPT_TOKENS, next_byte_targets
from .token_models import TokenAlphabet, TokenHead


_SPACE = 0x20 + BYTE_OFFSET
_LETTERS = {letter + BYTE_OFFSET for letter in b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"}
_MARGINS = (0.0, 6.0)  # of the new word's logit above the largest that there was


class WordTokens:
    """The tokens that are a space and at least two letters, and a way to draw them.

    Tokens of a byte-pair vocabulary stand in the order in which they were merged, so the rank says how common a token is.
    A token is drawn with the weight `rank ** -0.5`: common words stay common, and rare ones come.

    Args:
        alphabet: of the token model.
        seed: of the draws.
    """

    def __init__(self, alphabet: TokenAlphabet, seed: int = 0):
        words = [token for token, ids in enumerate(alphabet.ids) if _is_word(ids)]
        if not words:
            raise ValueError("`alphabet` has no token that is a space and letters.")
        self.ids = alphabet.ids
        self.tokens = torch.tensor(words)
        self._weights = torch.arange(1, len(words) + 1, dtype=torch.float32).rsqrt()
        self.random = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> list[int]:
        """Draws tokens."""
        chosen = torch.multinomial(self._weights, count, replacement=True, generator=self.random)
        return self.tokens[chosen].tolist()

    def swap_in_text(self, text: str, share: float) -> str:
        """Exchanges a share of the words between spaces."""

        def swap(match: re.Match) -> str:
            if float(torch.rand((), generator=self.random)) >= share:
                return match[0]
            return bytes(index - BYTE_OFFSET for index in self.ids[self.draw(1)[0]]).decode()

        return re.sub(r" [A-Za-z]{2,}(?=[ .,;:?!\n])", swap, text)


def _is_word(ids: tuple[int, ...]) -> bool:
    return len(ids) > 2 and ids[0] == _SPACE and all(index in _LETTERS for index in ids[1:])


class SwappedStates:
    """A collator for the decoder's stage: words of a row are exchanged, and the states before them say the new words.

    A state `h` is moved along `C u`, where `C` is the covariance of states and `u` the direction in which the head reads
    the new token. For states with a normal distribution this is the mean of those whose logit of the token is as large.
    Targets of the new bytes are what the head says of the moved state.

    Args:
        collate: makes a batch of rows.
        token_model: whose norm and head read the states.
        words: to draw from.
        rule: where patches end.
        states: `(N, W)`, some states of the token model.
        alphabet: of the token model.
        share: of the words that are one token each.
        row_share: of the rows in which words are exchanged.
    """

    def __init__(
        self,
        collate,
        token_model: nn.Module,
        words: WordTokens,
        rule: PatchingRule,
        states: Tensor,
        alphabet: TokenAlphabet,
        share: float,
        row_share: float = 1.0,
    ):
        self.collate, self.words, self.rule, self.share, self.row_share = collate, words, rule, share, row_share
        self.token_head = TokenHead(token_model, torch.bfloat16)
        self.rows_of_head = token_model.get_output_embeddings().weight.detach()
        self.table = alphabet.table(max(len(alphabet.ids[token]) for token in words.tokens.tolist()))
        centred = states.float() - states.float().mean(dim=0)
        self.covariance = centred.T @ centred / states.shape[0]

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        return self.collate([self._change(row) for row in rows])

    @torch.no_grad()
    def _change(self, row: dict[str, Tensor]) -> dict[str, Tensor]:
        if float(torch.rand((), generator=self.words.random)) >= self.row_share:
            return row
        places = self._places(row)
        keep = torch.rand(len(places), generator=self.words.random) < self.share
        places = [place for place, is_kept in zip(places, keep.tolist()) if is_kept]
        if not places:
            return row
        tokens = self.words.draw(len(places))
        patches = torch.tensor([patch for patch, _, _ in places])
        states, target_ids, target_probs = self._move(row["states"][patches - 1].float(), torch.tensor(tokens))
        moved = row["states"].clone()
        moved[patches - 1] = states.to(moved.dtype)
        patch_tokens = row["patch_tokens"].clone()
        patch_tokens[patches, 0] = torch.tensor(tokens, dtype=patch_tokens.dtype)
        parts: dict[str, list[Tensor]] = {name: [] for name in ("input_ids", "target_ids", "target_probs")}
        position = first = 0
        for (_, start, length), token in zip(places, tokens):
            new = torch.tensor(self.words.ids[token][1:], dtype=row["input_ids"].dtype)
            targets = slice(first + 1, first + 1 + len(new))  # of the letters; the space has come already
            for name, value, before in (
                ("input_ids", new, 0), ("target_ids", target_ids[targets], 1), ("target_probs", target_probs[targets], 1),
            ):  # fmt: skip
                # What a position predicts is kept with it, so targets of a word begin at the position before it.
                parts[name] += [row[name][position - before if position else 0 : start - before], value]
            first, position = first + 1 + len(new), start + length
        for name, before in (("input_ids", 0), ("target_ids", 1), ("target_probs", 1)):
            parts[name].append(row[name][position - before :])
        changed = {name: torch.cat([part.to(row[name].dtype) for part in several]) for name, several in parts.items()}
        changed |= {"states": moved, "patch_tokens": patch_tokens}
        if "early_states" in row:  # the layers have not read these words
            changed["early_states"] = torch.full_like(row["early_states"], torch.nan)
        return {**row, **changed}

    def _places(self, row: dict[str, Tensor]) -> list[tuple[int, int, int]]:
        """Finds patches that are one token's letters and one byte behind them: index, start, number of letters."""
        ids = row["input_ids"].long()
        ends = (
            find_patch_ends(self.rule, ids[None], None, torch.arange(len(ids))[None])[0].nonzero().flatten().tolist()
        )
        tokens, ids, places = row["patch_tokens"].tolist(), ids.tolist(), []
        for patch in range(1, min(len(ends), len(tokens))):
            start, end = ends[patch - 1] + 1, ends[patch]
            token, count = tokens[patch]
            if count != 1 or ids[start - 1] != _SPACE or ids[end] in _LETTERS:
                continue
            letters = self.words.ids[token]
            if _is_word(letters) and ids[start:end] == list(letters[1:]):
                places.append((patch, start, end - start))
        return places

    def _move(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Moves states `(N, W)` so that tokens `(N,)` become likely; targets of all ids of these tokens."""
        norm = self.token_head.norm
        directions = self.rows_of_head[tokens].float() * norm.weight.float()
        steps = directions @ self.covariance
        scale = states.square().mean(dim=-1, keepdim=True).add(norm.variance_epsilon).sqrt()
        logits = self.token_head(states)
        low, high = _MARGINS
        margins = torch.rand(len(tokens), generator=self.words.random) * (high - low) + low
        missing = logits.max(dim=-1).values + margins - logits.gather(1, tokens[:, None])[:, 0]
        rise = (steps * directions).sum(dim=-1) / scale[:, 0]
        states = states + steps * (missing / rise.clamp_min(1e-6))[:, None]
        log_probs = torch.log_softmax(self.token_head(states), dim=-1)
        top, candidates = log_probs.topk(min(KEPT_TOKENS, log_probs.shape[1]), dim=-1)
        return states, *next_byte_targets(top.exp(), candidates, tokens, self.table)


__all__ = ["SwappedStates", "WordTokens"]
