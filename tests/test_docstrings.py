"""A docstring says first what a function or a class of the model does: it begins with a verb, in the help of a command
with its imperative."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


SOURCE = Path(__file__).parents[1] / "src"
VERBS = """
Accepts Adds Applies Asks Attends Bisects Bounds Builds Calls Captures Changes Checkpoints Checks Chooses Classifies
Closes Collects Computes Configures Continues Converts Copies Corrupts Counts Crosses Cuts Decides Describes Discards
Divides Does Drafts Draws Drops Embeds Empties Exchanges Fills Finds Fine-tunes Flattens Frees Freezes Gives Hands
Hides Holds Imports Inverts Is Joins Keeps Lays Learns Lets Lists Loads Makes Maps Marks Measures Moves Multiplies
Names Normalizes Numbers Opens Pads Pools Predicts Prepares Prints Projects Proposes Puts Raises Ranks Reads Refuses
Renews Reorders Repeats Replaces Resizes Returns Rotates Rounds Runs Saves Says Sees Sets Shows Splits Starts Stops
Sums Swaps Takes Teaches Tells Tokenizes Trains Translates Turns Views Warns Wraps Writes Yields
"""


def described(tree: ast.Module, kinds: tuple[type, ...]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions that do something, and classes; a property is described as the value that it is."""
    for node in ast.walk(tree):
        decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ())]
        if isinstance(node, kinds) and not any("property" in name for name in decorators):
            yield node


@pytest.mark.parametrize("folder", ["blt_hf", "blt_hf_cli"])
def test_docstrings_begin_with_a_verb(folder):
    """A new verb is added to the list above; any other word is a fault."""
    verbs = {*VERBS.split(), "See"}
    if folder == "blt_hf_cli":
        verbs |= {verb.removesuffix("s") for verb in verbs}
    wrong = []
    for path in sorted((SOURCE / folder).rglob("*.py")):
        is_of_model = path.parent.name == "model" or path.name == "speculation.py"
        kinds = (ast.FunctionDef, ast.ClassDef) if is_of_model else (ast.FunctionDef,)
        for node in described(ast.parse(path.read_text()), kinds):
            docstring = ast.get_docstring(node)
            if docstring is not None and docstring.split()[0].rstrip(".,:;") not in verbs:
                wrong.append(f"{path.relative_to(SOURCE)}:{node.lineno}: {docstring.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
