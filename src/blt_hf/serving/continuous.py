"""Continuous batching: requests join and leave a running batch between two steps, on transformers' own interface.

[`RunningBatch`] is the engine: rows of one cache, each with a request of its own. A round makes one byte for every
running row and then reads a piece of one waiting prompt, in a cache of its own; a prompt that has been read whole takes
a free row while its neighbours go on. [`BltContinuousBatchingManager`] runs rounds in a thread and speaks to the
outside: its queues, its results and its life cycle are those of transformers' manager.

A model may have come with its own copy of the classes in `blt_hf.model` (code from the Hub). So nothing is
imported from this package, whose `__init__` also changes transformers: the cache is the one that the model makes.
"""

import copy
import os
import threading
from collections import deque
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers.generation import CompileConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
    OutputRouter,
)
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.utils import logging


logger = logging.get_logger(__name__)

_MAX_ROWS = 32  # rows of a batch where nobody says how many
_PREFILL_BYTES = 256  # bytes of a prompt between two steps of the running rows
_NEW_BYTES = 20  # what `generate` makes where no length is given
_MEMORY_SHARE = 0.8  # of the memory that is free at the start
_BYTE_OFFSET = 4  # byte `b` has id `b + 4`


def free_memory(device: torch.device) -> int:
    """Returns the free bytes of memory of `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def row_memory(model, num_bytes: int) -> int:
    """Counts the memory, in bytes, of a row of `num_bytes` bytes of text in a cache, at worst: every byte is a patch."""
    return model.make_cache().memory(model.config, num_bytes, num_bytes, model.dtype)


class _Request:
    """A request on its way through the batch.

    Attributes:
        state: what transformers keeps of it.
        cache: a cache of one row while the prompt is read; None before and after.
        remaining: ids of the prompt that are still to be read.
        generator: numbers of its own, if it named a seed.
    """

    def __init__(
        self,
        state: RequestState,
        config: GenerationConfig,
        processors: LogitsProcessorList,
        generator: torch.Generator | None = None,
    ):
        self.state, self.config, self.processors, self.generator = state, config, processors, generator
        self.cache = None
        self.remaining = list(state.initial_tokens)
        self.stop_strings = [s.encode() for s in _as_list(config.stop_strings)]

    @property
    def max_bytes(self) -> int:
        return len(self.state.initial_tokens) + self.state.max_new_tokens

    @property
    def is_plain(self) -> bool:
        """Whether its next byte is the likeliest one, whatever came before."""
        return not self.config.do_sample and not self.processors

    def choose(self, logits: Tensor) -> int:
        """Chooses the next id from fp32 `logits` `(1, V)`, by the request's own settings and text."""
        if self.processors:
            text = self.state.initial_tokens + self.state.generated_tokens
            logits = self.processors(torch.tensor([text], device=logits.device), logits)
        if self.config.do_sample:
            return int(torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=self.generator))
        return int(logits.argmax(dim=-1))

    def take(self, token_id: int, logprob: float | None) -> bool:
        """Adds an id to its text; whether the text is complete."""
        is_complete = self.state.update_and_check_completion(token_id, logprob)
        if not is_complete and self.stop_strings:
            longest = max(map(len, self.stop_strings))
            tail = (self.state.initial_tokens + self.state.generated_tokens[-longest:])[-longest:]
            # Ids of special tokens stand for no byte, and no stop string reaches across them.
            offsets = (i - _BYTE_OFFSET for i in tail)
            tail = b"".join(bytes([i]) if 0 <= i < 256 else b"\0" for i in offsets)
            is_complete = tail.endswith(tuple(self.stop_strings))
            if is_complete:
                self.state.status = RequestStatus.FINISHED
        return is_complete


def _as_list(value) -> list:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


