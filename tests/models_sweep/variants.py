"""What some types need beside small numbers, by type or by the name of a pair."""

from typing import Any

SPECIAL: dict[str, dict[str, Any]] = {
    "gemma3_text": {"num_hidden_layers": 6},
    "gemma3": {"num_hidden_layers": 6},
    "gpt_bigcode": {"num_key_value_heads": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
}
