"""One policy, many models, many threads."""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from tests.support import fingerprint
from tests.support.models import build, generate, prompt
from tests.support.policies import small
from tests.support.rereading import rereading

NAMES = ("gkv", "h2o", "adakv")


@pytest.fixture
def impatient():
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(jobs):
    """The results of all jobs, started at the same moment."""
    barrier = Barrier(len(jobs))

    def run(job):
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(run, job) for job in jobs]]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", NAMES)
def test_threads_on_their_own_models_share_a_policy(name):
    policy = small(name)
    models = [build(seed=seed) for seed in range(2)]
    texts = [prompt(40, 29, seed=seed) for seed in range(2)]
    for one in models:
        policy.attach(one)
    alone = [generate(one, *text).sequences for one, text in zip(models, texts, strict=True)]
    for _ in range(2):
        pairs = zip(models, texts, strict=True)
        jobs = [lambda one=one, text=text: generate(one, *text).sequences for one, text in pairs]
        assert all(torch.equal(left, right) for left, right in zip(together(jobs), alone, strict=True))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", NAMES)
def test_threads_share_an_attached_model(name):
    one = build()
    texts = [prompt(40, 29, seed=seed) for seed in range(4)]
    with small(name).attach(one):
        alone = [generate(one, *text).sequences for text in texts]
        jobs = [lambda text=text: generate(one, *text).sequences for text in texts]
        assert all(torch.equal(left, right) for left, right in zip(together(jobs), alone, strict=True))


@pytest.mark.usefixtures("impatient")
def test_threads_attach_and_detach_their_own_models():
    tokens = prompt(30)[0]

    def often(seed):
        one = build(seed=seed)
        results = []
        for _ in range(5):
            with small("snapkv").attach(one):
                results.append(generate(one, tokens, count=3).sequences)
        assert one.config._attn_implementation == "sdpa"
        return results

    for results in together([lambda seed=seed: often(seed) for seed in range(3)]):
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("impatient")
def test_threads_read_prompts_again_on_a_shared_model():
    one = build()
    texts = [prompt(40, 29, seed=seed) for seed in range(4)]
    with rereading().attach(one):
        before = fingerprint.of_model(one)
        alone = [generate(one, *text, count=4).sequences for text in texts]
        jobs = [lambda text=text: generate(one, *text, count=4).sequences for text in texts]
        assert all(torch.equal(left, right) for left, right in zip(together(jobs), alone, strict=True))
        assert fingerprint.of_model(one) == before
