#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <vector>

#include "candidates.h"
#include "gumbel.h"
#include "shares.h"
#include "weights.h"

// How to choose at one row: SAMPLING_ROW in model/step/sampling.py.  Python compares the two when it loads the library.
#define SHOAL_SAMPLING_ROW(FIELD)        \
    FIELD(uint64, seed)                  \
    FIELD(int64, position)               \
    FIELD(int32, forced_token_id)        \
    FIELD(int32, mask)                   \
    FIELD(int32, num_logprobs)           \
    FIELD(int32, logprob_token_ids[20])  \
    FIELD(float32, temperature)          \
    FIELD(float32, top_n_sigma)          \
    FIELD(int32, top_k)                  \
    FIELD(float32, typical_p)            \
    FIELD(float32, top_p)                \
    FIELD(float32, min_p)                \
    FIELD(float32, xtc_probability)      \
    FIELD(float32, xtc_threshold)        \
    FIELD(float32, presence_penalty)     \
    FIELD(float32, frequency_penalty)    \
    FIELD(float32, repetition_penalty)

struct ShoalSamplingRow {
    using uint64 = uint64_t;
    using int64 = int64_t;
    using int32 = int32_t;
    using float32 = float;
#define SHOAL_DECLARE(type, name) type name;
    SHOAL_SAMPLING_ROW(SHOAL_DECLARE)
};

const char* shoal_sampling_row(void) {
#define SHOAL_DESCRIBE(type, name) #type " " #name ";"
    return SHOAL_SAMPLING_ROW(SHOAL_DESCRIBE);
}

namespace shoal {

namespace {

using Row = ShoalSamplingRow;

// Applies steps 1 and 2 to a row of logits, and undoes them when the object is destroyed.
class Adjustment {
public:
    Adjustment(float* logits, const ShoalSampling& sampling, int32_t row) : logits_(logits) {
        for_entries(sampling.penalties, sampling.num_penalties, row, [&](const ShoalPenalty& penalty) {
            penalize(remember(penalty.token_id), sampling.rows[row], static_cast<float>(penalty.count));
        });
        for_entries(sampling.biases, sampling.num_biases, row,
                    [&](const ShoalBias& bias) { remember(bias.token_id) += bias.addend; });
    }
    ~Adjustment() {
        for (auto token = originals_.rbegin(); token != originals_.rend(); ++token) logits_[token->id] = token->logit;
    }
    Adjustment(const Adjustment&) = delete;
    Adjustment& operator=(const Adjustment&) = delete;

private:
    template <class Entry, class Visit>
    static void for_entries(const Entry* entries, int64_t count, int32_t row, const Visit& visit) {
        const Entry* end = entries + count;
        const Entry* entry = std::lower_bound(entries, end, row, [](const Entry& e, int32_t r) { return e.row < r; });
        for (; entry != end && entry->row == row; ++entry) visit(*entry);
    }

    static void penalize(float& logit, const Row& how, float count) {
        logit = logit > 0 ? logit / how.repetition_penalty : logit * how.repetition_penalty;
        if (count > 0) logit = (logit - how.frequency_penalty * count) - how.presence_penalty;
    }

    float& remember(int32_t id) {
        originals_.push_back({logits_[id], id});
        return logits_[id];
    }

