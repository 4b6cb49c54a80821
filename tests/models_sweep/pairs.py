"""Every class of transformers that generates text: pairs of a head and a model type."""

from collections.abc import Iterator

import attrs
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.models_sweep.variants import VARIANTS

HEADS = {
    "text": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,  # given text only
}


@attrs.frozen
class Pair:
    """A model type, and which of its classes is meant; `variant` names a configuration that is not the default one."""

    head: str
    model_type: str
    variant: str = ""

    @classmethod
    def of(cls, name: str) -> "Pair":
        """The pair of `text:falcon` or `text:falcon:alibi`."""
        return cls(*name.split(":"))

    @property
    def name(self) -> str:
        """What tests, the record and the page call it."""
        return ":".join(filter(None, (self.head, self.model_type, self.variant)))

    def classes(self) -> tuple[type, type]:
        """The model's class and its configuration's. Raises ImportError, KeyError or AttributeError."""
        name = HEADS[self.head][self.model_type]
        return getattr(transformers, name if isinstance(name, str) else name[0]), CONFIG_MAPPING[self.model_type]


def default_pairs() -> Iterator[Pair]:
    """All pairs of the installed transformers, each once: some classes have both heads."""
    for head, names in HEADS.items():
        for model_type, name in sorted(names.items()):
            if head == "text" or HEADS["text"].get(model_type) != name:
                yield Pair(head, model_type)


def all_pairs() -> Iterator[Pair]:
    """Those, and the configurations beside the default ones."""
    yield from default_pairs()
    yield from map(Pair.of, VARIANTS)
