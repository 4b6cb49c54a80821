"""A small untrained model with the testbed's words: it answers nothing right, but everything runs."""

import pytest
from transformers import GenerationConfig

import kvpolicy
from kvpolicy.evaluate.tasks.case import Sources
from kvpolicy.evaluate.testbed.vocabulary import BOS, EOS, IDS, PAD
from tests.support.texts import TEMPLATE, TEXTS, tokenizer_of
from tests.support.untrained_testbed import untrained_testbed
from tests.testbed_training.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tiny():
    """Model and tokenizer."""
    special = {"pad_token_id": IDS[PAD], "bos_token_id": IDS[BOS], "eos_token_id": IDS[EOS]}
    model = untrained_testbed(max_position_embeddings=2048, **special)
    model.generation_config = GenerationConfig(do_sample=False, **special)
    return model, build_tokenizer()


@pytest.fixture(scope="session")
def policies():
    """Two shipped policies: one with an observation window, one without."""
    return kvpolicy.load("snapkv"), kvpolicy.load("streaming_llm")


@pytest.fixture(scope="module", params=[None, TEMPLATE], ids=["plain", "chat"])
def sources(request):
    """Texts, with a tokenizer that has no chat template, and with one that has."""
    return Sources(tokenizer_of(request.param), TEXTS)


@pytest.fixture(scope="module")
def plain():
    """Texts, with a tokenizer that has no chat template."""
    return Sources(tokenizer_of(None), TEXTS)
