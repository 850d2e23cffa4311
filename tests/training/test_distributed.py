"""Several processes, one answer: DDP, FSDP2 and tensor parallelism on two gloo processes; offloading on one.

The file is also the script that the launched processes run.
"""

import inspect
import json
import os
import runpy
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from blt_hf import BltTokenizer
from helpers import processes
from helpers.models import make_model, tiny_config
from helpers.texts import encode
from helpers.training import assert_same_losses, make_trainer, step_losses


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"
REMOTE_SCRIPT = str(Path(__file__).parents[1] / "clients" / "train_script.py")  # passes `trust_remote_code=True`
STEPS, ROWS = 4, 4


def pretend_that_cpus_are_gpus() -> None:
    """accelerate offers FSDP to accelerators alone; gloo processes do as well."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def train_and_save(model_folder: str, folder: str) -> None:
    """What a user's script does; nothing here knows how many processes there are."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    rows = ROWS // int(os.environ.get("WORLD_SIZE", 1))
    # The Trainer would let DDP look for unused parameters; none is unused, so DDP fails if it meets one.
    options = {"per_device_train_batch_size": rows, "max_steps": STEPS, "ddp_find_unused_parameters": False}
    trainer = make_trainer(model, folder, **options)
    trainer.train()
    kind = trainer.accelerator.distributed_type.value
    trainer.save_model(f"{folder}/model")
    if trainer.is_world_process_zero():
        torch.save({"losses": step_losses(trainer), "kind": kind}, f"{folder}/result.pt")


