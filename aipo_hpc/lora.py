"""LoRA through peft: adapters on a policy, saved by themselves, and merged into a model that anything can load."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from aipo_hpc.errors import RecipeError
from aipo_hpc.model_files import load_model, sync_tree, widen

if TYPE_CHECKING:
    import torch

    from aipo_hpc.fine_tuning import FineTuningConfig

ADAPTER = "adapter"
_NAME = "default"


def four_bits(dtype: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that load weights in 4 bits, as QLoRA does."""
    import torch
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": quantization, "device_map": {"": device}}


def attach(model: Any, config: "FineTuningConfig") -> Any:
    """Freeze ``model`` and put adapters on it. Raises RecipeError if it has no module of a wanted name."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if config.load_in_4bit:
        model = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            model, use_gradient_checkpointing=False
        )
    lora = LoraConfig(
        r=config.lora_r or 0,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_target_modules) or "all-linear",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise RecipeError(f"{config.stage}.lora_target_modules={list(config.lora_target_modules)}: {error}") from error


def gathered_adapter(model: Any) -> dict[str, "torch.Tensor"]:
    """The adapters' weights by name, on the CPU. Every process must call this."""
    import contextlib

    from peft import get_peft_model_state_dict

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if any(hasattr(parameter, "ds_id") for parameter in trained.values()):  # split by ZeRO-3
        import deepspeed

        whole = deepspeed.zero.GatheredParameters(list(trained.values()))
    with whole:
        weights = {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}
    adapter: dict[str, torch.Tensor] = get_peft_model_state_dict(model, state_dict=weights, adapter_name=_NAME)
    return adapter


def save_adapter(model: Any, weights: dict[str, "torch.Tensor"], folder: Path) -> None:
    """Write adapters in peft's own format, durably."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    model.peft_config[_NAME].save_pretrained(folder)
    widen(folder)
    sync_tree(folder)


def merged(model_name_or_path: str, adapter: Path, dtype: "torch.dtype") -> Any:
    """The model as it was loaded for training, but whole, on the CPU and in ``dtype``, with saved adapters merged in."""
    from peft import PeftModel
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # Or ZeRO-3 would split what is loaded here.
    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    return PeftModel.from_pretrained(load_model(model_name_or_path, dtype), adapter).merge_and_unload()
