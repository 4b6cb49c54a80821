"""Files of saved caches: what is not of this policy, model or tokenizer, and what is damaged or hostile, is refused."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import kvpolicy
from kvpolicy.errors import AttachError, CacheError, ParameterError, SavedCacheError
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.models.support import geometry_of
from kvpolicy.integrations.transformers.saving import cache_file
from kvpolicy.plan.plan import compile_policy
from kvpolicy.plan.tensor_file import CONTENTS, digest_of
from tests.support.models import build, model, prompt
from tests.support.policies import held, small
from tests.support.states import everything, reachable


@pytest.fixture(scope="module")
def attachment():
    with everything().attach(build("gemma3")) as attachment:
        yield attachment


@pytest.fixture(scope="module")
def good(attachment, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "c.safetensors"
    filled(attachment).save(path)
    return path


def filled(attachment, count=40):
    tokens, mask = prompt(count, count - 11)
    cache = attachment.cache()
    with torch.no_grad():
        attachment.model(tokens, attention_mask=mask, past_key_values=cache)
    return cache


def contents(path):
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def forged(path, tensors, about):
    """A file that somebody has written, digest of the contents and all."""
    said = {key: text for key, text in about.items() if key != CONTENTS}
    save_file(tensors, path, metadata={**said, CONTENTS: digest_of(tensors, said)})
    return path


def refused(attachment, path, message, **options):
    with pytest.raises(SavedCacheError, match=message) as found:
        attachment.load_cache(path, **options)
    text = str(found.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 700


# -- of something else -------------------------------------------------------------------------------------------------


def other_weights():
    one = build("gemma3")
    with torch.no_grad():
        one.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    return one


def test_a_cache_of_another_policy_is_refused(good):
    with small("snapkv").attach(build("gemma3")) as attachment:
        refused(attachment, good, "was saved for another policy: '[0-9a-f]{16}', here '[0-9a-f]{16}'")


@pytest.mark.parametrize(
    ("one", "what"),
    [
        (other_weights, "model"),
        (lambda: build("gemma3", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]), "model"),
        (lambda: build("gemma3", dtype=torch.bfloat16), "dtype"),
    ],
    ids=["other weights", "fewer layers", "another dtype"],
)
def test_a_cache_of_another_model_is_refused(good, one, what):
    with everything().attach(one()) as attachment:
        refused(attachment, good, f"was saved for another {what}")


def test_a_cache_of_another_calibration_is_refused(tmp_path):
    """Entries are packed in its basis: with another one they would be read wrongly, and nobody would notice."""
    policy = small("snapkv", store={"use": "latent", "rank": 0.5, "value_bits": 8, "value_group": 8, "batch": 2})
    one = build()
    first, second = (policy.calibrate(one, prompt(64, 64, seed=seed)[0]) for seed in (0, 1))
    with policy.attach(one, calibration=first) as attachment:
        filled(attachment).save(tmp_path / "c")
    with policy.attach(one, calibration=second) as attachment:
        refused(attachment, tmp_path / "c", "was saved for another calibration")


@pytest.mark.parametrize(
    ("key", "value"), [("geometry", "{}"), ("dtype", "torch.float16"), ("kvpolicy_cache", "2"), ("model", "0" * 16)]
)
def test_a_file_that_says_something_else_is_refused(good, attachment, tmp_path, key, value):
    tensors, about = contents(good)
    refused(attachment, forged(tmp_path / "c", tensors, {**about, key: value}), "another|no saved cache")


# -- tokenizers --------------------------------------------------------------------------------------------------------


def tokenizer(*words, **special):
    model = WordLevel({word: number for number, word in enumerate(("[UNK]", "[PAD]", *words))}, unk_token="[UNK]")  # noqa: S106
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), pad_token="[PAD]", **special)  # noqa: S106


def test_the_tokenizer_is_compared_if_it_is_given(attachment, tmp_path):
    own, cache = tokenizer("a", "b"), filled(attachment)
    cache.save(tmp_path / "with", tokenizer=own)
    cache.save(tmp_path / "without")
    own(["a", "a b"], padding=True, truncation=True, max_length=4)  # which leaves its mark on the backend
    attachment.load_cache(tmp_path / "with", tokenizer=own)
    attachment.load_cache(tmp_path / "with", tokenizer=tokenizer("a", "b"))
    attachment.load_cache(tmp_path / "with")
    others = [tokenizer("b", "a"), tokenizer("a", "b", "c")]
    others += [tokenizer("a", "b", eos_token=token) for token in ("b", "[PAD]")]
    for other in others:
        refused(attachment, tmp_path / "with", "another tokenizer", tokenizer=other)
    refused(attachment, tmp_path / "without", "has no digest of a tokenizer", tokenizer=own)


@pytest.mark.parametrize("given", [7, "bert", object()], ids=["number", "text", "object"])
def test_what_is_no_tokenizer_is_refused_before_anything_is_done(given, attachment, good, tmp_path):
    with pytest.raises(ParameterError, match="tokenizer: must be a tokenizer"):
        filled(attachment).save(tmp_path / "c", tokenizer=given)
    with pytest.raises(ParameterError, match="tokenizer: must be a tokenizer"):
        attachment.load_cache(good, tokenizer=given)
    assert not list(tmp_path.iterdir())


class Slow:
    """A tokenizer without a backend of the tokenizers library."""

    def __init__(self, *words):
        self.words, self.special_tokens_map = words, {"pad_token": "[PAD]"}

    def get_vocab(self):
        return {word: number for number, word in enumerate(self.words)}


def test_tokenizers_without_a_backend_are_known_by_their_vocabulary(attachment, tmp_path):
    filled(attachment).save(tmp_path / "c", tokenizer=Slow("a", "b"))
    attachment.load_cache(tmp_path / "c", tokenizer=Slow("a", "b"))
    refused(attachment, tmp_path / "c", "another tokenizer", tokenizer=Slow("b", "a"))


# -- damaged -----------------------------------------------------------------------------------------------------------


def test_bytes_that_have_changed_are_noticed(good, attachment, tmp_path):
    raw, path = bytearray(good.read_bytes()), tmp_path / "c"
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    for place in range(start, len(raw), 997):
        raw[place] ^= 0x10
        path.write_bytes(raw)
        refused(attachment, path, "is damaged")
        raw[place] ^= 0x10


def test_files_that_are_cut_off_or_none_are_refused(good, attachment, tmp_path):
    raw, path = good.read_bytes(), tmp_path / "c"
    for size in (0, 5, 8, 300, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        refused(attachment, path, "cannot be read as safetensors")
    refused(attachment, tmp_path / "nowhere", "cannot be read")
    refused(attachment, tmp_path, "cannot be read")
    path.write_bytes(struct.pack("<Q", 2**30))
    os.truncate(path, 2**30 + 100)
    refused(attachment, path, "its header has")
    save_file({"a": torch.ones(1)}, path)
    refused(attachment, path, "is no saved cache of kvpolicy")


def test_calibrations_are_no_caches_and_caches_no_calibrations(good, tmp_path):
    policy = small("snapkv", store={"use": "latent", "rank": 0.5, "value_bits": 8, "value_group": 8, "batch": 2})
    one = build()
    measured = policy.calibrate(one, prompt(64, 64)[0])
    measured.save(tmp_path / "m")
    with policy.attach(one, calibration=measured) as attachment:
        refused(attachment, tmp_path / "m", "is no saved cache")
    with pytest.raises(kvpolicy.KVPolicyError, match="is not a calibration"):
        policy.attach(one, calibration=good)


# -- hostile: the digest is right, the contents are not ----------------------------------------------------------------


def numbers(change):
    """Another number under a name."""

    def changed(tensors, about):
        found = json.loads(about["numbers"])
        change(found)
        about["numbers"] = json.dumps(found)

    return changed


def tensor(name, change):
    def changed(tensors, _about):
        tensors[name] = change(tensors[name]).contiguous()

    return changed


def put(name, place, value):
    def change(one):
        one = one.clone()
        one.flatten()[place] = value
        return one

    return tensor(name, change)


def text(key, value):
    return lambda _tensors, about: about.__setitem__(key, value)


SLOTS, KEYS = "layers.1.storage.slots", "layers.1.storage.keys"
HOSTILE = {
    "a layer is missing": lambda tensors, _: [tensors.pop(name) for name in sorted(tensors) if "layers.2" in name],
    "another layer": lambda tensors, _: tensors.update({"layers.7.num_tokens": torch.tensor([1, 2])}),
    "a column is missing": lambda tensors, _: tensors.pop(f"{SLOTS}.columns.positions"),
    "another column": lambda tensors, _: tensors.update({f"{SLOTS}.columns.votes": torch.ones(3)}),
    "a number is missing": numbers(lambda found: found.pop("layers.1.seq_len")),
    "another number": numbers(lambda found: found.update(more=1)),
    "a flag is a number": numbers(lambda found: found.update({"layers.1.compressed": 1})),
    "a count is NaN": numbers(lambda found: found.update({"layers.1.seq_len": float("nan")})),
    "a count is infinite": numbers(lambda found: found.update({"layers.1.scaling": float("inf")})),
    "a count is negative": numbers(lambda found: found.update({"layers.1.seq_len": -1})),
    "a count is huge": numbers(lambda found: found.update({"layers.1.seq_len": 10**30})),
    "a count is a mapping": numbers(lambda found: found.update({"layers.1.seq_len": {}})),
    "layers have seen different tokens": numbers(lambda found: found.update({"layers.1.seq_len": 41})),
    "more cannot be undone than came": numbers(lambda found: found.update({"layers.1.rollback_limit": 99})),
    "nothing was evicted": numbers(lambda found: found.update({"layers.1.compressed": False})),
    "a window of another model": numbers(lambda found: found.update({"layers.0.sliding_window": 17})),
    "a window without entries": numbers(lambda found: found.update({"layers.0.is_initialized": False})),
    "a window of other tokens": numbers(lambda found: found.update({"layers.0.cumulative_length": 12})),
    "room of queries": numbers(lambda found: found.update({"layers.1.window.room": 10**9})),
    "the oldest query": numbers(lambda found: found.update({"layers.1.window.oldest": 4})),
    "numbers are no mapping": text("numbers", "[]"),
    "numbers are no JSON": text("numbers", "{"),
    "numbers are deep": text("numbers", "[" * 100_000),
    "numbers are missing": lambda _, about: about.pop("numbers"),
    "other rows": text("rows", "3"),
    "other tokens": text("seen", "3"),
    "tokens of rows": put("layers.1.num_tokens", 0, 99),
    "tokens of rows in one layer": put("layers.1.num_tokens", 0, 39),
    "negative tokens of rows": put("layers.1.num_tokens", 0, -1),
    "more rows": tensor("layers.1.num_tokens", lambda one: one.repeat(3)),
    "rows are no numbers": tensor("layers.1.num_tokens", lambda one: one.float()),
    "lengths beyond capacity": put(f"{SLOTS}.lengths", 0, 2**20),
    "lengths of other stores": put(f"{SLOTS}.lengths", 0, 3),
    "lengths below zero": put(f"{SLOTS}.lengths", 0, -3),
    "capacity": put(f"{SLOTS}.capacity", 0, 2**39),
    "capacity of other heads": tensor(f"{SLOTS}.capacity", lambda one: one[:, :1]),
    "more is packed than is due": put(f"{KEYS}.packed.lengths", 0, 3),
    "segments that are not there": tensor(f"{KEYS}.stuck", lambda _: torch.tensor([[7, 7]])),
    "positions behind the lengths": put(f"{SLOTS}.columns.positions", slice(None), 1),
    "positions of tokens that did not come": put(f"{SLOTS}.columns.positions", 3, 1000),
    "positions twice": put(f"{SLOTS}.columns.positions", 1, 0),
    "positions below -1": put(f"{SLOTS}.columns.positions", 0, -5),
    "positions are no integers": tensor(f"{SLOTS}.columns.positions", lambda one: one.float()),
    "keys of another dtype": tensor(f"{KEYS}.residual.columns.keys", lambda one: one.double()),
    "keys of another width": tensor(f"{KEYS}.residual.columns.keys", lambda one: one[:, :4]),
    "keys behind the lengths are NaN": put(f"{KEYS}.residual.columns.keys", slice(-8, None), float("nan")),
    "queries of other heads": tensor("layers.1.window.queries", lambda one: one[:, :2]),
    "queries of tokens that did not come": put("layers.1.window.positions", 0, 1000),
    "state of other rows": lambda tensors, _: tensors.update(
        {name: one[:1].contiguous() for name, one in tensors.items() if "row_state" in name}
    ),
    "the first prompt of other rows": lambda tensors, _: tensors.update({"spans.prompt": torch.tensor([1, 2, 3])}),
    "a first prompt that is over and not there": numbers(lambda found: found.update({"spans.prompt_is_over": True})),
    "regions that are none": text("regions", "7"),
    "regions of other rows": text("regions", '[["a"], [[[1, 0, 4]], [], []]]'),
    "regions that overlap": text("regions", '[["a", "b"], [[[1, 0, 4], [2, 3, 5]]]]'),
    "regions without a name": text("regions", '[["a"], [[[2, 0, 4]]]]'),
    "regions that are far away": text("regions", f'[["a"], [[[1, 0, {2**40}]]]]'),
    "regions with two names": text("regions", '[["a", "a"], [[[1, 0, 4]]]]'),
    "regions that are text": text("regions", '[["a"], [[["1", "0", "4"]]]]'),
    "a window of fewer entries": tensor("layers.0.keys", lambda one: one[:, :, :3]),
    "a window of other rows": tensor("layers.0.values", lambda one: one[:1]),
    "a window in another dtype": tensor("layers.0.keys", lambda one: one.double()),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_contents_that_contradict_the_plan_or_each_other(change, good, attachment, tmp_path):
    tensors, about = contents(good)
    change(tensors, about)
    refused(attachment, forged(tmp_path / "c", tensors, about), "c: ")


def test_no_mutation_of_a_number_lets_another_error_out(good, attachment, tmp_path):
    """Whatever stands in the place of a number or a count, a cache comes out or an error of ours."""
    _, about = contents(good)
    for name in json.loads(about["numbers"]):
        for value in (True, 0, 1, 3, 2**40, 0.5, None, "x", []):
            tensors, about = contents(good)
            numbers(lambda found, name=name, value=value: found.update({name: value}))(tensors, about)
            path = forged(tmp_path / "c", tensors, about)
            try:
                cache = attachment.load_cache(path)
                with torch.no_grad():
                    attachment.model(prompt(3, 3)[0], past_key_values=cache)
            except kvpolicy.KVPolicyError as error:
                assert isinstance(error, (SavedCacheError, CacheError))  # noqa: PT017 - or none at all


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_what_was_there(attachment, good, tmp_path, monkeypatch):
    path, cache = tmp_path / "c", filled(attachment)
    path.write_bytes(good.read_bytes())
    for error, expected in ((OSError("disk is full"), SavedCacheError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def broken(_tensors, name, metadata, error=error):
            Path(name).write_bytes(b"half")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("kvpolicy.plan.tensor_file.save_file", broken)
            with pytest.raises(expected):
                cache.save(path)
        assert path.read_bytes() == good.read_bytes()
        assert list(tmp_path.iterdir()) == [path]
    for where in (tmp_path, tmp_path / "nowhere" / "c", "a\0b", 7):
        with pytest.raises(SavedCacheError, match="cannot be written"):
            cache.save(where)
    assert list(tmp_path.iterdir()) == [path]


def test_a_loaded_cache_does_not_change_with_the_file(good, attachment, tmp_path):
    path = tmp_path / "c"
    path.write_bytes(good.read_bytes())
    cache = attachment.load_cache(path)
    before = [one.clone() for _, one in reachable(cache) if isinstance(one, torch.Tensor)]
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(8 + struct.unpack("<Q", path.read_bytes()[:8])[0])
        file.write(b"\xff" * (size - file.tell()))
    after = [one for _, one in reachable(cache) if isinstance(one, torch.Tensor)]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_caches_go_with_an_attachment(attachment, good, tmp_path):
    one = model()
    with small("snapkv").attach(one) as other:
        stray = filled(other).fork()
    with pytest.raises(CacheError, match="detached"):
        stray.save(tmp_path / "c")
    with pytest.raises(AttachError):
        other.load_cache(good)
    cache = filled(attachment)
    cache.owner = None
    with pytest.raises(CacheError, match="belongs to no attachment"):
        cache.save(tmp_path / "c")


def test_a_layer_of_another_kind_is_refused_by_name(attachment, tmp_path):
    cache = filled(attachment)
    cache.layers[0].extra = object()
    with pytest.raises(CacheError, match=r"layer 0: its attribute 'extra' cannot be copied or saved: a Python object"):
        cache.save(tmp_path / "c")
    with pytest.raises(CacheError, match=r"layer 0: its attribute 'extra'"):
        cache.fork()


def test_the_version_is_part_of_the_file(good):
    assert contents(good)[1]["kvpolicy_cache"] == cache_file.VERSION == "1"


def test_a_cache_whose_entries_stand_out_of_order_goes_on_with_kernels(tmp_path):
    """It was saved where holes are filled, for which kernels have no eye: they take recent entries by slot."""
    one, policy = build(num_hidden_layers=2), small("snapkv", 20, 4, protect={"recent": 4})
    found = {}
    for kernels in (False, True):
        plan = compile_policy(policy.spec, geometry_of(one.config), "cpu", torch.float32, kernels=kernels)
        with Attachment(plan, one) as attachment, torch.no_grad():
            if not kernels:
                cache = attachment.cache()
                attachment.model(prompt(28)[0], past_key_values=cache)
                for _ in range(9):
                    attachment.model(torch.tensor([[5]]), past_key_values=cache)
                assert not any(layer.in_order for layer in cache.managed)
                cache.save(tmp_path / "c.safetensors")
            cache = attachment.load_cache(tmp_path / "c.safetensors")
            assert all(layer.in_order == kernels for layer in cache.managed)
            for _ in range(5):
                attachment.model(torch.tensor([[7]]), past_key_values=cache)
            cache.check_integrity()
            found[kernels] = [[sorted(slots) for slots in heads] for rows in held(cache) for heads in rows]
    assert found[True] == found[False]
