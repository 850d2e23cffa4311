"""For mkdocstrings: transformers writes `Returns:` and `Raises:` right after the arguments, griffe wants an empty line."""

import re

import griffe


class Sections(griffe.Extension):
    def on_object(self, *, obj, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"(?<=\S)\n( *)(?=(?:Args|Attributes|Returns|Raises|Yields):\n)", r"\n\n\1", obj.docstring.value
            )
