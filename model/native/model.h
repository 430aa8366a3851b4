// A model with packed weights, its KV cache, and the step that runs both.
#pragma once

#include <memory>
#include <vector>

#include "attention.h"
#include "checks.h"
#include "feed_forward.h"

namespace shoal {

struct Layer {
    Array<float> input_norm;
    Matrix query_key_value;  // columns of the heads, one after the other
    Matrix output;
    Array<float> post_attention_norm;
    Matrix router;                      // float32 always
    std::vector<FeedForward> experts;   // one in a dense model
};

class Model {
public:
    // sibling: a model whose threads are shared; may be null.
    Model(const ShoalShape& shape, const ShoalOptions& options, const Model* sibling);

    void load_tensor(ShoalTensor tensor, int layer, int expert, Source source);
    void step(const ShoalBatch& batch, int num_layers, const ShoalSampling* sampling, const ShoalChosen* chosen,
              float* logits);
    // Ends a step that chose nothing; `step` does it itself where it has `sampling` or `logits`.
    void choose(int num_rows, const ShoalSampling* sampling, const ShoalChosen* chosen, float* logits);
    void draft(const ShoalSampling& sampling, const ShoalDraft& draft);
    const Limits& limits() const { return limits_; }

private:
    // Rows of logits that are computed together, so that the head's weights are read once for all of them.
    static constexpr int kLogitsRows = 64;

    void reserve(int num_tokens);
    template <class Body>
    void for_rows(int num_rows, const Body& body);
    void embed(const ShoalBatch& batch);
    void read_embedding(int token_id, float* to) const;
    void normalize(int row, const Array<float>& gain);
    void attend(int index, const ShoalBatch& batch);
    void keep_rows_of_logits(const ShoalBatch& batch);
    void add_feed_forward(const Layer& layer, int num_rows);
    void feed_forward(const Layer& layer, int num_rows);
    void mix_experts(const Layer& layer, int num_rows);
    float* hidden(int row) { return hidden_.data() + row * hidden_stride_; }
    // A function that adds 16 outputs to a row of the hidden states.
    auto adds_to_hidden() {
        return [this](int row, int panel, const Vec& values) {
            float* at = hidden(row) + panel * kLanes;
            store(at, load(at) + values);
        };
    }

    ShoalShape shape_;
    int block_size_;
    Limits limits_;
    std::shared_ptr<Pool> shared_pool_;
    Pool& pool_;
    RotaryTables rotary_;
    Arena arena_;  // of all packed weights
    Array<float> embedding_;  // [vocab_size][hidden_size] unless it is the head
    std::vector<Layer> layers_;
    Array<float> norm_;
    Matrix head_;
    KVCache cache_;
    Attention attention_;

    // Arrays with a row for each token of a step, or for each token and expert.
    ptrdiff_t hidden_stride_;
    Array<float> hidden_;  // the residual stream; columns beyond hidden_size are zero
    Rows normalized_;
    ptrdiff_t heads_stride_;
    Array<float> heads_;  // queries, keys and values
    Rows attended_;
    Routing routing_;
    Rows gathered_;   // inputs of the experts, expert after expert
    Rows activated_;
    ptrdiff_t mixed_stride_;
    Array<float> mixed_;  // outputs of the experts
    ptrdiff_t logits_stride_;
    Array<float> logits_;
};

}  // namespace shoal
