#include "candidates.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace shoal {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// 16 logits from index `begin` on; -inf beyond `size`.
SHOAL_INLINE Vec load_logits(const float* logits, int begin, int size) {
    if (begin + kLanes <= size) return load(logits + begin);
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = begin + i < size ? logits[begin + i] : -kInfinity;
    return load(lanes);
}

struct Before {
    bool operator()(const Token& a, const Token& b) const { return before(a, b); }
};

// A range of the order: tokens that stand before `to`, but not before `from`.
struct Bounds {
    Token from;
    Token to;
};

constexpr Bounds kAll{{kInfinity, -1}, {-kInfinity, std::numeric_limits<int32_t>::max()}};

// Bounds within which the token at `place` most probably stands.
Bounds guess_bounds(const Candidates& candidates, int place) {
    constexpr int kSample = 512;
    if (candidates.size < 2 * kSample) return kAll;
    Token sample[kSample];
    for (int i = 0; i < kSample; ++i) sample[i] = candidates[candidates.size / kSample * i];
    const double share = static_cast<double>(place) / candidates.size;
    const double margin = 4 * std::sqrt(kSample * share * (1 - share)) + 1;  // four standard deviations, and rounding
    const int from = static_cast<int>(kSample * share - margin), to = static_cast<int>(kSample * share + margin);
    Bounds bounds = kAll;
    Token* end = sample + kSample;
    if (to < kSample) {
        std::nth_element(sample, sample + to, end, Before());
        end = sample + to;
        bounds.to = *end;
    }
    if (from > 0) {
        std::nth_element(sample, sample + from, end, Before());
        bounds.from = sample[from];
    }
    return bounds;
}

int count_before(const Candidates& candidates, Token end) {
    int count = 0;
    for (int i = 0; i < candidates.size; ++i) count += before(candidates[i], end);
    return count;
}

// The candidates within the bounds, in `buffer`.  The given ones may be in `buffer` themselves.
Candidates keep(const Candidates& candidates, Bounds bounds, CandidateBuffer& buffer) {
    buffer.logits.resize(std::max(buffer.logits.size(), static_cast<size_t>(candidates.size)));
    buffer.ids.resize(buffer.logits.size());
    int size = 0;
    const auto may_stay = [&](int i) {
        return (candidates.logits[i] <= bounds.from.logit) & (candidates.logits[i] >= bounds.to.logit);
    };
    visit_where(candidates.size, may_stay, [&](int begin, int end) {
        int stays[kRange];
        for (int i = begin; i < end; ++i) {
            stays[i - begin] = before(candidates[i], bounds.to) & !before(candidates[i], bounds.from);
        }
        for (int i = begin; i < end; ++i) {  // without branches, which would be mispredicted
            buffer.logits[size] = candidates.logits[i];
            buffer.ids[size] = candidates.id(i);
            size += stays[i - begin];
        }
    });
    return {buffer.logits.data(), buffer.ids.data(), size};
}

std::vector<Token> tokens_of(const Candidates& candidates) {
    std::vector<Token> tokens(candidates.size);
    for (int i = 0; i < candidates.size; ++i) tokens[i] = candidates[i];
    return tokens;
}

// The token that stands at `place` in the order, counted from 1 to candidates.size.
//
// The algorithm of Floyd and Rivest 1975: a sample gives two tokens between which the place lies.  So few tokens are
// between them that finding the place there takes little time.
Token find_place(const Candidates& candidates, int place, CandidateBuffer& buffer) {
    const Bounds bounds = guess_bounds(candidates, place);
    int num_before = count_before(candidates, bounds.from);
    std::vector<Token> between = tokens_of(keep(candidates, bounds, buffer));
    if (place <= num_before || place > num_before + static_cast<int>(between.size())) {  // the guess was wrong
        num_before = 0;
        between = tokens_of(candidates);
    }
    const auto found = between.begin() + (place - num_before - 1);
    std::nth_element(between.begin(), found, between.end(), Before());
    return *found;
}

}  // namespace

Greatest find_greatest(const float* logits, int size) {
    Vec greatest = broadcast(-kInfinity);
    for (int i = 0; i < size; i += kLanes) greatest = max(load_logits(logits, i, size), greatest);  // ignores NaN
    const float value = max_lanes(greatest);
    int32_t id = -1;
    int num_nan = 0;
    visit_where(size, [&](int i) { return !(logits[i] < value); }, [&](int begin, int end) {
        for (int i = begin; id < 0 && i < end; ++i) {
            if (logits[i] == value) id = i;
        }
        for (int i = begin; i < end; ++i) num_nan += std::isnan(logits[i]);
    });
    return {{value, id}, std::isfinite(value) && num_nan == 0};
}

Candidates keep_masked(const Candidates& all, const uint32_t* mask, CandidateBuffer& buffer) {
    buffer.logits.resize(std::max(buffer.logits.size(), static_cast<size_t>(all.size)));
    buffer.ids.resize(buffer.logits.size());
    int size = 0;
    for (int begin = 0; begin < all.size; begin += 32) {
        for (uint32_t bits = mask[begin / 32]; bits != 0; bits &= bits - 1) {
            const int i = begin + __builtin_ctz(bits);
            if (i >= all.size) break;
            buffer.logits[size] = all.logits[i];
            buffer.ids[size++] = i;
        }
    }
    return {buffer.logits.data(), buffer.ids.data(), size};
}

Candidates keep_before(const Candidates& candidates, Token end, CandidateBuffer& buffer) {
    return keep(candidates, {kAll.from, end}, buffer);
}

Candidates keep_from(const Candidates& candidates, Token begin, CandidateBuffer& buffer) {
    return keep(candidates, {begin, kAll.to}, buffer);
}

Candidates keep_first(const Candidates& candidates, int count, CandidateBuffer& buffer) {
    if (count >= candidates.size) return candidates;
    const Token last = find_place(candidates, count, buffer);
    return keep_before(candidates, {last.logit, last.id + 1}, buffer);
}

std::vector<Token> in_order(const Candidates& candidates) {
    std::vector<Token> tokens = tokens_of(candidates);
    std::sort(tokens.begin(), tokens.end(), Before());
    return tokens;
}

}  // namespace shoal
