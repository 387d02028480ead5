// Bfloat16 kernels for CPUs with AVX512-BF16: packed matrices, mixture of experts, attention over the paged cache.
// Products are summed in float32 and rounded once, in an order that depends on nothing but the row: neither on the rows beside it
// nor on the number of threads. Plain C behind ctypes; `native.py` compiles and calls it.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

enum {
    WIDTH = 32,  // columns of a packed panel: two vectors of float32
    ROWS = 12,   // of a tile: 24 vectors of sums leave registers for two of weights
    HEADS = 8,   // attended together: one half vector of float32
    KEYS = 16,   // scored together
    ROWS_IN_TURN = 16,  // that a thread attends for, one after the other
    ROWS_AT_ONCE = 16,  // copied or normalised by a thread that has come; one that comes late holds up nobody
    AHEAD = 1024,       // bytes of a panel fetched before they are needed
};

static float widen(bf16 value)
{
    union { uint32_t bits; float value; } wide = {(uint32_t)value << 16};
    return wide.value;
}

static bf16 narrow(float value)
{
    return _mm256_extract_epi16((__m256i)_mm512_cvtneps_pbh(_mm512_set1_ps(value)), 0);
}

static __m512 widen16(const bf16 *from)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

static void narrow16(bf16 *to, __m512 values)
{
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(values));
}

// e^x to about 1e-7, 0 where that underflows.
static __m512 exp16(__m512 x)
{
    const __m512 halves = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 f = _mm512_fnmadd_ps(halves, _mm512_set1_ps(0.693145752f), x);
    f = _mm512_fnmadd_ps(halves, _mm512_set1_ps(1.42860677e-6f), f);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, halves);
}

static __m512 silu16(__m512 x)
{
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// Memory for one call, kept by its thread for the next: fresh pages at every call would cost more than the arithmetic.
typedef struct {
    char *memory;
    size_t size, used;
} Workspace;

static _Thread_local Workspace own;

static size_t padded(size_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

// This thread's workspace, empty, with room for `bytes`.
static Workspace *reserve(size_t bytes)
{
    if (own.size < bytes) {
        free(own.memory);
        own.memory = aligned_alloc(64, own.size = padded(bytes + bytes / 4));
        if (!own.memory)
            abort();
    }
    own.used = 0;
    return &own;
}

static void *take(Workspace *workspace, size_t bytes)
{
    void *memory = workspace->memory + workspace->used;
    workspace->used += padded(bytes);
    return memory;
}

// --- packed matrices ----------------------------------------------------------------------------------------------------------
// A panel holds WIDTH columns: [depth / 2][WIDTH][2], so that one load has a pair of depths for each of 16 columns.

static inline __attribute__((always_inline)) void
multiply(const int rows, const bf16 *x, long depth, const bf16 *panel, __m512 sums[ROWS][2])
{
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
        sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (long k = 0; k < depth; k += 2) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(panel + k * WIDTH);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(panel + k * WIDTH + WIDTH);
        _mm_prefetch((const char *)(panel + k * WIDTH) + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)(panel + k * WIDTH) + AHEAD + 64, _MM_HINT_T0);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(*(const int *)(x + r * depth + k));
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], pair, left);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], pair, right);
        }
    }
}

// What becomes of a tile's sums: `first` is its first row, `column` its panel's first column.
typedef struct {
    bf16 *out;
    float *total;          // instead of `out`, where the sums are not rounded yet
    long width;            // of a row of either
    const bf16 *base;      // [rows, width] to add
    const int32_t *rows;   // of `total`, by sorted row
    const float *weights;  // by sorted row
} Target;

static inline __attribute__((always_inline)) void
store_rows(const int rows, __m512 sums[ROWS][2], long first, long column, const Target *t)
{
    for (int r = 0; r < rows; r++) {
        narrow16(t->out + (first + r) * t->width + column, sums[r][0]);
        narrow16(t->out + (first + r) * t->width + column + 16, sums[r][1]);
    }
}

