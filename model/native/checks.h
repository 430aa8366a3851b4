// Checks of what a caller passes: a wrong array is a bug of ours, and must not lead to reads or writes out of bounds.
#pragma once

#include <vector>

#include "shoal.h"
#include "view.h"

namespace shoal {

// The limits that the values in the arrays must stay below.
struct Limits {
    int64_t vocab_size;
    int64_t num_positions;
    int64_t num_blocks;
    int64_t block_size;
    int64_t num_groups;
    std::vector<View> views;  // of all layers
};

// What is wrong; null if nothing is.
const char* find_fault(const ShoalBatch& batch, const Limits& limits);
// Checks only against the numbers of rows and columns of the tables: the steps before have checked their values.
const char* find_fault(const ShoalDraft& draft, const Limits& limits);

}  // namespace shoal