class RunningBatch:
    """Rows of one cache, each with a request of its own, that join and leave between two rounds.

    Args:
        model: a [`BltForCausalLM`].
        generation_config: settings of all requests; a request may change some of them.
        max_rows: rows that run at once.
        max_memory: bytes that caches may take, at worst (every byte a patch). A request that does not fit waits.
        max_text: bytes of text, prompts and what they may become, that may run at once; None: no limit but memory.
        prefill_bytes: bytes of a prompt that are read between two steps of the running rows.
        is_static: the rows' cache stays where it is, so that a GPU captures its steps.
        compile_config: a `CompileConfig`, by which the steps of a single row are compiled then.
    """

    def __init__(
        self,
        model,
        generation_config: GenerationConfig,
        max_rows: int = _MAX_ROWS,
        max_memory: int | None = None,
        max_text: int | None = None,
        prefill_bytes: int = _PREFILL_BYTES,
        return_logprobs: bool = False,
        compile_config=None,
        is_static: bool = False,
    ):
        self.compile_config, self.is_static = compile_config, is_static
        self.model, self.generation_config = model, generation_config
        self.max_rows, self.max_text, self.prefill_bytes = max_rows, max_text, prefill_bytes
        self.max_memory = int(_MEMORY_SHARE * free_memory(model.device)) if max_memory is None else max_memory
        self.return_logprobs = return_logprobs
        self.waiting: deque[_Request] = deque()
        self.reading: _Request | None = None
        self.rows: list[_Request | None] = []
        self.cache = None
        self._runner = None  # of the steps on this cache, made when a request has joined
        self._longest = 0  # bytes that the longest request of the rows' cache may have, those that have left included
        self._last_ids = torch.zeros(0, 1, dtype=torch.int64, device=model.device)

    @property
    def running(self) -> list[_Request]:
        return [request for request in self.rows if request is not None]

    @property
    def is_idle(self) -> bool:
        return not self.waiting and self.reading is None and not self.running

    def add(self, state: RequestState) -> None:
        """Puts a request at the end of those that wait.

        Raises:
            ValueError: its settings are not those of a generation configuration, ask for beams, or it never fits.
        """
        config, generator = copy.deepcopy(self.generation_config), None
        for name, value in state.logit_processor_kwargs.items():
            if name == "seed":
                if value is not None:
                    generator = torch.Generator(self.model.device).manual_seed(value)
                continue
            if not hasattr(config, name):
                raise ValueError(f"`{name}` is not a field of a generation configuration; got {name}={value!r}.")
            setattr(config, name, value)
        if state.logit_processor_kwargs:
            config.validate()
        if (config.num_beams or 1) > 1:
            raise ValueError(
                f"continuous batching writes one text for each request, by greedy decoding or sampling; got `num_beams="
                f"{config.num_beams}`. Accepted is 1, and `generate` makes beams."
            )
        if config.use_cache is None:
            config.use_cache = True  # as in `generate`; the processor of `guidance_scale` reads it
        if state.max_new_tokens is None:
            explicit = config.max_length
            state.max_new_tokens = _NEW_BYTES if explicit is None else max(explicit - len(state.initial_tokens), 1)
            state._new_tokens_limit = state.max_new_tokens
        if state.eos_token_id is not None:
            config.eos_token_id = [i for i in _as_list_of_ids(state.eos_token_id) if i >= 0] or None
        stop_strings = copy.copy(config.stop_strings)
        self.model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=self.model.device)
        config.max_length = len(state.initial_tokens) + state.max_new_tokens
        prompt = torch.tensor([state.initial_tokens], device=self.model.device)
        processors = self.model._get_logits_processor(
            config,
            input_ids_seq_length=len(state.initial_tokens),
            encoder_input_ids=prompt,  # some settings are about the bytes of the prompt
            logits_processor=LogitsProcessorList(),
            device=self.model.device,
        )
        config.stop_strings = stop_strings
        request = _Request(state, config, processors, generator)
        if self._memory(1, request.max_bytes) > self.max_memory:
            raise ValueError(
                f"a request of {request.max_bytes} bytes (prompt and `max_new_tokens`) may need "
                f"{self._memory(1, request.max_bytes):,} bytes of memory, and the batch has {self.max_memory:,}; raise "
                "`max_memory_percent` or ask for fewer bytes."
            )
        if self.max_text is not None and request.max_bytes > self.max_text:
            raise ValueError(
                f"a request of {request.max_bytes} bytes (prompt and `max_new_tokens`) is longer than all text that the "
                f"batch may hold, {self.max_text} bytes (`num_blocks`)."
            )
        self.waiting.append(request)

    def cancel(self, request_id: str) -> RequestState | None:
        """Takes a request out, wherever it is; its state, or None where there is no such request."""
        for request in (*self.waiting, self.reading, *self.rows):
            if request is None or request.state.request_id != request_id:
                continue
            if request in self.waiting:
                self.waiting.remove(request)
            elif request is self.reading:
                self.reading = None
            else:
                self._leave([self.rows.index(request)])
            return request.state
        return None

    def clear(self) -> list[RequestState]:
        """Takes all requests out, and lets go of the cache."""
        states = [r.state for r in (*self.waiting, self.reading, *self.rows) if r is not None]
        self.waiting.clear()
        self.reading, self.rows, self.cache, self._runner = None, [], None, None
        return states

    @torch.no_grad()
    def step(self) -> list[RequestState]:
        """Runs one round; returns the requests whose text grew."""
        grown = self._decode() if self.running else []
        grown += self._read_prompt()
        self._leave([row for row, request in enumerate(self.rows) if request and _is_over(request)])
        return grown

    def _read_prompt(self) -> list[RequestState]:
        """Reads a piece of the first waiting prompt; the request joins the running rows with the last piece."""
        if self.reading is None:
            if not self.waiting or not self._has_place(self.waiting[0]):
                return []
            self.reading = self.waiting.popleft()
            self.reading.state.status = RequestStatus.PREFILLING
            self.reading.cache = self.model.make_cache()
            _expect(self.reading.cache, self.reading.max_bytes)
        request = self.reading
        piece, request.remaining = request.remaining[: self.prefill_bytes], request.remaining[self.prefill_bytes :]
        ids = torch.tensor([piece], device=self.model.device)
        logits = self.model(input_ids=ids, past_key_values=request.cache, logits_to_keep=1).logits[:, -1]
        if request.remaining:
            return []
        self.reading = None
        request.state.status = RequestStatus.DECODING
        self._take(request, logits, request.choose(logits))
        if not _is_over(request):
            self._join(request)
        request.cache = None
        return [request.state]

    def _decode(self) -> list[RequestState]:
        """Makes one byte for each running row, all in one pass of the model."""
        lengths = None if None not in self.rows else [int(request is not None) for request in self.rows]
        if self._runner is None:
            self._runner = self.model.make_runner(self.cache)
        logits = self._runner.step(self._last_ids, lengths)[:, -1]
        plain = None
        if any(request.is_plain for request in self.running):
            plain = logits.argmax(dim=-1).tolist()
        grown, chosen = [], [0] * len(self.rows)
        for row, request in enumerate(self.rows):
            if request is None:
                continue
            own = logits[row : row + 1]
            chosen[row] = plain[row] if request.is_plain else request.choose(own)
            self._take(request, own, chosen[row])
            grown.append(request.state)
        self._last_ids.copy_(torch.tensor(chosen, device=self._last_ids.device)[:, None])
        return grown

    def _take(self, request: _Request, logits: Tensor, token_id: int) -> None:
        logprob = float(logits.log_softmax(dim=-1)[0, token_id]) if self.return_logprobs else None
        request.take(token_id, logprob)

    def _has_place(self, request: _Request) -> bool:
        running = self.running
        if len(running) >= self.max_rows:
            return False
        texts = [r.max_bytes for r in (*running, request)]
        if self.max_text is not None and sum(texts) > self.max_text:
            return False
        rows, longest = _row_count(len(texts)), max(texts)
        if rows == len(self.rows):  # the cache stays, as large as a request that has left made it
            longest = max(longest, self._longest)
        return self._memory(rows, longest) <= self.max_memory

    def _memory(self, rows: int, num_bytes: int) -> int:
        return rows * row_memory(self.model, num_bytes)

    def _join(self, request: _Request) -> None:
        """Gives a request whose prompt has been read a row of its own."""
        if None not in self.rows:
            self._resize(_row_count(len(self.rows) + 1))
        row = self.rows.index(None)
        self.rows[row] = request
        self._longest = max(self._longest, request.max_bytes)
        _expect(self.cache, self._longest)
        self.cache.write_rows([row], request.cache)
        self._last_ids[row] = request.state.generated_tokens[-1]
        graphs = None if self._runner is None else self._runner.graphs
        if graphs is None or not graphs.is_current:
            self._runner = None

    def _leave(self, rows: list[int]) -> None:
        """Empties rows, and makes the batch smaller where half of it would do."""
        if not rows:
            return
        for row in rows:
            self.rows[row] = None
        self.cache.reset_rows(rows)
        if _row_count(len(self.running)) < len(self.rows):
            self._resize(_row_count(len(self.running)))

    def _resize(self, count: int) -> None:
        """Changes the number of rows: those that run come first, free ones after them."""
        kept = [row for row, request in enumerate(self.rows) if request is not None]
        requests = [self.rows[row] for row in kept] + [None] * (count - len(kept))
        device = self._last_ids.device
        last_ids = torch.zeros(count, 1, dtype=torch.int64, device=device)
        cache = None
        if count:
            cache = self.model.make_cache()
            self._longest = max((r.max_bytes for r in requests if r), default=0)
            if self.is_static:
                cache.fix_steps(self.compile_config, self._longest)
            _expect(cache, self._longest)
            cache.start(count, device)
            if kept:
                index = torch.tensor(kept, device=device)
                self.cache.select_rows(index)
                cache.write_rows(list(range(len(kept))), self.cache)
                last_ids[: len(kept)] = self._last_ids[index]
        self.rows, self.cache, self._last_ids, self._runner = requests, cache, last_ids, None


