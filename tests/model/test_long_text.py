"""A long text written in one call of `generate`: flat memory, and the logits of the uncached model.

`pytest -s -m slow tests/model/test_long_text.py` prints a table of processor time and memory at each cut.
"""

import copy
import time

import psutil
import pytest
import torch

from blt_hf import BltCache
from helpers.models import make_model, tiny_config
from helpers.texts import encode


PROMPT = torch.tensor([encode("A long text begins like a short one, ")])
TIE = 1e-4  # nats: nearer to the threshold than this, the last bit may decide on a patch


class Watch:
    """A streamer: sees each byte as it is chosen, before it is read, and keeps what is needed to judge afterwards."""

    def __init__(self, cache: BltCache, cuts: list[int]):
        self.cache, self.cuts = cache, set(cuts)
        self.closed: list[int] = []  # patches closed by the bytes that were read, at each byte
        self.copies: dict[int, BltCache] = {}
        self.rows: list[tuple] = []
        self.begin = (time.process_time(), PROMPT.shape[1])

    def put(self, ids: torch.Tensor) -> None:
        num_read = self.cache.get_seq_length()
        if not num_read:
            return  # the prompt
        self.closed.append(self.cache.row_patches[0])
        if num_read in self.cuts:
            (begin, start), now = self.begin, time.process_time()
            time_of_byte = (now - begin) / (num_read - start) * 1e3
            self.copies[num_read] = copy.deepcopy(self.cache)
            self.rows.append((num_read, self.closed[-1], time_of_byte, *self.memory()))
            self.begin = (time.process_time(), num_read)

    def end(self) -> None:
        pass

    def memory(self) -> tuple[int, int, int]:
        """Bytes of the cache for bytes, of the cache for patches, and of the process."""
        sizes = {
            slots: sum(tensor.values.nbytes for tensor in slots.tensors if tensor.values is not None)
            for slots in self.cache.kinds
        }
        of_patches = sizes.pop(self.cache.patch_slots)
        return sum(sizes.values()), of_patches, psutil.Process().memory_info().rss


@pytest.mark.parametrize(
    "num_bytes", [600, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_a_long_text_in_one_go(num_bytes):
    one = {"num_hidden_layers": 1}  # of everything, so that 100,000 bytes take minutes
    parts = ("patcher_config", "encoder_config", "decoder_config", "global_config")
    model = make_model(tiny_config(**dict.fromkeys(parts, one)), seed=3)
    cache = BltCache(model.config)
    cuts = [PROMPT.shape[1] + num_bytes * part // 100 - 2 for part in (10, 20, 40, 60, 80, 100)]
    watch = Watch(cache, cuts)
    torch.manual_seed(0)
    text = model.generate(
        PROMPT, max_new_tokens=num_bytes, do_sample=True, eos_token_id=None, past_key_values=cache, streamer=watch
    )
    assert text.shape == (1, PROMPT.shape[1] + num_bytes) and len(watch.closed) == num_bytes
    assert text[0, PROMPT.shape[1] :].unique().numel() > 100, "a text that repeats itself would prove little"

    print(f"\n{'bytes':>8} {'patches':>8} {'ms a byte':>10} {'cache of bytes':>15} {'of patches':>11} {'process':>9}")
    for read, patches, time_of_byte, of_bytes, of_patches, process in watch.rows:
        sizes = f"{of_bytes / 1e3:>12.0f} kB {of_patches / 1e6:>8.1f} MB {process / 1e6:>6.0f} MB"
        print(f"{read:>8} {patches:>8} {time_of_byte:>10.2f} {sizes}")

    # What is kept of bytes is what was kept of the first; what is kept of patches grows with them alone
    first = next(row for row in watch.rows if row[0] > 250)  # windows are full, and a longest patch was seen
    last = watch.rows[-1]
    assert [row[0] for row in watch.rows] == cuts
    assert last[3] <= 1.25 * first[3]
    config = model.config.global_config
    of_patch = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert all(of_patches <= 1.6 * of_patch * (patches + 64) for _, patches, _, _, of_patches, _ in watch.rows)
    grown = last[5] - first[5]
    copies = sum(sum(row[3:5]) for row in watch.rows)
    assert grown <= copies + 3 * last[4] + 8 * text.numel() + 64e6

    with torch.no_grad():
        whole = model(text, use_cache=False, output_patches=True, logits_to_keep=1)
    # Patch ends: where the number of closed patches rises as a byte is read
    closed = torch.tensor(watch.closed)
    ends = closed[1:] > closed[:-1]
    position = torch.arange(PROMPT.shape[1], PROMPT.shape[1] + len(ends))
    is_end = whole.entropies[0, position] > model.config.patching_threshold
    differs = ends != is_end
    distance = (whole.entropies[0, position] - model.config.patching_threshold).abs()
    assert (distance[differs] < TIE).all(), "patches differ where there is no tie"

    # The uncached model on the patches that were found byte by byte, of which few if any hang on a tie
    all_ends = torch.cat([whole_ends(whole)[: PROMPT.shape[1]], ends, is_end.new_zeros(1)])[: text.shape[1]]
    starts = torch.cat([torch.tensor([True]), all_ends[:-1]]).nonzero()[:, 0]
    lengths = torch.diff(torch.cat([starts, torch.tensor([text.shape[1] + (1 if all_ends[-1] else 0)])]))
    with torch.no_grad():
        expected = model(text, use_cache=False, patch_lengths=lengths[None], logits_to_keep=torch.tensor(cuts)).logits
        for index, cut in enumerate(cuts):
            following = model(text[:, cut : cut + 1], past_key_values=watch.copies[cut]).logits
            torch.testing.assert_close(following[:, 0], expected[:, index], atol=1e-4, rtol=1e-3)


def whole_ends(out) -> torch.Tensor:
    """Whether each byte of a text ends its patch, from the lengths of all patches."""
    lengths = out.patch_lengths[0]
    ends = torch.zeros(int(lengths.sum()), dtype=torch.bool)
    ends[lengths.cumsum(0) - 1] = True
    return ends
