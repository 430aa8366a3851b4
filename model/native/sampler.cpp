#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "candidates.h"
#include "gumbel.h"
#include "weights.h"

namespace shoal {

namespace {

// Steps 1 and 2 on a row of logits, undone at the end of the object's life.
class Adjustment {
public:
    Adjustment(float* logits, const ShoalSampling& sampling, int64_t row) : logits_(logits) {
        const auto penalties = entries_of(sampling.penalty_rows, sampling.num_penalties, row);
        for (int64_t i = penalties.first; i < penalties.second; ++i) penalize(sampling, row, i);
        const auto biases = entries_of(sampling.bias_rows, sampling.num_biases, row);
        for (int64_t i = biases.first; i < biases.second; ++i) {
            *remember(sampling.bias_token_ids[i]) += sampling.bias[i];
        }
    }
    ~Adjustment() {
        for (auto token = originals_.rbegin(); token != originals_.rend(); ++token) logits_[token->id] = token->logit;
    }
    Adjustment(const Adjustment&) = delete;
    Adjustment& operator=(const Adjustment&) = delete;

private:
    static std::pair<int64_t, int64_t> entries_of(const int32_t* rows, int64_t count, int64_t row) {
        const auto range = std::equal_range(rows, rows + count, row);
        return {range.first - rows, range.second - rows};
    }

    void penalize(const ShoalSampling& sampling, int64_t row, int64_t entry) {
        float* logit = remember(sampling.penalty_token_ids[entry]);
        const float repetition = sampling.repetition_penalty[row];
        const float count = static_cast<float>(sampling.penalty_counts[entry]);
        *logit = *logit > 0 ? *logit / repetition : *logit * repetition;
        if (count > 0) *logit = (*logit - sampling.frequency_penalty[row] * count) - sampling.presence_penalty[row];
    }

    float* remember(int32_t id) {
        originals_.push_back({logits_[id], id});
        return logits_ + id;
    }

    float* logits_;
    std::vector<Token> originals_;
};

// Where what min_p drops begins in the order: at weights, exp((logit - greatest) / temperature), less than min_p.
Token end_of_min_p(float greatest, double temperature, double min_p) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    constexpr double kHalfUnit = 0x1p-54;  // a weight that little below min_p is rounded to it
    const double least = greatest + temperature * (std::log(min_p) - kHalfUnit);
    const float rounded = static_cast<float>(least);
    return {rounded < least ? std::nextafter(rounded, kInfinity) : rounded, std::numeric_limits<int32_t>::max()};
}

// Steps 6 to 10.  What top_p keeps are the first tokens of the order.  So the winner among more of them is the winner
// among these if it is one of them, and if it is not, the order may be cut there and the next draw is from fewer:
// about 1 - log(top_p) draws in all, and nothing is sorted.
int32_t draw_truncated(const Candidates& all, const Token& first, const ShoalSampling& sampling, int64_t row,
                       CandidateBuffer& buffer) {
    const double temperature = sampling.temperature[row], top_p = sampling.top_p[row], min_p = sampling.min_p[row];
    const auto mass = [&](const Candidates& part) {
        return sum_of_weights(part.logits, part.size, temperature, first.logit / temperature);
    };
    Candidates kept = all;
    if (sampling.top_k[row] > 0) kept = keep_first(kept, sampling.top_k[row], buffer);
    const double limit = top_p < 1 ? top_p * mass(kept) : 0;
    if (min_p > 0) kept = keep_before(kept, end_of_min_p(first.logit, temperature, min_p), buffer);
    const Noise noise(sampling.seeds[row], sampling.positions[row]);
    for (;;) {
        const Token drawn = draw(kept, first, temperature, noise);
        if (top_p >= 1) return drawn.id;
        kept = keep_before(kept, drawn, buffer);
        if (kept.size == 0 || mass(kept) < limit) return drawn.id;
    }
}

// Steps 3 to 10 for a row of adjusted logits.
int32_t choose(const float* logits, int vocab_size, const ShoalSampling& sampling, int64_t row,
               CandidateBuffer& buffer) {
    const Greatest greatest = find_greatest(logits, vocab_size);
    if (!greatest.is_finite) return -1;
    if (sampling.forced_token_ids[row] >= 0) return sampling.forced_token_ids[row];
    if (sampling.temperature[row] == 0) return greatest.token.id;
    return draw_truncated({logits, nullptr, vocab_size}, greatest.token, sampling, row, buffer);
}

// Log-probabilities of the chosen token and of the most probable ones, and the chosen one's rank.
void report_logprobs(const float* logits, int vocab_size, int32_t token_id, const ShoalChosen& chosen, int64_t row,
                     CandidateBuffer& buffer) {
    const double greatest = find_greatest(logits, vocab_size).token.logit;
    const double log_sum = std::log(sum_of_weights(logits, vocab_size, 1, greatest));
    const auto logprob = [&](float logit) { return static_cast<float>((logit - greatest) - log_sum); };
    const float logit = logits[token_id];
    chosen.logprobs[row] = logprob(logit);
    int32_t num_greater = 0;
    for (int i = 0; i < vocab_size; ++i) num_greater += logits[i] > logit;
    chosen.ranks[row] = 1 + num_greater;
    if (chosen.num_top == 0) return;
    const Candidates all{logits, nullptr, vocab_size};
    int64_t place = row * chosen.num_top;
    for (const Token& token : in_order(keep_first(all, static_cast<int>(chosen.num_top), buffer))) {
        chosen.top_token_ids[place] = token.id;
        chosen.top_logprobs[place++] = logprob(token.logit);
    }
}

void sample_row(float* logits, int vocab_size, const ShoalSampling& sampling, int64_t row, const ShoalChosen& chosen,
                CandidateBuffer& buffer) {
    {
        const Adjustment adjustment(logits, sampling, row);
        chosen.token_ids[row] = choose(logits, vocab_size, sampling, row, buffer);
    }
    const bool has_answer = chosen.token_ids[row] >= 0;
    if (has_answer && sampling.num_logprobs[row] >= 0) {
        report_logprobs(logits, vocab_size, chosen.token_ids[row], chosen, row, buffer);
    }
}

}  // namespace

void sample(Pool& pool, float* logits, int64_t stride, int vocab_size, const ShoalSampling& sampling, int64_t first_row,
            int64_t num_rows, const ShoalChosen& chosen) {
    std::vector<CandidateBuffer> buffers(pool.num_threads());
    pool.run(static_cast<int>(num_rows), [&](int tile, int thread) {
        sample_row(logits + tile * stride, vocab_size, sampling, first_row + tile, chosen, buffers[thread]);
    });
}

}  // namespace shoal

void shoal_sample(int32_t num_threads, float* logits, int32_t vocab_size, const ShoalSampling* sampling,
                  const ShoalChosen* chosen) {
    shoal::Pool pool(num_threads, false);
    shoal::sample(pool, logits, vocab_size, vocab_size, *sampling, 0, sampling->num_rows, *chosen);
}
