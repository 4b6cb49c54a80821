"""A few hex digits that tell whether a tokenizer makes the same tokens."""

import hashlib
import json
from typing import Any

from kvpolicy.errors import ParameterError, described, shown

_OF_CALLS = ("padding", "truncation")  # what a call with padding or truncation leaves in the backend


def tokenizer_digest(tokenizer: Any) -> str:
    """16 hex digits of a tokenizer's vocabulary, its rules where its backend writes them, and its special tokens.

    What calls change (padding, truncation) does not count. Raises ParameterError for what is no tokenizer.
    """
    try:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        if backend is None:
            rules: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
        else:
            rules = {key: value for key, value in json.loads(backend.to_str()).items() if key not in _OF_CALLS}
        text = json.dumps([rules, special], sort_keys=True)
    except Exception as error:  # whatever a third party's object does
        raise ParameterError(
            f"tokenizer: must be a tokenizer of transformers: {shown(tokenizer)} ({described(error)})"
        ) from error
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
