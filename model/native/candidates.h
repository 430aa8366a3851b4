// Sets of tokens that may be chosen, and how they are truncated.
#pragma once

#include <cstdint>
#include <vector>

#include "simd.h"

namespace shoal {

struct Token {
    float logit;
    int32_t id;
};

// Whether a stands before b in the order that truncation uses: by logit descending, then by id ascending.  The order by
// x = logit / temperature is the same: different float32 differ by at least 2**-24 of their size, which a division in
// float64 preserves, and no quotient of two float32 leaves the range of a float64.
SHOAL_INLINE bool before(const Token& a, const Token& b) {
    return (a.logit > b.logit) | ((a.logit >= b.logit) & (a.id < b.id));
}

// Some tokens of a row of logits, ids ascending.
struct Candidates {
    const float* logits;
    const int32_t* ids;  // null: 0 to size
    int size;

    SHOAL_INLINE int32_t id(int i) const { return ids ? ids[i] : i; }
    SHOAL_INLINE Token operator[](int i) const { return {logits[i], id(i)}; }
};

// Memory for candidates that are only part of a row.
struct CandidateBuffer {
    std::vector<float> logits;
    std::vector<int32_t> ids;
};

struct Greatest {
    Token token;     // the first in the order, where NaN are ignored
    bool is_finite;  // no logit is NaN or +inf, and at least one is not -inf
};

// Of logits by themselves; the id of a token is its index.
Greatest find_greatest(const float* logits, int size);

// Those of all tokens whose bits are set in `mask`, which has 32 tokens in a word, in `buffer`.
Candidates keep_masked(const Candidates& all, const uint32_t* mask, CandidateBuffer& buffer);

// The candidates that stand before `end`, in `buffer`.  The given ones may be in `buffer` themselves.
Candidates keep_before(const Candidates& candidates, Token end, CandidateBuffer& buffer);

// Those that do not stand before `begin`, likewise.
Candidates keep_from(const Candidates& candidates, Token begin, CandidateBuffer& buffer);

// The first `count` candidates in the order, or all if there are fewer.  The given ones may not be in `buffer`.
Candidates keep_first(const Candidates& candidates, int count, CandidateBuffer& buffer);

std::vector<Token> in_order(const Candidates& candidates);

constexpr int kRange = 64;

// Calls visit(begin, end) for ascending ranges of 0 to size that hold every i for which test(i) is true; each has at
// most kRange elements.  Meant for tests that compile to vectors and are mostly false.
template <class Test, class Visit>
SHOAL_INLINE void visit_where(int size, const Test& test, const Visit& visit) {
    const auto visit_range = [&](int begin, int end) {
        int any = 0;
        for (int i = begin; i < end; ++i) any |= test(i);
        if (any) visit(begin, end);
    };
    int begin = 0;
    for (; begin + kRange <= size; begin += kRange) visit_range(begin, begin + kRange);
    visit_range(begin, size);
}

}  // namespace shoal