static inline __attribute__((always_inline)) void
store_added(const int rows, __m512 sums[ROWS][2], long first, long column, const Target *t)
{
    for (int r = 0; r < rows; r++) {
        const long at = (first + r) * t->width + column;
        narrow16(t->out + at, _mm512_add_ps(widen16(t->base + at), sums[r][0]));
        narrow16(t->out + at + 16, _mm512_add_ps(widen16(t->base + at + 16), sums[r][1]));
    }
}

static inline __attribute__((always_inline)) void
store_floats(const int rows, __m512 sums[ROWS][2], long first, long column, const Target *t)
{
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(t->total + (first + r) * t->width + column, sums[r][0]);
        _mm512_storeu_ps(t->total + (first + r) * t->width + column + 16, sums[r][1]);
    }
}

static inline __attribute__((always_inline)) void
store_gated(const int rows, __m512 sums[ROWS][2], long first, long column, const Target *t)
{
    for (int r = 0; r < rows; r++)
        narrow16(t->out + (first + r) * t->width + column / 2, _mm512_mul_ps(silu16(sums[r][0]), sums[r][1]));
}

static inline __attribute__((always_inline)) void
add_weighted(const int rows, __m512 sums[ROWS][2], long first, long column, const Target *t)
{
    for (int r = 0; r < rows; r++) {
        float *to = t->total + t->rows[first + r] * t->width + column;
        const __m512 weight = _mm512_set1_ps(t->weights[first + r]);
        _mm512_storeu_ps(to, _mm512_fmadd_ps(weight, sums[r][0], _mm512_loadu_ps(to)));
        _mm512_storeu_ps(to + 16, _mm512_fmadd_ps(weight, sums[r][1], _mm512_loadu_ps(to + 16)));
    }
}

// Rows first..last of x through one panel, in tiles of nearly equal height.
#define DEFINE_PANEL(NAME, FINISH)                                                                                             \
    static void NAME(const bf16 *x, long depth, const bf16 *panel, long first, long last, long column, const Target *target)   \
    {                                                                                                                          \
        __m512 sums[ROWS][2];                                                                                                  \
        for (long tiles = (last - first + ROWS - 1) / ROWS; tiles; tiles--) {                                                  \
            const long rows = (last - first + tiles - 1) / tiles;                                                              \
            switch (rows) {                                                                                                    \
                TILE(1, FINISH) TILE(2, FINISH) TILE(3, FINISH) TILE(4, FINISH) TILE(5, FINISH) TILE(6, FINISH)                \
                TILE(7, FINISH) TILE(8, FINISH) TILE(9, FINISH) TILE(10, FINISH) TILE(11, FINISH) TILE(12, FINISH)             \
            }                                                                                                                  \
            first += rows;                                                                                                     \
        }                                                                                                                      \
    }
#define TILE(N, FINISH)                                                                                                        \
    case N:                                                                                                                    \
        multiply(N, x + first * depth, depth, panel, sums);                                                                    \
        FINISH(N, sums, first, column, target);                                                                                \
        break;

DEFINE_PANEL(panel_rows, store_rows)
DEFINE_PANEL(panel_added, store_added)
DEFINE_PANEL(panel_floats, store_floats)
DEFINE_PANEL(panel_gated, store_gated)
DEFINE_PANEL(panel_weighted, add_weighted)

// out [rows, panels * WIDTH] = x [rows, depth] times the packed matrix.
void linear(const bf16 *x, const bf16 *packed, bf16 *out, long rows, long depth, long panels, int threads)
{
    const Target target = {.out = out, .width = panels * WIDTH};
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long p = 0; p < panels; p++)
        panel_rows(x, depth, packed + p * depth * WIDTH, 0, rows, p * WIDTH, &target);
}

// --- feed forward -------------------------------------------------------------------------------------------------------------

// One layer as one rank holds it. gate_up: [inner / 16] panels of 16 gate and 16 up columns; down: [hidden / WIDTH] panels.
typedef struct {
    const bf16 *shared_gate_up, *shared_down;  // the shared expert, or all of a dense layer
    const bf16 *gate_up, *down;                // [count] routed experts
    long hidden, shared_inner, inner, count, first_id;
    int at_home;  // the shared expert serves only rows whose first expert is held here
} FFNLayer;

