"""Multi-token prediction (DeepSeek-V3, 2024, section 2.2): a small model that reads the target's hidden states.

For the token at position p + 1 and the target's hidden state at p, the first layer reads
x = projection([token_norm(embedding of the token); state_norm(state)]), and the logits are of the token at p + 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.model.numbers import Array
from shoal.model.record import Linear, ModelRecord


@dataclass(frozen=True, slots=True)
class Prediction:
    """A loaded module.  States are hidden states of the target, or the module's own, after the last norm.

    Attributes:
        model: layers, last norm and head.  Its embedding, which nobody reads, is the head's weight.
        embedding: [vocab_size, width].
        token_norm, state_norm: gains of the RMSNorms, [width] and [the target's hidden_size].
        projection: from both to the module's hidden_size.
        feedback: from the module's own state to one in place of the target's; None where they are equally wide.
    """

    model: ModelRecord
    embedding: Array
    token_norm: Array
    state_norm: Array
    projection: Linear
    feedback: Linear | None = None
