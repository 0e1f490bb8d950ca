"""The PairRM checkpoint folder: found, read, checked and written. No other module spells its file names.

    config.json         settings of the ranker (PairRM), or of the encoder with prefix ids (PairRM-hf)
    model.safetensors   pretrained_model.* (the encoder) and head_layer.* (the head)
    tokenizer.json      the tokenizer with the four prefix tokens added

The published ``PairRM`` names its encoder only by the base model it came from. That repository is not needed: the sizes
are taken from ``config.json`` if it has them, from the base model if that is a local folder, else from the tensors.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from aipo_hpc.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from aipo_hpc.rankers.deberta import EncoderConfig

CONFIG = "config.json"
TENSORS = "model.safetensors"
TOKENIZER = "tokenizer.json"

SOURCE_PREFIX = "<|source|>"
CANDIDATE1_PREFIX = "<|candidate1|>"
CANDIDATE2_PREFIX = "<|candidate2|>"
CANDIDATE_PREFIX = "<|candidate|>"
PREFIXES = (SOURCE_PREFIX, CANDIDATE1_PREFIX, CANDIDATE2_PREFIX, CANDIDATE_PREFIX)
CLS, SEP, PAD, UNK = "[CLS]", "[SEP]", "[PAD]", "[UNK]"

_PREFIX_IDS = dict(
    zip(("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id"), PREFIXES, strict=True)
)

RANKER_SETTINGS: dict[str, Any] = {
    "ranker_type": "pairranker",
    "model_type": "deberta",
    "model_name": None,
    "source_maxlength": 1224,
    "candidate_maxlength": 412,
    "n_tasks": 1,
    "drop_out": 0.05,
    "inference_mode": "bubble",
    "fp16": True,
}
"""What ``config.json`` of the published checkpoint says, and what holds where a folder leaves a value out."""


def find(model_name_or_path: str, revision: str | None = None) -> Path:
    """Return the local folder of a checkpoint, downloading it from the Hugging Face hub if it is not a folder.

    Raises:
        DataError: there is no such folder, and no such repository in the local cache or on the hub.
    """
    folder = Path(model_name_or_path).expanduser()
    if folder.is_dir():
        return folder
    is_path = folder.is_absolute() or model_name_or_path.startswith((".", "~")) or model_name_or_path.count("/") != 1
    if is_path:
        raise DataError(
            f"ranker {model_name_or_path!r}: no such folder; give a folder with {CONFIG}, {TENSORS} and {TOKENIZER}, "
            "or a model id like llm-blender/PairRM"
        )
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(model_name_or_path, revision=revision, allow_patterns=[CONFIG, TENSORS, TOKENIZER])
    except (
        OSError,
        ValueError,
    ) as error:  # the hub's errors and httpx's ConnectError, wrapped by the hub, are OSErrors
        raise DataError(
            f"ranker {model_name_or_path!r} (revision {revision or 'main'}): not a folder, and not to be had from the "
            f"model hub ({type(error).__name__}); download it where there is a network "
            f"(`hf download {model_name_or_path}`) or give the path of a folder"
        ) from error
    return Path(found)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` with the published settings where it leaves values out."""
    path = _present(folder, CONFIG)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); copy the checkpoint again") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected an object with the ranker's settings; copy the checkpoint again")
    if values.get("ranker_type", "pairranker") != "pairranker":
        raise DataError(f"{path}: ranker_type is {values['ranker_type']!r}; only 'pairranker' compares pairs")
    return RANKER_SETTINGS | {name: value for name, value in values.items() if value is not None}


