// Multi-head latent attention (DeepSeek-V2, 2024) over its cache, in the absorbed form: a row of the cache is the key of
// all heads, and its first elements, the latent, are their value.
#pragma once

#include <vector>

#include "latent_cache.h"
#include "shoal.h"

namespace shoal {

// As in Attention, a softmax is taken over stretches of kStretch positions, counted from the start of the sequence, and
// the stretches are joined from first to last.
class LatentAttention {
public:
    static constexpr int kStretch = 256;

    // rank: width of the latent.
    LatentAttention(int num_heads, int rank, int block_size, int num_threads);

    // Divides a step into pieces of work, the same for all layers.
    void plan(const ShoalBatch& batch, int num_threads);

    // Replaces the queries of a step, a row for each token and head as wide as the cache's, by attention's results: the
    // first `rank` elements of each row.
    void run(Pool& pool, const LatentCache& cache, int layer, float* rows);

private:
    // Consecutive rows of one sequence: all heads of a query, then those of the next one.
    struct RowTile {
        size_t first_row;
        int num_rows;
        int first_head;
        int first_position;
        const int32_t* block_table;
        bool split;            // whether each of its stretches is a piece of work
        size_t first_partial;  // if so
    };
    // A piece of work: the stretches from begin to end of a tile.
    struct Piece {
        int tile;
        int begin;
        int end;
    };
    // For each row, over some stretches: the greatest score, the sum of weights, and the weighted sum of latents.
    struct State {
        float* greatest;
        float* sum;
        float* latents;  // [rows][padded_rank]
    };
    struct Scratch {
        Array<float> scores;   // [rows][kScoreStride]
        Array<float> keys;     // [kStretch][cache's stride], where the cache is float16
        Array<float> stretch;  // State of one stretch
        Array<float> all;      // State of those before it
    };

    int position(const RowTile& tile, int row) const {
        return tile.first_position + (tile.first_head + row) / num_heads_;
    }
    int num_stretches(const RowTile& tile) const { return position(tile, tile.num_rows - 1) / kStretch + 1; }
    size_t state_size(int num_rows) const { return static_cast<size_t>(num_rows) * (2 + padded_rank_); }
    State state_at(float* memory, int num_rows) const {
        return {memory, memory + num_rows, memory + 2 * static_cast<size_t>(num_rows)};
    }
    void attend_to_stretch(const LatentCache& cache, int layer, const RowTile& tile, const float* queries, int stretch,
                           Scratch& scratch, const State& to) const;
    void score(const LatentCache& cache, int layer, const RowTile& tile, const float* queries, int start, int num_groups,
               Scratch& scratch, const float** groups) const;
    void join(const RowTile& tile, int stretch, const State& next, const State& state) const;
    void write(const RowTile& tile, const State& state, float* rows, ptrdiff_t stride) const;

    // Enough rows to fill the tiles of products, and so few that states and queries stay in the second-level cache.
    static constexpr int kTileRows = 32;
    // Rows of scores do not compete for the same places of the cache.
    static constexpr int kScoreStride = kStretch + kLanes;

    int num_heads_;
    int rank_;
    int padded_rank_;
    int block_size_;
    std::vector<RowTile> tiles_;
    std::vector<Piece> pieces_;
    std::vector<int> split_tiles_;
    Array<float> partials_;
    std::vector<Scratch> scratch_;  // of each thread
};

}  // namespace shoal
