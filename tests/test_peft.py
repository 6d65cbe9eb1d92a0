"""LoRA on packed layers: known to PEFT without a word of the user, and the same steps as on the dense twin."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed import TOKENS, linears, logits, sparse_layers, write_packed
from torch import nn
from transformers import AutoModelForCausalLM

import alphaprune
from alphaprune import SparseLinear

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
BATCH = torch.randint(0, 257, (3, 24), generator=torch.Generator().manual_seed(8))


@pytest.fixture(scope="module", params=["float", "int8"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = None if request.param == "float" else request.param
    return write_packed(tmp_path_factory.mktemp("packed") / request.param, values)


def load(folder: Path, **settings) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def adapted(model: nn.Module, targets=TARGETS, **settings) -> nn.Module:
    """The model with an adapter whose two halves are random, the same for every model of this shape."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=4, lora_alpha=8, **settings)
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter(model).values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def adapter(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def step(model: nn.Module, optimiser: torch.optim.Optimizer) -> torch.Tensor:
    optimiser.zero_grad()
    loss = model(BATCH, labels=BATCH).loss
    loss.backward()
    optimiser.step()
    return loss.detach()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_that_of_the_dense_twin(packed: Path, checkpointing: bool) -> None:
    sparse, dense = adapted(load(packed)), adapted(load(packed).dequantize())
    before = {name: p.detach().clone() for name, p in adapter(sparse).items()}
    assert adapter(dense).keys() == before.keys() and len(before) == 2 * 3 * len(TARGETS)
    losses = []
    for model in (sparse, dense):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        losses.append(torch.stack([step(model, optimiser) for _ in range(3)]))
    close(*losses)
    assert losses[0][2] < losses[0][0]
    for name, parameter in adapter(dense).items():
        moved, wanted = adapter(sparse)[name].detach() - before[name], parameter.detach() - before[name]
        assert wanted.norm() > 0 and (moved - wanted).norm() < 1e-3 * wanted.norm(), name
    for layer in sparse_layers(sparse).values():
        assert layer.weight.grad is None and not any(p.requires_grad for p in layer.parameters())


def test_adapters_are_saved_and_loaded(packed: Path, tmp_path: Path) -> None:
    model = adapted(load(packed))
    wanted = logits(model)
    assert (wanted - logits(load(packed))).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir())
    assert size < 150_000  # the adapter alone
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(packed), tmp_path / "adapter")), wanted)
    assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), wanted)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(packed)))
    tokens = model.generate(input_ids=TOKENS[:, :5], max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 9)


def test_adapters_by_transformers_alone(packed: Path, tmp_path: Path) -> None:
    model = load(packed)
    try:
        model.add_adapter(peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False))
    except ValueError as error:
        if "version of PEFT" in str(error):
            pytest.skip(f"this transformers and this PEFT do not go together: {error}")
        raise
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = load(packed)
    again.load_adapter(tmp_path / "adapter")
    close(logits(again), wanted)
    assert (wanted - logits(load(packed))).abs().max() > 1e-3


def test_all_linear_means_packed_layers_too(packed: Path) -> None:
    model = adapted(load(packed), "all-linear")
    assert len(adapter(model)) == 2 * len(linears(load(packed).dequantize()))
    model.add_adapter("second", peft.LoraConfig(target_modules="all-linear", r=2))
    assert len(adapter(model)) == 4 * len(linears(load(packed).dequantize()))
    assert logits(model).isfinite().all()


def test_merging_says_what_to_do_and_that_works(packed: Path, tmp_path: Path) -> None:
    model = adapted(load(packed))
    model.save_pretrained(tmp_path / "adapter")
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"^model\.layers\.0\..*cannot be merged.*model\.dequantize\(\)"):
            merge()
    merged = peft.PeftModel.from_pretrained(load(packed).dequantize(), tmp_path / "adapter").merge_and_unload()
    close(logits(merged), logits(model))
    plain = model.unload()
    assert torch.equal(logits(plain), logits(load(packed))) and not adapter(plain)


@pytest.mark.parametrize(
    "setting", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_what_needs_the_dense_weight_is_refused(packed: Path, setting: dict) -> None:
    with pytest.raises(ValueError, match=r"^model\.layers\.0\..*needs the dense weight.*model\.dequantize\(\)"):
        adapted(load(packed), **setting)
    assert adapted(load(packed).dequantize(), **setting) is not None
    model = adapted(load(packed))
    with pytest.raises(ValueError, match=r"^model\.layers\.0\..*needs the dense weight"):
        model.add_adapter("second", peft.LoraConfig(target_modules=TARGETS, **setting))
    assert not [name for name in adapter(model) if "second" in name]


def test_prepared_as_for_quantized_training(packed: Path) -> None:
    model = load(packed, dtype=torch.bfloat16)
    assert model.hf_quantizer.is_trainable and model.is_quantized
    model = adapted(peft.prepare_model_for_kbit_training(model))
    loss = model(BATCH, labels=BATCH).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() and p.grad.any() for p in adapter(model).values())


def test_the_trainer_of_transformers(packed: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    settings = {"use_cpu": True, "max_steps": 2, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(tmp_path, per_device_train_batch_size=2, learning_rate=0.01, **settings)
    data = [{"input_ids": row, "labels": row} for row in BATCH]
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(load(packed), arguments, train_dataset=data)
    model = adapted(load(packed))
    before = {name: p.detach().clone() for name, p in adapter(model).items()}
    result = Trainer(model, arguments, train_dataset=data).train()
    assert result.training_loss > 0 and all((p != before[name]).any() for name, p in adapter(model).items())


@pytest.mark.parametrize("values", [None, "int8"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:Input #0 requires gradient and is not a double")
def test_gradient_of_x_by_differences(values: str | None, bias: bool) -> None:
    """A linear map has exact differences at any distance, so that float32 is enough for gradcheck."""
    linear = nn.Linear(70, 18, bias=bias).requires_grad_(False)
    linear.weight.data[torch.rand(18, 70) < 0.7] = 0
    layer = SparseLinear.from_linear(linear, values=values)
    x = torch.randn(2, 3, 70, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), eps=0.5, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", ["import alphaprune, peft", "import peft, alphaprune"])
def test_known_in_either_order(order: str) -> None:
    code = f"""
import sys
{order}
from torch import nn
layer = alphaprune.SparseLinear.from_linear(nn.Linear(16, 16))
model = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(target_modules=["0"]))
print(type(model.base_model.model[0]).__name__)
"""
    found = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "LoraSparseLinear", found.stderr


def test_sparsified_models_without_a_quantizer() -> None:
    from packed import zeros_model

    model = adapted(alphaprune.sparsify(zeros_model()))
    close(logits(model), logits(adapted(zeros_model())))
