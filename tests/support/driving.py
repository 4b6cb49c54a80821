"""Cache layers driven without a model: random entries, whose keys say who they are and what they are worth."""

import attrs
import torch

from kvpolicy.attention.attend import attend
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.cache.storage.segmented_storage import SegmentedStorage
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer
from kvpolicy.integrations.transformers.calls.padding_mask import NewTokens
from kvpolicy.plan.plan import compile_policy
from kvpolicy.spec.policy import Allocate, Weighted
from kvpolicy.stages import Geometry, HeadAllocator, Needs, Scorer
from tests.support.policies import small

HEADS, GROUP, DIM = 2, 2, 6
NAME, WORTH = 0, 1  # the components of a key that name the entry and are its score; queries are 0 there


@attrs.frozen
class Worth(Scorer):
    """What the key says."""

    name = "worth"
    queries: int = 0
    attention: bool = False
    any_order: bool = False

    def needs(self):
        return Needs(self.queries, self.attention)

    def in_any_order(self):
        return self.any_order

    def score(self, view):
        return view.keys[..., WORTH].float()


@attrs.frozen
class FirstHeads(HeadAllocator):
    """The first heads keep all they have, the last ones what is left."""

    name = "first_heads"

    def allocate(self, request):
        before = request.room.cumsum(-1) - request.room
        return (request.total[..., None] - before).clamp(min=0).minimum(request.room)


def plan_of(policy, layers=1, *, kernels=None):
    """The plan of a policy for layers without a model."""
    geometry = Geometry(tuple(range(layers)), HEADS * GROUP, HEADS, DIM)
    return compile_policy(policy.spec, geometry, "cpu", torch.float32, kernels=kernels)


def worth_plan(budget=6, every=3, sinks=1, recent=2, *, ragged=False, prefill=True, **worth):
    """A plan that keeps the entries of the highest worth."""
    protect = {"sinks": sinks, "recent": recent}
    spec = small("snapkv", budget, every, protect=protect, compress={"prefill": prefill}).spec
    spec = attrs.evolve(spec, score=(Weighted(Worth(**{"queries": 3, "attention": True, **worth})),))
    if ragged:
        spec = attrs.evolve(spec, allocate=Allocate(layers=spec.allocate.layers, heads=FirstHeads()))
    return plan_of(attrs.evolve(small("snapkv"), spec=spec))


def new_layer(plan, new_storage=SegmentedStorage):
    layer = PolicyLayer(plan, 0, new_storage=new_storage)
    layer.output_projection = output_projection
    return layer


def output_projection():
    """The weight behind the attention of a layer without a model, [H, D, C]."""
    return torch.randn(HEADS * GROUP, DIM, 5, generator=torch.Generator().manual_seed(3))


def random_entries(generator, rows, count, first_name=0):
    """Keys, values [B, K, q, D] and queries [B, H, q, D]; the keys of a token have one name in all heads."""
    keys = torch.randn(rows, HEADS, count, DIM, generator=generator)
    names = first_name + torch.arange(rows * count).reshape(rows, 1, count)
    keys[..., NAME] = names
    keys[..., WORTH] = torch.randint(0, 4, keys.shape[:3], generator=generator).float()
    values = torch.randn(rows, HEADS, count, DIM, generator=generator)
    queries = torch.randn(rows, HEADS * GROUP, count, DIM, generator=generator)
    queries[..., : WORTH + 1] = 0
    return keys, values, queries


def feed(layer, keys, values, queries, valid=None, scaling=DIM**-0.5):
    """One forward of the layer; returns the attention output [B, H, q, D]."""
    layer.update(keys, values)
    new_tokens = None if valid is None else NewTokens(valid, valid[:, :0])
    positions = layer.place_tokens(new_tokens)
    batch = QueryBatch(queries, positions, padded=new_tokens is not None and new_tokens.padded, scaling=scaling)
    output = layer.attend(batch)
    if output is None:  # the stock call, elsewhere
        output = attend(layer.storage, batch, pads=layer.padded)
    layer.finish_forward(batch)
    return output


def drive(layer, *counts, rows=1, seed=0):
    """Several forwards of random entries."""
    generator = torch.Generator().manual_seed(seed)
    for count in counts:
        feed(layer, *random_entries(generator, rows, count, layer.seq_len * rows))
