"""The conformance suite finds what is wrong with a scorer that reads prompts again, or observes chunks."""

import attrs
import pytest
import torch

from kvpolicy.errors import PluginContractError
from kvpolicy.stages import Needs, Pass, Scorer, State
from kvpolicy.stages.conformance import check_plugin, conformance_cases
from kvpolicy_plugins.scorers.attention_based.chunk_attention import ChunkAttention
from kvpolicy_plugins.scorers.attention_based.reconstruction import Reconstruction
from kvpolicy_plugins.scorers.history import History
from tests.support.rereading import Reread


@attrs.frozen
class Given(Scorer):
    """Remembers the largest logit, and does what it is told."""

    name = "given"

    wants: object = None
    sees: object = None
    declared: bool = True
    norms: bool = False

    def needs(self):
        return Needs(passes=self.declared, output_projection=self.norms, hidden_norms=self.norms)

    def slot_state(self):
        return (State("most", -1.0),)

    def passes(self, prompt):
        return [Pass(prompt.tokens)] if self.wants is None else self.wants(prompt)

    def observe_pass(self, query_logits, state):
        if self.sees is not None:
            return self.sees(query_logits, state)
        return {"most": state["most"].maximum(query_logits.logits.amax((2, 3)))}

    def score(self, view):
        return view.slot_state["most"]


def drawn(prompt):
    return [Pass(torch.randint(1, 9, (3,)))]


def written(prompt):
    prompt.tokens.clamp_(min=0)
    return []


def counting(query_logits, state):
    return {"most": state["most"] + query_logits.logits.shape[3]}


def replacing(query_logits, state):
    return {"most": query_logits.probabilities.amax((2, 3))}


def mixing(query_logits, state):
    most = query_logits.probabilities.amax((2, 3))
    return {"most": state["most"].maximum(most * most.mean())}


def ignoring_zeros(query_logits, state):
    outputs, hidden = query_logits.norms
    weighed = query_logits.probabilities / hidden[:, None, None, :, None] * outputs[:, :, :, None]
    return {"most": state["most"].maximum(weighed.amax((2, 3)))}


def unlike(query_logits, state):
    outputs, hidden = query_logits.norms
    return {"most": state["most"].maximum(outputs.amax(2) / hidden.mean())}


def scaling_norms(query_logits, state):
    query_logits.norms[1].mul_(2)
    return {}


def writing(query_logits, state):
    state["most"].add_(0)
    return {}


WRONG = {
    "gave a pass of torch.int64 [0]": {"wants": lambda prompt: [Pass(prompt.tokens[:0])]},
    "gave 3 as `passes`": {"wants": lambda prompt: 3},
    "raised in `passes`: IndexError": {"wants": lambda prompt: [Pass(prompt.tokens[30][None])]},
    "gave other passes the second time": {"wants": drawn},
    "changed its input 'tokens'": {"wants": written},
    "gives passes, expected none": {"declared": False},
    "observed a pass and returned ['other'], expected only ['most']": {"sees": lambda seen, state: {"other": seen.own}},
    "returned shape": {"sees": lambda seen, state: {"most": seen.own}},
    "observed a pass and returned NaN in 'most'": {"sees": lambda seen, state: {"most": state["most"] * torch.nan}},
    "gives a different result for a pass in parts": {"sees": replacing},
    "gives a different result with pads behind a pass": {"sees": counting},
    "gives a different result for one row of a pass": {"sees": mixing},
    "changed its input 'most'": {"sees": writing},
    "changed its input 'hidden norms'": {"sees": scaling_norms, "norms": True},
    "ValueError: these are logits without norms": {"sees": ignoring_zeros},
    "different result with pads behind a pass: Tensor-likes": {"sees": ignoring_zeros, "norms": True},
    "different result for a pass in parts: Tensor-likes": {"sees": unlike, "norms": True},
}


@pytest.mark.parametrize(("message", "given"), WRONG.items(), ids=WRONG)
def test_a_broken_scorer_is_found_out(message, given):
    with pytest.raises(PluginContractError) as caught:
        check_plugin(Given(**given))
    assert message in str(caught.value)
    assert "scorer 'given'" in str(caught.value)


@attrs.frozen
class Chunked(Given):
    """The same of chunks."""

    name = "chunked"

    def needs(self):
        return Needs(chunk=4)

    def passes(self, prompt):
        return []

    def observe_chunk(self, query_logits, state):
        return self.observe_pass(query_logits, state)


WRONG_OF_CHUNKS = {
    "observed a chunk and returned ['other'], expected only ['most']": lambda seen, state: {"other": state["most"]},
    "observed a chunk and returned NaN in 'most'": lambda seen, state: {"most": state["most"] * torch.nan},
    "gives a different result for a chunk in parts": replacing,
    "gives a different result with pads behind a chunk": counting,
    "gives a different result for one row of a chunk": mixing,
    "changed its input 'most'": writing,
}


@pytest.mark.parametrize(("message", "sees"), WRONG_OF_CHUNKS.items(), ids=WRONG_OF_CHUNKS)
def test_a_scorer_that_observes_chunks_wrongly_is_found_out(message, sees):
    with pytest.raises(PluginContractError) as caught:
        check_plugin(Chunked(sees=sees))
    assert message in str(caught.value)
    assert "scorer 'chunked'" in str(caught.value)


SOUND = {
    "all": Reread(),
    "nearby": Reread(7, nearby=True),
    "weighed": Reconstruction(7, 2, "output_norm"),
    "history": History(Reconstruction(7, 2, "output_norm")),
    "chunks": ChunkAttention(7),
    "chunks filled with zeros": ChunkAttention(40, 2, zeros=True),
    "history of chunks": History(ChunkAttention(7)),
}


@pytest.mark.parametrize("scorer", SOUND.values(), ids=SOUND)
def test_a_sound_one_passes(scorer):
    names = {name for name, _ in conformance_cases(scorer)}
    assert {"gives passes as declared", "observes passes and chunks as declared", "ignores pads"} <= names
    check_plugin(scorer)
