#include "model.h"

#include <chrono>

#include "activations.h"
#include "sampler.h"

namespace shoal {

void Model::step(const ShoalBatch& batch, int num_layers, const ShoalSampling* sampling, const ShoalChosen* chosen,
                 float* logits) {
    reserve(static_cast<int>(batch.num_tokens));
    if (latent_) {
        latent_->plan(batch);
    } else {
        attention_.plan(batch, pool_.num_threads());
    }
    embed(batch);
    for (int i = 0; i < num_layers; ++i) {
        attend(i, batch);
        const bool is_last = i == num_layers - 1;
        const bool is_cut = is_last && !batch.hidden;
        if (is_cut) keep_rows_of_logits(batch);
        add_blocks(layers_[i], static_cast<int>(is_cut ? batch.num_logits : batch.num_tokens));
    }
    if (batch.hidden) {
        const int width = shape_.hidden_size;
        for_rows(static_cast<int>(batch.num_tokens), [&](int row) {
            normalize(row, norm_);
            std::memcpy(batch.hidden + static_cast<size_t>(row) * width, normalized_[row], width * sizeof(float));
        });
        keep_rows_of_logits(batch);
    }
    const int num_rows = static_cast<int>(batch.num_logits);
    for_rows(num_rows, [&](int row) { normalize(row, norm_); });
    if (sampling || logits) choose(num_rows, sampling, chosen, logits);
}

void Model::reserve(int num_tokens) {
    hidden_.reserve(num_tokens * hidden_stride_);
    normalized_.reserve(num_tokens);
    heads_.reserve(num_tokens * heads_stride_);
    attended_.reserve(num_tokens);
}

void Model::embed(const ShoalBatch& batch) {
    const int width = shape_.hidden_size;
    for_rows(static_cast<int>(batch.num_tokens), [&](int row) {
        float* to = hidden(row);
        if (batch.inputs) {
            std::memcpy(to, batch.inputs + static_cast<size_t>(row) * width, width * sizeof(float));
            return;
        }
        read_embedding(batch.token_ids[row], to);
        if (shape_.embedding_multiplier != 1) {
            for (int i = 0; i < width; ++i) to[i] *= shape_.embedding_multiplier;
        }
        if (positions_.size() > 0) {
            const float* position = positions_.data() + static_cast<size_t>(batch.positions[row]) * width;
            for (int i = 0; i < width; ++i) to[i] += position[i];
        }
        if (embedding_norm_.exists()) embedding_norm_.apply(to, width, to);
    });
}

void Model::read_embedding(int token_id, float* to) const {
    if (shape_.tie_word_embeddings) {
        head_.read_column(token_id, to);
    } else {
        const size_t width = shape_.hidden_size;
        Source{embedding_.data(), embedding_type_}.from(token_id * width).read(width, to);
    }
}

// Copies a row of the hidden states to normalized_, through a norm if there is one.
void Model::normalize(int row, const Norm& norm) {
    if (norm.exists()) {
        norm.apply(hidden(row), shape_.hidden_size, normalized_[row]);
    } else {
        std::memcpy(normalized_[row], hidden(row), shape_.hidden_size * sizeof(float));
    }
    normalized_.finish(row);
}

// Writes a layer's keys and values to the cache, and the result of attention to attended_.
void Model::attend(int index, const ShoalBatch& batch) {
    const int num_tokens = static_cast<int>(batch.num_tokens), head_dim = shape_.head_dim;
    const int query = shape_.num_heads * head_dim, key = shape_.num_kv_heads * head_dim;
    const Layer& layer = layers_[index];
    for_rows(num_tokens, [&](int row) { normalize(row, layer.input_norm); });
    if (layer.latent) return latent_->attend(*layer.latent, batch, normalized_, attended_);
    multiply_all(pool_, layer.query_key_value, normalized_, 0, num_tokens, [&](int row, int panel, const Vec& values) {
        store(heads_.data() + row * heads_stride_ + panel * kLanes, values);
    });
    const int32_t* slots = batch.slot_mapping + layer.shape.cache_group * batch.num_tokens;
    for_rows(num_tokens, [&](int row) {
        float* heads = heads_.data() + row * heads_stride_;
        if (layer.query_norm.exists()) normalize_heads(layer, batch.positions[row], heads);
        float* keys = heads + query;
        for (int head = 0; head < shape_.num_kv_heads; ++head, keys += head_dim) {
            float placed[kMaxHeadDim];
            place_head(layer.attention.rotary, keys, head_dim, batch.positions[row], 1.0F, placed);
            cache_.write(layer.shape.cache_place, slots[row], head, placed, keys + key);
        }
    });
    attention_.run(pool_, cache_, layer.attention, heads_.data(), heads_stride_, attended_);
}

// The norms of queries and keys, and the rotation if it comes before them.
void Model::normalize_heads(const Layer& layer, int position, float* heads) const {
    const int head_dim = shape_.head_dim;
    const auto normalize = [&](const Norm& norm, int num_heads, float* at) {
        if (shape_.qk_norm_after_rope) {
            for (int i = 0; i < num_heads; ++i) {
                float* head = at + i * head_dim;
                place_head(layer.rotary, head, head_dim, position, 1.0F, head);
            }
        }
        const int width = shape_.qk_norm == kNormOfAllHeads ? num_heads * head_dim : head_dim;
        for (int i = 0; i < num_heads * head_dim; i += width) norm.apply(at + i, width, at + i, i);
    };
    normalize(layer.query_norm, shape_.num_heads, heads);
    normalize(layer.key_norm, shape_.num_kv_heads, heads + shape_.num_heads * head_dim);
}

// In the last layer, only tokens whose logits are wanted are computed further, unless all states are: they become the
// first rows.
void Model::keep_rows_of_logits(const ShoalBatch& batch) {
    for (int row = 0; row < batch.num_logits; ++row) {
        const int token = batch.logits_indices[row];
        if (token == row) continue;
        std::memcpy(hidden(row), hidden(token), shape_.hidden_size * sizeof(float));
        std::memcpy(attended_[row], attended_[token], attended_.width() * sizeof(float));
    }
}

// The rest of a layer: the output projection of attention, and the feed-forward block.
void Model::add_blocks(const Layer& layer, int num_rows) {
    if (shape_.parallel) {  // the feed-forward block reads what attention has read
        const Norm& norm = layer.feed_forward_norm.exists() ? layer.feed_forward_norm : layer.input_norm;
        for_rows(num_rows, [&](int row) { normalize(row, norm); });
    }
    finish(attended_, num_rows);
    const Sum attention_sum = begin_sum(layer.attention_output_norm, num_rows);
    multiply_all(pool_, layer.output, attended_, 0, num_rows, adds_to(attention_sum));
    end_sum(layer.attention_output_norm, num_rows);

    const Sum sum = begin_sum(layer.feed_forward_output_norm, num_rows);
    if (layer.is_mixture()) {
        mix_experts(layer, num_rows, sum);
    } else {
        if (!shape_.parallel) for_rows(num_rows, [&](int row) { normalize(row, layer.feed_forward_norm); });
        feed_forward(layer.experts[0], num_rows, sum);
    }
    end_sum(layer.feed_forward_output_norm, num_rows);
}

// Blocks add to the hidden states, or to an array of their own where a norm comes before the sum.
Model::Sum Model::begin_sum(const Norm& output_norm, int num_rows) {
    if (!output_norm.exists() || shape_.norm_after_sum) {
        return {hidden_.data(), hidden_stride_, shape_.residual_multiplier};
    }
    outputs_.reserve(num_rows * hidden_stride_);
    const Sum sum{outputs_.data(), hidden_stride_, 1.0F};
    for_rows(num_rows, [&](int row) { std::fill_n(sum[row], hidden_stride_, 0.0F); });
    return sum;
}

void Model::end_sum(const Norm& output_norm, int num_rows) {
    if (!output_norm.exists()) return;
    const int width = shape_.hidden_size;
    for_rows(num_rows, [&](int row) {
        float* to = hidden(row);
        if (shape_.norm_after_sum) return output_norm.apply(to, width, to);
        float* output = outputs_.data() + row * hidden_stride_;
        output_norm.apply(output, width, output);
        for (int i = 0; i < width; ++i) to[i] += output[i] * shape_.residual_multiplier;
    });
}

void Model::choose(int num_rows, const ShoalSampling* sampling, const ShoalChosen* chosen, float* logits) {
    logits_.reserve(std::min(num_rows, kLogitsRows) * logits_stride_);
    const bool changes = shape_.logits_multiplier != 1 || shape_.logit_softcap > 0;
    for (int first = 0; first < num_rows; first += kLogitsRows) {
        const int count = std::min(kLogitsRows, num_rows - first);
        multiply_all(pool_, head_, normalized_, first, count, [&](int row, int panel, const Vec& values) {
            store(logits_.data() + row * logits_stride_ + panel * kLanes, values);
        });
        if (changes) for_rows(count, [&](int row) { change_logits(logits_.data() + row * logits_stride_); });
        for (int row = 0; logits && row < count; ++row) {
            std::memcpy(logits + static_cast<size_t>(first + row) * shape_.vocab_size,
                        logits_.data() + row * logits_stride_, shape_.vocab_size * sizeof(float));
        }
        if (!sampling) continue;
        using Clock = std::chrono::steady_clock;
        const Clock::time_point began = sample_seconds_ ? Clock::now() : Clock::time_point();
        sample(pool_, logits_.data(), logits_stride_, shape_.vocab_size, *sampling, first, count, *chosen);
        if (sample_seconds_) *sample_seconds_ += std::chrono::duration<double>(Clock::now() - began).count();
    }
}

// The multiplier and the soft cap of logits.
void Model::change_logits(float* logits) const {
    for (int i = 0; i < shape_.vocab_size; i += kLanes) {
        Vec changed = load(logits + i) * broadcast(shape_.logits_multiplier);
        if (shape_.logit_softcap > 0) changed = soft_cap(changed, shape_.logit_softcap);
        store(logits + i, changed);
    }
}

}  // namespace shoal