// Which experts the rows chose: ids [rows, top_k] of 1, 2, 4 or 8 bytes, the first one held here being first_id.
typedef struct {
    const void *ids;
    const bf16 *weights;
    long rows, top_k;
    int id_bytes;
} Choice;

// One expert's part of a call: sorted rows first..first + rows - 1.
typedef struct {
    const bf16 *gate_up, *down;
    long inner, first, rows;
    bf16 *gated;  // [rows, inner]
} Expert;

// Expert 0 is the shared one, the routed ones follow.
typedef struct {
    int32_t *starts;  // [1 + count + 1], of each expert's sorted rows
    int32_t *row;
    float *weight;
    bf16 *gathered;  // [sorted rows, hidden]
    bf16 *gated;     // by expert
    float *total;    // [hidden / WIDTH][rows][WIDTH]
} Assignments;

// The expert's number among those held here, from 0; negative: held elsewhere.
static long local(const FFNLayer *layer, const Choice *choice, long i)
{
    long id;
    switch (choice->id_bytes) {
    case 1: id = ((const uint8_t *)choice->ids)[i]; break;
    case 2: id = ((const int16_t *)choice->ids)[i]; break;
    case 4: id = ((const int32_t *)choice->ids)[i]; break;
    default: id = ((const int64_t *)choice->ids)[i];
    }
    return id < layer->first_id + layer->count ? id - layer->first_id : -1;
}

// Whether the shared expert computed here serves this row.
static int shared_serves(const FFNLayer *layer, const Choice *choice, long row)
{
    return layer->shared_inner && (!layer->at_home || local(layer, choice, row * choice->top_k) >= 0);
}

static void assign(const Assignments *a, long expert, long row, float weight)
{
    const int32_t at = a->starts[expert]++;
    a->row[at] = row;
    a->weight[at] = weight;
}

static void sort(const FFNLayer *layer, const Choice *choice, const Assignments *a)
{
    const long rows = choice->rows, top_k = choice->top_k, count = 1 + layer->count;
    memset(a->starts, 0, (count + 1) * sizeof *a->starts);
    for (long row = 0; row < rows; row++)
        a->starts[1] += shared_serves(layer, choice, row);
    for (long i = 0; i < rows * top_k; i++)
        if (local(layer, choice, i) >= 0)
            a->starts[local(layer, choice, i) + 2]++;
    for (long e = 0; e < count; e++)
        a->starts[e + 1] += a->starts[e];
    for (long row = 0; row < rows; row++)
        if (shared_serves(layer, choice, row))
            assign(a, 0, row, 1.0f);
    for (long i = 0; i < rows * top_k; i++)
        if (local(layer, choice, i) >= 0)
            assign(a, local(layer, choice, i) + 1, i / top_k, widen(choice->weights[i]));
    memmove(a->starts + 1, a->starts, count * sizeof *a->starts);
    a->starts[0] = 0;
}

static Expert expert(const FFNLayer *layer, const Assignments *a, long e)
{
    const long first = a->starts[e], rows = a->starts[e + 1] - first, shared = a->starts[1];
    if (!e)
        return (Expert){layer->shared_gate_up, layer->shared_down, layer->shared_inner, first, rows, a->gated};
    const long routed = e - 1, size = layer->hidden * layer->inner;
    bf16 *gated = a->gated + shared * layer->shared_inner + (first - shared) * layer->inner;
    return (Expert){layer->gate_up + routed * 2 * size, layer->down + routed * size, layer->inner, first, rows, gated};
}

static void gate_panel(const FFNLayer *layer, const Assignments *a, long e, long panel)
{
    const Expert x = expert(layer, a, e);
    const Target target = {.out = x.gated, .width = x.inner};
    panel_gated(a->gathered + x.first * layer->hidden, layer->hidden, x.gate_up + panel * layer->hidden * WIDTH, 0, x.rows,
                panel * WIDTH, &target);
}

