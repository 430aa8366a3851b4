// Chooses tokens from logits, exactly as model/step/sampling.py specifies; the numbers of steps are its.
#pragma once

#include "pool.h"
#include "shoal.h"

namespace shoal {

// Chooses a token for each of the rows first_row to first_row + num_rows of `sampling`, and writes it to the same rows
// of `chosen`.  Their logits are rows 0 to num_rows of `logits`, `stride` floats apart, and are left as they were.
// Where a row asks for no log-probabilities, or has no answer, those of `chosen` are not touched.
void sample(Pool& pool, float* logits, int64_t stride, int vocab_size, const ShoalSampling& sampling, int64_t first_row,
            int64_t num_rows, const ShoalChosen& chosen);

}  // namespace shoal

// The same for all rows of `sampling` with threads of its own, for tests and tools; logits are [num_rows, vocab_size].
SHOAL_API void shoal_sample(int32_t num_threads, float* logits, int32_t vocab_size, const ShoalSampling* sampling,
                            const ShoalChosen* chosen);
