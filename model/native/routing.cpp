#include "routing.h"

#include <algorithm>
#include <limits>

#include "activations.h"
#include "vectors.h"

namespace shoal {

namespace {

constexpr float kLeast = -std::numeric_limits<float>::infinity();

// A score for each logit: its sigmoid, or its share of the softmax.
void score_all(ShoalScore kind, const float* logits, int count, float* scores) {
    if (kind == kSigmoid) {
        for_vectors(count, [&](int i, auto n) { store_first(scores + i, sigmoid(load_first(logits + i, n)), n); });
        return;
    }
    const Vec greatest = broadcast(*std::max_element(logits, logits + count));
    Vec sums = broadcast(0.0F);
    for_vectors(count, [&](int i, auto n) {
        const Vec weights = keep_first(exp(load_first(logits + i, n) - greatest), n);
        store_first(scores + i, weights, n);
        sums = sums + weights;
    });
    const float sum = sum_lanes(sums);
    for (int i = 0; i < count; ++i) scores[i] /= sum;
}

}  // namespace

void Routing::reserve(const ShoalMixture& mixture, int num_rows) {
    mixture_ = mixture;
    const size_t size = static_cast<size_t>(num_rows) * num_chosen();
    experts_.reserve(size);
    shares_.reserve(size);
    places_.reserve(size);
}

void Routing::choose(int row, const float* logits, const float* correction) {
    const int num_experts = mixture_.num_experts;
    int* experts = experts_.data() + row * num_chosen();
    float* shares = shares_.data() + row * num_chosen();
    float sum = 0;
    if (mixture_.score == kSoftmax && mixture_.renormalise && !correction && mixture_.num_groups == 1) {
        // A softmax over all logits, normalised over the chosen ones, is the softmax over these alone.
        choose_best(logits, experts);
        for (int choice = 0; choice < num_chosen(); ++choice) {
            float lanes[kLanes];
            store(lanes, exp(broadcast(logits[experts[choice]] - logits[experts[0]])));
            shares[choice] = lanes[0];
            sum += lanes[0];
        }
    } else {
        float scores[kMaxExperts], corrected[kMaxExperts];
        score_all(mixture_.score, logits, num_experts, scores);
        for (int i = 0; i < num_experts; ++i) corrected[i] = correction ? scores[i] + correction[i] : scores[i];
        if (mixture_.num_groups > 1) drop_groups(corrected);
        choose_best(corrected, experts);
        for (int choice = 0; choice < num_chosen(); ++choice) {
            shares[choice] = scores[experts[choice]];
            sum += shares[choice];
        }
    }
    if (!mixture_.renormalise) sum = 1;
    for (int choice = 0; choice < num_chosen(); ++choice) shares[choice] = shares[choice] / sum * mixture_.scale;
}

// The experts with the greatest scores, best first.
void Routing::choose_best(const float* scores, int* experts) const {
    const auto is_taken = [&](int expert, int count) { return std::find(experts, experts + count, expert) != experts + count; };
    for (int choice = 0; choice < num_chosen(); ++choice) {
        int best = -1;  // the first on ties; an expert is chosen even where all scores are NaN
        for (int expert = 0; expert < mixture_.num_experts; ++expert) {
            if (!is_taken(expert, choice) && (best < 0 || scores[expert] > scores[best])) best = expert;
        }
        experts[choice] = best;
    }
}

// Gives the least score to all experts but those of the best groups (DeepSeek-V2 and V3).
void Routing::drop_groups(float* scores) const {
    const int num_groups = mixture_.num_groups, size = mixture_.num_experts / num_groups;
    float group_scores[kMaxExperts];
    for (int group = 0; group < num_groups; ++group) {
        float best = kLeast, second = kLeast;
        for (const float* score = scores + group * size; score < scores + (group + 1) * size; ++score) {
            second = std::max(second, std::min(best, *score));
            best = std::max(best, *score);
        }
        group_scores[group] = mixture_.sums_top2 ? best + second : best;
    }
    // A group goes if as many others as may stay are better, or as good and before it.
    for (int group = 0; group < num_groups; ++group) {
        int num_better = 0;
        for (int other = 0; other < num_groups; ++other) {
            num_better += group_scores[other] > group_scores[group] ||
                          (group_scores[other] == group_scores[group] && other < group);
        }
        if (num_better >= mixture_.num_chosen_groups) std::fill_n(scores + group * size, size, kLeast);
    }
}

void Routing::gather(int num_rows) {
    const int count = num_rows * num_chosen();
    std::vector<int> next(mixture_.num_experts + 1);
    for (int i = 0; i < count; ++i) ++next[experts_[i] + 1];
    ranges_.clear();
    for (int expert = 0; expert < mixture_.num_experts; ++expert) {
        next[expert + 1] += next[expert];
        if (next[expert + 1] > next[expert]) ranges_.push_back({expert, next[expert], next[expert + 1]});
    }
    for (int i = 0; i < count; ++i) places_[i] = next[experts_[i]]++;
}

}  // namespace shoal