// WIDTH columns of the result: the sum of every expert's part, in the order of the experts.
static void down_panel(const FFNLayer *layer, const Assignments *a, long rows, long panel, bf16 *out)
{
    float *total = a->total + panel * rows * WIDTH;
    memset(total, 0, rows * WIDTH * sizeof *total);
    for (long e = 0; e <= layer->count; e++) {
        const Expert x = expert(layer, a, e);
        const Target target = {.total = total, .width = WIDTH, .rows = a->row + x.first, .weights = a->weight + x.first};
        panel_weighted(x.gated, x.inner, x.down + panel * x.inner * WIDTH, 0, x.rows, 0, &target);
    }
    for (long i = 0; i < rows; i++)
        for (long c = 0; c < WIDTH; c += 16)
            narrow16(out + i * layer->hidden + panel * WIDTH + c, _mm512_loadu_ps(total + i * WIDTH + c));
}

// out [rows, hidden]: the shared expert of x (where shared_inner is not 0), and the sum of the chosen experts held here by their weights.
void feed_forward(const FFNLayer *layer, const bf16 *x, const void *ids, int id_bytes, const bf16 *weights, bf16 *out,
                  long rows, long top_k, int threads)
{
    const Choice choice = {ids, weights, rows, top_k, id_bytes};
    const long hidden = layer->hidden, most = rows * (1 + top_k);
    const long shared_panels = layer->shared_inner / 16, panels = layer->inner / 16;
    const long gated = rows * (layer->shared_inner + top_k * layer->inner);
    Workspace *workspace = reserve(8 * 64 + (layer->count + 2 + 2 * most) * 4 + (most * hidden + gated) * 2 + rows * hidden * 4);
    const Assignments a = {
        .starts = take(workspace, (layer->count + 2) * sizeof *a.starts),
        .row = take(workspace, most * sizeof *a.row),
        .weight = take(workspace, most * sizeof *a.weight),
        .gathered = take(workspace, most * hidden * sizeof *a.gathered),
        .gated = take(workspace, gated * sizeof *a.gated),
        .total = take(workspace, rows * hidden * sizeof *a.total),
    };
    sort(layer, &choice, &a);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, ROWS_AT_ONCE)
        for (long i = 0; i < a.starts[layer->count + 1]; i++)
            memcpy(a.gathered + i * hidden, x + a.row[i] * hidden, hidden * sizeof *x);
        // The shared expert's panels first: they have the most rows, and small ones even out the end.
#pragma omp for schedule(dynamic, 4)
        for (long i = 0; i < shared_panels + layer->count * panels; i++) {
            if (i < shared_panels)
                gate_panel(layer, &a, 0, i);
            else
                gate_panel(layer, &a, 1 + (i - shared_panels) / panels, (i - shared_panels) % panels);
        }
#pragma omp for schedule(dynamic)
        for (long p = 0; p < hidden / WIDTH; p++)
            down_panel(layer, &a, rows, p, out);
    }
}

// --- attention over the paged cache -------------------------------------------------------------------------------------------
// A token of the cache is [2 * dim]: its key beside its value. HEADS query heads share it, a lane each, so that the softmax
// needs no sum across lanes.

typedef struct {
    const bf16 *blocks;
    const int32_t *table;
    long context, block_size, dim;
} Keys;

static const bf16 *block_of(const Keys *keys, long from)
{
    return keys->blocks + (long)keys->table[from / keys->block_size] * keys->block_size * 2 * keys->dim;
}

// q [heads, dim] to [dim / 2][HEADS][2], lanes beyond the last head 0.
static void interleave_heads(const bf16 *q, long heads, long dim, int32_t *out)
{
    for (long d = 0; d < dim / 2; d++)
        for (long h = 0; h < HEADS; h++)
            out[d * HEADS + h] = h < heads ? *(const int32_t *)(q + h * dim + 2 * d) : 0;
}

