// Sums of softmax weights in float64.
#pragma once

namespace shoal {

// The sum of exp(logit / temperature - x_max), as exact as with the standard library's exp.  No logit / temperature may
// be greater than x_max.
double sum_of_weights(const float* logits, int size, double temperature, double x_max);

}  // namespace shoal