def read_tokenizer(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """Return the checkpoint's own tokenizer, as saved: rebuilding it from the vocabulary loses its character map."""
    path = _present(folder, TOKENIZER)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception for an unreadable file
        raise DataError(f"{path}: not a tokenizer ({error}); copy the checkpoint again") from error
    check_tokenizer(tokenizer, str(path))
    for name, token in _PREFIX_IDS.items():
        if settings.get(name, tokenizer.token_to_id(token)) != tokenizer.token_to_id(token):
            raise DataError(
                f"{path}: {token} has id {tokenizer.token_to_id(token)}, {CONFIG} says {name} = {settings[name]}; "
                "the two files belong to different checkpoints"
            )
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, where: str) -> None:
    """Make sure that ``tokenizer`` has every token the ranker places itself, and no limits of its own."""
    missing = [token for token in (*PREFIXES, CLS, SEP, PAD) if tokenizer.token_to_id(token) is None]
    if missing:
        raise DataError(f"{where}: lacks the tokens {', '.join(missing)}; take the tokenizer saved with the ranker")
    tokenizer.no_truncation()
    tokenizer.no_padding()


def prepare_tokenizer(tokenizer: Tokenizer) -> None:
    """Give the tokenizer of a new ranker the prefix tokens, and the [CLS] text [SEP] that other readers expect of it."""
    tokenizer.add_tokens([token for token in PREFIXES if tokenizer.token_to_id(token) is None])
    check_tokenizer(tokenizer, "the tokenizer")
    tokenizer.post_processor = TemplateProcessing(
        single=f"{CLS} $A {SEP}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)]
    )


def read_tensors(folder: Path) -> "dict[str, Tensor]":
    """Return all tensors of the checkpoint, in main memory."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = _present(folder, TENSORS)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: unreadable ({error}); copy the checkpoint again") from error
    # Old versions of transformers saved this constant among the weights.
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".position_ids")}


def encoder_config(folder: Path, settings: Mapping[str, Any], tensors: "Mapping[str, Tensor]") -> "EncoderConfig":
    """Return the encoder's sizes: from ``config.json``, else from a local base model, else from the tensors.

    Raises:
        DataError: neither a configuration nor an encoder among the tensors.
    """
    import dataclasses

    from aipo_hpc.rankers.deberta import EncoderConfig

    prefix = "pretrained_model."
    shapes = {name.removeprefix(prefix): tuple(tensors[name].shape) for name in tensors if name.startswith(prefix)}
    base = Path(str(settings.get("model_name") or "")) / CONFIG
    try:
        if "hidden_size" in settings:
            config = EncoderConfig.from_dict(settings, str(folder / CONFIG))
        elif settings.get("model_name") and base.is_file():
            config = EncoderConfig.from_dict(json.loads(base.read_text(encoding="utf-8")), str(base))
        else:
            config = EncoderConfig.from_shapes(shapes)
        # The base model's vocabulary lacks the prefix tokens; the tensor is what counts.
        return dataclasses.replace(config, vocab_size=shapes["embeddings.word_embeddings.weight"][0])
    except KeyError as error:
        raise DataError(
            f"{folder / TENSORS}: no tensor pretrained_model.{error.args[0]}; first tensors there: "
            f"{', '.join(sorted(tensors)[:3]) or 'none'}; a PairRM checkpoint holds pretrained_model.* and head_layer.*"
        ) from error


def write(
    folder: Path, settings: Mapping[str, Any], encoder: "EncoderConfig", tensors: "Mapping[str, Tensor]", tok: Tokenizer
) -> None:
    """Write a checkpoint in the ``PairRM`` format.

    The encoder's sizes go into the same ``config.json``; llm-blender ignores names that it does not know.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    own = {name: settings.get(name, default) for name, default in RANKER_SETTINGS.items()}
    _write_json(folder / CONFIG, encoder.to_dict() | own)
    save_file({name: tensor.float().contiguous().cpu() for name, tensor in tensors.items()}, folder / TENSORS)
    tok.save(str(folder / TOKENIZER))
    # For AutoTokenizer, which must not pick the DeBERTa class: that one rebuilds the tokenizer.
    special = {"cls_token": CLS, "sep_token": SEP, "pad_token": PAD, "unk_token": UNK, "mask_token": "[MASK]"}
    known = {name: token for name, token in special.items() if tok.token_to_id(token) is not None}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **known})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _present(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise DataError(
            f"ranker folder {folder}: no {name}; a PairRM checkpoint has {CONFIG}, {TENSORS} and {TOKENIZER} "
            "(download all three)"
        )
    return path