static inline __attribute__((always_inline)) void
score_keys(const int count, const bf16 *token, long dim, const int32_t *q, float *scores)
{
    __m256 sums[KEYS];
#pragma GCC unroll 16
    for (int i = 0; i < count; i++)
        sums[i] = _mm256_setzero_ps();
    for (long d = 0; d < dim / 2; d++) {
        const __m256bh pair = (__m256bh)_mm256_loadu_si256((const __m256i *)(q + d * HEADS));
#pragma GCC unroll 16
        for (int i = 0; i < count; i++)
            sums[i] = _mm256_dpbf16_ps(sums[i], pair, (__m256bh)_mm256_set1_epi32(*(const int32_t *)(token + i * 2 * dim + 2 * d)));
    }
#pragma GCC unroll 16
    for (int i = 0; i < count; i++)
        _mm256_storeu_ps(scores + i * HEADS, sums[i]);
}

// Scores of every slot of the context's blocks [.., HEADS]; those past the context mean nothing.
static inline __attribute__((always_inline)) void
score(const Keys *keys, const long dim, const int32_t *q, float *scores)
{
    for (long from = 0; from < keys->context; from += keys->block_size) {
        const bf16 *token = block_of(keys, from);
        long i = 0;
        for (; i + KEYS <= keys->block_size; i += KEYS)
            score_keys(KEYS, token + i * 2 * dim, dim, q, scores + (from + i) * HEADS);
        for (; i < keys->block_size; i++)
            score_keys(1, token + i * 2 * dim, dim, q, scores + (from + i) * HEADS);
    }
}

static __m256 largest(const float *scores, long context)
{
    __m256 most[4] = {_mm256_loadu_ps(scores), most[0], most[0], most[0]};
    long k = 0;
    for (; k + 4 <= context; k += 4)
        for (int i = 0; i < 4; i++)
            most[i] = _mm256_max_ps(most[i], _mm256_loadu_ps(scores + (k + i) * HEADS));
    for (; k < context; k++)
        most[0] = _mm256_max_ps(most[0], _mm256_loadu_ps(scores + k * HEADS));
    return _mm256_max_ps(_mm256_max_ps(most[0], most[1]), _mm256_max_ps(most[2], most[3]));
}

// Scores to softmax weights before normalisation, for pairs of tokens of a block: [pairs][HEADS][2]; gives their sum.
static __m256 weigh(const Keys *keys, const float *scores, float scale, bf16 *weights)
{
    const __m256 most = largest(scores, keys->context);
    const __m512 most2 = _mm512_insertf32x8(_mm512_castps256_ps512(most), most, 1);
    __m512 sum = _mm512_setzero_ps();
    for (long from = 0; from < keys->context; from += keys->block_size) {
        const long count = from + keys->block_size < keys->context ? keys->block_size : keys->context - from;
        for (long i = 0; i < count; i += 2, weights += 2 * HEADS) {
            const __mmask16 there = i + 1 < count ? 0xffff : 0x00ff;
            const __m512 score = _mm512_maskz_loadu_ps(there, scores + (from + i) * HEADS);
            const __m512 weight = _mm512_maskz_mov_ps(there, exp16(_mm512_mul_ps(_mm512_sub_ps(score, most2), _mm512_set1_ps(scale))));
            sum = _mm512_add_ps(sum, weight);
            const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(weight);
            const __m128i first = _mm256_castsi256_si128(narrow), second = _mm256_extracti128_si256(narrow, 1);
            _mm_storeu_si128((__m128i *)weights, _mm_unpacklo_epi16(first, second));
            _mm_storeu_si128((__m128i *)(weights + HEADS), _mm_unpackhi_epi16(first, second));
        }
    }
    return _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
}

