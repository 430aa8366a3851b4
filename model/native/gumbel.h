// Draws from a softmax by adding noise to its logits (Gumbel 1954).
#pragma once

#include <cstdint>

#include "candidates.h"

namespace shoal {

// The noise at one position of one sequence: a pure function of token ids.
class Noise {
public:
    Noise(uint64_t seed, int64_t position);

    // 64 bits of noise for a token; the upper 52 bits give u, which is between 0 and 1.
    SHOAL_INLINE uint64_t hash(int32_t id) const {
        return mix(key_ + kGoldenGamma * (static_cast<uint64_t>(static_cast<uint32_t>(id)) + 1));
    }

    SHOAL_INLINE double uniform(int32_t id) const { return (static_cast<double>(hash(id) >> 12) + 0.5) * 0x1p-52; }

    // -log(-log(u)).
    double gumbel(int32_t id) const;

private:
    static constexpr uint64_t kGoldenGamma = 0x9E3779B97F4A7C15;

    // The finalizer of splitmix64 (Steele et al. 2014).
    SHOAL_INLINE static uint64_t mix(uint64_t z) {
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
        return z ^ (z >> 31);
    }

    uint64_t key_;
};

// The candidate with the greatest logit / temperature + gumbel, the lowest id on ties.  `first` is the candidate that
// stands first in the order of truncation.
Token draw(const Candidates& candidates, const Token& first, double temperature, const Noise& noise);

}  // namespace shoal
