"""Loading a causal language model, and writing one as a folder that transformers and vLLM can load.

    <folder>/config.json, generation_config.json
    <folder>/model*.safetensors[.index.json]                              in the dtype the model was trained in
    <folder>/tokenizer.json, tokenizer_config.json, chat_template.jinja

Everything that a folder needs to be the next iteration's model, and nothing else.
"""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aipo_hpc.errors import DataError
from aipo_hpc.own_code import is_trusted

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


def load_model(model_name_or_path: str, dtype: "torch.dtype", **kwargs: Any) -> Any:
    """Load a causal language model in ``dtype``; ``kwargs`` go to ``from_pretrained``.

    Raises DataError when there is no such model, or when its generation config could not be saved again.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_name_or_path, dtype=dtype, trust_remote_code=is_trusted(model_name_or_path), **kwargs
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"model {model_name_or_path!r} cannot be loaded: {error}\n"
            "Give a folder with config.json and safetensors files, or a model id that is in the local Hugging Face "
            "cache or on the hub."
        ) from error
    _mend_generation_config(model, model_name_or_path)
    return model


def _mend_generation_config(model: Any, name: str) -> None:
    """Sampling flags without ``do_sample``, which published models do have, would fail the save hours later."""
    config = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
        try:
            config.validate(strict=True)
        except ValueError as error:
            raise DataError(f"generation_config.json of {name!r} is invalid, mend it: {error}") from error


def recompute_rotary(model: Any) -> None:
    """Compute the rotary frequencies of a model afresh, in fp32; for models that were loaded sharded, under ZeRO-3.

    Sharded loading creates every tensor in the model's dtype, these too. A frequency rounded to bfloat16 is off by up to
    0.4 %, which at token 1000 is radians: another position than the reference stage and inference engines see.
    """
    for module in model.modules():
        names = [name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
        if not names:
            continue
        if not hasattr(module, "config"):
            logger.warning("%s keeps rounded rotary frequencies under ZeRO-3; prefer ZeRO-2", type(module).__name__)
        else:
            fresh = type(module)(module.config)
            for name in names:
                setattr(module, name, getattr(fresh, name).to(getattr(module, name).device))


def save_model(model: Any, state_dict: dict[str, Any], tokenizer: Any, folder: Path) -> None:
    """Write ``model`` with the weights ``state_dict``, and ``tokenizer``, into ``folder``, durably."""
    if not state_dict or any(tensor.numel() == 0 for tensor in state_dict.values()):
        raise DataError(f"refusing to write {folder}: the trained model's weights were not gathered (they are empty).")
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)
    widen(folder)
    sync_tree(folder)


def files_below(folder: Path) -> list[Path]:
    """All files below ``folder``, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def widen(folder: Path) -> None:
    """Give the files below ``folder`` the modes that the umask allows; safetensors writes them for the owner alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in files_below(folder):
        path.chmod(0o666 & ~umask)


def sync_tree(folder: Path) -> None:
    """Have the file system keep everything below ``folder``."""
    for path in [*files_below(folder), *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