    float* logits_;
    std::vector<Token> originals_;
};

// Where the tokens begin in the order whose logits are less than `least`.
Token end_at(double least) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const float rounded = static_cast<float>(least);
    return {rounded < least ? std::nextafter(rounded, kInfinity) : rounded, std::numeric_limits<int32_t>::max()};
}

// The least logit that min_p keeps: the weight exp((logit - greatest) / temperature) is not less than min_p.
double least_of_min_p(float greatest, double temperature, double min_p) {
    constexpr double kHalfUnit = 0x1p-54;  // a weight below min_p by less than this is rounded to min_p
    return greatest + temperature * (std::log(min_p) - kHalfUnit);
}

// Whether step 13 leaves tokens out at this position.
bool excludes_top(const Row& how, int64_t position) {
    constexpr uint64_t kChanceSeed = 0x6A09E667F3BCC909;
    if (how.xtc_probability <= 0 || how.xtc_threshold > 0.5F) return false;
    return Noise(how.seed ^ kChanceSeed, position).uniform(0) < how.xtc_probability;
}

// The token that stands first in the order.
Token first_of(const Candidates& candidates) {
    return candidates[find_greatest(candidates.logits, candidates.size).token.id];
}

// The memory of one thread.
struct Buffers {
    CandidateBuffer allowed;
    CandidateBuffer kept;
};

// Steps 7 to 14.  top_p keeps the first tokens of the order.  A draw from more tokens than these is right if the winner
// is one of them.  If it is not, the order is cut before the winner, and the next draw is from the rest.  That takes
// about 1 - log(top_p) draws, and nothing is sorted.
int32_t draw_truncated(Candidates kept, Token first, int vocab_size, const Row& how, int64_t position,
                       Buffers& buffers) {
    const double temperature = how.temperature, min_p = how.min_p;
    double top_p = how.top_p;
    const auto mass = [&](const Candidates& part) {
        return sum_of_weights(part.logits, part.size, temperature, first.logit / temperature);
    };
    if (how.top_n_sigma > 0) {
        const double width = static_cast<double>(how.top_n_sigma) * standard_deviation(kept, vocab_size);
        kept = keep_before(kept, end_at(first.logit - width), buffers.allowed);
    }
    if (how.top_k > 0) kept = keep_first(kept, how.top_k, buffers.kept);
    if (how.typical_p < 1) {
        kept = keep_typical(kept, temperature, how.typical_p, buffers.kept);
        first = first_of(kept);
    }
    const bool excludes = excludes_top(how, position);
    if (excludes && top_p < 1) {  // the next step needs the tokens that top_p keeps
        kept = keep_most_probable(kept, temperature, top_p, buffers.kept);
        top_p = 1;
    }
    const double limit = top_p < 1 ? top_p * mass(kept) : 0;
    if (min_p > 0) kept = keep_before(kept, end_at(least_of_min_p(first.logit, temperature, min_p)), buffers.kept);
    if (excludes) {
        kept = exclude_top(kept, temperature, how.xtc_threshold, buffers.kept);
        first = first_of(kept);
    }
    const Noise noise(how.seed, position);
    for (;;) {
        const Token drawn = draw(kept, first, temperature, noise);
        if (top_p >= 1) return drawn.id;
        kept = keep_before(kept, drawn, buffers.kept);
        if (kept.size == 0 || mass(kept) < limit) return drawn.id;
    }
}

// Steps 3 to 14 for a row with penalties and biases; `mask` is null if it has none.
int32_t choose(const float* logits, int vocab_size, const uint32_t* mask, const Row& how, int64_t position,
               Buffers& buffers) {
    Candidates allowed{logits, nullptr, vocab_size};
    Greatest greatest = find_greatest(logits, vocab_size);
    if (greatest.is_finite && mask) {
        allowed = keep_masked(allowed, mask, buffers.allowed);
        greatest = find_greatest(allowed.logits, allowed.size);
    }
    if (!greatest.is_finite) return -1;
    if (how.forced_token_id >= 0) return how.forced_token_id;
    const Token first = allowed[greatest.token.id];
    if (how.temperature == 0) return first.id;
    return draw_truncated(allowed, first, vocab_size, how, position, buffers);
}

// How many tokens the row names for their log-probabilities; 0 where it asks for those of the most probable ones.
int64_t num_named(const Row& how) {
    const int32_t* ids = how.logprob_token_ids;
    return std::find(ids, ids + std::size(how.logprob_token_ids), -1) - ids;
}

// Writes the log-probabilities of the chosen token and of the named or most probable ones, and the chosen one's rank.
void report_logprobs(const float* logits, int vocab_size, const Row& how, const ShoalChosen& chosen, int64_t row,
                     CandidateBuffer& buffer) {
    const double greatest = find_greatest(logits, vocab_size).token.logit;
    const double log_sum = std::log(sum_of_weights(logits, vocab_size, 1, greatest));
    const auto logprob = [&](float logit) { return static_cast<float>((logit - greatest) - log_sum); };
    const float logit = logits[chosen.token_ids[row]];
    chosen.logprobs[row] = logprob(logit);
    int32_t num_greater = 0;
    for (int i = 0; i < vocab_size; ++i) num_greater += logits[i] > logit;
    chosen.ranks[row] = 1 + num_greater;
    if (chosen.num_top == 0) return;
    int64_t place = row * chosen.num_top;
    const auto report = [&](int32_t id) {
        chosen.top_token_ids[place] = id;
        chosen.top_logprobs[place++] = logprob(logits[id]);
    };
    if (const int64_t count = std::min(num_named(how), chosen.num_top)) {
        std::for_each(how.logprob_token_ids, how.logprob_token_ids + count, report);
        return;
    }
    const Candidates all{logits, nullptr, vocab_size};
    for (const Token& token : in_order(keep_first(all, static_cast<int>(chosen.num_top), buffer))) report(token.id);
}

void sample_row(float* logits, int vocab_size, const ShoalSampling& sampling, int64_t row, const ShoalChosen& chosen,
                Buffers& buffers) {
    const Row& how = sampling.rows[row];
    {
        const Adjustment adjustment(logits, sampling, static_cast<int32_t>(row));
        const int64_t num_words = (vocab_size + 31) / 32;
        const uint32_t* mask = how.mask >= 0 ? sampling.masks + how.mask * num_words : nullptr;
        chosen.token_ids[row] = choose(logits, vocab_size, mask, how, how.position + sampling.num_later, buffers);
    }
    const bool has_answer = chosen.token_ids[row] >= 0;
    if (has_answer && how.num_logprobs >= 0 && chosen.num_top >= 0) {
        report_logprobs(logits, vocab_size, how, chosen, row, buffers.kept);
    }
}

// Checks that rows exist and ascend, and that tokens are in the vocabulary.
template <class Entry>
const char* find_fault_in_entries(const Entry* entries, int64_t count, int64_t num_rows, int64_t vocab_size) {
    for (const Entry* entry = entries; entry != entries + count; ++entry) {
        if (entry->row < 0 || entry->row >= num_rows) return "entries of a row that is not there";
        if (entry != entries && entry->row < entry[-1].row) return "entries whose rows do not ascend";
        if (entry->token_id < 0 || entry->token_id >= vocab_size) return "entries beyond the vocabulary";
    }
    return nullptr;
}

}  // namespace

