// Whether what a caller passes makes sense: an array that is wrong is a bug, and must not reach the memory of others.
#pragma once

#include "shoal.h"

namespace shoal {

// What the values in the arrays must stay below.
struct Limits {
    int64_t vocab_size;
    int64_t num_positions;
    int64_t num_blocks;
    int64_t block_size;
};

// What is wrong; null if nothing is.
const char* find_fault(const ShoalBatch& batch, const Limits& limits);
// As far as its tables' numbers of rows and columns go: what stands in them has been checked in the steps before.
const char* find_fault(const ShoalDraft& draft, const Limits& limits);

}  // namespace shoal
