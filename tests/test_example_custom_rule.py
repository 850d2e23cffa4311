"""The example of a rule of one's own: a cheat is refused, the model learns with the rule, and loads again by its name."""

import json
import re

from helpers.processes import run_example


def test_custom_patching_rule(tmp_path):
    printed = run_example("custom_patching_rule.py", "--steps", 6, "--context", 128, "--output-dir", tmp_path)
    assert "Refused: patching rule 'before-a-space' looks ahead" in printed
    _, before, after = map(float, re.findall(r": ([\d.]+) bits per byte", printed))
    assert after < before
    assert "function |call |" in printed and "With and without a cache the same: True" in printed
    assert json.loads((tmp_path / "config.json").read_text())["patching_mode"] == "words-and-surprises"
