"""Texts of numbered sentences, and a small tokenizer for them."""

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from kvpolicy.evaluate.data.texts import Text

WORDS = ["miller", "baker", "widow", "king", "poet", "sailor", "guest", "judge"]
VERBS = ["waits", "dreams", "sings", "walks", "laughs", "listens"]
SENTENCES = [f"Sentence {number}: the {WORDS[number % 8]} {VERBS[number % 6]} by the river. " for number in range(400)]
TEXTS = tuple(Text(f"part {part}", "".join(SENTENCES[part::4])) for part in range(4))
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|user|>", "<|end|>", "<|assistant|>"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


def tokenizer_of(template):
    """A small byte-level tokenizer that begins a text with <s>."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), Bytes()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*(text.text for text in TEXTS), "End. \n\nAnd\n\n" * 200], trainer)
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED)
    made.chat_template = template
    return made
