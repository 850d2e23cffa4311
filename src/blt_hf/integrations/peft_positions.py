"""PEFT: a refusal of the methods that count positions.

These methods find positions in `input_ids` or `attention_mask`, and use them in every layer that they adapt. Layers of a
BLT that work on patches have other positions, and those on bytes hold each text from the first column on, wherever its
padding stood. So these are refused, with the argument that asks for them (test: `peft_counts_positions`):

- aLoRA (`alora_invocation_tokens`) counts from the end of `input_ids` where its weights begin to act. Without the refusal
  they act on bytes before the invocation, without a word.
- EVA's default `prepare_layer_inputs_fn` takes the columns of `attention_mask` from the inputs of each layer. Without the
  refusal it raises an `IndexError`, or takes padding for text.
- X-LoRA multiplies the input of each layer by numbers that it has found for the columns of `input_ids`. Without the
  refusal shapes do not fit.

The other methods of PEFT 0.21 treat each position by itself, or each row (`adapter_names`, Poly), or refuse a BLT.
"""

import functools
import importlib
import inspect

from torch import nn

from ..model.modeling_blt import BltModel
from ..model.stacks_blt import BltPatcher


_NAMES = {BltModel.__name__, BltPatcher.__name__}


def _is_blt(model: nn.Module) -> bool:
    """Tells whether `model` contains a BLT or an entropy model; by name, for code from the Hub."""
    return any(cls.__name__ in _NAMES for module in model.modules() for cls in type(module).__mro__)


def refusing_invocations(inject_adapter):
    """Wraps `BaseTuner.inject_adapter`."""

    @functools.wraps(inject_adapter)
    def wrapper(self, model, adapter_name, *args, **kwargs):
        config = self.peft_config.get(adapter_name)
        tokens = getattr(config, "alora_invocation_tokens", None)
        if tokens is not None and _is_blt(model):
            raise ValueError(
                f"`alora_invocation_tokens={tokens!r}` is not accepted for a Byte Latent Transformer: aLoRA counts "
                "bytes in layers whose positions are patches; leave it None, which is LoRA for the whole text."
            )
        return inject_adapter(self, model, adapter_name, *args, **kwargs)

    return wrapper


def refusing_positions_of_ids(function, default):
    """Wraps a function of EVA whose argument `prepare_layer_inputs_fn` is `default` where nobody gives another."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        arguments = given.arguments
        needs_inputs = arguments.get("eva_state_dict") is None
        if needs_inputs and arguments["prepare_layer_inputs_fn"] is default and _is_blt(arguments["model"]):
            raise ValueError(
                "`prepare_layer_inputs_fn` takes the columns of `attention_mask` by default, which the layers of a Byte "
                "Latent Transformer do not have; pass a function that gives all positions, as in `lambda states, "
                "inputs, name: states[0].flatten(0, -2)`, with batches of texts that need no padding."
            )
        return function(*args, **kwargs)

    return wrapper


def refusing_scalings(init):
    """Wraps `XLoraModel.__init__`."""

    @functools.wraps(init)
    def wrapper(self, model, *args, **kwargs):
        if _is_blt(model):
            raise ValueError(
                "`peft_type='XLORA'` is not accepted for a Byte Latent Transformer: it mixes adapters by numbers for "
                "each byte, in layers whose positions are patches; load the adapters with LORA, and choose one for "
                "each row by `adapter_names`."
            )
        return init(self, model, *args, **kwargs)

    return wrapper


def refuse_counting_methods(replace_everywhere) -> None:
    """Changes PEFT, which has been imported; `replace_everywhere` wraps a function of a module of it."""
    eva, xlora, tuners_utils = (
        importlib.import_module(f"peft.tuners.{name}") for name in ("lora.eva", "xlora.model", "tuners_utils")
    )
    tuners_utils.BaseTuner.inject_adapter = refusing_invocations(tuners_utils.BaseTuner.inject_adapter)
    default = eva.prepare_layer_inputs_fn_language_modeling
    for name in ("get_eva_state_dict", "initialize_lora_eva_weights"):
        replace_everywhere(eva, name, lambda function: refusing_positions_of_ids(function, default))
    xlora.XLoraModel.__init__ = refusing_scalings(xlora.XLoraModel.__init__)


__all__ = ["refuse_counting_methods"]
