"""Patching rules of your own: registering them, and the check that they can be used for generation; rules in words."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .model.names_blt import sliding_windows
from .model.patching_blt import BOS_TOKEN_ID, PATCHING_MODES, PatchingRule
from .tokenizer.encoding import byte_ids


RuleFunction = Callable[[Tensor, Tensor | None, Tensor, PatchingRule], Tensor]


@dataclass(frozen=True)
class RegisteredRule:
    """Holds the arguments of [`register_patching_rule`]."""

    name: str
    function: RuleFunction
    window: int
    uses_entropies: bool

    def find_ends(
        self,
        rule: PatchingRule,
        input_ids: Tensor,
        entropies: Tensor | None,
        positions: Tensor,
        past_ids: Tensor | None,
        past_entropies: Tensor | None,
    ) -> Tensor:
        """Calls the function on the bytes `(B, S)` and on those before them `(B, H)`; bool `(B, S)`."""
        ids = _windows(input_ids, past_ids, positions, self.window)
        if self.uses_entropies:
            entropies = _windows(entropies.float(), past_entropies, positions, self.window)
        ends = self.function(ids, entropies if self.uses_entropies else None, positions, rule)
        if not isinstance(ends, Tensor) or ends.dtype != torch.bool or ends.shape != positions.shape:
            got = f"{ends.dtype} {tuple(ends.shape)}" if isinstance(ends, Tensor) else type(ends).__name__
            raise ValueError(
                f"patching rule {self.name!r} must return a tensor of torch.bool {tuple(positions.shape)}, one answer "
                f"for each byte; got {got}."
            )
        return ends | (positions == 0)


def _windows(values: Tensor, past: Tensor | None, positions: Tensor, window: int) -> Tensor:
    """Gives each byte the last `window` values `(B, S, window)`; 0 before its text.

    Args:
        values: `(B, S)`.
        past: `(B, H)`, the values before them, the newest last; None: there are none.
        positions: int64 `(B, S)`, index of each byte in its text.
    """
    if past is not None:
        values = torch.cat([past[:, max(past.shape[1] - window + 1, 0) :].to(values.dtype), values], dim=1)
    missing = positions.shape[1] + window - 1 - values.shape[1]
    values = sliding_windows(torch.nn.functional.pad(values, (missing, 0)), 1, window)
    age = torch.arange(window - 1, -1, -1, device=values.device)
    # A row may hold several texts, and a text does not see the ones before it.
    return values * (positions[..., None] >= age)


RULES: dict[str, RegisteredRule] = {}
"""The registered rules by name."""


def register_patching_rule(
    name: str, function: RuleFunction | None = None, *, window: int = 1, uses_entropies: bool = True
) -> RuleFunction:
    """Adds a patching rule, which a configuration then names: `BltConfig(patching_mode=name)`.

    The rule is a function of the last bytes. It is called with

    - `ids`: int64 `(B, S, window)`; `ids[..., -1]` is each byte, `ids[..., -2]` the one before it, and so on (byte `b`
      has id `b + 4`; 0 before the text);
    - `entropies`: fp32 `(B, S, window)`, nats of the byte *after* each of these (0 before the text); None without
      `uses_entropies`;
    - `positions`: int64 `(B, S)`, index of each byte in its text;
    - `rule`: the [`PatchingRule`] of the configuration, with its `threshold` and `patch_size`;

    and returns bool `(B, S)`: the byte is the last of its patch. The first byte of a text always is, and
    `max_patch_length` splits longer patches.

    Args:
        name: the rule's name in configurations. `config.json` holds the name and not the function: whoever loads the
            model registers it first.
        function: the rule; None: this is a decorator of it.
        window: bytes that the rule reads to decide about one byte, that byte included.
        uses_entropies: whether it reads entropies; without, the model needs no entropy model.
    Returns:
        `function`.
    Raises:
        ValueError: the name is taken, or the rule cannot be used for generation: on sample texts its answers depend on
            bytes that come later, on bytes before its window, or on other rows.

    Example:

        @register_patching_rule("lines", uses_entropies=False)
        def lines(ids, entropies, positions, rule):
            return ids[..., -1] == ord("\\n") + 4
    """
    if function is None:
        return lambda function: register_patching_rule(name, function, window=window, uses_entropies=uses_entropies)
    if not isinstance(name, str) or not name or name in PATCHING_MODES:
        raise ValueError(f"`name` must be a text other than {PATCHING_MODES}; got {name!r}.")
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"`window` must be at least 1 byte; got {window!r}.")
    if not callable(function):
        raise ValueError(f"`function` must be callable; got {type(function).__name__}.")
    known = RULES.get(name)
    # The same function again is a cell of a notebook that was run twice, or a module that was reloaded.
    if known is not None and _origin(known.function) != _origin(function):
        raise ValueError(f"`name` {name!r} belongs to {'.'.join(_origin(known.function))} already; choose another.")
    rule = RegisteredRule(name, function, window, uses_entropies)
    _check_causality(rule)
    RULES[name] = rule
    return function


def _origin(function: RuleFunction) -> tuple[str, str]:
    return getattr(function, "__module__", ""), getattr(function, "__qualname__", repr(function))


def _check_causality(rule: RegisteredRule) -> None:
    """Asks for the same answers for a text as a whole, for its beginnings, byte by byte, and alone in a batch."""
    samples = (
        b"To be, or not to be: that is\n\nthe question. 3.14159 + (x_1)",
        "naïve café — 速い狐; x = 1\r\n\tреки".encode(),
        b"aaaaaaaaaabbbbbbbbbb          \n\n\n\n....,,,,0000000000  " + bytes(range(10)),
        bytes((i * i * 31 + 7) % 256 for i in range(50)),
    )
    length = min(map(len, samples))
    ids = torch.tensor([[BOS_TOKEN_ID, *byte_ids(text[: length - 1])] for text in samples])
    noise = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0))
    entropies = noise * noise * 5.5  # up to that of a byte that may be anything
    positions = torch.arange(length).expand(ids.shape)
    as_configured = PatchingRule(mode=rule.name)

    def ends(rows=slice(None), first: int = 0, last: int = length) -> Tensor:
        part, past = (rows, slice(first, last)), (rows, slice(0, first))
        return rule.find_ends(
            as_configured, ids[part], entropies[part], positions[part], ids[past], entropies[past]
        )  # fmt: skip

    whole = ends()
    checks = (
        ("gives two answers for the same text", lambda: ends()),
        (
            "looks ahead: whether a byte ends its patch must follow from that byte and those before it",
            lambda: torch.cat([ends(last=stop)[:, -1:] for stop in range(1, length + 1)], dim=1),
        ),
        (
            f"remembers more than its `window` of {rule.window} bytes, or reads how many bytes come at once, so "
            "generation byte by byte would give other patches",
            lambda: torch.cat([ends(first=i, last=i + 1) for i in range(length)], dim=1),
        ),
        ("reads other rows of the batch", lambda: torch.cat([ends(rows=slice(i, i + 1)) for i in range(len(ids))])),
    )
    for problem, again in checks:
        wrong = (again() != whole).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            raise ValueError(
                f"patching rule {rule.name!r} {problem}. It says so of byte {column} of "
                f"{bytes(samples[row][: column + 2])!r} (byte 0 is a BOS)."
            )


def describe_rule(rule: PatchingRule) -> str:
    """Says where a patch starts, to follow "a patch starts": `at every byte`."""
    if rule.mode == "entropy":
        verb = "rises by more than" if rule.monotonicity else "is above"
        words = f"where the entropy of the next byte {verb} the threshold {rule.threshold:.3f} nats"
        if rule.threshold_add is not None:
            words += f" and has risen by more than {rule.threshold_add:.3f}"
    else:
        words = {
            "space": "after spaces and other bytes that are in no word",
            "static": f"every {rule.patch_size} bytes",
            "byte": "at every byte",
        }.get(rule.mode, f"by the rule `{rule.mode}`")
    return words + (f"; none is longer than {rule.max_patch_length} bytes" if rule.max_patch_length else "")


__all__ = ["RULES", "describe_rule", "register_patching_rule"]
