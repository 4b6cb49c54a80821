"""InfiniPot-V keeps of a video what the authors' code keeps."""

import math

import attrs
import pytest
import torch

import kvpolicy
from kvpolicy.plan.compress.step import compress_one
from kvpolicy.stages import Geometry
from kvpolicy_plugins.scorers.attention_free.frame_value_norm import FrameValueNorm
from tests.golden.families import Vectors, cases, close, family_of, same
from tests.support.views import view_of


@pytest.mark.parametrize("path", cases("test_video"), ids=lambda path: path.stem)
def test_published_results(path):
    vectors = Vectors(path)
    CHECKS[family_of(path.stem)](vectors)
    assert vectors.unread() == []


def spec_of(v):
    """The shipped policy with the parameters of a file. Without a share the code keeps no frame for being recent."""
    rows, columns = v["grid_hw"].tolist()
    share = float(v["tar_ratio"])
    recent = float(v["query_ratio"])
    policy = kvpolicy.load(
        "infinipot_v",
        protect={"sinks": int(v["system_size"]), "recent": 0},
        score=[{"use": "frame_value_norm", "rows": rows, "columns": columns, "pool": pooling_of(v)}],
        select={
            "use": "temporal_redundancy",
            "tokens_per_frame": rows * columns,
            "recent_frames": recent if share else 0,
            "share": share,
        },
    )
    return policy.spec


def pooling_of(v):
    return "depth" if v["layer_adaptive_pooling"].item() else "none"


def view_at(v, layer, held=None):
    """A layer that holds the positions [B, K, T], or everything."""
    keys, values = v["keys"][layer], v["values"][layer]
    geometry = Geometry(tuple(range(len(v["keys"]))), keys.shape[1], keys.shape[1], keys.shape[3])
    sinks = int(v["system_size"])
    if held is None:
        return view_of(keys, values=values, geometry=geometry, layer=layer, sinks=sinks)
    index = held[..., None].expand(*held.shape, keys.shape[-1])
    entries = {"values": values.gather(2, index), "positions": held}
    return view_of(keys.gather(2, index), **entries, geometry=geometry, layer=layer, sinks=sinks)


def check_pass(v):
    spec, system = spec_of(v), int(v["system_size"])
    frame = math.prod(v["grid_hw"].tolist())
    frames, total = int(v["frames"]), v["keys"].shape[3] - system
    kept_tokens = int(v["compress_frames"]) * frame
    assert total == frames * frame
    for layer in range(len(v["keys"])):
        view = view_at(v, layer)
        close(FrameValueNorm().score(view)[..., system:], v["van_raw"][layer])
        if "tar_score" in v:
            past = v["tar_score"].shape[-1]
            found = attrs.evolve(spec.select, recent_frames=float(v["query_ratio"])).second_scores(view)
            close(found[..., system : system + past], v["tar_score"][layer])
        result = compress_one(spec, view, [system + kept_tokens] * len(view.keys))
        same(result.kept[..., :system], torch.arange(system).expand(*result.kept.shape[:2], system))
        same(result.kept[..., system:] - system, v["kept"][layer])
        index = result.kept[..., None].expand(*result.kept.shape, view.keys.shape[-1])
        assert torch.equal(view.keys.gather(2, index), v["new_keys"][layer])
        assert torch.equal(view.values.gather(2, index), v["new_values"][layer])
    for name, indices in (
        ("kept_swa", torch.arange(total - kept_tokens, total)),
        ("kept_uniform", torch.arange(kept_tokens) * total // kept_tokens),
    ):
        if name in v:  # what the paper compares with
            same(v[name], indices.expand_as(v[name]))


def check_stream(v):
    """Blocks of frames as they come, with budgets that the code makes larger only near the end."""
    spec, system = spec_of(v), int(v["system_size"])
    frame, block = math.prod(v["grid_hw"].tolist()), int(v["block_frames"])
    targets, lengths = v["targets"].tolist(), v["resident_len"].tolist()
    assert max(lengths) <= block * frame
    for layer in range(len(v["keys"])):
        view = view_at(v, layer)
        held = view.positions[..., : system + block * frame]
        for turn, resident in enumerate(v["resident_after_pass"][:, layer]):
            if turn < len(targets):
                budget = system + targets[turn] * frame
                assert budget >= system + int(v["compress_frames"]) * frame
                kept = compress_one(spec, view_at(v, layer, held), [budget] * len(held)).kept
                held = held.gather(-1, kept)
            same(held[0, :, system:] - system, resident[..., : lengths[turn]])
            end = min(int(held.max()) + 1 + (block - int(v["compress_frames"])) * frame, view.keys.shape[2])
            new = torch.arange(int(held.max()) + 1, end).expand(*held.shape[:2], -1)
            held = torch.cat([held, new], -1)
        assert held.shape[-1] == system + lengths[-1]
    assert system + int(v["frames"]) * frame == view.keys.shape[2]


CHECKS = {"infinipotv": check_pass, "infinipotv_stream": check_stream}
