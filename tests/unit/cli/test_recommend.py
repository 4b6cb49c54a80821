"""`kvpolicy recommend`: bad input before a model is loaded, and the whole way on a small model."""

import pytest

from kvpolicy.cli.quality.recommend import parse_tokens
from kvpolicy.errors import InputError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--context", "8k"), "give --memory or --max-kl, one of them"),
        (("--context", "8k", "--memory", "1GiB", "--max-kl", "0.1"), "give --memory or --max-kl, one of them"),
        (("--context", "8k", "--memory", "25%"), "--memory must be bytes, such as 2GiB: '25%'"),
        (("--context", "eight", "--memory", "1GiB"), "--context must be tokens, such as 8192 or 32k: 'eight'"),
        (("--context", "0", "--memory", "1GiB"), "--context must be tokens, such as 8192 or 32k: '0'"),
        (("--context", "8k", "--max-kl", "-1"), "--max-kl must be above 0: -1.0"),
        (("--context", "8k", "--max-kl", "inf"), "--max-kl must be above 0: inf"),
        (("--context", "8k", "--memory", "1GiB", "--batch", "0"), "--batch must be at least 1: 0"),
        (("--context", "8k", "--memory", "1GiB", "--text", "nowhere"), "nowhere: no such file"),
        (("--context", "8k", "--memory", "1GiB", "--policy", "nope"), "unknown policy 'nope'"),
    ],
)
def test_bad_input_is_one_line(kv, words, message):
    """Exit code 2, nothing on stdout."""
    result = kv("recommend", "--model", "smollm2", *words)

    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_embedded_model_knows_no_text(kv):
    """And says so."""
    result = kv("recommend", "--model", "testbed", "--context", "1k", "--memory", "1MiB")

    assert result.exit_code == 2
    assert "--model testbed: knows no text" in result.stderr


@pytest.mark.parametrize(("text", "tokens"), [("8192", 8192), ("32k", 32768), ("1K", 1024)])
def test_tokens(text, tokens):
    """A k is 1024."""
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5k", "٣", "9" * 12])
def test_what_is_no_number_of_tokens(text):
    """Refused."""
    with pytest.raises(InputError):
        parse_tokens(text)
