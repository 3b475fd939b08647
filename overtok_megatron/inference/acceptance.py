"""Which drafted tokens are accepted: the rule of speculative sampling, by which texts have the distribution of plain decoding.

The draft x at a position was drawn from q, and the model's own distribution there is p, which has the request's temperature,
top-k and top-p. x is accepted with probability min(1, p(x) / q(x)); else the token is drawn from the residual distribution,
max(0, p - q) normalised, and later drafts of the sequence are dropped. Where all are accepted, one more token, the bonus, is
drawn from the model's distribution after them. Each token then has the distribution p whatever q is (Leviathan et al., arXiv
2211.17192, appendix A.1; Chen et al., arXiv 2302.01318), and a sequence is continued by 1 to k + 1 tokens. Greedy decoding is
the case in which p and q have one token each: a draft is accepted while it is the argmax, and the argmax follows.

q has the request's temperature, top-k and top-p as well, which makes it more like p; the rule does not need it.

Shapes: b sequences, k drafts of each, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from overtok_megatron.inference.sampling import Draw, Sampling, distribution
from overtok_megatron.parallel.uploading import moved


@dataclass
class AcceptanceCounts:
    """What became of the drafts so far. passes: forward passes that verified drafts, counted for each sequence that took part.

    accepted[j]: the passes that accepted draft j + 1, and so all before it.
    """

    passes: int = 0
    accepted: list[int] = field(default_factory=list)

    def add(self, accepted: Sequence[int], num_drafts: int) -> None:
        """Count one pass over sequences of which these numbers of drafts were accepted."""
        self.accepted += [0] * (num_drafts - len(self.accepted))
        for count in accepted:
            for index in range(count):
                self.accepted[index] += 1
        self.passes += len(accepted)

    @property
    def accepted_per_pass(self) -> float:
        """Drafts that a pass accepts on average, per sequence. A pass gives one token more than it accepts."""
        return sum(self.accepted) / self.passes if self.passes else 0.0

    @property
    def shares(self) -> list[float]:
        """The share of passes that accepted the first draft, the second, and so on."""
        return [count / self.passes if self.passes else 0.0 for count in self.accepted]

    def __str__(self) -> str:
        """One line."""
        if not self.passes:
            return "speculative: no pass had drafts to verify"
        shares = ", ".join(f"{share:.1%}" for share in self.shares)
        return (
            f"speculative: {self.accepted_per_pass:.2f} accepted tokens per pass of {len(self.accepted)} drafted "
            f"(by draft: {shares}), {self.passes} passes"
        )


def draw_tokens(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw tokens [..] int64 by inversion of probabilities [.., V] float64, which need not sum to 1.

    uniforms [..] float64 in [0, 1). A token of probability 0 is never drawn.
    """
    cumulative = probabilities.cumsum(dim=-1)
    beyond = cumulative > uniforms.unsqueeze(-1) * cumulative[..., -1:]
    beyond &= probabilities > 0.0  # sums that run in parallel may round up where nothing was added
    first = beyond.to(torch.uint8).argmax(dim=-1)
    # Rounding may lift the product to the whole sum: about once in 2^53 draws.
    return torch.where(beyond.any(dim=-1), first, probabilities.argmax(dim=-1))


def residual_distribution(p: Tensor, q: Tensor) -> Tensor:
    """From which the token in place of a rejected draft is drawn: [.., V], not normalised."""
    residual = (p - q).clamp(min=0.0)
    # A draft is only rejected where q exceeds p somewhere, and then p exceeds q elsewhere, unless the difference is rounding.
    return torch.where(residual.sum(dim=-1, keepdim=True) > 0.0, residual, p)


def bonus_distribution(p: Tensor) -> Tensor:
    """From which the token after k accepted drafts is drawn: that of the last position of p [b, k + 1, V]."""
    return p[:, -1]