def split_tensors(model_folder: str, folder: str) -> None:
    """Logits, loss, gradients and text of a model whose tensors are split over the processes."""
    is_split = int(os.environ.get("WORLD_SIZE", 1)) > 1
    model = AutoModelForCausalLM.from_pretrained(model_folder, **({"tp_plan": "auto"} if is_split else {})).eval()
    ids = example_ids()
    with torch.no_grad():
        result = {"logits": model(ids).logits, "local_size": 0}
        result["text"] = model.generate(ids[:, :20], max_new_tokens=12, do_sample=False)
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    result["loss"] = loss.detach()
    result["is_split"], result["gradients"] = {}, {}
    for name, weight in model.named_parameters():
        result["is_split"][name] = hasattr(weight, "full_tensor") and weight.to_local().numel() < weight.numel()
        if weight.grad is not None:
            gradient = weight.grad
            result["gradients"][name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(result, f"{folder}/result.pt")
    if is_split:
        torch.distributed.barrier()


def example_ids() -> torch.Tensor:
    texts = ["The quick brown fox, jumps over 13 lazy dogs!", "Patches are long where the next byte is easy."]
    return torch.tensor([encode(text)[:41] for text in texts])


def run(arguments: list[str]) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": processes.python_path(),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    result = processes.run(
        [sys.executable, "-m", *arguments], env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_model(tiny_config(encoder_config={"num_key_value_heads": 2})).save_pretrained(folder)
    BltTokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def one_process(model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train_and_save(model_folder, str(folder))
    return folder


def launch(name: str, folder: Path, *command) -> None:
    """Starts two processes with our ready-made configuration."""
    config = (CONFIGS / f"{name}.yaml").read_text().replace("num_processes: 8", "num_processes: 2")
    (folder / "config.yaml").write_text(config.replace("bf16", "'no'") + "use_cpu: true\n")
    run(
        ["accelerate.commands.launch", "--config_file", str(folder / "config.yaml")]
        + ["--main_process_port", free_port(), *map(str, command)]
    )


@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_CPU"), ("fsdp2", "FSDP")])
def test_accelerate_launch(name, kind, model_folder, one_process, tmp_path):
    """Two processes, half a batch each: losses and weights of one process."""
    launch(name, tmp_path, __file__, "train", model_folder, tmp_path)
    expected, result = torch.load(one_process / "result.pt"), torch.load(tmp_path / "result.pt")
    assert result["kind"] == kind
    assert_same_losses(result["losses"], expected["losses"])
    weights = load_file(tmp_path / "model" / "model.safetensors")
    before = load_file(f"{model_folder}/model.safetensors")
    for key, weight in load_file(one_process / "model" / "model.safetensors").items():
        torch.testing.assert_close(weights[key], weight, atol=1e-4, rtol=1e-4)
        assert "patcher" not in key or torch.equal(weights[key], before[key])
    # What was saved loads, and its code is that of the model, not that of the engine that wrapped it.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.architectures == ["BltHfForCausalLM"]
    assert model.config.auto_map["AutoModelForCausalLM"] == "modeling_blt.BltForCausalLM"
    assert not list((tmp_path / "model").glob("_fsdp*"))


@pytest.fixture(scope="module")
def remote_code_in_one_process(model_folder, tmp_path_factory) -> list[float]:
    folder = tmp_path_factory.mktemp("remote-one")
    runpy.run_path(REMOTE_SCRIPT)["main"](model_folder, folder)
    return json.loads((folder / "result.json").read_text())["losses"]


@pytest.mark.parametrize("name, kind", [pytest.param("ddp", "MULTI_CPU", marks=pytest.mark.slow), ("fsdp2", "FSDP")])
def test_code_of_a_checkpoint_in_two_processes(name, kind, model_folder, remote_code_in_one_process, tmp_path):
    """Remote code alone, where the package is not installed: losses of one process."""
    program = f"""
import os, runpy, sys
import torch
sys.modules["blt_hf"] = None
for name in ("HF_HOME", "HF_MODULES_CACHE"):  # as on two machines
    os.environ[name] = {str(tmp_path / "hf")!r} + name + os.environ["RANK"]
{inspect.getsource(pretend_that_cpus_are_gpus)}
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    pretend_that_cpus_are_gpus()
runpy.run_path({REMOTE_SCRIPT!r}, run_name="__main__")
"""
    (tmp_path / "program.py").write_text(program)
    launch(name, tmp_path, tmp_path / "program.py", model_folder, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kind"] == kind
    assert_same_losses(result["losses"], remote_code_in_one_process)
    assert (tmp_path / "model" / "modeling_blt.py").exists()


def test_tensor_parallel(model_folder, tmp_path):
    (tmp_path / "one").mkdir()
    split_tensors(model_folder, str(tmp_path / "one"))
    run(
        ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
        + [__file__, "split", model_folder, str(tmp_path)]
    )
    expected, result = torch.load(tmp_path / "one" / "result.pt"), torch.load(tmp_path / "result.pt")
    for part in ("logits", "loss"):
        torch.testing.assert_close(result[part], expected[part], atol=1e-5, rtol=1e-5)
    assert torch.equal(result["text"], expected["text"])
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(result["gradients"][name], gradient, atol=1e-6, rtol=1e-4)
    # Every large weight is split; norms and the small projections between the stacks are not, nor, before transformers
    # could split embeddings by columns, those of the bytes.
    spared = ["norm", "patch_embedding_projection"]
    spared += [] if "embedding_colwise" in ALL_PARALLEL_STYLES else ["embed_tokens"]
    whole = {name for name, is_split in result["is_split"].items() if not is_split}
    assert all(any(part in name for part in spared) for name in whole), whole


@pytest.mark.parametrize("target", ["cpu", "disk"])
def test_offload(target, model_folder, tmp_path):
    """Weights that are fetched layer by layer give the same logits and text."""
    from accelerate import cpu_offload, disk_offload

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ids = example_ids()
    expected = model(ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False)
    if target == "cpu":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), torch.device("cpu"))
    assert model.model.local_decoder.layers[0].mlp.up_proj.weight.device.type == "meta"
    torch.testing.assert_close(model(ids).logits, expected[0])
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected[1])


def test_device_map(model_folder, tmp_path):
    """`device_map` splits between layers, with a part on disk; "auto" finds the CPU."""
    ids = example_ids()
    model = AutoModelForCausalLM.from_pretrained(model_folder, device_map="auto").eval()
    expected = model(ids).logits
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, device_map="auto", max_memory={"cpu": 150_000}, offload_folder=tmp_path
    ).eval()
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    torch.testing.assert_close(model(ids).logits, expected)


if __name__ == "__main__":
    task, model_folder, folder = sys.argv[1:]
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        pretend_that_cpus_are_gpus()
    try:
        {"train": train_and_save, "split": split_tensors}[task](model_folder, folder)
    finally:
        # gloo's threads must end before the interpreter does, which otherwise aborts now and then.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
