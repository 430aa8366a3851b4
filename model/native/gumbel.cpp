#include "gumbel.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

namespace shoal {

Noise::Noise(uint64_t seed, int64_t position)
    : key_(mix(seed + kGoldenGamma * (static_cast<uint64_t>(position) + 1))) {}

double Noise::gumbel(int32_t id) const { return -std::log(-std::log(uniform(id))); }

namespace {

// A number that is at most log2(rest); -127 for 0.  The bits of a float32, read as an integer and scaled, equal its
// logarithm to base 2 at powers of 2, and between these follow straight lines, which lie below the logarithm.
SHOAL_INLINE float log2_from_below(int32_t rest) {
    const float value = static_cast<float>(rest);
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<float>(bits) * 0x1p-23F - 127;
}

// Finds the winner with a few logarithms only.  A token scores no less than `best` if
//     -log(u) <= exp(x - best),  and as 1 - u <= -log(u), only if  log2(1 - u) <= log2(e) * (x - best).
// In float32 this test excludes nearly all tokens, and logarithms are computed for the others only.
class Draw {
public:
    Draw(const Candidates& candidates, const Token& first, double temperature, const Noise& noise)
        : candidates_(candidates),
          noise_(noise),
          temperature_(temperature),
          greatest_(first.logit),
          scale_(static_cast<float>(std::min<double>(kLog2E / temperature, FLT_MAX))) {
        take(first, score(first));
    }

    Token run() {
        int begin = 0;
        for (; begin + kLength <= candidates_.size; begin += kLength) look_at(begin, kLength);
        look_at(begin, candidates_.size - begin);
        return best_;
    }

private:
    static constexpr double kLog2E = 1.4426950408889634;
    static constexpr int kLength = 64;
    static constexpr int kRestBits = 31;
    static constexpr float kMargin = 1e-3F;  // far more than the rounding errors of both sides

    SHOAL_INLINE void look_at(int begin, int count) {
        int32_t rest[kLength];  // the leading bits of 1 - u
        for (int i = 0; i < count; ++i) {
            rest[i] = static_cast<int32_t>(~noise_.hash(candidates_.id(begin + i)) >> (64 - kRestBits));
        }
        const float* logits = candidates_.logits + begin;
        const auto may_win = [&](int i) {
            return log2_from_below(rest[i]) <= (logits[i] - greatest_) * scale_ + allowance_;
        };
        int any = 0;
        for (int i = 0; i < count; ++i) any |= may_win(i);
        if (!any) return;
        for (int i = 0; i < count; ++i) {
            if (may_win(i)) consider(candidates_[begin + i]);
        }
    }

    void consider(const Token& token) {
        const double found = score(token);
        if (found > best_score_ || (found == best_score_ && token.id < best_.id)) take(token, found);
    }

    void take(const Token& token, double score) {
        best_ = token;
        best_score_ = score;
        const double lead = (greatest_ / temperature_ - score) * kLog2E;
        allowance_ = static_cast<float>(lead) + (kRestBits + kMargin);
    }

    double score(const Token& token) const { return token.logit / temperature_ + noise_.gumbel(token.id); }

    const Candidates& candidates_;
    const Noise& noise_;
    const double temperature_;
    const float greatest_;
    const float scale_;  // from logits to log2(e) * x
    Token best_;
    double best_score_;
    float allowance_;  // log2(e) * (x - best) of the greatest logit, brought to the scale of log2(rest), and the margin
};

}  // namespace

Token draw(const Candidates& candidates, const Token& first, double temperature, const Noise& noise) {
    return Draw(candidates, first, temperature, noise).run();
}

}  // namespace shoal
