#include "feed_forward.h"

namespace shoal {

void Routing::choose(int row, const float* scores) {
    int* experts = experts_.data() + row * num_chosen_;
    float* shares = shares_.data() + row * num_chosen_;
    const auto is_taken = [&](int expert, int count) { return std::find(experts, experts + count, expert) != experts + count; };
    for (int choice = 0; choice < num_chosen_; ++choice) {
        int best = -1;  // the first on ties; an expert is chosen even where all scores are NaN
        for (int expert = 0; expert < num_experts_; ++expert) {
            if (!is_taken(expert, choice) && (best < 0 || scores[expert] > scores[best])) best = expert;
        }
        experts[choice] = best;
    }
    float sum = 0;
    for (int choice = 0; choice < num_chosen_; ++choice) {
        float lanes[kLanes];
        store(lanes, exp(broadcast(scores[experts[choice]] - scores[experts[0]])));
        shares[choice] = lanes[0];
        sum += lanes[0];
    }
    for (int choice = 0; choice < num_chosen_; ++choice) shares[choice] /= sum;
}

void Routing::gather(int num_rows) {
    const int count = num_rows * num_chosen_;
    std::vector<int> next(num_experts_ + 1);
    for (int i = 0; i < count; ++i) ++next[experts_[i] + 1];
    ranges_.clear();
    for (int expert = 0; expert < num_experts_; ++expert) {
        next[expert + 1] += next[expert];
        if (next[expert + 1] > next[expert]) ranges_.push_back({expert, next[expert], next[expert + 1]});
    }
    for (int i = 0; i < count; ++i) places_[i] = next[experts_[i]]++;
}

}  // namespace shoal
