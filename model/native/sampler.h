// Chooses tokens from logits, exactly as model/step/sampling.py specifies; comments use its numbers of steps.
#pragma once

#include "pool.h"
#include "shoal.h"

namespace shoal {

// Chooses a token for num_rows rows of `sampling`, from first_row on, and writes it to the same rows of `chosen`.  The
// first row of `logits` belongs to first_row; rows are `stride` floats apart, and unchanged after the call.  If a row
// asks for no log-probabilities, or has no answer, its log-probabilities in `chosen` are not written.
void sample(Pool& pool, float* logits, int64_t stride, int vocab_size, const ShoalSampling& sampling, int64_t first_row,
            int64_t num_rows, const ShoalChosen& chosen);

// What is wrong with the arrays; null if nothing is.
const char* find_fault(const ShoalSampling& sampling, int64_t vocab_size);

}  // namespace shoal

// The same for all rows of `sampling` with threads of its own, for tests and tools; logits are [num_rows, vocab_size].
// Returns what is wrong with `sampling`, as shoal_step.
SHOAL_API const char* shoal_sample(int32_t num_threads, float* logits, int32_t vocab_size,
                                   const ShoalSampling* sampling, const ShoalChosen* chosen);
