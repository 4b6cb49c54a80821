"""Models by name, path or id: the embedded one, two published as wheels, and whatever transformers loads."""

from kvpolicy.evaluate.models.load import NAMES, TESTBED, config_of, load_model, place_of

__all__ = ["NAMES", "TESTBED", "config_of", "load_model", "place_of"]
