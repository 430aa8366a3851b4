// Grouped-query attention over the paged KV cache (Ainslie et al. 2023), for any number of queries of any sequences.
#pragma once

#include <vector>

#include "kv_cache.h"
#include "shoal.h"

namespace shoal {

// cos and sin of the angle of each position and pair, [num_positions][head_dim / 2] each.
struct RotaryTables {
    int half;
    Array<float> cos;
    Array<float> sin;

    // Turns element i of the head with element i of its second half (Su et al. 2021), and scales both.
    void rotate(const float* head, int position, float scale, float* to) const {
        const float* c = cos.data() + static_cast<size_t>(position) * half;
        const float* s = sin.data() + static_cast<size_t>(position) * half;
        for (int i = 0; i < half; ++i) {
            const float first = head[i], second = head[half + i];
            to[i] = (first * c[i] - second * s[i]) * scale;
            to[half + i] = (second * c[i] + first * s[i]) * scale;
        }
    }
};

// A query's softmax is taken over stretches of kStretch positions, counted from the start of its sequence, and the
// stretches are joined from first to last (as in flash attention, Dao 2022).  So the bits of a result do not depend on
// which queries form a tile, nor on whether one thread or several compute the stretches of a tile.
class Attention {
public:
    static constexpr int kStretch = 256;

    // queries: [num_heads * head_dim, then keys and values] of each token are the columns of `heads` in run().
    Attention(int num_heads, int num_kv_heads, int head_dim, int block_size, int num_threads);

    // Divides a step into pieces of work, the same for all layers.
    void plan(const ShoalBatch& batch, int num_threads);

    // Computes attention over the cache, which already holds the step's own keys and values, for the queries of each
    // token: the first num_heads * head_dim columns of `heads` [num_tokens][stride].
    void run(Pool& pool, const KVCache& cache, int layer, const RotaryTables& rotary, const float* heads,
             ptrdiff_t stride, Rows& attended);

private:
    // Consecutive queries of one sequence.  The rows of a tile are these queries in all the heads that share a KV head.
    struct QueryTile {
        int first_token;
        int num_queries;
        int first_position;
        const int32_t* block_table;
        bool split;            // whether each of its stretches is a piece of work
        size_t first_partial;  // of the first KV head, if so

        int num_stretches() const { return (first_position + num_queries - 1) / kStretch + 1; }
    };
    // A piece of work: the stretches from begin to end of a tile, for one KV head.
    struct Piece {
        int tile;
        int head;
        int begin;
        int end;
    };
    // For each row, over some stretches: the greatest score, the sum of weights, and the weighted sum of values,
    // [padded_dim].
    struct State {
        float* greatest;
        float* sum;
        float* values;
    };
    struct Scratch {
        Array<float> queries;  // [rows][padded_dim]
        Array<float> scores;   // [rows][kStretch]
        Array<float> stretch;  // State of one stretch
        Array<float> all;      // State of those before it
    };

    int rows_per_tile() const { return std::max(kTileRows, group_); }
    size_t state_size(int num_rows) const { return static_cast<size_t>(num_rows) * (2 + padded_dim_); }
    State state_at(float* memory, int num_rows) const {
        return {memory, memory + num_rows, memory + 2 * static_cast<size_t>(num_rows)};
    }
    template <class Format>
    void run_as(Pool& pool, const KVCache& cache, int layer, const RotaryTables& rotary, const float* heads,
                ptrdiff_t stride, Rows& attended);
    template <class Format>
    void attend_to_stretch(const KVCache& cache, int layer, const QueryTile& tile, int head, int stretch,
                           Scratch& scratch, const State& to) const;
    template <class Format>
    void score(const typename Format::Weight* const* keys, const typename Format::Weight* const* values, int num_keys,
               int num_rows, Scratch& scratch) const;
    template <class Format>
    void add_values(const typename Format::Weight* const* values, int begin, int end, int first_row, int num_rows,
                    const Scratch& scratch, float* to) const;
    void load_queries(const QueryTile& tile, int head, const RotaryTables& rotary, const float* heads,
                      ptrdiff_t stride, Scratch& scratch) const;
    void join(const QueryTile& tile, int stretch, const State& next, const State& state) const;
    void write(const QueryTile& tile, int head, const State& state, Rows& attended) const;

    // Enough rows to fill the tiles of products, and so few that the scores stay in the first-level cache.
    static constexpr int kTileRows = 24;

    int num_kv_heads_;
    int head_dim_;
    int padded_dim_;
    int group_;  // heads that share a KV head
    int block_size_;
    float scale_;
    std::vector<QueryTile> tiles_;
    std::vector<Piece> pieces_;
    std::vector<int> split_tiles_;
    Array<float> partials_;
    std::vector<Scratch> scratch_;  // of each thread
};

}  // namespace shoal
