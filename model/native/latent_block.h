// The attention block of layers with latent attention: its linear layers, its cache, and a step through all of them.
#pragma once

#include <optional>
#include <vector>

#include "latent.h"
#include "norm.h"
#include "rotary.h"

namespace shoal {

// The weights of one layer: see LatentAttention in model/record.py.
struct LatentLayer {
    int place;                    // in the cache
    const RotaryTables* rotary;   // null where positions do not turn queries and keys
    const float* temperatures;    // [num_positions], factors of the queries; may be null
    Matrix down;                  // queries, or their latent; then the latent of keys and values, and the turned part
    Norm query_norm;
    std::optional<Matrix> query;  // from the latent of queries, if there is one
    Norm latent_norm;
    std::vector<Matrix> key_up;   // of each head, in float32, as the one below
    std::vector<Matrix> value_up;
};

class LatentBlock {
public:
    LatentBlock(const ShoalShape& shape, const ShoalOptions& options, Pool& pool, Arena& arena);

    LatentLayer make_layer(int place, const RotaryTables* rotary, const float* temperatures) const;
    void load_tensor(LatentLayer& layer, ShoalTensor tensor, bool is_bias, Source source) const;

    // Prepares for a step.
    void plan(const ShoalBatch& batch);
    // Writes a layer's latents to the cache, and the result of attention, before the output projection, to `attended`.
    void attend(const LatentLayer& layer, const ShoalBatch& batch, const Rows& normalized, Rows& attended);

private:
    int head_dim() const { return shape_.nope_dim + shape_.rope_dim; }
    int query_width() const { return num_heads_ * head_dim(); }
    // Columns of `down` before the latent of keys and values.
    int first_width() const { return shape_.query_rank > 0 ? shape_.query_rank : query_width(); }
    float* row(int token, int head) { return rows_.data() + (size_t{1} * token * num_heads_ + head) * cache_.stride(); }
    template <class Number>
    void pack_turned(std::vector<Matrix>& matrices, Source source) const;
    template <class Take>
    void multiply_heads(const std::vector<Matrix>& matrices, const float* x, ptrdiff_t head_stride,
                        ptrdiff_t token_stride, int num_tokens, const Take& take);
    void write_latent(const LatentLayer& layer, int position, int64_t slot, const float* from);

    ShoalLatent shape_;
    int hidden_size_;
    int num_heads_;
    float scale_;
    ShoalArithmetic arithmetic_;
    Pool& pool_;
    Arena& arena_;
    LatentCache cache_;
    LatentAttention attention_;

    // Arrays with a row for each token of a step.
    ptrdiff_t down_stride_;
    Array<float> down_;
    Rows query_latents_;
    ptrdiff_t query_stride_;
    Array<float> queries_;  // where they have a latent
    Array<float> rows_;     // [token][head], as wide as a row of the cache: absorbed queries, then attention's results
};

}  // namespace shoal