def accept_drafts(p: Tensor, q: Tensor, drafts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafts of each sequence are accepted, int64 [b], and the token that follows them, int64 [b].

    p [b, k + 1, V]: the model's distributions at the positions of the drafts, and after the last one. q [b, k, V]: those that
    drafts int64 [b, k] were drawn from. uniforms [b, k + 1] in [0, 1). All float64.
    """
    rows, count = drafts.shape
    drafted = drafts.unsqueeze(-1)
    wanted, offered = p[:, :-1].gather(-1, drafted).squeeze(-1), q.gather(-1, drafted).squeeze(-1)  # [b, k]
    stays = uniforms[:, :-1] * offered < wanted  # u < p / q; q is never 0 at a token that was drawn from it
    accepted = _leading(stays)
    at = accepted.clamp(max=count - 1)  # of the first rejected draft; the last one where none is
    everyone = torch.arange(rows, device=p.device)
    rejected = residual_distribution(p[everyone, at], q[everyone, at])
    remaining = torch.where((accepted == count).unsqueeze(-1), bonus_distribution(p), rejected)
    return accepted, draw_tokens(remaining, uniforms[:, -1])


def accept_greedy(logits: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
    """As `accept_drafts`, from the model's logits [b, k + 1, V], for greedy decoding."""
    best = logits.argmax(dim=-1)  # [b, k + 1]
    accepted = _leading(best[:, :-1] == drafts)
    return accepted, best.gather(1, accepted.unsqueeze(1)).squeeze(1)


def _leading(stays: Tensor) -> Tensor:
    """How many entries of each row of stays bool [b, k] are true before the first that is not, [b]."""
    return stays.long().cumprod(dim=1).sum(dim=1)


@dataclass(eq=False)
class _Group:
    """Sequences whose tokens are drawn alike. rows: an index of their rows. uniforms [b, 2 k + 1]; None = greedy."""

    rows: Tensor | slice
    sampling: Sampling
    uniforms: Tensor | None
    proposed: list[Tensor] = field(default_factory=list)  # one [b, V] for each draft so far


class DraftedPass:
    """The choices of one pass over b sequences: first `draft` k times, then `accept`.

    Each sequence takes 2 k + 1 numbers from its own random stream, so its text does not depend on the others.
    """

    def __init__(self, draws: Sequence[Draw], num_drafts: int, device: torch.device) -> None:
        self._num_drafts = num_drafts
        self._drafts: list[Tensor] = []
        self._groups = []
        alike: dict[tuple[float, int, float], list[int]] = {}
        for row, draw in enumerate(draws):
            sampling = draw.sampling
            greedy = sampling.temperature == 0.0
            key = (0.0, 0, 1.0) if greedy else (sampling.temperature, sampling.top_k, sampling.top_p)
            alike.setdefault(key, []).append(row)
        for rows in alike.values():
            index = slice(None) if len(alike) == 1 else moved(torch.tensor(rows), device)
            sampling, uniforms = draws[rows[0]].sampling, None
            if sampling.temperature > 0.0:
                numbers = [
                    torch.rand(2 * num_drafts + 1, generator=draws[row].generator, device=device, dtype=torch.float64)
                    for row in rows
                ]
                uniforms = torch.stack(numbers)
            self._groups.append(_Group(index, sampling, uniforms))

    def draft(self, logits: Tensor) -> Tensor:
        """Draw the next draft of every sequence from the proposer's logits [b, V] float32: int64 [b]."""
        position = len(self._drafts)
        assert position < self._num_drafts
        drafts = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        for group in self._groups:
            own = logits[group.rows]
            if group.uniforms is None:
                drafts[group.rows] = own.argmax(dim=-1)
            else:
                group.proposed.append(distribution(own, group.sampling))
                drafts[group.rows] = draw_tokens(group.proposed[-1], group.uniforms[:, position])
        self._drafts.append(drafts)
        return drafts

    def accept(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """How many drafts are accepted and what follows them, both int64 [b]; logits [b, k + 1, V] float32 are the model's."""
        drafts = torch.stack(self._drafts, dim=1)  # [b, k]
        accepted, following = (torch.empty_like(drafts[:, 0]) for _ in range(2))
        for group in self._groups:
            own, own_drafts = logits[group.rows], drafts[group.rows]
            if group.uniforms is None:
                result = accept_greedy(own, own_drafts)
            else:
                p, q = distribution(own, group.sampling), torch.stack(group.proposed, dim=1)
                result = accept_drafts(p, q, own_drafts, group.uniforms[:, self._num_drafts :])
            accepted[group.rows], following[group.rows] = result
        return accepted, following
