"""A module of multi-token prediction, trained beside its target: see `shoal.model.prediction`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .loss import chunked_acceptance_loss, chunked_distillation
from .network import Network, count_active_parameters
from .recipe import NetworkConfig, Recipe


class PredictionNetwork(Network):
    """A network whose first layer reads tokens with the target's states before them.

    Args:
        config: of the module; its head is its own.
        state_size: the target's hidden_size.
        num_unrolled: tokens that it predicts in training, all but the first one from its own states.
        dtype: see `Network`.
    """

    def __init__(
        self, config: NetworkConfig, state_size: int, num_unrolled: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(config, dtype)
        self.num_unrolled = num_unrolled
        self.token_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.state_norm = nn.RMSNorm(state_size, eps=config.rms_norm_eps)
        self.projection = nn.Linear(config.hidden_size + state_size, config.hidden_size, bias=False)
        self.feedback = nn.Linear(config.hidden_size, state_size, bias=False)

    def distillation_loss(self, inputs: Tensor, teacher: Network, *, by_acceptance: bool) -> tuple[Tensor, Tensor]:
        """See `Network`: the mean over all predicted tokens.  Each depth sees keys of its own depth alone."""
        with torch.no_grad():
            target, _ = teacher.hidden_states(inputs)
        loss_of = chunked_acceptance_loss if by_acceptance else chunked_distillation
        losses, balances, states = [], [], target[:, :-1]
        for depth in range(1, self.num_unrolled + 1):
            own, balance = self.hidden_states_after(inputs[:, depth:], states)
            wanted = target[:, depth:].flatten(0, 1)
            losses.append(loss_of(own.flatten(0, 1), self.head, wanted, teacher.head.detach()))
            balances.append(balance)
            states = self.feedback(own[:, :-1].float())
        return torch.stack(losses).mean(), torch.stack(balances).mean()

    def hidden_states_after(self, token_ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """What `hidden_states` returns, of tokens [batch, length] and the states before them."""
        normed = self.token_norm(self.embedding(token_ids)), self.state_norm(states.float())
        return self._run(self.projection(torch.cat(normed, dim=-1)))

    def own_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that no layer has, by their names in a checkpoint's layer."""
        yield "embed_tokens.weight", self.embedding.weight
        yield "enorm.weight", self.token_norm.weight
        yield "hnorm.weight", self.state_norm.weight
        yield "eh_proj.weight", self.projection.weight
        yield "feedback.weight", self.feedback.weight
        yield "shared_head.norm.weight", self.norm.weight
        yield "shared_head.head.weight", self.head


def create_network(recipe: Recipe, dtype: torch.dtype = torch.float32) -> Network:
    """The network of a recipe, without its weights."""
    if not recipe.num_unrolled:
        return Network(recipe.network, dtype)
    assert recipe.teacher is not None
    return PredictionNetwork(recipe.network, recipe.teacher.network.hidden_size, recipe.num_unrolled, dtype)


def count_multiplied(recipe: Recipe) -> int:
    """The parameters that a token is multiplied with."""
    count = count_active_parameters(recipe.network)
    if recipe.num_unrolled:
        assert recipe.teacher is not None
        hidden, states = recipe.network.hidden_size, recipe.teacher.network.hidden_size
        count += hidden * (hidden + states) + states * hidden
    return count
