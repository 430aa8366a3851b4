"""A backend without a model, for tests of what drives backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from shoal.model.step.batch import BIAS, PENALTY, ForwardBatch, SamplerOutput, SamplingBatch
from shoal.model.step.sampling import SAMPLING_ROW
from shoal.scheduler.config import CacheGroup
from tests.fakes import ALL, digest, seen


class FakeBackend:
    """A backend whose logits at a token are a hash of the seed and of all tokens that its cache groups see there, which
    it reads back from a paged fake KV cache.

    Attributes:
        batches, samplings: what was asked for, in order; calls that fail are there too.
        fail: called with each batch before anything is written; raises to make the step fail.
        poison: called with what is seen of each context; true makes its logits not finite.
    """

    def __init__(
        self, num_blocks: int, block_size: int, vocab_size: int = 16, groups: Sequence[CacheGroup] = ALL
    ) -> None:
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.groups = groups
        self.kv = np.full((num_blocks * block_size, 3), -1)  # token id, position and group, by slot
        self.batches: list[ForwardBatch] = []
        self.samplings: list[SamplingBatch] = []
        self.fail: Callable[[ForwardBatch], None] = lambda _: None
        self.poison: Callable[[list[int]], bool] = lambda _: False

    def logits(self, context: list[int], seed: int) -> np.ndarray:
        """[vocab_size] float64, after a context of which the groups see their parts."""
        return self._logits(seen(context, self.groups), seed)

    def _logits(self, context: list[int], seed: int) -> np.ndarray:
        if self.poison(context):
            return np.full(self.vocab_size, np.nan)
        return np.random.default_rng(digest(context, seed)).normal(size=self.vocab_size)

    def execute(self, batch: ForwardBatch, sampling: SamplingBatch) -> SamplerOutput:
        self.batches.append(batch)
        self.samplings.append(sampling)
        self._check(batch, sampling)
        self.fail(batch)
        for group, slots in enumerate(batch.slot_mapping):
            self.kv[slots] = np.stack((batch.token_ids, batch.positions, np.full(len(slots), group)), axis=1)
        contexts = [self._context(batch, index) for index in batch.logits_indices.tolist()]
        logits = np.empty((len(contexts), self.vocab_size))
        for row, (context, seed) in enumerate(zip(contexts, sampling.rows["seed"].tolist(), strict=True)):
            logits[row] = self._logits(context, seed)
        return self._choose(logits, sampling)

    def forward(self, batch: ForwardBatch) -> np.ndarray:
        raise NotImplementedError("the executor asks for choices, never for logits")

    def _check(self, batch: ForwardBatch, sampling: SamplingBatch) -> None:
        """Shapes, dtypes and order, as `model/step/batch.py` promises them."""
        num_tokens, num_seqs = len(batch.token_ids), len(batch.context_lens)
        assert batch.query_start_loc[0] == 0
        assert batch.query_start_loc[-1] == num_tokens
        assert len(batch.query_start_loc) == num_seqs + 1
        num_groups = len(self.groups)
        max_blocks = (batch.context_lens.max() - 1) // self.block_size + 1
        assert batch.block_tables.shape == (num_seqs, max_blocks * num_groups)
        assert batch.slot_mapping.shape == (num_groups, num_tokens)
        assert batch.slot_mapping.min() >= 0, "a token without a slot"
        assert (np.diff(batch.logits_indices) > 0).all()
        num_slots = len(np.unique(batch.slot_mapping))
        assert num_slots == num_groups * num_tokens, "two tokens of a step want the same slot"
        assert batch.hidden is batch.inputs is None, "nobody asks for hidden states, or gives any"
        for name in set(ForwardBatch.__slots__) - {"hidden", "inputs"}:
            array = getattr(batch, name)
            assert array.dtype == np.int32, name
            assert array.flags.c_contiguous, name
        for records, dtype in (
            (sampling.rows, SAMPLING_ROW),
            (sampling.penalties, PENALTY),
            (sampling.biases, BIAS),
        ):
            assert records.dtype == dtype
            assert records.flags.c_contiguous
        assert len(sampling.rows) == len(batch.logits_indices)
        assert (sampling.rows["position"] == batch.positions[batch.logits_indices] + 1).all()

    def _context(self, batch: ForwardBatch, index: int) -> list[int]:
        """What each group sees at the batch's token `index`, as a kernel would find it."""
        seq = int(np.searchsorted(batch.query_start_loc, index, side="right")) - 1
        position = int(batch.positions[index])
        assert position < batch.context_lens[seq]
        context: list[int] = []
        for number, group in enumerate(self.groups):
            positions = np.arange(group.first_seen(position), position + 1)
            blocks = batch.block_tables[seq, positions // self.block_size * len(self.groups) + number]
            assert (blocks >= 0).all(), "a block that the query sees was given back"
            entries = self.kv[blocks * self.block_size + positions % self.block_size]
            assert (entries[:, 1] == positions).all(), "the block table leads to other positions"
            assert (entries[:, 2] == number).all(), "the block is another group's"
            context += entries[:, 0].tolist()
        return context

    def _choose(self, logits: np.ndarray, sampling: SamplingBatch) -> SamplerOutput:
        """The greedy choice under biases and penalties, and log-probabilities of the logits as they were."""
        adjusted = logits.copy()
        adjusted[sampling.biases["row"], sampling.biases["token_id"]] += sampling.biases["addend"]
        at, counts = (sampling.penalties["row"], sampling.penalties["token_id"]), sampling.penalties["count"]
        values, rows = adjusted[at], sampling.rows[at[0]]
        repetition = rows["repetition_penalty"]
        values = np.where(values > 0, values / repetition, values * repetition)
        values -= rows["frequency_penalty"] * counts
        values -= rows["presence_penalty"] * (counts > 0)
        adjusted[at] = values
        forced = sampling.rows["forced_token_id"]
        chosen = np.where(forced >= 0, forced, adjusted.argmax(axis=1) if len(logits) else forced)
        chosen = np.where(np.isnan(logits).any(axis=1), -1, chosen).astype(np.int32)
        width = int(sampling.rows["num_logprobs"].max(initial=-1))
        if width < 0:
            return SamplerOutput(chosen)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        own = logprobs[np.arange(len(chosen)), chosen]
        best = np.argsort(-logprobs, axis=1, kind="stable")[:, :width]
        for row, named in enumerate(sampling.rows["logprob_token_ids"]):
            best[row, : (named >= 0).sum()] = named[named >= 0]
        return SamplerOutput(
            chosen,
            own.astype(np.float32),
            (1 + (logprobs > own[:, None]).sum(axis=1)).astype(np.int32),
            best.astype(np.int32),
            np.take_along_axis(logprobs, best, axis=1).astype(np.float32),
        )
