// The interface of the native backend: plain C, called through ctypes by model/backends/native_backend.py.
//
// Pointers are valid during the call only, and arrays are dense.
#pragma once

#include <stdint.h>

#define SHOAL_API extern "C" __attribute__((visibility("default")))

// Limits of a model's shape.
enum { kMaxHeadDim = 512, kMaxExperts = 512, kMaxLatent = 4096 };

// The fields of an architecture that are one of several names: see ModelConfig and MixtureConfig in
// model/architecture.py.
enum ShoalNorm : int32_t { kRmsNorm, kLayerNorm };
enum ShoalActivation : int32_t { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kClampedSilu };
enum ShoalHeadNorm : int32_t { kNoHeadNorm, kNormOfEachHead, kNormOfAllHeads };
enum ShoalScore : int32_t { kSoftmax, kSigmoid };

// The numbers that linear layers multiply.
enum ShoalArithmetic : int32_t { kInFloat32, kInBFloat16, kInInt8, kInInt4 };

// The angles of positions, for the first `dim` elements of a head.
struct ShoalRope {
    int32_t dim;
    const float* cos;  // [num_positions, dim / 2]
    const float* sin;
};

// See MixtureConfig.
struct ShoalMixture {
    int32_t num_experts;  // 0 for a dense layer
    int32_t num_experts_per_tok;
    int32_t intermediate_size;
    int32_t shared_size;  // 0 where there is no shared expert
    ShoalScore score;
    int32_t renormalise;
    float scale;
    int32_t num_groups;
    int32_t num_chosen_groups;
    int32_t sums_top2;  // whether a group's score is the sum of its two best, and not its best
    int32_t share_on_input;
};

// See LayerConfig, and cache_places of ModelConfig.
struct ShoalLayer {
    int32_t rope;          // among the shape's; -1 for none
    int32_t temperatures;  // likewise
    int32_t window;        // 0 for all positions
    int32_t chunk;         // likewise
    int32_t cache_group;
    int32_t cache_place;
    int32_t intermediate_size;  // of a dense layer
    ShoalMixture mixture;
};

// See LatentConfig.
struct ShoalLatent {
    int32_t rank;  // 0 where there is no latent attention
    int32_t rope_dim;
    int32_t nope_dim;
    int32_t value_dim;
    int32_t query_rank;  // 0 for none
    float norm_eps;
};

// The shape of a model; see ModelConfig.
struct ShoalShape {
    int32_t vocab_size;
    int32_t hidden_size;
    int32_t num_layers;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t num_groups;  // of layers, each with block tables of its own
    int32_t num_places;  // layers of the KV cache
    int32_t tie_word_embeddings;
    ShoalNorm norm;
    float norm_eps;
    int32_t parallel;
    int32_t norm_after_sum;
    ShoalActivation activation;
    int32_t gated;
    ShoalHeadNorm qk_norm;
    ShoalNorm qk_norm_kind;
    float qk_norm_eps;
    int32_t qk_norm_after_rope;
    ShoalLatent latent;
    float attention_scale;
    float attention_softcap;  // 0 for none
    float logit_softcap;      // likewise
    float embedding_multiplier;
    float residual_multiplier;
    float logits_multiplier;
    int32_t num_positions;  // of the tables
    int32_t num_ropes;
    int32_t num_temperatures;
    const ShoalLayer* layers;   // [num_layers]
    const ShoalRope* ropes;     // [num_ropes]
    const float* temperatures;  // [num_temperatures, num_positions], factors of the queries
    const float* alibi_slopes;  // [num_heads]; may be null
};

// The elements of the KV cache; latent attention has no bytes.
enum ShoalKVCache : int32_t { kCacheInFloat32, kCacheInFloat16, kCacheInInt8 };

struct ShoalOptions {
    int64_t num_blocks;
    int32_t block_size;  // a multiple of 16
    int32_t num_threads;
    int32_t pin_threads;
    ShoalArithmetic arithmetic;
    ShoalKVCache kv_cache;
};

// The parts of a model that have weights, each also with a bias; see model/record.py.
enum ShoalTensor : int32_t {
    kEmbedding,
    kHead,
    kPositions,
    kEmbeddingNorm,
    kNorm,
    kInputNorm,
    kQueryProj,
    kKeyProj,
    kValueProj,
    kOutputProj,
    kQueryNorm,
    kKeyNorm,
    kSinks,
    kQueryDown,
    kQueryDownNorm,
    kKeyValueDown,
    kKeyValueNorm,
    kKeyUp,
    kValueUp,
    kAttentionOutputNorm,
    kFeedForwardNorm,
    kFeedForwardOutputNorm,
    kRouter,
    kCorrection,
    kSharedGate,
    kGateProj,
    kUpProj,
    kDownProj,
};

// One step of tokens; see ForwardBatch in model/step/batch.py.
struct ShoalBatch {
    int64_t num_tokens;
    int64_t num_seqs;
    int64_t num_logits;
    int64_t max_blocks;  // of one group
    const int32_t* token_ids;        // [num_tokens]
    const int32_t* positions;        // [num_tokens], consecutive within a sequence
    const int32_t* slot_mapping;     // [num_groups, num_tokens]
    const int32_t* query_start_loc;  // [num_seqs + 1]
    const int32_t* context_lens;     // [num_seqs], only to check that positions end there
    const int32_t* block_tables;     // [num_seqs, max_blocks, num_groups]; -1 where no query sees a block
    const int32_t* logits_indices;   // [num_logits]
    float* hidden;                   // [num_tokens, hidden_size], after the last norm; may be null
    const float* inputs;             // [num_tokens, hidden_size], in place of embeddings; may be null
};

