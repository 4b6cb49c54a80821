"""What stays of regions that are given with the cache: fair shares and whitelists (arXiv:2510.00231), and fading."""

import numpy as np
import pytest
import yaml

from tests.oracles.comparison import assert_holds_what_the_oracle_holds, shipped
from tests.oracles.simulation import Head
from tests.oracles.test_snapkv import Votes

REGIONS = {"defense": [(1, 5), (9, 11)], "directive": (5, 9)}


class Regional(Votes):
    """Votes of candidates whose regions are known: 0 for those that are in none."""

    def regions(self, head: Head) -> list[int]:
        places = [head.entries[slot].position for slot in self.candidates(head)]
        return [1 if 1 <= place < 5 or 9 <= place < 11 else 2 if 5 <= place < 9 else 0 for place in places]


class FairlyEvicted(Regional):
    """Each region, and what is in none, keeps its share of the candidates; largest remainders are rounded up."""

    def chosen(self, head: Head, scores: np.ndarray, count: int) -> list[int]:
        regions, kept = self.regions(head), []
        sizes = {region: regions.count(region) for region in sorted(set(regions))}
        whole = {region: count * size // len(regions) for region, size in sizes.items()}
        remainders = sorted(sizes, key=lambda region: (-(count * sizes[region] % len(regions)), region))
        for region in remainders[: count - sum(whole.values())]:
            whole[region] += 1
        for region, quota in whole.items():
            inside = [index for index, own in enumerate(regions) if own == region]
            kept += [inside[index] for index in self.best(scores[inside], quota)]
        return kept


class Whitelisted(Regional):
    """Regions first, as far as they fit; then the best of what is in none."""

    def chosen(self, head: Head, scores: np.ndarray, count: int) -> list[int]:
        regions = self.regions(head)
        listed = [index for index, region in enumerate(regions) if region]
        others = [index for index, region in enumerate(regions) if not region]
        first = self.best(scores[listed], min(count, len(listed)))
        rest = self.best(scores[others], count - len(first))
        return [*(listed[index] for index in first), *(others[index] for index in rest)]


class Fading(Regional):
    """Of the votes above a head's lowest, one region keeps 0.9, halved with every 6 tokens; the other one none."""

    spans_left = 0  # newest spans of the first region that keep everything

    def scores(self, heads: list[Head]) -> list[np.ndarray]:
        found = []
        for head, votes in zip(heads, super().scores(heads), strict=True):
            newest, lowest = max(entry.position for entry in head.entries), votes.min()
            places = [head.entries[slot].position for slot in self.candidates(head)]
            shares = {0: lambda _: 1.0, 1: lambda age: 0.9 * 0.5 ** (age / 6), 2: lambda _: 0.0}
            begun = [span for span in REGIONS["defense"] if span[0] <= newest][-self.spans_left :]
            spared = {place for span in begun for place in range(*span) if self.spans_left}
            left = [
                1.0 if place in spared else shares[region](newest - place)
                for region, place in zip(self.regions(head), places, strict=True)
            ]
            found.append(lowest + (votes - lowest) * np.array(left))
        return found


class FadingButTheNewest(Fading):
    spans_left = 1


@pytest.mark.parametrize(("oracle", "newest"), [(Fading, 0), (FadingButTheNewest, 1)])
@pytest.mark.parametrize("every", [1, 4])
def test_regions_fade_and_go_first(every, oracle, newest):
    given = 14, every, 1, 4
    policy = shipped("snapkv", *given, queries=4)
    (votes,) = yaml.safe_load(policy.to_yaml())["score"]
    del votes["weight"]
    inner = {"use": "by_region", "region": "directive", "share": 0, "of": votes}
    fading = {"use": "by_region", "region": "defense", "share": 0.9, "half_life": 6, "newest": newest, "of": inner}
    policy = shipped("snapkv", *given, score=[fading])
    assert_holds_what_the_oracle_holds(policy, oracle, *given, 4, regions=REGIONS)


@pytest.mark.parametrize("every", [1, 4])
def test_each_region_keeps_the_same_share(every):
    given = 14, every, 1, 4
    policy = shipped("fair", *given, queries=4)
    assert_holds_what_the_oracle_holds(policy, FairlyEvicted, *given, 4, regions=REGIONS)


@pytest.mark.parametrize("budget", [12, 18])
def test_regions_are_kept_before_anything_else(budget):
    """Of ten entries in regions, the smaller budget has room for eight."""
    given = budget, 2, 0, 4
    policy = shipped("fair", *given, queries=4, select={"use": "whitelist"})
    assert_holds_what_the_oracle_holds(policy, Whitelisted, *given, 4, regions=REGIONS)


def test_without_regions_the_best_stay():
    given = 14, 3, 0, 4
    for select in ("fair", "whitelist"):
        assert_holds_what_the_oracle_holds(shipped("fair", *given, queries=4, select={"use": select}), Votes, *given, 4)
