#include "checks.h"

#include <algorithm>

namespace shoal {

namespace {

bool all_within(const int32_t* values, int64_t count, int64_t limit) {
    return std::all_of(values, values + count, [limit](int32_t value) { return value >= 0 && value < limit; });
}

bool ascend(const int32_t* values, int64_t count) {
    return std::adjacent_find(values, values + count, [](int32_t a, int32_t b) { return a >= b; }) == values + count;
}

// Whether the positions of each sequence end at the end of its context.
bool positions_fit(const ShoalBatch& batch) {
    for (int64_t s = 0; s < batch.num_seqs; ++s) {
        const int32_t end = batch.query_start_loc[s + 1];
        for (int32_t token = batch.query_start_loc[s]; token < end; ++token) {
            if (batch.positions[token] != batch.context_lens[s] - (end - token)) return false;
        }
    }
    return true;
}

// Whether the tables have a block wherever queries see one.
bool blocks_exist(const ShoalBatch& batch, const Limits& limits) {
    for (int64_t s = 0; s < batch.num_seqs; ++s) {
        const int first_position = batch.positions[batch.query_start_loc[s]];
        for (const View& view : limits.views) {
            const int32_t* table = batch.block_tables + s * batch.max_blocks * limits.num_groups + view.group;
            const int64_t end = (batch.context_lens[s] - 1) / limits.block_size + 1;
            for (int64_t block = view.first_seen(first_position) / limits.block_size; block < end; ++block) {
                const int32_t id = table[block * limits.num_groups];
                if (id < 0 || id >= limits.num_blocks) return false;
            }
        }
    }
    return true;
}

}  // namespace

const char* find_fault(const ShoalBatch& batch, const Limits& limits) {
    const int32_t* ends = batch.query_start_loc;
    if (!all_within(batch.token_ids, batch.num_tokens, limits.vocab_size)) return "token_ids beyond the vocabulary";
    if (!all_within(batch.positions, batch.num_tokens, limits.num_positions)) return "positions beyond the model's";
    if (!all_within(batch.slot_mapping, limits.num_groups * batch.num_tokens, limits.num_blocks * limits.block_size)) {
        return "slot_mapping beyond the KV cache";
    }
    if (ends[0] != 0) return "query_start_loc does not begin with the first token";
    if (!ascend(ends, batch.num_seqs + 1)) return "query_start_loc does not ascend";
    if (ends[batch.num_seqs] != batch.num_tokens) return "query_start_loc does not end with the last token";
    if (!all_within(batch.context_lens, batch.num_seqs, batch.max_blocks * limits.block_size + 1)) {
        return "context_lens beyond the block tables";
    }
    if (!positions_fit(batch)) return "positions that do not lead to the end of the context";
    if (!blocks_exist(batch, limits)) return "block_tables beyond the KV cache";
    if (!all_within(batch.logits_indices, batch.num_logits, batch.num_tokens)) {
        return "logits_indices beyond the tokens";
    }
    if (!ascend(batch.logits_indices, batch.num_logits)) return "logits_indices do not ascend";
    return nullptr;
}

const char* find_fault(const ShoalDraft& draft, const Limits& limits) {
    const int64_t reach = std::min(draft.blocks_stride / limits.num_groups * limits.block_size, limits.num_positions);
    if (!all_within(draft.rows, draft.num_seqs, draft.num_rows)) return "rows beyond the tables";
    for (int64_t s = 0; s < draft.num_seqs; ++s) {
        if (draft.starts[s] < 0) return "starts before the first token";
        if (draft.starts[s] >= draft.ends[s]) return "nothing to guess from";
        if (draft.ends[s] > draft.tokens_stride) return "ends beyond the tokens";
        if (draft.num_wanted[s] <= 0) return "num_wanted of nothing";
        if (s > 0 && draft.num_wanted[s] > draft.num_wanted[s - 1]) return "num_wanted ascends";
        if (int64_t{draft.ends[s]} + draft.num_wanted[s] - 1 > reach) return "guesses too far ahead";
    }
    return nullptr;
}

}  // namespace shoal
