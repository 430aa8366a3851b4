// How attention divides a step into pieces of work.
#include "attention.h"

namespace shoal {

Attention::Attention(const ShoalShape& shape, int block_size, int num_threads)
    : num_kv_heads_(shape.num_kv_heads),
      head_dim_(shape.head_dim),
      padded_dim_(round_up(shape.head_dim, kLanes)),
      group_(shape.num_heads / shape.num_kv_heads),
      num_tables_(shape.num_groups),
      block_size_(block_size),
      scale_(shape.attention_scale),
      softcap_(shape.attention_softcap),
      slopes_(shape.alibi_slopes ? shape.num_heads : 0) {
    std::copy(shape.alibi_slopes, shape.alibi_slopes + slopes_.size(), slopes_.data());
    const size_t rows = rows_per_tile();
    for (int thread = 0; thread < num_threads; ++thread) {
        scratch_.push_back({Array<float>(rows * padded_dim_), Array<float>(rows * kStretch),
                            Array<float>(state_size(rows)), Array<float>(state_size(rows))});
    }
}

int Attention::add_view(const View& view) {
    const auto found = std::find_if(plans_.begin(), plans_.end(), [&](const Plan& plan) { return plan.view == view; });
    const int index = static_cast<int>(found - plans_.begin());
    if (found == plans_.end()) plans_.push_back({view});
    return index;
}

std::vector<View> Attention::views() const {
    std::vector<View> views;
    for (const Plan& plan : plans_) views.push_back(plan.view);
    return views;
}

void Attention::plan(const ShoalBatch& batch, int num_threads) {
    for (Plan& one : plans_) plan(batch, num_threads, one);
}

void Attention::plan(const ShoalBatch& batch, int num_threads, Plan& plan) {
    const View& view = plan.view;
    auto& tiles = plan.tiles;
    auto& pieces = plan.pieces;
    auto& split_tiles = plan.split_tiles;
    tiles.clear();
    pieces.clear();
    split_tiles.clear();
    const int height = rows_per_tile() / group_;
    for (int64_t s = 0; s < batch.num_seqs; ++s) {
        const int32_t* table = batch.block_tables + s * batch.max_blocks * num_tables_ + view.group;
        for (int token = batch.query_start_loc[s]; token < batch.query_start_loc[s + 1]; token += height) {
            const int num_queries = std::min(height, batch.query_start_loc[s + 1] - token);
            const int position = batch.positions[token];
            const int begin = view.first_seen(position) / kStretch, end = (position + num_queries - 1) / kStretch + 1;
            tiles.push_back({token, num_queries, position, table, begin, end, false, 0});
        }
    }
    // Where there are few tiles, long ones are split, so that no thread is idle.
    const bool few = static_cast<int>(tiles.size()) * num_kv_heads_ < 8 * num_threads;
    size_t num_partials = 0;
    for (int index = 0; index < static_cast<int>(tiles.size()); ++index) {
        QueryTile& tile = tiles[index];
        const int stretches = tile.end - tile.begin;
        tile.split = few && stretches > 1;
        if (tile.split) {
            tile.first_partial = num_partials;
            num_partials += num_kv_heads_ * stretches * state_size(tile.num_queries * group_);
            split_tiles.push_back(index);
        }
        const int step = tile.split ? 1 : stretches;
        for (int head = 0; head < num_kv_heads_; ++head) {
            for (int at = tile.begin; at < tile.end; at += step) pieces.push_back({index, head, at, at + step});
        }
    }
    partials_.reserve(num_partials);
    // The longest first: the pieces that end last are then short.
    std::stable_sort(pieces.begin(), pieces.end(),
                     [](const Piece& a, const Piece& b) { return a.end - a.begin > b.end - b.begin; });
}

}  // namespace shoal