// WIDTH columns of the values, weighted: sums [HEADS][2], their columns in the order of unpacklo and unpackhi.
// Memory is idle meanwhile, so it fetches `next`, a share for each column.
static void add_values(const Keys *keys, const Keys *next, const bf16 *weights, long column, __m512 sums[HEADS][2])
{
#pragma GCC unroll 8
    for (int h = 0; h < HEADS; h++)
        sums[h][0] = sums[h][1] = _mm512_setzero_ps();
    for (long from = 0; from < keys->context; from += keys->block_size) {
        const long count = from + keys->block_size < keys->context ? keys->block_size : keys->context - from;
        const bf16 *value = block_of(keys, from) + keys->dim + column;
        const char *coming = (const char *)(block_of(next, from < next->context ? from : 0) + 2 * column);
        for (long i = 0; i < count; i += 2, weights += 2 * HEADS) {
            const __m512i first = _mm512_loadu_si512(value + i * 2 * keys->dim);
            // A token without a partner has one of weight 0: itself, for what lies behind it may be anything.
            const __m512i second = _mm512_loadu_si512(value + (i + 1 < count ? i + 1 : i) * 2 * keys->dim);
            for (int token = 0; token < 2; token++, coming += 4 * keys->dim) {
                _mm_prefetch(coming, _MM_HINT_T1);
                _mm_prefetch(coming + 64, _MM_HINT_T1);
            }
            const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(first, second);
            const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(first, second);
#pragma GCC unroll 8
            for (int h = 0; h < HEADS; h++) {
                const __m512bh pair = (__m512bh)_mm512_set1_epi32(*(const int32_t *)(weights + 2 * h));
                sums[h][0] = _mm512_dpbf16_ps(sums[h][0], low, pair);
                sums[h][1] = _mm512_dpbf16_ps(sums[h][1], high, pair);
            }
        }
    }
}

typedef struct {
    int32_t *lanes;
    float *scores;
    bf16 *weights;
} Scratch;

static void attend_heads(const Keys *keys, const Keys *next, const bf16 *q, long heads, float scale, const Scratch *scratch, bf16 *out)
{
    const __m512i left = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i right = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    interleave_heads(q, heads, keys->dim, scratch->lanes);
    switch (keys->dim) {  // a constant stride leaves the sums in registers
    case 64: score(keys, 64, scratch->lanes, scratch->scores); break;
    case 128: score(keys, 128, scratch->lanes, scratch->scores); break;
    default: score(keys, keys->dim, scratch->lanes, scratch->scores);
    }
    float norm[HEADS];
    _mm256_storeu_ps(norm, _mm256_div_ps(_mm256_set1_ps(1.0f), weigh(keys, scratch->scores, scale, scratch->weights)));
    for (long column = 0; column < keys->dim; column += WIDTH) {
        __m512 sums[HEADS][2];
        add_values(keys, next, scratch->weights, column, sums);
        for (long h = 0; h < heads; h++) {
            bf16 *to = out + h * keys->dim + column;
            const __m512 by = _mm512_set1_ps(norm[h]);
            narrow16(to, _mm512_mul_ps(by, _mm512_permutex2var_ps(sums[h][0], left, sums[h][1])));
            narrow16(to + 16, _mm512_mul_ps(by, _mm512_permutex2var_ps(sums[h][0], right, sums[h][1])));
        }
    }
}

// out [rows, heads, dim]: attention of q [rows, heads, dim] over the first contexts[row] tokens of its blocks, which begin at
// tables[starts[row]]; blocks [.., block_size, 2 * dim]; `longest` is the largest context.
void attend(const bf16 *q, const bf16 *blocks, const int32_t *tables, const int32_t *starts, const int32_t *contexts, bf16 *out,
            long rows, long heads, long dim, long block_size, long longest, float scale, int threads)
{
    const long groups = (heads + HEADS - 1) / HEADS, tokens = longest + block_size;
#pragma omp parallel num_threads(threads)
    {
        Workspace *workspace = reserve(4 * 64 + dim * HEADS * 2 + tokens * HEADS * 8);
        const Scratch scratch = {
            .lanes = take(workspace, dim / 2 * HEADS * sizeof *scratch.lanes),
            .scores = take(workspace, tokens * HEADS * sizeof *scratch.scores),
            .weights = take(workspace, 2 * tokens * HEADS * sizeof *scratch.weights),
        };
#pragma omp for schedule(dynamic, ROWS_IN_TURN)
        for (long i = 0; i < rows * groups; i++) {
            const long row = i / groups, head = i % groups * HEADS, next = (i + 1) % (rows * groups) / groups;
            const Keys keys = {blocks, tables + starts[row], contexts[row], block_size, dim};
            const Keys then = {blocks, tables + starts[next], contexts[next], block_size, dim};
            const long at = (row * heads + head) * dim;
            attend_heads(&keys, &then, q + at, heads - head < HEADS ? heads - head : HEADS, scale, &scratch, out + at);
        }
    }
}

