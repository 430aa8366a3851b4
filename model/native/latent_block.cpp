#include "latent_block.h"

#include "vectors.h"

namespace shoal {

namespace {

// Stores the values that belong to a panel: the last one may have less than 16.
SHOAL_INLINE void store_panel(float* to, int panel, int width, const Vec& values) {
    const int count = width - panel * kLanes;
    if (count >= kLanes) {
        store(to + panel * kLanes, values);
    } else {
        store_first(to + panel * kLanes, values, count);
    }
}

}  // namespace

LatentBlock::LatentBlock(const ShoalShape& shape, const ShoalOptions& options, Pool& pool, Arena& arena)
    : shape_(shape.latent),
      hidden_size_(shape.hidden_size),
      num_heads_(shape.num_heads),
      scale_(shape.attention_scale),
      arithmetic_(options.arithmetic),
      pool_(pool),
      arena_(arena),
      cache_(shape.num_places, shape_.rank + shape_.rope_dim, options.num_blocks * options.block_size,
             options.kv_cache == kCacheInFloat16),
      attention_(num_heads_, shape_.rank, options.block_size, pool.num_threads()),
      down_stride_(Rows::stride_for(first_width() + shape_.rank + shape_.rope_dim)),
      query_latents_(std::max(1, shape_.query_rank), arithmetic_),
      query_stride_(Rows::stride_for(query_width())) {}

LatentLayer LatentBlock::make_layer(int place, const RotaryTables* rotary, const float* temperatures) const {
    LatentLayer layer{place,
                      rotary,
                      temperatures,
                      Matrix(first_width() + shape_.rank + shape_.rope_dim, hidden_size_, arithmetic_, arena_),
                      {kRmsNorm, shape_.norm_eps},
                      {},
                      {kRmsNorm, shape_.norm_eps},
                      {},
                      {}};
    if (shape_.query_rank > 0) layer.query.emplace(query_width(), shape_.query_rank, arithmetic_, arena_);
    for (int head = 0; head < num_heads_; ++head) {
        layer.key_up.emplace_back(shape_.rank, shape_.nope_dim, kInFloat32, arena_);
        layer.value_up.emplace_back(shape_.value_dim, shape_.rank, kInFloat32, arena_);
    }
    return layer;
}

void LatentBlock::load_tensor(LatentLayer& layer, ShoalTensor tensor, bool is_bias, Source source) const {
    const int rank = shape_.rank, value_dim = shape_.value_dim;
    const auto load_rows = [&](Matrix& matrix, int num_rows, int first_column) {
        if (is_bias) {
            matrix.add_bias(source, num_rows, first_column);
        } else {
            matrix.pack(pool_, source, num_rows, first_column);
        }
    };
    const auto load_gain = [&](Norm& norm, int width) {
        norm.gain = Array<float>(width);
        source.read(width, norm.gain.data());
    };
    switch (tensor) {
        case kQueryDown: load_rows(layer.down, shape_.query_rank, 0); break;
        case kQueryDownNorm: load_gain(layer.query_norm, shape_.query_rank); break;
        case kQueryProj: load_rows(layer.query ? *layer.query : layer.down, query_width(), 0); break;
        case kKeyValueDown: load_rows(layer.down, rank + shape_.rope_dim, first_width()); break;
        case kKeyValueNorm: load_gain(layer.latent_norm, rank); break;
        case kKeyUp:  // queries are multiplied with it from the other side
            if (source.type == Source::kFloat32) {
                pack_turned<float>(layer.key_up, source);
            } else {
                pack_turned<uint16_t>(layer.key_up, source);
            }
            break;
        case kValueUp:
            for (int head = 0; head < num_heads_; ++head) {
                const size_t first = size_t{1} * head * value_dim * rank;
                layer.value_up[head].pack(pool_, source.from(first), value_dim, 0);
            }
            break;
        default: break;
    }
}

// Packs a matrix for each head, of which the source has the columns as rows.
template <class Number>
void LatentBlock::pack_turned(std::vector<Matrix>& matrices, Source source) const {
    const int rank = shape_.rank, nope_dim = shape_.nope_dim;
    const Number* from = static_cast<const Number*>(source.data);
    for (Matrix& matrix : matrices) {
        Array<Number> turned(static_cast<size_t>(rank) * nope_dim);
        for (int k = 0; k < nope_dim; ++k) {
            for (int r = 0; r < rank; ++r) turned[static_cast<size_t>(r) * nope_dim + k] = *from++;
        }
        matrix.pack(pool_, {turned.data(), source.type}, rank, 0);
    }
}

void LatentBlock::plan(const ShoalBatch& batch) {
    const int num_tokens = static_cast<int>(batch.num_tokens);
    down_.reserve(num_tokens * down_stride_);
    rows_.reserve(size_t{1} * num_tokens * num_heads_ * cache_.stride());
    if (shape_.query_rank > 0) {
        query_latents_.reserve(num_tokens);
        queries_.reserve(num_tokens * query_stride_);
    }
    attention_.plan(batch, pool_.num_threads());
}

void LatentBlock::attend(const LatentLayer& layer, const ShoalBatch& batch, const Rows& normalized, Rows& attended) {
    const int num_tokens = static_cast<int>(batch.num_tokens);
    multiply_all(pool_, layer.down, normalized, 0, num_tokens, [&](int token, int panel, const Vec& values) {
        store(down_.data() + token * down_stride_ + panel * kLanes, values);
    });
    pool_.for_rows(num_tokens, [&](int token) {
        float* down = down_.data() + token * down_stride_;
        write_latent(layer, batch.positions[token], batch.slot_mapping[token], down + first_width());
        if (!layer.query) return;
        layer.query_norm.apply(down, shape_.query_rank, query_latents_[token]);
        query_latents_.finish(token);
    });
    if (layer.query) {
        multiply_all(pool_, *layer.query, query_latents_, 0, num_tokens, [&](int token, int panel, const Vec& values) {
            store(queries_.data() + token * query_stride_ + panel * kLanes, values);
        });
    }
    const float* queries = layer.query ? queries_.data() : down_.data();
    const ptrdiff_t stride = layer.query ? query_stride_ : down_stride_;
    const auto scale = [&](int token) {
        return layer.temperatures ? scale_ * layer.temperatures[batch.positions[token]] : scale_;
    };
    multiply_heads(layer.key_up, queries, head_dim(), stride, num_tokens,
                   [&](int token, int head, int panel, const Vec& values) {
                       store_panel(row(token, head), panel, shape_.rank, values * broadcast(scale(token)));
                   });
    pool_.for_rows(num_tokens, [&](int token) {
        for (int head = 0; head < num_heads_; ++head) {
            const float* turning = queries + token * stride + head * head_dim() + shape_.nope_dim;
            place_head(layer.rotary, turning, shape_.rope_dim, batch.positions[token], scale(token),
                       row(token, head) + shape_.rank);
        }
    });
    attention_.run(pool_, cache_, layer.place, rows_.data());
    multiply_heads(layer.value_up, rows_.data(), cache_.stride(), num_heads_ * ptrdiff_t{1} * cache_.stride(),
                   num_tokens, [&](int token, int head, int panel, const Vec& values) {
                       store_panel(attended[token] + head * shape_.value_dim, panel, shape_.value_dim, values);
                   });
}

// Writes a token's normed latent and its turned part to the cache.
void LatentBlock::write_latent(const LatentLayer& layer, int position, int64_t slot, const float* from) {
    float row[kMaxLatent];
    layer.latent_norm.apply(from, shape_.rank, row);
    place_head(layer.rotary, from + shape_.rank, shape_.rope_dim, position, 1.0F, row + shape_.rank);
    cache_.write(layer.place, slot, row);
}

// Multiplies, for each head, the rows of x that begin at head * head_stride with its own matrix.  Calls take(token, head,
// panel, values of 16 outputs).
template <class Take>
void LatentBlock::multiply_heads(const std::vector<Matrix>& matrices, const float* x, ptrdiff_t head_stride,
                                 ptrdiff_t token_stride, int num_tokens, const Take& take) {
    for_panels(pool_, num_heads_, matrices[0].num_panels(), [&](int head, const PanelRange& range) {
        matrices[head].multiply_floats(
            x + head * head_stride, token_stride, num_tokens, range,
            [&](int token, int panel, const Vec& values) { take(token, head, panel, values); });
    });
}

}  // namespace shoal
