// Grouped-query attention over the paged KV cache (Ainslie et al. 2023), for any number of queries of any sequences.
#pragma once

#include <vector>

#include "kv_cache.h"
#include "rotary.h"
#include "shoal.h"
#include "view.h"

namespace shoal {

// What differs from layer to layer; null is for what a layer does not have.
struct AttentionLayer {
    int view;   // its index
    int place;  // in the cache
    const RotaryTables* rotary;  // that queries are still to be turned by
    const float* temperatures;   // [num_positions], factors of the queries
    const float* sinks;          // [num_heads]
};

// A query's softmax is taken over stretches of kStretch positions, counted from the start of its sequence, and the
// stretches are joined from first to last (as in flash attention, Dao 2022).  So the bits of a result do not depend on
// which queries form a tile, nor on whether one thread or several compute the stretches of a tile.
class Attention {
public:
    static constexpr int kStretch = 256;

    Attention(const ShoalShape& shape, int block_size, int num_threads);

    // The index of a view, of which `plan` then makes a plan.
    int add_view(const View& view);
    std::vector<View> views() const;

    // Divides a step into pieces of work, the same for all layers with the same view.
    void plan(const ShoalBatch& batch, int num_threads);

    // Computes attention over the cache, which already holds the step's own keys and values, for the queries of each
    // token: the first num_heads * head_dim columns of `heads` [num_tokens][stride].
    void run(Pool& pool, const KVCache& cache, const AttentionLayer& layer, const float* heads, ptrdiff_t stride,
             Rows& attended);

private:
    // Consecutive queries of one sequence.  The rows of a tile are these queries in all the heads that share a KV head.
    struct QueryTile {
        int first_token;
        int num_queries;
        int first_position;
        const int32_t* block_table;  // an entry for each group, block after block
        int begin, end;        // stretches that its queries see
        bool split;            // whether each of them is a piece of work
        size_t first_partial;  // of the first KV head, if so
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
    struct Plan {
        View view;
        std::vector<QueryTile> tiles{};
        std::vector<Piece> pieces{};
        std::vector<int> split_tiles{};
    };
    // Positions of a stretch, counted from its start.
    struct Range {
        int begin, end;
        bool is_empty() const { return begin >= end; }
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
    void plan(const ShoalBatch& batch, int num_threads, Plan& plan);
    Range seen(const View& view, const QueryTile& tile, int query, int stretch) const {
        const int position = tile.first_position + query, start = stretch * kStretch;
        return {std::clamp(view.first_seen(position) - start, 0, kStretch),
                std::clamp(position + 1 - start, 0, kStretch)};
    }
    template <class Format>
    void run_as(Pool& pool, const KVCache& cache, const AttentionLayer& layer, const float* heads, ptrdiff_t stride,
                Rows& attended);
    template <class Format>
    void attend_to_stretch(const KVCache& cache, int place, const View& view, const QueryTile& tile, int head,
                           int stretch, Scratch& scratch, const State& to) const;
    template <class Format>
    void score(const typename Format::Weight* const* keys, const typename Format::Weight* const* values, int first_key,
               int num_keys, int num_rows, Scratch& scratch) const;
    void change_scores(const QueryTile& tile, int query, int head, int stretch, Range range, Scratch& scratch) const;
    template <class Format>
    void add_values(const typename Format::Weight* const* values, int begin, int end, int first_row, int num_rows,
                    const Scratch& scratch, float* to) const;
    void load_queries(const AttentionLayer& layer, const QueryTile& tile, int head, const float* heads,
                      ptrdiff_t stride, Scratch& scratch) const;
    void join(const View& view, const QueryTile& tile, int stretch, const State& next, const State& state) const;
    void write(const QueryTile& tile, int head, const float* sinks, const State& state, Rows& attended) const;

    // Enough rows to fill the tiles of products, and so few that the scores stay in the first-level cache.
    static constexpr int kTileRows = 24;

    int num_kv_heads_;
    int head_dim_;
    int padded_dim_;
    int group_;  // heads that share a KV head
    int num_tables_;  // groups of block tables
    int block_size_;
    float scale_;
    float softcap_;         // 0 for none
    Array<float> slopes_;   // [num_heads], of ALiBi; empty for none
    std::vector<Plan> plans_;  // of each view
    Array<float> partials_;
    std::vector<Scratch> scratch_;  // of each thread
};

}  // namespace shoal
