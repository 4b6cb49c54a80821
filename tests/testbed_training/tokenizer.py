"""The testbed's tokenizer, built from its vocabulary; the package has it as a file."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from kvpolicy.evaluate.testbed.vocabulary import BOS, EOS, IDS, MAXIMUM_LENGTH, PAD


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer: it puts ``<bos>`` first and pads on the left."""
    backend = Tokenizer(WordLevel(dict(IDS)))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, IDS[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=MAXIMUM_LENGTH,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
