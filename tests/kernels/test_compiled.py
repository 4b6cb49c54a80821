"""Every kernel compiles for sm_80, sm_90 and sm_100 and keeps its registers, its wide loads and its tensor cores.

One build of each kernel for one target in turn, or with KVPOLICY_TARGETS=all every build for all.
Processes of their own, because nothing can be compiled where Triton was imported to interpret.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from kvpolicy.errors import InputError
from kvpolicy.policy import load
from kvpolicy.stages import Tile
from kvpolicy_kernels.common.compile_spec import CompileSpec
from tests.compiled_kernels import discover
from tests.compiled_kernels.__main__ import compiled
from tests.compiled_kernels.kernel_table import differences, read_table
from tests.compiled_kernels.page import page_of
from tests.compiled_kernels.ptx import instructions_of
from tests.compiled_kernels.target import CAPABILITIES, Compiled, compile_build
from tests.support.made_once import made_once

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "reference" / "kernels.json"
EVERYTHING = os.environ.get("KVPOLICY_TARGETS") == "all"
FAULTY_FOR = CAPABILITIES if EVERYTHING else (90,)  # what samples with faults are compiled for
GOOD = ("copy", "product")
BAD = {
    "unaligned": "no load of 16 bytes",
    "no product": "no tensor cores",
    "spilt": "registers are spilt",
    "deep": "of shared memory",
}
WRONG = {"refused": "cannot be reassigned", "misnamed": "BLOCKS", "incomplete": "the kernel has"}


def run(*words, cache):
    """Run Python in the repository, with a compiler and a cache folder of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment = {**clean, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run(  # noqa: S603
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What the command that writes the table says, and the table."""
    return made_once(tmp_path_factory, "compiled", all_compiled)


def all_compiled(folder):
    words = () if EVERYTHING else ("--few",)
    done = run("-m", "tests.compiled_kernels", "--write", str(folder / "kernels"), *words, cache=folder / "cache")
    file = folder / "kernels.json"
    return {"faults": done.stderr if done.returncode else "", "table": read_table(file) if file.exists() else None}


def test_every_kernel_passes_every_gate(outcome):
    assert outcome["faults"] == ""


def test_every_kernel_is_compiled_and_for_every_target_some(outcome):
    found = {target: set() for target in CAPABILITIES}
    for one in outcome["table"]["compiled"]:
        found[one["capability"]].add(one["name"])
    kernels = {}
    for build in discover.all_builds():
        kernels.setdefault(build.kernel, set()).add(build.name)

    assert len(kernels) >= 10
    assert found.keys() == set(CAPABILITIES)
    assert all(found.values())
    assert [own for own in kernels.values() if not own & set().union(*found.values())] == []
    assert not EVERYTHING or all(names == set().union(*kernels.values()) for names in found.values())


def test_the_table_has_every_build_for_every_target():
    recorded = {(one["name"], one["capability"]) for one in read_table(TABLE)["compiled"]}

    assert recorded == {(build.name, target) for build in discover.all_builds() for target in CAPABILITIES}


@pytest.mark.parametrize("kernel", ["score", "postprocess"])
def test_every_shipped_policy_is_among_them(kernel):
    """Those whose scorers have no tile functions only with the kernel that weighs and adds scores up."""
    names = [build.name for build in discover.all_builds()]
    own = [name.removeprefix(f"{kernel} ") for name in names if name.startswith(f"{kernel} ")]
    policies = {file.stem for file in (ROOT / "policies" / "kvpolicy_policies").glob("*.yaml")}
    tiled = {name for name in policies if any(isinstance(one.scorer.tile(), Tile) for one in load(name).spec.score)}

    assert len(tiled) >= 20
    assert (tiled if kernel == "score" else policies) - {policy for name in own for policy in name.split(", ")} == set()


def test_every_kernel_has_the_numbers_of_the_table(outcome):
    found, recorded = outcome["table"], read_table(TABLE)
    names = {(one["name"], one["capability"]) for one in found["compiled"]}
    told = [one for one in recorded["compiled"] if (one["name"], one["capability"]) in names]

    assert differences(found, {**recorded, "compiled": told}) == []


def test_page_is_made_of_the_table():
    assert TABLE.with_suffix(".md").read_text("utf-8") == page_of(read_table(TABLE))


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Kernels of which it is known what is wrong with them."""
    return made_once(tmp_path_factory, "samples", samples_compiled)


def samples_compiled(folder):
    wanted = [f"{name} {target}" for name in GOOD for target in CAPABILITIES]
    wanted += [f"{name} {target}" for name in (*BAD, *WRONG) for target in FAULTY_FOR]
    done = run("-m", "tests.kernels.compiled_samples", *wanted, cache=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", CAPABILITIES)
@pytest.mark.parametrize("name", GOOD)
def test_good_samples_have_no_faults(samples, name, target):
    assert samples[f"{name} {target}"]["faults"] == []


@pytest.mark.parametrize("target", FAULTY_FOR)
@pytest.mark.parametrize(("name", "fault"), BAD.items())
def test_bad_samples_are_found(samples, name, fault, target):
    assert any(fault in one for one in samples[f"{name} {target}"]["faults"])


@pytest.mark.parametrize("target", FAULTY_FOR)
@pytest.mark.parametrize(("name", "reason"), WRONG.items())
def test_what_does_not_compile_says_why(samples, name, reason, target):
    error = samples[f"{name} {target}"]["error"]

    assert error.startswith(f"{name}, sm_{target}: does not compile")
    assert reason in error


@pytest.mark.parametrize(("target", "kind"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")])
def test_each_target_has_its_tensor_cores(samples, target, kind):
    assert list(samples[f"product {target}"]["tensor_cores"]) == [kind]


def test_copies_of_16_bytes_are_wide_loads(samples):
    one = samples["product 90"]

    assert one["async_copies"] == one["wide_loads"] > 0
    assert one["narrow_loads"] == 0


PTX = """
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	@!%p1 ld.global.L1::evict_last.L2::cache_hint.v8.b32 { %r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8 }, [ %rd1 + 0 ], %rd9;
	ld.global.v2.b64 { %rd1, %rd2 }, [ %rd1 + 16 ];
	ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
	ld.global.nc.b64 { %rd7 }, [ %rd1 + 0 ];
	@%p2 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
	ld.global.v8.b16 { %rs1 }, [ %rd1 + 0 ];
	ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
	st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
	cp.async.cg.shared.global [ %r50 + 0 ], [ %rd4 + 0 ], 0x10, %r51;
	cp.async.ca.shared.global [ %r50 + 0 ], [ %rd4 + 0 ], 0x4, %r51;
	cp.async.commit_group;
	wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 1, 1, 1, 0, 0;
	wgmma.wait_group.sync.aligned 0;
	tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64 [%r1];
"""


def test_instructions_are_counted():
    found = instructions_of(PTX)

    assert (found.wide_loads, found.narrow_loads, found.async_copies) == (5, 4, 2)
    assert found.tensor_cores == {"wgmma": 1}


ONE = Compiled("score", 90, 4, 96, 0, 8192, 38, 4, 0, {"mma.sync": 32})


def record(*compiled, triton="3.9.0"):
    return {"form": 1, "versions": {"triton": triton}, "compiled": [attrs.asdict(one) for one in compiled]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"registers": 97}, "score, sm_90: registers was 96, is 97"),
        ({"wide_loads": 30}, "score, sm_90: wide_loads was 38, is 30"),
        ({"tensor_cores": {}}, "score, sm_90: tensor_cores was {'mma.sync': 32}, is {}"),
    ],
)
def test_changed_numbers_are_told(change, said):
    assert differences(record(attrs.evolve(ONE, **change)), record(ONE)) == [said]


def test_builds_that_came_or_went_are_told():
    other = attrs.evolve(ONE, name="finish")

    assert differences(record(other), record(ONE)) == [
        "score, sm_90: is recorded, but was not compiled",
        "finish, sm_90: is not recorded",
    ]


def test_other_versions_are_not_compared():
    assert differences(record(attrs.evolve(ONE, registers=1), triton="3.6.0"), record(ONE)) == []


def test_page_gives_one_number_where_targets_agree():
    lines = page_of(record(ONE, attrs.evolve(ONE, capability=100, registers=90))).splitlines()

    assert "| score | 4 | 96 / 90 | 8 | 38 | 4 | 0 | 32 mma.sync |" in lines


def test_interpreting_process_cannot_compile(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    with pytest.raises(InputError, match="TRITON_INTERPRET"):
        compile_build(None, 90)


def test_command_says_why_it_cannot_compile(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    with pytest.raises(SystemExit, match="TRITON_INTERPRET"):
        compiled(jobs=1)


def builds_are(monkeypatch, *found):
    monkeypatch.setattr(discover, "_of_kernels", lambda: iter(found))
    monkeypatch.setattr(discover, "_of_policies", lambda: iter(()))


def test_a_build_that_is_passed_on_is_compiled_once(monkeypatch):
    one = CompileSpec("copy", "kernel", {"N": "i32"}, {"D": 64})
    builds_are(monkeypatch, one, attrs.evolve(one), attrs.evolve(one, name="other"))

    assert [build.name for build in discover.all_builds()] == ["copy", "other"]


def test_builds_that_share_a_name_are_refused(monkeypatch):
    one = CompileSpec("copy", "kernel", {"N": "i32"}, {"D": 64})
    builds_are(monkeypatch, one, attrs.evolve(one, constants={"D": 128}))

    with pytest.raises(InputError, match="two builds have one name: copy"):
        discover.all_builds()


@pytest.mark.parametrize("text", ["{", "[]", '{"form": 0}'])
def test_what_is_no_record_is_refused(text, tmp_path):
    file = tmp_path / "kernels.json"
    file.write_text(text, encoding="utf-8")

    with pytest.raises(InputError, match=r"kernels\.json"):
        read_table(file)
