"""`accelerate launch` with DeepSpeed on CPUs: ZeRO-2 and ZeRO-3 train as one process. `make test-slow` installs it."""

import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.clients import chatter_folder, run_client


CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
mixed_precision: 'no'
num_machines: 1
num_processes: {num_processes}
use_cpu: true
"""
ZERO = """
deepspeed_config:
  zero_stage: {stage}
  zero3_init_flag: false
  zero3_save_16bit_model: true
  offload_optimizer_device: none
  offload_param_device: none
  gradient_accumulation_steps: 1
  gradient_clipping: 1.0
"""


def launch(folder: Path, stage: int | None) -> tuple[dict, dict[str, torch.Tensor]]:
    """Losses, and the weights that were saved; without a stage, of one process."""
    config = CONFIG.format(kind="NO" if stage is None else "DEEPSPEED", num_processes=1 if stage is None else 2)
    (folder / "config.yaml").write_text(config + ("" if stage is None else ZERO.format(stage=stage)))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = ["accelerate", "launch", "--config_file", folder / "config.yaml", "--main_process_port", port]
    script = Path(__file__).with_name("train_script.py")
    run_client([*command, script, chatter_folder(), folder], folder, timeout=800)
    return json.loads((folder / "result.json").read_text()), load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("one"), None)


@pytest.mark.timeout(900)
@pytest.mark.slow  # DeepSpeed compiles its communication for CPUs when it is first used
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(stage, one_process, tmp_path):
    expected, weights = one_process
    result, saved = launch(tmp_path, stage)
    assert result["kind"] == "DEEPSPEED"
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert expected["losses"][-1] < expected["losses"][0] - 0.1
    before = load_file(f"{chatter_folder()}/model.safetensors")
    for name, weight in weights.items():
        torch.testing.assert_close(saved[name], weight, atol=1e-4, rtol=1e-3)
        assert "patcher" not in name or torch.equal(saved[name], before[name])
