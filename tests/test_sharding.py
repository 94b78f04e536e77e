"""Weights in shares (FSDP2), in two processes on a CPU: as in one process, which has all of them.

Where accelerate is told FSDP on a CPU it takes DDP. So `python -m tests.test_sharding train ...` is
`finetune train ...` with an accelerate that takes gloo for what connects GPUs; all else is its own.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.distributed import fsdp

from finetune.data.collate import Collator
from finetune.errors import ModelError
from finetune.model.adapters import base_of, part_of_weight
from finetune.model.load import load_model
from finetune.model.lora import add_in_place
from finetune.model.loss import learn_from_labels, num_learnt
from finetune.model.methods import load_trainable
from finetune.model.sharding import is_sharded, layers_to_shard, whole_weights
from finetune.recipe import ModelSection, load_recipe
from finetune.rundir import RunDir, read_json, write_json
from finetune.trainer import VisionSFTTrainer
from finetune.training import prepare
from tests.commands import FINETUNE, TORCHRUN, figures, run, train_here, write_texts_and_one_picture
from tests.families import CHECKPOINTS

THIS = [*TORCHRUN, "-m", "tests.test_sharding"]
IN_SHARES = "training.distributed=fsdp"
NO_ANSWERS = {"rows_in_training": 0}


# torch's own fully_shard


@pytest.mark.slow
def test_fully_shard_gives_the_loss_the_gradient_and_the_step_of_one_process(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = {"dropout": 0.0, "parts": ["language", "connector", "vision"]}
    recipe = dataset(num_train=4, num_eval=0, adapter=adapter)
    one, two = tmp_path / "one", tmp_path / "two"
    take_a_step(recipe, one, rank=0, num_processes=1)
    done = run(*THIS, "step", str(recipe), str(two))
    assert done.returncode == 0, done.stderr
    ours, theirs = read_json(two / "figures.json"), read_json(one / "figures.json")
    assert ours["is_sharded"]
    assert not theirs["is_sharded"]
    for key in ("loss", "grad_norm"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-4)
    shared, whole = (load_file(each / "weights.safetensors") for each in (two, one))
    assert shared.keys() == whole.keys()
    assert max(tensor.abs().max() for name, tensor in whole.items() if "lora_B" in name) > 0
    for name, tensor in whole.items():
        assert (tensor - shared[name]).abs().max() < 1e-5, name


def take_a_step(recipe_path: Path, out: Path, *, rank: int, num_processes: int) -> None:
    """AdamW's first one on this process's share of the rows; writes what it came to."""
    recipe = load_recipe(recipe_path)
    console = Console(quiet=True)
    prepared = prepare(recipe, console)
    assert prepared.train
    torch.manual_seed(0)
    model, family = load_trainable(recipe, prepared.encoder.processor)
    base = base_of(model)
    learn_from_labels(base)
    add_in_place(base)
    model.train()
    if num_processes > 1:
        layers = layers_to_shard(base, family)
        for module in base.modules():
            if type(module).__name__ in layers:
                fsdp.fully_shard(module)
        fsdp.fully_shard(model)
    collator = Collator(prepared.encoder, prepared.train.rows)
    numbers = list(range(len(prepared.train.rows)))
    total = num_learnt(collator([{"row": i} for i in numbers]))
    batch = collator([{"row": i} for i in numbers[rank::num_processes]])
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    # processes' gradients are averaged
    loss = model(**batch, fused_lm_head=True, num_items_in_batch=total / num_processes).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    optimizer.step()
    mean = loss.detach().clone()
    sharded, weights = is_sharded(model), whole_weights(model)
    if num_processes > 1:
        norm = norm.full_tensor()
        torch.distributed.all_reduce(mean)
        mean /= num_processes
    if rank == 0:
        out.mkdir()
        figures = {"loss": float(mean), "grad_norm": float(norm), "is_sharded": sharded}
        write_json(out / "figures.json", figures)
        save_file(weights, out / "weights.safetensors")


@pytest.mark.slow
def test_weights_are_saved_as_they_are_held_and_not_as_a_pass_has_rounded_them(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    """After a pass without a backward one, as of an evaluation, they stay gathered."""
    recipe = dataset(num_train=2, num_eval=0, adapter={"parts": ["connector"]})
    done = run(*THIS, "pass", str(recipe), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    before, after = (load_file(tmp_path / "out" / f"{each}.safetensors") for each in ("0", "1"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.float32
        assert torch.equal(after[name], tensor), name


def pass_without_gradients(recipe_path: Path, out: Path, *, rank: int) -> None:
    """Computes in bfloat16; what is saved before and after."""
    recipe = load_recipe(recipe_path)
    prepared = prepare(recipe, Console(quiet=True))
    assert prepared.train
    torch.manual_seed(0)
    model, _ = load_trainable(recipe, prepared.encoder.processor)
    learn_from_labels(base_of(model))
    fsdp.fully_shard(model, mp_policy=fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    weights = [whole_weights(model)]
    batch = Collator(prepared.encoder, prepared.train.rows)([{"row": rank}])
    with torch.no_grad():
        model(**batch, fused_lm_head=True)
    weights.append(whole_weights(model))
    if rank == 0:
        out.mkdir()
        for number, each in enumerate(weights):
            save_file(each, out / f"{number}.safetensors")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_layers_in_shares_are_those_that_every_batch_passes_through(
    checkpoint: str, folder_of: Callable[[str], Path]
) -> None:
    model, family = load_model(ModelSection(name=str(folder_of(checkpoint)), dtype="float32"))
    layers, part_of = layers_to_shard(model, family), part_of_weight(model, family)
    found = {
        name: module for name, module in model.named_modules() if type(module).__name__ in layers
    }
    parts = {
        part_of(f"{name}.{own}") for name, m in found.items() for own, _ in m.named_parameters()
    }
    assert parts == {"language"}
    text = model.config.get_text_config()
    crossing = getattr(text, "cross_attention_layers", None) or []
    assert len(found) == text.num_hidden_layers - len(crossing)


# accelerate's preparation, with the trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["training.gradient_accumulation=2", "evaluation.load_best=true"],
        ["adapter.method=full"],
        ["adapter.method=dora", "adapter.modules_to_save=[lm_head]"],
        ["adapter.method=pissa"],
    ],
    ids=lambda settings: settings[0].partition("=")[2],
)
def test_a_run_in_shares_is_the_run_of_one_process(
    settings: list[str], dataset: Callable[..., Path], tmp_path: Path
) -> None:
    training = {"max_steps": 4, "batch_size": 2, "logging_steps": 1, "save_steps": 2}
    recipe = dataset(
        num_train=9, num_eval=3, adapter={"dropout": 0.0}, training=training, evaluation=NO_ANSWERS
    )
    one, two = RunDir(tmp_path / "one"), RunDir(tmp_path / "two")
    words = ["train", str(recipe), *settings]
    train_here(recipe, *settings, f"output.dir={one.path}", "training.batch_size=4")
    done = run(*THIS, *words, f"output.dir={two.path}", IN_SHARES)
    assert done.returncode == 0, done.stderr
    # which accelerate writes of a model in shares alone
    assert (two.checkpoints / "checkpoint-4" / "optimizer.bin").is_file()
    for line, expected in zip(figures(two), figures(one), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert_same_weights(two.adapter, one.adapter)
    assert_same_weights(two.checkpoints / "checkpoint-4", one.checkpoints / "checkpoint-4")
    for side in ("base", "adapter"):
        assert read_json(two.summary)[side] == pytest.approx(read_json(one.summary)[side], rel=1e-3)


def assert_same_weights(ours: Path, theirs: Path) -> None:
    for file in theirs.glob("*.safetensors"):
        weights, expected = load_file(ours / file.name), load_file(file)
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            assert weights[name].dtype == tensor.dtype, name
            assert (weights[name] - tensor).abs().max() < 1e-4, name


@pytest.mark.slow
def test_texts_in_one_process_and_pictures_in_the_other_end_in_shares_too(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    training = {"max_steps": 5, "batch_size": 1, "logging_steps": 1}
    recipe = dataset(num_train=5, num_eval=0, adapter={"dropout": 0.0}, training=training)
    write_texts_and_one_picture(tmp_path)
    two, one = RunDir(tmp_path / "two"), RunDir(tmp_path / "one")
    done = run(*THIS, "train", str(recipe), f"output.dir={two.path}", IN_SHARES)
    assert done.returncode == 0, done.stderr
    train_here(recipe, f"output.dir={one.path}", "training.batch_size=2")
    losses = [[line["loss"] for line in figures(each)] for each in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_batch_without_a_picture_is_refused_under_deepspeed() -> None:
    """Tried, the gradients of one process were added to those of other weights in the other."""
    trainer: Any = SimpleNamespace(
        is_deepspeed_enabled=True, seeing=[object()], state=SimpleNamespace(global_step=3)
    )
    with pytest.raises(ModelError, match="step 4: a batch without a picture"):
        VisionSFTTrainer.compute_loss(trainer, None, {"labels": torch.zeros(1, 2)})


@pytest.mark.slow
def test_a_run_in_shares_goes_on_as_if_it_had_not_ended(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    training = {"max_steps": 4, "batch_size": 1, "logging_steps": 1, "save_steps": 2}
    recipe = dataset(num_train=9, num_eval=0, adapter={"dropout": 0.2}, training=training)
    unbroken, broken = RunDir(tmp_path / "unbroken"), RunDir(tmp_path / "run")
    words = ["train", str(recipe), IN_SHARES]
    done = run(*THIS, *words, f"output.dir={unbroken.path}")
    assert done.returncode == 0, done.stderr
    done = run(*THIS, *words)
    assert done.returncode == 0, done.stderr
    for path in (broken.checkpoints / "checkpoint-4").rglob("*"):
        path.unlink()
    done = run(*FINETUNE, "train", str(recipe), "--processes", "2", "--resume")
    assert done.returncode == 2
    assert "training.distributed" in done.stderr  # its optimizer's state is another kind of file
    done = run(*THIS, *words, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    assert figures(broken) == figures(unbroken)
    file = "adapter_model.safetensors"
    assert (broken.adapter / file).read_bytes() == (unbroken.adapter / file).read_bytes()


@pytest.mark.slow
def test_4_bit_weights_are_shared_out_and_compute_as_whole_ones(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    training = {"max_steps": 2, "batch_size": 2, "logging_steps": 1, "save_steps": 2}
    recipe = dataset(num_train=9, num_eval=0, adapter={"dropout": 0.0}, training=training)
    settings = ["model.quantize=nf4", "model.dtype=bfloat16"]
    ddp, fsdp = RunDir(tmp_path / "ddp"), RunDir(tmp_path / "fsdp")
    words = ["train", str(recipe), *settings]
    done = run(*FINETUNE, *words, f"output.dir={ddp.path}", "--processes", "2")
    assert done.returncode == 0, done.stderr
    done = run(*THIS, *words, f"output.dir={fsdp.path}", IN_SHARES)
    assert done.returncode == 0, done.stderr
    assert "Excluding from FSDP2 sharding" not in done.stderr  # accelerate, of bytes
    for line, expected in zip(figures(fsdp), figures(ddp), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)


def connect_as_gpus() -> None:
    """Have accelerate prepare what it prepares for GPUs, and `finetune` let it."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    from finetune import engines

    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare_backend  # type: ignore[method-assign]
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    engines.has_devices = lambda: True


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] in ("step", "pass"):
        torch.distributed.init_process_group("gloo")
        _, what, recipe_file, folder = sys.argv
        paths, this = (Path(recipe_file), Path(folder)), torch.distributed.get_rank()
        if what == "step":
            take_a_step(*paths, rank=this, num_processes=torch.distributed.get_world_size())
        else:
            pass_without_gradients(*paths, rank=this)
        torch.distributed.destroy_process_group()
    else:
        from finetune.cli import main

        connect_as_gpus()
        main()
