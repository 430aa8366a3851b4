#include "latent.h"

#include "latent_products.h"
#include "softmax.h"

namespace shoal {

LatentAttention::LatentAttention(int num_heads, int rank, int block_size, int num_threads)
    : num_heads_(num_heads), rank_(rank), padded_rank_(round_up(rank, kLanes)), block_size_(block_size) {
    for (int thread = 0; thread < num_threads; ++thread) {
        scratch_.push_back({Array<float>(kTileRows * kScoreStride), Array<float>(),
                            Array<float>(state_size(kTileRows)), Array<float>(state_size(kTileRows))});
    }
}

void LatentAttention::plan(const ShoalBatch& batch, int num_threads) {
    tiles_.clear();
    pieces_.clear();
    split_tiles_.clear();
    for (int64_t s = 0; s < batch.num_seqs; ++s) {
        const size_t first = static_cast<size_t>(batch.query_start_loc[s]) * num_heads_;
        const size_t end = static_cast<size_t>(batch.query_start_loc[s + 1]) * num_heads_;
        for (size_t row = first; row < end; row += kTileRows) {
            const int num_rows = static_cast<int>(std::min<size_t>(kTileRows, end - row));
            tiles_.push_back({row, num_rows, static_cast<int>(row % num_heads_), batch.positions[row / num_heads_],
                              batch.block_tables + s * batch.max_blocks, false, 0});
        }
    }
    // Where there are few tiles, long ones are split, so that no thread is idle.
    const bool few = static_cast<int>(tiles_.size()) < 8 * num_threads;
    size_t num_partials = 0;
    for (int index = 0; index < static_cast<int>(tiles_.size()); ++index) {
        RowTile& tile = tiles_[index];
        const int stretches = num_stretches(tile);
        tile.split = few && stretches > 1 && num_threads > 1;
        if (tile.split) {
            tile.first_partial = num_partials;
            num_partials += stretches * state_size(tile.num_rows);
            split_tiles_.push_back(index);
        }
        const int step = tile.split ? 1 : stretches;
        for (int begin = 0; begin < stretches; begin += step) pieces_.push_back({index, begin, begin + step});
    }
    partials_.reserve(num_partials);
    // The longest first: the pieces that end last are then short.
    std::stable_sort(pieces_.begin(), pieces_.end(),
                     [](const Piece& a, const Piece& b) { return a.end - a.begin > b.end - b.begin; });
}

void LatentAttention::run(Pool& pool, const LatentCache& cache, int layer, float* rows) {
    const auto partial = [&](const RowTile& tile, int stretch) {
        return state_at(partials_.data() + tile.first_partial + stretch * state_size(tile.num_rows), tile.num_rows);
    };
    pool.run(static_cast<int>(pieces_.size()), [&](int index, int thread) {
        const Piece& piece = pieces_[index];
        const RowTile& tile = tiles_[piece.tile];
        Scratch& scratch = scratch_[thread];
        const float* queries = rows + tile.first_row * cache.stride();
        if (cache.is_half()) scratch.keys.reserve(static_cast<size_t>(kStretch) * cache.stride());
        if (tile.split) {
            attend_to_stretch(cache, layer, tile, queries, piece.begin, scratch, partial(tile, piece.begin));
            return;
        }
        const State next = state_at(scratch.stretch.data(), tile.num_rows);
        const State all = state_at(scratch.all.data(), tile.num_rows);
        for (int stretch = piece.begin; stretch < piece.end; ++stretch) {
            attend_to_stretch(cache, layer, tile, queries, stretch, scratch, next);
            join(tile, stretch, next, all);
        }
        write(tile, all, rows, cache.stride());
    });
    pool.run(static_cast<int>(split_tiles_.size()), [&](int index, int thread) {
        const RowTile& tile = tiles_[split_tiles_[index]];
        const State all = state_at(scratch_[thread].all.data(), tile.num_rows);
        for (int stretch = 0; stretch < num_stretches(tile); ++stretch) join(tile, stretch, partial(tile, stretch), all);
        write(tile, all, rows, cache.stride());
    });
}

void LatentAttention::attend_to_stretch(const LatentCache& cache, int layer, const RowTile& tile, const float* queries,
                                        int stretch, Scratch& scratch, const State& to) const {
    const float* groups[kStretch / kLanes];
    const int start = stretch * kStretch;
    const auto num_seen = [&](int row) {  // positions of this stretch that the row sees
        return std::clamp(position(tile, row) + 1 - start, 0, kStretch);
    };
    const int num_groups = (num_seen(tile.num_rows - 1) + kLanes - 1) / kLanes;
    score(cache, layer, tile, queries, start, num_groups, scratch, groups);
    int first = 0;  // the first row that sees a position of this stretch
    while (num_seen(first) == 0) ++first;
    for (int row = first; row < tile.num_rows; ++row) {
        exponentiate(scratch.scores.data() + row * kScoreStride, 0, num_seen(row), to.greatest + row, to.sum + row);
        std::memset(to.latents + row * padded_rank_, 0, padded_rank_ * sizeof(float));
    }
    const auto add_latents = [&](int row, int num_rows, int begin, int end) {
        weigh(scratch.scores.data() + row * kScoreStride, kScoreStride, num_rows, groups, cache.stride(), padded_rank_,
              begin, end, to.latents + row * padded_rank_, padded_rank_);
    };
    // Positions that all rows see are added for all of them at once.  The others are added for the rows of each query
    // alone, because a position with weight zero must not be read: zero times NaN is NaN.
    const int common = num_seen(first) / kLanes * kLanes;
    add_latents(first, tile.num_rows - first, 0, common);
    for (int row = first, end; row < tile.num_rows; row = end) {
        end = std::min(tile.num_rows, row + num_heads_ - (tile.first_head + row) % num_heads_);
        add_latents(row, end - row, common, num_seen(row));
    }
}

// Computes the scores of all rows with num_groups * 16 positions from `start` on, and finds their keys, as float32.
void LatentAttention::score(const LatentCache& cache, int layer, const RowTile& tile, const float* queries, int start,
                            int num_groups, Scratch& scratch, const float** groups) const {
    const ptrdiff_t stride = cache.stride();
    const auto slot = [&](int group) {
        const int position = start + group * kLanes;
        return int64_t{tile.block_table[position / block_size_]} * block_size_ + position % block_size_;
    };
    for (int group = 0; group < num_groups; ++group) {
        const int64_t next = slot(std::min(group + 1, num_groups - 1));
        const char* ahead;
        if (cache.is_half()) {
            const uint16_t* from = cache.halves(layer, slot(group));
            float* to = scratch.keys.data() + group * kLanes * stride;
            for (ptrdiff_t i = 0; i < kLanes * stride; i += kLanes) store(to + i, load(from + i));
            groups[group] = to;
            ahead = reinterpret_cast<const char*>(cache.halves(layer, next));
        } else {
            groups[group] = cache.floats(layer, slot(group));
            ahead = reinterpret_cast<const char*>(cache.floats(layer, next));
        }
        shoal::score(queries, tile.num_rows, groups[group], stride, ahead, stride * cache.element_size(),
                     scratch.scores.data() + group * kLanes, kScoreStride);
    }
}

// Joins the next stretch to the ones before it.
void LatentAttention::join(const RowTile& tile, int stretch, const State& next, const State& state) const {
    for (int row = 0; row < tile.num_rows; ++row) {
        if (position(tile, row) < stretch * kStretch) continue;  // the row sees nothing of this stretch
        float* latents = state.latents + row * padded_rank_;
        const float* added = next.latents + row * padded_rank_;
        if (stretch == 0) {
            state.greatest[row] = next.greatest[row];
            state.sum[row] = next.sum[row];
            std::memcpy(latents, added, padded_rank_ * sizeof(float));
            continue;
        }
        join_row(state.greatest[row], state.sum[row], latents, next.greatest[row], next.sum[row], added, padded_rank_);
    }
}

void LatentAttention::write(const RowTile& tile, const State& state, float* rows, ptrdiff_t stride) const {
    for (int row = 0; row < tile.num_rows; ++row) {
        const float* latents = state.latents + row * padded_rank_;
        float* to = rows + (tile.first_row + row) * stride;
        const float inverse = 1 / state.sum[row];
        for (int i = 0; i < rank_; ++i) to[i] = latents[i] * inverse;
    }
}

}  // namespace shoal