// Keys and values [rows, dim] of rows k_stride and v_stride apart into the slots [rows] of a layer's tokens [.., 2 * dim].
void store(const bf16 *k, long k_stride, const bf16 *v, long v_stride, const int64_t *slots, bf16 *tokens, long rows, long dim)
{
    for (long i = 0; i < rows; i++) {
        bf16 *token = tokens + slots[i] * 2 * dim;
        memcpy(token, k + i * k_stride, dim * sizeof *k);
        memcpy(token + dim, v + i * v_stride, dim * sizeof *v);
    }
}

// --- before and after attention -----------------------------------------------------------------------------------------------

static void normalise(const bf16 *from, const bf16 *weight, bf16 *to, long width, float eps)
{
    __m512 squares = _mm512_setzero_ps();
    for (long c = 0; c < width; c += 16)
        squares = _mm512_fmadd_ps(widen16(from + c), widen16(from + c), squares);
    const float mean = _mm512_reduce_add_ps(squares) / width;
    const __m512 scale = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_sqrt_ps(_mm512_set1_ps(mean + eps)));
    for (long c = 0; c < width; c += 16)
        narrow16(to + c, _mm512_mul_ps(_mm512_mul_ps(widen16(from + c), scale), widen16(weight + c)));
}

// out [rows, width] = x / rms(x) * weight.
void rms_norm(const bf16 *x, const bf16 *weight, bf16 *out, long rows, long width, float eps)
{
    for (long i = 0; i < rows; i++)
        normalise(x + i * width, weight, out + i * width, width, eps);
}

// x [dim] by cos and sin [dim / 2], half-split, in place.
static void rotate(bf16 *x, const float *cos, const float *sin, long dim)
{
    const long half = dim / 2;
    for (long c = 0; c < half; c += 16) {
        const __m512 first = widen16(x + c), second = widen16(x + half + c);
        const __m512 by_cos = _mm512_loadu_ps(cos + c), by_sin = _mm512_loadu_ps(sin + c);
        narrow16(x + c, _mm512_fmsub_ps(first, by_cos, _mm512_mul_ps(second, by_sin)));
        narrow16(x + half + c, _mm512_fmadd_ps(second, by_cos, _mm512_mul_ps(first, by_sin)));
    }
}

typedef struct {
    const bf16 *input_norm, *qkv, *latent_norm, *wq, *o_proj, *output_norm;
    const bf16 *gate;  // NULL in a dense layer
    long hidden, latent, heads, dim, experts, top_k;
    float eps;
    int normalise;  // the chosen experts' weights
} AttentionLayer;

// residual [rows, hidden] to rotated q [rows, heads, dim] and kv [rows, 2 * dim], the key rotated; cos and sin [rows, dim / 2].
void before(const AttentionLayer *layer, const bf16 *residual, const float *cos, const float *sin, bf16 *q, bf16 *kv,
            long rows, int threads)
{
    const long hidden = layer->hidden, latent = layer->latent, dim = layer->dim, half = dim / 2;
    Workspace *workspace = reserve(2 * 64 + rows * (hidden + latent) * sizeof *residual);
    bf16 *normed = take(workspace, rows * hidden * sizeof *normed);
    bf16 *query = take(workspace, rows * latent * sizeof *query);
    const Target into_query = {.out = query, .width = latent}, into_kv = {.out = kv, .width = 2 * dim};
    const Target into_q = {.out = q, .width = layer->heads * dim};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, ROWS_AT_ONCE)
        for (long i = 0; i < rows; i++)
            normalise(residual + i * hidden, layer->input_norm, normed + i * hidden, hidden, layer->eps);
#pragma omp for schedule(dynamic)
        for (long column = 0; column < latent + 2 * dim; column += WIDTH) {
            const bf16 *panel = layer->qkv + column * hidden;
            if (column < latent)
                panel_rows(normed, hidden, panel, 0, rows, column, &into_query);
            else
                panel_rows(normed, hidden, panel, 0, rows, column - latent, &into_kv);
        }
