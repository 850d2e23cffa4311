"""The tokens of a token model as entries of a byteified model's lexicon ([`BltLexicon`]).

Keys are the rows of the token model's head, and the norm in front of them is its last one: the entries that are probable
behind a patch are the tokens that the token model would write there. None of this is learned or kept with what is.
"""

import torch

from ..model.modeling_blt import BltForCausalLM
from .token_models import TokenAlphabet


def spell_lexicon(model: BltForCausalLM, alphabet: TokenAlphabet) -> None:
    """Writes how the tokens of `alphabet` are spelled into the lexicon of a byteified model; nothing without a lexicon.

    Raises:
        ValueError: the lexicon does not have an entry for each token.
    """
    lexicon = model.model.local_decoder.lexicon
    if lexicon is None:
        return
    size, length = lexicon.spellings.shape
    if size != len(alphabet.ids):
        raise ValueError(f"`lexicon_size` must be the number of tokens, {len(alphabet.ids)}; got {size}.")
    with torch.no_grad():
        lexicon.spellings.copy_(alphabet.table(length))


__all__ = ["spell_lexicon"]
