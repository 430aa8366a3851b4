// Truncations that depend on all weights, exp((logit - greatest) / temperature), and on how logits spread.  Few rows ask
// for them.  Candidates whose logit is -inf take no part; the given ones may be in `buffer` themselves.
#pragma once

#include "candidates.h"

namespace shoal {

// The standard deviation of the logits, to the bit as step 7 has it.
double standard_deviation(const Candidates& candidates, int vocab_size);

// The candidates of most typical surprise which have this share of the weights: step 10.
Candidates keep_typical(const Candidates& candidates, double temperature, double share, CandidateBuffer& buffer);

// The most probable candidates which have this share of the weights: step 11.
Candidates keep_most_probable(const Candidates& candidates, double temperature, double share, CandidateBuffer& buffer);

// Leaves out all whose share of the weights reaches the threshold but the last of them: step 13.
Candidates exclude_top(const Candidates& candidates, double temperature, double threshold, CandidateBuffer& buffer);

}  // namespace shoal