#pragma omp for schedule(dynamic, ROWS_AT_ONCE)
        for (long i = 0; i < rows; i++) {
            normalise(query + i * latent, layer->latent_norm, query + i * latent, latent, layer->eps);
            rotate(kv + i * 2 * dim, cos + i * half, sin + i * half, dim);
        }
#pragma omp for schedule(dynamic)
        for (long head = 0; head < layer->heads; head++) {
            for (long column = head * dim; column < (head + 1) * dim; column += WIDTH)
                panel_rows(query, latent, layer->wq + column * latent, 0, rows, column, &into_q);
            for (long i = 0; i < rows; i++)
                rotate(q + (i * layer->heads + head) * dim, cos + i * half, sin + i * half, dim);
        }
    }
}

// The top_k largest of the softmax over all experts, of equal ones the lowest; scores [width >= experts, whole vectors] are used up.
// Scores that are not numbers choose expert 0, with a weight that is no number.
static void choose(const AttentionLayer *layer, float *scores, long width, int64_t *ids, bf16 *weights)
{
    for (long e = layer->experts; e < width; e++)
        scores[e] = -INFINITY;
    __m512 most = _mm512_loadu_ps(scores), sum = _mm512_setzero_ps();
    for (long e = 16; e < width; e += 16)
        most = _mm512_max_ps(most, _mm512_loadu_ps(scores + e));
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (long e = 0; e < layer->experts; e += 16) {
        const __mmask16 there = layer->experts - e < 16 ? (1 << (layer->experts - e)) - 1 : 0xffff;
        const __m512 weight = exp16(_mm512_sub_ps(_mm512_maskz_loadu_ps(there, scores + e), most));
        sum = _mm512_add_ps(sum, _mm512_maskz_mov_ps(there, weight));
        _mm512_mask_storeu_ps(scores + e, there, weight);
    }
    float chosen[layer->top_k], total = 0;
    for (long k = 0; k < layer->top_k; k++) {
        long best = 0;
        for (long e = 1; e < layer->experts; e++)
            if (scores[e] > scores[best])
                best = e;
        ids[k] = best;
        total += chosen[k] = scores[best];
        scores[best] = -INFINITY;
    }
    if (!layer->normalise)
        total = _mm512_reduce_add_ps(sum);
    for (long k = 0; k < layer->top_k; k++)
        weights[k] = narrow(chosen[k] / total);
}

// context [rows, heads, dim] into the residual, and from there to what goes to the FFN: hidden [rows, hidden], and the experts'
// ids and weights [rows, top_k] where the layer has any.
void after(const AttentionLayer *layer, const bf16 *residual, const bf16 *context, bf16 *out, bf16 *hidden, int64_t *ids,
           bf16 *weights, long rows, int threads)
{
    const long width = layer->hidden, depth = layer->heads * layer->dim;
    const long columns = layer->gate ? (layer->experts + WIDTH - 1) / WIDTH * WIDTH : 0;
    float *scores = take(reserve(64 + rows * columns * sizeof *scores), rows * columns * sizeof *scores);
    const Target into_residual = {.out = out, .width = width, .base = residual}, into_scores = {.total = scores, .width = columns};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (long column = 0; column < width; column += WIDTH)
            panel_added(context, depth, layer->o_proj + column * depth, 0, rows, column, &into_residual);
#pragma omp for schedule(dynamic)
        for (long first = 0; first < rows; first += ROWS) {
            const long last = first + ROWS < rows ? first + ROWS : rows;
            for (long i = first; i < last; i++)
                normalise(out + i * width, layer->output_norm, hidden + i * width, width, layer->eps);
            for (long column = 0; column < columns; column += WIDTH)
                panel_floats(hidden, width, layer->gate + column * width, first, last, column, &into_scores);
            for (long i = first; layer->gate && i < last; i++)
                choose(layer, scores + i * columns, columns, ids + i * layer->top_k, weights + i * layer->top_k);
        }
    }
}
