"""Some of the random cases of `fuzz.py`, and that it finds what is wrong."""

import json

import fuzz
import pytest

from conftest import MODES, encode, expected, make_model


@pytest.mark.parametrize(("mode", "name"), zip(MODES, fuzz.ENGINES))
def test_random_requests(mode, name):
    found = fuzz.run(mode, name, 10, seed=0)
    assert found["cases"] == 10 and found["bytes"] > 0 and not found["failures"]


def test_a_wrong_text_is_found():
    model, requests = make_model("space"), [(encode("to be or not "), 8), (encode("a"), 5), (encode("x"), 0)]
    found = [list(zip(*expected(model, *request))) for request in requests]
    assert fuzz.compare(model, requests, found) == (0, [])
    right = found[1][3]
    for wrong in ((right[0] % 255 + 4, right[1]), (right[0], right[1] - 1e-3)):  # an id, a log-probability
        found[1][3] = wrong
        ties, failures = fuzz.compare(model, requests, found)
        assert ties == 0 and len(failures) == 1 and "is right" in failures[0]
    found[1] = found[1][:3]
    assert "come 3 bytes; asked for were 5" in fuzz.compare(model, requests, found)[1][0]


def test_a_stopped_fuzz_goes_on(monkeypatch, tmp_path):
    calls = []

    def run(mode, name, count, seed):
        calls.append((mode, name, count))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return {"rule": mode, "engine": name, "cases": count, "failures": ["one"] if len(calls) == 2 else []}

    monkeypatch.setattr(fuzz, "run", run)
    output = tmp_path / "results" / "fuzz.json"
    with pytest.raises(KeyboardInterrupt):
        fuzz.fuzz(output, 40, 0)
    assert json.loads(output.read_text())["cases"] == 15
    found = fuzz.fuzz(output, 40, 0)
    assert found == json.loads(output.read_text()) and found["cases"] == 40 and found["failures"] == 1
    assert [one[:2] for one in calls[:5] + calls[6:]] == fuzz.RUNS
    with pytest.raises(ValueError, match="seed is 0, where this is 1"):
        fuzz.fuzz(output, 40, 1)