// A token with a penalty, and an addend to a token's logit; see PENALTY and BIAS in model/step/batch.py.
struct ShoalPenalty {
    int32_t row;
    int32_t token_id;
    int32_t count;
};
struct ShoalBias {
    int32_t row;
    int32_t token_id;
    float addend;
};

// How to choose a token at each of num_rows rows; see SamplingBatch in model/step/batch.py.
struct ShoalSampling {
    int64_t num_rows;
    const struct ShoalSamplingRow* rows;  // defined in sampler.cpp, the only file that reads it
    int64_t num_later;                    // is added to the position of each row
    int64_t num_penalties;
    const ShoalPenalty* penalties;  // rows ascending
    int64_t num_biases;
    const ShoalBias* biases;  // rows ascending
    int64_t num_masks;
    const uint32_t* masks;  // [num_masks, ceil(vocab_size / 32)], of tokens that may be chosen, the lowest bit first
};

// The chosen tokens; see SamplerOutput in model/step/batch.py.
struct ShoalChosen {
    int32_t* token_ids;   // [num_rows]
    int64_t num_top;      // columns of the last two; -1 if no row asks for log-probabilities, and then all are null
    float* logprobs;      // [num_rows]
    int32_t* ranks;       // [num_rows]
    int32_t* top_token_ids;  // [num_rows, num_top]
    float* top_logprobs;     // [num_rows, num_top]
};

// Requests whose next tokens are to be proposed; see DraftBatch in model/step/batch.py.
struct ShoalDraft {
    int32_t num_layers;  // how many of the model's layers to run before its norm and head
    int64_t num_seqs;
    const int32_t* rows;        // [num_seqs], of the tables
    const int32_t* starts;      // [num_seqs], tokens [start, end) are computed first
    const int32_t* ends;        // [num_seqs]
    const int32_t* num_wanted;  // [num_seqs], at least 1 each, not ascending: tokens to propose
    int64_t num_rows;           // of both tables
    int64_t tokens_stride;
    const int32_t* tokens;  // known tokens, a row for each request
    int64_t blocks_stride;
    const int32_t* block_tables;  // of all groups, with blocks for all tokens of a proposal but the last
    int32_t* token_ids;           // [num_seqs, num_wanted[0]]; -1 once the logits are not finite
};

struct ShoalModel;

// What is wrong where there is not enough memory: nothing with the arrays, and less of a step may fit.
static const char kNoMemory[] = "there is not enough memory";

// Null if there is not enough memory.  Where `sibling` is given, both models compute with its threads, but not at the
// same time; the threads end when both are destroyed.
SHOAL_API ShoalModel* shoal_create(const ShoalShape* shape, const ShoalOptions* options, const ShoalModel* sibling);
SHOAL_API void shoal_destroy(ShoalModel* model);

// Packs one tensor's weights, or its bias; type as Source::Type: 0 float32, 1 float16, 2 the bits of bfloat16.  Layer
// and expert are 0 where there is none; the shared expert comes after the others.  A norm is computed where it has
// weights.  Returns kNoMemory, or null.
SHOAL_API const char* shoal_load(ShoalModel* model, int32_t tensor, int32_t is_bias, int32_t layer, int32_t expert,
                                 const void* data, int32_t type);

// Computes a step with the first num_layers layers, then the norm and the head.  Where `sampling` is given, chooses a
// token at each row of logits_indices; where `logits` is, writes them there, [num_logits, vocab_size]; where the batch
// has `hidden`, writes hidden states there.  Where neither `sampling` nor `logits` is given, shoal_choose is to follow,
// with masks that may still be computed during the step.
// Returns what is wrong with the arrays, and then has computed nothing; null if nothing is wrong.  After kNoMemory the
// same tokens may be computed again.
SHOAL_API const char* shoal_step(ShoalModel* model, const ShoalBatch* batch, int32_t num_layers,
                                 const ShoalSampling* sampling, const ShoalChosen* chosen, float* logits);

// Computes the head of the step before, and chooses a token at each of its rows of logits.  Returns as shoal_step.
SHOAL_API const char* shoal_choose(ShoalModel* model, int64_t num_logits, const ShoalSampling* sampling,
                                   const ShoalChosen* chosen);

// Proposes tokens: computes the given tokens, chooses the next token of each sequence by its row of `sampling`, and
// continues with steps of one token for each sequence that wants more.  Penalties stay those of the first proposal.
// Returns what is wrong, as shoal_step.
SHOAL_API const char* shoal_draft(ShoalModel* model, const ShoalSampling* sampling, const ShoalDraft* draft);

// From now on, adds the rows that each expert computes in each layer to expert_rows [num_layers, stride], which has room
// for all experts of a layer, and to *sample_seconds the time in which tokens are chosen.  Both stay valid until others
// take their place, and either may be null, which ends that.  A step that is observed costs a few additions more.
SHOAL_API void shoal_observe(ShoalModel* model, int64_t* expert_rows, int32_t stride, double* sample_seconds);

// The fields of ShoalSamplingRow in their order, "type name;" each, with numpy's names of types.
SHOAL_API const char* shoal_sampling_row(void);

// The best instruction set that this machine runs: 0 generic, 1 avx2, 2 avx512.
SHOAL_API int32_t shoal_best_isa(void);

// Whether this machine multiplies bfloat16 in hardware.  The library for avx512 needs that for kInBFloat16.
SHOAL_API int32_t shoal_has_bfloat16(void);
