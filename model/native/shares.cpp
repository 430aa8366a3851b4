#include "shares.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "weights.h"

namespace shoal {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Weighted {
    Token token;
    double weight;
    double distance;  // by which tokens are ordered, ascending; those with the same one stand in the order of truncation
};

struct Nearer {
    bool operator()(const Weighted& a, const Weighted& b) const {
        return a.distance != b.distance ? a.distance < b.distance : before(a.token, b.token);
    }
};

double greatest_x(const Candidates& candidates, double temperature) {
    return find_greatest(candidates.logits, candidates.size).token.logit / temperature;
}

// The candidates that take part, ids ascending; their distance is x_max - x.
std::vector<Weighted> weigh(const Candidates& candidates, double temperature) {
    const double x_max = greatest_x(candidates, temperature);
    std::vector<Weighted> tokens;
    tokens.reserve(candidates.size);
    for (int i = 0; i < candidates.size; ++i) {
        if (candidates.logits[i] == -kInfinity) continue;
        const double d = candidates.logits[i] / temperature - x_max;
        tokens.push_back({candidates[i], std::exp(d), -d});
    }
    return tokens;
}

// The last token that stays: one stays while the sum of the weights before it is below this share of all, and the first
// always does.  Each turn halves the tokens among which the last one is, so that nothing is sorted.
Weighted find_last(std::vector<Weighted> tokens, double share) {
    double total = 0;
    for (const Weighted& token : tokens) total += token.weight;
    const double limit = share * total;
    double sum_before = 0;
    auto begin = tokens.begin(), end = tokens.end();
    while (end - begin > 1) {
        const auto middle = begin + (end - begin) / 2;
        std::nth_element(begin, middle, end, Nearer());
        double sum = sum_before;
        for (auto token = begin; token != middle; ++token) sum += token->weight;
        if (sum < limit) {
            begin = middle;
            sum_before = sum;
        } else {
            end = middle;
        }
    }
    return *begin;
}

// The first tokens which have this share of the weights, in `buffer`.
Candidates keep_share(const std::vector<Weighted>& tokens, double share, CandidateBuffer& buffer) {
    const Weighted last = find_last(tokens, share);
    buffer.logits.resize(std::max(buffer.logits.size(), tokens.size()));
    buffer.ids.resize(buffer.logits.size());
    int size = 0;
    for (const Weighted& token : tokens) {
        if (Nearer()(last, token)) continue;
        buffer.logits[size] = token.token.logit;
        buffer.ids[size++] = token.token.id;
    }
    return {buffer.logits.data(), buffer.ids.data(), size};
}

}  // namespace

double standard_deviation(const Candidates& candidates, int vocab_size) {
    size_t num_places = 1;
    while (num_places < static_cast<size_t>(vocab_size)) num_places *= 2;
    std::vector<double> places(num_places);
    const auto mean_of = [&](const auto& number) {
        std::fill(places.begin(), places.end(), 0.0);
        int count = 0;
        for (int i = 0; i < candidates.size; ++i) {
            if (candidates.logits[i] == -kInfinity) continue;
            places[candidates.id(i)] = number(candidates.logits[i]);
            ++count;
        }
        for (size_t half = num_places / 2; half > 0; half /= 2) {
            for (size_t i = 0; i < half; ++i) places[i] += places[half + i];
        }
        return places[0] / count;
    };
    const double mean = mean_of([](double logit) { return logit; });
    return std::sqrt(mean_of([&](double logit) { return (logit - mean) * (logit - mean); }));
}

Candidates keep_typical(const Candidates& candidates, double temperature, double share, CandidateBuffer& buffer) {
    std::vector<Weighted> tokens = weigh(candidates, temperature);
    double sum = 0, total = 0;
    for (const Weighted& token : tokens) {
        sum += token.weight * token.distance;
        total += token.weight;
    }
    const double mean = sum / total;
    for (Weighted& token : tokens) token.distance = std::abs(token.distance - mean);
    return keep_share(tokens, share, buffer);
}

Candidates keep_most_probable(const Candidates& candidates, double temperature, double share, CandidateBuffer& buffer) {
    return keep_share(weigh(candidates, temperature), share, buffer);
}

Candidates exclude_top(const Candidates& candidates, double temperature, double threshold, CandidateBuffer& buffer) {
    const double x_max = greatest_x(candidates, temperature);
    const double limit = threshold * sum_of_weights(candidates.logits, candidates.size, temperature, x_max);
    Token last{kInfinity, -1};
    for (int i = 0; i < candidates.size; ++i) {
        const bool is_top = std::exp(candidates.logits[i] / temperature - x_max) >= limit;
        if (is_top && candidates.logits[i] > -kInfinity && before(last, candidates[i])) last = candidates[i];
    }
    return keep_from(candidates, last, buffer);
}

}  // namespace shoal