const char* find_fault(const ShoalSampling& sampling, int64_t vocab_size) {
    for (const Row* row = sampling.rows; row != sampling.rows + sampling.num_rows; ++row) {
        if (row->forced_token_id >= vocab_size) return "forced_token_id beyond the vocabulary";
        if (row->mask >= sampling.num_masks) return "a mask that is not there";
        const int32_t* ids = row->logprob_token_ids;
        const auto is_known = [&](int32_t id) { return id >= 0 && id < vocab_size; };
        if (!std::all_of(ids, ids + num_named(*row), is_known)) return "logprob_token_ids beyond the vocabulary";
    }
    const char* fault =
        find_fault_in_entries(sampling.penalties, sampling.num_penalties, sampling.num_rows, vocab_size);
    return fault ? fault : find_fault_in_entries(sampling.biases, sampling.num_biases, sampling.num_rows, vocab_size);
}

void sample(Pool& pool, float* logits, int64_t stride, int vocab_size, const ShoalSampling& sampling, int64_t first_row,
            int64_t num_rows, const ShoalChosen& chosen) {
    std::vector<Buffers> buffers(pool.num_threads());
    pool.run(static_cast<int>(num_rows), [&](int tile, int thread) {
        sample_row(logits + tile * stride, vocab_size, sampling, first_row + tile, chosen, buffers[thread]);
    });
}

}  // namespace shoal

const char* shoal_sample(int32_t num_threads, float* logits, int32_t vocab_size, const ShoalSampling* sampling,
                         const ShoalChosen* chosen) {
    if (const char* fault = shoal::find_fault(*sampling, vocab_size)) return fault;
    shoal::Pool pool(num_threads, false);
    shoal::sample(pool, logits, vocab_size, vocab_size, *sampling, 0, sampling->num_rows, *chosen);
    return nullptr;
}
