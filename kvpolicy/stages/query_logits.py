"""What an observer of forwards or chunks, and a scorer that reads prompts again, see of the attention."""

from functools import cached_property

import attrs
import torch
from torch import Tensor


@attrs.frozen(eq=False)
class QueryLogits:
    """What the newest w queries of a forward see of the entries, those of the forward itself included.

    It is taken from the attention that is computed anyway; `logits` are -inf where a query does not see an entry.
    Of a pass they are those of its queries and of the held entries that it shows; its own entries are summed up. Of a
    chunk they are those of its queries and of its held entries, those of later tokens included.
    """

    logits: Tensor  # [B, K, G, w, T] float32, scaled q·k without votes, oldest query first
    log_votes: Tensor | None = None  # [B, K, T] float32
    own: Tensor | None = None  # [B, K, G, w] float32, of a pass: log of the sum of exp(logit) over its own entries
    sighted: bool = False  # whether every query is known to see an entry
    scaling: float = 1.0  # the attention module's own factor on q·k, which the logits contain
    # Of a pass, where the scorer's `needs` ask for them; 0 where they are not finite.
    output_norms: Tensor | None = None  # [B, K, G, T] float32, ‖v W‖₂ of an entry's value behind a query head's slice W
    hidden_norms: Tensor | None = None  # [B, w] float32, ‖h‖₂ of what attention was given for a query's token

    @cached_property
    def probabilities(self) -> Tensor:
        """[B, K, G, w, T] float32: attention with votes; zeros for a query that sees nothing, such as a pad's.

        The softmax is over the T entries, and over those of the pass itself where `own` is given.
        """
        logits = self.logits if self.log_votes is None else self.logits + self.log_votes[:, :, None, None]
        if self.own is None:
            weights = logits.softmax(-1)
            return weights if self.sighted else weights.masked_fill_(self.logits == -torch.inf, 0.0)
        total = torch.logaddexp(logits.logsumexp(-1), self.own)
        return (logits - total[..., None]).exp().masked_fill_(self.logits == -torch.inf, 0.0)

    @property
    def norms(self) -> tuple[Tensor, Tensor]:
        """`output_norms` and `hidden_norms`, for a scorer whose `needs` ask for both."""
        if self.output_norms is None or self.hidden_norms is None:
            raise ValueError(
                "these are logits without norms: declare `output_projection` and `hidden_norms` in `needs`"
            )
        return self.output_norms, self.hidden_norms