def _expect(cache, num_bytes: int) -> None:
    """Tells a cache how many bytes its longest row will have, so that no tensor grows beyond its need."""
    for slots in cache.kinds:
        slots.most = num_bytes  # patches are no more than bytes


def _is_over(request: _Request) -> bool:
    return request.state.status >= RequestStatus.FINISHED


def _as_list_of_ids(value) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _row_count(running: int) -> int:
    """Rounds the rows of a batch up to a power of two, so that few shapes occur."""
    return 0 if running == 0 else 1 << (running - 1).bit_length()


class BltContinuousBatchingManager(ContinuousBatchingManager):
    """What `init_continuous_batching` of a BLT returns; used as transformers' manager is.

    Rows of a BLT live in slots with counters of their own, so there are no pages, and the attention implementation stays
    as it is. Of a `ContinuousBatchingConfig` these fields count:

        max_requests_per_batch (default 32): rows that run at once; others wait.
        max_memory_percent (default 0.8): share of the memory free at the start that caches may take.
        num_blocks (times `page_size`; default None): bytes of text that may run at once.
        max_batch_tokens (default 256): bytes of a prompt that are read between two steps of the running rows.
        max_queue_size, return_logprobs, seed, decode_compile_config: as in transformers.

    `add_request` takes any field of a generation configuration for its request alone (`temperature=0.7`,
    `stop_strings=["\\n"]`).

    Args:
        model: a [`BltForCausalLM`].
        generation_config: settings of all requests.
        continuous_batching_config: see above.
        workload_hints: not used; rows and memory are found as requests come.
    """

    def __init__(
        self,
        model,
        generation_config: GenerationConfig,
        continuous_batching_config: ContinuousBatchingConfig,
        workload_hints=None,
    ):
        import queue  # as the parent's, whose constructor builds a cache of pages

        self.model = model.eval()
        self.generation_config = generation_config
        self.continuous_batching_config = config = continuous_batching_config
        self.num_return_sequences = generation_config.num_return_sequences or 1
        self.input_queue: queue.Queue[RequestState] = queue.Queue(maxsize=config.max_queue_size)
        self.cancel_queue: queue.Queue[str] = queue.Queue()
        self.output_router = OutputRouter()
        self.background_thread_status = BackgroundThreadStatus()
        self.warmed_up = False
        self.is_tp_driver = True
        self.distributed_helper = SimpleNamespace(global_rank=0, destroy_cpu_comm_group=lambda: None)
        self._request_counter, self._request_lock = 0, threading.Lock()
        self._wake_up_loop = self._has_new_requests = threading.Event()  # the name in later and earlier releases
        self._generation_thread = None
        self._original_attn_impl = None
        self._use_prefix_sharing = False
        share = config.max_memory_percent or _MEMORY_SHARE
        page_size = getattr(config, "page_size", None) or getattr(config, "block_size", 1)
        compile_config = config.decode_compile_config
        is_static = compile_config is not None or generation_config.cache_implementation == "static"
        if compile_config is None and is_static and not generation_config.disable_compile:
            compile_config = generation_config.compile_config or CompileConfig()
        is_static |= generation_config.cache_implementation is None and getattr(model, "captures_by_default", False)
        self.batch_processor = self._batch = RunningBatch(
            model,
            generation_config,
            max_rows=config.max_requests_per_batch or _MAX_ROWS,
            max_memory=int(share * free_memory(model.device)),
            max_text=None if config.num_blocks is None else config.num_blocks * page_size,
            prefill_bytes=config.max_batch_tokens or _PREFILL_BYTES,
            return_logprobs=config.return_logprobs,
            is_static=is_static,
            compile_config=compile_config,
        )

    def warmup(self) -> None:
        """Makes two bytes of a text of one byte, which builds what the first request would wait for."""
        # By no setting of the requests: some, as what waits for the end of a text, do not go with `eos_token_id=-1`.
        batch = RunningBatch(self.model, GenerationConfig())
        bos = self.generation_config.bos_token_id
        batch.add(RequestState("warmup", [1 if bos is None else bos], max_new_tokens=2, eos_token_id=-1))
        while not batch.is_idle:
            batch.step()
        self.warmed_up = True

    def add_request(self, input_ids, request_id=None, max_new_tokens=None, streaming=False, **kwargs) -> str | None:
        """Adds a request.

        Args:
            input_ids: ids of the prompt, a list (or a tensor of one row).
            request_id: its name; None: one is made.
            max_new_tokens: bytes to make at most; None: what the generation configuration says.
            streaming: deliver a result for every byte, rather than one at the end.
            **kwargs: `eos_token_id`, `record_timestamps`, fields of a generation configuration, and `seed`: the request
                samples with numbers of its own, so that its text does not depend on its neighbours.
        Returns:
            The request's name; None if the manager is stopping.
        Raises:
            ValueError: `input_ids` is empty, is no row of ids, or holds ids that the model does not know.
        """
        if isinstance(input_ids, Tensor):
            input_ids = input_ids.flatten().tolist()
        input_ids = list(input_ids)
        size = self.model.config.vocab_size
        if not input_ids or not all(isinstance(i, int) and 0 <= i < size for i in input_ids):
            raise ValueError(
                f"`input_ids` must be a list of at least one id in [0, {size}); got {str(input_ids)[:60]}."
            )
        return super().add_request(
            input_ids, request_id=request_id, max_new_tokens=max_new_tokens, streaming=streaming, **kwargs
        )

    def _run_generation_loop(self, use_inference_mode: bool = False) -> None:
        batch, status, error = self._batch, self.background_thread_status, None
        try:
            if self.continuous_batching_config.seed is not None:
                torch.manual_seed(self.continuous_batching_config.seed)
            with torch.inference_mode(use_inference_mode):
                while status.local_status != BackgroundThreadStatus.HARD_STOP:
                    self._take_messages()
                    if batch.is_idle:
                        if status.local_status == BackgroundThreadStatus.FLUSH_AND_STOP:
                            break
                        self._wake_up_loop.wait(timeout=0.1)
                        self._wake_up_loop.clear()
                        continue
                    self._deliver(batch.step())
            error = RuntimeError("the manager was stopped before this request was complete.")
        except Exception as failure:
            logger.error(f"Continuous batching stopped: {failure}", exc_info=True)
            error = failure
            status.record_fatal_error(failure)
        finally:
            self._fail_all(error)
            status.mark_as_stopped()

    def _take_messages(self) -> None:
        """Takes in new requests and cancellations, and pauses where some thread asked for it."""
        is_pause_requested = getattr(self.background_thread_status, "is_pause_requested", None)
        if is_pause_requested is not None and is_pause_requested():
            self.background_thread_status.pause_and_wait()
        for state in _drained(self.input_queue):
            # Sequences of one request are requests that share its prompt.
            children = [state.fork(f"{state.request_id}__child#{i}") for i in range(state.num_children)]
            for one in (*children, state):
                try:
                    self._batch.add(one)
                except Exception as error:
                    self.output_router.fail_and_deliver(one, error)
        for request_id in _drained(self.cancel_queue):
            state = self._batch.cancel(request_id)
            if state is not None:
                self.output_router.fail_and_deliver(state, RuntimeError("the request was cancelled."))

    def _deliver(self, grown: list[RequestState]) -> None:
        outputs = [s.to_generation_output() for s in grown if s.streaming or s.status >= RequestStatus.FINISHED]
        self.output_router.deliver_batch(outputs)

    def _fail_all(self, error: Exception | None) -> None:
        for state in (*self._batch.clear(), *_drained(self.input_queue)):
            self.output_router.fail_and_deliver(state, error)


def _drained(messages) -> list:
    """Empties a queue."""
    drained = []
    while not messages.empty():
        drained.append(messages.get_nowait())
    return drained


def manager_of(model, generation_config=None, continuous_batching_config=None, workload_hints=None):
    """Returns the manager that `model` keeps, or makes one.

    Raises:
        ValueError: the model is not a `BltForCausalLM`.
    """
    manager = getattr(model, "_cached_continuous_batching_manager", None)
    if isinstance(manager, BltContinuousBatchingManager):
        return manager
    if not hasattr(model, "make_runner"):
        raise ValueError(f"continuous batching needs a BltForCausalLM; got {type(model).__name__}.")
    return BltContinuousBatchingManager(
        model,
        generation_config or model.generation_config,
        continuous_batching_config or ContinuousBatchingConfig(),
        workload_hints,
    )


__all__ = ["BltContinuousBatchingManager", "RunningBatch", "manager_of", "row_memory"]
