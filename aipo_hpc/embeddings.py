"""Texts as vectors, for clustering: by their words (tf-idf), by a sentence-transformers model, or by a BERT's mean state.

Same texts, same model, same versions of the libraries, same vectors, whatever the number of cores: batches have a fixed
composition, and the result of one text is never another's.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from aipo_hpc.errors import DataError

if TYPE_CHECKING:
    import numpy as np


def tf_idf(texts: Sequence[str], model: str, batch_size: int) -> Any:
    """A sparse matrix of shape (texts, words): English stop words left out, rows of length 1."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        return TfidfVectorizer(stop_words="english").fit_transform(texts)
    except ValueError as error:  # no word is left
        raise DataError(
            f"seed prompts cannot be told apart by their words: {error}. Use another clusters.embeddings."
        ) from error


def sentence_transformers(texts: Sequence[str], model: str, batch_size: int) -> "np.ndarray[Any, Any]":
    """Vectors of shape (texts, dimension) by a sentence-transformers model; it cuts longer texts at its own limit."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, trust_remote_code=False)
    encoded: Any = encoder.encode(list(texts), batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)
    return encoded  # type: ignore[no-any-return]


def bert(texts: Sequence[str], model: str, batch_size: int) -> "np.ndarray[Any, Any]":
    """Vectors of shape (texts, hidden size): the last states of an encoder, averaged over the tokens of a text."""
    import numpy as np
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder: Any = AutoModel.from_pretrained(model, trust_remote_code=False).to(device).eval()
    longest = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    vectors = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=longest,
        ).to(device)
        with torch.inference_mode():
            states = encoder(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        vectors.append(((states * mask).sum(1) / mask.sum(1)).cpu().numpy())
    return np.concatenate(vectors)


EMBEDDINGS: dict[str, Callable[[Sequence[str], str, int], Any]] = {
    "tf-idf": tf_idf,
    "sentence-transformers": sentence_transformers,
    "bert": bert,
}
"""By name; all but tf-idf are given a model."""
