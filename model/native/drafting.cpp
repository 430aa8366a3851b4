// Proposals: a step over the tokens that a model has not computed yet, and then steps of one token for each sequence.
#include <algorithm>
#include <numeric>

#include "model.h"

namespace shoal {

namespace {

// The arrays of a step: first over the tokens [start, end) of each sequence, and then over one more token of each.
struct DraftStep {
    DraftStep(const ShoalDraft& draft, int block_size, int num_groups)
        : block_size_(block_size), num_groups_(num_groups), ends{0} {
        const int num_seqs = static_cast<int>(draft.num_seqs);
        for (int s = 0; s < num_seqs; ++s) {
            max_blocks_ = std::max<int64_t>(max_blocks_, (draft.ends[s] + draft.num_wanted[s] - 2) / block_size + 1);
        }
        tables.resize(num_seqs * max_blocks_ * num_groups);
        for (int s = 0; s < num_seqs; ++s) {
            const int32_t* row = draft.block_tables + draft.rows[s] * draft.blocks_stride;
            const int64_t used = (draft.ends[s] + draft.num_wanted[s] - 2) / block_size + 1;
            std::copy(row, row + used * num_groups, tables.begin() + s * max_blocks_ * num_groups);
            for (int position = draft.starts[s]; position < draft.ends[s]; ++position) {
                token_ids.push_back(draft.tokens[draft.rows[s] * draft.tokens_stride + position]);
                positions.push_back(position);
            }
            ends.push_back(static_cast<int32_t>(positions.size()));
            logits.push_back(ends.back() - 1);
        }
        find_slots(num_seqs);
    }

    // Goes on to the next token of the first num_seqs sequences.
    void advance(int num_seqs, const std::vector<int32_t>& chosen) {
        for (int s = 0; s < num_seqs; ++s) {
            // In the first step, the last position of a sequence is at the index of its logits; later it is at s.
            positions[s] = positions[logits[s]] + 1;
            token_ids[s] = std::max(chosen[s], 0);  // a row without an answer goes on with token 0
        }
        std::iota(ends.begin(), ends.end(), 0);
        std::iota(logits.begin(), logits.end(), 0);
        find_slots(num_seqs);
    }

    ShoalBatch batch(int num_seqs) const {
        return {ends[num_seqs], num_seqs, num_seqs, max_blocks_, token_ids.data(), positions.data(), slots.data(),
                ends.data(), nullptr, tables.data(), logits.data(), nullptr, nullptr};
    }

private:
    // Group after group, the slots of the first num_seqs sequences' tokens.
    void find_slots(int num_seqs) {
        slots.clear();
        for (int group = 0; group < num_groups_; ++group) {
            for (int s = 0; s < num_seqs; ++s) {
                for (int token = ends[s]; token < ends[s + 1]; ++token) {
                    const int position = positions[token];
                    const int64_t block = (s * max_blocks_ + position / block_size_) * num_groups_ + group;
                    slots.push_back(tables[block] * block_size_ + position % block_size_);
                }
            }
        }
    }

    int block_size_;
    int num_groups_;
    int64_t max_blocks_ = 0;
    std::vector<int32_t> token_ids, positions, slots, ends, logits, tables;
};

}  // namespace

void Model::draft(const ShoalSampling& sampling, const ShoalDraft& draft) {
    int num_seqs = static_cast<int>(draft.num_seqs);
    const int width = draft.num_wanted[0];
    std::vector<int32_t> token_ids(num_seqs);
    const ShoalChosen chosen{token_ids.data(), -1, nullptr, nullptr, nullptr, nullptr};
    DraftStep next(draft, block_size_, shape_.num_groups);
    ShoalSampling choice = sampling;
    for (int index = 0; index < width; ++index) {
        if (index > 0) {
            while (draft.num_wanted[num_seqs - 1] <= index) --num_seqs;
            next.advance(num_seqs, token_ids);
            choice.num_later = index;
        }
        step(next.batch(num_seqs), draft.num_layers, &choice, &chosen, nullptr);
        for (int s = 0; s < num_seqs; ++s) draft.token_ids[s * width + index] = token_ids[s];
    }
}

}  // namespace shoal
