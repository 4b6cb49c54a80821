"""A digest that identifies a tokenizer."""

import hashlib
import json
from typing import Any

from kvpolicy.errors import ParameterError, described, shown

_OF_CALLS = ("padding", "truncation")  # set in the backend by calls with padding or truncation


def tokenizer_digest(tokenizer: Any) -> str:
    """16 hex digits of the vocabulary, the special tokens and, for fast tokenizers, the rules of a tokenizer.

    Settings changed by calls (padding, truncation) are excluded. Raises ParameterError for other objects.
    """
    try:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        if backend is None:
            rules: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
        else:
            rules = {key: value for key, value in json.loads(backend.to_str()).items() if key not in _OF_CALLS}
        text = json.dumps([rules, special], sort_keys=True)
    except Exception as error:  # the object may be of any class
        raise ParameterError(
            f"tokenizer: must be a tokenizer of transformers: {shown(tokenizer)} ({described(error)})"
        ) from error
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
