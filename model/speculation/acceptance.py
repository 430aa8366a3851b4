"""How many drafted tokens are accepted."""

from __future__ import annotations

# What is counted fades; a request of which little is known is taken for one like the others.
_FADES, _FADES_OVERALL = 0.97, 0.99
_WEIGHT_OF_OTHERS = 12.0
_FADES_AT_REST = 0.7  # what was seen of a request: its text has gone on meanwhile
_WEIGHT_OF_PRIOR = 2.0


class Acceptance:
    """The chance of a drafted token to be accepted if all before it were, for each request of the batch.

    Args:
        max_num_seqs: rows.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._accepted, self._rejected = [0.0] * max_num_seqs, [0.0] * max_num_seqs
        self._all_accepted = self._all_rejected = 0.0

    def join(self, row: int) -> None:
        """Another request has the row now."""
        self._accepted[row] = self._rejected[row] = 0.0

    def count(self, row: int, num_accepted: int, num_rejected: int) -> None:
        """So many tokens of a proposal for the request in this row were accepted, and 0 or 1 then rejected;
        it may be none at all, and what was seen before fades."""
        self._accepted[row] = _FADES * self._accepted[row] + num_accepted
        self._rejected[row] = _FADES * self._rejected[row] + num_rejected
        self._all_accepted = _FADES_OVERALL * self._all_accepted + num_accepted
        self._all_rejected = _FADES_OVERALL * self._all_rejected + num_rejected

    def fade(self, row: int) -> None:
        """Nothing was proposed for the request for a while."""
        self._accepted[row] *= _FADES_AT_REST
        self._rejected[row] *= _FADES_AT_REST

    @property
    def num_seen(self) -> float:
        """Tokens that were judged, by what is remembered of them."""
        return self._all_accepted + self._all_rejected

    def rate(self, row: int, prior: float) -> float:
        """For the request in this row; `prior` as far as too little was seen of all."""
        own = self._accepted[row] + self._rejected[row]
        others = (self._all_accepted + _WEIGHT_OF_PRIOR * prior) / (self.num_seen + _WEIGHT_OF_PRIOR)
        return (self._accepted[row] + _WEIGHT_OF_OTHERS * others) / (own + _WEIGHT_OF_OTHERS)
