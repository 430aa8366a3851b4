// A model with packed weights, its KV cache, and the step that runs both.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "attention.h"
#include "checks.h"
#include "feed_forward.h"
#include "latent_block.h"
#include "norm.h"
#include "routing.h"

namespace shoal {

struct Layer {
    ShoalLayer shape;
    const RotaryTables* rotary;  // null where positions do not turn queries and keys
    AttentionLayer attention;
    Norm input_norm;
    Matrix query_key_value;  // columns of the heads, one after the other
    Norm query_norm;
    Norm key_norm;
    Matrix output;
    Norm attention_output_norm;
    Norm feed_forward_norm;
    Norm feed_forward_output_norm;
    Matrix router;  // in float32
    Array<float> sinks{};
    Array<float> correction{};
    std::vector<FeedForward> experts{};   // one in a dense layer; the shared one comes last
    std::optional<Matrix> shared_gate{};  // in float32
    std::optional<LatentLayer> latent{};  // in place of query_key_value

    bool is_mixture() const { return shape.mixture.num_experts > 0; }
};

class Model {
public:
    // sibling: a model whose threads are shared; may be null.
    Model(const ShoalShape& shape, const ShoalOptions& options, const Model* sibling);

    void load_tensor(ShoalTensor tensor, bool is_bias, int layer, int expert, Source source);
    void step(const ShoalBatch& batch, int num_layers, const ShoalSampling* sampling, const ShoalChosen* chosen,
              float* logits);
    // Ends a step that chose nothing; `step` does it itself where it has `sampling` or `logits`.
    void choose(int num_rows, const ShoalSampling* sampling, const ShoalChosen* chosen, float* logits);
    void draft(const ShoalSampling& sampling, const ShoalDraft& draft);
    // See shoal_observe.
    void observe(int64_t* expert_rows, int stride, double* sample_seconds) {
        expert_rows_ = expert_rows;
        expert_rows_stride_ = stride;
        sample_seconds_ = sample_seconds;
    }
    const Limits& limits() const { return limits_; }

private:
    // Rows of logits that are computed together, so that the head's weights are read once for all of them.
    static constexpr int kLogitsRows = 64;

    // Where a block's outputs are added up, and what multiplies them there.
    struct Sum {
        float* values;
        ptrdiff_t stride;
        float factor;
        float* operator[](int row) const { return values + row * stride; }
    };

    Layer make_layer(const ShoalLayer& shape);
    void reserve(int num_tokens);
    template <class Body>
    void for_rows(int num_rows, const Body& body) {
        pool_.for_rows(num_rows, body);
    }
    void finish(Rows& rows, int num_rows) {
        if (rows.is_rounded()) for_rows(num_rows, [&](int row) { rows.finish(row); });
    }
    void embed(const ShoalBatch& batch);
    void read_embedding(int token_id, float* to) const;
    void normalize(int row, const Norm& norm);
    void attend(int index, const ShoalBatch& batch);
    void normalize_heads(const Layer& layer, int position, float* heads) const;
    void keep_rows_of_logits(const ShoalBatch& batch);
    void add_blocks(const Layer& layer, int num_rows);
    Sum begin_sum(const Norm& output_norm, int num_rows);
    void end_sum(const Norm& output_norm, int num_rows);
    void feed_forward(const FeedForward& block, int num_rows, const Sum& sum, const float* factors = nullptr);
    void mix_experts(const Layer& layer, int num_rows, const Sum& sum);
    void route(const Layer& layer, int num_rows);
    void add_shared_expert(const Layer& layer, int num_rows, const Sum& sum);
    void change_logits(float* logits) const;
    float* hidden(int row) { return hidden_.data() + row * hidden_stride_; }
    // A function that adds 16 outputs to a row of the sum, times the row's factor if there are some.
    static auto adds_to(const Sum& sum, const float* factors = nullptr) {
        return [sum, factors](int row, int panel, const Vec& values) {
            float* at = sum[row] + panel * kLanes;
            store(at, fma(broadcast(factors ? factors[row] : sum.factor), values, load(at)));
        };
    }

    ShoalShape shape_;  // without its arrays
    int block_size_;
    ShoalArithmetic arithmetic_;
    Limits limits_;
    std::shared_ptr<Pool> shared_pool_;
    Pool& pool_;
    std::vector<RotaryTables> ropes_;
    Array<float> temperatures_;  // [num_temperatures][num_positions]
    Arena arena_;                // of all packed weights
    Array<char> embedding_;      // [vocab_size][hidden_size] as the checkpoint has it, unless it is the head
    Source::Type embedding_type_ = Source::kFloat32;
    Array<float> positions_;     // [num_positions][hidden_size]; empty for none
    Norm embedding_norm_;
    std::vector<Layer> layers_;
    Norm norm_;
    Matrix head_;
    KVCache cache_;
    Attention attention_;
    std::optional<LatentBlock> latent_;  // in place of the two above

    // Arrays with a row for each token of a step, or for each token and expert.
    ptrdiff_t hidden_stride_;
    Array<float> hidden_;   // the residual stream
    Array<float> outputs_;  // of a block whose norm comes before the sum
    Rows normalized_;
    ptrdiff_t heads_stride_;
    Array<float> heads_;  // queries, keys and values
    Rows attended_;
    Routing routing_;
    Rows gathered_;   // inputs of the experts, expert after expert
    Rows activated_;
    Array<float> mixed_;         // outputs of the experts
    Array<float> shared_shares_;  // of the shared expert
    ptrdiff_t logits_stride_;
    Array<float> logits_;

    int64_t* expert_rows_ = nullptr;  // [num_layers][expert_rows_stride_], while somebody observes
    ptrdiff_t expert_rows_stride_ = 0;
    double* sample_seconds_ = nullptr;  // likewise
};

}  // namespace shoal
