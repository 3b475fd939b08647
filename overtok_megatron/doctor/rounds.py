"""Which ranks measure their link when: rounds of a tournament, in which pairs run side by side and no rank plays twice."""

from collections.abc import Sequence

Pair = tuple[int, int]


def tournament(players: int) -> list[list[Pair]]:
    """Rounds in which every two of `players` meet once and nobody meets two at a time; the circle method.

    n - 1 rounds where n is even; n rounds where it is odd, in each of which one player rests.
    """
    if players < 2:
        return []
    even = players + players % 2
    circle = list(range(even))
    rounds = []
    for _ in range(even - 1):
        pairs = [(circle[index], circle[even - 1 - index]) for index in range(even // 2)]
        rounds.append([(min(pair), max(pair)) for pair in pairs if max(pair) < players])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def pair_rounds(hosts: Sequence[Sequence[int]], most: int) -> list[list[Pair]]:
    """Rounds of pairs of ranks: first inside all hosts at once, then between hosts.

    hosts: the ranks of each. Between two hosts the ranks of equal place are paired, at the same time, as the ranks of a run
    send. most: of each kind at most so many rounds, spread evenly over all; every host then meets so many others.
    """
    inside = [tournament(len(ranks)) for ranks in hosts]
    rounds = []
    for turn in _spread(max(map(len, inside), default=0), most):
        rounds.append(
            [
                (ranks[a], ranks[b])
                for ranks, own in zip(hosts, inside, strict=True)
                for a, b in (own[turn] if turn < len(own) else [])
            ]
        )
    between = tournament(len(hosts))
    for turn in _spread(len(between), most):
        rounds.append([pair for a, b in between[turn] for pair in zip(hosts[a], hosts[b], strict=False)])
    return rounds


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spaced."""
    kept = min(count, most)
    return [index * count // kept for index in range(kept)]
