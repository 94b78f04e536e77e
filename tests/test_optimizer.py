"""Which weights step how far, against torch by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from finetune.arguments import training_arguments
from finetune.data.collate import Collator, collate
from finetune.model.adapters import part_of_weight
from finetune.model.methods import load_trainable
from finetune.model.optimizer import package_of, parameter_groups, projected_modules
from finetune.recipe import load_recipe
from finetune.rundir import RunDir, read_jsonl
from finetune.train import train
from finetune.trainer import VisionSFTTrainer
from finetune.training import epoch_batches, prepare

# One step of plain gradient descent at the full rate, so that the change of a weight is its
# gradient times its rate.
ONE_STEP = {
    "max_steps": 1,
    "optimizer": "sgd",
    "scheduler": "constant",
    "batch_size": 12,
    "max_grad_norm": 0,
    "weight_decay": 0.5,
    "gradient_checkpointing": False,
}
PARTS = ["language", "connector", "vision"]
RATES = {"language": 0.01, "connector": 0.02, "vision": 0.04}


@pytest.fixture
def trainer(dataset: Callable[..., Path], tmp_path: Path) -> Callable[..., VisionSFTTrainer]:
    """A trainer for one step on the small dataset, its matrices B not at zero."""

    def make(adapter: Any, training: Any, callback: Any = None) -> VisionSFTTrainer:
        adapter = {"dropout": 0.0} | adapter
        recipe = load_recipe(dataset(num_eval=0, adapter=adapter, training=ONE_STEP | training))
        prepared = prepare(recipe, Console(quiet=True))
        assert prepared.train
        torch.manual_seed(0)
        model, _ = load_trainable(recipe, prepared.encoder.processor)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros would hide the gradients of lora_A
                torch.nn.init.normal_(parameter, std=0.05)
        return VisionSFTTrainer(
            model,
            training_arguments(recipe, RunDir(tmp_path / "run"), num_eval_rows=0),
            Collator(prepared.encoder, prepared.train.rows),
            epoch_batches(prepared),
            num_train_rows=len(prepared.train.rows),
            recipe=recipe,
            callbacks=[callback] if callback else [],
        )

    return make


def stock_gradients(ours: VisionSFTTrainer) -> dict[str, torch.Tensor]:
    """By the model's own forward and torch's backward."""
    collator: Any = ours.data_collator
    examples = [collator.encoder.encode(row) for row in collator.rows]
    batch = collate(examples, collator.encoder.processor, collator.encoder.family)
    model: Any = ours.model
    model.train()
    model(**batch).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def changes_of_one_step(
    ours: VisionSFTTrainer,
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each trained weight: where it stood, how it changed, and its gradient."""
    gradients = stock_gradients(ours)
    model: Any = ours.model
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    ours.train()
    after = dict(model.named_parameters())
    assert before.keys() == gradients.keys()
    return {n: (before[n], after[n].detach() - before[n], gradients[n]) for n in before}


@pytest.mark.parametrize("ratio", [1.0, 8.0])
def test_each_part_and_matrix_steps_at_its_own_rate(
    trainer: Callable[..., VisionSFTTrainer], ratio: float
) -> None:
    ours = trainer({"parts": PARTS}, {"learning_rate": RATES, "lora_plus_ratio": ratio})
    part_of = part_of_weight(ours.model, ours.data_collator.encoder.family)  # type: ignore[union-attr]
    seen = set()
    for name, (weight, change, gradient) in changes_of_one_step(ours).items():
        part, is_b = part_of(name), ".lora_B." in name
        rate = RATES[part] * (ratio if is_b else 1)
        expected = -rate * (gradient + 0.5 * weight)  # torch's SGD adds the decay to the gradient
        torch.testing.assert_close(change, expected, atol=1e-6, rtol=1e-4)
        assert change.abs().max() > 1e-6, name
        seen.add((part, is_b))
    assert len(seen) == 6


