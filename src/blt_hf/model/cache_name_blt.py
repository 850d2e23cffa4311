"""What transformers calls the cache: `past_key_values` up to 5.23, `cache` from 5.24 on. The only place that knows.

Our own code says `past_key_values` in arguments. In outputs, and in the keyword arguments that `generate` hands around,
the name is that of the installed transformers.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import TypeVar

from transformers.generation import GenerateDecoderOnlyOutput


CACHE_NAMES = ("past_key_values", "cache")
CACHE_NAME = next(field.name for field in fields(GenerateDecoderOnlyOutput) if field.name in CACHE_NAMES)

_Function = TypeVar("_Function", bound=Callable)


def takes_cache(function: _Function) -> _Function:
    """Lets the argument `past_key_values` of a function be called `cache` as well.

    The signature shows the name of the installed transformers, which reads it to see what a model accepts.
    """

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if "cache" in kwargs:
            cache = kwargs.pop("cache")
            if kwargs.get("past_key_values") is not None:
                raise ValueError("`past_key_values` and `cache` are two names of one argument; got both.")
            kwargs["past_key_values"] = cache
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    wrapper.__signature__ = signature.replace(
        parameters=[
            parameter.replace(name=CACHE_NAME) if parameter.name == "past_key_values" else parameter
            for parameter in signature.parameters.values()
        ]
    )
    return wrapper


__all__ = ["CACHE_NAME", "CACHE_NAMES", "takes_cache"]
