// The feed-forward block of a layer, dense or as a mixture of experts (Shazeer et al. 2017; Jiang et al. 2024).
#include "activations.h"
#include "model.h"

namespace shoal {

// Adds a block's outputs for the rows of normalized_, times the factors of the rows if there are some.
void Model::feed_forward(const FeedForward& block, int num_rows, const Sum& sum, const float* factors) {
    activated_.reserve(num_rows, block.width);
    for_panels(pool_, 1, block.gate_up.num_panels(), [&](int, const PanelRange& range) {
        block.activate(normalized_, 0, num_rows, range, activated_);
    });
    finish(activated_, num_rows);
    multiply_all(pool_, block.down, activated_, 0, num_rows, adds_to(sum, factors));
}

void Model::mix_experts(const Layer& layer, int num_rows, const Sum& sum) {
    const ShoalMixture& mixture = layer.shape.mixture;
    const int num_choices = num_rows * mixture.num_experts_per_tok;
    gathered_.reserve(num_choices);
    activated_.reserve(num_choices, mixture.intermediate_size);
    mixed_.reserve(num_choices * hidden_stride_);
    route(layer, num_rows);
    const auto& ranges = routing_.ranges();
    if (expert_rows_ != nullptr) {
        int64_t* rows = expert_rows_ + (&layer - layers_.data()) * expert_rows_stride_;
        for (const Routing::Range& range : ranges) rows[range.expert] += range.end - range.begin;
    }
    const int num_used = static_cast<int>(ranges.size());
    for_panels(pool_, num_used, layer.experts[0].gate_up.num_panels(), [&](int index, const PanelRange& panels) {
        const auto [expert, begin, end] = ranges[index];
        layer.experts[expert].activate(gathered_, begin, end - begin, panels, activated_);
    });
    finish(activated_, num_choices);
    for_panels(pool_, num_used, layer.experts[0].down.num_panels(), [&](int index, const PanelRange& panels) {
        const auto [expert, begin, end] = ranges[index];
        float* const to = mixed_.data() + begin * hidden_stride_;
        layer.experts[expert].down.multiply(
            activated_, begin, end - begin, panels,
            [&](int row, int panel, const Vec& values) { store(to + row * hidden_stride_ + panel * kLanes, values); });
    });
    for_rows(num_rows, [&](int row) {
        for (int i = 0; i < routing_.num_chosen(); ++i) {
            const float* mixed = mixed_.data() + routing_.place(row, i) * hidden_stride_;
            const float share = mixture.share_on_input ? 1.0F : routing_.share(row, i);
            const Vec factor = broadcast(share * sum.factor);
            for (int k = 0; k < shape_.hidden_size; k += kLanes) {
                store(sum[row] + k, fma(factor, load(mixed + k), load(sum[row] + k)));
            }
        }
    });
    if (mixture.shared_size > 0) add_shared_expert(layer, num_rows, sum);
}

// Chooses the experts of each row, and copies what they read to gathered_.
void Model::route(const Layer& layer, int num_rows) {
    routing_.reserve(layer.shape.mixture, num_rows);
    const float* correction = layer.correction.size() > 0 ? layer.correction.data() : nullptr;
    for_rows(num_rows, [&](int row) {
        float logits[kMaxExperts];
        if (!shape_.parallel) normalize(row, layer.feed_forward_norm);
        layer.router.multiply(normalized_, row, 1, {0, layer.router.num_panels(), 0},
                              [&](int, int panel, const Vec& values) { store(logits + panel * kLanes, values); });
        routing_.choose(row, logits, correction);
    });
    routing_.gather(num_rows);
    for_rows(num_rows, [&](int row) {
        for (int i = 0; i < routing_.num_chosen(); ++i) {
            const int place = routing_.place(row, i);
            if (!layer.shape.mixture.share_on_input) {
                gathered_.copy(place, normalized_, row);
                continue;
            }
            const float share = routing_.share(row, i), *from = normalized_[row];
            for (int k = 0; k < shape_.hidden_size; ++k) gathered_[place][k] = from[k] * share;
            gathered_.finish(place);
        }
    });
}

// The expert that every row goes to; a gate may say how much of it is added (Qwen2-MoE).
void Model::add_shared_expert(const Layer& layer, int num_rows, const Sum& sum) {
    const FeedForward& block = layer.experts.back();
    if (!layer.shared_gate) return feed_forward(block, num_rows, sum);
    shared_shares_.reserve(num_rows);
    for_rows(num_rows, [&](int row) {
        layer.shared_gate->multiply(normalized_, row, 1, {0, 1, 0}, [&](int, int, const Vec& values) {
            float lanes[kLanes];
            store(lanes, sigmoid(values));
            shared_shares_[row] = lanes[0] * sum.factor;
        });
    });
    feed_forward(block, num_rows, sum, shared_shares_.data());
}

}  // namespace shoal