def test_full_weights_step_at_the_rate_of_their_part_and_norms_do_not_decay(
    trainer: Callable[..., VisionSFTTrainer],
) -> None:
    rates = {"language": 0.01, "connector": 0.02}
    ours = trainer({"method": "full"}, {"learning_rate": rates})
    part_of = part_of_weight(ours.model, ours.data_collator.encoder.family)  # type: ignore[union-attr]
    for name, (weight, change, gradient) in changes_of_one_step(ours).items():
        rate = rates[part_of(name)]
        decay = 0.0 if "norm" in name or name.endswith("bias") else 0.5
        torch.testing.assert_close(
            change, -rate * (gradient + decay * weight), atol=1e-6, rtol=1e-4, msg=name
        )


def test_only_the_rows_of_new_tokens_are_trained_in_embeddings_and_head(
    trainer: Callable[..., VisionSFTTrainer],
) -> None:
    ours = trainer({"extra_tokens": ["A1"]}, {"learning_rate": 0.1, "weight_decay": 0.0})
    model: Any = ours.model
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as fresh adapters are, so that the base below gives the same
            torch.nn.init.zeros_(parameter)
    token = ours.processing_class.tokenizer.convert_tokens_to_ids("A1")  # type: ignore[union-attr]
    tables = {
        "embed_tokens": model.get_input_embeddings(),
        "lm_head": model.get_output_embeddings(),
    }
    before = {name: table.weight.detach().clone() for name, table in tables.items()}
    # the gradient of the whole tables, by the model without its adapter
    weights = {name: table.token_adapter.base_layer.weight for name, table in tables.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    collator: Any = ours.data_collator
    examples = [collator.encoder.encode(row) for row in collator.rows]
    assert sum(token in example.input_ids for example in examples) > 2
    batch = collate(examples, collator.encoder.processor, collator.encoder.family)
    with model.disable_adapter():
        model(**batch).loss.backward()
    stock = {name: weight.grad[token].clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = None
        weight.requires_grad_(False)
    ours.train()
    for name, table in tables.items():
        change = table.weight.detach() - before[name]
        torch.testing.assert_close(change[token], -0.1 * stock[name], atol=1e-6, rtol=1e-4)
        assert change[token].abs().max() > 1e-6
        change[token] = 0
        assert not change.any()


def test_a_head_trained_whole_gets_the_stock_gradient(
    trainer: Callable[..., VisionSFTTrainer],
) -> None:
    """TRL computes the loss from `lm_head.weight` itself, past the module that PEFT put there."""
    ours = trainer({"modules_to_save": ["lm_head"]}, {"learning_rate": 0.1, "weight_decay": 0.0})
    changes = changes_of_one_step(ours)
    (name,) = (name for name in changes if "lm_head" in name)
    assert ".modules_to_save." in name
    _, change, gradient = changes[name]
    torch.testing.assert_close(change, -0.1 * gradient, atol=1e-6, rtol=1e-4)
    assert change.abs().max() > 1e-4


def test_without_rates_of_their_own_all_weights_stay_in_the_stock_groups(
    trainer: Callable[..., VisionSFTTrainer],
) -> None:
    ours = trainer({}, {"learning_rate": 0.1})
    groups = ours.create_optimizer().param_groups
    assert [group.get("name") for group in groups] == [None, None]
    recipe: Any = ours.recipe
    family = ours.data_collator.encoder.family  # type: ignore[union-attr]
    decayed = ours.get_decay_parameter_names(ours.model)  # type: ignore[arg-type]
    named = parameter_groups(ours.model, family, recipe, decayed)
    assert [group["name"] for group in named] == ["language", "connector"]
    num = [sum(len(group["params"]) for group in each) for each in (groups, named)]
    assert num[0] == num[1]


def test_the_log_names_every_rate_and_learning_rate_is_the_first_parts(
    dataset: Callable[..., Path], tmp_path: Path
) -> None:
    training = {
        "learning_rate": {"connector": 0.001, "language": 0.002},
        "lora_plus_ratio": 2,
        "scheduler": "linear",
        "warmup_ratio": 0.0,
    }
    console = Console(quiet=True)
    train(load_recipe(dataset(num_eval=0, training=training)), console=console, results=console)
    lines = read_jsonl(RunDir(tmp_path / "run").metrics)
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        [0.002, 0.0015, 0.001, 0.0005]
    )
    for line in lines:
        rates = {k: v for k, v in line.items() if k.startswith("learning_rate/")}
        assert rates == {
            "learning_rate/language": pytest.approx(line["learning_rate"]),
            "learning_rate/language/lora_B": pytest.approx(2 * line["learning_rate"]),
            "learning_rate/connector": pytest.approx(line["learning_rate"] / 2),
            "learning_rate/connector/lora_B": pytest.approx(line["learning_rate"]),
        }


class Listener(TrainerCallback):
    """Hears what the embeddings of the text give, after everything else has been hooked there."""

    def __init__(self) -> None:
        self.heard: list[tuple[bool, torch.Tensor, torch.Tensor]] = []

    def on_train_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
        def hear(module: Any, inputs: Any, output: torch.Tensor) -> None:
            clean = torch.nn.functional.embedding(inputs[0], module.weight)
            self.heard.append((module.training, clean.detach(), output.detach()))

        model.get_input_embeddings().register_forward_hook(hear)


@pytest.mark.parametrize("adapter", [{}, {"extra_tokens": ["A1"]}, {"method": "full"}])
def test_neftune_shakes_the_language_inputs_in_training_alone(
    trainer: Callable[..., VisionSFTTrainer], adapter: dict[str, Any]
) -> None:
    listener = Listener()
    ours = trainer(adapter, {"neftune_alpha": 5, "learning_rate": 1e-6}, listener)
    ours.train()
    ours.evaluate(ours.train_dataset)  # type: ignore[arg-type]
    in_training, clean, given = listener.heard[0]
    assert in_training
    noise = given - clean
    _, num_tokens, width = clean.shape
    bound = 5 / (num_tokens * width) ** 0.5  # arXiv 2310.05914, algorithm 1
    assert noise.abs().max() <= bound * (1 + 1e-5)
    assert noise.std() == pytest.approx(bound / 3**0.5, rel=0.02)  # uniform
    evaluated = [(clean, given) for training, clean, given in listener.heard if not training]
    assert evaluated
    assert all(torch.equal(clean, given) for clean, given in evaluated)


def test_every_optimizer_of_transformers_is_in_torch_or_needs_a_known_package() -> None:
    packages = {each.value: package_of(each.value) for each in OptimizerNames}
    in_torch = {name for name, package in packages.items() if package is None}
    assert in_torch == {
        "adamw_torch",
        "adamw_torch_fused",
        "adafactor",
        "sgd",
        "adagrad",
        "rmsprop",
    }
    bitsandbytes = {name for name, package in packages.items() if package == "bitsandbytes"}
    from transformers.trainer_optimizer import _BITSANDBYTES_OPTIMIZERS

    assert bitsandbytes == {each.value for each in _BITSANDBYTES_OPTIMIZERS}


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "adagrad", "rmsprop"])
def test_optimizers_of_torch_train_with_rates_by_part(
    trainer: Callable[..., VisionSFTTrainer], optimizer: str
) -> None:
    rates = {"language": 0.001, "connector": 0.002}
    ours = trainer({}, {"optimizer": optimizer, "learning_rate": rates})
    assert all(change.any() for _, change, _ in changes_of_one_step(ours).values())


def test_a_projecting_optimizer_is_told_the_layers_of_the_trained_parts(
    dataset: Callable[..., Path],
) -> None:
    training = {"optimizer": "galore_adamw"}
    adapter = {"method": "full", "parts": ["connector"]}
    recipe = load_recipe(dataset(adapter=adapter, training=training))
    model, family = load_trainable(recipe, None)
    pattern = projected_modules(model, family, recipe)
    assert pattern
    assert "connector" in pattern
    assert "text_model" not in pattern
